"""What is removed, when, by whom, and what never is."""

import json
import logging
import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Clock, url_of
from moai_flow.memory import (
    BusyError,
    CorruptDataError,
    InvalidInputError,
    RetentionPolicy,
    SwarmDB,
    SwarmDBError,
    TransactionError,
    scope,
)
from moai_flow.memory.operations import retention

DAYS_30 = timedelta(days=30)
TICK = timedelta(microseconds=1)
KINDS = ["file", "memory", "postgresql"]


@pytest.fixture(params=["UTC", "Asia/Tokyo", "America/Los_Angeles"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The process's zone, which naive times are in."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


def naive(moment: datetime) -> datetime:
    return moment.astimezone().replace(tzinfo=None)


def event(db: SwarmDB, timestamp: datetime, agent_id: str = "a") -> None:
    db.insert_event({"event_type": "spawn", "agent_id": agent_id, "agent_type": "t", "timestamp": timestamp})


def many_old_events(db: SwarmDB, count: int, age: timedelta = timedelta(days=40)) -> None:
    now = db._clock() - age
    db.insert_events(
        {"event_type": "spawn", "agent_id": "old", "agent_type": "t", "timestamp": now} for _ in range(count)
    )


def count(db: SwarmDB, agent_id: str = "old") -> int:
    return sum(1 for _ in db.iter_events(agent_id))


def run(db: SwarmDB, sql: str, *values: Any) -> Any:
    mark = "%s" if db._location.is_on_server else "?"
    with db.transaction() as raw:
        return raw.execute(sql.replace("?", mark), values)


def rows_of(db: SwarmDB, table: str) -> int:
    with db.transaction() as raw:
        (rows,) = raw.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(rows)


# Policies


def test_a_policy_keeps_everything_but_agents_for_30_days() -> None:
    assert RetentionPolicy() == RetentionPolicy.of_days(30)
    assert RetentionPolicy().agents is None
    assert RetentionPolicy.keep_all().is_off
    assert not RetentionPolicy().is_off
    assert RetentionPolicy.of_days(10**12).is_off  # Older than time itself.


@pytest.mark.parametrize("age", [timedelta(microseconds=-1), 30, "30 days"])
def test_an_age_is_a_timedelta_of_zero_or_more(age: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"memory: got .*a timedelta of zero or more"):
        RetentionPolicy(memory=age)


def test_a_new_database_has_the_default(db: SwarmDB) -> None:
    assert db.retention == RetentionPolicy()
    assert db.last_cleanup is None


POLICY = RetentionPolicy(events=timedelta(days=90), memory=None, agents=timedelta(hours=1.5), swarm_metrics=TICK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [POLICY, RetentionPolicy.keep_all(), RetentionPolicy()])
def test_a_policy_that_is_passed_is_kept_by_the_database(
    kind: str, policy: RetentionPolicy, path: Path, request: pytest.FixtureRequest
) -> None:
    url = url_of(kind, path, request)
    with SwarmDB(url=url, retention=policy) as db:
        assert db.retention == policy
        if kind == "memory":
            return
    with SwarmDB(url=url) as db:
        assert db.retention == policy


@pytest.mark.parametrize("age", [timedelta.max, timedelta.max - TICK, timedelta(days=200_000), timedelta(0), TICK])
def test_the_longest_and_the_shortest_age_are_kept_too(path: Path, age: timedelta) -> None:
    with SwarmDB(path, retention=RetentionPolicy(events=age)) as db:
        kept = db.retention.events

    assert kept is not None
    assert abs(kept - age) <= TICK


def test_passing_the_policy_that_is_in_force_writes_nothing(path: Path) -> None:
    SwarmDB(path, retention=POLICY).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        SwarmDB(path, retention=POLICY, busy_timeout=0).close()
        with pytest.raises(BusyError):
            SwarmDB(path, retention=RetentionPolicy(), busy_timeout=0)


@pytest.mark.parametrize("wrong", [30, timedelta(days=30), {"events": 30}])
def test_only_a_policy_is_taken_for_one(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="retention: got"):
        SwarmDB(tmp_path / "new.db", retention=wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mark", ["{}", "never", '{"events": 1}', "[]", '{"began": 1}', "null"])
def test_a_mark_that_is_no_policy_is_told_and_removes_nothing(db: SwarmDB, clock: Clock, mark: str) -> None:
    event(db, clock.now, "old")
    run(db, "UPDATE schema_info SET value = ? WHERE key = 'retention'", mark)
    clock.advance(days=60)
    event(db, clock.now)

    assert count(db) == 1
    with pytest.raises(CorruptDataError, match=r"schema_info.*which is no policy"):
        db.retention  # noqa: B018
    with pytest.raises(CorruptDataError):
        db.cleanup()


@pytest.mark.parametrize("mark", ["x'7b'", "CAST(x'ff' AS TEXT)"])
@pytest.mark.parametrize("key", ["retention", "last_cleanup"])
def test_a_mark_that_is_no_text_keeps_nobody_from_writing(local_db: SwarmDB, clock: Clock, key: str, mark: str) -> None:
    run(local_db, "INSERT INTO schema_info (key, value) VALUES ('last_cleanup', 'x')")
    run(local_db, f"UPDATE schema_info SET value = {mark} WHERE key = '{key}'")
    clock.advance(days=1)
    event(local_db, clock.now)

    assert count(local_db, "a") == 1
    with suppress(CorruptDataError):
        local_db.retention  # noqa: B018
    with suppress(CorruptDataError):
        local_db.last_cleanup  # noqa: B018


# What is old


def test_events_and_metrics_are_old_after_their_age_to_the_microsecond(db: SwarmDB, clock: Clock, zone: str) -> None:
    for moment in (clock.now - DAYS_30 - TICK, clock.now - DAYS_30, clock.now):
        for time_of_it in (moment, naive(moment)):
            event(db, time_of_it)
            db.store_task_metric("t", "a", 1, "success", timestamp=time_of_it)
            db.store_agent_metric("a", "duration", 1, timestamp=time_of_it)
            db.store_swarm_metric("s", "health", 1, timestamp=time_of_it)
    # The second metric of the task has taken the next microsecond, where it is not too old.
    report = db.cleanup(30)

    removed = {table.table: table.rows for table in report.tables}
    assert removed == {
        "agent_events": 2,
        "session_memory": 0,
        "task_metrics": 1,
        "agent_metrics": 2,
        "swarm_metrics": 2,
        "agent_registry": 0,
    }
    assert report.rows == 7
    assert {table.before for table in report.tables} == {clock.now - DAYS_30, None}
    assert min(found.timestamp for found in db.get_events()) == clock.now - DAYS_30
    assert len(db.get_events()) == len(db.get_agent_metrics()) == len(db.get_swarm_metrics()) == 4


def test_an_agent_is_old_after_it_has_ended(db: SwarmDB, clock: Clock, zone: str) -> None:
    for agent_id, status in (("c", "complete"), ("e", "error"), ("r", "running"), ("s", "spawned")):
        db.register_agent(agent_id, "t")
        db.update_agent_status(agent_id, status)  # type: ignore[arg-type]
    policy = RetentionPolicy(agents=timedelta(hours=1))
    clock.advance(hours=1)
    assert db.cleanup(policy=policy).rows == 0
    clock.advance(seconds=1)

    assert db.cleanup(policy=policy).rows == 2
    assert {agent.agent_id for agent in db.list_agents()} == {"r", "s"}


def test_a_memory_is_old_after_it_was_replaced(db: SwarmDB, clock: Clock, zone: str) -> None:
    db.store_memory("s", "semantic", "k", "first")
    clock.advance(days=100)
    db.store_memory("s", "semantic", "k", "second")
    db.store_memory("s", "semantic", "alone", "for ever")
    clock.advance(days=30)
    assert db.cleanup(30).rows == 0
    clock.advance(microseconds=1)

    assert db.cleanup(30).rows == 1
    assert [memory.value for memory in db.memory_history("s", "semantic", "k")] == ["second"]
    assert db.get_memory("s", "semantic", "alone") == "for ever"


def test_a_memory_is_old_after_it_has_expired(db: SwarmDB, clock: Clock, zone: str) -> None:
    db.store_memory("s", "semantic", "k", "never to come back")
    db.store_memory("s", "semantic", "k", "for an hour", ttl_hours=1)
    clock.advance(hours=1, days=30)
    assert db.cleanup(policy=RetentionPolicy(memory=DAYS_30)).rows == 1  # What it replaced is an hour older.
    clock.advance(microseconds=1)

    assert db.cleanup(policy=RetentionPolicy(memory=DAYS_30)).rows == 1
    assert db.memory_history("s", "semantic", "k") == []
    assert db.get_memory("s", "semantic", "k") is None


def test_a_key_of_many_values_that_stay_costs_no_more_than_one_of_few(file_db: SwarmDB, clock: Clock) -> None:
    def steps() -> int:
        """Count what SQLite does to find out whether the first value may go, in thousands of its steps."""
        done = []
        bounds = {"after": 0, "last": 1, "cutoff": clock.now - timedelta(days=30), "limit": 10}
        with file_db.transaction() as raw:
            raw.set_progress_handler(lambda: done.append(1), 1000)  # type: ignore[attr-defined]
            assert file_db._tuples(retention._MAYBE_DEAD, bounds) == []
            raw.set_progress_handler(None, 0)  # type: ignore[attr-defined]
        return len(done)

    file_db.store_memory("s", "semantic", "k", 0)
    clock.advance(days=31)
    with file_db.transaction():
        for number in range(2000):
            file_db.store_memory("s", "semantic", "k", number)

    assert steps() <= 1


@pytest.mark.parametrize("odd", ["x''", "x'ff'", "NULL"])
def test_an_agent_whose_id_is_no_text_stays_and_holds_nothing_up(local_db: SwarmDB, clock: Clock, odd: str) -> None:
    local_db.register_agent("a", "t", "complete")
    local_db.register_agent("b", "t", "complete")
    run(local_db, f"UPDATE agent_registry SET agent_id = {odd} WHERE agent_id = 'b'")
    policy = RetentionPolicy(agents=timedelta(days=1))
    clock.advance(days=40)

    assert local_db.cleanup(policy=policy).rows == 1
    assert rows_of(local_db, "agent_registry") == 1
    local_db._set_retention(policy)
    clock.advance(days=1)
    event(local_db, clock.now)
    assert local_db.last_cleanup == clock.now


def test_what_is_no_time_stays(local_db: SwarmDB, clock: Clock) -> None:
    for _ in range(3):
        event(local_db, clock.now, "old")
    run(local_db, "UPDATE agent_events SET timestamp = '' WHERE id = 1")
    run(local_db, "UPDATE agent_events SET timestamp = x'00' WHERE id = 2")
    clock.advance(days=100)

    assert local_db.cleanup(0, dry_run=True).rows == local_db.cleanup(0).rows == 1
    assert rows_of(local_db, "agent_events") == 2


def test_what_can_not_be_decoded_stays(local_db: SwarmDB, clock: Clock) -> None:
    for key in ("no time", "no number"):
        local_db.store_memory("s", "semantic", key, "x", ttl_hours=1)
    run(local_db, "UPDATE session_memory SET timestamp = '1999' WHERE key = 'no time'")
    run(local_db, "UPDATE session_memory SET ttl_hours = 'x' WHERE key = 'no number'")
    clock.advance(days=100)

    assert local_db.cleanup(0).rows == 0
    assert len(local_db.check().undecodable) == 2


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.sampled_from("xyz"), st.sampled_from([None, 1, 24, 24 * 60])),
        st.tuples(st.just("advance"), st.integers(-50, 50), st.just(0)),
        st.tuples(st.just("clean"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("write"), st.just(0), st.just(0)),
        st.tuples(st.just("write anew"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_no_cleanup_changes_what_a_key_reads_as_now_or_later(
    steps: list[tuple[str, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FEW", "_MANY", "_LOOKED_AT"):
        monkeypatch.setattr(retention, name, 2)
    clock = Clock()
    latest = clock.now
    with (
        SwarmDB(":memory:", clock=clock, retention=RetentionPolicy.keep_all()) as complete,
        SwarmDB(":memory:", clock=clock, retention=RetentionPolicy(memory=timedelta(days=5))) as db,
    ):
        for number, (what, first, ttl) in enumerate(steps):
            if what == "store":
                for store in (db, complete):
                    store.store_memory("s", "semantic", first, number, ttl)
            elif what == "advance":  # Or jump back.
                clock.advance(days=first)
            elif what == "clean":
                db.cleanup(first)
            else:
                if what == "write anew":  # As another program does, which has not looked yet.
                    db._cleanup_due = datetime.min.replace(tzinfo=UTC)
                db.register_agent("a", "t")
            latest = max(latest, clock.now)
            for key in "xyz":
                kept = complete.get_memory("s", "semantic", key)
                # What had expired by a clock that has jumped back since may be gone, but nothing older comes back.
                assert db.get_memory("s", "semantic", key) in ([kept] if clock.now == latest else [kept, None])
        clock.now = latest
        for _ in range(70):
            clock.advance(days=1)
            db.register_agent("a", "t")
            for key in "xyz":
                assert db.get_memory("s", "semantic", key) == complete.get_memory("s", "semantic", key)


# By hand


def test_a_dry_run_counts_what_would_go_and_removes_nothing(db: SwarmDB, clock: Clock) -> None:
    many_old_events(db, 30)
    for number in range(5):
        db.store_memory("s", "semantic", "k", number)
        db.store_memory("s", "semantic", f"expiring {number}", number, ttl_hours=1)
        db.store_task_metric("t", "a", 1, "success")
        db.register_agent(f"agent-{number}", "t")
        db.update_agent_status(f"agent-{number}", "complete")
    clock.advance(days=20)
    policy = RetentionPolicy(memory=timedelta(days=10), task_metrics=timedelta(1), agents=timedelta(1))
    tried = db.cleanup(policy=policy, dry_run=True)

    assert count(db) == 30
    assert len(db.memory_history("s", "semantic", "k")) == 5
    done = db.cleanup(policy=policy)
    assert (tried.dry_run, done.dry_run) == (True, False)
    assert tried.tables == done.tables
    assert [table.rows for table in done.tables] == [30, 9, 5, 0, 0, 5]
    assert db.cleanup(policy=policy).rows == 0


def test_without_days_and_policy_the_databases_own_policy_says_what_is_old(path: Path, clock: Clock) -> None:
    with SwarmDB(path, clock=clock, retention=RetentionPolicy(events=timedelta(days=90))) as db:
        for age in (60, 100):
            event(db, clock.now - timedelta(days=age))

        assert db.cleanup().rows == 1


def test_without_days_and_policy_nothing_is_old_where_everything_is_kept(path: Path) -> None:
    with (
        SwarmDB(path, retention=RetentionPolicy.keep_all()) as db,
        pytest.raises(InvalidInputError, match="since this database keeps all"),
    ):
        db.cleanup()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"days": -1}, "days: got -1"),
        ({"days": 0.5}, "days: got 0.5"),
        ({"days": 1, "policy": RetentionPolicy()}, "policy: got"),
        ({"policy": timedelta(days=1)}, "policy: got"),
    ],
)
def test_what_is_no_age_is_refused_and_removes_nothing(db: SwarmDB, arguments: dict[str, Any], named: str) -> None:
    many_old_events(db, 3)
    with pytest.raises(InvalidInputError, match=named):
        db.cleanup(**arguments)

    assert count(db) == 3


def test_a_cleanup_goes_on_where_others_remove_the_same_rows(
    postgres_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_MANY", 10)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with (
        SwarmDB(url=postgres_url, clock=clock, retention=RetentionPolicy.keep_all()) as db,
        SwarmDB(url=postgres_url, clock=clock) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        many_old_events(db, 25)
        with db.transaction() as raw:
            raw.execute("DELETE FROM agent_events WHERE id IN (SELECT min(id) FROM agent_events)")
            cleaning = pool.submit(other.cleanup_old_events, 30)
            deadline = time.monotonic() + 60
            while not raw.execute(waiting).fetchone()[0] and time.monotonic() < deadline:
                raw.execute("SELECT pg_stat_clear_snapshot()")

        assert cleaning.result() == 24
        assert count(db) == 0


def test_inside_a_transaction_a_cleanup_is_part_of_it(db: SwarmDB) -> None:
    many_old_events(db, 3)
    with pytest.raises(ZeroDivisionError), db.transaction():
        assert db.cleanup(30).rows == 3
        raise ZeroDivisionError
    assert count(db) == 3

    with db.session(readonly=True):
        assert db.cleanup(30, dry_run=True).rows == 3
        with pytest.raises(TransactionError):
            db.cleanup(30)
    assert count(db) == 3


def test_a_cleanup_by_hand_does_not_arm_what_is_done_by_itself(path: Path, clock: Clock) -> None:
    with SwarmDB(path, clock=clock, retention=RetentionPolicy.keep_all()) as db:
        many_old_events(db, 3)
        db.cleanup(50)
        db.cleanup_old_events(50)

        assert db.retention.is_off
        assert count(db) == 3
        assert db.last_cleanup is None


def test_writers_go_on_during_a_cleanup(db: SwarmDB, monkeypatch: pytest.MonkeyPatch) -> None:
    if db._location.is_in_memory:
        pytest.skip("in memory, others wait for the whole of it")
    monkeypatch.setattr(retention, "_MANY", 500)
    many_old_events(db, 10_000)
    failures: list[SwarmDBError] = []
    written = 0
    is_over = threading.Event()

    def write() -> None:
        nonlocal written
        while not is_over.is_set():
            try:
                event(db, db._clock(), "new")
                written += 1
            except SwarmDBError as error:
                failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert db.cleanup_old_events(30) == 10_000
    finally:
        is_over.set()
        writer.join()

    assert failures == []
    assert count(db, "new") == written > 1
    assert count(db) == 0


# By itself


def test_the_first_write_of_a_day_removes_a_thousand_rows_and_the_next_ones_the_rest(db: SwarmDB, clock: Clock) -> None:
    many_old_events(db, 2500, timedelta(days=29))
    event(db, clock.now)
    clock.advance(days=2)

    left = []
    for _ in range(4):
        event(db, clock.now)
        left.append((count(db), db.last_cleanup))
    assert left == [(1500, None), (500, None), (0, clock.now), (0, clock.now)]


WRITES: dict[str, Callable[[SwarmDB], object]] = {
    "a write": lambda db: db.store_memory("s", "semantic", "k", 1),
    "a write that returns": lambda db: db.register_agent("a", "t"),
    "a batch": lambda db: db.insert_events([]),
    "a transaction": lambda db: run(db, "UPDATE schema_info SET value = value"),
    "a session": lambda db: db.session().__enter__(),
}


@pytest.mark.parametrize("write", ["a write", "a write that returns", "a batch", "a transaction"])
def test_every_write_is_one(db: SwarmDB, clock: Clock, write: str) -> None:
    event(db, clock.now, "old")
    clock.advance(days=31)
    WRITES[write](db)

    assert count(db) == 0
    assert db.last_cleanup == clock.now


def test_it_is_part_of_no_transaction_of_the_caller(db: SwarmDB, clock: Clock) -> None:
    event(db, clock.now, "old")
    clock.advance(days=31)
    with pytest.raises(ZeroDivisionError), db.transaction():
        event(db, clock.now, "new")
        raise ZeroDivisionError

    assert count(db) == count(db, "new") == 0


@pytest.mark.parametrize("kind", ["file", "postgresql"])
def test_opening_and_reading_remove_nothing(
    kind: str, path: Path, clock: Clock, request: pytest.FixtureRequest
) -> None:
    url = url_of(kind, path, request)
    with SwarmDB(url=url, clock=clock) as db:
        many_old_events(db, 3)
        run(db, "DELETE FROM schema_info WHERE key = 'last_cleanup'")
    clock.advance(days=500)
    with SwarmDB(url=url, clock=clock) as db:
        assert count(db) == 3
        assert len(db.get_events()) == 3
        assert db.get_agent("a") is None
        assert db.check().ok
        with db.session(readonly=True):
            assert db.get_active_agents() == []
        assert db.last_cleanup is None
        assert db.retention == RetentionPolicy()
        assert count(db) == 3


@pytest.mark.parametrize("kind", ["file", "postgresql"])
def test_programs_that_write_once_each_get_to_the_end_together(
    kind: str, path: Path, clock: Clock, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_FEW", 10)
    monkeypatch.setattr(retention, "_LOOKED_AT", 10)
    url = url_of(kind, path, request)
    policy = RetentionPolicy(agents=timedelta(days=1))
    with SwarmDB(url=url, clock=clock, retention=policy) as db:
        many_old_events(db, 25)
        for number in range(30):
            db.store_memory("s", "semantic", f"kept {number}", number)
        for number in range(30):
            db.store_memory("s", "semantic", "k", number)
            db.register_agent(f"agent-{number:02}", "t", "complete")
    clock.advance(days=40)
    written = 0
    while True:
        with SwarmDB(url=url, clock=clock) as db:
            db.store_task_metric(f"t-{written}", "a", 1, "success")
            written += 1
            if db.last_cleanup is not None and written > 1:
                break
        assert written < 60

    with SwarmDB(url=url, clock=clock) as db:
        assert written > 5
        assert count(db) == 0
        assert len(db.list_memories("s")) == 31
        assert len(db.memory_history("s", "semantic", "k")) == 1
        assert db.list_agents() == []
        assert rows_of(db, "task_metrics") == written


BATCHES: dict[str, Callable[[SwarmDB, int], object]] = {
    "events": lambda db, rows: db.insert_events(
        [{"event_type": "spawn", "agent_id": "new", "agent_type": "t"} for _ in range(rows)]
    ),
    "task metrics": lambda db, rows: db.store_task_metrics(
        [
            {"task_id": f"{count(db)} {number}", "agent_id": "a", "duration_ms": 1, "result": "success"}
            for number in range(rows)
        ]
    ),
    "a transaction": lambda db, rows: in_a_transaction(db, rows),
}


def in_a_transaction(db: SwarmDB, rows: int) -> None:
    with db.transaction(), db.transaction():
        for number in range(rows // 2):
            event(db, db._clock(), "new")
            db.store_agent_metric("a", "throughput", number)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_removes_no_fewer_rows_than_it_adds(
    db: SwarmDB, clock: Clock, monkeypatch: pytest.MonkeyPatch, batch: str
) -> None:
    monkeypatch.setattr(retention, "_FEW", 10)
    monkeypatch.setattr(scope, "ROWS_A_STEP", 10)
    many_old_events(db, 120, timedelta(days=29))
    clock.advance(days=2)

    left = []
    for _ in range(3):
        BATCHES[batch](db, 40)
        left.append(count(db))
    assert left == [70, 20, 0]


def test_a_batch_that_is_undone_removes_little(db: SwarmDB, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_FEW", 10)
    monkeypatch.setattr(scope, "ROWS_A_STEP", 10)
    many_old_events(db, 120, timedelta(days=29))
    clock.advance(days=2)
    with pytest.raises(KeyError), db.transaction():
        BATCHES["a transaction"](db, 40)
        raise KeyError

    assert count(db) == 110


def test_what_takes_longer_than_a_day_goes_on_where_it_was(
    db: SwarmDB, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_FEW", 10)
    monkeypatch.setattr(retention, "_LOOKED_AT", 10)
    for number in range(200):
        db.store_memory("s", "semantic", f"kept {number}", number)
    for _ in range(2):
        db.store_memory("s", "semantic", "k", 0)
    for _ in range(10):
        clock.advance(days=31)
        db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"})

    assert len(db.memory_history("s", "semantic", "k")) == 1
    assert db.last_cleanup is not None


def test_a_write_looks_at_a_part_of_the_memories(db: SwarmDB, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_FEW", 8)
    monkeypatch.setattr(retention, "_LOOKED_AT", 10)
    for number in range(100):
        db.store_memory("s", "semantic", f"kept {number}", number)
    clock.advance(days=2)

    is_done = []
    for _ in range(3):
        event(db, clock.now)
        is_done.append(db.last_cleanup is not None)
    assert is_done == [False, False, True]  # Each looks at ten of them four times.


def test_of_more_dead_memories_than_one_write_removes_none_is_passed_over(
    db: SwarmDB, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_FEW", 8)
    for number in range(30):
        db.store_memory("s", "semantic", f"dead {number}", number, ttl_hours=1)
    clock.advance(days=40)

    for _ in range(5):
        event(db, clock.now)
    assert db.last_cleanup == clock.now
    assert rows_of(db, "session_memory") == 0


def test_a_day_passes_between_two(db: SwarmDB, clock: Clock) -> None:
    clock.advance(days=2)
    event(db, clock.now)
    first = clock.now
    for hours in (23, 0.9):
        clock.advance(hours=hours)
        event(db, clock.now - timedelta(days=31), "old")
        assert (db.last_cleanup, count(db)) == (first, 1 if hours == 23 else 2)
    clock.advance(hours=0.2)
    event(db, clock.now)

    assert (db.last_cleanup, count(db)) == (clock.now, 0)


def test_a_policy_that_changes_is_heeded_within_the_hour(path: Path, clock: Clock) -> None:
    with SwarmDB(path, clock=clock, retention=RetentionPolicy.keep_all()) as db:
        many_old_events(db, 3)
        SwarmDB(path, clock=clock, retention=RetentionPolicy()).close()
        event(db, clock.now)
        assert count(db) == 3
        clock.advance(hours=1, days=1)
        event(db, clock.now)

        assert count(db) == 0


def mark_cleanup(db: SwarmDB, clock: Clock, value: str) -> None:
    """Have the database say so of its last cleanup, when it is time to look again."""
    clock.advance(hours=2)
    with db._nothing_by_itself():
        db._write(retention.MARK, {"key": "last_cleanup", "value": value, "updated_at": clock.now})


def place(began: datetime, table: Any, after: Any = None) -> str:
    return json.dumps({"began": began.isoformat(), "table": table, "after": after})


@pytest.mark.parametrize(
    "mark",
    [
        "2100-01-01T00:00:00+00:00",
        place(datetime(2100, 1, 1, tzinfo=UTC), "agents", "z"),
        "nonsense",
        '{"table": 1}',
        "{",
        '{"a":' * 100_000,
        *(
            f'{{"began": "2025-12-31T11:59:00+00:00", "table": "{table}", "after": {after}}}'
            for table in ("memory", "agents")
            for after in (2**70, -1, 1.5, '"\\ud800"', "[1]", "{}", "NaN", "true" if table == "agents" else '"1"')
        ),
        place(Clock().now, "agent_events"),
        place(Clock().now, "memory", "z"),
        place(Clock().now, "agents", 1),
        place(Clock().now, ["events"]),
    ],
)
def test_a_mark_of_a_clock_that_was_wrong_or_of_no_use_holds_nothing_up(db: SwarmDB, clock: Clock, mark: str) -> None:
    event(db, clock.now - timedelta(days=31), "old")
    mark_cleanup(db, clock, mark)
    event(db, clock.now)

    assert count(db) == 0
    assert db.last_cleanup == clock.now


@pytest.mark.parametrize(("hours", "left"), [(-25, 0), (-23, 1), (0.9, 1), (1.1, 0)])
def test_a_cleanup_that_began_within_a_day_goes_on_where_it_was(
    db: SwarmDB, clock: Clock, hours: float, left: int
) -> None:
    event(db, clock.now - timedelta(days=40), "old")
    mark_cleanup(db, clock, place(clock.now + timedelta(hours=2 + hours), "swarm_metrics"))
    event(db, clock.now)

    assert db.last_cleanup == clock.now
    assert count(db) == left


@pytest.mark.parametrize(("hours", "left"), [(-25, 0), (-23, 1), (23, 1), (25, 0)])
def test_a_cleanup_is_due_a_day_after_the_last_by_whose_clock_ever(
    db: SwarmDB, clock: Clock, hours: float, left: int
) -> None:
    event(db, clock.now - timedelta(days=40), "old")
    mark_cleanup(db, clock, (clock.now + timedelta(hours=2 + hours)).isoformat())
    event(db, clock.now)

    assert count(db) == left


def test_a_clock_that_was_years_ahead_and_was_set_right_holds_nothing_up(db: SwarmDB, clock: Clock) -> None:
    clock.advance(days=3650)
    event(db, clock.now, "ahead")
    clock.advance(days=-3650)
    event(db, clock.now, "old")
    clock.advance(days=31)
    event(db, clock.now)

    assert count(db) == 0
    assert db.last_cleanup == clock.now


def test_a_clock_that_leaps_at_each_look_does_no_harm(path: Path, clock: Clock) -> None:
    def leaping() -> datetime:
        clock.advance(days=2)
        return clock.now

    with SwarmDB(path, clock=leaping) as db:
        event(db, clock.now - DAYS_30, "old")
        for _ in range(3):
            event(db, clock.now, "new")

        assert count(db) == 0
        assert count(db, "new") == 3


def test_a_memory_that_has_not_expired_stays_though_a_cleanup_began_by_a_clock_that_was_ahead(
    path: Path, clock: Clock
) -> None:
    with SwarmDB(path, clock=clock, retention=RetentionPolicy(memory=timedelta(0))) as db:
        many_old_events(db, 1500)
        db.store_memory("s", "semantic", "k", "x", ttl_hours=49)
        clock.advance(hours=49.5)
        event(db, clock.now)
        assert db.last_cleanup is None  # It is not done with the events.
    clock.advance(minutes=-50)
    with SwarmDB(path, clock=clock) as db:
        event(db, clock.now)

        assert db.last_cleanup == clock.now
        assert db.get_memory("s", "semantic", "k") == "x"


def test_it_waits_for_nobody(path: Path, clock: Clock) -> None:
    with (
        SwarmDB(path, clock=clock, busy_timeout=0.3) as db,
        SwarmDB(path, clock=clock, busy_timeout=3600) as patient,
        closing(sqlite3.connect(path, isolation_level=None)) as raw,
    ):
        event(db, clock.now, "old")
        clock.advance(days=31)
        raw.execute("BEGIN IMMEDIATE")
        patient._clean_if_due()  # Not even as long as the busy timeout, which is longer than a test may take.
        with pytest.raises(BusyError):
            event(db, clock.now)
        raw.execute("ROLLBACK")
        with db.transaction() as connection:  # What it sets for its own sake is as before.
            assert connection.execute("PRAGMA busy_timeout").fetchone()[0] == 300
        assert count(db) == 1
        clock.advance(seconds=1)
        event(db, clock.now)

        assert count(db) == 0


@pytest.mark.parametrize("kind", ["file", "postgresql"])
def test_what_another_has_done_since_the_look_is_not_done_again(
    kind: str, path: Path, clock: Clock, request: pytest.FixtureRequest
) -> None:
    class Late(SwarmDB):
        """Looks at the marks just before another writes."""

        def _marks(self) -> Any:
            marks = super()._marks()
            if other.last_cleanup != clock.now:
                event(other, clock.now)
                event(other, clock.now - timedelta(days=31), "old")
            return marks

    url = url_of(kind, path, request)
    with SwarmDB(url=url, clock=clock) as other, Late(url=url, clock=clock) as db:
        clock.advance(days=31)
        event(db, clock.now)

        assert other.last_cleanup == clock.now
        assert count(db) == 1


def test_on_a_server_a_cleanup_is_left_to_who_is_at_it(postgres_url: str, clock: Clock) -> None:
    with SwarmDB(url=postgres_url, clock=clock) as db, SwarmDB(url=postgres_url, clock=clock) as other:
        event(db, clock.now, "old")
        clock.advance(days=31)
        with other._nothing_by_itself(), other.transaction():
            assert other._tuples(retention._CLAIM, {}) == [(True,)]
            event(db, clock.now)
            assert count(db) == 1
        clock.advance(seconds=1)
        event(db, clock.now)

        assert count(db) == 0


def test_a_write_does_not_fail_because_old_rows_can_not_be_removed(
    db: SwarmDB, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    event(db, clock.now, "old")
    if db._location.is_on_server:
        run(
            db,
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'not this one'; END $$",
        )
        run(db, "CREATE TRIGGER kept BEFORE DELETE ON agent_events FOR EACH ROW EXECUTE FUNCTION refuse()")
    else:
        run(
            db,
            "CREATE TRIGGER kept BEFORE DELETE ON agent_events BEGIN SELECT RAISE(ABORT, 'not this one'); END",
        )
    clock.advance(days=31)
    with caplog.at_level(logging.WARNING, "moai_flow.memory"):
        event(db, clock.now, "new")
        event(db, clock.now, "new")
    assert [record.getMessage().count("not this one") for record in caplog.records] == [1]
    assert (count(db), count(db, "new"), db.last_cleanup) == (1, 2, None)
    with pytest.raises(SwarmDBError, match="not this one"):
        db.cleanup()

    run(db, "DROP TRIGGER kept ON agent_events" if db._location.is_on_server else "DROP TRIGGER kept")
    clock.advance(hours=1)
    event(db, clock.now)
    assert count(db) == 0


def write_at_once(url: str, barrier: Barrier, number: int, results: Any) -> None:
    try:
        with SwarmDB(url=url) as db:
            barrier.wait()
            for _ in range(20):
                event(db, datetime.now(UTC), f"new-{number}")
        results.put(None)
    except SwarmDBError as error:
        results.put(repr(error))


@pytest.mark.parametrize("kind", ["file", "postgresql"])
def test_of_ten_processes_that_write_at_the_same_moment_one_cleans_up(
    kind: str, path: Path, request: pytest.FixtureRequest
) -> None:
    url = url_of(kind, path, request)
    with SwarmDB(url=url) as db:
        many_old_events(db, 900)
        run(db, "CREATE TABLE noted (value TEXT)")
        if kind == "file":
            for change in ("INSERT", "UPDATE"):
                run(
                    db,
                    f"CREATE TRIGGER noting_{change} AFTER {change} ON schema_info WHEN new.key = 'last_cleanup' "
                    "BEGIN INSERT INTO noted VALUES (new.value); END",
                )
        else:
            run(
                db,
                "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN INSERT INTO noted VALUES (new.value); RETURN new; END $$",
            )
            run(
                db,
                "CREATE TRIGGER noting AFTER INSERT OR UPDATE ON schema_info FOR EACH ROW "
                "WHEN (new.key = 'last_cleanup') EXECUTE FUNCTION note()",
            )
        yesterday: Any = datetime.now(UTC) - timedelta(days=2)
        run(db, "UPDATE schema_info SET updated_at = ?", yesterday.isoformat() if kind == "file" else yesterday)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(10), context.SimpleQueue()
    processes = [context.Process(target=write_at_once, args=(url, barrier, at, results)) for at in range(10)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [results.get() for _ in processes] == [None] * 10
    with SwarmDB(url=url) as db:
        assert rows_of(db, "noted") == 1
        assert db.last_cleanup is not None
        assert rows_of(db, "agent_events") == 200


def test_a_file_of_an_older_program_is_not_cleaned_unasked(legacy: Path) -> None:
    clock = Clock()
    with SwarmDB(legacy, clock=clock) as db:
        before = {table: rows_of(db, table) for table in ("agent_events", "session_memory", "task_metrics")}
        assert db.retention.is_off
        for _ in range(3):
            clock.advance(days=500)
            event(db, clock.now)
            db.store_memory("s", "semantic", "k", 1)
        after = {table: rows_of(db, table) for table in before}
        assert after["agent_events"] == before["agent_events"] + 3
        assert after["task_metrics"] == before["task_metrics"]
        assert after["session_memory"] == before["session_memory"] + 3
    with SwarmDB(legacy, clock=clock, retention=RetentionPolicy()) as db:
        while db.last_cleanup is None:
            event(db, clock.now)
        assert {found.agent_id for found in db.iter_events()} == {"a"}
    with SwarmDB(legacy, clock=clock) as db:
        assert db.retention == RetentionPolicy()


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_an_adopted_file_keeps_all_until_its_owner_says_otherwise(path: Path, clock: Clock, version: str) -> None:
    with SwarmDB(path, clock=clock) as db:
        event(db, clock.now, "old")
    with closing(sqlite3.connect(path)) as raw:  # As an older program leaves it: without marks of ours.
        raw.execute("DELETE FROM schema_info")
        raw.execute("INSERT INTO schema_info (key, value) VALUES ('version', ?)", [version])
        raw.commit()
    clock.advance(days=500)
    with SwarmDB(path, clock=clock) as db:
        db.cleanup(days=600)
        for _ in range(3):
            clock.advance(days=2)
            event(db, clock.now, "new")
        assert db.retention.is_off
        assert (count(db), count(db, "new")) == (1, 3)
    with SwarmDB(path, clock=clock, retention=RetentionPolicy()) as db:
        clock.advance(days=2)
        event(db, clock.now, "new")
        assert (count(db), count(db, "new")) == (0, 4)


def test_marks_say_in_words_what_they_mean(path: Path, clock: Clock) -> None:
    with SwarmDB(path, clock=clock, retention=POLICY) as db:
        run(db, "UPDATE schema_info SET value = value")
        clock.advance(days=2)
        event(db, clock.now)
        marks = dict(run(db, "SELECT key, value FROM schema_info").fetchall())

    assert json.loads(marks["retention"]) == {
        "events": 90 * 86_400_000_000,
        "memory": None,
        "task_metrics": 30 * 86_400_000_000,
        "agent_metrics": 30 * 86_400_000_000,
        "swarm_metrics": 1,
        "agents": 5_400_000_000,
    }
    assert marks["last_cleanup"] == "2025-12-02T10:00:00.000000+00:00"
