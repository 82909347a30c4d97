"""Calls that are cancelled: their fate is decided when their task goes on, and nothing is left of them."""

import asyncio
import gc
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conftest import Clock
from loops import at_work, cancelled, join_workers, open_descriptors, run, until, workers
from moai_flow.memory import BusyError, EventData, SwarmDB, TaskResult
from moai_flow.memory.aio import AsyncSwarmDB
from moai_flow.memory.backends import translating
from moai_flow.memory.workers import statement_begins, statement_ends

FOR_EVER = 3600.0


def event(agent_id: str) -> EventData:
    return {"event_type": "spawn", "agent_id": agent_id, "agent_type": "t"}


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Keep others from writing agents and events."""
    with SwarmDB(url=url) as other, other.transaction() as conn:
        if "postgresql" in url:
            conn.execute("LOCK agent_registry, agent_events")
        yield


CALLS: dict[str, Callable[[AsyncSwarmDB], Awaitable[Any]]] = {
    "one statement": lambda db: db.insert_event(event("late")),
    "many rows": lambda db: db.insert_events([event("late")] * 10),
    "a block of its own": lambda db: db.register_agent("late", "t"),
    "a tracked agent": lambda db: db.track_agent("late", "t").__aenter__(),
    "a transaction": lambda db: _in_a_transaction(db),
}


async def _in_a_transaction(db: AsyncSwarmDB) -> None:
    async with db.transaction():
        await db.register_agent("late", "t")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_waits_for_another_writer_is_cut_off_and_writes_nothing_later(shared_url: str, name: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.list_agents()
        with locked(shared_url):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await CALLS[name](db)
            task = asyncio.ensure_future(CALLS[name](db))
            await until(lambda: len(db._workers._serving) == 1)
            assert await cancelled(task)
            await until(lambda: not db._workers._serving)
        await db.register_agent("next", "t")
        assert [agent.agent_id for agent in await db.list_agents()] == ["next"]
        assert await db.get_events() == []

    run(scenario, shared_url, pool_size=1, busy_timeout=FOR_EVER)


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def endless(store: SwarmDB) -> None:
    """Run a statement that does not end by itself."""
    held = store._connections.take()
    try:
        with translating("here"):
            held.raw.execute("SELECT pg_sleep(3600)" if store._location.is_on_server else ENDLESS).fetchall()
    finally:
        store._connections.give(held)


def test_a_long_statement_is_ended_and_its_connection_is_used_again(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.register_agent("a", "t")
        for _ in range(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await db._do(endless)
            task, begun = at_work(db, endless)
            await until(begun.is_set)
            assert await cancelled(task)
        assert [agent.agent_id for agent in await db.list_agents()] == ["a"]
        assert db._db is not None
        assert len(db._db._connections._open) <= 2

    run(scenario, url, pool_size=1)


def test_a_read_in_chunks_is_ended_on_a_server_as_well(postgres_url: str) -> None:
    def read(store: SwarmDB) -> None:
        with store._block(readonly=True) as block, translating("here"):
            chunks = store._programs.backend.chunks(block.held.raw, "SELECT pg_sleep(3600)", 10)
            assert list(chunks) == []

    async def scenario(db: AsyncSwarmDB) -> None:
        await db.list_agents()
        task, begun = at_work(db, read)
        await until(begun.is_set)
        await asyncio.sleep(0.1)
        assert await cancelled(task)
        assert await db.list_agents() == []

    run(scenario, postgres_url, pool_size=1)


def test_a_block_that_only_reads_gives_its_connection_back_when_it_was_ended(shared_url: str) -> None:
    def read(store: SwarmDB) -> None:
        with store.session(readonly=True) as session:
            session.connection().exec_driver_sql(
                "SELECT pg_sleep(3600)" if store._location.is_on_server else ENDLESS
            ).all()

    async def scenario(db: AsyncSwarmDB) -> None:
        await db.list_agents()
        assert db._db is not None
        [held] = db._db._connections._idle
        task, begun = at_work(db, read)
        await until(begun.is_set)
        await asyncio.sleep(0.1)
        assert await cancelled(task)
        assert db._db._connections._idle == [held]

    run(scenario, shared_url, pool_size=1)


def beat(store: SwarmDB) -> None:
    store.heartbeat("a")


def begin(store: SwarmDB) -> None:
    with store.transaction():
        pass


@pytest.mark.parametrize("step", [beat, begin])
def test_a_call_that_is_made_of_many_short_statements_ends_between_two(
    url: str, step: Callable[[SwarmDB], None]
) -> None:
    def work(store: SwarmDB) -> None:
        while True:
            step(store)

    async def scenario(db: AsyncSwarmDB) -> None:
        await db.register_agent("a", "t")
        task, begun = at_work(db, work)
        await until(begun.is_set)
        await asyncio.sleep(0.01)
        assert await cancelled(task)
        assert await db.heartbeat("a")

    run(scenario, url, pool_size=1)


def test_only_the_statement_of_the_call_that_was_cancelled_is_ended(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.list_agents()

        async def hurry() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(random.random() * 0.004):
                    await db.summarize_tasks()

        async def read() -> None:
            for _ in range(50):
                await db.list_agents()
                async with db.transaction():
                    await db.register_agent("a", "t")

        await asyncio.gather(read(), *(hurry() for _ in range(60)))

    run(scenario, url, pool_size=2)


def test_a_statement_is_cancelled_until_it_ends_and_its_worker_waits_for_that(path: Path) -> None:
    sent: list[str] = []
    refused: list[bool] = []

    def cancel() -> bool:
        sent.append("begun")
        time.sleep(0.01)  # As long as a server may take.
        sent.append("done")
        return True

    def work(_: SwarmDB) -> bool:
        assert statement_begins(cancel)
        while sent.count("begun") < 3:  # As a statement that was not there yet when it was cancelled.
            time.sleep(0.001)
        is_certain = statement_ends()
        sent.append("ended")
        refused.append(not statement_begins(cancel))
        return is_certain

    async def scenario(db: AsyncSwarmDB) -> None:
        task, begun = at_work(db, work)
        await until(begun.is_set)
        await asyncio.sleep(0.01)
        assert await cancelled(task)
        assert sent[-2:] == ["done", "ended"]
        assert sent[:4] == ["begun", "done", "begun", "done"]
        assert refused == [True]
        await db.list_agents()
        assert sent[-1] == "ended"

    run(scenario, f"sqlite:///{path}", pool_size=1)


@pytest.mark.parametrize("answers", [[False, True, True], []])
def test_a_statement_after_a_cancellation_that_failed_may_be_hit(
    path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[bool]
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    sent = threading.Event()
    certain: list[bool] = []

    def cancel() -> bool:
        sent.set()
        return answers.pop(0)

    def work(_: SwarmDB) -> None:
        assert statement_begins(cancel)
        sent.wait()
        time.sleep(0.12)  # As long as it takes to try again.
        certain.append(statement_ends())

    async def scenario(db: AsyncSwarmDB) -> None:
        task, begun = at_work(db, work)
        await until(begun.is_set)
        await asyncio.sleep(0.01)
        assert await cancelled(task)
        assert certain == [False]

    run(scenario, f"sqlite:///{path}", pool_size=1)


def test_nothing_is_sent_when_a_call_is_cancelled_between_two_statements(path: Path) -> None:
    sent: list[str] = []
    between, go_on = threading.Event(), threading.Event()

    def cancel() -> bool:
        sent.append("sent")
        return True

    def work(_: SwarmDB) -> None:
        assert statement_begins(cancel)
        assert statement_ends()
        between.set()
        go_on.wait()

    async def scenario(db: AsyncSwarmDB) -> None:
        task, _ = at_work(db, work)
        await until(between.is_set)
        task.cancel()
        await asyncio.sleep(0.05)
        go_on.set()
        assert await cancelled(task)
        assert sent == []

    run(scenario, f"sqlite:///{path}", pool_size=1)


def test_a_connection_that_a_late_cancellation_may_hit_is_closed(postgres_url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.list_agents()
        assert db._db is not None
        held = db._db._connections._idle[0]
        cancel = held.raw.cancel_safe

        def cancel_and_fail(**options: Any) -> None:
            cancel(**options)
            raise psycopg.OperationalError("the answer was lost")

        held.raw.cancel_safe = cancel_and_fail
        task, begun = at_work(db, endless)
        await until(begun.is_set)
        await asyncio.sleep(0.05)
        assert await cancelled(task)
        assert not held.is_open
        assert await db.list_agents() == []

    run(scenario, postgres_url, pool_size=1)


def test_a_call_that_was_not_begun_when_it_was_cancelled_never_is(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        go_on = threading.Event()
        first, begun = at_work(db, lambda _: go_on.wait())
        await until(begun.is_set)
        task = asyncio.ensure_future(db.register_agent("late", "t"))
        await asyncio.sleep(0)
        assert await cancelled(task)
        go_on.set()
        await first
        assert await db.list_agents() == []

    run(scenario, url, pool_size=1)


def test_a_task_goes_on_when_its_call_has_ended_however_often_it_is_cancelled(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        go_on = threading.Event()

        def register(store: SwarmDB) -> None:
            go_on.wait()
            store.register_agent("a", "t")

        task, begun = at_work(db, register)
        await until(begun.is_set)
        for _ in range(5):
            task.cancel("reason")
            await asyncio.sleep(0.001)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError, match="reason"):
            await task
        agents = await db.list_agents()
        await asyncio.sleep(0.01)
        assert await db.list_agents() == agents

    run(scenario, url)


def test_a_timeout_and_a_cancellation_from_outside_are_told_apart(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        go_on = threading.Event()
        begun = threading.Event()

        def wait(_: SwarmDB) -> None:
            begun.set()
            go_on.wait()

        limit = asyncio.timeout(None)

        async def limited() -> None:
            async with limit:
                await db._do(wait)

        task = asyncio.create_task(limited())
        await until(begun.is_set)
        limit.reschedule(asyncio.get_running_loop().time())
        await until(limit.expired)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario, url)


def test_opening_is_cut_off_as_well_and_the_next_call_opens(path: Path) -> None:
    async def main() -> None:
        db = AsyncSwarmDB(path, busy_timeout=FOR_EVER)
        with SwarmDB(path) as other:
            with other.transaction() as conn:
                conn.execute("UPDATE schema_info SET value = '2.0.0' WHERE key = 'version'")
            with other.transaction():
                opening = asyncio.ensure_future(db.list_agents())
                waiting = asyncio.ensure_future(db.list_agents())
                await until(lambda: len(db._workers._serving) == 2)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await asyncio.shield(opening)
                assert await cancelled(waiting)
                assert await cancelled(opening)
        assert await db.list_agents() == []
        await db.close()

    asyncio.run(main())


def test_a_block_of_memory_that_is_read_is_committed_when_its_readers_have_ended() -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.session(readonly=True) as session:
            await session.run(lambda inner: inner.connection().exec_driver_sql("SELECT 1 FROM agent_registry").all())

            async def write() -> None:
                async with db.transaction():
                    await db.register_agent("a", "t")

            writing = asyncio.create_task(write())
            await asyncio.sleep(0.2)  # Longer than SQLite waits at a time.
            assert not writing.done()
        await writing
        assert len(await db.list_agents()) == 1

    run(scenario, "sqlite://")


def test_a_copy_of_memory_waits_for_a_writer_as_long_as_other_calls(tmp_path: Path) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.session(readonly=True):
            await asyncio.create_task(db.list_agents())  # To open a connection, one has to wait as well.
        async with db.transaction():
            await db.register_agent("a", "t")
            copying = asyncio.create_task(db.backup(tmp_path / "copy.db"))
            await asyncio.sleep(0.4)
            assert not copying.done()
        copy = await copying
        with SwarmDB(copy) as other:
            assert len(other.list_agents()) == 1
        async with db.transaction():
            await db.register_agent("b", "t")
            copying = asyncio.create_task(db.backup(tmp_path / "never.db"))
            await asyncio.sleep(0.01)
            assert await cancelled(copying)
        assert not (tmp_path / "never.db").exists()

    run(scenario, "sqlite://", busy_timeout=FOR_EVER)


def test_old_rows_are_removed_though_the_call_that_it_happens_in_is_given_up(
    url: str, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, clean = threading.Event(), threading.Event(), SwarmDB._clean_few

    def slowly(store: SwarmDB, now: datetime) -> datetime:
        begun.set()
        go_on.wait()
        return clean(store, now)

    async def scenario(db: AsyncSwarmDB) -> None:
        await db.insert_events([event("old")] * 3)
        clock.advance(days=40)
        monkeypatch.setattr(SwarmDB, "_clean_few", slowly)
        task = asyncio.ensure_future(db.register_agent("late", "t"))
        await until(begun.is_set)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait([task])
        assert await db.get_events() == []

    with caplog.at_level(logging.WARNING):
        run(scenario, url, clock=clock, pool_size=1)
    assert caplog.records == []


# A thousand of them


class Log:
    """What was acknowledged, and what may or may not be there."""

    def __init__(self) -> None:
        self.events: set[str] = set()  # Acknowledged.
        self.groups: list[list[str]] = []  # All of a group, or none.
        self.counted = 0  # Acknowledged increments.
        self.tracked: set[str] = set()  # Blocks that were entered and left.


async def insert(db: AsyncSwarmDB, log: Log, name: str) -> None:
    log.events.add(await db.insert_event(event("single"), event_id=name))


async def insert_many(db: AsyncSwarmDB, log: Log, name: str) -> None:
    start = len(log.groups)
    log.groups.append([])
    ids = await db.insert_events([event(name)] * 7)
    log.events.update(ids)
    log.groups[start] = list(ids)


async def transact(db: AsyncSwarmDB, log: Log, name: str) -> None:
    ids = [f"{name}-{number}" for number in range(4)]
    log.groups.append(ids)
    async with db.transaction() as conn:
        await db.insert_event(event("block"), event_id=ids[0])
        async with db.session():
            await db.insert_event(event("block"), event_id=ids[1])
        await conn.execute("SELECT 1")
        await asyncio.sleep(0)
        with suppress(KeyError):
            async with db.transaction():
                await db.insert_event(event("block"), event_id=f"{name}-never")
                raise KeyError
        await db.insert_event(event("block"), event_id=ids[2])
        await db.insert_event(event("block"), event_id=ids[3])
    log.events.update(ids)


async def count(db: AsyncSwarmDB, log: Log, name: str) -> None:
    with suppress(BusyError):
        async with db.transaction():
            found = await db.get_memory("s", "semantic", "count", default=0)
            await db.store_memory("s", "semantic", "count", found + 1)
        log.counted += 1


async def track(db: AsyncSwarmDB, log: Log, name: str) -> None:
    entered = False
    try:
        async with db.track_task(name, "tracked"):
            entered = True
            await db.heartbeat("counter")
    finally:
        if entered:
            log.tracked.add(name)


async def read(db: AsyncSwarmDB, log: Log, name: str) -> None:
    await db.list_agents()
    await db.get_events(limit=20)
    async for _ in db.iter_events("block"):
        break


async def read_in_a_session(db: AsyncSwarmDB, log: Log, name: str) -> None:
    async with db.session(readonly=True):
        assert await db.get_events(limit=5) == await db.get_events(limit=5)


OPERATIONS = [insert, insert_many, transact, count, track, read, read_in_a_session]


async def cancel_at_random(db: AsyncSwarmDB, log: Log, dice: random.Random, name: str) -> bool:
    """Begin a random operation, cancel it at a random point, and return whether that ended it."""
    task = asyncio.create_task(dice.choice(OPERATIONS)(db, log, name))
    if dice.random() < 0.5:
        for _ in range(dice.randrange(12)):
            await asyncio.sleep(0)
    else:
        await asyncio.sleep(dice.random() * 0.03)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        task.cancel()
        if dice.random() < 0.3:
            await asyncio.sleep(0)
    await asyncio.wait([task])
    if task.cancelled():
        return True
    task.result()
    return False


@pytest.mark.timeout(300)
def test_a_thousand_cancellations_lose_nothing_halve_nothing_and_leave_nothing(shared_url: str) -> None:
    dice = random.Random(20251130)
    log = Log()
    gc.collect()
    join_workers()

    async def main() -> None:
        async with AsyncSwarmDB(url=shared_url, pool_size=4) as db:
            await db.register_agent("counter", "t", "running")
            times = rounds = 0
            while times < 1000:
                tasks = (cancel_at_random(db, log, dice, f"{rounds}-{number}") for number in range(16))
                times += sum(await asyncio.gather(*tasks))
                rounds += 1
                assert not db._pinned
            await until(lambda: not db._workers._serving)
            assert len(db._workers._pinned) == 0
            assert len(workers()) <= 4
            store = db._db
            assert store is not None
            assert store._connections.local.blocks == []
            gc.collect()
            assert len([held for held in store._connections._open if held.is_open]) <= 4
            if store._connections._permits is not None:
                assert len(store._connections._permits._given) == 0
            async with asyncio.timeout(30):  # All of them still work.
                await asyncio.gather(*(insert(db, log, f"last-{number}") for number in range(20)))

    before = _left()
    asyncio.run(main())
    join_workers()
    assert _left() == before

    with SwarmDB(url=shared_url, busy_timeout=0) as other:
        other.register_agent("counter", "t")  # Nobody has the lock.
        stored = {found.event_id: found.agent_id for found in other.iter_events()}
        assert log.events <= stored.keys()
        for group in log.groups:
            assert len(stored.keys() & set(group)) in (0, len(group))
        sizes = [list(stored.values()).count(name) for name in {*stored.values()} - {"single", "block"}]
        assert {*sizes} <= {7}
        assert not any(name.endswith("never") for name in stored)
        assert other.get_memory("s", "semantic", "count", default=0) >= log.counted > 0
        metrics = {metric.task_id: metric.result for metric in other.get_task_metrics(limit=5000)}
        assert metrics.keys() == log.tracked
        assert TaskResult.CANCELLED in metrics.values()
        assert TaskResult.FAILURE not in metrics.values()


def _left() -> int:
    gc.collect()
    return open_descriptors()
