"""Worker threads that do for coroutines what would block their event loop."""

import asyncio
import threading
from asyncio import AbstractEventLoop, CancelledError, Future
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: How often a worker that is kept for a transaction looks whether the event loop is still there, in seconds.
_LOOK = 1.0

_thread = threading.local()


def may_go_on() -> bool:
    """Whether what this thread does is still wanted. Asked by statements that wait or take long."""
    job: Job[Any] | None = getattr(_thread, "job", None)
    return job is None or not job.is_given_up


class Job(Generic[T]):
    """A call on its way to a worker thread and back.

    Whoever awaits it and is cancelled goes on when its fate is decided: either it was not begun, and never will be, or
    it has ended. Nothing of it happens later.
    """

    def __init__(self, work: Callable[[], T], *, can_be_given_up: bool = True) -> None:
        """Do *work*; *can_be_given_up* says whether a statement of it may be ended half-way when nobody waits."""
        self._work = work
        self._loop: AbstractEventLoop = asyncio.get_running_loop()
        self._future: Future[T] = self._loop.create_future()
        self._can_be_given_up = can_be_given_up
        self._lock = threading.Lock()
        self._was_begun = False
        self._was_dropped = False
        self.is_given_up = False
        self._end: Future[None] | None = None
        self.has_ended = False
        self.result: T | None = None
        self.error: BaseException | None = None

    # In the worker

    def run(self) -> None:
        """Do the work, unless it was dropped, and tell the event loop."""
        with self._lock:
            if self._was_dropped:
                return
            self._was_begun = True
        _thread.job = self
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 (it is raised where it is awaited)
            self.error = error
        finally:
            _thread.job = None
        with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            self._loop.call_soon_threadsafe(self._settle)

    # In the event loop

    def _settle(self) -> None:
        self.has_ended = True
        if not self._future.done():
            if self.error is None:
                self._future.set_result(self.result)  # type: ignore[arg-type]
            else:
                self._future.set_exception(self.error)
        if self._end is not None and not self._end.done():
            self._end.set_result(None)

    async def wait(self) -> T:
        """Return what the work returns, or raise what it raises; if cancelled, once its fate is decided."""
        try:
            return await self._future
        except CancelledError:
            self._give_up()
            await self.ended()
            raise

    async def ended(self) -> None:
        """Wait until its fate is decided, whoever cancels that; a cancellation is not raised here."""
        while not self.has_ended and not self._was_dropped:
            self._end = self._loop.create_future()
            with suppress(CancelledError):
                await self._end

    def _give_up(self) -> None:
        with self._lock:
            if not self._was_begun:
                self._was_dropped = True
            elif self._can_be_given_up:
                self.is_given_up = True

    async def wait_to_the_end(self) -> T:
        """Return what the work returns; if cancelled meanwhile, it is done all the same, and then this is raised."""
        was_cancelled = False
        while not self.has_ended:
            try:
                await asyncio.shield(self._future)
            except CancelledError:
                was_cancelled = True
            except BaseException:  # noqa: BLE001 (raised below)
                break
        if was_cancelled:
            raise CancelledError from self.error
        return await self._future


class Pinned:
    """A worker thread that is kept for one task, for as long as it has a transaction open."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self.depth = 0

    def submit(self, job: Job[Any]) -> None:
        """Have the worker do *job*, after those before it."""
        self._jobs.put(job)

    def serve(self) -> None:
        """Do its jobs, in the worker, until it is released."""
        while True:
            try:
                job = self._jobs.get(timeout=_LOOK)
            except Empty:
                if self._loop.is_closed():
                    return  # Its task will never release it.
                continue
            if job is None:
                return
            job.run()

    def release(self) -> None:
        """Let the worker go."""
        self._jobs.put(None)


class Workers:
    """A bounded pool of worker threads."""

    def __init__(self, most: int) -> None:
        self._executor = ThreadPoolExecutor(most, thread_name_prefix="swarmdb")

    def submit(self, job: Job[Any]) -> None:
        """Have a worker do *job*, when one is free."""
        self._executor.submit(job.run)

    def pin(self) -> Pinned:
        """Return a worker for one task, when one is free: its first job waits for that."""
        pinned = Pinned()
        self._executor.submit(pinned.serve)
        return pinned

    async def close(self) -> None:
        """Wait until all that was submitted has ended, and let the workers go."""
        job = Job(self._executor.shutdown)
        threading.Thread(target=job.run, name="swarmdb-close").start()
        await job.wait_to_the_end()
