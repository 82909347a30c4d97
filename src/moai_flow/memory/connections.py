"""Who holds which connection: a stack of idle ones, one pinned for each thread that asks, none across a fork."""

import os
import sqlite3
import threading
import time
import weakref
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from moai_flow.memory.errors import BusyError, ClosedError
from moai_flow.memory.statements import translated


class Held:
    """An open connection: SQLAlchemy's, and the driver's underneath it."""

    __slots__ = ("__weakref__", "connection", "raw")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.raw: Any = connection.connection.driver_connection

    @property
    def is_open(self) -> bool:
        """Whether it still is: somebody who was handed the driver's connection may have closed it."""
        try:
            self.raw.total_changes  # noqa: B018 (the one attribute that says so without a statement)
        except sqlite3.ProgrammingError:
            return False
        return True

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open on it."""
        return self.is_open and bool(self.raw.in_transaction)

    def close(self) -> None:
        """Give it back to the engine's pool."""
        self.connection.close()

    def discard(self) -> None:
        """Close it for good, whatever state it is in; what it had not committed is rolled back."""
        self.connection.invalidate()
        self.connection.close()


class Pinned:
    """A connection that belongs to one thread, in the driver's own implicit transaction mode.

    When the thread dies, its locals die, and this with them: what was not committed is rolled back, and the connection
    is closed rather than reused, since somebody may still hold it.
    """

    def __init__(self, held: Held) -> None:
        self.held = held
        self._process = os.getpid()
        held.raw.isolation_level = ""
        held.raw.row_factory = sqlite3.Row

    def __del__(self) -> None:
        if self._process == os.getpid():
            self.held.discard()


class _Local(threading.local):
    """What one thread has open. It is made when the thread first asks, and dies with the thread."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []  # The blocks of `scope`, outermost first.
        self.pinned: Pinned | None = None


class Connections:
    """The open connections of one engine."""

    def __init__(self, engine: Engine, where: str, *, kept: int, anchored: bool = False) -> None:
        """Use *engine*.

        Args:
            engine: Where connections come from.
            where: What errors call the database.
            kept: How many idle connections stay open, though more may be in use at once.
            anchored: Whether one more stays open throughout, since the database is in memory and would vanish.

        Raises:
            StorageError: If the database can't be opened.
        """
        self.where = where
        self.local = _Local()
        self.closed = False
        self._engine = engine
        # Set on the engine, autocommit costs nothing a call; set on each connection, it would.
        self._source = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._kept = kept
        self._idle: list[Held] = []
        self._open: weakref.WeakSet[Held] = weakref.WeakSet()
        self._anchor = self._connect() if anchored else None
        _instances.add(self)

    def check_open(self) -> None:
        """Raise `ClosedError` after `close`."""
        if self.closed:
            raise ClosedError(f"{self.where}: the database was closed before this call")

    def take(self) -> Held:
        """Return a connection that nobody else uses until it is given back.

        Raises:
            ClosedError: After `close`.
            StorageError: If the database can't be opened.
        """
        if self.closed:
            self.check_open()
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def give(self, held: Held) -> None:
        """Take back a connection that is open, with no transaction open on it."""
        if len(self._idle) >= self._kept:
            held.close()
            return
        self._idle.append(held)
        if self.closed:
            self._drain()  # It was closed meanwhile, perhaps by a thread that did not see this connection.

    def pinned(self) -> Any:
        """Return this thread's own driver connection, the same at each call.

        Raises:
            ClosedError: After `close`.
            StorageError: If the database can't be opened.
        """
        self.check_open()
        if self.local.pinned is None or not self.local.pinned.held.is_open:
            self.local.pinned = Pinned(self.take())
        return self.local.pinned.held.raw

    def close(self) -> None:
        """Close what is idle, and this thread's own; what others use is closed when they are done with it."""
        self.closed = True
        self.local.pinned = None
        self._drain()
        if self._anchor is not None:
            self._anchor.close()

    def forget_all(self) -> None:
        """Leave every connection to the parent process. The child opens its own."""
        import ctypes  # Only a forked child needs it, and it would slow every import of the package.

        for held in self._open:
            # Closing an inherited connection, as deallocation would, may undo what the parent is writing:
            # https://sqlite.org/howtocorrupt.html#_carrying_an_open_database_file_across_a_fork_
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held.raw))
        self._open = weakref.WeakSet()
        self._idle = []
        self.local = _Local()
        self._engine.dispose(close=False)

    def _connect(self) -> Held:
        try:
            held = Held(self._source.connect())
        except SQLAlchemyError as error:
            raise translated(error, self.where) from error
        self._open.add(held)
        return held

    def _drain(self) -> None:
        # Not by a loop over the list: another thread may take from it, or add to it, meanwhile.
        while True:
            try:
                held = self._idle.pop()
            except IndexError:
                return
            held.close()


def copy_to(raw: sqlite3.Connection, target: Path) -> None:
    """Copy the database behind *raw* into a file, which appears when it is complete.

    Raises:
        sqlite3.Error: If the database can't be read, or the copy can't be written.
        OSError: If the copy can't take its place.
        BusyError: If a writer keeps what is in memory for longer than the busy timeout.
    """
    unfinished = target.with_name(f"{target.name}.{uuid4().hex}.tmp")
    (patience,) = raw.execute("PRAGMA busy_timeout").fetchone()
    deadline = time.monotonic() + patience / 1000

    def give_up(status: int, remaining: int, total: int) -> None:
        # By itself, it tries for ever.
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > deadline:
            raise BusyError(f"{target}: a writer kept the database from being copied for longer than the busy timeout")

    try:
        with closing(sqlite3.connect(unfinished)) as copy:
            raw.backup(copy, progress=give_up)
        for leftover in ("-wal", "-shm", "-journal"):  # Another database's: SQLite would play them into this one.
            target.with_name(target.name + leftover).unlink(missing_ok=True)
        unfinished.replace(target)
    finally:
        with suppress(OSError):
            unfinished.unlink()


_instances: weakref.WeakSet[Connections] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for connections in _instances:
        connections.forget_all()


# Where there is no fork, there is nothing to register with.
getattr(os, "register_at_fork", dict)(after_in_child=_forget_after_fork)
