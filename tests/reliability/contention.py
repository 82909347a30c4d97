"""Threads and processes that do everything at once on one file, and what they were told against what is there."""

import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from moai_flow.memory import SwarmDB
from moai_flow.memory.engine import log_bytes

from .units import KINDS, LEFT, check_integrity, demand, event, totals, write

FORKS = multiprocessing.get_context("forkserver")

#: Long before any retention: what is removed while others write.
OLD = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass
class Tally:
    """What one worker, or all of them, did."""

    rows: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    increments: int = 0
    removed: int = 0
    #: The longest time that a call took, in seconds, by kind of call.
    worst: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Add what another did."""
        self.rows.update(other.rows)
        self.calls.update(other.calls)
        self.increments += other.increments
        self.removed += other.removed
        self.errors += other.errors
        for name, took in other.worst.items():
            self.worst[name] = max(took, self.worst.get(name, 0.0))

    def call(self, name: str, work: Callable[[], object]) -> None:
        """Do something, and note how long it took. No error is expected of any call."""
        begun = time.perf_counter()
        try:
            work()
        except Exception as error:  # noqa: BLE001 (every one is a breach, and is reported)
            self.errors.append(f"{name}: {error!r}")
        took = time.perf_counter() - begun
        self.calls[name] += 1
        self.worst[name] = max(took, self.worst.get(name, 0.0))


@dataclass(frozen=True)
class ContentionFigures:
    """What all of them did, and the longest waits."""

    seconds: float
    all: Tally
    largest_log: int

    def __str__(self) -> str:
        waits = ", ".join(f"{name} {took:.2f} s" for name, took in sorted(self.all.worst.items()))
        return (
            f"{sum(self.all.calls.values()):,} calls in {self.seconds:.0f} seconds, no error, "
            f"all rows as acknowledged; the longest call of each kind: {waits}; "
            f"the log had {self.largest_log / 2**20:.0f} MiB at most"
        )


def run(
    folder: Path, *, seconds: float = 60, threads: int = 32, processes: int = 16, seed: int = 0
) -> ContentionFigures:
    """Have all of them work at once, and compare what was acknowledged with what is there.

    Raises:
        BreachError: If a call failed, or the rows are not those that were acknowledged.
    """
    path = folder / "swarm.db"
    FORKS.set_forkserver_preload(["moai_flow.memory", __name__])
    SwarmDB(path).close()
    pipes = [FORKS.Pipe(duplex=False) for _ in range(processes)]
    workers = [
        FORKS.Process(target=_serve, args=(path, seconds, f"{seed}-p{number}", send), daemon=True)
        for number, (_, send) in enumerate(pipes)
    ]
    for worker in workers:
        worker.start()
    everything, largest_log = Tally(), 0
    with SwarmDB(path) as db, ThreadPoolExecutor(threads + 1) as pool:
        futures = [pool.submit(_work, db, seconds, f"{seed}-t{number}") for number in range(threads)]
        keeping = pool.submit(_keep, db, folder, seconds)
        while not all(future.done() for future in futures):
            largest_log = max(largest_log, log_bytes(db._location) or 0)
            time.sleep(0.01)
        for future in [*futures, keeping]:
            everything.add(future.result())
    for receive, _ in pipes:
        demand(receive.poll(seconds + 120), "every process ends")
        everything.add(receive.recv())
    for worker in workers:
        worker.join()
    demand(not everything.errors, "no call fails", *everything.errors[:5])
    _compare(path, everything)
    return ContentionFigures(seconds, everything, largest_log)


def _compare(path: Path, tally: Tally) -> None:
    check_integrity(path)
    with SwarmDB(path) as db:
        tally.removed += db.cleanup_old_events(9000)
        rows = totals(db)
        old = tally.rows.pop("old")
        demand(tally.removed == old, "what was removed is what was old", tally.removed, old)
        counted = db.get_memory("shared", "semantic", "count", as_type=int, default=0)
        demand(counted == tally.increments, "no update is lost", counted, tally.increments)
        tally.rows["session_memory"] += tally.increments
        demand(rows == tally.rows, "the rows are those that were acknowledged", rows, tally.rows)
        demand(db.check().ok, "every row can be read")


def _serve(path: Path, seconds: float, name: str, results: Any) -> None:
    with SwarmDB(path) as db:
        results.send(_work(db, seconds, name))


def _work(db: SwarmDB, seconds: float, name: str) -> Tally:
    """Read, write and hold transactions for so long."""
    chance, tally = random.Random(name), Tally()
    deadline, number = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        unit = f"{name}/{number}"
        match chance.random():
            case part if part < 0.45:
                kind = chance.choice(KINDS)
                tally.call("write", partial(write, db, kind, unit))
                tally.rows.update(LEFT[kind])
            case part if part < 0.55:
                tally.call("transaction", lambda: _count_up(db))
                tally.increments += 1
            case part if part < 0.6:
                tally.call("write", lambda: db.insert_events([{**event("old"), "timestamp": OLD}] * 10))
                tally.rows["old"] += 10
            case part if part < 0.95:
                tally.call("read", lambda: (db.get_events(limit=20), db.get_memory("shared", "semantic", "count")))
            case _:
                tally.call("snapshot", lambda: _read_twice(db))
        number += 1
    return tally


def _count_up(db: SwarmDB) -> None:
    with db.transaction():
        count = db.get_memory("shared", "semantic", "count", as_type=int, default=0)
        db.store_memory("shared", "semantic", "count", count + 1)


def _read_twice(db: SwarmDB) -> None:
    with db.session(readonly=True):
        seen = [db.get_memory("shared", "semantic", "count") for _ in range(2)]
        demand(seen[0] == seen[1], "a snapshot stands still", *seen)


def _keep(db: SwarmDB, folder: Path, seconds: float) -> Tally:
    """Look after the file meanwhile, by turns, with a short rest in between."""
    tally, deadline = Tally(), time.monotonic() + seconds
    copy = folder / "copy.db"

    def clean() -> None:
        tally.removed += db.cleanup_old_events(9000)

    def back_up() -> None:
        db.backup(copy, overwrite=True)
        check_integrity(copy)

    while time.monotonic() < deadline:
        tally.call("cleanup", clean)
        tally.call("backup", back_up)
        tally.call("vacuum", db.vacuum)
        time.sleep(seconds / 20)
    return tally


def open_at_once(folder: Path, *, processes: int = 32) -> float:
    """Have processes open a fresh file at the same moment, and return how long the slowest took, in seconds.

    Raises:
        BreachError: If one failed, or what it wrote is missing.
    """
    path = folder / "fresh.db"
    FORKS.set_forkserver_preload(["moai_flow.memory", __name__])
    gate = FORKS.Barrier(processes)
    pipes = [FORKS.Pipe(duplex=False) for _ in range(processes)]
    workers = [
        FORKS.Process(target=_open, args=(path, gate, f"p{number}", send), daemon=True)
        for number, (_, send) in enumerate(pipes)
    ]
    for worker in workers:
        worker.start()
    slowest = 0.0
    for receive, _ in pipes:
        demand(receive.poll(120), "every process ends")
        slowest = max(slowest, receive.recv())
    for worker in workers:
        worker.join()
        demand(worker.exitcode == 0, "every process opens the file", worker.exitcode)
    with SwarmDB(path) as db:
        names = {agent.agent_id for agent in db.list_agents()}
        demand(names == {f"p{number}" for number in range(processes)}, "what each wrote is there", *names)
        demand(db.check().ok, "the file is sound")
    return slowest


def _open(path: Path, gate: Any, name: str, results: Any) -> None:
    gate.wait(60)
    begun = time.perf_counter()
    with SwarmDB(path) as db:
        db.register_agent(name, "t")
        results.send(time.perf_counter() - begun)


@dataclass(frozen=True)
class ReaderFigures:
    """The size of the log, in bytes: beside a long reader, and once it has ended; and the worst write meanwhile."""

    grown: int
    after: int
    worst: float

    def __str__(self) -> str:
        return (
            f"the log grew to {self.grown / 2**20:.0f} MiB beside a reader, and two writes after its end had "
            f"{self.after / 2**20:.0f} MiB; the longest write took {self.worst * 1000:.0f} ms"
        )


def long_reader(folder: Path, *, writes: int = 2000) -> ReaderFigures:
    """Write beside a snapshot that stays open, and after it.

    Raises:
        BreachError: If the reader sees a write, a writer fails, or the log does not shrink.
    """
    has_begun, is_over, tally = threading.Event(), threading.Event(), Tally()
    with SwarmDB(folder / "reader.db", busy_timeout=0) as db:

        def read() -> None:
            with db.session(readonly=True):
                before = db.get_events(limit=1)
                has_begun.set()
                is_over.wait()
                demand(db.get_events(limit=1) == before, "a snapshot stands still")

        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read)
            has_begun.wait()
            try:
                for _ in range(writes):
                    tally.call("write", lambda: db.insert_events([event("a")] * 50))
                grown = log_bytes(db._location) or 0
            finally:
                is_over.set()
            reader.result()
        for _ in range(2):
            tally.call("write", lambda: db.insert_event(event("a")))
        after = log_bytes(db._location) or 0
    demand(not tally.errors, "a long reader stops no writer", *tally.errors[:5])
    demand(after < max(grown, 2**24 + 1) and after <= 2**24, "the log shrinks once the reader has ended", after)
    return ReaderFigures(grown, after, tally.worst["write"])
