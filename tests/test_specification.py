"""Every code block of the specification, with paths and elided SQL filled in, a block a test."""

import ast
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import REPOSITORY
from moai_flow.memory import SwarmDB

EVENT = (
    "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp) "
    "VALUES ('e-raw', 'spawn', 'agent-123', 'expert-backend', '2025-11-30T10:00:00')"
)
AGENT = "UPDATE agent_registry SET status = 'running' WHERE agent_id = 'agent-123'"
MEMORY = (
    "INSERT INTO session_memory (session_id, memory_type, key, value, timestamp) "
    "VALUES ('session-123', 'semantic', 'k', '1', '2025-11-30T10:00:00')"
)


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SwarmDB]:
    """A store at the default location, under a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    with SwarmDB() as store:
        yield store


def test_initialization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    # Default location (.moai/memory/swarm.db)
    db = SwarmDB()
    db.close()
    assert (tmp_path / ".moai/memory/swarm.db").is_file()

    # Custom location
    db = SwarmDB(db_path=tmp_path / "custom/path/swarm.db")
    db.close()
    assert (tmp_path / "custom/path/swarm.db").is_file()

    # Context manager (auto-close)
    with SwarmDB() as db:
        db.insert_event({"event_type": "spawn", "agent_id": "agent-123", "agent_type": "expert-backend"})


def test_insert_event(db: SwarmDB) -> None:
    event_id = db.insert_event(
        event_data={
            "event_type": "spawn",
            "agent_id": "agent-123",
            "agent_type": "expert-backend",
            "timestamp": "2025-11-30T10:00:00",
            "metadata": {"prompt": "Design API", "model": "claude-sonnet-4"},
        },
        event_id="optional-custom-id",  # Generates UUID if not provided
    )

    assert event_id == "optional-custom-id"
    assert db.get_events()[0]["metadata"] == {"prompt": "Design API", "model": "claude-sonnet-4"}


def test_get_events(db: SwarmDB) -> None:
    for agent_id in ("agent-123", "agent-456"):
        for event_type in ("spawn", "complete"):
            db.insert_event({"event_type": event_type, "agent_id": agent_id, "agent_type": "expert-backend"})

    # Get all events
    events = db.get_events(limit=100)
    assert len(events) == 4

    # Filter by agent
    events = db.get_events(agent_id="agent-123", limit=50)
    assert [event["event_type"] for event in events] == ["complete", "spawn"]

    # Filter by type
    events = db.get_events(event_type="spawn", limit=20)
    assert [event["agent_id"] for event in events] == ["agent-456", "agent-123"]

    # Combined filters
    events = db.get_events(agent_id="agent-123", event_type="complete", limit=10)
    assert len(events) == 1


def test_agent_registry(db: SwarmDB, capsys: pytest.CaptureFixture[str]) -> None:
    # register_agent()
    db.register_agent(
        agent_id="agent-123",
        agent_type="expert-backend",
        status="spawned",
        metadata={"prompt": "Design API", "priority": "high"},
    )

    # get_active_agents()
    active = db.get_active_agents()
    for agent in active:
        print(f"{agent['agent_id']}: {agent['agent_type']} ({agent['status']})")
    assert capsys.readouterr().out == "agent-123: expert-backend (spawned)\n"

    # update_agent_status(): to running
    db.update_agent_status("agent-123", "running")
    # Update to complete with duration
    db.update_agent_status("agent-123", "complete", duration_ms=3000)

    # Update to error
    db.update_agent_status("agent-123", "error")
    assert db.get_active_agents() == []


def test_get_agent(db: SwarmDB, capsys: pytest.CaptureFixture[str]) -> None:
    db.register_agent("agent-123", "expert-backend", metadata={"prompt": "Design API"})
    db.update_agent_status("agent-123", "complete", duration_ms=3000)

    agent = db.get_agent("agent-123")
    if agent:
        print(f"Status: {agent['status']}")
        print(f"Duration: {agent['duration_ms']}ms")
        print(f"Metadata: {agent['metadata']}")

    assert capsys.readouterr().out == ("Status: complete\nDuration: 3000ms\nMetadata: {'prompt': 'Design API'}\n")


def test_session_memory(db: SwarmDB, capsys: pytest.CaptureFixture[str]) -> None:
    # Permanent memory
    db.store_memory(
        session_id="session-123",
        memory_type="context_hint",
        key="user_preference",
        value={"language": "python", "style": "functional"},
    )
    # Temporary memory with TTL
    db.store_memory(
        session_id="session-123",
        memory_type="context_hint",
        key="temp_setting",
        value={"enabled": True},
        ttl_hours=24,  # Auto-expires after 24 hours
    )

    value = db.get_memory(session_id="session-123", memory_type="context_hint", key="user_preference")

    if value:
        print(f"Preference: {value}")
    assert capsys.readouterr().out == "Preference: {'language': 'python', 'style': 'functional'}\n"


def test_transaction_context_manager(db: SwarmDB) -> None:
    db.register_agent("agent-123", "expert-backend")

    # Automatic commit/rollback
    with db.transaction() as conn:
        cursor = conn.cursor()

        # Multiple operations
        cursor.execute(EVENT)
        cursor.execute(AGENT)
        cursor.execute(MEMORY)

        # Auto-commit on success

    assert db.get_events()[0].event_id == "e-raw"
    assert db.get_active_agents()[0].status == "running"
    assert db.get_memory("session-123", "semantic", "k") == 1

    try:
        with db.transaction() as conn:
            cursor = conn.cursor()
            cursor.execute(AGENT.replace("running", "error"))
            cursor.execute(EVENT)
    except Exception as e:  # noqa: BLE001 (the specification's)
        # Auto-rollback on error
        print(f"Transaction failed: {e}")

    assert db.get_active_agents()[0].status == "running"


def test_batch_operations(db: SwarmDB) -> None:
    batch_events = [SimpleNamespace(id=f"e-{number}", type="spawn") for number in range(3)]

    with db.transaction() as conn:
        cursor = conn.cursor()

        # Insert multiple events atomically
        for event in batch_events:
            cursor.execute(
                "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp) "
                "VALUES (?, ?, ?, ?, ?)",
                (event.id, event.type, "agent-123", "expert-backend", "2025-11-30T10:00:00"),
            )

    assert {event.event_id for event in db.get_events()} == {"e-0", "e-1", "e-2"}


def test_maintenance(db: SwarmDB, capsys: pytest.CaptureFixture[str]) -> None:
    db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t", "timestamp": "2001-01-01T00:00:00"})

    # Delete events older than 30 days
    deleted = db.cleanup_old_events(days=30)
    print(f"Cleaned up {deleted} old events")
    assert capsys.readouterr().out == "Cleaned up 1 old events\n"

    # Custom retention period
    deleted = db.cleanup_old_events(days=90)
    assert deleted == 0

    # Optimize database storage (reclaim space)
    db.vacuum()

    # Close all connections
    db.close()


def test_thread_safety(db: SwarmDB) -> None:
    def worker(agent_id: str) -> None:
        # Each thread gets its own connection
        db.insert_event(
            {
                "event_type": "spawn",
                "agent_id": agent_id,
                "agent_type": "expert-backend",
                "timestamp": datetime.now().isoformat(),  # noqa: DTZ005 (the specification's)
            }
        )

    # Safe concurrent access
    threads = [threading.Thread(target=worker, args=(f"agent-{i}",)) for i in range(10)]

    for t in threads:
        t.start()

    for t in threads:
        t.join()

    assert {event.agent_id for event in db.get_events()} == {f"agent-{i}" for i in range(10)}


def test_good_and_bad_batches(db: SwarmDB) -> None:
    # Good: Single transaction
    with db.transaction() as conn:
        cursor = conn.cursor()
        for i in range(10):
            cursor.execute(EVENT.replace("e-raw", f"e-{i}"))

    # Bad: individual commits
    for i in range(10):
        db.insert_event({"event_type": "spawn", "agent_id": f"a-{i}", "agent_type": "t"})  # Each creates transaction

    assert len(db.get_events()) == 20


@pytest.mark.parametrize(
    ("second", "printed"),
    [
        (EVENT, "Integrity error: UNIQUE constraint failed: agent_events.event_id"),
        ("UPDATE no_such_table SET a = 1", "Operational error: no such table: no_such_table"),
        (None, "Unexpected error: execute() argument 1 must be str, not None"),
    ],
)
def test_error_handling(db: SwarmDB, second: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with db.transaction() as conn:
            cursor = conn.cursor()
            cursor.execute(EVENT)
            cursor.execute(second)
    except sqlite3.IntegrityError as e:
        # Handle constraint violations
        print(f"Integrity error: {e}")
    except sqlite3.OperationalError as e:
        # Handle database locked, disk full, etc.
        print(f"Operational error: {e}")
    except Exception as e:  # noqa: BLE001
        # Handle all other errors
        print(f"Unexpected error: {e}")
    finally:
        db.close()

    assert capsys.readouterr().out == printed + "\n"


def test_domain_methods_raise_what_those_clauses_catch(db: SwarmDB) -> None:
    event_id = db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"})

    with pytest.raises(sqlite3.IntegrityError):
        db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"}, event_id)


def test_migration_strategy(db: SwarmDB, capsys: pytest.CaptureFixture[str]) -> None:
    # Check current schema version
    conn = db._get_connection()
    cursor = conn.cursor()
    cursor.execute("SELECT value FROM schema_info WHERE key = 'version'")
    version = cursor.fetchone()[0]
    print(f"Schema version: {version}")

    assert capsys.readouterr().out == "Schema version: 2.1.0\n"


def test_best_practices(db: SwarmDB, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    # 1. Use context manager for cleanup
    with SwarmDB() as other:
        other.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"})

    # 3. Daily cleanup, weekly vacuum
    db.cleanup_old_events(days=30)
    db.vacuum()

    # 4. Monitor database size
    db_size = os.path.getsize(db.db_path)  # noqa: PTH202 (the specification's)
    print(f"Database size: {db_size / 1024 / 1024:.2f} MB")
    assert capsys.readouterr().out.startswith("Database size: 0.1")

    # 5. Handle errors gracefully
    logger = logging.getLogger(__name__)
    event_data = {"event_type": "no such type", "agent_id": "a", "agent_type": "t"}
    try:
        db.insert_event(event_data)  # type: ignore[arg-type]
    except Exception as e:  # noqa: BLE001
        logger.error(f"Failed to insert event: {e}")
        # Continue operation with degraded functionality
    assert "event_type: got 'no such type'" in caplog.text


SPECIFICATION = REPOSITORY.parent / "shared" / "seed" / "swarm-db.md"


def statements(source: str) -> set[str]:
    """Return the simple statements of a program, each in one spelling."""
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr)
    }


def test_no_statement_of_the_specification_is_missing_here() -> None:
    if not SPECIFICATION.exists():
        pytest.skip("the specification is not beside this checkout")
    blocks = re.findall(r"```python\n(.*?)```", SPECIFICATION.read_text(), re.DOTALL)
    specified = set().union(*map(statements, blocks))
    elided = {statement for statement in specified if "..." in statement or "/custom/path" in statement}

    assert len(blocks) == 23
    assert specified - elided - statements(Path(__file__).read_text()) == set()
