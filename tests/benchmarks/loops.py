"""Many tasks on one event loop: how many calls get done, and how late the loop is for everything else."""

import asyncio
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from moai_flow.memory import AsyncSwarmDB, SwarmDB

from .measuring import Measurement, compare
from .operations import EVENTS

TASKS, WORKERS = 64, 8

#: How many calls a round makes: one in two writes.
CALLS = 6400

#: For how long the loop is watched in a round, after how long at work, in seconds.
SECONDS, WARMING_UP = 4.0, 0.5

#: A tick each 5 milliseconds, as another program's message would come. A timer of the loop's own would not do: it waits
#: for whole milliseconds.
_TICKER = """
import os, struct, time
while True:
    time.sleep(0.005)
    os.write(1, struct.pack("d", time.monotonic()))
"""


def measurements(folder: Path, only: str, *, rounds: int) -> Iterator[Measurement]:
    """Yield the throughput and the lateness, with asyncio's own loop, and with uvloop where it is installed."""
    for name, new_loop in _loops():
        yield from _measured(folder, only, name, new_loop, rounds=rounds)


def _measured(
    folder: Path, only: str, name: str, new_loop: Callable[[], asyncio.AbstractEventLoop], *, rounds: int
) -> Iterator[Measurement]:
    throughput = f"64 tasks of {name}, a call"
    if only in throughput:
        yield compare(
            throughput,
            lambda: _in_tasks(folder / "tasks.db", new_loop),
            lambda: _in_threads(folder / "threads.db"),
            rounds=rounds,
            calls=CALLS,
            against=f"SwarmDB in {WORKERS} threads",
            durability="normal",
            at_most=1.25,
        )
    lateness = f"64 tasks of {name}, 99th percentile of a tick's lateness"
    if only in lateness:
        yield compare(
            lateness,
            lambda: _lateness(_calling(folder / "tasks.db"), new_loop),
            lambda: _lateness(_sleeping, new_loop),
            rounds=max(5, rounds // 3),
            calls=1,
            against="the same tasks asleep in threads",
            durability="normal",
            at_most=1.25,
        )


def _loops() -> Iterator[tuple[str, Callable[[], asyncio.AbstractEventLoop]]]:
    yield "asyncio", asyncio.new_event_loop
    with suppress(ImportError):
        import uvloop

        yield "uvloop", uvloop.new_event_loop


def _run(main: Coroutine[Any, Any, float], new_loop: Callable[[], asyncio.AbstractEventLoop]) -> float:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)


def _in_tasks(path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> float:
    async def main() -> float:
        async with AsyncSwarmDB(path, pool_size=WORKERS) as db:

            async def work() -> None:
                for number in range(CALLS // TASKS // 2):
                    await db.insert_event(EVENTS[number % len(EVENTS)])  # type: ignore[arg-type]
                    await db.get_agent("agent")

            begun = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(TASKS)))
            return time.perf_counter() - begun

    return _run(main(), new_loop)


def _in_threads(path: Path) -> float:
    with SwarmDB(path) as db, ThreadPoolExecutor(WORKERS) as pool:

        def work(_: int) -> None:
            for number in range(CALLS // WORKERS // 2):
                db.insert_event(EVENTS[number % len(EVENTS)])  # type: ignore[arg-type]
                db.get_agent("agent")

        begun = time.perf_counter()
        list(pool.map(work, range(WORKERS)))
        return time.perf_counter() - begun


Work = Callable[[asyncio.Event], Coroutine[Any, Any, None]]


def _calling(path: Path) -> Work:
    async def call(is_over: asyncio.Event) -> None:
        async with AsyncSwarmDB(path, pool_size=WORKERS) as db:

            async def work() -> None:
                while not is_over.is_set():
                    await db.insert_event(EVENTS[0])  # type: ignore[arg-type]
                    await db.get_agent("agent")

            await asyncio.gather(*(work() for _ in range(TASKS)))

    return call


async def _sleeping(is_over: asyncio.Event) -> None:
    """Do as `_calling` does, with calls that only sleep, in as many threads, for about as long as a call takes."""
    loop, chance = asyncio.get_running_loop(), random.Random(1)
    with ThreadPoolExecutor(WORKERS) as pool:

        async def work() -> None:
            while not is_over.is_set():
                await loop.run_in_executor(pool, time.sleep, chance.uniform(0, 0.0002))

        await asyncio.gather(*(work() for _ in range(TASKS)))


def _lateness(work: Work, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> float:
    """Return the 99th percentile of how late the loop takes note of a tick while tasks work, in seconds."""

    async def main() -> float:
        loop, is_over = asyncio.get_running_loop(), asyncio.Event()
        late: list[float] = []
        with subprocess.Popen([sys.executable, "-c", _TICKER], stdout=subprocess.PIPE) as ticker:
            assert ticker.stdout is not None
            ticks = ticker.stdout.fileno()

            def take() -> None:
                now = time.monotonic()
                late.extend(now - ticked for (ticked,) in struct.iter_unpack("d", os.read(ticks, 8 * 100)))

            working = asyncio.create_task(work(is_over))
            loop.add_reader(ticks, take)
            await asyncio.sleep(WARMING_UP)
            late.clear()
            await asyncio.sleep(SECONDS)
            loop.remove_reader(ticks)
            ticker.kill()
        is_over.set()
        await working
        return sorted(late)[len(late) * 99 // 100]

    return _run(main(), new_loop)
