"""Who holds which connection: a stack of idle ones, one pinned for each thread that asks, none across a fork."""

import os
import sqlite3
import sys
import threading
import time
import weakref
from asyncio import CancelledError
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from moai_flow.memory import forks
from moai_flow.memory.backends import Backend, SQLite, backend_of, translated
from moai_flow.memory.engine import LOG_LIMIT_MIB, Location, check_file_of_log, locate, log_bytes
from moai_flow.memory.errors import BusyError, ClosedError, StorageError
from moai_flow.memory.files import PRIVATE, OpenedFile, companions, identity_of, make_file, put_in_place
from moai_flow.memory.patience import PatientConnection, interruption


class Held:
    """An open connection: SQLAlchemy's, and the driver's underneath it."""

    __slots__ = (
        "__weakref__",
        "backend",
        "connection",
        "given_back",
        "is_in_batch",
        "is_left",
        "is_pinned",
        "permit",
        "raw",
        "usual",
    )

    def __init__(self, connection: Connection, backend: Backend) -> None:
        self.connection = connection
        self.backend = backend
        self.raw: Any = connection.connection.driver_connection
        self.usual = backend.usual(self.raw)
        self.given_back = 0.0
        self.permit: Permit | None = None
        self.is_pinned = False
        self.is_left = False
        self.is_in_batch = False

    @property
    def is_open(self) -> bool:
        """Whether it can be used: who was handed the driver's may have closed it, or a batch not have ended."""
        return not self.is_in_batch and self.backend.is_open(self.raw)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open on it, that can be gone on with."""
        return not self.is_in_batch and self.backend.in_transaction(self.raw)

    def batch_begins(self) -> None:
        """Note that a batch is sent: interrupted in it, the connection is not used any more."""
        self.is_in_batch = self.backend.sends_ahead

    def batch_ends(self) -> None:
        """Note that a batch has been done, or failed, if every answer to it has come."""
        self.is_in_batch = False
        self.look_for_batch()

    def look_for_batch(self) -> None:
        """Note a batch that did not end: who was handed the driver's connection may have been interrupted in one."""
        if not self.backend.is_in_step(self.raw):
            self.is_in_batch = True

    def release(self) -> None:
        """Let another connection be opened beside this one, where their number is limited."""
        if self.permit is not None:
            self.permit.give_back()

    def close(self) -> None:
        """Give it back to the engine's pool."""
        self.connection.close()

    def discard(self) -> None:
        """Close it for good, whatever state it is in; what it had not committed is rolled back."""
        self.backend.close(self.raw)  # First: SQLAlchemy, interrupted, may leave it open.
        # It is closed, whatever else fails at that: SQLAlchemy, interrupted before, even at an assertion of its own.
        with suppress(*self.backend.error, SQLAlchemyError, AssertionError):
            self.connection.invalidate()
            self.connection.close()


class Pinned:
    """A connection that belongs to one thread, in the driver's own implicit transaction mode.

    When the thread dies, its locals die, and this with them: what was not committed is rolled back, and the connection
    is closed rather than reused, since somebody may still hold it.
    """

    def __init__(self, held: Held, connections: "Connections") -> None:
        self.held = held
        self._connections = connections
        self._process = os.getpid()
        held.is_pinned = True
        held.backend.lend(held.raw)

    def __del__(self) -> None:
        if self._process == os.getpid():
            self._connections.discard(self.held)


class _Local(threading.local):
    """What one thread has open. It is made when the thread first asks, and dies with the thread."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []  # The blocks of `scope`, outermost first.
        self.pinned: Pinned | None = None


@dataclass(frozen=True)
class Limit:
    """How much of a server one `Connections` may use.

    Attributes:
        connections: How many connections may be open at once.
        patience: How long to wait for one of them, in seconds.
    """

    connections: int
    patience: float


#: How long a connection to a server is taken to be alive without asking, in seconds.
_TRUSTED = 5.0


#: After how many uses of connections the log's size is looked at.
_LOOK_AFTER = 250

#: How soon a cut of the log may be tried again, in seconds; twice as long after each that failed, up to the longest.
_CUT_AGAIN_AFTER, _CUT_AGAIN_AT_LAST = 1.0, 120.0

#: For how long a cut of the log keeps writers waiting for readers, in seconds.
_READERS_WAITED_FOR = 0.2


class Permit:
    """Leave to have one of a limited number of connections, until it is given back, or nobody has it any more."""

    def __init__(self, permits: "Permits") -> None:
        self._permits = permits

    def give_back(self) -> None:
        """Let another have it. A second call does nothing."""
        self._permits.take_back(self)


class Permits:
    """So many permits as a server is to be asked for connections.

    Those that somebody has are what is counted: an interrupt, wherever it comes, can neither lose one nor add one.
    """

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self._given: weakref.WeakSet[Permit] = weakref.WeakSet()
        self._changed = threading.Condition()

    def take(self) -> Permit | None:
        """Return a permit, or None if there is none for longer than the limit's patience."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._given) < self.limit.connections, self.limit.patience):
                return None
            permit = Permit(self)
            self._given.add(permit)
            return permit

    def take_back(self, permit: Permit) -> None:
        """Let another have *permit*."""
        with self._changed:
            self._given.discard(permit)
            self._changed.notify()


class Connections:
    """The open connections of one engine."""

    def __init__(
        self,
        engine: Engine,
        where: str,
        *,
        kept: int,
        file: Path | None = None,
        watched: bool = False,
        anchored: bool = False,
        limit: "Limit | None" = None,
        log_of: Location | None = None,
    ) -> None:
        """Use *engine*.

        Args:
            engine: Where connections come from.
            where: What errors call the database.
            kept: How many idle connections stay open, though more may be in use at once.
            file: The database's file, if it has one.
            watched: Whether no call uses the connections any more once another file is there, and the log is kept from
                growing. Of a caller's engine, that is the caller's affair.
            anchored: Whether one more stays open throughout, since the database is in memory and would vanish.
            limit: How many may be open at once, for a database on a server; None for any number.
            log_of: The file that is not opened without its content, but with its log; None if there is no file.

        Raises:
            StorageError: If the database can't be opened.
        """
        self.where = where
        self.local = _Local()
        self.closed = False
        self._engine = engine
        self._backend = backend_of(engine.dialect)
        # Set on the engine, autocommit costs nothing a call; set on each connection, it would.
        self._source = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._kept = kept
        self._limit = limit
        self._permits = None if limit is None else Permits(limit)
        self._log_of = log_of
        self._uses = 0
        self._may_cut_from = 0.0
        self._cut_again_after = _CUT_AGAIN_AFTER
        self._path = file
        self._watched = watched
        self._file: OpenedFile | None = None
        self._idle: list[Held] = []
        self._open: weakref.WeakSet[Held] = weakref.WeakSet()
        self._opening: set[int] = set()  # The threads that are about to have one.
        self._pool_may_be_open = file is not None and not watched  # A caller's; else there is none.
        self._anchor = self._connect() if anchored else None
        _instances.add(self)
        forks.concern(self)

    def check_open(self) -> None:
        """Raise `ClosedError` after `close`."""
        if self.closed:
            raise ClosedError(f"{self.where}: the database was closed before this call")

    def check_file(self) -> None:
        """Raise `StorageError` if the file is not the one any more that was opened; it is looked at once a second."""
        if self._file is not None:
            self._file.check()

    def take(self) -> Held:
        """Return a connection that nobody else uses until it is given back.

        Raises:
            BusyError: If others use as many as the limit allows, for longer than it says.
            ClosedError: After `close`.
            StorageError: If the database can't be opened, or its file is not the one any more that was opened.
        """
        if self.closed:
            self.check_open()
        if self._permits is not None:
            return self._take_permitted(self._permits)
        if forks.under_way:
            forks.wait()
        self.check_file()
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def give(self, held: Held) -> None:
        """Take back a connection with no transaction open on it. One that was lost takes the idle ones with it."""
        if held.is_left:
            raise forks.refusal(self.where)
        if is_interrupted() or not self._backend.is_idle(held.raw):
            # Interrupted, it may be in the middle of a statement, or not be set as others expect it.
            is_lost = not held.is_open
            self.discard(held)
            if is_lost:
                self._drain()  # Who made this one close has made them close as well.
            return
        self._uses += 1  # Threads may lose one of theirs, which does no harm.
        if self._uses >= _LOOK_AFTER:
            self._uses = 0
            if self._log_of is not None and self._watched:
                self._cut_log(held, self._log_of)
        permit, held.permit = held.permit, None  # Once it is idle, it is another's.
        if permit is not None:
            held.given_back = time.monotonic()
        if len(self._idle) >= self._kept:
            held.close()
        else:
            self._idle.append(held)
            if self.closed:
                self._drain()  # It was closed meanwhile, perhaps by a thread that did not see this connection.
        if permit is not None:
            permit.give_back()

    def discard(self, held: Held) -> None:
        """Close a connection that was taken for good, whatever state it is in."""
        if held.is_left:  # It is the parent's, and to close it here would undo what that is writing.
            return
        try:
            held.discard()
        finally:
            held.release()

    def pinned(self) -> Any:
        """Return this thread's own driver connection, the same at each call.

        Raises:
            ClosedError: After `close`.
            StorageError: If the database can't be opened.
        """
        self.check_open()
        self.check_file()
        if self.local.pinned is None or not self.local.pinned.held.is_open:
            self.local.pinned = None  # It was closed, by its user or by the server.
            held = self.take()
            held.release()  # It is for as long as the thread lives, and what waits for a permit waits for a call.
            self.local.pinned = Pinned(held, self)
        return self.local.pinned.held.raw

    def has_open(self, path: Path) -> bool:
        """Whether one of them, idle or in use, is open to this file."""
        return (
            self._path is not None
            and self._path.resolve() == path
            and any(held.is_open for held in forks.those_in(self._open))
        )

    def close(self) -> None:
        """Close what is idle, and this thread's own; what others use is closed when they are done with it."""
        self.closed = True
        self.local.pinned = None
        self._drain()
        if self._anchor is not None:
            self._anchor.close()

    def is_in_use_elsewhere(self) -> bool:
        """Whether another thread has a connection in use, which it will give back; not where this one has one too."""
        # A server's have no part in it: connections of the child's own lock by themselves.
        if self._path is None and self._anchor is None:
            return False
        if self.local.blocks:  # The child is refused in any case, and the others may be waiting for this thread.
            return False
        return bool(self._opening) or any(
            held.is_open and not held.is_pinned and held is not self._anchor for held in forks.those_in(self._open)
        )

    def let_go(self) -> None:
        """Close what is idle, before a fork."""
        if self._path is not None or self._anchor is not None:
            self._drain()
        self._pool_may_be_open = self._path is not None and not self._watched  # Until `settle` has closed it.

    def settle(self) -> None:
        """Close what is idle in a caller's pool before a fork. If some of it is in use, the child is refused."""
        if self._path is None or self._watched:
            return
        in_use = getattr(self._engine.pool, "checkedout", None)
        if in_use is None or in_use() == 0:
            self._engine.dispose()
            self._pool_may_be_open = False

    def forget_all(self) -> None:
        """Leave every connection to the parent process. The child opens its own, unless the parent had some in use."""
        import ctypes  # Only a forked child needs it, and it would slow every import of the package.

        if self._path is not None and (
            self._opening or self._pool_may_be_open or any(held.is_open for held in self._open)
        ):
            forks.leave_to_parent(identity_of(self._path) if self._file is None else self._file.identity)
        for held in self._open:
            held.is_left = True
            # Closing an inherited connection, as deallocation would, may undo what the parent is writing:
            # https://sqlite.org/howtocorrupt.html#_carrying_an_open_database_file_across_a_fork_
            # So would SQLAlchemy, when it finds that nobody has the connection any more.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
        self._open = weakref.WeakSet()
        self._opening = set()
        self._idle = []
        if self._limit is not None:
            self._permits = Permits(self._limit)
        self.local = _Local()
        self._engine.dispose(close=False)

    def _cut_log(self, held: Held, location: Location) -> None:
        """Begin a log again that has grown since there is always somebody who reads from it.

        SQLite itself only does so in a moment when nobody does.
        """
        now = time.monotonic()
        if now < self._may_cut_from or (log_bytes(location) or 0) <= 2 * LOG_LIMIT_MIB * 1024 * 1024:
            return
        self._may_cut_from = now + self._cut_again_after
        try:
            with SQLite.impatient(held.raw, _READERS_WAITED_FOR):
                (is_kept, *_) = held.raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error:
            is_kept = True  # The call that this is part of has done what it should. A later one tries again.
        except BaseException:
            self.discard(held)
            raise
        # Beside a long reader, it must not keep writers waiting again and again.
        longer = min(self._cut_again_after * 2, _CUT_AGAIN_AT_LAST)
        self._cut_again_after = longer if is_kept else _CUT_AGAIN_AFTER

    def _take_permitted(self, permits: Permits) -> Held:
        permit = permits.take()
        if permit is None:
            raise BusyError(
                f"{self.where}: others used all {permits.limit.connections} connections of the pool for longer than "
                "the busy timeout"
            )
        try:
            self.check_open()
            held = self._alive() or self._connect()
            held.permit = permit
        except BaseException:
            permit.give_back()  # The error's traceback would keep it.
            raise
        return held

    def _alive(self) -> Held | None:
        while True:
            try:
                held = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - held.given_back < _TRUSTED or self._answers(held):
                return held
            held.discard()

    def _answers(self, held: Held) -> bool:
        try:
            held.raw.execute("SELECT 1")
        except self._backend.error:
            return False
        return True

    def _connect(self) -> Held:
        if self._path is not None:
            forks.check(self._path, self.where)
        if self._log_of is not None:
            check_file_of_log(self._log_of)
        try:
            self._opening.add(threading.get_ident())
            held = Held(self._source.connect(), self._backend)
            self._open.add(held)
        except (SQLAlchemyError, UnicodeDecodeError) as error:
            raise translated(error, self.where) from error
        finally:
            self._opening.discard(threading.get_ident())
        if self._path is not None and self._watched:
            try:
                self._know(self._path)
            except StorageError:
                held.discard()
                raise
        return held

    def _know(self, path: Path) -> None:
        """Have all connections lead to one file: the one that the first of them opened."""
        if self._file is None:
            self._file = OpenedFile(path)
        else:
            self._file.check(now=True)

    def _drain(self) -> None:
        # Not by a loop over the list: another thread may take from it, or add to it, meanwhile.
        while True:
            try:
                held = self._idle.pop()
            except IndexError:
                return
            held.close()


def copy_to(raw: sqlite3.Connection, target: Path, mode: int, *, overwrite: bool = False) -> None:
    """Copy the database behind *raw* into a file of this *mode*, which appears when it is complete.

    Raises:
        FileExistsError: If there is something at *target*, and *overwrite* is not set.
        sqlite3.Error: If the database can't be read, or the copy can't be written.
        OSError: If the copy can't take its place.
        BusyError: If a writer keeps what is in memory for longer than the busy timeout.
        StorageError: If *target* was emptied or removed while its log is there.
    """
    check_file_of_log(locate(target, None))
    unfinished = target.with_name(f"{target.name}.{uuid4().hex}.tmp")
    (milliseconds,) = raw.execute("PRAGMA busy_timeout").fetchone()
    patience = raw.patience if isinstance(raw, PatientConnection) else milliseconds / 1000
    deadline = time.monotonic() + patience

    def give_up(status: int, remaining: int, total: int) -> None:
        # By itself, it tries for ever.
        if isinstance(raw, PatientConnection) and not raw.may_go_on():
            raise interruption()
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > deadline:
            raise BusyError(f"{target}: a writer kept the database from being copied for longer than the busy timeout")

    try:
        make_file(unfinished, mode | PRIVATE)
        with closing(sqlite3.connect(unfinished)) as copy:
            raw.backup(copy, progress=give_up)
        if mode | PRIVATE != mode:
            unfinished.chmod(mode)  # Only now: SQLite opens the file anew for each copy.
        if overwrite or not target.exists():
            log, index, journal = companions(target)  # Another database's: SQLite would play them into this one.
            for leftover in (log, index, journal) if overwrite else (journal,):  # A log of no file is empty here.
                leftover.unlink(missing_ok=True)
        put_in_place(unfinished, target, overwrite=overwrite)
    finally:
        for leftover in (unfinished, *companions(unfinished)):
            with suppress(OSError):
                leftover.unlink()


def is_interrupted() -> bool:
    """Whether an interrupt, such as ctrl-C, is under way in this thread."""
    return not isinstance(sys.exception(), _NO_INTERRUPT)


#: The latter two come up where a generator yields, or a coroutine awaits: in the middle of nothing that is done here.
_NO_INTERRUPT = (type(None), Exception, GeneratorExit, CancelledError)

_instances: weakref.WeakSet[Connections] = weakref.WeakSet()


def is_open_here(path: Path) -> bool:
    """Whether this process has a connection to a database's file, of whatever `SwarmDB`. *path* leads to it itself."""
    return any(connections.has_open(path) for connections in forks.those_in(_instances))
