"""Transactions in event loops: whose they are, what joins them, what ends them."""

import asyncio
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlmodel import select

from loops import cancelled, run, until
from moai_flow.memory import (
    AgentEvent,
    BusyError,
    ConflictError,
    EventData,
    RegisteredAgent,
    SwarmDB,
    TransactionError,
)
from moai_flow.memory.aio import AsyncSwarmDB

EVENT: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}
RAW = "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time) VALUES ('raw','t','error',1)"


class OopsError(Exception):
    """What tests raise inside blocks."""


async def agents(db: AsyncSwarmDB) -> list[str]:
    return sorted(agent.agent_id for agent in await db.list_agents())


async def register(db: AsyncSwarmDB, name: str) -> None:
    await db.register_agent(name, "t")


def test_awaited_methods_join_a_transaction_and_share_its_fate(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        with pytest.raises(OopsError):
            async with db.transaction() as conn:
                await conn.execute(RAW)
                await register(db, "domain")
                await db.insert_events([EVENT, EVENT])
                async with db.track_task("tracked", "a"):
                    assert await agents(db) == ["domain", "raw"]
                raise OopsError
        assert await agents(db) == []
        assert await db.get_events() == []
        assert await db.get_task_metrics() == []
        async with db.transaction() as conn:
            await conn.execute(RAW)
            await register(db, "domain")
        assert await agents(db) == ["domain", "raw"]

    run(scenario, url)


@pytest.mark.parametrize("error", [OopsError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_whatever_leaves_a_block_undoes_it_and_stays_what_it_was(url: str, error: type[BaseException]) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        raised, caught = error("reason"), None
        try:
            async with db.transaction():
                await register(db, "a")
                raise raised
        except BaseException as left:  # noqa: BLE001 (any is a case)
            caught = left
        assert caught is raised
        assert [frame.name for frame in traceback.extract_tb(caught.__traceback__)] == ["scenario"]
        assert caught.__cause__ is caught.__context__ is None
        assert await agents(db) == []

    run(scenario, url)


def test_a_nested_block_is_a_savepoint(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            await register(db, "outer")
            with pytest.raises(OopsError):
                async with db.session():
                    await register(db, "inner")
                    async with db.transaction():
                        await register(db, "innermost")
                    raise OopsError
            async with db.transaction():
                await register(db, "kept")
        assert await agents(db) == ["kept", "outer"]

    run(scenario, url)


def test_an_error_of_a_method_that_is_caught_leaves_the_block_as_it_was(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            await db.insert_event(EVENT, event_id="once")
            with pytest.raises(ConflictError):
                await db.insert_event(EVENT, event_id="once")
            await register(db, "a")
        assert await agents(db) == ["a"]

    run(scenario, url)


def test_rows_of_raw_statements_are_awaited(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        place = "%s" if "postgresql" in url else "?"
        async with db.transaction() as conn:
            insert = RAW.replace("'raw'", place)
            cursor = await conn.executemany(insert, [("a",), ("b",), ("c",), ("d",)])
            assert cursor.rowcount == 4
            cursor = await conn.execute("SELECT agent_id FROM agent_registry ORDER BY agent_id")
            first, others = await cursor.fetchone(), await cursor.fetchmany(2)
            assert [row[0] for row in (first, *others, *await cursor.fetchall())] == ["a", "b", "c", "d"]
            assert await cursor.fetchone() is None
            assert await conn.run(lambda raw: raw.execute("SELECT 7").fetchone()[0]) == 7

    run(scenario, url)


def test_a_session_is_used_in_the_worker(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.session() as session:
            await register(db, "a")
            found = await session.run(lambda inner: inner.exec(select(RegisteredAgent)).one())
            await db.update_agent_status("a", "running")
        assert found.status == "running"
        async with db.session(readonly=True) as session:
            assert await session.run(lambda inner: len(inner.exec(select(AgentEvent)).all())) == 0
            with pytest.raises(TransactionError):
                await register(db, "b")
        with pytest.raises(TransactionError, match="pending"):
            async with db.session(readonly=True) as session:
                await session.run(lambda inner: inner.delete(found))

    run(scenario, url)


def test_what_belongs_to_a_block_ends_with_it_and_is_no_other_tasks(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction() as outer:
            async with db.session() as inner, db.transaction() as innermost:
                cursor = await innermost.execute("SELECT 1")
                with pytest.raises(TransactionError):
                    await asyncio.create_task(outer.execute("SELECT 1"))
                with pytest.raises(TransactionError):
                    await asyncio.create_task(cursor.fetchone())
            for ended in (inner.run(lambda session: session.flush()), innermost.execute("SELECT 1"), cursor.fetchone()):
                with pytest.raises(TransactionError):
                    await ended
            await outer.execute(RAW)
        with pytest.raises(TransactionError):
            await outer.execute("SELECT 1")
        async with db.transaction():
            with pytest.raises(TransactionError):
                await outer.execute("SELECT 1")

    run(scenario, url)


async def in_a_task(work: Awaitable[Any]) -> Any:
    return await asyncio.create_task(work)  # type: ignore[arg-type]


async def in_a_group(work: Awaitable[Any]) -> Any:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)  # type: ignore[arg-type,var-annotated]
    return task.result()


async def gathered(work: Awaitable[Any]) -> Any:
    return (await asyncio.gather(work))[0]


@pytest.mark.parametrize("start", [in_a_task, in_a_group, gathered])
def test_a_task_that_is_started_inside_a_block_is_not_part_of_it(
    shared_url: str, start: Callable[[Awaitable[Any]], Awaitable[Any]]
) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            await register(db, "inside")
            assert await start(agents(db)) == []
            assert await agents(db) == ["inside"]
            later = asyncio.create_task(register(db, "later"))
            await asyncio.sleep(0.01)
        await later
        assert await agents(db) == ["inside", "later"]

    run(scenario, shared_url)


def test_another_task_that_writes_waits_and_is_no_part_of_the_block(shared_url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        other = None
        with suppress(OopsError):
            async with db.transaction():
                await register(db, "inside")
                other = asyncio.create_task(register(db, "other"))
                await asyncio.sleep(0.01)
                raise OopsError
        assert other is not None
        await other
        assert await agents(db) == ["other"]

    run(scenario, shared_url)


def test_waiting_for_the_own_transaction_ends_with_the_busy_timeout(path: Any) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            with pytest.raises(BusyError):
                await asyncio.create_task(register(db, "other"))
            await register(db, "inside")
        assert await agents(db) == ["inside"]

    run(scenario, f"sqlite:///{path}", busy_timeout=0.1)


def test_the_block_that_has_the_lock_goes_on_though_others_that_wait_for_it_have_all_workers(shared_url: str) -> None:
    async def count(db: AsyncSwarmDB) -> None:
        for _ in range(5):
            with_conflicts = True
            while with_conflicts:
                try:
                    async with db.transaction():
                        found = await db.get_agent("counter")
                        assert found is not None
                        rounds = found.metadata_.get("rounds", 0) + 1
                        await asyncio.sleep(0)
                        await db.register_agent("counter", "t", metadata={"rounds": rounds})
                    with_conflicts = False
                except BusyError:  # On PostgreSQL, of two that read the same, one is told to try again.
                    await asyncio.sleep(0)

    async def scenario(db: AsyncSwarmDB) -> None:
        await db.register_agent("counter", "t")
        await asyncio.gather(*(count(db) for _ in range(8)))
        found = await db.get_agent("counter")
        assert found is not None
        assert found.metadata_ == {"rounds": 40}

    run(scenario, shared_url, pool_size=3)


def test_a_block_may_be_left_in_another_task_than_that_which_entered_it(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        block = db.transaction()

        async def enter() -> None:
            await block.__aenter__()
            await register(db, "a")

        await asyncio.create_task(enter())
        await block.__aexit__(None, None, None)
        assert await agents(db) == ["a"]
        assert not db._pinned

    run(scenario, url)


def test_a_raw_commit_inside_a_block_is_noticed(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        with pytest.raises(TransactionError):
            async with db.transaction() as conn:
                await conn.run(lambda raw: raw.commit())
                await conn.execute(RAW)
        assert await agents(db) == []
        await register(db, "a")

    run(scenario, url)


# Cancelled


def test_a_block_that_is_cancelled_inside_is_undone(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        entered = asyncio.Event()

        async def work() -> None:
            async with db.transaction():
                await register(db, "a")
                entered.set()
                await asyncio.sleep(3600)

        task = asyncio.create_task(work())
        await entered.wait()
        assert await cancelled(task)
        assert await agents(db) == []
        assert not db._pinned
        async with db.transaction():
            await register(db, "b")

    run(scenario, url, pool_size=1)


def test_a_call_that_is_cut_off_leaves_its_block_usable(shared_url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.register_agent("a", "t")
        async with db.transaction():
            await register(db, "b")
            with suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await register(db, "c")
            await register(db, "d")
        assert {"a", "b", "d"} <= set(await agents(db))

    run(scenario, shared_url)


def test_what_was_begun_in_a_block_is_done_as_a_whole_though_it_is_given_up(url: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def change(raw: Any) -> None:
        raw.execute("UPDATE agent_registry SET agent_type = 'u' WHERE agent_id = 'a'")
        begun.set()
        go_on.wait()
        raw.execute("UPDATE agent_registry SET agent_type = 'u' WHERE agent_id = 'b'")

    async def scenario(db: AsyncSwarmDB) -> None:
        await register(db, "a")
        await register(db, "b")

        async def block() -> None:
            async with db.transaction() as conn:
                with suppress(asyncio.CancelledError):
                    await conn.run(change)

        task = asyncio.create_task(block())
        await until(begun.is_set)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await task
        assert {agent.agent_type for agent in await db.list_agents()} == {"u"}

    run(scenario, url)


@pytest.mark.parametrize("before", [0, 1])
def test_a_statement_that_is_begun_in_a_block_after_it_was_given_up_does_not_wait(
    postgres_url: str, before: int
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def change(raw: Any) -> None:
        for _ in range(before):
            raw.execute("SELECT 1")
        begun.set()
        go_on.wait()
        raw.execute("UPDATE agent_registry SET agent_type = 'u'")  # What another has locked.

    async def scenario(db: AsyncSwarmDB) -> None:
        await register(db, "a")

        async def block() -> None:
            async with db.transaction() as conn:
                await db.store_memory("s", "semantic", "k", "v")
                with suppress(asyncio.CancelledError):
                    await conn.run(change)

        with SwarmDB(url=postgres_url) as other, other.transaction():
            other.update_agent_status("a", "running")
            task = asyncio.create_task(block())
            await until(begun.is_set)
            task.cancel()
            await asyncio.sleep(0)
            go_on.set()
            await asyncio.wait([task], timeout=20)
            assert task.done()
        # A server's transaction is over with a statement that it stopped, but not with one that it never got.
        assert isinstance(task.exception(), TransactionError) == bool(before)
        assert await db.get_memory("s", "semantic", "k") == (None if before else "v")

    run(scenario, postgres_url, busy_timeout=3600)


def test_a_call_in_a_block_that_waits_for_a_row_is_cut_off_and_the_block_goes_on(postgres_url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await register(db, "contended")
        with SwarmDB(url=postgres_url) as other, other.transaction() as conn:
            conn.execute("SELECT 1 FROM agent_registry WHERE agent_id = 'contended' FOR UPDATE")
            async with db.transaction():
                await register(db, "mine")
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await db.update_agent_status("contended", "complete")
                await register(db, "mine too")
        assert await agents(db) == ["contended", "mine", "mine too"]
        found = await db.get_agent("contended")
        assert found is not None
        assert found.status == "spawned"

    run(scenario, postgres_url, busy_timeout=3600)


def test_a_block_that_is_cancelled_while_it_is_entered_is_not(shared_url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await agents(db)
        with SwarmDB(url=shared_url) as other, other.transaction() as conn:
            if "postgresql" in shared_url:
                conn.execute("LOCK agent_registry")

            async def work() -> None:
                async with db.transaction():
                    await register(db, "a")

            task = asyncio.create_task(work())
            await until(lambda: len(db._workers._serving) == 1)
            assert await cancelled(task)
            assert not db._pinned
        await register(db, "b")
        assert await agents(db) == ["b"]

    run(scenario, shared_url, pool_size=1, busy_timeout=3600)


async def enter_and_cancel(block: Any) -> None:
    """Enter *block*, and be cancelled when its worker has begun to, and can't be held up any more."""
    loop, task, go_on = asyncio.get_running_loop(), asyncio.current_task(), threading.Event()
    assert task is not None
    enter, block._enter = block._enter, lambda: (loop.call_soon_threadsafe(cancel), go_on.wait(), enter())[2]

    def cancel() -> None:
        task.cancel()
        loop.call_later(0.01, go_on.set)

    with pytest.raises(asyncio.CancelledError):
        await block.__aenter__()
    task.uncancel()


def test_a_block_that_was_entered_when_its_task_was_cancelled_is_left_again(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await agents(db)
        await enter_and_cancel(db.transaction())
        assert not db._pinned
        async with db.transaction():
            await register(db, "outer")
            await enter_and_cancel(db.transaction())
            await register(db, "outer too")
        await register(db, "later")
        assert await agents(db) == ["later", "outer", "outer too"]

    run(scenario, url, pool_size=1)


def test_a_block_that_is_cancelled_while_it_is_committed_is_committed_and_says_that_it_was_cancelled(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        block = db.transaction()

        async def work() -> None:
            async with block:
                await register(db, "a")
                # It comes at the next await, which is the end of the block.
                asyncio.current_task().cancel()  # type: ignore[union-attr]

        task = asyncio.create_task(work())
        await asyncio.wait([task])
        assert task.cancelled()
        assert await agents(db) == ["a"]
        assert not db._pinned

    run(scenario, url)


def test_a_block_whose_coroutine_is_destroyed_is_undone(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await register(db, "a")

        async def work() -> None:
            async with db.transaction():
                await register(db, "b")
                await asyncio.get_running_loop().create_future()

        unraisable: list[Any] = []
        hook, sys.unraisablehook = sys.unraisablehook, unraisable.append
        try:
            task = asyncio.create_task(work())
            await until(lambda: "await asyncio.get_running_loop()" in str(traceback_of(task)))
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            coroutine = task.get_coro()
            with suppress(RuntimeError):
                coroutine.close()
            assert not db._pinned
        finally:
            sys.unraisablehook = hook
        assert await agents(db) == ["a"]
        await register(db, "c")
        assert await agents(db) == ["a", "c"]

    run(scenario, url, pool_size=1)


def test_a_block_whose_coroutine_is_destroyed_when_no_loop_runs_is_undone(url: str) -> None:
    db = AsyncSwarmDB(url=url, pool_size=1)
    loop = asyncio.new_event_loop()
    has_written = loop.create_future()

    async def work() -> None:
        async with db.transaction():
            await register(db, "a")
            has_written.set_result(None)
            await loop.create_future()

    async def rest() -> None:
        assert await agents(db) == []
        await db.close()

    task = loop.create_task(work())
    loop.run_until_complete(has_written)
    coroutine: Any = task.get_coro()
    coroutine.close()
    assert not db._pinned
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    asyncio.run(rest())


def traceback_of(task: "asyncio.Task[Any]") -> list[str]:
    return [line.line or "" for frame in task.get_stack() for line in traceback.extract_stack(frame)]
