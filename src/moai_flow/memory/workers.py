"""Worker threads that do for coroutines what would block their event loop."""

import asyncio
import math
import os
import threading
import time
import weakref
from asyncio import AbstractEventLoop, CancelledError, Future
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import Enum, auto
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from moai_flow.memory.errors import BusyError, TransactionError

T = TypeVar("T")

#: How often a worker that is kept for a transaction looks whether anybody is left to end it, in seconds.
_LOOK = 1.0

#: After how long a statement that goes on all the same is cancelled again, in seconds.
_AGAIN = 0.05

#: After how long a job counts as one that takes long, beside which others are to go on, in seconds.
_LONG = 0.005

#: How many jobs at most are given back to tasks before the event loop looks after everything else again.
_AT_ONCE = 8


class _Local(threading.local):
    """What a worker is at, and what comes back to the event loop of a thread."""

    job: "Job[Any] | None" = None
    returned: "_Returned | None" = None


_thread = _Local()


# What the statements ask that a worker runs. Elsewhere, the answer is that they are wanted.


def may_go_on() -> bool:
    """Whether what this thread does is still wanted. Asked by statements that wait or take long."""
    job = _thread.job
    return job is None or not job.is_given_up or job.is_in_block


def statement_begins(cancel: Callable[[], bool]) -> bool:
    """Note how another thread may cancel the statement that this one is about to run; False says not to run it.

    *cancel* returns once the cancellation can't reach any later statement, and says whether that is certain.
    """
    job = _thread.job
    return job is None or job.statement_begins(cancel)


def statement_ends() -> bool:
    """Wait for whoever is cancelling this thread's statement; False says that a later one may still be hit."""
    job = _thread.job
    return job is None or job.statement_ends()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Finish what is done inside, whether or not somebody still waits for it."""
    job, _thread.job = _thread.job, None
    try:
        yield
    finally:
        _thread.job = job


class _State(Enum):
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()
    DROPPED = auto()


class _Cancelling:
    """A statement that is being cancelled, by a thread of its own: it takes a connection to the server."""

    def __init__(self, cancel: Callable[[], bool], after: float = 0) -> None:
        """Send *cancel* in so many seconds, and until the statement has ended."""
        self._cancel = cancel
        self._after = after
        self._has_ended = threading.Event()
        self._is_certain = True
        self._thread = threading.Thread(target=self._run, name="swarmdb-cancel")
        self._thread.start()

    def _run(self) -> None:
        self._has_ended.wait(self._after)
        # The first may come before the statement has reached the server.
        while self._is_certain and not self._has_ended.is_set():
            self._is_certain = False
            self._is_certain = self._cancel()
            self._has_ended.wait(_AGAIN)

    def statement_ended(self) -> bool:
        """Wait until nothing is sent any more, and return whether no later statement can be hit."""
        self._has_ended.set()
        self._thread.join()
        return self._is_certain


class _Returned:
    """Jobs that have ended, on their way to one event loop: waking it for each would cost more than most of them."""

    __slots__ = ("_ended", "_is_expected", "_loop")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._ended: deque[Job[Any]] = deque()
        self._is_expected = False

    def is_for(self, loop: AbstractEventLoop) -> bool:
        """Whether it is for this loop."""
        return self._loop() is loop

    def put(self, job: "Job[Any]", loop: AbstractEventLoop) -> None:
        """Give *job* back, in the worker."""
        self._ended.append(job)
        if not self._is_expected:  # Two that see it at the same time do no harm.
            self._is_expected = True
            with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                loop.call_soon_threadsafe(self._take)

    def look_again(self) -> None:
        """Look for what has ended: an interrupt may have come in the place of the look that was expected."""
        loop = self._loop()
        if loop is not None:
            self._is_expected = True
            loop.call_soon(self._take)

    def _take(self) -> None:
        self._is_expected = False  # From here on, whoever comes too late for this round asks for another.
        try:
            for _ in range(min(len(self._ended), _AT_ONCE)):
                self._ended[0].settle()
                self._ended.popleft()  # Only now: an interrupt ends the loop, but it is run again, to its end at least.
        finally:
            if self._ended and not self._is_expected:
                self.look_again()


class Runnable(Protocol):
    """What a worker can be given to do."""

    #: Where it waits for a worker, once it has been submitted: it may leave that.
    place: "Queue | None"

    def run(self) -> None:
        """Do it, in the worker."""


#: What waits for a worker, in this order. What nobody waits for leaves it at once, wherever it stands.
Queue = OrderedDict[Runnable, None]


class Job(Generic[T]):
    """A call on its way to a worker thread and back.

    Whoever awaits it and is cancelled goes on when its fate is decided: either it was not begun, and never will be, or
    it has ended. Nothing of it happens later.
    """

    __slots__ = (
        "_cancel",
        "_cancelling",
        "_end",
        "_error",
        "_future",
        "_has_begun",
        "_lock",
        "_loop",
        "_result",
        "_returned",
        "_state",
        "_work",
        "has_failed",
        "is_given_up",
        "is_in_block",
        "place",
    )

    def __init__(self, work: Callable[[], T], *, is_in_block: bool = False) -> None:
        """Do *work*.

        Args:
            work: What to do.
            is_in_block: Whether it is part of a transaction that goes on when it is given up.
        """
        self._work: Callable[[], T] | None = work
        self._loop = loop = asyncio.get_running_loop()
        returned = _thread.returned
        if returned is None or not returned.is_for(loop):
            returned = _thread.returned = _Returned(loop)
        self._returned = returned
        self._future: Future[T] = loop.create_future()
        self._end: Future[None] | None = None
        self._lock = threading.Lock()
        self._state = _State.WAITING
        self._result: T | None = None
        self._error: BaseException | None = None
        self._cancel: Callable[[], bool] | None = None
        self._cancelling: _Cancelling | None = None
        self._has_begun = False  # To send statements to a server.
        self.is_in_block = is_in_block
        self.is_given_up = False
        self.has_failed = False
        self.place: Queue | None = None

    @property
    def has_succeeded(self) -> bool:
        """Whether it has ended, without an error."""
        return self._state is _State.ENDED and not self.has_failed

    # In the worker

    def run(self) -> None:
        """Do the work, unless it was dropped, and tell the event loop."""
        with self._lock:
            if self._state is not _State.WAITING:
                return
            self._state = _State.RUNNING
        work, self._work = self._work, None
        assert work is not None
        _thread.job = self
        try:
            self._result = work()
        except BaseException as error:  # noqa: BLE001 (it is raised where it is awaited)
            self._error = error
            self.has_failed = True
        finally:
            _thread.job = None
        del work
        self._returned.put(self, self._loop)

    def refuse(self, error: Exception) -> None:
        """Raise *error* where it is awaited, in place of doing it."""
        self._work = partial(_raise, error)
        self.run()

    def statement_begins(self, cancel: Callable[[], bool]) -> bool:
        """Note how to cancel a statement; see the function of this name."""
        with self._lock:
            if self.is_given_up:
                if not self.is_in_block or not self._has_begun:
                    return False
                # What it has begun in the block is done as a whole; but not if it waits for others.
                self._cancel_later(cancel, _AGAIN)
            self._has_begun = True
            self._cancel = cancel
            return True

    def statement_ends(self) -> bool:
        """Wait for whoever is cancelling the statement; see the function of this name."""
        with self._lock:
            self._cancel = None
            cancelling, self._cancelling = self._cancelling, None
        return cancelling is None or cancelling.statement_ended()

    # In the event loop

    def settle(self) -> None:
        """Tell who waits for it that it has ended; again, which does no harm, if that was interrupted."""
        if self._state is not _State.ENDED:
            future, error = self._future, self._error
            if isinstance(error, StopIteration):  # A future refuses it, since a coroutine can't raise it.
                error = RuntimeError("a call raised StopIteration, which no coroutine can")
                error.__cause__ = self._error
            if future.done():
                pass  # Nobody waits for it any more.
            elif error is None:
                future.set_result(self._result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)
            self._state = _State.ENDED
            # The error's traceback has frames that have the job: in a circle, they would keep connections alive.
            del self._future
            self._error = self._result = None
        if self._end is not None and not self._end.done():
            self._end.set_result(None)

    async def wait(self, patience: float | None = None) -> T:
        """Return what the work returns, or raise what it raises; if cancelled, once its fate is decided.

        Args:
            patience: How long it may wait for a worker, in seconds, before it is dropped. Default: for ever.

        Raises:
            BusyError: If it was dropped.
        """
        future = self._future
        timer = None if patience is None else self._loop.call_later(patience, self._expire)
        try:
            return await future
        except CancelledError:
            self._give_up()
            self._returned.look_again()
            while not self._is_decided():
                with suppress(CancelledError):  # Cancelled again and again, it is raised once.
                    await self._ended()
            raise
        except GeneratorExit:  # Nobody can wait here any more.
            self._give_up()
            with suppress(RuntimeError):  # The loop may be closed.
                future.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            del self, future, timer  # The error's traceback has this frame.

    async def wait_to_the_end(self) -> T:
        """Return what the work returns, or raise what it raises; if cancelled, once it has been done all the same."""
        future, cancellation = self._future, None
        try:
            while not self._is_decided():
                try:
                    await self._ended()
                except CancelledError as error:
                    cancellation = error
                    self._returned.look_again()
            if cancellation is not None:
                raise cancellation from future.exception()
            return future.result()
        except GeneratorExit:
            future.cancel()
            raise
        finally:
            del self, future, cancellation

    async def look_on(self) -> T:
        """Return what the work returns, or raise what it raises; if cancelled, at once, and it is done all the same."""
        return await self._future

    def _is_decided(self) -> bool:
        return self._state is _State.ENDED or self._state is _State.DROPPED

    def _ended(self) -> Future[None]:
        self._end = self._loop.create_future()
        return self._end

    def _give_up(self) -> None:
        with self._lock:
            if self._state is _State.WAITING:
                self._drop()
            elif self._state is _State.RUNNING:
                self.is_given_up = True
                if self._cancel is not None:
                    self._cancel_later(self._cancel)

    def _cancel_later(self, cancel: Callable[[], bool], after: float = 0) -> None:
        with suppress(RuntimeError):  # There is no thread to be had: the statement goes on to its end.
            self._cancelling = _Cancelling(cancel, after)

    def _drop(self) -> None:
        self._state = _State.DROPPED
        self._work = None
        if self.place is not None:
            self.place.pop(self, None)

    def _expire(self) -> None:
        with self._lock:
            if self._state is not _State.WAITING:
                return
            self._drop()
        if not self._future.done():
            self._future.set_exception(
                BusyError("transactions had all workers of this database for longer than the busy timeout")
            )


def _raise(error: Exception) -> NoReturn:
    raise error


class Pinned:
    """A worker thread that is kept for one task, for as long as it has a transaction open."""

    def __init__(self, workers: "Workers") -> None:
        self._workers = workers
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._loop = weakref.ref(asyncio.get_running_loop())
        self._is_over = False
        self.place: Queue | None = None
        #: What the worker has entered, and not left yet.
        self.entered: list[AbstractContextManager[Any]] = []
        #: How many blocks the task has open.
        self.depth = 0

    def submit(self, job: Job[Any]) -> None:
        """Have the worker do *job*, after those before it."""
        self._jobs.put(job)
        if self._is_over:
            self._refuse()

    def release(self) -> None:
        """Let the worker go, after the jobs before this."""
        self._workers.released(self)
        try:
            assert self.place is not None
            del self.place[self]
        except KeyError:
            self._jobs.put(None)
        else:  # It was still waiting for one, and so were they, which nobody waits for any more.
            self._workers.unpinned(self)

    def run(self) -> None:
        """Do its jobs, in the worker, until it is released, or nobody is left to do so."""
        try:
            while (job := self._next()) is not None:
                job.run()
                del job
        finally:
            while self.entered:  # Else the worker would take the transaction along.
                with suppress(Exception):
                    self.entered.pop().__exit__(GeneratorExit, GeneratorExit(), None)
            self._workers.unpinned(self)
            self._is_over = True
            self._refuse()

    def _refuse(self) -> None:
        """Raise what has become of the transaction where a job is awaited that came too late for it."""
        with suppress(Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job.refuse(TransactionError("this transaction was rolled back, since the interpreter is ending"))

    def _next(self) -> Job[Any] | None:
        while True:
            try:
                return self._jobs.get(timeout=_LOOK)
            except Empty:
                loop = self._loop()
                is_gone = loop is None or loop.is_closed()
                del loop  # Else nobody could notice that the program has let go of it.
                if is_gone or _interpreter_is_ending():
                    return None


def _interpreter_is_ending() -> bool:
    """Whether the interpreter waits for the threads of pools, which it does before anything else says that it ends."""
    try:
        with ThreadPoolExecutor(1, "swarmdb-look") as pool:
            pool.submit(int)
    except RuntimeError as error:
        return "shutdown" in str(error)  # Or there is no thread to be had.
    return False


class _Serving:
    """A worker at work, and since when it has been at its job."""

    __slots__ = ("since",)

    def __init__(self) -> None:
        self.since = math.inf


class Workers:
    """A bounded pool of worker threads, of which only a few work at once as long as jobs are short.

    More would wait for each other, for the interpreter's lock and for the database's, and leave the event loop less of
    both. A job that takes long, because it waits for a lock or has a lot to do, makes room for another one beside it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        #: How many work at once, not counting those that take long or are kept for a transaction.
        self.at_once = 1
        self._is_closed = False
        self._start()
        _instances.add(self)

    def _start(self) -> None:
        # It starts the threads, and ends them with the interpreter; while they are busy, they need not ask it for more.
        self._executor = ThreadPoolExecutor(self._most, thread_name_prefix="swarmdb")
        self._lock = threading.Lock()
        self._is_idle = threading.Condition(self._lock)
        self._waiting = Queue()
        self._serving: set[_Serving] = set()
        # Those that somebody has are what counts: an interrupt, wherever it comes, leaves none behind.
        self._pinned: weakref.WeakSet[Pinned] = weakref.WeakSet()
        #: Those of them that a task still has, and may have for as long as it likes.
        self._held: weakref.WeakSet[Pinned] = weakref.WeakSet()
        #: The event loops that are going to look. Each does, while something waits: another may be stuck, or closed.
        self._looking: weakref.WeakSet[AbstractEventLoop] = weakref.WeakSet()

    @property
    def are_all_pinned(self) -> bool:
        """Whether transactions have all workers, so that what is submitted waits until one ends."""
        return len(self._held) >= self._most

    def submit(self, work: Runnable) -> bool:
        """Have a worker do *work*, when one is free; False says that they were let go.

        Raises:
            RuntimeError: If there is no worker, and no thread to be had for one.
        """
        with self._lock:
            if self._is_closed:
                return False
            work.place = self._waiting
            self._waiting[work] = None
            if len(self._serving) - len(self._pinned) < self.at_once:
                try:
                    self._serve_more()
                except RuntimeError:
                    self._waiting.pop(work, None)
                    raise
            else:
                self._look_later()
        return True

    def pin(self) -> Pinned | None:
        """Return a worker for one task, when one is free: its first job waits for that. None if they were let go.

        Raises:
            RuntimeError: As `submit`.
        """
        pinned, is_taken = Pinned(self), False
        self._pinned.add(pinned)
        self._held.add(pinned)
        try:
            is_taken = self.submit(pinned)
        finally:
            if not is_taken:
                self.unpinned(pinned)
        return pinned if is_taken else None

    def released(self, pinned: Pinned) -> None:
        """Count one less that a task still has: who waits for it now waits for the end of what it has begun."""
        self._held.discard(pinned)

    def unpinned(self, pinned: Pinned) -> None:
        """Count one less that is kept for a task."""
        self._held.discard(pinned)
        self._pinned.discard(pinned)

    def _serve_more(self) -> None:
        if len(self._serving) < self._most:
            serving = _Serving()
            try:
                self._executor.submit(self._serve, serving)
            except RuntimeError:
                if not self._serving:
                    raise
                return  # Those that are there come to it.
            self._serving.add(serving)

    def _look_later(self) -> None:
        """See to it that it is noticed if what waits is waiting for jobs that take long."""
        loop = asyncio.get_running_loop()
        if loop not in self._looking:
            self._looking.add(loop)
            loop.call_later(_LONG, self._look)

    def _look(self) -> None:
        with self._lock:
            self._looking.discard(asyncio.get_running_loop())
            if self._waiting:
                if not self._are_enough():
                    self._serve_more()
                self._look_later()

    def _are_enough(self) -> bool:
        long_since = time.monotonic() - _LONG
        long = sum(serving.since < long_since for serving in self._serving)
        return len(self._serving) - len(self._pinned) - long >= self.at_once

    def _serve(self, serving: _Serving) -> None:
        while True:
            try:
                work, _ = self._waiting.popitem(last=False)
            except KeyError:
                with self._lock:
                    if not self._waiting:
                        self._serving.discard(serving)
                        self._is_idle.notify_all()
                        return
                continue
            if not isinstance(work, Pinned):
                serving.since = time.monotonic()
            work.run()
            del work
            serving.since = math.inf
            if len(self._serving) - len(self._pinned) > self.at_once:
                with self._lock:  # What took long has ended, and who stood in for it is one too many.
                    self._serving.discard(serving)
                    if self._are_enough():
                        return
                    self._serving.add(serving)

    def close(self) -> None:
        """Take nothing more, wait until all that was submitted has ended, and let the workers go. Not in one of them.

        A second call waits as well.
        """
        with self._lock:
            self._is_closed = True
            self._is_idle.wait_for(lambda: not self._serving)  # As long as something waits, others may have to join in.
        self._executor.shutdown()

    def forget_all(self) -> None:
        """Leave what is under way to the parent process. The child has workers of its own."""
        self._start()


_instances: weakref.WeakSet[Workers] = weakref.WeakSet()


def _forget_after_fork() -> None:
    _thread.job = _thread.returned = None
    for workers in _instances:
        workers.forget_all()


# Where there is no fork, there is nothing to register with.
getattr(os, "register_at_fork", dict)(after_in_child=_forget_after_fork)
