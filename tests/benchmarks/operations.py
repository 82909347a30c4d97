"""Every public operation, as one call that either side answers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any

from moai_flow.memory import AgentEvent, EventCursor, SwarmDB

from .dataset import ACTIVE_AGENTS, METADATA, START, STEP, VALUE, agent, agents_at_work, memory_of
from .measuring import Measurement, compare, timed
from .raw import INSERT_EVENT, iso

#: A store of either side: what is called on it has the same name and parameters there.
Store = Any

#: Keys are met in no order, and none is left out: this is prime to the numbers of rows.
STRIDE = 7919

HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Case:
    """One operation to measure.

    Attributes:
        name: What it is called in the table.
        method: The public method of `SwarmDB` that it measures.
        call: Does it once, on either side; gets the store, a number that grows by one, and the rows of each table.
        calls: How many calls a round makes.
        writes: Whether it commits, so that durability plays a part.
        prepare: Makes ready what the calls of a round use up; it is not measured.
        at_most: The highest acceptable ratio at some number of rows.
        most_rows: Larger files are left out: it would take long and say nothing new.
    """

    name: str
    method: str
    call: Callable[[Store, int, int], object]
    calls: int
    writes: bool = False
    prepare: Callable[[Store, range, int], object] | None = None
    at_most: float | None = None
    bar_rows: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    most_rows: int = 1_000_000


EVENTS = [
    {"event_type": kind, "agent_id": f"agent-{number:07}", "agent_type": "coder", "metadata": METADATA}
    for number in range(10)
    for kind in ("spawn", "complete", "error")
]
BATCH = EVENTS * 34  # A little over a thousand.


def _active(number: int, rows: int) -> str:
    """Return the id of one of the agents that have not ended."""
    step = max(1, rows // ACTIVE_AGENTS)
    return f"agent-{number % (rows // step) * step:07}"


def _page_before(store: Store, number: int, rows: int) -> object:
    agents = agents_at_work(rows)
    # The agent's fiftieth newest event, as the file was made.
    last = number % agents + (rows // agents - 50) * agents
    return store.get_events(agent_id=agent(number, rows), before=EventCursor(START + STEP * last, last + 1))


def _next_thousand(store: Store, number: int, rows: int) -> object:
    # From the ids that the file was made with, a thousand of which come after any of these.
    return list(islice(store.watch_events(number * STRIDE % (rows - 999)), 1000))


def _ten_inserts(store: Store, number: int, rows: int) -> object:
    with store.transaction() as raw:
        for offset in range(10):
            raw.execute(INSERT_EVENT, (f"{number}-{offset}-{rows}", "spawn", "a", "coder", _NOW, "{}", _NOW))
    return None


def _ten_added(store: Store, number: int, rows: int) -> object:
    """Use what the ORM offers, which has no bar: it is for what domain methods don't do."""
    events = [{**event, "timestamp": _NOW} for event in EVENTS[:10]]
    if not isinstance(store, SwarmDB):
        return store.insert_events(events)
    with store.session() as session:
        session.add_all(AgentEvent.model_validate(event) for event in events)
    return None


_NOW = iso(datetime.fromisoformat("2026-01-01T00:00:00+00:00"))


OLD = "1999-01-01T00:00:00.000000+00:00"


def _track_task(store: Store, number: int, rows: int) -> object:
    with store.track_task(f"tracked-{number}", agent(number, rows)) as task:
        pass
    return task.timestamp if isinstance(store, SwarmDB) else task["timestamp"]


def _track_agent(store: Store, number: int, rows: int) -> object:
    with store.track_agent(f"tracked-{number}", "coder", METADATA):
        pass
    return None


def _with_silent_agents(store: Store, numbers: range, rows: int) -> None:
    then = datetime.fromisoformat("1999-01-01T00:00:00+00:00")
    silent = [(f"silent-{number}-{at}", then.timestamp(), iso(then)) for number in numbers for at in range(100)]
    with store.transaction() as raw:
        raw.executemany(
            "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time, metadata, last_updated) "
            "VALUES (?, 'coder', 'running', ?, '{}', ?)",
            silent,
        )


def _with_old_events(store: Store, numbers: range, rows: int) -> None:
    store.insert_events({**EVENTS[0], "timestamp": OLD} for _ in range(1000))


def with_many_old_events(store: Store, numbers: range, rows: int) -> None:
    """Add a hundred thousand events that are old."""
    store.insert_events({**EVENTS[number % len(EVENTS)], "timestamp": OLD} for number in range(100_000))


CASES = (
    # Events
    Case(
        "insert_event",
        "insert_event",
        lambda store, number, rows: store.insert_event(EVENTS[number % len(EVENTS)]),
        1000,
        writes=True,
        at_most=1.4,
    ),
    Case(
        "insert_events, 1,000",
        "insert_events",
        lambda store, number, rows: store.insert_events(BATCH[:1000]),
        5,
        writes=True,
        at_most=1.35,
    ),
    Case(
        "insert_events, 100,000",
        "insert_events",
        lambda store, number, rows: store.insert_events(EVENTS[at % len(EVENTS)] for at in range(100_000)),
        1,
        writes=True,
        at_most=1.2,
    ),
    Case(
        "get_events, newest 100 of an agent",
        "get_events",
        lambda store, number, rows: store.get_events(agent_id=agent(number, rows), limit=100),
        50,
        at_most=1.3,
    ),
    Case(
        "get_events, next page of an agent",
        "get_events",
        _page_before,
        50,
    ),
    Case(
        "get_events, newest 100 of a type",
        "get_events",
        lambda store, number, rows: store.get_events(event_type="error", limit=100),
        50,
    ),
    Case(
        "get_events, newest 100",
        "get_events",
        lambda store, number, rows: store.get_events(limit=100),
        50,
    ),
    Case(
        "iter_events, all",
        "iter_events",
        lambda store, number, rows: sum(1 for _ in store.iter_events()),
        1,
        at_most=1.5,
    ),
    Case("watch_events, next 1,000", "watch_events", _next_thousand, 5, at_most=1.5),
    # Agents
    Case(
        "register_agent",
        "register_agent",
        lambda store, number, rows: store.register_agent(f"new-{number}", "coder", metadata=METADATA),
        500,
        writes=True,
    ),
    Case(
        "update_agent_status",
        "update_agent_status",
        lambda store, number, rows: store.update_agent_status(agent(number, rows), "running"),
        1000,
        writes=True,
        at_most=1.4,
    ),
    Case(
        "update_agent_status, to complete",
        "update_agent_status",
        lambda store, number, rows: store.update_agent_status(agent(number, rows), "complete", duration_ms=3000),
        1000,
        writes=True,
        at_most=1.4,
    ),
    Case(
        "get_agent",
        "get_agent",
        lambda store, number, rows: store.get_agent(f"agent-{number * STRIDE % rows:07}"),
        2000,
        at_most=1.8,
    ),
    Case("get_active_agents", "get_active_agents", lambda store, number, rows: store.get_active_agents(), 50),
    Case(
        "list_agents, running",
        "list_agents",
        lambda store, number, rows: store.list_agents(status="running"),
        50,
    ),
    Case(
        "heartbeat",
        "heartbeat",
        lambda store, number, rows: store.heartbeat(_active(number, rows)),
        1000,
        writes=True,
        at_most=1.4,
    ),
    Case(
        "find_stale_agents",
        "find_stale_agents",
        lambda store, number, rows: store.find_stale_agents(timedelta(hours=1)),
        50,
    ),
    Case(
        "track_agent, entered and left",
        "track_agent",
        _track_agent,
        200,
        writes=True,
    ),
    Case(
        "mark_stale_agents, 100",
        "mark_stale_agents",
        lambda store, number, rows: store.mark_stale_agents(timedelta(days=3650)),
        1,
        writes=True,
        prepare=_with_silent_agents,
    ),
    Case(
        "delete_agent",
        "delete_agent",
        lambda store, number, rows: store.delete_agent(f"doomed-{number}"),
        200,
        writes=True,
        prepare=lambda store, numbers, rows: [
            store.register_agent(f"doomed-{number}", "coder", metadata=METADATA) for number in numbers
        ],
    ),
    # Memory
    Case(
        "store_memory",
        "store_memory",
        lambda store, number, rows: store.store_memory(*memory_of(number * STRIDE, rows), VALUE),
        1000,
        writes=True,
        at_most=1.4,
    ),
    Case(
        "get_memory",
        "get_memory",
        lambda store, number, rows: store.get_memory(*memory_of(number * STRIDE, rows)),
        2000,
        at_most=1.8,
    ),
    Case(
        "list_memories, 100 keys",
        "list_memories",
        lambda store, number, rows: store.list_memories(memory_of(number * STRIDE, rows)[0]),
        50,
    ),
    Case(
        "memory_history",
        "memory_history",
        lambda store, number, rows: store.memory_history(*memory_of(number * STRIDE, rows)),
        500,
    ),
    Case(
        "delete_memory",
        "delete_memory",
        lambda store, number, rows: store.delete_memory("doomed", "semantic", f"key-{number}"),
        200,
        writes=True,
        prepare=lambda store, numbers, rows: [
            store.store_memory("doomed", "semantic", f"key-{number}", VALUE) for number in numbers
        ],
    ),
    # Metrics
    Case(
        "store_task_metric",
        "store_task_metric",
        lambda store, number, rows: store.store_task_metric(
            f"new-{number}", agent(number, rows), 1500, "success", tokens_used=1200, files_changed=3
        ),
        1000,
        writes=True,
        at_most=1.4,
    ),
    Case(
        "store_agent_metric",
        "store_agent_metric",
        lambda store, number, rows: store.store_agent_metric(agent(number, rows), "throughput", 0.5, METADATA),
        1000,
        writes=True,
    ),
    Case(
        "store_swarm_metric",
        "store_swarm_metric",
        lambda store, number, rows: store.store_swarm_metric(agent(number, rows), "throughput", 0.5, METADATA),
        1000,
        writes=True,
    ),
    Case(
        "track_task, entered and left",
        "track_task",
        _track_task,
        1000,
        writes=True,
        at_most=1.4,
    ),
    Case(
        "store_task_metrics, 1,000",
        "store_task_metrics",
        lambda store, number, rows: store.store_task_metrics(
            {
                "task_id": f"batch-{number}-{at:03}",
                "agent_id": agent(at, rows),
                "duration_ms": 1500,
                "result": "success",
                "tokens_used": 1200,
                "files_changed": 3,
            }
            for at in range(1000)
        ),
        5,
        writes=True,
        at_most=1.35,
    ),
    Case(
        "store_agent_metrics, 1,000",
        "store_agent_metrics",
        lambda store, number, rows: store.store_agent_metrics(
            {"agent_id": agent(at, rows), "metric_type": "throughput", "value": 0.5, "metadata": METADATA}
            for at in range(1000)
        ),
        5,
        writes=True,
        at_most=1.35,
    ),
    Case(
        "store_swarm_metrics, 1,000",
        "store_swarm_metrics",
        lambda store, number, rows: store.store_swarm_metrics(
            {"swarm_id": agent(at, rows), "metric_type": "throughput", "value": 0.5, "metadata": METADATA}
            for at in range(1000)
        ),
        5,
        writes=True,
        at_most=1.35,
    ),
    Case(
        "get_task_metrics, newest 100 of an agent",
        "get_task_metrics",
        lambda store, number, rows: store.get_task_metrics(agent_id=agent(number, rows), limit=100),
        50,
    ),
    Case(
        "get_agent_metrics, newest 100",
        "get_agent_metrics",
        lambda store, number, rows: store.get_agent_metrics(agent(number, rows), limit=100),
        50,
    ),
    Case(
        "get_swarm_metrics, newest 100 of a type",
        "get_swarm_metrics",
        lambda store, number, rows: store.get_swarm_metrics(agent(number, rows), "throughput", limit=100),
        50,
    ),
    # Summaries
    Case(
        "summarize_tasks, of an agent",
        "summarize_tasks",
        lambda store, number, rows: store.summarize_tasks(agent(number, rows)),
        20,
    ),
    Case("summarize_tasks, all", "summarize_tasks", lambda store, number, rows: store.summarize_tasks(), 1),
    Case("summarize_agents", "summarize_agents", lambda store, number, rows: store.summarize_agents(), 1),
    Case(
        "summarize_swarm",
        "summarize_swarm",
        lambda store, number, rows: store.summarize_swarm(agent(number, rows)),
        20,
    ),
    Case(
        "metric_series, an agent's mean by the hour",
        "metric_series",
        lambda store, number, rows: store.metric_series("duration_ms", bucket=HOUR, of=agent(number, rows)),
        20,
    ),
    Case(
        "metric_series, 95th percentile by the hour",
        "metric_series",
        lambda store, number, rows: store.metric_series("duration_ms", bucket=HOUR, agg="p95"),
        1,
    ),
    # Transactions and maintenance
    Case("transaction, 10 raw inserts", "transaction", _ten_inserts, 100, writes=True),
    Case("session, 10 events added", "session", _ten_added, 50, writes=True),
    Case(
        "cleanup_old_events, 1,000",
        "cleanup_old_events",
        lambda store, number, rows: store.cleanup_old_events(days=9000),
        1,
        writes=True,
        prepare=_with_old_events,
    ),
    Case(
        "cleanup_old_events, 100,000",
        "cleanup_old_events",
        lambda store, number, rows: store.cleanup_old_events(days=9000),
        1,
        writes=True,
        prepare=with_many_old_events,
        at_most=1.2,
        bar_rows=(1_000_000,),
    ),
    Case(
        "cleanup, nothing is old",
        "cleanup",
        lambda store, number, rows: store.cleanup(days=9000),
        50,
    ),
    Case("size_bytes", "size_bytes", lambda store, number, rows: store.size_bytes(), 500),
    Case("schema_version", "schema_version", lambda store, number, rows: store.schema_version, 500),
    Case("check", "check", lambda store, number, rows: store.check(), 1, most_rows=100_000),
    Case("vacuum", "vacuum", lambda store, number, rows: store.vacuum(), 1, writes=True, most_rows=100_000),
    Case(
        "backup",
        "backup",
        lambda store, number, rows: store.backup(_backup_path(store), overwrite=True),
        1,
        most_rows=100_000,
    ),
)


def _backup_path(store: Store) -> Path:
    path: Path = store.db_path if isinstance(store, SwarmDB) else store.path
    return path.with_suffix(".backup")


def measure(case: Case, ours: SwarmDB, raw: Store, rows: int, *, durability: str, rounds: int) -> Measurement:
    """Measure one operation on two files of *rows* rows."""
    if case.calls == 1:
        rounds = max(3, rounds // 3)
    mine, other = (_side(case, store, rows) for store in (ours, raw))
    return compare(
        case.name,
        lambda: next(mine),
        lambda: next(other),
        rounds=rounds,
        calls=case.calls,
        rows=rows,
        durability=durability if case.writes else "",
        at_most=case.at_most if rows in case.bar_rows else None,
    )


def _side(case: Case, store: Store, rows: int) -> Iterator[float]:
    """Yield how long each next round of calls takes, in seconds."""
    call = case.call
    for begin in count(step=case.calls):
        numbers = range(begin, begin + case.calls)
        if case.prepare is not None:
            case.prepare(store, numbers, rows)

        def run(numbers: range = numbers) -> None:
            for number in numbers:
                call(store, number, rows)

        yield timed(run)
