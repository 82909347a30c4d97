"""The facade for asyncio: that it is SwarmDB's, and how it lives in event loops, threads and processes."""

import asyncio
import gc
import inspect
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import moai_flow.memory.workers
from conftest import Clock
from loops import at_work, cancelled, join_workers, run, until, workers
from moai_flow.memory import (
    AgentEvent,
    AgentNotFoundError,
    BusyError,
    ClosedError,
    CorruptDataError,
    EventData,
    InvalidInputError,
    RetentionPolicy,
    StorageError,
    SwarmDB,
    TaskResult,
    TransactionError,
)
from moai_flow.memory.aio import AsyncSwarmDB
from moai_flow.memory.engine import create
from moai_flow.memory.workers import Job, Pinned, Workers

EVENT: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}


def event(agent_id: str) -> EventData:
    return {"event_type": "spawn", "agent_id": agent_id, "agent_type": "t"}


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


# What it has in common with SwarmDB


def test_it_has_every_public_name_of_the_sync_facade_and_no_other() -> None:
    assert public(AsyncSwarmDB) == public(SwarmDB)


@pytest.mark.parametrize("name", sorted({*public(SwarmDB), "__init__"} - {"close"}))
def test_a_method_has_the_parameters_and_the_docstring_of_the_sync_one(name: str) -> None:
    ours, theirs = inspect.getattr_static(AsyncSwarmDB, name), inspect.getattr_static(SwarmDB, name)

    assert isinstance(ours, property) == isinstance(theirs, property)
    if isinstance(theirs, property):
        return
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__doc__.endswith(theirs.__doc__)
    assert ours.__name__ == theirs.__name__


def test_what_returns_a_value_is_awaited_and_what_does_not_is_iterated_or_entered() -> None:
    iterated = {"iter_events", "watch_events"}
    entered = {"transaction", "session", "track_task", "track_agent"}
    awaited = {name for name in public(AsyncSwarmDB) if inspect.iscoroutinefunction(getattr(AsyncSwarmDB, name))}

    properties = {name for name in public(SwarmDB) if isinstance(inspect.getattr_static(SwarmDB, name), property)}
    assert public(AsyncSwarmDB) - awaited - properties == iterated | entered


def test_each_group_gives_the_same_answers(url: str, clock: Clock) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        assert (await db.register_agent("a", "t")).agent_id == "a"
        assert (await db.update_agent_status("a", "running")).status == "running"
        assert [agent.agent_id for agent in await db.get_active_agents()] == ["a"]
        assert await db.get_agent("b") is None
        assert await db.insert_event(EVENT, event_id="e") == "e"
        assert [found.event_id for found in await db.get_events()] == ["e"]
        await db.store_memory("s", "semantic", "k", {"deep": [1]})
        assert await db.get_memory("s", "semantic", "k") == {"deep": [1]}
        assert await db.store_task_metric("t", "a", 5, "success") == clock()
        assert (await db.summarize_tasks()).count == 1
        assert not any(table.rows for table in (await db.cleanup(days=1, dry_run=True)).tables)
        assert await db.schema_version == "2.1.0"
        assert await db.retention == RetentionPolicy()
        assert await db.last_cleanup is None
        assert (await db.check()).ok
        assert await db.size_bytes() > 0

    run(scenario, url, clock=clock)


def test_errors_are_the_same_too(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        with pytest.raises(AgentNotFoundError):
            await db.update_agent_status("nobody", "running")
        with pytest.raises(InvalidInputError):
            await db.register_agent("", "t")
        with pytest.raises(InvalidInputError):
            async for _ in db.iter_events(batch_size=0):
                pass
        with pytest.raises(InvalidInputError):
            await anext(db.watch_events(poll=0))

    run(scenario, url)


def test_the_file_is_known_once_it_is_open(path: Path) -> None:
    async def main() -> None:
        db = AsyncSwarmDB(path)
        with pytest.raises(StorageError):
            _ = db.db_path
        async with db:
            assert db.db_path == path

    asyncio.run(main())


# Opening and closing


def test_unknown_parameters_are_refused_at_the_call_and_bad_values_where_it_is_opened(path: Path) -> None:
    with pytest.raises(TypeError):
        AsyncSwarmDB(path, colour="red")  # type: ignore[call-arg]

    async def main() -> None:
        refused: list[dict[str, Any]] = [
            {"pool_size": 0},
            {"pool_size": "many"},
            {"busy_timeout": "long"},
            {"durability": "low"},
        ]
        for options in refused:
            with pytest.raises(InvalidInputError):
                async with AsyncSwarmDB(path, **options):
                    pass
            with pytest.raises(InvalidInputError):
                await AsyncSwarmDB(path, **options).schema_version

    asyncio.run(main())
    assert not path.exists()


def test_nothing_is_opened_before_the_first_call_and_then_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def noting(*arguments: Any) -> Any:
        opened.append(arguments)
        return create(*arguments)

    monkeypatch.setattr("moai_flow.memory.db.create", noting)

    async def main() -> None:
        db = AsyncSwarmDB(path)
        assert opened == []
        assert not path.exists()
        await asyncio.gather(*(db.register_agent(str(number), "t") for number in range(50)))
        assert len(opened) == 1
        assert len(await db.list_agents()) == 50
        await db.close()

    asyncio.run(main())


def test_an_opening_that_failed_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    blocked = tmp_path / "folder"
    blocked.write_text("no folder")

    async def main() -> None:
        db = AsyncSwarmDB(blocked / "swarm.db")
        with pytest.raises(StorageError):
            await db.register_agent("a", "t")
        blocked.unlink()
        await db.register_agent("a", "t")
        await db.close()

    asyncio.run(main())


def test_what_cannot_be_entered_is_closed(tmp_path: Path) -> None:
    blocked = tmp_path / "folder"
    blocked.write_text("no folder")

    async def main() -> None:
        db = AsyncSwarmDB(blocked / "swarm.db")
        with pytest.raises(StorageError):
            async with db:
                pass
        blocked.unlink()
        with pytest.raises(ClosedError):
            await db.register_agent("a", "t")

    asyncio.run(main())
    join_workers()


def test_after_closing_everything_says_so(url: str) -> None:
    async def main() -> None:
        async with AsyncSwarmDB(url=url) as db:
            await db.insert_event(EVENT)
            watching = db.watch_events(0)
            await anext(watching)
        assert repr(db).endswith(", closed)")
        with pytest.raises(ClosedError):
            await db.register_agent("a", "t")
        with pytest.raises(ClosedError):
            await db.schema_version
        with pytest.raises(ClosedError):
            async with db.transaction():
                pass
        with pytest.raises(ClosedError):
            async with db.track_task("t", "a"):
                pass
        with pytest.raises(ClosedError):
            await anext(watching)
        with pytest.raises(ClosedError):
            async with db:
                pass
        await db.close()

    asyncio.run(main())


def test_it_may_be_closed_before_it_was_opened_and_twice_at_once(url: str) -> None:
    async def main() -> None:
        await AsyncSwarmDB(url=url).close()
        db = AsyncSwarmDB(url=url)
        await db.register_agent("a", "t")
        await asyncio.gather(db.close(), db.close(), db.close())
        assert db._db is not None
        assert db._db._connections.closed

    asyncio.run(main())
    join_workers()


def test_closing_waits_for_the_one_that_closes_it_already(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, close = threading.Event(), threading.Event(), SwarmDB.close

    def slowly(store: SwarmDB) -> None:
        if not begun.is_set():
            begun.set()
            go_on.wait()
        close(store)

    async def main() -> None:
        db = AsyncSwarmDB(url=url)
        await db.register_agent("a", "t")
        monkeypatch.setattr(SwarmDB, "close", slowly)
        first = asyncio.create_task(db.close())
        await until(begun.is_set)
        second = asyncio.create_task(db.close())
        await asyncio.sleep(0.05)
        assert not second.done()
        go_on.set()
        await asyncio.gather(first, second)

    asyncio.run(main())
    join_workers()


def test_closing_waits_for_calls_and_transactions_that_are_under_way(url: str) -> None:
    async def main() -> None:
        db = AsyncSwarmDB(url=url)
        task = asyncio.create_task(_write_slowly(db, entered := asyncio.Event(), go_on := asyncio.Event()))
        await entered.wait()
        closing = asyncio.create_task(db.close())
        await until(lambda: db._is_closed)
        with pytest.raises(ClosedError):
            await db.list_agents()
        go_on.set()
        await closing
        assert task.done()
        await task

    asyncio.run(main())


async def _write_slowly(db: AsyncSwarmDB, entered: asyncio.Event, go_on: asyncio.Event) -> None:
    async with db.transaction():
        entered.set()
        await go_on.wait()
        await db.register_agent("a", "t")
        async with db.transaction():
            await db.register_agent("b", "t")
        assert len(await db.list_agents()) == 2


def test_closing_that_is_cancelled_stops_waiting_and_closes_all_the_same(url: str) -> None:
    async def main() -> None:
        db = AsyncSwarmDB(url=url)
        task = asyncio.create_task(_write_slowly(db, entered := asyncio.Event(), go_on := asyncio.Event()))
        await entered.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await db.close()
        go_on.set()
        await task
        await db.close()
        assert db._db is not None
        assert db._db._connections.closed

    asyncio.run(main())
    join_workers()


def test_closing_inside_an_own_transaction_is_refused(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            with pytest.raises(TransactionError):
                await db.close()
            await db.register_agent("a", "t")
        assert await db.get_agent("a") is not None

    run(scenario, url)


# Loops, threads, processes


def test_one_object_serves_one_loop_after_another(url: str) -> None:
    db = AsyncSwarmDB(url=url)
    for number in range(3):
        asyncio.run(_register(db, str(number)))

    async def rest() -> None:
        assert len(await db.list_agents()) == 3
        await db.close()

    asyncio.run(rest())
    join_workers()


async def _register(db: AsyncSwarmDB, name: str) -> None:
    async with db.transaction():
        await db.register_agent(name, "t")


def test_loops_in_two_threads_use_one_object(url: str) -> None:
    db = AsyncSwarmDB(url=url, pool_size=2)

    async def work(name: str) -> None:
        for number in range(20):
            await _register(db, f"{name}-{number}")
            await db.get_agent(f"{name}-{number}")

    threads = [threading.Thread(target=asyncio.run, args=(work(name),)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def rest() -> None:
        assert len(await db.list_agents()) == 40
        await db.close()

    asyncio.run(rest())


def test_a_transaction_of_a_loop_that_was_closed_in_the_middle_is_rolled_back(shared_url: str) -> None:
    db = AsyncSwarmDB(url=shared_url, pool_size=1)

    loop = asyncio.new_event_loop()
    has_written = loop.create_future()

    async def begin() -> None:
        async with db.transaction():
            await db.register_agent("half", "t")
            has_written.set_result(None)
            await asyncio.sleep(3600)

    task = loop.create_task(begin())
    loop.run_until_complete(has_written)
    loop.close()

    async def rest() -> None:
        async with db.transaction():
            assert await db.list_agents() == []
            await db.register_agent("whole", "t")
        assert len(await db.list_agents()) == 1
        await db.close()

    asyncio.run(rest())
    join_workers()
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_calls_of_a_loop_that_was_closed_are_given_up_with_their_coroutines(path: Path) -> None:
    db = AsyncSwarmDB(path, pool_size=1)
    begun, go_on = threading.Event(), threading.Event()
    asyncio.run(_register(db, "a"))

    def hold(_: SwarmDB) -> None:
        begun.set()
        go_on.wait()

    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(db._do(hold)), loop.create_task(_register(db, "late"))]
    loop.run_until_complete(asyncio.sleep(0))
    begun.wait()
    loop.close()
    for task in tasks:
        coroutine: Any = task.get_coro()
        coroutine.close()
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    assert not db._workers._waiting
    go_on.set()

    async def rest() -> None:
        async with asyncio.timeout(20):
            assert [agent.agent_id for agent in await db.list_agents()] == ["a"]
        await db.close()

    asyncio.run(rest())
    join_workers()


IN_A_PROCESS = """
import asyncio, os, sys
from moai_flow.memory.aio import AsyncSwarmDB
path = sys.argv[1]
"""


def in_a_process(program: str, path: Path | str) -> str:
    code = IN_A_PROCESS + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_transaction_that_is_gone_with_its_loop_and_its_database_is_rolled_back(path: Path) -> None:
    program = """
    import gc, time
    from moai_flow.memory import BusyError, SwarmDB, workers
    workers._LOOK = 0.01
    async def begin(has_written):
        db = AsyncSwarmDB(path)
        async with db.transaction():
            await db.register_agent("half", "t")
            has_written.set_result(None)
            await asyncio.sleep(3600)
    def leave():
        loop = asyncio.new_event_loop()
        has_written = loop.create_future()
        task = loop.create_task(begin(has_written))
        loop.run_until_complete(has_written)
    leave()
    with SwarmDB(path, busy_timeout=0) as db:
        while True:
            gc.collect()  # A worker that just looks for the loop has it as well, for a moment.
            try:
                db.register_agent("whole", "t")
                break
            except BusyError:
                time.sleep(0.01)
        print([agent.agent_id for agent in db.list_agents()])
    """
    assert in_a_process(program, path) == "['whole']\n"


@pytest.mark.parametrize("call", ["db.list_agents()", "block()"])
def test_an_interrupt_as_results_are_given_back_ends_the_loop_and_loses_none(path: Path, call: str) -> None:
    program = """
    events = 0
    def interrupt_at(number):
        def interrupt(frame, kind, argument):
            global events
            if frame.f_code.co_qualname in ("_Returned._take", "Job.settle") and kind in ("call", "c_return"):
                events += 1
                if events == number:
                    raise KeyboardInterrupt
        return interrupt
    async def block():
        async with db.transaction():
            pass
    async def main(number):
        await db.list_agents()
        sys.setprofile(interrupt_at(number))
        try:
            await CALL
        finally:
            sys.setprofile(None)
    db, number = AsyncSwarmDB(path, pool_size=1), 0
    while events >= number:
        events, number = 0, number + 1
        try:
            asyncio.run(main(number))
        except KeyboardInterrupt:
            pass
    print(number)
    asyncio.run(db.close())
    """
    assert int(in_a_process(program.replace("CALL", call), path)) > 5


def test_an_interpreter_ends_with_a_database_that_was_never_closed(path: Path) -> None:
    program = """
    async def main():
        global db
        db = AsyncSwarmDB(path)
        await db.register_agent("a", "t")
    asyncio.run(main())
    """
    in_a_process(program, path)

    with SwarmDB(path) as db:
        assert db.get_agent("a") is not None


def test_an_interpreter_ends_in_the_middle_of_a_transaction(path: Path) -> None:
    program = """
    async def main(entered):
        global db
        db = AsyncSwarmDB(path)
        await db.register_agent("a", "t")
        async with db.transaction():
            await db.register_agent("b", "t")
            entered.set_result(None)
            await asyncio.sleep(3600)
    loop = asyncio.new_event_loop()
    entered = loop.create_future()
    task = loop.create_task(main(entered))
    loop.run_until_complete(entered)
    """
    in_a_process(program, path)

    with SwarmDB(path, busy_timeout=0) as db:
        assert [agent.agent_id for agent in db.list_agents()] == ["a"]
        db.register_agent("c", "t")


def test_a_forked_child_uses_it_on(path: Path) -> None:
    program = """
    async def work(name):
        async with db.transaction():
            await db.register_agent(name, "t")
        await db.insert_event({"event_type": "spawn", "agent_id": name, "agent_type": "t"})
    db = AsyncSwarmDB(path)
    asyncio.run(work("parent"))
    child = os.fork()
    if not child:
        asyncio.run(work("child"))
        asyncio.run(db.close())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    asyncio.run(work("again"))
    asyncio.run(db.close())
    """
    in_a_process(program, path)

    with SwarmDB(path) as db:
        assert {agent.agent_id for agent in db.list_agents()} == {"parent", "child", "again"}


def test_a_child_that_is_forked_while_the_database_is_opened_opens_it_itself(path: Path) -> None:
    program = """
    async def register(name):
        async with asyncio.timeout(20):
            await db.register_agent(name, "t")
    db = AsyncSwarmDB(path)
    with db._opening:  # As a worker has it meanwhile.
        child = os.fork()
        if not child:
            asyncio.run(register("child"))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    asyncio.run(register("parent"))
    asyncio.run(db.close())
    """
    in_a_process(program, path)

    with SwarmDB(path) as db:
        assert {agent.agent_id for agent in db.list_agents()} == {"child", "parent"}


def test_a_forked_child_awaits_in_the_loop_that_a_result_was_on_its_way_to(path: Path) -> None:
    program = """
    import threading
    class Late(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *arguments, **options):
            if os.getpid() == parent and threading.current_thread() is not threading.main_thread():
                on_its_way.set()
                go_on.wait()
            return super().call_soon_threadsafe(*arguments, **options)
    async def begin():
        task = asyncio.ensure_future(db.register_agent("parent", "t"))
        while not on_its_way.is_set():
            await asyncio.sleep(0.001)
        return task
    async def register(name):
        async with asyncio.timeout(20):
            await db.register_agent(name, "t")
    parent, on_its_way, go_on = os.getpid(), threading.Event(), threading.Event()
    loop, db = Late(), AsyncSwarmDB(path)
    task = loop.run_until_complete(begin())
    child = os.fork()
    if not child:
        loop.run_until_complete(register("child"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    loop.run_until_complete(task)
    loop.run_until_complete(db.close())
    loop.close()
    """
    in_a_process(program, path)

    with SwarmDB(path) as db:
        assert {agent.agent_id for agent in db.list_agents()} == {"parent", "child"}


def test_a_child_that_is_forked_by_a_call_which_nobody_awaits_any_more_works_on(path: Path) -> None:
    program = """
    import threading
    def fork(store):
        begun.set()
        go_on.wait()
        child = os.fork()
        if not child:
            store.register_agent("child", "t")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    async def main():
        async with AsyncSwarmDB(path) as db:
            task = asyncio.create_task(db._do(fork))
            while not begun.is_set():
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.sleep(0)
            go_on.set()
            await asyncio.wait([task])
            assert task.cancelled()
    begun, go_on = threading.Event(), threading.Event()
    asyncio.run(main())
    """
    in_a_process(program, path)

    with SwarmDB(path) as db:
        assert [agent.agent_id for agent in db.list_agents()] == ["child"]


def test_no_thread_is_left_when_the_object_is_gone(path: Path) -> None:
    async def main() -> None:
        db = AsyncSwarmDB(path)
        await asyncio.gather(*(db.register_agent(str(number), "t") for number in range(20)))
        assert workers()

    asyncio.run(main())
    gc.collect()
    join_workers()


def test_an_error_that_was_caught_is_gone_at_once_with_all_that_it_holds(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async def fail() -> "weakref.ref[BaseException]":
            try:
                await db.update_agent_status("nobody", "running")
            except AgentNotFoundError as error:
                return weakref.ref(error)
            raise AssertionError

        gc.collect()
        gc.disable()
        try:
            gone = [await fail() for _ in range(5)]
            await db.list_agents()
            assert [reference() for reference in gone] == [None] * 5
        finally:
            gc.enable()

    run(scenario, url)


def test_an_error_of_a_call_that_waited_in_vain_is_gone_at_once_as_well(path: Path) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.list_agents()
        with SwarmDB(path) as other, other.transaction():
            gc.collect()
            gc.disable()
            try:
                gone: list[weakref.ref[BaseException]] = []
                for _ in range(5):
                    try:
                        await db.register_agent("a", "t")
                    except BusyError as error:
                        gone += [weakref.ref(each) for each in (error, error.__cause__) if each is not None]
                await db.list_agents()
                assert [reference() for reference in gone] == [None] * 10
            finally:
                gc.enable()

    run(scenario, f"sqlite:///{path}", busy_timeout=0.1)


def test_an_error_that_nobody_can_await_any_more_is_no_complaint(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        go_on = threading.Event()

        def fail(store: SwarmDB) -> None:
            go_on.wait()
            raise ValueError

        task, begun = at_work(db, fail)
        await until(begun.is_set)
        ended = asyncio.create_task(cancelled(task))
        await asyncio.sleep(0)
        go_on.set()
        assert await ended

    run(scenario, url)
    gc.collect()
    assert caplog.records == []


def test_a_call_that_raises_stop_iteration_or_exits_does_not_hang(path: Path) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction() as conn:
            with pytest.raises(RuntimeError, match="StopIteration"):
                await conn.run(lambda _: next(iter([])))
            with pytest.raises(asyncio.CancelledError):
                await conn.run(_cancel)
            await db.register_agent("a", "t")
        assert await db.get_agent("a") is not None

    run(scenario, f"sqlite:///{path}")


def _cancel(_: Any) -> None:
    raise asyncio.CancelledError


# Workers


def test_as_many_calls_run_at_once_as_the_pool_is_large(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        barrier = threading.Barrier(3)
        await asyncio.gather(*(db._do(lambda _: barrier.wait()) for _ in range(3)))
        assert len(workers()) == 3

    run(scenario, url, pool_size=3)


def test_calls_that_take_long_keep_no_other_waiting(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        go_on = threading.Event()
        long = [asyncio.create_task(db._do(lambda _: go_on.wait())) for _ in range(3)]
        await asyncio.sleep(0)
        assert await db.list_agents() == []
        assert not any(task.done() for task in long)
        go_on.set()
        await asyncio.gather(*long)

    run(scenario, url, pool_size=4)


def test_who_stood_in_for_workers_that_took_long_does_so_no_longer_than_they_do(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        db._workers.at_once = 1
        go_on, inside, most = threading.Event(), 0, 0
        long = [asyncio.create_task(db._do(lambda _: go_on.wait())) for _ in range(3)]
        await until(lambda: len(db._workers._serving) == 3)

        def work(number: int) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            if number == 20:
                monkeypatch.setattr(moai_flow.memory.workers, "_LONG", 3600)  # From here on, nothing does.
                go_on.set()
            time.sleep(0.0001)
            inside -= 1

        await asyncio.gather(*(db._do(lambda _, number=number: work(number)) for number in range(200)), *long)  # type: ignore[misc]
        assert most == 1

    run(scenario, f"sqlite:///{path}", pool_size=4)


def test_a_loop_that_is_stuck_keeps_the_calls_of_no_other_waiting(path: Path) -> None:
    """It had been about to look whether what waits is waiting for a call that takes long."""
    db, is_stuck, others_are_done = AsyncSwarmDB(path), threading.Event(), threading.Event()

    async def get_stuck() -> None:
        await db.list_agents()
        long = [asyncio.create_task(db._do(lambda _: others_are_done.wait())) for _ in range(2)]
        await until(lambda: len(db._workers._looking) == 1)
        is_stuck.set()
        assert others_are_done.wait(20)
        await asyncio.gather(*long)

    stuck = threading.Thread(target=lambda: asyncio.run(get_stuck()))

    async def others() -> None:
        stuck.start()
        await asyncio.to_thread(is_stuck.wait)
        async with asyncio.timeout(10):
            await db.list_agents()

    try:
        asyncio.run(others())
    finally:
        others_are_done.set()
        stuck.join()
        asyncio.run(db.close())
    join_workers()


def test_a_loop_looks_after_what_waits_by_one_timer_however_late_it_is(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        go_on = threading.Event()
        tasks = [asyncio.create_task(db._do(lambda _: go_on.wait()))]
        for _ in range(20):
            tasks.append(asyncio.create_task(db._do(lambda _: True)))
            await asyncio.sleep(0)
            time.sleep(2 * moai_flow.memory.workers._LONG)  # The loop is late.
        loop = asyncio.get_running_loop()
        timers = [*loop._scheduled, *loop._ready]  # type: ignore[attr-defined]
        looks = sum("_look" in repr(timer) for timer in timers)
        go_on.set()
        await asyncio.gather(*tasks)
        assert looks == 1

    run(scenario, url, pool_size=1)


def test_calls_and_blocks_that_are_given_up_while_they_wait_for_a_worker_leave_nothing(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        go_on = threading.Event()
        long, begun = at_work(db, lambda _: go_on.wait())
        await until(begun.is_set)
        for _ in range(20):
            given_up = [asyncio.create_task(db.list_agents()), asyncio.create_task(_register(db, "a"))]
            await asyncio.sleep(0)
            for task in given_up:
                await cancelled(task)
        left = len(db._workers._waiting), len(db._workers._pinned)
        go_on.set()
        await long
        assert left == (0, 0)

    run(scenario, url, pool_size=1)


def test_an_interrupt_while_results_are_given_back_loses_none() -> None:
    class Interrupted(Job[int]):
        was_interrupted = False

        def settle(self) -> None:
            if not self.was_interrupted:
                self.was_interrupted = True
                raise KeyboardInterrupt
            super().settle()

    waiting: list[asyncio.Task[int]] = []

    def give_back() -> None:
        for job in (Interrupted(lambda: 4), Job(lambda: 5)):
            job.run()
            waiting.append(loop.create_task(job.wait()))

    async def rest() -> list[int]:
        async with asyncio.timeout(10):
            return await asyncio.gather(*waiting)

    with closing(asyncio.new_event_loop()) as loop:
        loop.call_soon(give_back)
        with pytest.raises(KeyboardInterrupt):
            loop.run_forever()
        assert loop.run_until_complete(rest()) == [4, 5]


def test_a_loop_looks_after_everything_else_between_results_however_many_come_back() -> None:
    async def main() -> None:
        jobs = [Job(lambda: 1) for _ in range(100)]
        waiting = [asyncio.create_task(job.wait()) for job in jobs]
        await asyncio.sleep(0)
        for job in jobs:
            job.run()
        await asyncio.sleep(0)
        assert 0 < sum(job.has_succeeded for job in jobs) < 50
        assert await asyncio.gather(*waiting) == [1] * 100

    asyncio.run(main())


def test_a_loop_that_is_over_is_kept_by_nobody(path: Path) -> None:
    db = AsyncSwarmDB(path)

    async def use() -> "weakref.ref[asyncio.AbstractEventLoop]":
        await asyncio.gather(*(_register(db, str(number)) for number in range(3)))
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(use())
    gc.collect()
    assert loop() is None
    asyncio.run(db.close())
    join_workers()


class Thing:
    """What can be seen to be gone."""


def test_what_a_call_was_given_is_let_go_before_its_result_is_on_its_way() -> None:
    things: list[weakref.ref[Thing]] = []
    there: list[bool] = []

    class Noting(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> asyncio.Handle:  # type: ignore[override]
            there.extend(thing() is not None for thing in things)
            return super().call_soon_threadsafe(*arguments, **options)

    async def main() -> None:
        thing = Thing()
        job = Job(partial(bool, thing))
        things.append(weakref.ref(thing))
        del thing
        job.run()
        assert there == [False]

    with asyncio.Runner(loop_factory=Noting) as runner:
        runner.run(main())


def given(thing: Thing) -> "tuple[Job[Thing], weakref.ref[Thing]]":
    """Return a job that was given something, which it returns, and whether that is still there."""
    return Job(lambda: thing), weakref.ref(thing)


def test_a_call_that_has_ended_or_was_given_up_holds_nothing_though_somebody_has_it_still() -> None:
    async def main() -> None:
        ended, result = given(Thing())
        waiting = asyncio.create_task(ended.wait())
        await asyncio.sleep(0)
        ended.run()
        assert await waiting is result()
        del waiting
        dropped, argument = given(Thing())
        task = asyncio.create_task(dropped.wait())
        await asyncio.sleep(0)
        assert await cancelled(task)
        assert (result(), argument()) == (None, None)

    asyncio.run(main())


def test_a_call_that_was_given_up_as_a_worker_took_it_is_not_made() -> None:
    made: list[int] = []

    async def main() -> None:
        job = Job(lambda: made.append(1))
        task = asyncio.create_task(job.wait())
        await asyncio.sleep(0)
        assert await cancelled(task)
        job.run()

    asyncio.run(main())
    assert made == []


def complaints() -> list[dict[str, Any]]:
    """Return what the running loop complains about from here on."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
    return found


def test_a_result_that_comes_while_its_task_is_cancelled_again_is_no_complaint() -> None:
    async def main() -> None:
        found, begun, go_on = complaints(), threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            go_on.wait()

        job = Job(hold)
        task = asyncio.create_task(job.wait())
        await asyncio.sleep(0)
        worker = threading.Thread(target=job.run)
        worker.start()
        begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        worker.join()  # Its result is on its way.
        assert await cancelled(task)
        assert found == []

    asyncio.run(main())


def test_a_call_that_is_cancelled_as_its_patience_ends_is_no_complaint() -> None:
    async def main() -> None:
        found, job = complaints(), Job(bool)
        task = asyncio.create_task(job.wait(0.01))
        await asyncio.sleep(0)
        time.sleep(0.02)
        await asyncio.sleep(0)  # Both are due in the same turn of the loop.
        assert await cancelled(task)
        assert found == []

    asyncio.run(main())


def test_what_was_begun_in_time_is_not_told_that_it_waited_in_vain(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            await db.list_agents()
            task = asyncio.create_task(db._do(lambda _: time.sleep(1.2)))
            await asyncio.sleep(0)
        await task

    run(scenario, url, pool_size=1, busy_timeout=1)


def test_an_interrupt_of_the_event_loop_as_it_takes_a_worker_takes_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(at: int) -> None:
        events = 0

        def interrupt(frame: FrameType, kind: str, argument: object) -> None:
            nonlocal events
            if kind in ("call", "c_return") and frame.f_code.co_qualname == "Workers.pin":
                events += 1
                if events == at:
                    raise KeyboardInterrupt  # Python then takes the profile function away.

        sys.setprofile(interrupt)
        async with db.transaction():
            sys.setprofile(None)

    async def last() -> None:
        await until(lambda: not db._workers._pinned)
        assert await db.list_agents() == []
        await db.close()

    monkeypatch.setattr(moai_flow.memory.workers, "_LOOK", 0.01)
    db = AsyncSwarmDB(path, pool_size=1)
    asyncio.run(main(0))
    interrupted = 0
    is_over = False
    while not is_over:
        try:
            asyncio.run(main(interrupted + 1))
            is_over = True
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.setprofile(None)
    assert interrupted > 0
    gc.collect()
    asyncio.run(last())
    join_workers()


def test_a_block_that_is_over_keeps_nobody_from_the_worker_that_it_had(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, unpinned = threading.Event(), Workers.unpinned

    def late(of: Workers, pinned: Pinned) -> None:
        go_on.wait()
        unpinned(of, pinned)

    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            await db.list_agents()
        reading = asyncio.create_task(db.list_agents())
        for _ in range(10):
            await asyncio.sleep(0)
        go_on.set()  # The worker was not quite done with the block until now.
        assert await reading == []

    monkeypatch.setattr(Workers, "unpinned", late)
    run(scenario, url, pool_size=1, busy_timeout=0)


def test_a_call_that_has_ended_leaves_no_timer(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            await db.list_agents()
            task = asyncio.create_task(db.list_agents())
            await asyncio.sleep(0)
        await task
        loop = asyncio.get_running_loop()
        timers = [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        assert not any("_expire" in repr(timer) for timer in timers)

    run(scenario, url, pool_size=1, busy_timeout=3600)


def test_a_call_whose_coroutine_is_destroyed_is_not_made(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.list_agents()
        go_on = threading.Event()
        long, begun = at_work(db, lambda _: go_on.wait())
        await until(begun.is_set)
        call = db.register_agent("late", "t")
        call.send(None)
        call.close()
        go_on.set()
        await long
        assert await db.list_agents() == []

    run(scenario, url, pool_size=1)


@pytest.mark.parametrize("wait", [Job.wait, Job.wait_to_the_end])
def test_an_error_of_a_call_whose_coroutine_was_destroyed_is_no_complaint(wait: Any) -> None:
    async def main() -> None:
        found, begun, go_on = complaints(), threading.Event(), threading.Event()

        def fail() -> None:
            begun.set()
            go_on.wait()
            raise ValueError

        job = Job(fail)
        call = wait(job)
        call.send(None)
        worker = threading.Thread(target=job.run)
        worker.start()
        begun.wait()
        call.close()
        go_on.set()
        worker.join()
        await asyncio.sleep(0)
        del job, call
        gc.collect()
        assert found == []

    asyncio.run(main())


def test_what_the_end_of_a_cancelled_block_raised_is_told_as_the_cause() -> None:
    def fail() -> None:
        raise ValueError

    async def main() -> None:
        job = Job(fail)
        task = asyncio.create_task(job.wait_to_the_end())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        job.run()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert isinstance(caught.value.__cause__, ValueError)

    asyncio.run(main())


def test_what_waits_is_done_beside_calls_that_take_long_though_it_is_being_closed(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        db._workers.at_once = 1
        go_on = threading.Event()
        long = asyncio.create_task(db._do(lambda _: go_on.wait(20)))
        await asyncio.sleep(0)
        short = asyncio.create_task(db._do(lambda _: go_on.set()))
        await asyncio.sleep(0)
        await db.close()
        assert await long
        await short

    run(scenario, url, pool_size=3)


#: Runs what needs new threads where there are none to be had.
WITHOUT_THREADS = """
async def until_done(*tasks):
    await asyncio.wait(tasks, timeout=20)
    assert all(task.done() for task in tasks)
    return [task.exception() or task.result() for task in tasks]
def no_threads():
    threading.stack_size(1 << 46)
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        return
    raise AssertionError("there are threads of this size")
"""


def test_where_no_thread_is_to_be_had_those_that_are_there_do_it(path: Path) -> None:
    program = """
    import threading
    %s
    async def main():
        db = AsyncSwarmDB(path, pool_size=10)
        await db.list_agents()
        db._workers.at_once = 9
        go_on, begun = threading.Event(), []
        def work(_):
            begun.append(1)
            go_on.wait()
        long = []
        # The pool may have started another thread though one was about to be idle: each is kept busy.
        while len(long) < sum(thread.name.startswith("swarmdb") for thread in threading.enumerate()):
            long.append(asyncio.create_task(db._do(work)))
            while len(begun) < len(long):
                await asyncio.sleep(0.001)
        no_threads()
        short = asyncio.create_task(db.register_agent("a", "t"))
        await asyncio.sleep(0.05)
        assert not short.done()
        go_on.set()
        print((await until_done(short))[0].agent_id)
        threading.stack_size(0)
        await db.close()
    asyncio.run(main())
    """
    assert in_a_process(program.replace("%s", textwrap.indent(WITHOUT_THREADS, "    ")), path) == "a\n"


def test_where_no_thread_is_to_be_had_at_all_a_call_says_so_and_is_not_made_later(path: Path) -> None:
    program = """
    import threading
    %s
    async def block(db):
        async with db.transaction():
            pass
    async def main():
        db = AsyncSwarmDB(path, pool_size=1)
        no_threads()
        for call in (db.register_agent("a", "t"), block(db)):
            [error] = await until_done(asyncio.create_task(call))
            print(error)
        assert not db._workers.are_all_pinned
        threading.stack_size(0)
        print(await db.get_agent("a"))
        await block(db)
        await db.close()
    asyncio.run(main())
    """
    said = in_a_process(program.replace("%s", textwrap.indent(WITHOUT_THREADS, "    ")), path)
    assert said == "can't start new thread\ncan't start new thread\nNone\n"


def test_a_transaction_goes_on_though_no_thread_is_to_be_had(path: Path) -> None:
    program = """
    import threading
    %s
    from moai_flow.memory import workers
    workers._LOOK = 0.01
    async def main():
        db = AsyncSwarmDB(path)
        async with db.transaction():
            await db.register_agent("a", "t")
            no_threads()
            await asyncio.sleep(0.1)
            async with asyncio.timeout(20):
                print(await db.heartbeat("a"))
            threading.stack_size(0)
        print((await db.get_agent("a")).agent_id)
        await db.close()
    asyncio.run(main())
    """
    assert in_a_process(program.replace("%s", textwrap.indent(WITHOUT_THREADS, "    ")), path) == "True\na\n"


def test_where_no_thread_is_to_be_had_closing_says_so_and_leaves_it_open(path: Path) -> None:
    program = """
    import threading
    %s
    async def main():
        db = AsyncSwarmDB(path)
        await db.register_agent("a", "t")
        no_threads()
        [error] = await until_done(asyncio.create_task(db.close()))
        print(error)
        threading.stack_size(0)
        print(await db.heartbeat("a"))
        await db.close()
        print(db._is_closed)
    asyncio.run(main())
    """
    said = in_a_process(program.replace("%s", textwrap.indent(WITHOUT_THREADS, "    ")), path)
    assert said == "can't start new thread\nTrue\nTrue\n"


def test_where_no_thread_is_to_be_had_a_statement_that_is_given_up_goes_on_to_its_end(postgres_url: str) -> None:
    program = """
    import threading
    %s
    async def main():
        db = AsyncSwarmDB(url=path)
        begun = threading.Event()
        def work(store):
            with store.transaction() as conn:
                begun.set()
                print(conn.execute("SELECT pg_sleep(0.5), 'slept'").fetchone()[1])
        await db.list_agents()
        task = asyncio.create_task(db._do(work))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        no_threads()
        task.cancel()
        await asyncio.wait([task])
        print(task.cancelled())
        threading.stack_size(0)
        print(await db.list_agents())
        await db.close()
    asyncio.run(main())
    """
    said = in_a_process(program.replace("%s", textwrap.indent(WITHOUT_THREADS, "    ")), postgres_url)
    assert said == "slept\nTrue\n[]\n"


def test_a_transaction_that_outlives_the_main_thread_says_what_has_become_of_it(path: Path) -> None:
    program = """
    import threading, time
    from moai_flow.memory import workers
    workers._LOOK = 0.01
    async def main():
        db = AsyncSwarmDB(path)
        try:
            async with db.transaction():
                await db.register_agent("a", "t")
                entered.set()
                while db._workers._pinned:
                    await asyncio.sleep(0.001)
                await db.register_agent("b", "t")
        except Exception as error:
            print(type(error).__name__, error)
        await db.close()
    entered = threading.Event()
    threading.Thread(target=lambda: asyncio.run(main())).start()
    entered.wait()
    """
    assert in_a_process(program, path) == (
        "TransactionError this transaction was rolled back, since the interpreter is ending\n"
    )
    with SwarmDB(path) as db:
        assert db.list_agents() == []


def test_a_call_waits_while_transactions_have_all_workers(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            await db.register_agent("a", "t")
            reading = asyncio.create_task(db.list_agents())
            beginning = asyncio.create_task(_register(db, "b"))
            await asyncio.sleep(0.01)
            assert not reading.done()
        assert [agent.agent_id for agent in await reading] == ["a"]
        await beginning

    run(scenario, url, pool_size=1)


def test_a_task_that_waits_in_its_transaction_for_one_that_waits_for_its_worker_is_told(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.transaction():
            await db.register_agent("a", "t")
            for other in (db.list_agents(), _register(db, "b")):
                with pytest.raises(BusyError, match="workers"):
                    await asyncio.create_task(other)
        assert len(await db.list_agents()) == 1
        await _register(db, "b")

    run(scenario, url, pool_size=1, busy_timeout=0.05)


# Iterating


def test_iterating_reads_ahead_a_bounded_number_of_events(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.insert_events([event(str(number)) for number in range(1, 251)])
        events = [found.agent_id async for found in db.iter_events(batch_size=70)]
        assert events == [str(number) for number in range(1, 251)]
        async with db.transaction():
            await db.insert_event(event("inside"))
            assert [found.agent_id async for found in db.iter_events("inside")] == ["inside"]

    run(scenario, url)


def test_an_iteration_that_is_left_early_holds_nothing(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.insert_events([event(str(number)) for number in range(300)])
        for _ in range(5):
            async for _event in db.iter_events():
                break
        kept = [db.iter_events() for _ in range(5)]
        for events in kept:
            await anext(events)
        await until(lambda: not db._workers._serving)
        await db.vacuum()

    run(scenario, url, pool_size=1)


def test_what_comes_before_a_corrupt_event_is_given_before_the_error(path: Path) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.insert_events([event(str(number)) for number in range(1, 251)])
        async with db.transaction() as conn:
            await conn.execute("UPDATE agent_events SET metadata = 'no JSON' WHERE agent_id = '250'")
        for events in (db.iter_events(), db.watch_events(0)):
            given = []
            with pytest.raises(CorruptDataError):
                async for found in events:
                    given.append(found.agent_id)  # noqa: PERF401 (a comprehension would lose what came before)
            assert given[:200] == [str(number) for number in range(1, 201)]
            assert "250" not in given
            with pytest.raises(StopAsyncIteration):
                await anext(events)

    run(scenario, f"sqlite:///{path}")


async def take(events: AsyncIterator[AgentEvent], count: int) -> list[str]:
    return [(await anext(events)).agent_id for _ in range(count)]


def test_a_watcher_sees_events_as_they_come_and_another_goes_on_where_it_was(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        watching = db.watch_events(0, poll=0.001)
        taking = asyncio.create_task(take(watching, 3))
        for name in "abc":
            await asyncio.sleep(0)
            await db.insert_event(event(name))
        assert await taking == ["a", "b", "c"]
        last = (await db.get_events(limit=1))[0]
        await db.insert_events([event("d"), event("e")])
        assert await take(watching, 1) == ["d"]
        assert await take(db.watch_events(last), 2) == ["d", "e"]

    run(scenario, url)


def test_a_watcher_that_waits_takes_no_worker_ends_at_once_and_loses_nothing(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        watching = db.watch_events(0, poll=3600)
        waiting = asyncio.create_task(take(watching, 1))
        await until(lambda: watching._begun is not None and watching._begun[1].pause > 0)  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="another task"):
            await anext(watching)
        assert await db.insert_event(event("a"))
        assert await cancelled(waiting)
        watching._begun = watching._begun[0], watching._begun[1]._replace(pause=0)  # type: ignore[attr-defined]
        assert await take(watching, 1) == ["a"]

    run(scenario, url, pool_size=1)


def test_events_are_not_watched_inside_a_transaction(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        await db.insert_events([event("a"), event("b")])
        watching = db.watch_events(0)
        assert await take(watching, 1) == ["a"]
        async with db.transaction():
            with pytest.raises(TransactionError):
                await anext(watching)
            with pytest.raises(TransactionError):
                await anext(db.watch_events(0))
            await db.register_agent("a", "t")
        assert await take(db.watch_events(0), 1) == ["a"]

    run(scenario, url)


# Tracking


def test_a_tracked_task_is_recorded_as_it_ended(url: str, clock: Clock) -> None:
    async def scenario(db: AsyncSwarmDB) -> dict[str, str]:
        async with db.track_task("returns", "a") as task:
            task.tokens_used = 7
        assert task.timestamp == clock()
        with pytest.raises(KeyError):
            async with db.track_task("raises", "a"):
                raise KeyError
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit, db.track_task("cut off", "a"):
                limit.reschedule(asyncio.get_running_loop().time())  # Entering it may take long.
                await asyncio.sleep(3600)
        with pytest.raises(TimeoutError):
            async with db.track_task("times out", "a"), asyncio.timeout(0.01):
                await asyncio.sleep(3600)
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(_tracked(db, "sibling"))
                await until(lambda: db._db is not None)
                group.create_task(_fail())
        assert await cancelled(await _begun(_tracked(db, "cancelled")))
        return {metric.task_id: str(metric.result) for metric in await db.get_task_metrics()}

    assert run(scenario, url, clock=clock) == {
        "returns": "success",
        "raises": "failure",
        "cut off": "cancelled",
        "times out": "timeout",
        "sibling": "cancelled",
        "cancelled": "cancelled",
    }


_inside: "weakref.WeakSet[asyncio.Task[Any]]" = weakref.WeakSet()


async def _tracked(db: AsyncSwarmDB, name: str) -> None:
    async with db.track_task(name, "a"):
        task = asyncio.current_task()
        assert task is not None
        _inside.add(task)
        await asyncio.sleep(3600)


async def _fail() -> None:
    await until(lambda: bool(_inside))
    raise KeyError


async def _begun(work: Any) -> "asyncio.Task[Any]":
    task = asyncio.create_task(work)
    await until(lambda: task in _inside)
    return task


def test_a_task_that_is_cancelled_again_while_it_is_recorded_is_recorded(shared_url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        with SwarmDB(url=shared_url) as other:
            task = await _begun(_tracked(db, "cancelled"))
            with other.transaction() as conn:
                if "postgresql" in shared_url:
                    conn.execute("LOCK task_metrics")
                for _ in range(10):
                    task.cancel()
                    await asyncio.sleep(0.005)
                assert not task.done()
            assert await cancelled(task)
        (metric,) = await db.get_task_metrics()
        assert metric.result is TaskResult.CANCELLED

    run(scenario, shared_url)


def test_a_task_in_an_iteration_that_is_left_early_is_recorded_as_cancelled(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async def steps() -> AsyncIterator[int]:
            async with db.track_task("given up", "a"):
                yield 1
                yield 2

        iteration = steps()
        assert await anext(iteration) == 1
        await iteration.aclose()  # type: ignore[attr-defined]
        (metric,) = await db.get_task_metrics()
        assert metric.result is TaskResult.CANCELLED

    run(scenario, url)


def test_a_task_that_ends_after_the_database_was_closed_says_so(url: str) -> None:
    async def main() -> None:
        db = AsyncSwarmDB(url=url)
        with pytest.raises(ClosedError):
            async with db.track_task("a", "a"):
                await db.close()
        db = AsyncSwarmDB(url=url)
        with pytest.raises(KeyError) as raised:
            async with db.track_task("a", "a"):
                await db.close()
                raise KeyError
        assert "could not be stored: ClosedError" in raised.value.__notes__[0]

    asyncio.run(main())


def test_an_iteration_in_a_tracked_block_that_is_left_after_the_database_was_closed_ends(url: str) -> None:
    async def main() -> None:
        async def steps() -> AsyncIterator[int]:
            async with db.track_task("given up", "a"):
                yield 1

        db = AsyncSwarmDB(url=url)
        iteration = steps()
        assert await anext(iteration) == 1
        await db.close()
        async with asyncio.timeout(20):
            await iteration.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_the_time_of_a_task_does_not_count_waiting_for_a_worker(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        stop = threading.Event()
        async with db.track_task("a", "a") as tracked:
            task, begun = at_work(db, lambda _: stop.wait())
            await until(begun.is_set)
            leaving = asyncio.get_running_loop().call_later(0.01, lambda: seen.append(tracked.duration_ms))
            seen: list[int | None] = []
            asyncio.get_running_loop().call_later(0.02, stop.set)
        assert leaving.cancelled() is False
        assert seen == [tracked.duration_ms]
        await task

    run(scenario, url, pool_size=1)


def test_a_tracked_agent_is_alive_for_as_long_as_its_block(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        async with db.track_agent("a", "t", {"x": 1}) as agent:
            assert (agent.agent_id, agent.agent_type, agent.duration_ms) == ("a", "t", None)
            assert await agent.heartbeat()
            agent.metadata["seen"] = 3
            await db.delete_agent("a")
            with pytest.raises(AgentNotFoundError):
                await agent.heartbeat()
        (ended,) = await db.get_events(event_type="complete")
        assert ended.metadata_ == {"seen": 3}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit, db.track_agent("b", "t"):
                limit.reschedule(asyncio.get_running_loop().time())  # Entering it may take long.
                await asyncio.sleep(3600)
        (failed,) = await db.get_events(event_type="error")
        assert failed.metadata_["outcome"] == "cancelled"
        found = await db.get_agent("b")
        assert found is not None
        assert found.status == "error"
        assert await db.find_stale_agents(timedelta(hours=1)) == []

    run(scenario, url)


def test_a_block_is_entered_once(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        for block in (db.track_task("t", "a"), db.track_agent("a", "t"), db.transaction(), db.session()):
            async with block:
                pass
            with pytest.raises(RuntimeError, match="once"):
                await block.__aenter__()

    run(scenario, url)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_eager_tasks_are_tasks_like_others(url: str) -> None:
    async def scenario(db: AsyncSwarmDB) -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
        async with db.session():
            await db.register_agent("a", "t")
            assert await db.get_agent("a") is not None
        await asyncio.gather(*(_register(db, str(number)) for number in range(10)))
        assert len(await db.list_agents()) == 11

    run(scenario, url)
