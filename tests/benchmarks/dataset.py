"""Files to measure on: the same rows in both, but for the event ids, which each side makes its own way."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from moai_flow.memory import RetentionPolicy, SwarmDB
from moai_flow.memory.models import new_id

from .raw import INSERT_EVENT, TABLES, iso, spaced

#: What an event, an agent or a metric carries: about 120 bytes of JSON.
METADATA: dict[str, Any] = {
    "prompt": "Design the API of the order service",
    "model": "large-4",
    "priority": 3,
    "tags": ["backend", "design"],
}
VALUE: dict[str, Any] = {"language": "python", "style": "functional", "line_length": 120, "tools": ["ruff", "mypy"]}

START = datetime(2025, 11, 30, tzinfo=UTC)
STEP = timedelta(seconds=1)
KEYS_PER_SESSION = 100
ACTIVE_AGENTS = 100
MEMORY_TYPES = ("semantic", "episodic", "context_hint")


def agents_at_work(rows: int) -> int:
    """Return how many agents a file of so many events has: each has at least 100 of them."""
    return max(10, rows // 1000)


def agent(number: int, rows: int) -> str:
    """Return the id of one of the agents that have events."""
    return f"agent-{number % agents_at_work(rows):07}"


def memory_of(number: int, rows: int) -> tuple[str, str, str]:
    """Return session, type and key of one of the memories."""
    number %= rows
    return f"session-{number // KEYS_PER_SESSION:07}", MEMORY_TYPES[number % 3], f"key-{number % KEYS_PER_SESSION:03}"


def build(path: Path, rows: int, new_event_id: Callable[[], str]) -> None:
    """Make a file with *rows* rows in every table."""
    SwarmDB(path, retention=RetentionPolicy.keep_all()).close()  # The rows are old ones.
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("PRAGMA cache_size = -262144")
        raw.execute("PRAGMA synchronous = OFF")
        raw.execute("BEGIN")
        # Built afterwards they cost a tenth, and are the same.
        indexes = raw.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall()
        for name, _ in indexes:
            raw.execute(f"DROP INDEX {name}")
        for sql, bound in _inserts(rows, new_event_id):
            raw.executemany(sql, bound)
        for _, sql in indexes:
            raw.execute(sql)
        raw.execute("COMMIT")
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def build_pair(folder: Path, rows: int) -> tuple[Path, Path]:
    """Make a file for SwarmDB and one for the raw side."""
    ours, raw = folder / f"swarm-{rows}.db", folder / f"raw-{rows}.db"
    build(ours, rows, new_id)
    build(raw, rows, lambda: str(uuid4()))
    return ours, raw


def copy_of(path: Path, name: str) -> Path:
    """Return a copy of a file that nobody has open."""
    copy = path.with_name(f"{name}-{path.name}")
    shutil.copyfile(path, copy)
    return copy


def warm(path: Path) -> None:
    """Read a file once, so that the system has it in memory: whoever comes first would pay for the disk."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def content(path: Path) -> dict[str, list[Any]]:
    """Return all rows of a file that do not differ by chance, with JSON decoded: what both sides should agree on."""
    found: dict[str, list[Any]] = {}
    with closing(sqlite3.connect(path)) as raw:
        raw.row_factory = sqlite3.Row
        for table in TABLES:
            rows = [dict(row) for row in raw.execute(f"SELECT * FROM {table} ORDER BY rowid")]
            for row in rows:
                row.pop("event_id", None)
                row.pop("created_at", None)
                for name in ("metadata", "value"):
                    if isinstance(row.get(name), str):
                        row[name] = json.loads(row[name])
            found[table] = rows
    return found


def _inserts(rows: int, new_event_id: Callable[[], str]) -> Iterator[tuple[str, Iterator[tuple[Any, ...]]]]:
    metadata, value = json.dumps(METADATA), json.dumps(VALUE)
    numbers = range(rows)
    # Not iso(START + ...) in a million places: most of the build would be that.
    times = [iso(START + STEP * number) for number in numbers]
    short_times = [spaced(START + STEP * number) for number in numbers]
    types = ("spawn", "complete", "error", "complete")
    yield (
        INSERT_EVENT,
        (
            (new_event_id(), types[number % 4], agent(number, rows), "coder", times[number], metadata, times[number])
            for number in numbers
        ),
    )
    yield (
        "INSERT INTO agent_registry VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (f"agent-{number:07}", "coder", "running", epoch, None, None, metadata, times[number])
            if number % max(1, rows // ACTIVE_AGENTS) == 0
            else (f"agent-{number:07}", "coder", "complete", epoch, epoch + 3.5, 3500, metadata, times[number])
            for number in numbers
            for epoch in [START.timestamp() + number]
        ),
    )
    yield (
        "INSERT INTO session_memory (session_id, memory_type, key, value, timestamp, ttl_hours, created_at) "
        "VALUES (?, ?, ?, ?, ?, NULL, ?)",
        ((*memory_of(number, rows), value, times[number], times[number]) for number in numbers),
    )
    yield (
        "INSERT INTO task_metrics VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (f"task-{number:07}", agent(number, rows), number % 5000, "success", 1200, 3, short_times[number])
            for number in numbers
        ),
    )
    for table, owner in (("agent_metrics", "agent_id"), ("swarm_metrics", "swarm_id")):
        yield (
            f"INSERT INTO {table} ({owner}, metric_type, value, metadata, timestamp) VALUES (?, 'throughput', ?, ?, ?)",
            ((agent(number, rows), number / 7, metadata, short_times[number]) for number in numbers),
        )
