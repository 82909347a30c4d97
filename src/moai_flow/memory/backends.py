"""What a driver's connection does, and what its errors mean: the one place that tells SQLite from PostgreSQL."""

import sqlite3
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, ClassVar

from sqlalchemy import Dialect
from sqlalchemy.exc import InvalidRequestError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from moai_flow.memory.errors import BusyError, ConflictError, StorageError, SwarmDBError, TransactionError
from moai_flow.memory.patience import PatientConnection
from moai_flow.memory.types import is_postgresql


class Backend(ABC):
    """How transactions begin and end on a driver's connection, which is in autocommit between them."""

    #: Whether a statement that failed leaves the transaction as it was before it.
    keeps_transactions: ClassVar[bool]

    #: Whether the statements of a batch are sent without waiting for their answers.
    sends_ahead: ClassVar[bool]

    def __init__(self, *errors: type[Exception]) -> None:
        """Take the roots of what the driver raises."""
        self.error = errors

    @abstractmethod
    def is_open(self, raw: Any) -> bool:
        """Whether the connection still is: somebody who was handed it may have closed it, or the server be gone."""

    @abstractmethod
    def in_transaction(self, raw: Any) -> bool:
        """Whether a transaction is open on it."""

    @abstractmethod
    def begin(self, raw: Any, *, readonly: bool, alone: bool, patient: bool = True) -> None:
        """Begin a transaction, and take the write lock where the database has one.

        Args:
            raw: The driver's connection.
            readonly: Whether it only reads.
            alone: Whether what it reads has to stay true until it commits.
            patient: Whether it waits for locks as long as the connection usually does; else for next to no time.
        """

    @abstractmethod
    def begin_reading(self, raw: Any) -> None:
        """From here to the end of the innermost savepoint, show one snapshot, and refuse writes."""

    @abstractmethod
    def end_reading(self, raw: Any, savepoint: str) -> None:
        """Undo `begin_reading`, inside the same *savepoint*."""

    @abstractmethod
    def lend(self, raw: Any) -> None:
        """Set the connection as a caller expects it: in the driver's implicit mode, with the rows that we promise."""

    @abstractmethod
    def take_back(self, raw: Any, usual: Any) -> None:
        """Undo `lend`, what `begin` set, and what its user set on the driver's object, outside any transaction.

        What its user told the database, by PRAGMA or SET, stays. See `usual`.
        """

    def usual(self, raw: Any) -> Any:
        """Return how a connection is when it is new."""
        return None

    @abstractmethod
    def cursor(self, raw: Any) -> Any:
        """Return a cursor whose rows are tuples, whatever the user of the connection wants of theirs."""

    def is_idle(self, raw: Any) -> bool:
        """Whether nothing is under way on the connection, nor is it lost."""
        return True

    def is_in_step(self, raw: Any) -> bool:
        """Whether all that was sent has been answered: else a statement would get the answer to an earlier one."""
        return True

    def close(self, raw: Any) -> None:
        """Close the connection, whatever is under way on it; what it had not committed is rolled back."""
        raw.close()

    @abstractmethod
    def inserted_key(self, cursor: Any) -> int:
        """Return the number that the row got which *cursor* has just inserted."""

    @abstractmethod
    def chunks(self, raw: Any, sql: str, size: int, bound: Sequence[Any] = ()) -> Generator[list[Any], None, None]:
        """Yield the rows of *sql*, so many at a time, without holding all of them. It needs a transaction."""

    @staticmethod
    @abstractmethod
    def reading_leniently(raw: Any) -> AbstractContextManager[None]:
        """Return a context in which values come as text that the driver would refuse to read."""

    @abstractmethod
    def is_undecodable(self, error: Exception) -> bool:
        """Whether *error* says that the driver refused to read a value."""

    @abstractmethod
    def is_missing_savepoint(self, error: BaseException | None) -> bool:
        """Whether *error* says that there is no such savepoint: the transaction that had it was ended."""

    def guarded(self, raw: Any, where: str) -> AbstractContextManager[None]:
        """Return a context in which an error leaves the transaction as it was before; *where* is for its own errors."""
        return nullcontext() if self.keeps_transactions else self.savepoint(raw, where)

    @contextmanager
    def savepoint(self, raw: Any, where: str) -> Iterator[None]:
        """Undo what the block does if it raises; *where* is for errors of the driver."""
        try:
            raw.execute("SAVEPOINT swarmdb_call")
            try:
                yield
            except BaseException:
                with suppress(*self.error):  # The connection may be lost, as the error tells that is under way.
                    raw.execute("ROLLBACK TO SAVEPOINT swarmdb_call")
                    raw.execute("RELEASE SAVEPOINT swarmdb_call")
                raise
            raw.execute("RELEASE SAVEPOINT swarmdb_call")
        except self.error as error:
            raise translated(error, where) from error


class SQLite(Backend):
    """`sqlite3` of the standard library."""

    keeps_transactions = True
    sends_ahead = False

    def is_open(self, raw: Any) -> bool:
        try:
            raw.total_changes  # noqa: B018 (the one attribute that says so without a statement)
        except sqlite3.ProgrammingError:
            return False
        return True

    def in_transaction(self, raw: Any) -> bool:
        return self.is_open(raw) and bool(raw.in_transaction)

    def begin(self, raw: Any, *, readonly: bool, alone: bool, patient: bool = True) -> None:
        if patient:
            raw.execute("BEGIN" if readonly else "BEGIN IMMEDIATE")
            return
        with self.impatient(raw):
            raw.execute("BEGIN IMMEDIATE")

    @staticmethod
    @contextmanager
    def impatient(raw: Any, seconds: float = 0) -> Iterator[None]:
        """Wait for nobody inside the block, or at most for so long."""
        (milliseconds,) = raw.execute("PRAGMA busy_timeout").fetchone()
        raw.execute(f"PRAGMA busy_timeout = {min(milliseconds, round(seconds * 1000)):d}")
        try:
            with raw.impatient() if isinstance(raw, PatientConnection) else nullcontext():
                yield
        finally:
            raw.execute(f"PRAGMA busy_timeout = {milliseconds:d}")

    def begin_reading(self, raw: Any) -> None:
        raw.execute("SELECT 1 FROM sqlite_master").fetchone()  # The first read is what the snapshot shows.
        raw.execute("PRAGMA query_only = ON")

    def end_reading(self, raw: Any, savepoint: str) -> None:
        raw.execute("PRAGMA query_only = OFF")

    def lend(self, raw: Any) -> None:
        # With implicit transactions, a statement after a raw commit() begins a new one, which the end of the block
        # rolls back, instead of committing by itself.
        raw.isolation_level = ""
        raw.row_factory = sqlite3.Row

    def take_back(self, raw: Any, usual: Any) -> None:
        raw.isolation_level = None
        raw.row_factory = None
        raw.text_factory = usual

    def usual(self, raw: Any) -> Any:
        return raw.text_factory

    def close(self, raw: Any) -> None:
        # As long as a statement is under way, which the traceback of an interrupt may hold, SQLite puts off closing,
        # and keeps the lock.
        with suppress(sqlite3.Error):
            raw.rollback()
        raw.close()

    def cursor(self, raw: Any) -> Any:
        cursor = raw.cursor()
        cursor.row_factory = None
        return cursor

    def chunks(self, raw: Any, sql: str, size: int, bound: Sequence[Any] = ()) -> Generator[list[Any], None, None]:
        # Where text is not UTF-8, sqlite3 leaves the statement open, and with it the file.
        with closing(raw.execute(sql, bound)) as cursor:
            while chunk := cursor.fetchmany(size):
                yield chunk

    @staticmethod
    @contextmanager
    def reading_leniently(raw: Any) -> Iterator[None]:
        raw.text_factory = _text_as_it_is
        try:
            yield
        finally:
            raw.text_factory = str

    def is_undecodable(self, error: Exception) -> bool:
        # Text that is not UTF-8 is the one error of sqlite3's own making, so it has no SQLite code.
        return isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlite_errorcode", None) is None

    def is_missing_savepoint(self, error: BaseException | None) -> bool:
        return isinstance(error, sqlite3.OperationalError)

    def inserted_key(self, cursor: Any) -> int:
        key: int = cursor.lastrowid
        return key


def _text_as_it_is(stored: bytes) -> str:
    """Decode a stored text without failing: bytes that are not UTF-8 become lone surrogates."""
    return stored.decode(errors="surrogateescape")


class PostgreSQL(Backend):
    """psycopg 3."""

    keeps_transactions = False
    sends_ahead = True

    def is_open(self, raw: Any) -> bool:
        return not raw.closed

    def in_transaction(self, raw: Any) -> bool:
        return not raw.closed and raw.pgconn.transaction_status != _IDLE

    def begin(self, raw: Any, *, readonly: bool, alone: bool, patient: bool = True) -> None:
        # The next statement begins it. So does one after a raw commit(): the end of the block rolls that back.
        raw.autocommit = False
        raw.read_only = readonly or None  # Where the server's default is to refuse writes, blocks don't override it.
        raw.isolation_level = _REPEATABLE_READ if readonly else _SERIALIZABLE if alone else _READ_COMMITTED
        if not patient:
            raw.execute("SET LOCAL lock_timeout = '50ms'")

    def begin_reading(self, raw: Any) -> None:
        raw.execute("SET TRANSACTION READ ONLY")
        raw.execute("SELECT 1")  # The first query is what the snapshot shows.

    def end_reading(self, raw: Any, savepoint: str) -> None:
        raw.execute(f"ROLLBACK TO SAVEPOINT {savepoint}")

    def lend(self, raw: Any) -> None:
        if raw.autocommit:  # Inside a transaction it can't be set, nor need be.
            raw.autocommit = False

    def usual(self, raw: Any) -> Any:
        return raw.read_only, raw.isolation_level, raw.row_factory, raw.cursor_factory

    def take_back(self, raw: Any, usual: Any) -> None:
        raw.autocommit = True
        raw.read_only, raw.isolation_level, raw.row_factory, raw.cursor_factory = usual

    def cursor(self, raw: Any) -> Any:
        return raw.cursor(row_factory=_as_it_is)

    def is_idle(self, raw: Any) -> bool:
        return bool(raw.pgconn.transaction_status == _IDLE and raw.pgconn.pipeline_status == _NO_PIPELINE)

    def is_in_step(self, raw: Any) -> bool:
        # Interrupted, psycopg may not have left its pipeline, in which nothing waits for its answer.
        return bool(raw.pgconn.pipeline_status == _NO_PIPELINE and raw.pgconn.transaction_status != _ACTIVE)

    def chunks(self, raw: Any, sql: str, size: int, bound: Sequence[Any] = ()) -> Generator[list[Any], None, None]:
        with raw.cursor(name="swarmdb_chunks") as cursor:
            cursor.execute(sql, bound)
            while chunk := cursor.fetchmany(size):
                yield chunk

    @staticmethod
    @contextmanager
    def reading_leniently(raw: Any) -> Iterator[None]:
        from psycopg import DataError  # Whoever has such a connection has imported psycopg.
        from psycopg.adapt import Loader
        from psycopg.pq import Format

        usual = raw.adapters.get_loader(_TIMESTAMPTZ, Format.TEXT)

        class Lenient(Loader):
            def __init__(self, oid: int, context: Any = None) -> None:
                super().__init__(oid, context)
                self._usual = usual(oid, context)

            def load(self, data: Any) -> Any:
                try:
                    return self._usual.load(data)
                except DataError:
                    return bytes(data).decode()

        raw.adapters.register_loader(_TIMESTAMPTZ, Lenient)
        try:
            yield
        finally:
            raw.adapters.register_loader(_TIMESTAMPTZ, usual)

    def is_undecodable(self, error: Exception) -> bool:
        # Infinity, and years that no datetime holds: what the server says itself has a code.
        return type(error).__name__ == "DataError" and getattr(error, "sqlstate", None) is None

    def is_missing_savepoint(self, error: BaseException | None) -> bool:
        return getattr(error, "sqlstate", None) in _NO_SAVEPOINT

    def inserted_key(self, cursor: Any) -> int:
        (key,) = cursor.fetchone()
        return int(key)


def _as_it_is(cursor: Any) -> Callable[[Sequence[Any]], Any]:
    """Make rows tuples: what psycopg calls a row factory."""
    return tuple


# As libpq and psycopg.IsolationLevel number them: importing psycopg is the dialect's business.
_IDLE, _ACTIVE = 0, 1
_NO_PIPELINE = 0
_TIMESTAMPTZ = 1184  # Its number in pg_type, the same on every server.
_READ_COMMITTED, _REPEATABLE_READ, _SERIALIZABLE = 2, 3, 4


def backend_of(dialect: Dialect) -> Backend:
    """Return what drives connections of *dialect*."""
    error = dialect.loaded_dbapi.Error
    return PostgreSQL(error) if is_postgresql(dialect) else SQLite(error, UnicodeDecodeError)


# Errors

_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})

#: What a retry may mend, by code: https://www.postgresql.org/docs/current/errcodes-appendix.html
_CONFLICTING = {
    "40001": "another transaction changed what this one had read",
    "40P01": "this transaction and another waited for each other",
    "55P03": "another user held the lock for longer than the busy timeout",
}
_NO_SAVEPOINT = frozenset({"3B001", "25P01"})
_CONSTRAINT = "23"
_ABORTED = "25P02"


def is_of_database(error: Exception) -> bool:
    """Whether *error* comes from a driver or from SQLAlchemy."""
    psycopg = sys.modules.get("psycopg")  # Where it is not imported, no error can be its.
    return isinstance(error, sqlite3.Error | SQLAlchemyError | UnicodeDecodeError) or (
        psycopg is not None and isinstance(error, psycopg.Error)
    )


def is_damage(error: Exception) -> bool:
    """Whether *error*, from SQLite or for that reason, says that the file is damaged, or is no database at all."""
    if isinstance(error, StatementError | StorageError):
        cause = error.orig if isinstance(error, StatementError) else error.__cause__
        return isinstance(cause, Exception) and is_damage(cause)
    return isinstance(error, UnicodeDecodeError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def translated(error: Exception, where: str) -> SwarmDBError:
    """Return what a driver's *error* means. SQLAlchemy's wrapping is taken off first."""
    if isinstance(error, StatementError) and isinstance(error.orig, Exception):
        return translated(error.orig, where)
    if isinstance(error, SwarmDBError):
        return error
    if isinstance(error, UnicodeDecodeError):
        # What sqlite3 raises where SQLite's message quotes the file, and that is not text.
        return StorageError(f"{where}: the file is damaged: it holds {error.object[:80]!r} where SQL is expected")
    message = f"{where}: {error}"
    if isinstance(error, PoolTimeoutError):
        return BusyError(message)
    code = getattr(error, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    state = getattr(error, "sqlstate", None) or ""
    if primary in _BUSY:
        return BusyError(f"{message}: another user held the database for longer than the busy timeout")
    if state in _CONFLICTING:
        return BusyError(f"{message}: {_CONFLICTING[state]}")
    if primary == sqlite3.SQLITE_CONSTRAINT or state.startswith(_CONSTRAINT):
        return ConflictError(message)
    if state == _ABORTED:
        return TransactionError(
            f"{where}: a statement of this transaction failed, and its error was caught; PostgreSQL does nothing more "
            "in it: let the error end the block, or put the statement into a block of its own"
        )
    return StorageError(message)


class translating(AbstractContextManager[None]):  # noqa: N801 (as those of contextlib)
    """Raise what a driver's error means in its place, and an interrupt in place of the error that it led to.

    An interrupt is whatever a signal's handler raises, be it ctrl-C or a timeout of the caller's.
    """

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        self._outside = sys.exception()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, SwarmDBError):
            _raise_interrupt_before(error, self._outside)
            if is_of_database(error):
                raise translated(error, self._where) from error


def _is_foreign(error: BaseException) -> bool:
    """Whether *error* is nothing that SQLAlchemy, a driver or a value of a row gives rise to."""
    usual = (SwarmDBError, AssertionError, TypeError, ValueError)
    return not isinstance(error, usual) and not (isinstance(error, Exception) and is_of_database(error))


def _raise_interrupt_before(error: Exception, outside: BaseException | None) -> None:
    """Raise the interrupt that *error* came up while handling, or wraps; not one from *outside*.

    SQLAlchemy, interrupted in the middle of its own cleaning up, goes on with that, and may fail at it, of its own
    accord. Interrupted while it prepares a statement, it takes that for the statement's fault.
    """
    if isinstance(error, StatementError) and error.orig is not None and _is_foreign(error.orig):
        raise error.orig from None
    is_of_its_own = isinstance(error, AssertionError | InvalidRequestError)
    context = error.__context__
    while context is not None and context is not outside:
        if not isinstance(context, Exception) or (is_of_its_own and _is_foreign(context)):
            break
        context = context.__context__
    try:
        if context is not None and context is not outside:
            raise context from None
    finally:
        del context  # With its traceback it would keep this frame, and all that the frame holds, alive.
