"""Threads, processes and forks on one database."""

import gc
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from sqlalchemy import QueuePool, create_engine
from sqlalchemy.event import listen

from moai_flow.memory import ClosedError, EventData, StorageError, SwarmDB, TransactionError, forks
from moai_flow.memory.connections import is_open_here
from moai_flow.memory.forks import _uses, using
from moai_flow.memory.restoring import restore_backup

SPAWN = multiprocessing.get_context("spawn")


def event(agent_id: str) -> EventData:
    return {"event_type": "spawn", "agent_id": agent_id, "agent_type": "t"}


def in_threads(count: int, work: Callable[[int], object]) -> None:
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work, number) for number in range(count)]:
            future.result()


def open_connections(path: Path) -> int:
    """Count the process's connections to a file. (Its descriptors tell less: SQLite keeps some for the next open.)"""
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, sqlite3.Connection)]
    return sum(is_open_to(path, connection) for connection in found)


def is_open_to(path: Path, connection: sqlite3.Connection) -> bool:
    try:
        return bool(connection.execute("PRAGMA database_list").fetchone()[2] == str(path))
    except sqlite3.ProgrammingError:
        return False


# Module level: a spawned process imports it from here.
def write_for(path: Path, seconds: float, name: str, threads: int) -> dict[str, list[str]]:
    """Write from several threads for a while, and return what was acknowledged."""
    acknowledged: dict[str, list[str]] = {f"{name}-{number}": [] for number in range(threads)}
    deadline = time.monotonic() + seconds
    with SwarmDB(path) as db:

        def work(number: int) -> None:
            agent_id, mine = list(acknowledged.items())[number]
            db.register_agent(agent_id, "writer", "running")
            while time.monotonic() < deadline:
                mine.append(db.insert_event(event(agent_id)))
                mine.extend(db.insert_events([event(agent_id)] * 5))
                db.store_memory(agent_id, "episodic", "count", len(mine))
                db.store_task_metric(mine[-1], agent_id, len(mine), "success")
                with db.transaction():
                    agent = db.get_agent(agent_id)
                    assert agent is not None
                    db.register_agent(agent_id, "writer", metadata={"rounds": agent.metadata_.get("rounds", 0) + 1})
                    mine.append(db.insert_event(event(agent_id)))
                assert db.get_events(agent_id, limit=1)[0].event_id == mine[-1]

        in_threads(threads, work)
    return acknowledged


def write_and_send(path: Path, seconds: float, name: str, results: Connection) -> None:
    results.send(write_for(path, seconds, name, 1))


def test_8_threads_and_8_processes_write_for_20_seconds_and_nothing_is_lost(path: Path) -> None:
    pipes = [SPAWN.Pipe(duplex=False) for _ in range(8)]
    processes = [
        SPAWN.Process(target=write_and_send, args=(path, 20, f"p{number}", send))
        for number, (_, send) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    acknowledged = write_for(path, 20, "main", 8)
    for receive, _ in pipes:
        acknowledged |= receive.recv()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0] * 8
    with SwarmDB(path) as db:
        stored: dict[str, list[str]] = {}
        for found in db.iter_events():
            stored.setdefault(found.agent_id, []).append(found.event_id)
        assert {agent_id: sorted(mine) for agent_id, mine in acknowledged.items()} == {
            agent_id: sorted(found) for agent_id, found in stored.items()
        }
        assert len(stored) == len(db.list_agents()) == 16
        for agent in db.list_agents():
            written = len(acknowledged[agent.agent_id])
            assert agent.metadata_["rounds"] * 7 == written > 0
            assert db.get_memory(agent.agent_id, "episodic", "count") == written - 1
            assert len(db.get_task_metrics(agent_id=agent.agent_id, limit=written)) * 7 == written
        assert db.check().ok


def open_and_write(path: Path, number: int) -> None:
    with SwarmDB(path) as db:
        db.insert_event(event(str(number)))


@pytest.mark.parametrize(("kind", "before"), [("path", 0), ("legacy", 4)])
def test_many_processes_open_a_fresh_or_an_old_file_at_once(
    kind: str, before: int, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    processes = [SPAWN.Process(target=open_and_write, args=(path, number)) for number in range(12)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0] * 12
    with SwarmDB(path) as db:
        assert len(list(db.iter_events())) == before + 12
        assert db.check().ok
    assert len(list(path.parent.glob("*.bak*"))) == (before > 0)
    assert list(path.parent.glob("*.tmp")) == []


def test_many_threads_open_a_fresh_file_at_once(path: Path) -> None:
    in_threads(16, lambda number: open_and_write(path, number))

    with SwarmDB(path) as db:
        assert len(db.get_events()) == 16


def test_dead_threads_leave_no_connection(path: Path) -> None:
    with SwarmDB(path) as db:
        before = open_connections(path)
        for number in range(50):
            thread = threading.Thread(
                target=lambda number=number: (db.insert_event(event(str(number))), db._get_connection())
            )
            thread.start()
            thread.join()
        gc.collect()

        assert open_connections(path) <= before + 1
        assert len(db.get_events()) == 50


def test_connections_are_bounded_after_a_rush(path: Path) -> None:
    with SwarmDB(path) as db:
        barrier = threading.Barrier(30)

        def hold(number: int) -> None:
            with db.session(readonly=True):
                barrier.wait()

        in_threads(30, hold)
        assert open_connections(path) <= 16
    assert open_connections(path) == 0


def test_what_a_dead_thread_did_not_commit_is_gone(path: Path) -> None:
    def leave_open() -> None:
        db._get_connection().execute(
            "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time) VALUES ('dead', 't', 'error', 1)"
        )

    with SwarmDB(path, busy_timeout=0) as db:
        for _ in range(20):  # Thread ids are used again.
            thread = threading.Thread(target=leave_open)
            thread.start()
            thread.join()
            gc.collect()
            db.register_agent("alive", "t")
            conn = db._get_connection()
            conn.execute("UPDATE agent_registry SET agent_type = 'touched'")
            conn.commit()

        assert [agent.agent_id for agent in db.list_agents()] == ["alive"]


def test_close_while_threads_work_ends_them_cleanly(path: Path) -> None:
    for _ in range(10):
        db = SwarmDB(path)
        acknowledged: list[str] = []
        started = threading.Barrier(9)

        def work(number: int, db: SwarmDB = db, started: threading.Barrier = started) -> None:
            started.wait()
            try:
                while True:
                    acknowledged.append(db.insert_event(event(str(number))))  # noqa: B023
                    db.get_events(limit=3)
                    with db.transaction():
                        db.register_agent(str(number), "t")
                        db.update_agent_status(str(number), "running")
            except ClosedError:
                pass

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        started.wait()
        time.sleep(0.02)
        db.close()
        for thread in threads:
            thread.join()

        assert open_connections(path) == 0
        with SwarmDB(path) as again:
            assert {found.event_id for found in again.iter_events()} >= set(acknowledged)
            assert again.check().ok


def test_close_twice_is_once(db: SwarmDB) -> None:
    db.close()
    db.close()

    with pytest.raises(ClosedError, match="closed before this call"):
        db.get_events()
    assert repr(db).endswith(", closed)")


def test_a_forgotten_store_closes_itself(path: Path) -> None:
    db = SwarmDB(path)
    db.insert_event(event("a"))
    assert open_connections(path) > 0
    del db
    gc.collect()

    assert open_connections(path) == 0


def test_in_memory_all_threads_see_one_database() -> None:
    with SwarmDB(":memory:") as db, SwarmDB(":memory:") as another:
        in_threads(8, lambda number: [db.insert_event(event(f"{number}-{turn}")) for turn in range(20)])

        assert len(db.get_events(limit=1000)) == 160
        assert another.get_events() == []


def test_in_memory_nothing_is_open_after_closing() -> None:
    db = SwarmDB(":memory:")
    db.register_agent("a", "t")
    db.close()
    assert not any(held.is_open for held in list(db._connections._open))


def test_in_memory_the_database_outlives_its_failed_connections() -> None:
    with SwarmDB(":memory:") as db:
        db.register_agent("a", "t")
        for _ in range(3):
            with pytest.raises(TransactionError), db.transaction() as conn:
                conn.close()  # type: ignore[attr-defined]
        assert db.get_agent("a") is not None


def forked(child: Callable[[], object]) -> int:
    """Run *child* in a forked process and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(child), 0)[1])


def fork(child: Callable[[], object]) -> int:
    """Begin to run *child* in a forked process, and return that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # From 3.12 on, forking beside threads warns.
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    return pid


def test_a_forked_child_goes_on_with_connections_of_its_own(path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_event(event("parent"))

        def child() -> None:
            in_threads(4, lambda number: db.insert_event(event(f"child-{number}")))
            db._get_connection().execute("SELECT 1")
            assert len(db.get_events()) == 5
            db.close()

        assert forked(child) == 0
        db.insert_event(event("parent"))
        assert len(db.get_events()) == 6
        assert db.check().ok


def test_a_forked_child_keeps_its_writes_though_the_parent_closes_the_file(path: Path) -> None:
    """SQLite keeps its locks by file in the memory of a process: what a child inherits of them would be no lock."""
    db = SwarmDB(path)
    db.register_agent("parent", "t")
    parents, childs = os.pipe()
    go_on, closed = os.pipe()

    def child() -> None:
        db.register_agent("1", "t")
        os.write(childs, b"1")
        os.read(go_on, 1)
        db.register_agent("2", "t")

    pid = fork(child)
    assert os.read(parents, 1) == b"1"
    db.register_agent("beside", "t")
    db.close()
    with SwarmDB(path) as other:
        other.register_agent("other", "t")
    os.write(closed, b"1")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for descriptor in (parents, childs, go_on, closed):
        os.close(descriptor)

    with SwarmDB(path) as db:
        assert {agent.agent_id for agent in db.list_agents()} == {"parent", "1", "2", "beside", "other"}
        assert db.check().ok


def test_forks_beside_writing_threads_harm_neither_side(path: Path) -> None:
    forks, wanted = 12, threading.Event()
    with SwarmDB(path) as db:

        def write(number: int) -> int:
            written = 0
            while not wanted.is_set():
                db.insert_event(event(f"thread-{number}"))
                written += 1
            return written

        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(write, number) for number in range(4)]
            try:
                for number in range(forks):

                    def child(number: int = number) -> None:
                        for _ in range(5):
                            db.insert_event(event(f"child-{number}"))

                    assert forked(child) == 0
            finally:
                wanted.set()
            written = sum(writer.result() for writer in writers)

        assert len(db.get_events(limit=10**9)) == written + 5 * forks
        assert db.check().ok


def hold_block(db: SwarmDB) -> Callable[[], object]:
    block = db.transaction()
    block.__enter__()
    return lambda: block.__exit__(None, None, None)


def hold_session(db: SwarmDB) -> Callable[[], object]:
    block = db.session(readonly=True)
    block.__enter__()
    return lambda: block.__exit__(None, None, None)


def hold_connection(db: SwarmDB) -> Callable[[], object]:
    connection = db._get_connection()
    return connection.rollback


def hold_block_of_another_thread(db: SwarmDB) -> Callable[[], object]:
    has_begun, is_to_end = threading.Event(), threading.Event()

    def hold() -> None:
        with db.transaction():
            has_begun.set()
            is_to_end.wait(30)

    def end() -> None:
        is_to_end.set()
        thread.join()

    thread = threading.Thread(target=hold)
    thread.start()
    has_begun.wait()
    return end


def hold_opening_of_another_thread(db: SwarmDB) -> Callable[[], object]:
    has_begun, is_to_end = threading.Event(), threading.Event()
    db._connections.let_go()  # So that the thread opens one.

    def hold(*_: object) -> None:
        has_begun.set()
        is_to_end.wait(30)

    def end() -> None:
        is_to_end.set()
        thread.join()

    listen(db._connections._engine, "connect", hold)
    thread = threading.Thread(target=db.list_agents)
    thread.start()
    has_begun.wait()
    return end


@pytest.mark.parametrize(
    "hold",
    [hold_block, hold_session, hold_connection, hold_block_of_another_thread, hold_opening_of_another_thread],
)
def test_a_child_whose_parent_had_the_file_in_use_is_refused(
    path: Path, hold: Callable[[SwarmDB], Callable[[], object]]
) -> None:
    with SwarmDB(path) as db, SwarmDB(path.with_name("free.db")) as free:
        db.register_agent("a", "t")
        end = hold(db)

        def child() -> None:
            for _ in range(2):
                with pytest.raises(StorageError, match="was forked while its parent had the file in use"):
                    db.register_agent("b", "t")
            with pytest.raises(StorageError, match="was forked"):
                SwarmDB(path)
            free.register_agent("b", "t")
            SwarmDB(path.with_name("new.db")).close()

        assert forked(child) == 0
        end()
        db.register_agent("c", "t")
        assert {agent.agent_id for agent in db.list_agents()} == {"a", "c"}
        assert free.get_agent("b") is not None


def test_a_child_that_goes_on_in_the_call_in_which_it_was_forked_is_refused(path: Path) -> None:
    """As if a signal came in the middle of a call, and its handler forked: the child has the parent's connection."""
    program = """
import logging, os, sys
from moai_flow.memory import StorageError, SwarmDB

children = []

def fork(record):
    if not children:
        children.append(os.fork())
    return False

def refused(call):
    try:
        call()
    except StorageError as error:
        return "was forked while its parent had the file in use" in str(error)
    return False

log = logging.getLogger("moai_flow.memory")
log.addFilter(fork)
db = SwarmDB(sys.argv[1])
db.register_agent("a", "t")
log.setLevel(logging.DEBUG)
try:
    found, error = db.get_agent("a"), None
except StorageError as raised:
    error = str(raised)
log.setLevel(logging.WARNING)
if not children[0]:
    is_refused = error is not None and "was forked" in error and refused(lambda: db.register_agent("b", "t"))
    os._exit(0 if is_refused and not db._connections._idle else 1)
assert found is not None
assert os.waitpid(children[0], 0)[1] == 0
db.register_agent("c", "t")
assert db.check().ok
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, str(path)]
    subprocess.run(command, check=True, timeout=50)


@pytest.mark.parametrize("in_a_block", [False, True])
def test_a_callers_pool_is_closed_once_at_a_fork_and_only_if_nobody_uses_it(path: Path, *, in_a_block: bool) -> None:
    engine = create_engine(f"sqlite:///{path}", poolclass=QueuePool, connect_args={"check_same_thread": False})
    disposed: list[object] = []
    listen(engine, "engine_disposed", disposed.append)
    with SwarmDB(engine=engine) as db:
        db.register_agent("a", "t")
        with db.transaction() if in_a_block else nullcontext():
            assert forked(lambda: None) == 0
        assert len(disposed) == (0 if in_a_block else 1)
        with engine.connect() as connection:  # By the caller's own hand.
            connection.exec_driver_sql("SELECT 1 FROM agent_registry").all()

            def child() -> None:
                with pytest.raises(StorageError, match="was forked"):
                    SwarmDB(path)

            assert forked(child) == 0
    engine.dispose()


def test_a_fork_whose_wait_was_interrupted_leaves_no_pool_to_the_child(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupt_fork() -> None:
        while not forks.under_way:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # Which is where Python puts it.
    usual = signal.signal(signal.SIGUSR1, interrupt)
    engine = create_engine(f"sqlite:///{path}", poolclass=QueuePool, connect_args={"check_same_thread": False})
    with SwarmDB(engine=engine) as db, SwarmDB(path.with_name("other.db")) as other:
        db.register_agent("a", "t")
        end = hold_block_of_another_thread(other)
        monkeypatch.setattr(forks, "_CALLS_WAITED_FOR", 60)
        interrupter = threading.Thread(target=interrupt_fork)
        interrupter.start()
        try:
            fork_refused(path)
        finally:
            interrupter.join()
            signal.signal(signal.SIGUSR1, usual)
            end()
        db.register_agent("b", "t")
    engine.dispose()


def test_a_fork_in_the_middle_of_a_restore_leaves_no_child_that_waits_for_ever(path: Path, tmp_path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
        db.backup(tmp_path / "backup.db")
    target, is_over = tmp_path / "target.db", threading.Event()

    def restore() -> None:
        while not is_over.is_set():
            restore_backup(tmp_path / "backup.db", target, overwrite=True, keep=False)

    def child() -> None:
        with SwarmDB(target, busy_timeout=5) as db:
            db.register_agent("b", "t")

    with ThreadPoolExecutor(1) as pool:
        restoring = pool.submit(restore)
        try:
            for _ in range(12):
                assert forked(lambda: None) == 0
        finally:
            is_over.set()
            restoring.result()
    with using(target):  # What a restore that takes long does, in another thread.
        in_threads(1, lambda _: fork_refused(target))
    assert forked(child) == 0


@pytest.mark.parametrize("name", ["backup.db", "swarm.db"])
def test_a_file_that_a_restore_has_in_use_at_a_fork_is_not_the_childs(name: str, path: Path, tmp_path: Path) -> None:
    held = tmp_path / name
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
        db.backup(tmp_path / "backup.db")
    with closing(sqlite3.connect(held, isolation_level=None)) as raw, ThreadPoolExecutor(1) as pool:
        raw.execute("PRAGMA journal_mode = DELETE").fetchall()
        raw.execute("BEGIN EXCLUSIVE")
        restoring = pool.submit(restore_backup, tmp_path / "backup.db", path, overwrite=True, busy_timeout=60)
        try:
            while held not in {file for _, file, _ in tuple(_uses)}:
                assert not restoring.done()
            fork_refused(held)
        finally:
            raw.execute("ROLLBACK")
            raw.close()
            assert restoring.result().path == path


def fork_refused(path: Path) -> None:
    def child() -> None:
        with pytest.raises(StorageError, match="was forked"):
            SwarmDB(path)

    assert forked(child) == 0


def test_a_fork_beside_threads_that_use_a_store_in_memory_leaves_the_child_its_copy() -> None:
    is_over = threading.Event()
    with SwarmDB(":memory:") as db:
        db.register_agent("a", "t")

        def read(_: int) -> None:
            while not is_over.is_set():
                assert db.get_agent("a") is not None

        def child() -> None:
            assert db.get_agent("a") is not None
            db.register_agent("b", "t")

        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(read, number) for number in range(3)]
            try:
                for _ in range(12):
                    assert forked(child) == 0
            finally:
                is_over.set()
            for reader in readers:
                reader.result()


def test_a_forked_child_has_no_file_open_until_it_opens_one(path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
        assert is_open_here(path)

        def child() -> None:
            assert not is_open_here(path)
            db.register_agent("b", "t")
            assert is_open_here(path)

        assert forked(child) == 0


def test_a_forked_child_has_a_copy_of_what_is_in_memory() -> None:
    with SwarmDB(":memory:") as db:
        db.register_agent("a", "t")

        def child() -> None:
            assert db.get_agent("a") is not None
            db.register_agent("b", "t")
            assert len(db.list_agents()) == 2

        assert forked(child) == 0
        assert len(db.list_agents()) == 1


def test_a_fork_in_the_middle_of_a_transaction_leaves_it_to_the_parent(path: Path) -> None:
    with SwarmDB(path, busy_timeout=0.1) as db:
        with db.session() as session, db.transaction():
            db.register_agent("parent", "t")

            def child() -> None:
                with pytest.raises(StorageError, match="was forked"):
                    db.list_agents()
                gc.collect()

            assert forked(child) == 0
            db.register_agent("parent-2", "t")
            assert session.connection() is not None

        assert {agent.agent_id for agent in db.list_agents()} == {"parent", "parent-2"}
        assert db.check().ok


def test_a_child_that_leaves_an_inherited_block_is_told_so_and_undoes_nothing(path: Path) -> None:
    with SwarmDB(path) as db:
        blocks = [db.session(), db.transaction(), db.session()]
        for block in blocks:
            block.__enter__()
        db.register_agent("a", "t")

        def child() -> None:
            for block in reversed(blocks):
                with pytest.raises(TransactionError, match="before a fork"):
                    block.__exit__(None, None, None)

        assert forked(child) == 0
        db.register_agent("b", "t")
        for block in reversed(blocks):
            block.__exit__(None, None, None)

        assert {agent.agent_id for agent in db.list_agents()} == {"a", "b"}


def test_a_child_that_ends_like_a_program_does_not_disturb_the_parents_transaction(path: Path) -> None:
    """The interpreter's end deallocates what the child inherited; closing it there would undo the parent's write."""
    program = """
import os, sys
from moai_flow.memory import SwarmDB
db = SwarmDB(sys.argv[1])
with db.transaction():
    for number in range(200):  # More than the page cache holds, so that part of it is in the log already.
        db.insert_event({"event_type": "spawn", "agent_id": str(number), "agent_type": "t" * 100_000})
    if os.fork() == 0:
        raise SystemExit(0)
    os.wait()
    db.insert_event({"event_type": "spawn", "agent_id": "last", "agent_type": "t"})
assert len(db.get_events(limit=1000)) == 201
assert db.check().ok
"""
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, str(path)], check=True)

    with SwarmDB(path) as db:
        assert len(db.get_events(limit=1000)) == 201


def test_the_end_of_a_program_closes_what_it_left_open(path: Path) -> None:
    program = "import sys; from moai_flow.memory import SwarmDB; db = SwarmDB(sys.argv[1]); db.register_agent('a', 't')"
    command = [sys.executable, "-W", "always", "-c", program, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)

    assert ran.stderr == ""  # From 3.13 on, a connection that is left open warns.
    assert not path.with_name("swarm.db-wal").exists()  # The last to close moves the log into the file.


def test_ids_of_forked_children_differ(path: Path) -> None:
    with SwarmDB(path) as db:
        for _ in range(4):
            assert forked(lambda: db.insert_events(event("a") for _ in range(1000))) == 0

        assert len({found.event_id for found in db.iter_events()}) == 4000


def test_a_killed_writer_leaves_all_or_nothing(path: Path) -> None:
    program = """
import json, sys
from moai_flow.memory import SwarmDB
db = SwarmDB(sys.argv[1])
number = 0
while True:
    with db.transaction():
        for _ in range(10):
            db.insert_event({"event_type": "spawn", "agent_id": str(number), "agent_type": "t"})
    print(number, flush=True)
    number += 1
"""
    SwarmDB(path).close()
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
            writer.kill()
            acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
        with SwarmDB(path) as db:
            counts: dict[str, int] = {}
            for found in db.iter_events():
                counts[found.agent_id] = counts.get(found.agent_id, 0) + 1
            assert set(counts.values()) == {10}
            assert {str(number) for number in acknowledged} <= counts.keys()
            assert db.check().ok
            assert db.cleanup_old_events(0) == sum(counts.values())


def test_a_reader_keeps_no_writer_waiting(path: Path) -> None:
    with SwarmDB(path, busy_timeout=0) as db:
        db.insert_events(event("a") for _ in range(10))
        with db.session(readonly=True):
            events = db.iter_events(batch_size=2)
            next(events)
            other = threading.Thread(target=lambda: db.insert_event(event("b")))
            other.start()
            other.join()
            assert len(db.get_events()) == 10

        assert len(db.get_events()) == 11


def test_a_file_of_another_kind_opened_by_many_is_refused_by_each(path: Path) -> None:
    path.write_text("this is not a database, but a text that is long enough to look at")
    refused = []

    def work(number: int) -> None:
        with pytest.raises(StorageError):
            SwarmDB(path)
        refused.append(number)

    in_threads(4, work)
    assert len(refused) == 4
    assert json.dumps(path.read_text()).startswith('"this is not')
    assert sqlite3.threadsafety >= 1
