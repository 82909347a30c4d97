"""The facade for asyncio: the same calls, awaited, done by worker threads so that the event loop never waits."""

import asyncio
import inspect
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from dataclasses import replace
from datetime import datetime
from functools import partial, wraps
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from sqlmodel import Session

from moai_flow.memory.db import SwarmDB
from moai_flow.memory.engine import Settings
from moai_flow.memory.errors import ClosedError, StorageError, TransactionError
from moai_flow.memory.models import AgentEvent
from moai_flow.memory.operations.retention import RetentionPolicy
from moai_flow.memory.patience import Interrupts
from moai_flow.memory.scope import RawConnection, RawCursor
from moai_flow.memory.tracking import TrackedAgent, TrackedTask
from moai_flow.memory.workers import (
    Job,
    Pinned,
    Workers,
    may_go_on,
    statement_begins,
    statement_ends,
    uninterrupted,
)

P = ParamSpec("P")
T = TypeVar("T")
Q = TypeVar("Q")
V = TypeVar("V")

K = TypeVar("K", bound=TrackedTask | TrackedAgent)

#: How many rows an iteration reads ahead.
_READ_AHEAD = 100

#: How many workers are busy at once with a file, as long as calls are short. SQLite and the interpreter do one thing at
#: a time, nearly, and the event loop wants a processor too.
_AT_ONCE = max(1, min(2, (os.cpu_count() or 1) - 1))

#: How often a call that waits for another one to open the database looks whether it is to go on, in seconds.
_LOOK = 0.05


class _WorkersDB(SwarmDB):
    """A database whose statements end when nobody waits for them any more."""

    def _adapted(self, settings: Settings) -> Settings:
        return replace(settings, interrupts=Interrupts(may_go_on, statement_begins, statement_ends))

    def _clean_if_due(self) -> None:
        with uninterrupted():  # It is quick, and no part of the call that it happens in.
            super()._clean_if_due()


class _Worked:
    """What `AsyncSwarmDB` is made of: the database, the workers, and who has a transaction open."""

    def __init__(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = inspect.signature(SwarmDB).bind(*arguments, **options)
        given.apply_defaults()
        pool_size, patience = given.arguments["pool_size"], given.arguments["busy_timeout"]
        self._open = partial(_WorkersDB, *arguments, **options)
        # What is no size, or no time, is refused where the database is opened.
        self._pool_size = pool_size if type(pool_size) is int and pool_size > 0 else 1
        self._workers = Workers(self._pool_size)
        self._patience = float(patience) if isinstance(patience, int | float) else 0.0
        self._db: SwarmDB | None = None
        self._is_closed = False
        self._start()
        _instances.add(self)

    def _start(self) -> None:
        self._opening = threading.Lock()
        self._pinned: dict[asyncio.Task[Any], Pinned] = {}

    def _database(self) -> SwarmDB:
        """Return the database, in a worker; the first one opens it."""
        if self._db is None:
            while not self._opening.acquire(timeout=_LOOK):
                if not may_go_on():
                    raise StorageError("nobody waits for this call any more")
            try:
                if self._db is None:
                    self._db = db = self._open()
                    self._workers.at_once = self._pool_size if db._location.is_on_server else _AT_ONCE
            finally:
                self._opening.release()
        return self._db

    def _own_pin(self) -> Pinned | None:
        """Return the worker that has this task's transaction open."""
        return self._pinned.get(asyncio.current_task()) if self._pinned else None  # type: ignore[arg-type]

    async def _do(self, work: Callable[[SwarmDB], T]) -> T:
        """Do *work* in this task's transaction, or in whichever worker is free."""
        return await self._done(lambda: work(self._db or self._database()))

    def _done(self, work: Callable[[], T]) -> Coroutine[Any, Any, T]:
        """Return what is to be awaited for *work*, which is on its way to a worker then."""
        pinned = self._own_pin()
        if pinned is None:
            job = Job(work)
            self._submit(job)
            return job.wait(self._patience if self._workers.are_all_pinned else None)
        job = Job(work, is_in_block=True)
        pinned.submit(job)
        return job.wait()

    def _submit(self, job: Job[Any]) -> None:
        if self._is_closed or not self._workers.submit(job):
            raise self._closed()

    def _closed(self) -> ClosedError:
        return ClosedError(f"{self!r}: the database was closed before this call")

    def _shut(self) -> None:
        """Wait for what is under way, and close the database; in a thread that is none of the workers."""
        self._workers.close()
        with self._opening:  # A second call returns when the first has done it.
            if self._db is not None:
                self._db.close()

    def __repr__(self) -> str:
        state = ", closed" if self._is_closed else "" if self._db is not None else ", not open yet"
        where = repr(str(self._db._location)) if self._db is not None else "..."
        return f"AsyncSwarmDB({where}{state})"


_instances: weakref.WeakSet[_Worked] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for db in _instances:
        db._start()  # Threads that had the lock, or transactions, are the parent's.


# Where there is no fork, there is nothing to register with.
getattr(os, "register_at_fork", dict)(after_in_child=_forget_after_fork)


# How a method of SwarmDB becomes one of AsyncSwarmDB. Each keeps the parameters, their types, and the overloads.


def _opening(
    method: Callable[Concatenate[SwarmDB, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give a constructor the parameters of SwarmDB's."""

    def decorate(constructor: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        constructor.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        constructor.__doc__ = f"{constructor.__doc__}\n{method.__doc__}"
        return constructor

    return decorate


def _awaited(
    method: Callable[Concatenate[SwarmDB, P], T],
) -> Callable[Concatenate[_Worked, P], Coroutine[Any, Any, T]]:
    """Make a method awaitable."""

    @wraps(method)
    async def call(db: _Worked, /, *arguments: P.args, **options: P.kwargs) -> T:
        return await db._done(lambda: method(db._db or db._database(), *arguments, **options))

    return call


def _iterated(
    method: Callable[Concatenate[SwarmDB, P], Iterator[T]],
) -> Callable[Concatenate[_Worked, P], AsyncIterator[T]]:
    """Make the iterator that a method returns an asynchronous one, which reads a bounded number of items ahead."""

    @wraps(method)
    async def iterate(db: _Worked, /, *arguments: P.args, **options: P.kwargs) -> AsyncIterator[T]:
        iterator = await db._do(lambda store: method(store, *arguments, **options))
        error: Exception | None = None
        while error is None:
            items: list[T] = []
            error = await db._do(lambda _, items=items: _read(iterator, items))  # type: ignore[misc]
            for item in items:
                yield item
            if error is None and len(items) < _READ_AHEAD:
                return
        raise error

    return iterate


def _read(iterator: Iterator[T], items: list[T]) -> Exception | None:
    """Add the next items, and return the error that came up behind them: what was read before it is good."""
    try:
        items.extend(islice(iterator, _READ_AHEAD))
    except Exception as error:  # noqa: BLE001 (it is raised once the items have been given)
        return error
    return None


def _watched(
    method: Callable[Concatenate[SwarmDB, P], Iterator[AgentEvent]],
) -> Callable[Concatenate[_Worked, P], AsyncIterator[AgentEvent]]:
    """Make watching an asynchronous iteration that sleeps in the event loop, not in a worker."""
    signature = inspect.signature(method)

    @wraps(method)
    def watch(db: _Worked, /, *arguments: P.args, **options: P.kwargs) -> AsyncIterator[AgentEvent]:
        bound = signature.bind(None, *arguments, **options)
        bound.apply_defaults()
        return _Watching(db, {name: value for name, value in bound.arguments.items() if name != "self"})

    return watch


class _Watching(AsyncIterator[AgentEvent]):
    """New events as they come. A step that is cancelled loses none: the next one goes on where it was."""

    def __init__(self, db: _Worked, parameters: dict[str, Any]) -> None:
        self._db = db
        self._parameters = parameters
        self._begun: tuple[Any, Any] | None = None
        self._events: deque[AgentEvent] = deque()
        self._is_stepping = False
        self._is_over = False

    async def __anext__(self) -> AgentEvent:
        if self._is_stepping:
            raise RuntimeError("another task awaits the next event of this iteration")
        if self._is_over:
            raise StopAsyncIteration
        self._is_stepping = True
        try:
            _refuse_to_watch(self._db)
            while not self._events:
                await self._step()
            return self._events.popleft()
        except Exception:
            self._is_over = True
            raise
        finally:
            self._is_stepping = False

    async def _step(self) -> None:
        if self._begun is None:
            self._begun = await self._db._do(lambda store: store._watch(**self._parameters))
        assert self._begun is not None
        what, place = self._begun
        if place.pause:
            await asyncio.sleep(place.pause)
        events, place = await self._db._do(lambda store: store._poll(what, place))
        self._begun = what, place
        self._events.extend(events)


def _refuse_to_watch(db: _Worked) -> None:
    if db._own_pin() is not None:
        raise TransactionError(
            "events can't be watched inside a transaction, which would show what may be rolled back, or hide what is "
            "new: watch them in another task, or outside of it"
        )


class AsyncCursor:
    """The cursor of a raw statement."""

    def __init__(self, connection: "AsyncConnection", cursor: RawCursor) -> None:
        self._connection = connection
        self._cursor = cursor

    @property
    def rowcount(self) -> int:
        """How many rows the statement changed; -1 if it changes none."""
        return self._cursor.rowcount

    @property
    def lastrowid(self) -> Any:
        """The number that the inserted row was given."""
        return self._cursor.lastrowid

    async def fetchone(self) -> Any:
        """Return the next row, or None."""
        return await self._connection.run(lambda _: self._cursor.fetchone())

    async def fetchmany(self, size: int) -> list[Any]:
        """Return the next *size* rows, or what is left of them."""
        return await self._connection.run(lambda _: self._cursor.fetchmany(size))

    async def fetchall(self) -> list[Any]:
        """Return all rows that are left."""
        return await self._connection.run(lambda _: self._cursor.fetchall())


class _InBlock(Generic[Q]):
    """Something of a transaction that only the worker may touch which has it open."""

    def __init__(self, block: "_Block[Q, Any]", inner: Q) -> None:
        self._block = block
        self._inner = inner

    async def _run(self, work: Callable[[Q], T]) -> T:
        return await self._block.run(lambda: work(self._inner))


class AsyncConnection(_InBlock[RawConnection]):
    """The driver's connection of a transaction. Its statements are awaited."""

    async def execute(self, sql: str, parameters: Any = ()) -> AsyncCursor:
        """Run a statement. Placeholders are the driver's.

        Raises:
            TransactionError: Outside the block, or in another task than that which opened it.
        """
        return AsyncCursor(self, await self._run(lambda raw: raw.execute(sql, parameters)))

    async def executemany(self, sql: str, parameters: Any) -> AsyncCursor:
        """Run a statement once for each of *parameters*.

        Raises:
            TransactionError: As `execute`.
        """

        def execute(raw: RawConnection) -> RawCursor:
            cursor = raw.cursor()
            cursor.executemany(sql, parameters)
            return cursor

        return AsyncCursor(self, await self._run(execute))

    async def run(self, work: Callable[[RawConnection], T]) -> T:
        """Call *work* with the driver's own connection, in the worker, and return what it returns.

        Raises:
            TransactionError: As `execute`.
        """
        return await self._run(work)


class AsyncSession(_InBlock[Session]):
    """The typed session of a transaction. What it does with the database is awaited."""

    async def run(self, work: Callable[[Session], T]) -> T:
        """Call *work* with the SQLModel session, in the worker, and return what it returns.

        The session must not be used after that, nor what needs it to be loaded.

        Raises:
            TransactionError: Outside the block, or in another task than that which opened it.
        """
        return await self._run(work)


class _Block(AbstractAsyncContextManager[T], Generic[Q, T]):
    """A transaction that is open on one worker, for one task."""

    def __init__(
        self,
        db: _Worked,
        block: Callable[[SwarmDB], AbstractContextManager[Q]],
        wrap: Callable[["_Block[Q, T]", Q], T],
    ) -> None:
        self._db = db
        self._block = block
        self._wrap = wrap
        self._task: asyncio.Task[Any] | None = None
        self._context: AbstractContextManager[Q] | None = None

    async def __aenter__(self) -> T:
        if self._task is not None:
            raise RuntimeError("a transaction is entered once; each block needs one of its own")
        db, task = self._db, asyncio.current_task()
        if task is None:
            raise RuntimeError("a transaction belongs to a task, and none runs here")
        pinned = db._pinned.get(task)
        patience = None
        if pinned is None:
            if db._workers.are_all_pinned:
                patience = db._patience
            pinned = None if db._is_closed else db._workers.pin()
            if pinned is None:
                raise db._closed()
            db._pinned[task] = pinned
        self._task, self._pin = task, pinned
        pinned.depth += 1
        job = Job(self._enter, is_in_block=pinned.depth > 1)
        pinned.submit(job)
        try:
            return self._wrap(self, await job.wait(patience))
        except BaseException:
            if job.has_succeeded:  # It was entered when its task was cancelled.
                await self._left(_Undo)
            else:
                self._release()
            raise
        finally:
            del job, pinned

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not _has_loop():  # The coroutine was destroyed: the worker undoes what it finds open.
            self._db._pinned.pop(self._task, None)  # type: ignore[arg-type]
            self._pin.release()
            return
        await self._left(None if error is None else _Undo)

    def run(self, work: Callable[[], V]) -> Coroutine[Any, Any, V]:
        """Return what is to be awaited for *work*, which uses what belongs to this block."""
        if self._context is None or self._db._own_pin() is not self._pin:
            raise TransactionError("this belongs to the task that opened the transaction, until its block ends")
        return self._db._done(work)

    def _enter(self) -> Q:
        context = self._block(self._db._database())
        inner = context.__enter__()
        self._pin.entered.append(context)
        self._context = context
        return inner

    def _left(self, kind: "type[_Undo] | None") -> Coroutine[Any, Any, None]:
        """Return what is to be awaited for the end of the block, which comes whether or not anybody waits for it."""
        context, self._context = self._context, None
        entered = self._pin.entered
        assert context is not None

        def leave() -> None:
            entered.remove(context)
            error = None if kind is None else kind()
            with suppress(_Undo):
                context.__exit__(kind, error, None)

        job = Job(leave)
        self._pin.submit(job)
        self._release()
        return job.wait_to_the_end()

    def _release(self) -> None:
        """Let the worker go, when it has done what was submitted until now."""
        self._pin.depth -= 1
        if not self._pin.depth:
            assert self._task is not None
            del self._db._pinned[self._task]
            self._pin.release()


class _Undo(Exception):  # noqa: N818 (it is no error, and nobody sees it)
    """Stands in a worker for the exception by which a task has left its block."""


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class AsyncTrackedAgent:
    """An agent at work, from `AsyncSwarmDB.track_agent`."""

    def __init__(self, db: _Worked, agent: TrackedAgent) -> None:
        self._db = db
        self._agent = agent

    @property
    def agent_id(self) -> str:
        """The agent's id."""
        return self._agent.agent_id

    @property
    def agent_type(self) -> str:
        """What kind of agent it is."""
        return self._agent.agent_type

    @property
    def duration_ms(self) -> int | None:
        """How long the block took, in milliseconds; None until it is left."""
        return self._agent.duration_ms

    @property
    def metadata(self) -> dict[str, Any]:
        """What the event at its end is to say, as `TrackedAgent.metadata`."""
        return self._agent.metadata

    @metadata.setter
    def metadata(self, value: dict[str, Any]) -> None:
        self._agent.metadata = value

    async def heartbeat(self) -> bool:
        """Say that the agent is alive, now, as `TrackedAgent.heartbeat` does, with its errors.

        Returns:
            Whether the agent is to go on.
        """
        return await self._db._do(lambda _: self._agent.heartbeat())


class _Tracking(AbstractAsyncContextManager[T], Generic[K, T]):
    """A block that is measured, and recorded in a worker."""

    def __init__(self, db: _Worked, make: Callable[[SwarmDB], K], wrap: Callable[[_Worked, K], T]) -> None:
        self._db = db
        self._make = make
        self._wrap = wrap
        self._tracked: K | None = None
        self._was_entered = False

    async def __aenter__(self) -> T:
        if self._was_entered:
            raise RuntimeError("a tracked block is entered once; each needs one of its own")
        self._was_entered = True
        try:
            return self._wrap(self._db, await self._db._done(self._enter))
        except BaseException as error:
            if isinstance(self._tracked, TrackedAgent):  # It was registered when its task was cancelled.
                await self.__aexit__(type(error), error, error.__traceback__)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not _has_loop():
            return  # The coroutine was destroyed, as if the process had been.
        tracked, pinned = self._tracked, self._db._own_pin()
        assert tracked is not None
        tracked._end()  # Waiting for a worker is no part of it.
        job = Job(partial(tracked.__exit__, kind, error, traceback))
        try:
            if pinned is not None:
                pinned.submit(job)
            elif kind is GeneratorExit:
                asyncio.get_running_loop().call_soon(self._submit, job)
            elif not self._db._workers.submit(job):
                tracked._store(error, self._refuse)
                return
            await job.wait_to_the_end()
        finally:
            del job  # The traceback of an error of its own has this frame.

    def _submit(self, job: Job[Any]) -> None:
        """Have a worker do *job*; not in the garbage collector, which may have come in the middle of another submit."""
        if not self._db._workers.submit(job):
            job.run()  # It is refused at once.

    def _refuse(self) -> None:
        raise self._db._closed()

    def _enter(self) -> K:
        tracked = self._make(self._db._database())
        tracked.__enter__()
        self._tracked = tracked
        return tracked


def _task_tracked(
    method: Callable[Concatenate[SwarmDB, P], TrackedTask],
) -> Callable[Concatenate[_Worked, P], AbstractAsyncContextManager[TrackedTask]]:
    """Make the block that a method measures an asynchronous one."""

    @wraps(method)
    def track(db: _Worked, /, *arguments: P.args, **options: P.kwargs) -> AbstractAsyncContextManager[TrackedTask]:
        return _Tracking(db, lambda store: method(store, *arguments, **options), lambda _, task: task)

    return track


def _agent_tracked(
    method: Callable[Concatenate[SwarmDB, P], TrackedAgent],
) -> Callable[Concatenate[_Worked, P], AbstractAsyncContextManager[AsyncTrackedAgent]]:
    """Make the block that a method registers an agent for an asynchronous one."""

    @wraps(method)
    def track(
        db: _Worked, /, *arguments: P.args, **options: P.kwargs
    ) -> AbstractAsyncContextManager[AsyncTrackedAgent]:
        return _Tracking(db, lambda store: method(store, *arguments, **options), AsyncTrackedAgent)

    return track


def _transaction(
    method: Callable[Concatenate[SwarmDB, P], AbstractContextManager[RawConnection]],
) -> Callable[Concatenate[_Worked, P], AbstractAsyncContextManager[AsyncConnection]]:
    """Make a block with the driver's connection an asynchronous one."""

    @wraps(method)
    def begin(db: _Worked, /, *arguments: P.args, **options: P.kwargs) -> AbstractAsyncContextManager[AsyncConnection]:
        return _Block(db, lambda store: method(store, *arguments, **options), AsyncConnection)

    return begin


def _session(
    method: Callable[Concatenate[SwarmDB, P], AbstractContextManager[Session]],
) -> Callable[Concatenate[_Worked, P], AbstractAsyncContextManager[AsyncSession]]:
    """Make a block with a typed session an asynchronous one."""

    @wraps(method)
    def begin(db: _Worked, /, *arguments: P.args, **options: P.kwargs) -> AbstractAsyncContextManager[AsyncSession]:
        return _Block(db, lambda store: method(store, *arguments, **options), AsyncSession)

    return begin


class AsyncSwarmDB(_Worked):
    """`SwarmDB` for asyncio: each of its methods, awaited, with the same parameters, answers and errors.

    The work is done by as many worker threads as *pool_size* says, which belong to this object. It is opened by
    ``async with`` or by its first call, and may be used by any number of tasks, and by several event loops. An opening
    that fails is tried again by the next call.

    A task that is cancelled while it awaits a call goes on when the call's fate is decided: what the call was to write
    is written as a whole, or not at all, and nothing of it is written later. Which of the two it was, the task has to
    look up. Calls that are made of several transactions, such as `mark_stale_agents`, stop between two of them. What
    waits for a lock, or works for long, is interrupted, so that this is soon; but not a copy that `backup` makes, nor,
    on SQLite, a statement inside a transaction, nor anything on the caller's own *engine*: those are waited for.

    A transaction has one worker for itself, and belongs to the task that entered it. Tasks that are started inside are
    not part of it. Its end is not interrupted: cancelled there, the block has ended as it would, and then the
    cancellation is raised. While transactions have all workers, other calls wait, for *busy_timeout* at most, and
    raise `BusyError` then: so does a task that awaits, inside its transaction, another task's call that needs its
    worker.

    An iteration begins with its first step: that is where its parameters are checked, and where `watch_events` begins
    by default. A step of `watch_events` that is cancelled loses no event, and the next step goes on; a cancelled
    `iter_events` is over. What `track_task` and `track_agent` record, they record even if they are cancelled again
    meanwhile.

    Examples:
        >>> import asyncio
        >>> async def main() -> None:
        ...     async with AsyncSwarmDB(":memory:") as db:
        ...         await db.register_agent("agent-1", "expert-backend")
        ...         print((await db.update_agent_status("agent-1", "running")).status)
        >>> asyncio.run(main())
        running
    """

    @_opening(SwarmDB.__init__)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take what `SwarmDB` takes. Nothing is opened yet, so the errors come up where it is.

        *pool_size* is also the number of worker threads, whatever the database.
        """
        super().__init__(arguments, options)

    async def close(self) -> None:
        """Wait for what is under way, open transactions as well, and close the database. Later calls are refused.

        A second call waits as well. One that is cancelled stops waiting, and the database is closed when all has ended.

        Raises:
            TransactionError: Inside a transaction of this task, which would wait for itself.
        """
        if self._own_pin() is not None:
            raise TransactionError("close() can't run inside a transaction of the same task")
        job = Job(self._shut)
        threading.Thread(target=job.run, name="swarmdb-close").start()
        self._is_closed = True
        await job.look_on()

    async def __aenter__(self) -> Self:
        """Open the database. If that fails, this object is closed."""
        try:
            await self._do(lambda _: None)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the database."""
        await self.close()

    # Events
    insert_event = _awaited(SwarmDB.insert_event)
    insert_events = _awaited(SwarmDB.insert_events)
    get_events = _awaited(SwarmDB.get_events)
    iter_events = _iterated(SwarmDB.iter_events)
    watch_events = _watched(SwarmDB.watch_events)

    # Agents
    register_agent = _awaited(SwarmDB.register_agent)
    update_agent_status = _awaited(SwarmDB.update_agent_status)
    get_agent = _awaited(SwarmDB.get_agent)
    get_active_agents = _awaited(SwarmDB.get_active_agents)
    list_agents = _awaited(SwarmDB.list_agents)
    delete_agent = _awaited(SwarmDB.delete_agent)
    heartbeat = _awaited(SwarmDB.heartbeat)
    find_stale_agents = _awaited(SwarmDB.find_stale_agents)
    mark_stale_agents = _awaited(SwarmDB.mark_stale_agents)
    track_agent = _agent_tracked(SwarmDB.track_agent)
    track_task = _task_tracked(SwarmDB.track_task)

    # Memory
    store_memory = _awaited(SwarmDB.store_memory)
    get_memory = _awaited(SwarmDB.get_memory)
    list_memories = _awaited(SwarmDB.list_memories)
    memory_history = _awaited(SwarmDB.memory_history)
    delete_memory = _awaited(SwarmDB.delete_memory)

    # Metrics
    store_task_metric = _awaited(SwarmDB.store_task_metric)
    store_task_metrics = _awaited(SwarmDB.store_task_metrics)
    store_agent_metric = _awaited(SwarmDB.store_agent_metric)
    store_agent_metrics = _awaited(SwarmDB.store_agent_metrics)
    store_swarm_metric = _awaited(SwarmDB.store_swarm_metric)
    store_swarm_metrics = _awaited(SwarmDB.store_swarm_metrics)
    get_task_metrics = _awaited(SwarmDB.get_task_metrics)
    get_agent_metrics = _awaited(SwarmDB.get_agent_metrics)
    get_swarm_metrics = _awaited(SwarmDB.get_swarm_metrics)
    summarize_tasks = _awaited(SwarmDB.summarize_tasks)
    summarize_agents = _awaited(SwarmDB.summarize_agents)
    metric_series = _awaited(SwarmDB.metric_series)
    summarize_swarm = _awaited(SwarmDB.summarize_swarm)

    # Transactions
    transaction = _transaction(SwarmDB.transaction)
    session = _session(SwarmDB.session)

    # Maintenance
    cleanup = _awaited(SwarmDB.cleanup)
    cleanup_old_events = _awaited(SwarmDB.cleanup_old_events)
    vacuum = _awaited(SwarmDB.vacuum)
    backup = _awaited(SwarmDB.backup)
    check = _awaited(SwarmDB.check)
    size_bytes = _awaited(SwarmDB.size_bytes)

    @property
    def schema_version(self) -> Awaitable[str]:
        """`SwarmDB.schema_version`, to be awaited."""
        return self._do(lambda store: store.schema_version)

    @property
    def retention(self) -> Awaitable[RetentionPolicy]:
        """`SwarmDB.retention`, to be awaited."""
        return self._do(lambda store: store.retention)

    @property
    def last_cleanup(self) -> Awaitable[datetime | None]:
        """`SwarmDB.last_cleanup`, to be awaited."""
        return self._do(lambda store: store.last_cleanup)

    @property
    def db_path(self) -> Path:
        """The database's file, as an absolute path.

        Raises:
            StorageError: If the database is in memory, or on a server, or has not been opened yet.
        """
        if self._db is None:
            raise StorageError("the database has not been opened yet: use `async with`, or await a call first")
        return self._db.db_path
