"""Following tasks and agents from begin to end, however they end."""

import asyncio
import concurrent.futures
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from conftest import Clock
from moai_flow.memory import (
    AgentNotFoundError,
    AgentStatus,
    BusyError,
    ClosedError,
    InvalidInputError,
    RegisteredAgent,
    SwarmDB,
    TaskResult,
    TransactionError,
)


class TooSlowError(TimeoutError):
    pass


class Odd(BaseException):
    pass


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


OUTCOMES: list[tuple[BaseException, TaskResult]] = [
    (TimeoutError(), TaskResult.TIMEOUT),
    (TooSlowError("slow"), TaskResult.TIMEOUT),
    (TimeoutError(), TaskResult.TIMEOUT),
    (concurrent.futures.TimeoutError(), TaskResult.TIMEOUT),
    (asyncio.CancelledError(), TaskResult.CANCELLED),
    (concurrent.futures.CancelledError(), TaskResult.CANCELLED),
    (KeyboardInterrupt(), TaskResult.CANCELLED),
    (SystemExit(0), TaskResult.CANCELLED),
    (SystemExit(1), TaskResult.CANCELLED),
    (GeneratorExit(), TaskResult.CANCELLED),
    (ValueError("bad"), TaskResult.FAILURE),
    (Odd(), TaskResult.FAILURE),
    (ExceptionGroup("g", [TimeoutError(), ExceptionGroup("h", [TooSlowError()])]), TaskResult.TIMEOUT),
    (BaseExceptionGroup("g", [asyncio.CancelledError(), KeyboardInterrupt()]), TaskResult.CANCELLED),
    (ExceptionGroup("g", [TimeoutError(), ValueError()]), TaskResult.FAILURE),
    (BaseExceptionGroup("g", [TimeoutError(), asyncio.CancelledError()]), TaskResult.FAILURE),
    (ExceptionGroup("g", [ValueError()]), TaskResult.FAILURE),
]
each_outcome = pytest.mark.parametrize(("error", "result"), OUTCOMES, ids=lambda value: repr(value))


# Tasks


def test_a_block_that_returns_is_a_success(db: SwarmDB, clock: Clock) -> None:
    with db.track_task("t", "a") as task:
        assert (task.task_id, task.agent_id, task.result, task.duration_ms, task.timestamp) == ("t", "a", *[None] * 3)
        task.tokens_used += 1200
        task.files_changed = 3
        clock.advance(seconds=5)
        assert db.get_task_metrics() == []

    (found,) = db.get_task_metrics()
    assert (found.task_id, found.agent_id, found.result) == ("t", "a", TaskResult.SUCCESS)
    assert (found.tokens_used, found.files_changed) == (1200, 3)
    assert (task.result, task.duration_ms) == (found.result, found.duration_ms)
    assert task.timestamp == found.timestamp == clock.now
    assert db.get_events() == []


@each_outcome
def test_what_a_task_raises_is_its_result_and_goes_on(db: SwarmDB, error: BaseException, result: TaskResult) -> None:
    with pytest.raises(type(error)) as caught, db.track_task("t", "a") as task:
        task.tokens_used = 7
        raise error

    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert (error.__cause__, error.__context__) == (None, None)
    (found,) = db.get_task_metrics()
    assert (found.result, found.tokens_used) == (task.result, 7) == (result, 7)


@pytest.mark.parametrize("word", list(TaskResult))
def test_a_block_may_say_itself_how_it_ended(db: SwarmDB, word: TaskResult) -> None:
    with db.track_task("t", "a") as task:
        task.result = word.value
        assert task.result is word

    assert [found.result for found in db.get_task_metrics()] == [word]


def test_an_exception_says_more_than_what_was_set_before(db: SwarmDB) -> None:
    with pytest.raises(TimeoutError), db.track_task("t", "a") as task:
        task.result = "success"
        raise TimeoutError

    assert [found.result for found in db.get_task_metrics()] == [TaskResult.TIMEOUT]


def test_what_is_set_is_checked_where_it_is_set(db: SwarmDB) -> None:
    with db.track_task("t", "a") as task:
        task.tokens_used, task.files_changed, task.result = 5, 6, "failure"
        for name, bad in [("tokens_used", -1), ("files_changed", 1.5), ("tokens_used", True), ("result", "lost")]:
            with pytest.raises(InvalidInputError) as caught:
                setattr(task, name, bad)
            assert caught.value.field == name
        for name in ("task_id", "agent_id", "duration_ms", "timestamp"):
            with pytest.raises(AttributeError):
                setattr(task, name, "x")

    (found,) = db.get_task_metrics()
    assert (found.tokens_used, found.files_changed, found.result) == (5, 6, "failure")
    for name in ("tokens_used", "files_changed", "result"):
        with pytest.raises(RuntimeError, match=r"track_task\('t', 'a'\) has ended"):
            setattr(task, name, 1)


@pytest.mark.parametrize(("task_id", "agent_id", "field"), [("", "a", "task_id"), ("t", 7, "agent_id")])
def test_ids_are_checked_on_entering(db: SwarmDB, task_id: Any, agent_id: Any, field: str) -> None:
    with pytest.raises(InvalidInputError, match=field), db.track_task(task_id, agent_id):
        pytest.fail("it was entered")
    agent_type, field = ("", "agent_type") if agent_id == "a" else ("t", "agent_id")
    with pytest.raises(InvalidInputError, match=field), db.track_agent(agent_id, agent_type):
        pytest.fail("it was entered")
    assert (db.get_task_metrics(), db.list_agents(), db.get_events()) == ([], [], [])


def test_time_is_measured_by_a_clock_that_only_goes_forward(db: SwarmDB, clock: Clock) -> None:
    began = time.monotonic()
    with db.track_task("t", "a") as task, db.track_agent("a", "x") as agent:
        clock.advance(hours=-5)
        threading.Event().wait(0.05)
    at_most = (time.monotonic() - began) * 1000

    for tracked in (task, agent):
        assert tracked.duration_ms is not None
        assert 49 <= tracked.duration_ms <= at_most


def test_each_block_needs_one_of_its_own(db: SwarmDB) -> None:
    for tracked in (db.track_task("t", "a"), db.track_agent("a", "x")):
        with tracked, pytest.raises(RuntimeError, match="entered before"), tracked:
            pytest.fail("it was entered")
        with pytest.raises(RuntimeError, match="entered before"), tracked:
            pytest.fail("it was entered")
    for tracked in (db.track_task("t", "a"), db.track_agent("a", "x")):
        with pytest.raises(RuntimeError, match="not been entered"):
            tracked.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="not been entered"):
        db.track_agent("a", "x").heartbeat()

    assert len(db.get_task_metrics()) == 1
    assert len(db.get_events()) == 2


def test_tasks_nest(db: SwarmDB) -> None:
    with db.track_task("outer", "a"):
        with pytest.raises(TimeoutError), db.track_task("inner", "a"):
            raise TimeoutError
        with db.track_task("inner", "a"):
            pass

    found = {(metric.task_id, metric.result.value) for metric in db.get_task_metrics()}
    assert found == {("outer", "success"), ("inner", "timeout"), ("inner", "success")}


def test_threads_track_beside_each_other(db: SwarmDB) -> None:
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        with db.track_agent(f"a{number}", "t") as agent, db.track_task("t", agent.agent_id) as task:
            barrier.wait()
            task.tokens_used = number
            if number % 2:
                raise TimeoutError

    with ThreadPoolExecutor(8) as pool:
        raised = [future.exception() for future in [pool.submit(work, number) for number in range(8)]]

    assert [type(error) for error in raised] == [type(None), TimeoutError] * 4
    found = {metric.agent_id: (metric.tokens_used, metric.result.value) for metric in db.get_task_metrics()}
    assert found == {f"a{number}": (number, ("success", "timeout")[number % 2]) for number in range(8)}
    assert {agent.agent_id: agent.status.value for agent in db.list_agents()} == {
        f"a{number}": ("complete", "error")[number % 2] for number in range(8)
    }


def test_a_generator_that_is_closed_is_cancelled(db: SwarmDB) -> None:
    def work() -> Iterator[int]:
        with db.track_task("t", "a"), db.track_agent("a", "x"):
            yield 1
            yield 2

    working = work()
    assert next(working) == 1
    working.close()  # type: ignore[attr-defined]
    assert [found.result for found in db.get_task_metrics()] == [TaskResult.CANCELLED]
    assert db.get_events()[0].metadata_["outcome"] == "cancelled"

    assert list(work()) == [1, 2]
    assert db.get_task_metrics()[0].result is TaskResult.SUCCESS


def test_nothing_is_held_during_a_block(path: Path) -> None:
    with SwarmDB(path, busy_timeout=0) as db, SwarmDB(path, busy_timeout=0) as other:
        agent, task = db.track_agent("a", "x"), db.track_task("t", "a")
        with agent, task, other.transaction():
            other.register_agent("b", "x")
            assert db._own_block() is None
            # Ours would wait for the other's.
            with pytest.raises(BusyError):
                agent.heartbeat()


def test_no_connection_is_held_during_a_block(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url, pool_size=1, busy_timeout=5) as db:
        with db.track_agent("a", "x"), db.track_task("t", "a"), ThreadPoolExecutor(1) as pool:
            assert pool.submit(db.heartbeat, "a").result()
        assert len(db.get_task_metrics()) == 1


def test_a_task_is_part_of_the_transaction_that_it_ends_in(db: SwarmDB) -> None:
    with pytest.raises(ValueError), db.transaction(), db.track_task("t", "a"):
        raise ValueError
    assert db.get_task_metrics() == []

    with db.track_task("t", "a"), pytest.raises(ValueError), db.transaction():
        db.register_agent("a", "x")
        raise ValueError
    assert len(db.get_task_metrics()) == 1


# Recording that fails


@each_outcome
def test_an_exception_goes_on_with_a_note_where_the_end_cant_be_stored(
    db: SwarmDB, error: BaseException, result: TaskResult
) -> None:
    with pytest.raises(type(error)) as caught, db.track_task("t", "a") as task, db.track_agent("a", "x"):
        db.close()
        raise error

    assert caught.value is error
    assert [note.partition("ClosedError")[0] for note in error.__notes__] == [
        "The end of track_agent('a', 'x') could not be stored: ",
        "The end of track_task('t', 'a') could not be stored: ",
    ]
    assert (task.result, task.timestamp) == (result, None)
    del error.__notes__  # The next test gets the same object.


def test_without_an_exception_the_failure_is_raised(db: SwarmDB) -> None:
    for track in (lambda: db.track_task("t", "a"), lambda: db.track_agent("a", "x")):
        with pytest.raises(TransactionError, match="refuses writes"):
            tracked = track()
            with tracked:
                reading = db.session(readonly=True)
                reading.__enter__()
        reading.__exit__(None, None, None)

    assert db.get_task_metrics() == []
    running = db.get_agent("a")
    assert running is not None
    assert running.status is AgentStatus.RUNNING


def test_an_interrupt_that_meets_a_busy_database_stays_an_interrupt(path: Path) -> None:
    with SwarmDB(path, busy_timeout=0) as db, SwarmDB(path) as other:
        with pytest.raises(KeyboardInterrupt) as caught, db.track_agent("a", "x"), db.track_task("t", "a"):
            writing = other.transaction()
            writing.__enter__()
            raise KeyboardInterrupt
        writing.__exit__(None, None, None)

        assert [note.partition("Error: ")[0] for note in caught.value.__notes__] == [
            "The end of track_task('t', 'a') could not be stored: Busy",
            "The end of track_agent('a', 'x') could not be stored: Busy",
        ]


def test_entering_a_closed_store_raises(db: SwarmDB) -> None:
    db.close()
    with pytest.raises(ClosedError), db.track_agent("a", "x"):
        pytest.fail("it was entered")


def test_leaving_makes_no_cycle_that_keeps_the_exception(db: SwarmDB) -> None:
    def work() -> None:
        with db.track_task("t", "a"), db.track_agent("a", "x"):
            raise ValueError

    with pytest.raises(ValueError):
        work()
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(thing, ValueError) for thing in gc.get_objects())
        for _ in range(5):
            with suppress(ValueError):
                work()
        assert sum(isinstance(thing, ValueError) for thing in gc.get_objects()) == before
    finally:
        gc.enable()


# Agents


def test_an_agent_runs_while_its_block_lasts(db: SwarmDB, clock: Clock) -> None:
    began = clock.now
    with db.track_agent("a", "expert", {"model": "large"}) as agent:
        assert (agent.agent_id, agent.agent_type, agent.metadata, agent.duration_ms) == ("a", "expert", {}, None)
        running = db.get_agent("a")
        assert running is not None
        assert (running.status, running.spawned_at, running.metadata_) == ("running", began, {"model": "large"})
        (spawn,) = db.get_events()
        assert (spawn.event_type, spawn.agent_id, spawn.agent_type) == ("spawn", "a", "expert")
        assert (spawn.timestamp, spawn.metadata_) == (began, {"model": "large"})
        clock.advance(seconds=3)
        agent.metadata["files"] = ["a.py"]

    ended = db.get_agent("a")
    assert ended is not None
    assert (ended.status, ended.completed_at, ended.last_updated) == ("complete", clock.now, clock.now)
    assert (ended.duration_ms, ended.metadata_) == (agent.duration_ms, {"model": "large"})
    complete = db.get_events()[0]
    assert (complete.event_type, complete.timestamp, complete.metadata_) == (
        "complete",
        clock.now,
        {"files": ["a.py"]},
    )
    assert agent.heartbeat() is False


@each_outcome
def test_what_an_agent_raises_is_in_its_error_event(db: SwarmDB, error: BaseException, result: TaskResult) -> None:
    with pytest.raises(type(error)) as caught, db.track_agent("a", "x") as agent:
        agent.metadata |= {"at": "step 3", "outcome": "mine"}
        raise error

    assert caught.value is error
    assert not hasattr(error, "__notes__")
    ended = db.get_agent("a")
    assert ended is not None
    assert (ended.status, ended.duration_ms) == ("error", agent.duration_ms)
    newest, spawn = db.get_events()
    assert (spawn.event_type, newest.event_type) == ("spawn", "error")
    assert newest.metadata_ == {
        "at": "step 3",
        "outcome": result.value,
        "error_type": type(error).__name__,
        "error_message": str(error),
    }


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("x" * 10_000_000), "x" * 1999 + "…"),
        (ValueError("y" * 2000), "y" * 2000),
        (ValueError("a\0b\ud800c\udfffd ä 𝄞"), "a�b�c�d ä 𝄞"),
        (ValueError("\ud800" * 3000), "�" * 1999 + "…"),
        (UnspeakableError(), ""),
        (ValueError(), ""),
    ],
    ids=["huge", "longest", "unencodable", "huge and unencodable", "without words", "empty"],
)
def test_any_message_can_be_stored(db: SwarmDB, error: Exception, message: str) -> None:
    with pytest.raises(type(error)), db.track_agent("a", "x"):
        raise error

    assert not hasattr(error, "__notes__")
    assert db.get_events()[0].metadata_["error_message"] == message
    assert db.get_agent("a")["status"] == "error"  # type: ignore[index]


def test_metadata_that_cant_be_stored_is_named(db: SwarmDB) -> None:
    with pytest.raises(InvalidInputError, match=r"metadata\['k'\]"), db.track_agent("a", "x", {"k": {1}}):
        pytest.fail("it was entered")
    assert (db.list_agents(), db.get_events()) == ([], [])

    with pytest.raises(InvalidInputError, match=r"metadata\['k'\]"), db.track_agent("a", "x") as agent:
        agent.metadata["k"] = {1}
    with pytest.raises(KeyError) as caught, db.track_agent("a", "x") as agent:
        agent.metadata["k"] = {1}
        raise KeyError
    assert "could not be stored: InvalidInputError: metadata['k']" in caught.value.__notes__[0]
    # The end itself is stored, and what was raised.
    ends = [(event.event_type.value, event.metadata_.get("error_type")) for event in db.iter_events()]
    assert ends == [("spawn", None), ("complete", None), ("spawn", None), ("error", "KeyError")]
    ended = db.get_agent("a")
    assert ended is not None
    assert ended.status == "error"


def row(db: SwarmDB) -> RegisteredAgent | None:
    return db.get_agent("a")


def test_an_agent_that_was_respawned_meanwhile_is_left_alone(db: SwarmDB, clock: Clock) -> None:
    with db.track_agent("a", "x") as agent:
        clock.advance(seconds=1)
        respawned = db.register_agent("a", "y")
        clock.advance(seconds=1)
        assert agent.heartbeat() is False
        assert row(db) == respawned

    assert row(db) == respawned
    assert [(event.event_type.value, event.agent_type) for event in db.get_events()] == [
        ("complete", "x"),
        ("spawn", "x"),
    ]


def test_an_agent_that_was_deleted_meanwhile_stays_so(db: SwarmDB) -> None:
    with pytest.raises(ValueError) as caught, db.track_agent("a", "x") as agent:
        db.delete_agent("a")
        with pytest.raises(AgentNotFoundError):
            agent.heartbeat()
        raise ValueError

    assert not hasattr(caught.value, "__notes__")
    assert row(db) is None
    assert [event.event_type.value for event in db.get_events()] == ["error", "spawn"]


def test_an_agent_that_was_marked_as_stale_meanwhile_ends_as_it_did(db: SwarmDB, clock: Clock) -> None:
    with db.track_agent("a", "x") as agent:
        clock.advance(hours=1)
        assert len(db.mark_stale_agents(timedelta(minutes=1))) == 1
        assert agent.heartbeat() is False
        clock.advance(hours=1)

    ended = row(db)
    assert ended is not None
    assert (ended.status, ended.completed_at, ended.duration_ms) == ("complete", clock.now, agent.duration_ms)
    assert [event.event_type.value for event in db.get_events()] == ["complete", "error", "spawn"]


def test_an_agents_begin_and_end_are_each_all_or_nothing(db: SwarmDB) -> None:
    before = db.register_agent("a", "old")
    with pytest.raises(ValueError), db.transaction(), db.track_agent("a", "x"):
        raise ValueError

    assert (row(db), db.get_events()) == (before, [])


def test_agents_of_one_id_nest(db: SwarmDB, clock: Clock) -> None:
    with db.track_agent("a", "outer"):
        clock.advance(seconds=1)
        with pytest.raises(TimeoutError), db.track_agent("a", "inner"):
            raise TimeoutError
        clock.advance(seconds=1)

    ended = row(db)
    assert ended is not None
    assert (ended.agent_type, ended.status) == ("inner", "error")
    assert [event.event_type.value for event in db.get_events()] == ["complete", "error", "spawn", "spawn"]


# asyncio


def run(work: Callable[[], Any]) -> None:
    asyncio.run(work())


def results(db: SwarmDB) -> dict[str, str]:
    return {metric.task_id: metric.result.value for metric in db.get_task_metrics()}


def test_a_timeout_inside_the_block_is_one_and_around_it_is_a_cancellation(db: SwarmDB) -> None:
    async def work() -> None:
        with pytest.raises(TimeoutError), db.track_task("timeout inside", "a"):
            async with asyncio.timeout(0):
                await asyncio.sleep(60)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                with db.track_task("timeout around", "a"):
                    await asyncio.sleep(60)
        with pytest.raises(TimeoutError), db.track_task("wait_for inside", "a"):
            await asyncio.wait_for(asyncio.sleep(60), 0)

    run(work)
    assert results(db) == {"timeout inside": "timeout", "timeout around": "cancelled", "wait_for inside": "timeout"}


def test_a_coroutine_that_is_cancelled_is_recorded_and_stays_cancelled(db: SwarmDB) -> None:
    async def agent(started: asyncio.Event) -> None:
        with db.track_agent("a", "x"), db.track_task("t", "a"):
            started.set()
            await asyncio.sleep(60)

    async def work() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(agent(started))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    run(work)
    assert results(db) == {"t": "cancelled"}
    assert db.get_events()[0].metadata_["outcome"] == "cancelled"


def test_a_task_group_cancels_the_others_of_one_that_fails(db: SwarmDB) -> None:
    async def tracked(task_id: str, end: Callable[[], None] | None) -> None:
        with db.track_task(task_id, "a"):
            if end is None:
                await asyncio.sleep(60)
            else:
                await asyncio.sleep(0)
                end()

    async def work() -> None:
        with pytest.raises(ExceptionGroup), db.track_task("failing group", "a"):
            async with asyncio.TaskGroup() as group:
                group.create_task(tracked("waits", None))
                group.create_task(tracked("ends", lambda: None))
                group.create_task(tracked("fails", failing(ValueError())))
        with pytest.raises(ExceptionGroup), db.track_task("slow group", "a"):
            async with asyncio.TaskGroup() as group:
                group.create_task(tracked("slow", failing(TimeoutError())))

    run(work)
    assert results(db) == {
        "waits": "cancelled",
        "ends": "success",
        "fails": "failure",
        "failing group": "failure",
        "slow": "timeout",
        "slow group": "timeout",
    }


def test_coroutines_track_beside_each_other(db: SwarmDB) -> None:
    async def tracked(number: int) -> None:
        with db.track_agent(f"a{number}", "x") as agent, db.track_task(f"t{number}", "a") as task:
            for _ in range(3):
                await asyncio.sleep(0)
                task.tokens_used += number
                assert agent.heartbeat()

    async def work() -> None:
        await asyncio.gather(*(tracked(number) for number in range(10)))

    run(work)
    assert {metric.task_id: metric.tokens_used for metric in db.get_task_metrics()} == {
        f"t{number}": 3 * number for number in range(10)
    }
    assert {agent.status for agent in db.list_agents()} == {AgentStatus.COMPLETE}


def test_beside_another_coroutines_transaction_a_task_is_busy_and_says_so(db: SwarmDB) -> None:
    async def holding(held: asyncio.Event, done: asyncio.Event) -> None:
        with db.transaction():
            held.set()
            await done.wait()

    async def work() -> None:
        held, done = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(holding(held, done))
        await held.wait()
        with pytest.raises(BusyError, match="another asyncio task"), db.track_task("t", "a"):
            pass
        with pytest.raises(ValueError) as caught, db.track_task("t", "a"):
            raise ValueError
        assert "BusyError" in caught.value.__notes__[0]
        done.set()
        await other

    run(work)
    assert db.get_task_metrics() == []


def test_an_asynchronous_generator_that_is_closed_is_cancelled(db: SwarmDB) -> None:
    async def steps() -> AsyncIterator[int]:
        with db.track_task("t", "a"):
            yield 1
            yield 2

    async def work() -> None:
        working = steps()
        assert await anext(working) == 1
        await working.aclose()  # type: ignore[attr-defined]

    run(work)
    assert results(db) == {"t": "cancelled"}
