"""The same calls on PostgreSQL: SwarmDB beside psycopg, as somebody would write it by hand who knows how."""

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Json

from moai_flow.memory import RetentionPolicy, SwarmDB
from moai_flow.memory.models import new_id

from .dataset import METADATA, START, STEP, VALUE, agent, memory_of
from .measuring import Measurement
from .operations import CASES, measure

#: What is measured there, and the highest acceptable ratio.
BARS = {
    "insert_event": 1.2,
    "insert_events, 1,000": 1.4,
    "get_agent": 1.3,
    "get_events, newest 100 of an agent": 1.1,
    "update_agent_status": None,
    "store_memory": None,
    "get_memory": None,
    "store_task_metric": None,
}

Row = dict[str, Any]


def measurements(rows: int, only: str, *, rounds: int) -> Iterator[Measurement]:
    """Yield every comparison whose name holds *only*, on a server of its own, with *rows* rows in each table."""
    wanted = [case for case in CASES if case.name in BARS and only in case.name]
    if not wanted:
        return
    with ExitStack() as stack:
        server = stack.enter_context(test_server().running())
        ours = stack.enter_context(SwarmDB(url=fill(server.create_database(), rows, new_id)))
        raw = stack.enter_context(closing(RawServer(fill(server.create_database(), rows, lambda: str(uuid4())))))
        for case in wanted:
            calls = case.calls if case.calls < 100 else case.calls // 5
            bounded = replace(case, calls=calls, at_most=BARS[case.name], bar_rows=(rows,))
            found = measure(bounded, ours, raw, rows, durability="", rounds=rounds)
            yield replace(found, against="psycopg", durability="off" if case.writes else "")


def test_server() -> Any:
    """Return the module that starts the tests' server, which is no package's."""
    path = Path(__file__).parents[1] / "postgres.py"
    spec = importlib.util.spec_from_file_location("postgres", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["postgres"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(url: str, rows: int, new_event_id: Any) -> str:
    """Fill a database, and return its URL."""
    SwarmDB(url=url, retention=RetentionPolicy.keep_all()).close()  # The rows are old ones.
    numbers = range(rows)
    tables: dict[str, Iterator[tuple[Any, ...]]] = {
        "agent_events (event_id, event_type, agent_id, agent_type, timestamp, metadata, created_at)": (
            (new_event_id(), "complete", agent(number, rows), "coder", START + STEP * number, Json(METADATA), START)
            for number in numbers
        ),
        "agent_registry (agent_id, agent_type, status, spawn_time, metadata, last_updated)": (
            (f"agent-{number:07}", "coder", "running", START.timestamp() + number, Json(METADATA), START)
            for number in numbers
        ),
        "session_memory (session_id, memory_type, key, value, timestamp, created_at)": (
            (*memory_of(number, rows), Json(VALUE), START, START) for number in numbers
        ),
    }
    with psycopg.connect(plain_url(url), autocommit=True) as connection:
        for table, values in tables.items():
            with connection.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN".encode()) as copy:
                for value in values:
                    copy.write_row(value)
        connection.execute("VACUUM ANALYZE")
    return url


def plain_url(url: str) -> str:
    """Return a database's URL as psycopg takes it."""
    return url.replace("+psycopg", "")


class RawServer:
    """A store made by hand: one connection in autocommit, constant SQL, rows as dicts."""

    def __init__(self, url: str) -> None:
        # In the zone that SwarmDB uses: others are slower to read.
        self.raw = psycopg.connect(plain_url(url), autocommit=True, row_factory=dict_row, options="-c TimeZone=UTC")

    def close(self) -> None:
        """Close it."""
        self.raw.close()

    def _event(self, event: Row) -> tuple[Any, ...]:
        now = datetime.now(UTC)
        kind, agent_id, agent_type = event["event_type"], event["agent_id"], event["agent_type"]
        return str(uuid4()), kind, agent_id, agent_type, event.get("timestamp", now), Json(event["metadata"]), now

    def insert_event(self, event: Row) -> str:
        bound = self._event(event)
        self.raw.execute(INSERT_EVENT, bound)
        return str(bound[0])

    def insert_events(self, events: Iterable[Row]) -> list[str]:
        rows = [self._event(event) for event in events]
        with self.raw.transaction(), self.raw.cursor() as cursor:
            cursor.executemany(INSERT_EVENT, rows)
        return [row[0] for row in rows]

    def get_events(self, agent_id: str, limit: int) -> list[Row]:
        return self.raw.execute(
            "SELECT * FROM agent_events WHERE agent_id = %s ORDER BY timestamp DESC, id DESC LIMIT %s",
            (agent_id, limit),
        ).fetchall()

    def get_agent(self, agent_id: str) -> Row | None:
        return self.raw.execute("SELECT * FROM agent_registry WHERE agent_id = %s", (agent_id,)).fetchone()

    def update_agent_status(self, agent_id: str, status: str) -> Row | None:
        return self.raw.execute(
            "UPDATE agent_registry SET status = %s, complete_time = NULL, duration_ms = NULL, last_updated = %s "
            "WHERE agent_id = %s RETURNING *",
            (status, datetime.now(UTC), agent_id),
        ).fetchone()

    def store_memory(self, session_id: str, memory_type: str, key: str, value: Any) -> int:
        now = datetime.now(UTC)
        row = self.raw.execute(
            "INSERT INTO session_memory (session_id, memory_type, key, value, timestamp, created_at) "
            "VALUES (%s, %s, %s, %s, %s, %s) RETURNING id",
            (session_id, memory_type, key, Json(value), now, now),
        ).fetchone()
        assert row is not None
        return int(row["id"])

    def get_memory(self, session_id: str, memory_type: str, key: str) -> Any:
        row = self.raw.execute(
            "SELECT * FROM session_memory WHERE session_id = %s AND memory_type = %s AND key = %s "
            "ORDER BY id DESC LIMIT 1",
            (session_id, memory_type, key),
        ).fetchone()
        return None if row is None else row["value"]

    def store_task_metric(
        self, task_id: str, agent_id: str, duration_ms: int, result: str, tokens_used: int, files_changed: int
    ) -> bool:
        return bool(
            self.raw.execute(
                "INSERT INTO task_metrics (task_id, agent_id, duration_ms, result, tokens_used, files_changed, "
                "timestamp) VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (task_id, timestamp) DO NOTHING",
                (task_id, agent_id, duration_ms, result, tokens_used, files_changed, datetime.now(UTC)),
            ).rowcount
        )


INSERT_EVENT = (
    "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp, metadata, created_at) "
    "VALUES (%s, %s, %s, %s, %s, %s, %s)"
)
