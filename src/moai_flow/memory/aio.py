"""The facade for asyncio: the same calls, awaited, done by worker threads so that the event loop never waits."""

import asyncio
import inspect
import threading
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
from moai_flow.memory.scope import RawConnection, RawCursor
from moai_flow.memory.tracking import TrackedAgent, TrackedTask
from moai_flow.memory.workers import Job, Pinned, Workers, may_go_on

P = ParamSpec("P")
T = TypeVar("T")
Q = TypeVar("Q")

#: How many rows an iteration reads ahead.
_READ_AHEAD = 100

_POOL_SIZE: int = inspect.signature(SwarmDB.__init__).parameters["pool_size"].default


class _WorkersDB(SwarmDB):
    """A database whose statements end when nobody waits for them any more."""

    def _adapted(self, settings: Settings) -> Settings:
        return replace(settings, may_go_on=may_go_on)


class _Worked:
    """What `AsyncSwarmDB` is made of: the database, the workers, and who has a transaction open."""

    def __init__(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        inspect.signature(SwarmDB).bind(*arguments, **options)
        pool_size = options.get("pool_size", _POOL_SIZE)
        self._open = partial(_WorkersDB, *arguments, **options)
        # A size that is none is refused where the database is opened.
        self._workers = Workers(pool_size if type(pool_size) is int and pool_size > 0 else 1)
        self._pinned: dict[asyncio.Task[Any] | None, Pinned] = {}
        self._opening = threading.Lock()
        self._db: SwarmDB | None = None
        self._is_closed = False

    def _database(self) -> SwarmDB:
        """Return the database, in a worker; the first one opens it."""
        if self._db is None:
            with self._opening:
                if self._db is None:
                    self._db = self._open()
        return self._db

    def _own_pin(self) -> Pinned | None:
        """Return the worker that has this task's transaction open."""
        return self._pinned.get(asyncio.current_task()) if self._pinned else None

    async def _do(self, work: Callable[[SwarmDB], T]) -> T:
        """Do *work* in this task's transaction, or in whichever worker is free."""
        return await self._submitted(lambda: work(self._database())).wait()

    def _submitted(self, work: Callable[[], T]) -> Job[T]:
        pinned = self._own_pin()
        # What is ended half-way in a transaction takes, on SQLite, the transaction with it.
        job = Job(work, can_be_given_up=pinned is None)
        if pinned is not None:
            pinned.submit(job)
        else:
            self._check_open()
            self._workers.submit(job)
        return job

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"{self!r}: the database was closed before this call")

    def __repr__(self) -> str:
        state = ", closed" if self._is_closed else "" if self._db is not None else ", not open yet"
        where = repr(str(self._db._location)) if self._db is not None else "..."
        return f"AsyncSwarmDB({where}{state})"


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
        return await db._do(lambda store: method(store, *arguments, **options))

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
    async def watch(db: _Worked, /, *arguments: P.args, **options: P.kwargs) -> AsyncIterator[AgentEvent]:
        bound = signature.bind(None, *arguments, **options)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        _refuse_to_watch(db)
        what, place = await db._do(lambda store: store._watch(**given))
        while True:
            events, place = await db._do(lambda store, place=place: store._poll(what, place))  # type: ignore[misc]
            for event in events:
                yield event
                _refuse_to_watch(db)
            if place.pause:
                await asyncio.sleep(place.pause)
                _refuse_to_watch(db)

    return watch


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

    def __init__(self, db: _Worked, inner: Q) -> None:
        self._db = db
        self._inner = inner
        self._pin = db._own_pin()

    async def _run(self, work: Callable[[Q], T]) -> T:
        if self._pin is None or self._db._own_pin() is not self._pin:
            raise TransactionError("this belongs to the task that opened the transaction, until the block ends")
        return await self._db._submitted(lambda: work(self._inner)).wait()


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
        wrap: Callable[[_Worked, Q], T],
    ) -> None:
        self._db = db
        self._block = block
        self._wrap = wrap
        self._context: AbstractContextManager[Q] | None = None

    async def __aenter__(self) -> T:
        if self._context is not None:
            raise RuntimeError("a transaction is entered once; each block needs one of its own")
        task = asyncio.current_task()
        pinned = self._db._pinned.get(task)
        if pinned is None:
            self._db._check_open()
            pinned = self._db._pinned[task] = self._db._workers.pin()
        self._task, self._pin = task, pinned
        pinned.depth += 1
        job = Job(self._enter, can_be_given_up=pinned.depth == 1)
        pinned.submit(job)
        try:
            return self._wrap(self._db, await job.wait())
        except BaseException:
            if job.has_ended and job.error is None:  # It was entered when its task was cancelled.
                await self._leave(_Undo)
            self._release()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._leave(None if error is None else _Undo)
        finally:
            self._release()

    def _enter(self) -> Q:
        self._context = self._block(self._db._database())
        return self._context.__enter__()

    async def _leave(self, kind: "type[_Undo] | None") -> None:
        def leave() -> None:
            assert self._context is not None
            error = None if kind is None else kind()
            with suppress(_Undo):
                self._context.__exit__(kind, error, None)

        job = Job(leave, can_be_given_up=False)
        self._pin.submit(job)
        await job.wait_to_the_end()

    def _release(self) -> None:
        self._pin.depth -= 1
        if not self._pin.depth:
            del self._db._pinned[self._task]
            self._pin.release()


class _Undo(Exception):  # noqa: N818 (it is no error, and nobody sees it)
    """Stands in a worker for the exception by which a task has left its block."""


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


class _Tracking(AbstractAsyncContextManager[T], Generic[Q, T]):
    """A block that is measured, and recorded in a worker."""

    def __init__(
        self, db: _Worked, make: Callable[[SwarmDB], AbstractContextManager[Q]], wrap: Callable[[_Worked, Q], T]
    ) -> None:
        self._db = db
        self._make = make
        self._wrap = wrap
        self._tracked: AbstractContextManager[Q] | None = None

    async def __aenter__(self) -> T:
        if self._tracked is not None:
            raise RuntimeError("a tracked block is entered once; each needs one of its own")
        job = self._db._submitted(self._enter)
        try:
            return self._wrap(self._db, await job.wait())
        except BaseException as error:
            if job.has_ended and job.error is None:  # It was entered when its task was cancelled.
                await self.__aexit__(type(error), error, error.__traceback__)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tracked = self._tracked
        assert tracked is not None
        pinned = self._db._own_pin()
        job: Job[Any] = Job(lambda: tracked.__exit__(kind, error, traceback), can_be_given_up=False)
        if pinned is not None:
            pinned.submit(job)
        else:
            self._db._workers.submit(job)
        await job.wait_to_the_end()

    def _enter(self) -> Q:
        self._tracked = self._make(self._db._database())
        return self._tracked.__enter__()


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
    ``async with`` or by its first call, and may be used by any number of tasks.

    A task that is cancelled while it awaits a call goes on when the call's fate is decided: what the call was to write
    is written as a whole, or not at all, and nothing of it is written later.

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

        A second call does nothing.

        Raises:
            TransactionError: Inside a transaction of this task, which would wait for itself.
        """
        if self._own_pin() is not None:
            raise TransactionError("close() can't run inside a transaction of the same task")
        was_closed, self._is_closed = self._is_closed, True
        await self._workers.close()
        if not was_closed and self._db is not None:
            job = Job(self._db.close)
            threading.Thread(target=job.run, name="swarmdb-close").start()
            await job.wait_to_the_end()

    async def __aenter__(self) -> Self:
        """Open the database."""
        await self._do(lambda _: None)
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
