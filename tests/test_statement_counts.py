"""How many statements each operation sends: a slower one would send more, and this is no clock."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from conftest import Clock
from driver import Statements, counting
from moai_flow.memory import EventCursor, EventData, InvalidInputError, SwarmDB

EVENT: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}


@pytest.fixture
def sent() -> Iterator[Statements]:
    with counting() as statements:
        yield statements


@pytest.fixture
def store(path: Path, sent: Statements, clock: Clock) -> Iterator[SwarmDB]:
    with SwarmDB(path, clock=clock) as db:
        db.register_agent("a", "t")
        db.insert_events([EVENT] * 25)
        db.store_memory("s", "semantic", "k", 1)
        db.store_task_metric("task", "a", 1, "success")
        yield db


DAY = timedelta(days=1)
PAST, NEXT = datetime(2025, 1, 1, tzinfo=UTC), datetime(2025, 1, 2, tzinfo=UTC)
PLACE = EventCursor(datetime(2026, 1, 1, tzinfo=UTC), 5)

#: One statement, with no BEGIN or COMMIT around it: the driver commits it by itself.
SINGLE: dict[str, Callable[[SwarmDB], object]] = {
    "insert_event": lambda db: db.insert_event(EVENT),
    "get_events": lambda db: db.get_events(agent_id="a"),
    "get_events before": lambda db: db.get_events(before=PLACE),
    "register_agent": lambda db: db.register_agent("a", "t"),
    "update_agent_status": lambda db: db.update_agent_status("a", "running"),
    "update_agent_status to complete": lambda db: db.update_agent_status("a", "complete", duration_ms=1),
    "get_agent": lambda db: db.get_agent("a"),
    "get_active_agents": lambda db: db.get_active_agents(),
    "list_agents": lambda db: db.list_agents(status="spawned"),
    "delete_agent": lambda db: db.delete_agent("a"),
    "store_memory": lambda db: db.store_memory("s", "semantic", "k", 2, ttl_hours=1),
    "get_memory": lambda db: db.get_memory("s", "semantic", "k"),
    "list_memories": lambda db: db.list_memories("s"),
    "memory_history": lambda db: db.memory_history("s", "semantic", "k"),
    "store_task_metric": lambda db: db.store_task_metric("other", "a", 1, "success"),
    "store_agent_metric": lambda db: db.store_agent_metric("a", "duration", 1),
    "store_swarm_metric": lambda db: db.store_swarm_metric("s", "health", 1),
    "get_task_metrics": lambda db: db.get_task_metrics(agent_id="a"),
    "get_agent_metrics": lambda db: db.get_agent_metrics("a"),
    "get_swarm_metrics": lambda db: db.get_swarm_metrics("s"),
    "summarize_tasks": lambda db: db.summarize_tasks("a"),
    "summarize_agents": lambda db: db.summarize_agents(),
    "summarize_swarm": lambda db: db.summarize_swarm("s"),
    "metric_series between bounds": lambda db: db.metric_series(
        "duration_ms", bucket=DAY, since=PAST, until=PAST + DAY
    ),
    "cleanup_old_events": lambda db: db.cleanup_old_events(),
    "schema_version": lambda db: db.schema_version,
}


@pytest.mark.parametrize("call", SINGLE.values(), ids=SINGLE.keys())
def test_an_operation_is_one_statement(store: SwarmDB, sent: Statements, call: Callable[[SwarmDB], object]) -> None:
    sent.clear()
    call(store)

    assert len(sent) == 1, sent


def test_inside_a_transaction_it_is_one_statement_as_well(store: SwarmDB, sent: Statements) -> None:
    with store.transaction():
        for call in SINGLE.values():
            sent.clear()
            call(store)
            assert len(sent) == 1, sent


def test_a_batch_is_one_statement_in_one_transaction(store: SwarmDB, sent: Statements) -> None:
    sent.clear()
    store.insert_events([EVENT] * 1000)

    assert [statement.split()[0] for statement in sent] == ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]


def test_a_block_costs_four_statements_and_a_nested_one_two(store: SwarmDB, sent: Statements) -> None:
    sent.clear()
    with store.transaction(), store.transaction():
        store.insert_event(EVENT)

    assert [statement.split()[0] for statement in sent] == [
        "BEGIN",
        "SAVEPOINT",
        "SAVEPOINT",
        "INSERT",
        "RELEASE",
        "RELEASE",
        "COMMIT",
    ]


def test_deleting_a_memory_is_a_read_and_a_write_in_one_transaction(store: SwarmDB, sent: Statements) -> None:
    sent.clear()
    store.delete_memory("s", "semantic", "k")

    words = [statement.split()[0] for statement in sent]
    assert words == ["BEGIN", "SAVEPOINT", "SELECT", "DELETE", "RELEASE", "COMMIT"]


def test_a_task_metric_of_a_taken_microsecond_takes_one_statement_more(store: SwarmDB, sent: Statements) -> None:
    sent.clear()
    store.store_task_metric("task", "a", 1, "success")

    assert len(sent) == 2


def test_a_series_without_both_bounds_takes_one_statement_more(store: SwarmDB, sent: Statements) -> None:
    sent.clear()
    store.metric_series("duration_ms", bucket=DAY)

    assert len(sent) == 2


def test_too_many_buckets_are_refused_before_they_are_added_up(store: SwarmDB, sent: Statements) -> None:
    store.store_task_metric("task", "a", 1, "success", timestamp=PAST)
    for bounds, statements in (({"since": PAST}, 1), ({"since": PAST, "until": PAST + 999 * DAY}, 0)):
        sent.clear()
        with pytest.raises(InvalidInputError, match="buckets"):
            store.metric_series("duration_ms", bucket=timedelta(seconds=1), **bounds)  # type: ignore[arg-type]
        assert len(sent) == statements


@pytest.mark.parametrize(("batch_size", "statements"), [(1000, 2), (25, 3), (10, 4)])
def test_iterating_costs_one_statement_a_page(
    store: SwarmDB, sent: Statements, batch_size: int, statements: int
) -> None:
    sent.clear()
    assert len(list(store.iter_events(batch_size=batch_size))) == 25

    assert len(sent) == statements  # The first one notes where the log ends.


def test_opening_an_up_to_date_file_reads_its_version_and_its_journal(path: Path) -> None:
    SwarmDB(path).close()
    with counting() as sent, SwarmDB(path) as db:
        assert [statement.partition("=")[0].strip() for statement in sent] == [
            "PRAGMA read_uncommitted",  # SQLAlchemy's own, once an engine.
            "PRAGMA foreign_keys",
            "PRAGMA synchronous",
            "PRAGMA cache_size",
            "SELECT value FROM schema_info WHERE key",
            "PRAGMA journal_mode",
        ]
        sent.clear()
        db.get_agent("a")
        assert len(sent) == 1


def test_a_connection_is_opened_once_for_many_calls(store: SwarmDB, sent: Statements) -> None:
    sent.clear()
    for _ in range(10):
        store.insert_event(EVENT)

    assert len(sent) == 10  # A new connection would send its pragmas.
