"""Event loops for tests, and what must not be left when one is over."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from moai_flow.memory import SwarmDB
from moai_flow.memory.aio import AsyncSwarmDB

T = TypeVar("T")


def run(scenario: Callable[[AsyncSwarmDB], Awaitable[T]], url: str, **options: Any) -> T:
    """Play *scenario* with an open database, in a loop of its own, and leave no thread behind."""

    async def play() -> T:
        async with AsyncSwarmDB(url=url, **options) as db:
            return await scenario(db)

    result = asyncio.run(play())
    join_workers()
    return result


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("swarmdb")]


def join_workers() -> None:
    """Wait for threads that were let go; those that never end fail the test, by its time."""
    gc.collect()  # So are those of an object that nobody closed.
    for thread in workers():
        thread.join()


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def cancelled(task: "asyncio.Task[Any]") -> bool:
    """Cancel a task, wait until it has ended, and return whether it was by that."""
    task.cancel()
    await asyncio.wait([task])
    return task.cancelled()


async def until(condition: Callable[[], bool]) -> None:
    """Let others go on until something is true; what never becomes true fails the test, by its time."""
    while not condition():
        await asyncio.sleep(0.001)


def at_work(db: AsyncSwarmDB, work: Callable[[SwarmDB], T]) -> tuple["asyncio.Task[T]", threading.Event]:
    """Begin *work* in a worker, and return its task, and what is set once it has begun."""
    begun = threading.Event()

    def begin(store: SwarmDB) -> T:
        begun.set()
        return work(store)

    return asyncio.create_task(db._do(begin)), begun
