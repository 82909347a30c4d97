"""SQLite connections that wait for others in small portions, so that whoever waits can be told to stop."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

#: How long SQLite itself waits at a time, in seconds. A statement that waits notices within this that it is to stop.
PORTION = 0.05

#: After how many steps of SQLite's machine a statement asks whether it is to go on: a few milliseconds of work.
_STEPS = 100_000

_BREATH = 0.001

_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


class PatientCursor(sqlite3.Cursor):
    """A cursor that goes on waiting for a lock for as long as its connection has patience."""

    def execute(self, sql: str, parameters: Any = (), /) -> "PatientCursor":
        """Run a statement, and wait for whoever has the lock that it needs."""
        try:
            super().execute(sql, parameters)
        except sqlite3.OperationalError as error:
            connection = self.connection
            assert isinstance(connection, PatientConnection)
            if not (_is_busy(error) and connection.has_patience):
                raise
            self._wait(connection, sql, parameters)
        return self

    def _wait(self, connection: "PatientConnection", sql: str, parameters: Any) -> None:
        deadline = time.monotonic() + connection.patience
        while True:
            time.sleep(_BREATH)  # Of a database in memory, SQLite waits for nobody.
            try:
                super().execute(sql, parameters)
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline or not connection.may_go_on():
                    raise
            else:
                return


def _is_busy(error: sqlite3.OperationalError) -> bool:
    # A statement that waited for a lock in vain has done nothing, and may be tried again.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _BUSY


class PatientConnection(sqlite3.Connection):
    """A connection whose statements can be told to stop, whether they wait or work."""

    #: How long a statement waits for a lock at most, in seconds.
    patience: ClassVar[float]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.has_patience = True
        self.set_progress_handler(self._is_to_stop, _STEPS)

    def may_go_on(self) -> bool:
        """Whether the statement under way in this thread is to go on."""
        return True

    def _is_to_stop(self) -> bool:
        return not self.may_go_on()

    def cursor(self, factory: Any = PatientCursor) -> Any:
        """Return a new cursor."""
        return super().cursor(factory)

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        """Run a statement on a new cursor, and return that."""
        return self.cursor().execute(sql, parameters)

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Wait for nobody inside the block."""
        self.has_patience = False
        try:
            yield
        finally:
            self.has_patience = True


def patient_connections(patience: float, may_go_on: Callable[[], bool]) -> type[PatientConnection]:
    """Return a class of connections that wait for so many seconds, as long as *may_go_on* says so."""
    members = {"patience": patience, "may_go_on": lambda _: may_go_on()}
    return type("PatientConnection", (PatientConnection,), members)
