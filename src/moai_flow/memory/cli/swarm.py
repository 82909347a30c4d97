"""A swarm at work: agents in several processes that read the files of a folder.

The store is all that they share. It hands out the files, it is told what was found, and it says how far they are, so
that a process may be killed at any moment without keeping the others waiting.
"""

import multiprocessing
import os
import random
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path, PurePath
from typing import TypeVar
from urllib.parse import quote_from_bytes, unquote_to_bytes

from sqlalchemy import func
from sqlalchemy.engine import URL
from sqlmodel import col, select

from moai_flow.memory import AgentStatus, BusyError, EventType, MemoryType, SwarmDB, TaskMetric
from moai_flow.memory.cli.failures import in_one_line

AGENT_TYPE = "file-reader"

#: How long agents wait for each other at the start, and for how long they are waited for at an early end, in seconds.
GRACE = 3.0

#: How often a transaction is tried that others keep coming between.
ATTEMPTS = 12

T = TypeVar("T")

_FILES, _HANDOUT = "files", "last handout"
_POLL = 0.1
_PIECE = 1 << 16


@dataclass(frozen=True)
class Plan:
    """What a swarm has to do.

    Attributes:
        run: The name of this run: the session of its memory, and the beginning of its agents' ids.
        url: Where the store is.
        folder: Where the files are.
        files: The files, relative to the folder.
        processes: How many processes to start.
        threads: How many agents each process runs, a thread each.
    """

    run: str
    url: URL
    folder: Path
    files: tuple[str, ...]
    processes: int
    threads: int

    @property
    def agents(self) -> list[str]:
        """The ids of all agents."""
        return [f"{self.run}-{number}" for number in range(1, self.processes * self.threads + 1)]

    def agents_of(self, process: int) -> list[str]:
        """Return the ids of the agents that a process runs."""
        return self.agents[process * self.threads : (process + 1) * self.threads]


@dataclass(frozen=True)
class Finding:
    """What an agent counted in one file. In a file that is not text, that is its bytes."""

    size_bytes: int
    lines: int = 0
    words: int = 0
    longest_line: int = 0
    is_text: bool = False


@dataclass(frozen=True)
class Handout:
    """Which file was handed out last, by its number, and to whom."""

    number: int
    agent_id: str


# Files


def files_of(folder: Path, *, database: Path | None) -> tuple[str, ...]:
    """Return the files of a folder and of the folders in it, relative to it.

    Folders whose name begins with a dot are skipped, as are links to folders, and the database's own files: closing
    any handle of such a file would release the locks that SQLite holds on it. What can't be looked at is returned as
    well, so that an agent meets the error.
    """
    suffixes = () if database is None else ("", "-wal", "-shm")
    own = [file.stat() for suffix in suffixes if (file := Path(f"{database}{suffix}")).exists()]
    found: list[Path] = []

    def is_to_be_read(path: Path) -> bool:
        try:
            status = path.stat()
        except OSError:
            return True
        return stat.S_ISREG(status.st_mode) and not any(os.path.samestat(status, other) for other in own)

    for parent, folders, names in os.walk(folder, onerror=lambda error: found.append(Path(error.filename))):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.extend(path for path in (Path(parent, name) for name in names) if is_to_be_read(path))
    return tuple(sorted(str(path.relative_to(folder)) for path in found))


def printable(file: str) -> str:
    """Return a file's name as text that can be stored, whatever bytes it has."""
    return os.fsencode(PurePath(file).as_posix()).decode(errors="backslashreplace")


def examine(path: Path) -> Finding:
    """Read a file, in constant memory, and count what is in it.

    Raises:
        OSError: If it can't be read.
    """
    lines = words = length = longest = 0
    previous = "\n"
    with path.open(encoding="utf-8") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        try:
            while piece := file.readline(_PIECE):
                if "\0" in piece:
                    return Finding(size_bytes)
                if previous[-1] == "\n":
                    lines += 1
                    length = 0
                words += len(piece.split())
                if not previous[-1].isspace() and not piece[0].isspace():
                    words -= 1  # The end of the piece before had cut this word in two.
                length += len(piece.rstrip("\n"))
                longest = max(longest, length)
                previous = piece
        except UnicodeDecodeError:
            return Finding(size_bytes)
    return Finding(size_bytes, lines, words, longest, is_text=True)


# What an agent does


def run_process(plan: Plan, process: int) -> None:
    """Be one of the swarm's processes: run its agents until no file is left."""
    # Where a process inherits what its parent ignores, this is so already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with in_one_line(), SwarmDB(url=plan.url) as db, ThreadPoolExecutor(plan.threads) as pool:
        plan = replace(plan, files=_stored_files(db, plan))
        list(pool.map(partial(run_agent, db, plan), plan.agents_of(process)))


def run_agent(db: SwarmDB, plan: Plan, agent_id: str) -> None:
    """Be one agent: take files until none is left."""
    started = time.perf_counter()
    db.update_agent_status(agent_id, "running")
    _await_others(db, plan)
    read = unreadable = 0
    while (file := take(db, plan, agent_id)) is not None:
        if read_file(db, plan, agent_id, file):
            read += 1
        else:
            unreadable += 1

    def complete() -> None:
        db.update_agent_status(agent_id, "complete", duration_ms=_milliseconds_since(started))
        _tell(db, agent_id, EventType.COMPLETE, read=read, unreadable=unreadable)

    in_transaction(db, complete)


def in_transaction(db: SwarmDB, work: Callable[[], T]) -> T:
    """Do *work* in one transaction, and again where that of another agent came between.

    On SQLite they wait for each other. PostgreSQL lets them run side by side, and refuses one that could not have run
    alone.
    """
    for attempt in range(ATTEMPTS):
        try:
            with db.transaction():
                return work()
        except BusyError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 (it only keeps agents out of step)
    raise AssertionError


def _await_others(db: SwarmDB, plan: Plan) -> None:
    """Wait until all agents run, so that each gets a share, but not long for one that never comes."""
    ours = set(plan.agents)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(
        agent.agent_id in ours for agent in db.list_agents(AgentStatus.SPAWNED, AGENT_TYPE)
    ):
        time.sleep(0.01)


def take(db: SwarmDB, plan: Plan, agent_id: str) -> str | None:
    """Return a file that nobody else gets, or None if all are handed out."""

    def next_file() -> str | None:
        # What is read here stays true until the commit, so no other agent gets the same number.
        last = db.get_memory(plan.run, MemoryType.CONTEXT_HINT, _HANDOUT, as_type=Handout)
        number = 0 if last is None else last.number + 1
        if number >= len(plan.files):
            return None
        db.store_memory(plan.run, MemoryType.CONTEXT_HINT, _HANDOUT, Handout(number, agent_id))
        return plan.files[number]

    return in_transaction(db, next_file)


def read_file(db: SwarmDB, plan: Plan, agent_id: str, file: str) -> bool:
    """Read a file and store what was found, or that it can't be read; return which it was."""
    task_id = printable(file)
    started = time.perf_counter()
    try:
        finding = examine(plan.folder / file)
    except OSError as error:
        reason = error.strerror
        failed_ms = _milliseconds_since(started)

        def fail() -> None:
            _tell(db, agent_id, EventType.ERROR, file=task_id, reason=reason)
            db.store_task_metric(task_id, agent_id, failed_ms, "failure")

        in_transaction(db, fail)
        return False
    duration_ms = _milliseconds_since(started)

    def succeed() -> None:
        db.store_memory(plan.run, MemoryType.SEMANTIC, task_id, finding)
        db.store_task_metric(task_id, agent_id, duration_ms, "success")

    in_transaction(db, succeed)
    return True


def _tell(db: SwarmDB, agent_id: str, event_type: EventType, **metadata: object) -> None:
    db.insert_event(
        {"event_type": event_type, "agent_id": agent_id, "agent_type": AGENT_TYPE, "metadata": dict(metadata)}
    )


def _milliseconds_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)


# What the first process does


@contextmanager
def at_work(db: SwarmDB, plan: Plan) -> Iterator[Iterator[int]]:
    """Start a swarm, and leave nobody behind: when the block ends, every process and every agent has ended.

    An exception inside the block, such as an interrupt, ends the swarm early: its agents finish the file at hand, and
    those that take longer than `GRACE` are stopped.

    Yields:
        An iterator over how many files are done, which ends when the swarm has.
    """
    with db.transaction():
        for number, agent_id in enumerate(plan.agents):
            place = {"process": number // plan.threads + 1, "thread": number % plan.threads + 1}
            db.register_agent(agent_id, AGENT_TYPE, metadata=place)
            _tell(db, agent_id, EventType.SPAWN, **place)
        _store_files(db, plan)
    # Spawned, not forked: the same on every system. What a process is told fits into a pipe's buffer, so that starting
    # one never waits for it.
    spawn = multiprocessing.get_context("spawn")
    brief = replace(plan, files=())
    processes = [
        spawn.Process(target=run_process, args=(brief, number), daemon=True) for number in range(plan.processes)
    ]
    try:
        _start(processes)
        yield _progress(db, plan, processes)
    except BaseException:
        _hand_out_no_more(db, plan)
        raise
    finally:
        started = [process for process in processes if process.pid is not None]
        try:
            deadline = time.monotonic() + GRACE
            for process in started:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in started:
                process.terminate()
                process.join()
            _settle(db, plan, processes)


def count_done(db: SwarmDB, plan: Plan) -> int:
    """Return how many files have a result."""
    with db.session(readonly=True) as session:
        return session.exec(
            select(func.count()).select_from(TaskMetric).where(col(TaskMetric.agent_id).in_(plan.agents))
        ).one()


def _store_files(db: SwarmDB, plan: Plan) -> None:
    # A name may be no Unicode, which can't be stored.
    names = [quote_from_bytes(os.fsencode(file)) for file in plan.files]
    db.store_memory(plan.run, MemoryType.CONTEXT_HINT, _FILES, names)


def _stored_files(db: SwarmDB, plan: Plan) -> tuple[str, ...]:
    names = db.get_memory(plan.run, MemoryType.CONTEXT_HINT, _FILES, as_type=list[str], default=())
    return tuple(os.fsdecode(unquote_to_bytes(name)) for name in names)


def _start(processes: Sequence[SpawnProcess]) -> None:
    with interrupts_held_back():
        for process in processes:
            process.start()


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Let ctrl-C wait until the block ends; processes that are started inside never get it: it is for this one."""
    if sys.platform == "win32":
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # It is lost there, for want of a mask.
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
        return
    resource_tracker.ensure_running()  # Started inside, it would set the mask back.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _progress(db: SwarmDB, plan: Plan, processes: Sequence[SpawnProcess]) -> Iterator[int]:
    while running := [process.sentinel for process in processes if process.is_alive()]:
        yield count_done(db, plan)
        wait(running, timeout=_POLL)
    yield count_done(db, plan)


def _hand_out_no_more(db: SwarmDB, plan: Plan) -> None:
    db.store_memory(plan.run, MemoryType.CONTEXT_HINT, _HANDOUT, Handout(len(plan.files), "nobody"))


def _settle(db: SwarmDB, plan: Plan, processes: Sequence[SpawnProcess]) -> None:
    """Give an end to each agent that could not do it itself, and a result to the file that it had in hand."""
    ours = set(plan.agents)
    for agent in db.get_active_agents():
        if agent.agent_id not in ours:
            continue
        reason = f"its process ended with exit code {processes[agent.metadata_['process'] - 1].exitcode}"
        in_hand = _in_hand(db, plan, agent.agent_id)
        with db.transaction():
            db.update_agent_status(agent.agent_id, "error")
            _tell(db, agent.agent_id, EventType.ERROR, file=in_hand, reason=reason)
            if in_hand is not None:
                db.store_task_metric(in_hand, agent.agent_id, None, "cancelled")


def _in_hand(db: SwarmDB, plan: Plan, agent_id: str) -> str | None:
    """Return the file that an agent took last, unless it has a result."""
    for memory in db.memory_history(plan.run, MemoryType.CONTEXT_HINT, _HANDOUT):
        handout = Handout(**memory.value)
        if handout.agent_id == agent_id:
            file = printable(plan.files[handout.number])
            return None if db.get_task_metrics(file, agent_id) else file
    return None
