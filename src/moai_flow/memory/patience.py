"""Statements that can be told to stop when nobody waits for them any more."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Interrupts:
    """Who may end statements, asked in the threads that run them.

    Attributes:
        may_go_on: Whether what the thread does is still wanted.
        begins: Takes how another thread may cancel the statement that is about to run, and says whether to run it. How:
            a function that returns once no later statement can be hit, and whether that is certain.
        ends: Waits for whoever is cancelling the statement, and says whether no later one can be hit.
    """

    may_go_on: Callable[[], bool]
    begins: Callable[[Callable[[], bool]], bool]
    ends: Callable[[], bool]


_REASON = "nobody waits for this statement any more"

#: What ends things, or sets a connection back as it was: it is quick, and has to be done.
_ALWAYS = ("ROLLBACK", "RELEASE", "PRAGMA")


# SQLite

#: How long SQLite itself waits at a time, in seconds. A statement that waits notices within this that it is to stop.
PORTION = 0.05

#: After how many steps of SQLite's machine a statement asks whether it is to go on: a few milliseconds of work.
_STEPS = 100_000

_BREATH = 0.001


class PatientCursor(sqlite3.Cursor):
    """A cursor that goes on waiting for a lock for as long as its connection has patience."""

    connection: "PatientConnection"

    def execute(self, sql: str, parameters: Any = (), /) -> "PatientCursor":
        """Run a statement, and wait for whoever has the lock that it needs."""
        if not self.connection.may_go_on() and not sql.startswith(_ALWAYS):
            raise interruption()
        try:
            super().execute(sql, parameters)
        except sqlite3.OperationalError as error:
            self.connection.wait(error, lambda: super(PatientCursor, self).execute(sql, parameters))
        return self


def interruption() -> sqlite3.OperationalError:
    """Return the error of a statement that was told to stop, as SQLite raises it."""
    error = sqlite3.OperationalError(_REASON)
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_INTERRUPT, "SQLITE_INTERRUPT"
    return error


def _can_be_tried_again(error: sqlite3.OperationalError) -> bool:
    # A statement that waited for a lock in vain has done nothing. Only a snapshot that is out of date never helps.
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY and code != sqlite3.SQLITE_BUSY_SNAPSHOT


class PatientConnection(sqlite3.Connection):
    """A connection whose statements can be told to stop, whether they wait or work."""

    #: How long a statement waits for a lock at most, in seconds.
    patience: ClassVar[float]

    @staticmethod
    def may_go_on() -> bool:
        """Whether the statement under way in this thread is to go on."""
        return True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._has_patience = True
        may_go_on = self.may_go_on
        self.set_progress_handler(lambda: not may_go_on(), _STEPS)

    def cursor(self, factory: Any = PatientCursor) -> Any:
        """Return a new cursor."""
        return super().cursor(factory)

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        """Run a statement on a new cursor, and return that."""
        return self.cursor().execute(sql, parameters)

    def commit(self) -> None:
        """Commit, and wait for the readers of a database that can't be read while it is written."""
        try:
            super().commit()
        except sqlite3.OperationalError as error:
            self.wait(error, super().commit)

    def wait(self, error: sqlite3.OperationalError, attempt: Callable[[], object]) -> None:
        """Try again what failed with *error*, if that was because of a lock, until it succeeds."""
        deadline = time.monotonic() + (self.patience if self._has_patience else 0)
        try:
            while _can_be_tried_again(error) and time.monotonic() < deadline:
                if not self.may_go_on():
                    raise interruption() from error
                time.sleep(_BREATH)
                try:
                    attempt()
                except sqlite3.OperationalError as again:
                    error = again
                else:
                    return
            raise error
        finally:
            del error  # Its traceback has this frame.

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Wait for nobody inside the block."""
        self._has_patience = False
        try:
            yield
        finally:
            self._has_patience = True


def patient_connections(patience: float, interrupts: Interrupts) -> type[PatientConnection]:
    """Return a class of connections that wait for so many seconds, as long as they may."""
    members = {"patience": patience, "may_go_on": staticmethod(interrupts.may_go_on)}
    return type("PatientConnection", (PatientConnection,), members)


# PostgreSQL

#: How long to try to tell the server that a statement is to stop, in seconds.
_LONGEST_CANCELLING = 5.0


def patient_cursors(interrupts: Interrupts) -> tuple[type[Any], type[Any]]:
    """Return the classes of psycopg's cursors, usual and on the server, whose statements can be cancelled."""
    from psycopg import Cursor, Error, ServerCursor  # Whoever connects to a server has imported psycopg.
    from psycopg.errors import QueryCanceled

    class Stoppable:
        connection: Any

        def stoppable(self, run: Callable[[], T]) -> T:
            if not interrupts.begins(self._cancel):
                raise QueryCanceled(_REASON)
            try:
                return run()
            finally:
                if not interrupts.ends():
                    self.connection.close()  # What comes late hits nobody.

        def _cancel(self) -> bool:
            try:
                self.connection.cancel_safe(timeout=_LONGEST_CANCELLING)
            except Error:
                return False
            return True

    class Patient(Stoppable, Cursor[Any]):
        def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(query, str) and query.startswith(_QUICK):
                if query.startswith("SAVEPOINT") and not interrupts.may_go_on():
                    raise QueryCanceled(_REASON)
                return super().execute(query, *arguments, **options)
            execute = super().execute
            return self.stoppable(lambda: execute(query, *arguments, **options))

        def executemany(self, query: Any, *arguments: Any, **options: Any) -> None:
            executemany = super().executemany
            self.stoppable(lambda: executemany(query, *arguments, **options))

    class PatientOnServer(Stoppable, ServerCursor[Any]):
        def fetchmany(self, size: int = 0) -> list[Any]:
            fetchmany = super().fetchmany
            return self.stoppable(lambda: fetchmany(size))

    return Patient, PatientOnServer


#: What the driver need not tell how to cancel.
_QUICK = ("SAVEPOINT", *_ALWAYS)
