"""The floor: the same work with nothing but `sqlite3`, as somebody would write it by hand who knows how.

One held connection in autocommit, constant SQL, the same tables, indexes and pragmas; ids from `uuid4`, `json` for
JSON, rows as dicts, times as the text that is stored. Nothing is validated. Methods have the facade's names and
parameters, so that one call measures either side; each takes just the filters that are measured.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from moai_flow.memory.engine import PAGE_CACHE_MIB

Row = dict[str, Any]

INSERT_EVENT = (
    "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp, metadata, created_at) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
REGISTER = (
    "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time, complete_time, duration_ms, metadata, "
    "last_updated) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (agent_id) DO UPDATE SET "
    "agent_type = excluded.agent_type, status = excluded.status, spawn_time = excluded.spawn_time, "
    "complete_time = excluded.complete_time, duration_ms = excluded.duration_ms, metadata = excluded.metadata, "
    "last_updated = excluded.last_updated RETURNING *"
)
FINISH = (
    "UPDATE agent_registry SET status = ?, complete_time = ?, duration_ms = coalesce(?, duration_ms), "
    "last_updated = ? WHERE agent_id = ? RETURNING *"
)
RESUME = (
    "UPDATE agent_registry SET status = ?, complete_time = NULL, duration_ms = NULL, last_updated = ? "
    "WHERE agent_id = ? RETURNING *"
)
BEAT = "UPDATE agent_registry SET last_updated = ? WHERE status NOT IN ('complete', 'error') AND agent_id = ?"
FINISH_SPAWN = (
    "UPDATE agent_registry SET status = ?, complete_time = ?, duration_ms = coalesce(?, duration_ms), "
    "last_updated = ? WHERE agent_id = ? AND spawn_time = ?"
)
FINISH_SILENT = (
    "UPDATE agent_registry SET status = 'error', complete_time = ?, last_updated = ? "
    "WHERE agent_id = ? AND status = ? AND last_updated = ? RETURNING *"
)
INSERT_MEMORY = (
    "INSERT INTO session_memory (session_id, memory_type, key, value, timestamp, ttl_hours, created_at) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
OF_KEY = "FROM session_memory WHERE session_id = ? AND memory_type = ? AND key = ?"
INSERT_TASK = (
    "INSERT INTO task_metrics (task_id, agent_id, duration_ms, result, tokens_used, files_changed, timestamp) "
    "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (task_id, timestamp) DO NOTHING"
)
INSERT_AGENT_METRIC = (
    "INSERT INTO agent_metrics (agent_id, metric_type, value, metadata, timestamp) VALUES (?, ?, ?, ?, ?)"
)
INSERT_SWARM_METRIC = (
    "INSERT INTO swarm_metrics (swarm_id, metric_type, value, metadata, timestamp) VALUES (?, ?, ?, ?, ?)"
)
TASK_TOTALS = (
    "result, count(*) AS count, count(duration_ms) AS measured, sum(duration_ms) AS total, "
    "max(duration_ms) AS longest, sum(tokens_used) AS tokens_used, sum(files_changed) AS files_changed "
    "FROM task_metrics"
)
#: The ranks, from 0, of the values next to the percentiles of *size* values.
RANKS = ", ".join(f"(size - 1) * {percent} / 100, ((size - 1) * {percent} + 99) / 100" for percent in (50, 95, 99))
PERCENTILES = (
    "SELECT {key}, place, size, value FROM (SELECT {key}, row_number() OVER same - 1 AS place, "
    "count(*) OVER (PARTITION BY {key}) AS size, {value} AS value FROM {rows} "
    "WINDOW same AS (PARTITION BY {key} ORDER BY {value})) WHERE place IN (" + RANKS + ")"
)
OF_ALL_TASKS = (
    "WITH counted AS (SELECT duration_ms AS value, count(*) AS times FROM task_metrics WHERE duration_ms IS NOT NULL "
    "GROUP BY duration_ms), placed AS (SELECT value, times, sum(times) OVER (ORDER BY value) AS upto, "
    "sum(times) OVER () AS size FROM counted) SELECT value, times, upto, size FROM placed WHERE "
    + " OR ".join(f"upto > {rank} AND upto - times <= {rank}" for rank in RANKS.split(", "))
)
RESULTS = ("success", "failure", "timeout", "cancelled")
TABLES = ("agent_events", "agent_registry", "session_memory", "task_metrics", "agent_metrics", "swarm_metrics")


def connect(path: Path, *, durability: str = "normal") -> sqlite3.Connection:
    """Return a connection with the settings that SwarmDB uses."""
    raw = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.execute(f"PRAGMA synchronous = {durability}")
    raw.execute("PRAGMA foreign_keys = ON")
    raw.execute(f"PRAGMA cache_size = {PAGE_CACHE_MIB * -1024}")
    raw.row_factory = sqlite3.Row
    return raw


def iso(moment: datetime) -> str:
    """Return *moment* as TEXT columns hold it."""
    return moment.isoformat(timespec="microseconds")


def spaced(moment: datetime) -> str:
    """Return *moment* as DATETIME columns hold it."""
    return moment.replace(tzinfo=None).isoformat(" ")


def with_metadata(row: sqlite3.Row) -> Row:
    """Return a row as a dict, its JSON decoded."""
    found = dict(row)
    found["metadata"] = json.loads(found["metadata"])
    return found


def with_value(row: sqlite3.Row) -> Row:
    """Return a row of memory as a dict, its JSON decoded."""
    found = dict(row)
    found["value"] = json.loads(found["value"])
    return found


def is_live(row: Row, now: datetime) -> bool:
    """Whether a row of memory has not expired."""
    hours = row["ttl_hours"]
    return hours is None or now < datetime.fromisoformat(row["timestamp"]) + timedelta(hours=hours)


def between(lower: float, upper: float, part: int) -> float:
    """Return the value so many hundredths of the way from one to the other."""
    return (lower * (100 - part) + upper * part) / 100


def percentiles(size: int, value_at: Callable[[int], float], suffix: str = "") -> dict[str, float]:
    """Return the percentiles of *size* values, of which one is asked for by its rank."""
    found = {}
    for percent in (50, 95, 99):
        rank, part = divmod((size - 1) * percent, 100)
        found[f"p{percent}{suffix}"] = between(value_at(rank), value_at(rank + (part > 0)), part)
    return found


def task_summary(rows: Iterable[Row], of_ranks: dict[str, float]) -> Row:
    """Return the summary of rows of a result each."""
    rows = list(rows)
    results = dict.fromkeys(RESULTS, 0) | {row["result"]: row["count"] for row in rows}
    count, measured = sum(results.values()), sum(row["measured"] for row in rows)
    return {
        "count": count,
        "results": results,
        "success_rate": results["success"] / count,
        "tokens_used": sum(row["tokens_used"] for row in rows),
        "files_changed": sum(row["files_changed"] for row in rows),
        "measured": measured,
        "mean_ms": sum(row["total"] for row in rows) / measured,
        **of_ranks,
        "max_ms": max(row["longest"] for row in rows),
    }


class RawSwarm:
    """A store made by hand."""

    def __init__(self, path: Path, *, durability: str = "normal", clock: Callable[[], datetime] | None = None) -> None:
        """Open a file that has the tables already."""
        self.path = path
        self.raw = connect(path, durability=durability)
        self._now = clock or (lambda: datetime.now(UTC))

    def close(self) -> None:
        """Close it."""
        self.raw.close()

    # Events

    def _event(self, event: Row) -> tuple[Any, ...]:
        now = iso(self._now())
        return (
            str(uuid4()),
            event["event_type"],
            event["agent_id"],
            event["agent_type"],
            event.get("timestamp", now),
            json.dumps(event["metadata"]),
            now,
        )

    def insert_event(self, event: Row) -> str:
        bound = self._event(event)
        self.raw.execute(INSERT_EVENT, bound)
        return str(bound[0])

    def insert_events(self, events: Iterable[Row]) -> list[str]:
        rows = [self._event(event) for event in events]
        with self.transaction() as raw:
            raw.executemany(INSERT_EVENT, rows)
        return [row[0] for row in rows]

    def get_events(
        self, agent_id: str | None = None, event_type: str | None = None, limit: int = 100, *, before: Any = None
    ) -> list[Row]:
        order = "ORDER BY timestamp DESC, id DESC LIMIT ?"
        if before is not None:
            at, number = iso(before.timestamp), before.id
            found = self.raw.execute(
                "SELECT * FROM agent_events WHERE agent_id = ? AND timestamp <= ? AND (timestamp < ? OR id < ?) "
                + order,
                (agent_id, at, at, number, limit),
            )
        elif agent_id is not None:
            found = self.raw.execute("SELECT * FROM agent_events WHERE agent_id = ? " + order, (agent_id, limit))
        elif event_type is not None:
            found = self.raw.execute("SELECT * FROM agent_events WHERE event_type = ? " + order, (event_type, limit))
        else:
            found = self.raw.execute("SELECT * FROM agent_events " + order, (limit,))
        return [with_metadata(row) for row in found]

    def iter_events(self) -> Iterator[Row]:
        return map(with_metadata, self.raw.execute("SELECT * FROM agent_events ORDER BY timestamp, id"))

    def watch_events(self, after: int) -> Iterator[Row]:
        while found := self.raw.execute(
            "SELECT * FROM agent_events WHERE id > ? ORDER BY id LIMIT 100", (after,)
        ).fetchall():
            yield from map(with_metadata, found)
            after = found[-1]["id"]

    # Agents

    def register_agent(self, agent_id: str, agent_type: str, *, metadata: Row) -> Row:
        now = self._now()
        bound = (agent_id, agent_type, "spawned", now.timestamp(), None, None, json.dumps(metadata), iso(now))
        return self._returned(REGISTER, bound)

    def update_agent_status(self, agent_id: str, status: str, duration_ms: int | None = None) -> Row:
        now = self._now()
        if status in ("complete", "error"):
            return self._returned(FINISH, (status, now.timestamp(), duration_ms, iso(now), agent_id))
        return self._returned(RESUME, (status, iso(now), agent_id))

    def _returned(self, sql: str, bound: tuple[Any, ...]) -> Row:
        # fetchone() would leave the statement, and with it the transaction, open.
        (row,) = self.raw.execute(sql, bound).fetchall()
        return with_metadata(row)

    def get_agent(self, agent_id: str) -> Row | None:
        row = self.raw.execute("SELECT * FROM agent_registry WHERE agent_id = ?", (agent_id,)).fetchone()
        return None if row is None else with_metadata(row)

    def get_active_agents(self) -> list[Row]:
        return [
            with_metadata(row)
            for row in self.raw.execute(
                "SELECT * FROM agent_registry WHERE status NOT IN ('complete', 'error') "
                "AND coalesce(status, status) IN ('running', 'spawned') ORDER BY spawn_time DESC, agent_id DESC"
            )
        ]

    def heartbeat(self, agent_id: str) -> bool:
        return bool(self.raw.execute(BEAT, (iso(self._now()), agent_id)).rowcount)

    def find_stale_agents(self, older_than: timedelta) -> list[Row]:
        now = self._now()
        stale = [
            agent
            for agent in self.get_active_agents()
            if now - datetime.fromisoformat(agent["last_updated"]) > older_than
        ]
        return sorted(stale, key=lambda agent: (agent["last_updated"], agent["agent_id"]))

    def mark_stale_agents(self, older_than: timedelta) -> list[Row]:
        marked: list[Row] = []
        for agent in self.find_stale_agents(older_than):
            now = self._now()
            seen = agent["last_updated"]
            silent = (now - datetime.fromisoformat(seen)).total_seconds()
            bound = (now.timestamp(), iso(now), agent["agent_id"], agent["status"], seen)
            with self.transaction() as raw:
                ended = raw.execute(FINISH_SILENT, bound).fetchall()
                if ended:
                    why = {"reason": "stale", "last_updated": seen, "silent_seconds": silent}
                    raw.execute(INSERT_EVENT, self._event_of(agent, "error", now, why))
            marked += map(with_metadata, ended)
        return marked

    def _event_of(self, agent: Row, kind: str, now: datetime, metadata: Row) -> tuple[Any, ...]:
        at = iso(now)
        return str(uuid4()), kind, agent["agent_id"], agent["agent_type"], at, json.dumps(metadata), at

    @contextmanager
    def track_task(self, task_id: str, agent_id: str) -> Iterator[Row]:
        began = time.monotonic_ns()
        task: Row = {"tokens_used": 0, "files_changed": 0}
        result = "success"
        try:
            yield task
        except Exception:
            result = "failure"
            raise
        finally:
            took = (time.monotonic_ns() - began) // 1_000_000
            used = task["tokens_used"], task["files_changed"]
            task["timestamp"] = self.store_task_metric(task_id, agent_id, took, result, *used)

    @contextmanager
    def track_agent(self, agent_id: str, agent_type: str, metadata: Row) -> Iterator[Row]:
        spawned, began = self._now(), time.monotonic_ns()
        agent = {"agent_id": agent_id, "agent_type": agent_type}
        kept = json.dumps(metadata)
        bound = (agent_id, agent_type, "running", spawned.timestamp(), None, None, kept, iso(spawned))
        with self.transaction() as raw:
            raw.execute(REGISTER, bound).fetchall()
            raw.execute(INSERT_EVENT, self._event_of(agent, "spawn", spawned, metadata))
        end: tuple[str, Row] = ("complete", {})
        try:
            yield agent
        except Exception as error:
            end = ("error", {"error_type": type(error).__name__, "error_message": str(error)})
            raise
        finally:
            took = (time.monotonic_ns() - began) // 1_000_000
            now = self._now()
            status, said = end
            with self.transaction() as raw:
                finish = (status, now.timestamp(), took, iso(now), agent_id, spawned.timestamp())
                raw.execute(FINISH_SPAWN, finish)
                raw.execute(INSERT_EVENT, self._event_of(agent, status, now, said))

    def list_agents(self, status: str) -> list[Row]:
        return [
            with_metadata(row)
            for row in self.raw.execute(
                "SELECT * FROM agent_registry WHERE status = ? ORDER BY spawn_time DESC, agent_id DESC", (status,)
            )
        ]

    def delete_agent(self, agent_id: str) -> bool:
        return bool(self.raw.execute("DELETE FROM agent_registry WHERE agent_id = ?", (agent_id,)).rowcount)

    # Memory

    def store_memory(
        self, session_id: str, memory_type: str, key: str, value: Any, ttl_hours: int | None = None
    ) -> int | None:
        now = iso(self._now())
        bound = (session_id, memory_type, key, json.dumps(value), now, ttl_hours, now)
        return self.raw.execute(INSERT_MEMORY, bound).lastrowid

    def get_memory(self, session_id: str, memory_type: str, key: str) -> Any:
        row = self.raw.execute(f"SELECT * {OF_KEY} ORDER BY id DESC LIMIT 1", (session_id, memory_type, key)).fetchone()
        if row is None or not is_live(found := dict(row), self._now()):
            return None
        return json.loads(found["value"])

    def list_memories(self, session_id: str) -> list[Row]:
        now = self._now()
        found = self.raw.execute(
            "SELECT * FROM session_memory WHERE id IN (SELECT max(id) FROM session_memory WHERE session_id = ? "
            "GROUP BY memory_type, key) ORDER BY memory_type, key",
            (session_id,),
        )
        return [row for row in map(with_value, found) if is_live(row, now)]

    def memory_history(self, session_id: str, memory_type: str, key: str) -> list[Row]:
        found = self.raw.execute(f"SELECT * {OF_KEY} ORDER BY id DESC", (session_id, memory_type, key))
        return [with_value(row) for row in found]

    def delete_memory(self, session_id: str, memory_type: str, key: str) -> bool:
        with self.transaction() as raw:
            live = self.get_memory(session_id, memory_type, key) is not None
            raw.execute(f"DELETE {OF_KEY}", (session_id, memory_type, key))
        return live

    # Metrics

    def store_task_metric(
        self, task_id: str, agent_id: str, duration_ms: int, result: str, tokens_used: int, files_changed: int
    ) -> str:
        now = self._now()
        while True:
            kept = spaced(now)
            bound = (task_id, agent_id, duration_ms, result, tokens_used, files_changed, kept)
            if self.raw.execute(INSERT_TASK, bound).rowcount:
                return kept
            now += timedelta(microseconds=1)

    def store_agent_metric(self, agent_id: str, metric_type: str, value: float, metadata: Row) -> int | None:
        bound = (agent_id, metric_type, value, json.dumps(metadata), spaced(self._now()))
        return self.raw.execute(INSERT_AGENT_METRIC, bound).lastrowid

    def store_swarm_metric(self, swarm_id: str, metric_type: str, value: float, metadata: Row) -> int | None:
        bound = (swarm_id, metric_type, value, json.dumps(metadata), spaced(self._now()))
        return self.raw.execute(INSERT_SWARM_METRIC, bound).lastrowid

    def store_task_metrics(self, metrics: Iterable[Row]) -> list[str]:
        now = spaced(self._now())
        rows = [
            (
                metric["task_id"],
                metric["agent_id"],
                metric["duration_ms"],
                metric["result"],
                metric["tokens_used"],
                metric["files_changed"],
                now,
            )
            for metric in metrics
        ]
        with self.transaction() as raw:
            if raw.executemany(INSERT_TASK, rows).rowcount == len(rows):
                return [row[-1] for row in rows]
        raise NotImplementedError("what is measured has no time that is taken")

    def store_agent_metrics(self, metrics: Iterable[Row]) -> int:
        return self._store_figures(INSERT_AGENT_METRIC, "agent_id", metrics)

    def store_swarm_metrics(self, metrics: Iterable[Row]) -> int:
        return self._store_figures(INSERT_SWARM_METRIC, "swarm_id", metrics)

    def _store_figures(self, sql: str, owner: str, metrics: Iterable[Row]) -> int:
        now = spaced(self._now())
        rows = [
            (metric[owner], metric["metric_type"], metric["value"], json.dumps(metric["metadata"]), now)
            for metric in metrics
        ]
        with self.transaction() as raw:
            raw.executemany(sql, rows)
        return len(rows)

    def get_task_metrics(self, *, agent_id: str, limit: int = 100) -> list[Row]:
        found = self.raw.execute(
            "SELECT * FROM task_metrics WHERE agent_id = ? ORDER BY timestamp DESC, task_id DESC LIMIT ?",
            (agent_id, limit),
        )
        return [dict(row) for row in found]

    def get_agent_metrics(self, agent_id: str, *, limit: int = 100) -> list[Row]:
        found = self.raw.execute(
            "SELECT * FROM agent_metrics WHERE agent_id = ? ORDER BY timestamp DESC, metric_id DESC LIMIT ?",
            (agent_id, limit),
        )
        return [with_metadata(row) for row in found]

    def get_swarm_metrics(self, swarm_id: str, metric_type: str, *, limit: int = 100) -> list[Row]:
        found = self.raw.execute(
            "SELECT * FROM swarm_metrics WHERE swarm_id = ? AND metric_type = ? "
            "ORDER BY timestamp DESC, metric_id DESC LIMIT ?",
            (swarm_id, metric_type, limit),
        )
        return [with_metadata(row) for row in found]

    # Summaries

    def summarize_tasks(self, agent_id: str | None = None) -> Row:
        if agent_id is not None:
            sql = f"SELECT {TASK_TOTALS} WHERE agent_id = ? GROUP BY result"
            return task_summary(self._dicts(sql, agent_id), self._ranks_of_agent(agent_id))
        spans = self._dicts(OF_ALL_TASKS)

        def value_at(rank: int) -> float:
            value: float = next(s["value"] for s in spans if s["upto"] - s["times"] <= rank < s["upto"])
            return value

        totals = self._dicts(f"SELECT {TASK_TOTALS} GROUP BY result")
        return task_summary(totals, percentiles(spans[0]["size"], value_at, "_ms"))

    def summarize_agents(self) -> list[Row]:
        totals: dict[str, list[Row]] = {}
        for row in self._dicts(f"SELECT agent_id, {TASK_TOTALS} GROUP BY agent_id, result"):
            totals.setdefault(row["agent_id"], []).append(row)
        measured = "task_metrics WHERE duration_ms IS NOT NULL"
        ranks = self._placed(PERCENTILES.format(key="agent_id", value="duration_ms", rows=measured))
        return [
            {**task_summary(totals[agent], percentiles(*ranks[agent], "_ms")), "agent_id": agent}
            for agent in sorted(totals)
        ]

    def summarize_swarm(self, swarm_id: str) -> Row:
        totals = self._dicts(
            "SELECT metric_type, count(*) AS count, avg(value) AS mean, min(value) AS minimum, max(value) AS maximum "
            "FROM swarm_metrics WHERE swarm_id = ? GROUP BY metric_type",
            swarm_id,
        )
        rows = "swarm_metrics WHERE swarm_id = ?"
        ranks = self._placed(PERCENTILES.format(key="metric_type", value="value", rows=rows), swarm_id)
        figures = {}
        for row in totals:
            kind = row.pop("metric_type")
            newest = self.raw.execute(
                "SELECT value, timestamp FROM swarm_metrics WHERE swarm_id = ? AND metric_type = ? "
                "ORDER BY timestamp DESC, metric_id DESC LIMIT 1",
                (swarm_id, kind),
            ).fetchone()
            latest = {"latest": newest["value"], "latest_at": newest["timestamp"]}
            figures[kind] = {**latest, **row, **percentiles(*ranks[kind])}
        return {"swarm_id": swarm_id, "figures": figures}

    def metric_series(self, metric: str, *, bucket: timedelta, agg: str = "mean", of: str | None = None) -> list[Row]:
        size = bucket // timedelta(seconds=1)
        start = f"CAST(strftime('%s', timestamp) AS INTEGER) / {size} * {size}"
        rows = f"task_metrics WHERE {metric} IS NOT NULL" + (" AND agent_id = ?" if of else "")
        bound = (of,) if of else ()
        if agg == "mean":
            sql = f"SELECT {start} AS start, count(*) AS count, avg({metric}) AS value FROM {rows} GROUP BY 1"
            found = {row["start"]: row for row in self._dicts(sql, *bound)}
        else:
            inner = f"(SELECT {start} AS start, {metric} AS figure FROM {rows})"
            placed = self._placed(PERCENTILES.format(key="start", value="figure", rows=inner), *bound)
            found = {
                key: {"count": count, "value": percentiles(count, value_at)[agg]}
                for key, (count, value_at) in placed.items()
            }
        empty = {"count": 0, "value": None}
        return [
            {**found.get(at, empty), "start": datetime.fromtimestamp(at, UTC)}
            for at in range(min(found), max(found) + 1, size)
        ]

    def _ranks_of_agent(self, agent_id: str) -> dict[str, float]:
        rows = "task_metrics WHERE duration_ms IS NOT NULL AND agent_id = ?"
        placed = self._placed(PERCENTILES.format(key="agent_id", value="duration_ms", rows=rows), agent_id)
        return percentiles(*placed[agent_id], "_ms")

    def _placed(self, sql: str, *bound: Any) -> dict[Any, tuple[int, Callable[[int], float]]]:
        values: dict[Any, dict[int, float]] = {}
        sizes = {}
        for key, place, size, value in self.raw.execute(sql, bound):
            values.setdefault(key, {})[place] = value
            sizes[key] = size
        return {key: (sizes[key], values[key].__getitem__) for key in values}

    def _dicts(self, sql: str, *bound: Any) -> list[Row]:
        return [dict(row) for row in self.raw.execute(sql, bound)]

    # Transactions and maintenance

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        self.raw.execute("BEGIN IMMEDIATE")
        try:
            yield self.raw
        except BaseException:
            self.raw.execute("ROLLBACK")
            raise
        self.raw.execute("COMMIT")

    def cleanup_old_events(self, days: int) -> int:
        cutoff = iso(self._now() - timedelta(days=days))
        return self.raw.execute("DELETE FROM agent_events WHERE timestamp < ?", (cutoff,)).rowcount

    def cleanup(self, days: int) -> None:
        """Remove old events and metrics, and of each key all that was replaced long ago."""
        cutoff = self._now() - timedelta(days=days)
        self.raw.execute("DELETE FROM agent_events WHERE timestamp < ?", (iso(cutoff),))
        for table in ("task_metrics", "agent_metrics", "swarm_metrics"):
            self.raw.execute(f"DELETE FROM {table} WHERE timestamp < ?", (spaced(cutoff),))
        self.raw.execute(
            "DELETE FROM session_memory WHERE timestamp < ? AND EXISTS (SELECT 1 FROM session_memory AS newer WHERE "
            "newer.session_id = session_memory.session_id AND newer.memory_type = session_memory.memory_type AND "
            "newer.key = session_memory.key AND newer.id > session_memory.id AND newer.timestamp < ?)",
            (iso(cutoff), iso(cutoff)),
        )

    def vacuum(self) -> None:
        self.raw.execute("VACUUM")
        self.raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def backup(self, path: Path, *, overwrite: bool) -> Path:
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as copy:
            self.raw.backup(copy)
        return path

    def check(self) -> list[str]:
        found = [row[0] for row in self.raw.execute("PRAGMA integrity_check") if row[0] != "ok"]
        for table in TABLES:
            for row in self.raw.execute(f"SELECT * FROM {table}"):
                values = dict(row)
                for name in ("metadata", "value"):
                    if isinstance(values.get(name), str):
                        json.loads(values[name])
        return found

    def size_bytes(self) -> int:
        (pages,) = self.raw.execute("PRAGMA page_count").fetchone()
        (size,) = self.raw.execute("PRAGMA page_size").fetchone()
        return int(pages) * int(size)

    @property
    def schema_version(self) -> str:
        return str(self.raw.execute("SELECT value FROM schema_info WHERE key = 'version'").fetchone()[0])
