"""Every public operation, as one call on a small store, and every form of block."""

from collections.abc import Callable
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from moai_flow.memory import RegisteredAgent, RetentionPolicy, SwarmDB
from moai_flow.memory.models import TABLES

Call = Callable[[SwarmDB, Path], Any]

EVENT: Any = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}
TASK: Any = {"task_id": "task", "agent_id": "a", "result": "success"}
OF_AGENT: Any = {"agent_id": "a", "metric_type": "duration", "value": 1.0}
OF_SWARM: Any = {"swarm_id": "s", "metric_type": "health", "value": 1.0}
HOUR = timedelta(hours=1)


def prepare(db: SwarmDB) -> None:
    """Fill an empty store with a few rows of each kind, old ones among them."""
    for number in range(3):
        old: Any = {**EVENT, "timestamp": f"2020-01-0{number + 1}T00:00:00Z"}
        db.insert_event(old, event_id=f"old-{number}")
        db.insert_event(EVENT, event_id=f"new-{number}")
        db.store_memory("s", "semantic", "k", number)
    for agent_id in ("a", "b"):
        db.register_agent(agent_id, "t", "running")
    old_task: Any = {**TASK, "timestamp": "2020-01-01T00:00:00Z"}
    db.store_task_metrics([TASK, old_task])
    db.store_agent_metric("a", "duration", 1.0)
    db.store_swarm_metric("s", "health", 1.0)


def _transaction(db: SwarmDB, folder: Path) -> None:
    with db.transaction() as conn:
        db.register_agent("x", "t")
        conn.execute("UPDATE agent_registry SET agent_type = 'u' WHERE agent_id = 'x'")
        db.insert_event(EVENT)


def _nested(db: SwarmDB, folder: Path) -> None:
    with db.transaction():
        db.register_agent("x", "t")
        with db.transaction():
            db.insert_event(EVENT)
            with db.session() as session:
                session.add(_row("y"))


def _session(db: SwarmDB, folder: Path) -> None:
    with db.session() as session:
        session.add(_row("x"))
        db.insert_event(EVENT)
        session.add(_row("y"))


def _nested_sessions(db: SwarmDB, folder: Path) -> None:
    with db.session() as outer:
        outer.add(_row("x"))
        with db.transaction():
            db.insert_event(EVENT)
        with db.session() as inner:
            inner.add(_row("y"))
            db.update_agent_status("x", "complete")


def _reading(db: SwarmDB, folder: Path) -> object:
    with db.session(readonly=True) as session:
        return session.get(RegisteredAgent, "a"), db.get_events()


def _reading_inside(db: SwarmDB, folder: Path) -> None:
    with db.transaction():
        db.register_agent("x", "t")
        with db.session(readonly=True):
            db.get_agent("x")
        db.insert_event(EVENT)


def _row(agent_id: str) -> RegisteredAgent:
    return RegisteredAgent.model_validate(
        {"agent_id": agent_id, "agent_type": "t", "status": "running", "spawn_time": 1.0}
    )


def _track_task(db: SwarmDB, folder: Path) -> None:
    with db.track_task("tracked", "a"):
        pass


def _track_agent(db: SwarmDB, folder: Path) -> None:
    with db.track_agent("tracked", "t") as agent:
        agent.heartbeat()


#: The calls, by the name of the method, with a word behind it where there is more than one.
CALLS: dict[str, Call] = {
    "insert_event": lambda db, _: db.insert_event(EVENT),
    "insert_events": lambda db, _: db.insert_events([EVENT] * 3),
    "get_events": lambda db, _: db.get_events(),
    "iter_events": lambda db, _: list(db.iter_events(batch_size=2)),
    "watch_events": lambda db, _: list(islice(db.watch_events(0), 2)),
    "register_agent": lambda db, _: db.register_agent("x", "t"),
    "register_agent again": lambda db, _: db.register_agent("a", "u"),
    "update_agent_status": lambda db, _: db.update_agent_status("a", "complete"),
    "heartbeat": lambda db, _: db.heartbeat("a"),
    "find_stale_agents": lambda db, _: db.find_stale_agents(HOUR),
    "mark_stale_agents": lambda db, _: db.mark_stale_agents(timedelta(microseconds=1), "why"),
    "get_agent": lambda db, _: db.get_agent("a"),
    "get_active_agents": lambda db, _: db.get_active_agents(),
    "list_agents": lambda db, _: db.list_agents(),
    "delete_agent": lambda db, _: db.delete_agent("a"),
    "track_agent": _track_agent,
    "track_task": _track_task,
    "store_memory": lambda db, _: db.store_memory("s", "semantic", "x", [1]),
    "get_memory": lambda db, _: db.get_memory("s", "semantic", "k"),
    "list_memories": lambda db, _: db.list_memories("s"),
    "memory_history": lambda db, _: db.memory_history("s", "semantic", "k"),
    "delete_memory": lambda db, _: db.delete_memory("s", "semantic", "k"),
    "store_task_metric": lambda db, _: db.store_task_metric("task", "a", 1, "success"),
    "store_task_metrics": lambda db, _: db.store_task_metrics([TASK] * 3),
    "store_agent_metric": lambda db, _: db.store_agent_metric("a", "duration", 1.0),
    "store_agent_metrics": lambda db, _: db.store_agent_metrics([OF_AGENT] * 3),
    "store_swarm_metric": lambda db, _: db.store_swarm_metric("s", "health", 1.0),
    "store_swarm_metrics": lambda db, _: db.store_swarm_metrics([OF_SWARM] * 3),
    "get_task_metrics": lambda db, _: db.get_task_metrics(),
    "get_agent_metrics": lambda db, _: db.get_agent_metrics(),
    "get_swarm_metrics": lambda db, _: db.get_swarm_metrics(),
    "summarize_tasks": lambda db, _: db.summarize_tasks(),
    "summarize_agents": lambda db, _: db.summarize_agents(),
    "summarize_swarm": lambda db, _: db.summarize_swarm("s"),
    "metric_series": lambda db, _: db.metric_series("duration_ms", bucket=HOUR),
    "cleanup": lambda db, _: db.cleanup(30),
    "cleanup dry": lambda db, _: db.cleanup(30, dry_run=True),
    "cleanup of agents": lambda db, _: db.cleanup(policy=RetentionPolicy(agents=timedelta())),
    "cleanup_old_events": lambda db, _: db.cleanup_old_events(),
    "retention": lambda db, _: db.retention,
    "last_cleanup": lambda db, _: db.last_cleanup,
    "schema_version": lambda db, _: db.schema_version,
    "size_bytes": lambda db, _: db.size_bytes(),
    "vacuum": lambda db, _: db.vacuum(),
    "backup": lambda db, folder: db.backup(folder / "backup.db", overwrite=True),
    "check": lambda db, _: db.check(),
    "check quarantine": lambda db, _: db.check(quarantine=True),
    "transaction": _transaction,
    "transaction nested": _nested,
    "transaction reading inside": _reading_inside,
    "session": _session,
    "session nested": _nested_sessions,
    "session readonly": _reading,
}

#: What waits for events that never come where they are damaged or deleted.
WAITS = "watch_events"

#: What sends nothing.
SILENT = frozenset({"close", "db_path"})

#: What is done in several transactions, each of which may be the last.
IN_STEPS = frozenset({"cleanup", "cleanup of agents", "track_agent"})

_BY_CHANCE = {"id", "metric_id", "event_id", "duration_ms", "created_at", "last_updated", "updated_at"}


def content(db: SwarmDB) -> list[list[tuple[str, ...]]]:
    """Return what the tables hold, but for what differs from one time to the next."""
    found = []
    with db.session(readonly=True) as session:
        for model in TABLES:
            columns = [column for column in model.__table__.columns if column.name not in _BY_CHANCE]  # type: ignore[attr-defined]
            names = ", ".join(column.name for column in columns)
            rows = session.connection().exec_driver_sql(f"SELECT {names} FROM {model.__tablename__}")
            found.append(sorted(tuple(map(repr, row)) for row in rows))
    return found
