"""How many statements each operation sends: a slower one would send more, and this is no clock."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from conftest import Clock
from driver import Statements, counting
from moai_flow.memory import EventCursor, EventData, InvalidInputError, RetentionPolicy, SwarmDB
from moai_flow.memory.operations import events

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


def leave(block: AbstractContextManager[object]) -> None:
    with block:
        pass


PLACE = EventCursor(datetime(2026, 1, 1, tzinfo=UTC), 5)

#: One statement, with no BEGIN or COMMIT around it: the driver commits it by itself.
SINGLE: dict[str, Callable[[SwarmDB], object]] = {
    "insert_event": lambda db: db.insert_event(EVENT),
    "get_events": lambda db: db.get_events(agent_id="a"),
    "get_events before": lambda db: db.get_events(before=PLACE),
    "register_agent": lambda db: db.register_agent("a", "t"),
    "heartbeat": lambda db: db.heartbeat("a"),
    "update_agent_status": lambda db: db.update_agent_status("a", "running"),
    "update_agent_status to complete": lambda db: db.update_agent_status("a", "complete", duration_ms=1),
    "find_stale_agents": lambda db: db.find_stale_agents(timedelta(hours=1)),
    "mark_stale_agents, none": lambda db: db.mark_stale_agents(timedelta(hours=1)),
    "get_agent": lambda db: db.get_agent("a"),
    "get_active_agents": lambda db: db.get_active_agents(),
    "list_agents": lambda db: db.list_agents(status="spawned"),
    "delete_agent": lambda db: db.delete_agent("a"),
    "store_memory": lambda db: db.store_memory("s", "semantic", "k", 2, ttl_hours=1),
    "get_memory": lambda db: db.get_memory("s", "semantic", "k"),
    "list_memories": lambda db: db.list_memories("s"),
    "memory_history": lambda db: db.memory_history("s", "semantic", "k"),
    "store_task_metric": lambda db: db.store_task_metric("other", "a", 1, "success"),
    "track_task": lambda db: leave(db.track_task("tracked", "a")),
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


def words(sent: Statements) -> list[str]:
    return [statement.split()[0] for statement in sent]


def test_a_batch_of_metrics_is_one_statement_in_one_transaction(store: SwarmDB, sent: Statements) -> None:
    for batch in (
        lambda: store.store_task_metrics(
            [{"task_id": "new", "agent_id": "a", "result": "success"} for _ in range(1000)]
        ),
        lambda: store.store_agent_metrics([{"agent_id": "a", "metric_type": "duration", "value": 1}] * 1000),
        lambda: store.store_swarm_metrics([{"swarm_id": "s", "metric_type": "health", "value": 1}] * 1000),
    ):
        sent.clear()
        batch()
        assert words(sent) == ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]


def test_a_batch_with_a_taken_key_is_written_twice_and_looks_once_for_each(store: SwarmDB, sent: Statements) -> None:
    sent.clear()
    store.store_task_metrics(
        [{"task_id": name, "agent_id": "a", "result": "success"} for name in ("free", "task", "other")]
    )

    assert words(sent) == [
        *["BEGIN", "SAVEPOINT", "INSERT", "ROLLBACK"],
        *["SELECT"] * 3,
        *["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"],
    ]


def test_an_agents_begin_its_end_and_giving_it_up_are_two_statements_in_a_transaction(
    store: SwarmDB, sent: Statements, clock: Clock
) -> None:
    sent.clear()
    tracked = store.track_agent("b", "t")
    with tracked:
        assert words(sent) == ["BEGIN", "SAVEPOINT", "INSERT", "INSERT", "RELEASE", "COMMIT"]
        sent.clear()
        tracked.heartbeat()
        assert words(sent) == ["UPDATE"]
        sent.clear()
    assert words(sent) == ["BEGIN", "SAVEPOINT", "UPDATE", "INSERT", "RELEASE", "COMMIT"]

    clock.advance(minutes=50)
    sent.clear()
    assert len(store.mark_stale_agents(timedelta(minutes=40))) == 1
    assert words(sent) == ["SELECT", "BEGIN", "SAVEPOINT", "UPDATE", "INSERT", "RELEASE", "COMMIT"]


def test_the_first_write_of_an_hour_looks_whether_old_rows_are_to_be_removed(
    store: SwarmDB, sent: Statements, clock: Clock
) -> None:
    clock.advance(hours=1)
    for expected in (["SELECT", "INSERT"], ["INSERT"]):
        sent.clear()
        store.insert_event(EVENT)
        assert words(sent) == expected

    clock.advance(hours=23)
    sent.clear()
    store.insert_event(EVENT)
    events, memory, metrics = ["DELETE"], ["SELECT", "SELECT", "SELECT"], ["DELETE", "DELETE", "DELETE"]
    claimed = ["SELECT", "PRAGMA", "PRAGMA", "BEGIN", "PRAGMA", "SAVEPOINT", "SELECT"]
    assert words(sent) == [*claimed, *events, *memory, *metrics, "INSERT", "RELEASE", "COMMIT", "INSERT"]


def test_a_cleanup_of_fewer_old_rows_than_a_chunk_is_one_statement(
    store: SwarmDB, sent: Statements, clock: Clock
) -> None:
    clock.advance(days=40)
    sent.clear()
    assert store.cleanup_old_events(30) == 25

    assert words(sent) == ["DELETE"]


def test_a_cleanup_removes_a_chunk_of_memories_in_one_transaction(
    store: SwarmDB, sent: Statements, clock: Clock
) -> None:
    for key in ("a", "b"):
        store.store_memory("s", "semantic", key, 1, ttl_hours=1)
    clock.advance(hours=2)
    sent.clear()
    store.cleanup(policy=replace(RetentionPolicy.keep_all(), memory=timedelta()))

    found = ["SELECT", "SELECT"]
    assert words(sent) == [*found, "BEGIN", "SAVEPOINT", "DELETE", "DELETE", "RELEASE", "COMMIT", "SELECT"]


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


def test_a_page_after_the_first_is_bounded_below_by_its_place_alone(store: SwarmDB, sent: Statements) -> None:
    sent.clear()
    assert len(list(store.iter_events(since=PAST, batch_size=10))) == 25

    assert [statement.count("timestamp >=") for statement in sent[1:]] == [1, 1, 1]


def test_a_poll_costs_one_statement_and_one_more_for_each_page_that_there_is(store: SwarmDB, sent: Statements) -> None:
    store.insert_events([EVENT] * 100)
    watch, place = events._Watch(events._after(frozenset()), {}, 0.5), events._Place(0, 0)
    counts = []
    for _ in range(4):
        sent.clear()
        found, place = store._poll(watch, place)
        counts.append((len(found), len(sent)))

    assert counts == [(100, 2), (25, 1), (0, 1), (0, 1)]  # It looks for the end of the log once for many pages.


def test_watching_begins_with_one_statement_at_most(store: SwarmDB, sent: Statements) -> None:
    sent.clear()
    store.watch_events(5)
    assert len(sent) == 0
    store.watch_events()
    assert len(sent) == 1


def test_opening_an_up_to_date_file_reads_its_version_and_its_journal(path: Path) -> None:
    SwarmDB(path).close()
    with counting() as sent, SwarmDB(path) as db:
        assert [statement.partition("=")[0].strip() for statement in sent] == [
            "PRAGMA read_uncommitted",  # SQLAlchemy's own, once an engine.
            "PRAGMA foreign_keys",
            "PRAGMA synchronous",
            "PRAGMA cache_size",
            "PRAGMA journal_size_limit",
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
