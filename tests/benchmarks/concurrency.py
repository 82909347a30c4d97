"""Many writers on one file: threads of one process, and processes."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from moai_flow.memory import SwarmDB

from .measuring import Measurement, Timed, compare, timed
from .operations import EVENTS, with_many_old_events
from .raw import RawSwarm

Side = Literal["ours", "raw"]


def opened(side: Side, path: Path, durability: Any) -> Any:
    """Open one side's store, to be closed by its caller."""
    return SwarmDB(path, durability=durability) if side == "ours" else RawSwarm(path, durability=durability)


def insert_some(store: Any, count: int) -> None:
    """Insert events, a transaction each."""
    for number in range(count):
        store.insert_event(EVENTS[number % len(EVENTS)])


def measure_threads(
    ours: Path, raw: Path, *, threads: int, each: int, durability: str, rounds: int, rows: int, at_most: float
) -> Measurement:
    """Compare one `SwarmDB` that threads share with a raw connection for each thread."""
    with closing(opened("ours", ours, durability)) as shared:
        own = [opened("raw", raw, durability) for _ in range(threads)]
        try:
            return compare(
                f"insert_event, {threads} threads",
                lambda: _in_threads([shared] * threads, each),
                lambda: _in_threads(own, each),
                rounds=rounds,
                calls=threads * each,
                rows=rows,
                durability=durability,
                at_most=at_most,
            )
        finally:
            for store in own:
                store.close()


def measure_processes(
    ours: Path, raw: Path, *, processes: int, each: int, durability: str, rounds: int, rows: int, at_most: float
) -> Measurement:
    """Compare processes, each with a store of its own."""
    with (
        _processes("ours", ours, processes, each, durability) as mine,
        _processes("raw", raw, processes, each, durability) as others,
    ):
        return compare(
            f"insert_event, {processes} processes",
            mine,
            others,
            rounds=rounds,
            calls=processes * each,
            rows=rows,
            durability=durability,
            at_most=at_most,
        )


def measure_waits(ours: Path, raw: Path, *, rounds: int, rows: int) -> Measurement:
    """Compare how long a writer waits at most while a hundred thousand rows are removed."""
    with (
        closing(opened("ours", ours, "normal")) as mine,
        closing(opened("raw", raw, "normal")) as other,
        closing(opened("raw", raw, "normal")) as beside,
    ):
        return compare(
            "insert_event, longest wait during cleanup_old_events, 100,000",
            lambda: _longest_wait(mine, mine),
            lambda: _longest_wait(other, beside),
            rounds=max(3, rounds // 3),
            calls=1,
            rows=rows,
            durability="normal",
        )


def _longest_wait(store: Any, writer: Any) -> float:
    """Return the longest time that an insert took while *store* was cleaned up, in seconds."""
    with_many_old_events(store, range(1), 0)
    is_over, has_begun = threading.Event(), threading.Event()
    waits: list[float] = []

    def write() -> None:
        while not is_over.is_set():
            waits.append(timed(lambda: insert_some(writer, 1)))
            has_begun.set()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        has_begun.wait()
        removed = store.cleanup_old_events(days=9000)
    finally:
        is_over.set()
        thread.join()
    if removed != 100_000:
        raise RuntimeError(f"{removed} rows were removed")
    return max(waits)


def _in_threads(stores: list[Any], each: int) -> float:
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(stores) + 1)

    def work(store: Any) -> None:
        try:
            barrier.wait()
            insert_some(store, each)
        except BaseException as error:
            failures.append(error)
            raise

    workers = [threading.Thread(target=work, args=(store,)) for store in stores]
    for worker in workers:
        worker.start()
    barrier.wait()
    begun = time.perf_counter()
    for worker in workers:
        worker.join()
    took = time.perf_counter() - begun
    if failures:
        raise failures[0]
    return took


@contextmanager
def _processes(side: Side, path: Path, processes: int, each: int, durability: str) -> Iterator[Timed]:
    """Give what runs a round in processes that stay, each with its store open."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(processes)]
    workers = [
        context.Process(target=_serve, args=(theirs, side, path, each, durability), daemon=True) for _, theirs in pipes
    ]
    for worker in workers:
        worker.start()
    ends = [end for end, _ in pipes]
    for end in ends:
        _expect(end, "open")

    def round_() -> float:
        begun = time.perf_counter()
        for end in ends:
            end.send("go")
        for end in ends:
            _expect(end, "done")
        return time.perf_counter() - begun

    try:
        yield round_
    finally:
        for end in ends:
            end.close()
        for worker in workers:
            worker.join()


def _expect(end: Any, word: str) -> None:
    if (answer := end.recv()) != word:
        raise RuntimeError(f"a writing process failed: {answer}")


def _serve(pipe: Any, side: Side, path: Path, each: int, durability: str) -> None:
    with closing(opened(side, path, durability)) as store, suppress(EOFError):
        pipe.send("open")
        while pipe.recv() == "go":
            pipe.send(_answer(lambda: insert_some(store, each)))


def _answer(work: Callable[[], None]) -> str:
    try:
        work()
    except Exception as error:  # noqa: BLE001 (it goes to the parent, which raises)
        return repr(error)
    return "done"
