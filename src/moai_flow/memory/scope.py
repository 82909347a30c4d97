"""Who owns the open transaction, and on which connection a call runs."""

import asyncio
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

from sqlalchemy import FromClause, inspect
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError, SQLAlchemyError
from sqlmodel import Session

from moai_flow.memory.backends import Backend, translating
from moai_flow.memory.connections import Connections, Held, is_interrupted
from moai_flow.memory.engine import Location
from moai_flow.memory.errors import BusyError, StorageError, SwarmDBError, TransactionError
from moai_flow.memory.models import Record, table_of
from moai_flow.memory.statements import Bound, Insert, Program, Programs, Query, Row, RowDecoder, Statement

R = TypeVar("R", bound=Record)
G = TypeVar("G")

#: How many old rows are removed at a time, as part of somebody's write; for so many that it adds, it does so once more.
ROWS_A_STEP = 1000


class RawCursor(Protocol):
    """What every driver's cursor can do."""

    @property
    def rowcount(self) -> int:
        """How many rows the last statement changed; -1 if it changes none."""

    @property
    def lastrowid(self) -> Any:
        """The number that the last inserted row was given."""

    def execute(self, sql: str, parameters: Any = ..., /) -> Any:
        """Run a statement. Placeholders are the driver's."""

    def executemany(self, sql: str, parameters: Any, /) -> Any:
        """Run a statement once for each of *parameters*."""

    def fetchone(self) -> Any:
        """Return the next row, or None."""

    def fetchmany(self, size: int = ...) -> list[Any]:
        """Return the next *size* rows, or what is left of them."""

    def fetchall(self) -> list[Any]:
        """Return all rows that are left."""

    def close(self) -> None:
        """Give up what is left of the rows."""

    def __iter__(self) -> Iterator[Any]: ...


class RawConnection(Protocol):
    """What every driver's connection can do. On SQLite it is a `sqlite3.Connection` with `sqlite3.Row` rows."""

    def cursor(self) -> RawCursor:
        """Return a new cursor."""

    def execute(self, sql: str, parameters: Any = ..., /) -> RawCursor:
        """Run a statement on a new cursor, and return that."""

    def executemany(self, sql: str, parameters: Any, /) -> RawCursor:
        """Run a statement once for each of *parameters*, on a new cursor, and return that."""

    def commit(self) -> None:
        """Commit; not inside `SwarmDB.transaction`, which does."""

    def rollback(self) -> None:
        """Roll back; not inside `SwarmDB.transaction`, which does where the block raises."""


class Block:
    """One ``with`` block that holds a transaction, or a savepoint inside one.

    The outermost has a savepoint as well: after a raw ``commit()`` it is gone, even where another transaction has begun
    since.
    """

    def __init__(
        self,
        held: Held,
        task: object,
        outer: "Block | None",
        connections: Connections,
        *,
        readonly: bool,
        alone: bool = True,
        patient: bool = True,
    ) -> None:
        self.held = held
        self._alone = alone
        self._patient = patient
        self.task = task
        self.outer = outer
        self.readonly = readonly
        self.sessions: tuple[Session, ...] = () if outer is None else outer.sessions
        self._session: Session | None = None  # Its own.
        self._process = os.getpid()
        # A name of its own: undone twice, since it was interrupted at the first time, it must not undo the outer block.
        # A number, since PostgreSQL cuts what is longer than 63 bytes.
        self._depth: int = 0 if outer is None else outer._depth + 1
        self._savepoint = f"swarmdb_{self._depth}"
        self.has_begun = False
        self.has_ended = False
        self.added = 0  # Rows, by domain methods.
        self._connections = connections
        # Where it is noted. Not through the thread's locals later: a generator may end elsewhere.
        self._blocks: list[Block] = connections.local.blocks
        self._guard: weakref.ref[object] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the block, or one around it, has ended: its connection may be somebody else's by now."""
        return self.has_ended or (self.outer is not None and self.outer.is_over)

    @property
    def is_inherited(self) -> bool:
        """Whether the process forked inside the block: what it holds is the parent's."""
        return self._process != os.getpid()

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody can end the block any more; see `abandon_with`."""
        return self._guard is not None and self._guard() is None

    def begin(self) -> None:
        """Open the transaction or savepoint, and take the write lock unless the block only reads."""
        raw, backend = self.held.raw, self.held.backend
        self._blocks.append(self)
        with translating(self._connections.where):
            if self.outer is None:
                backend.begin(raw, readonly=self.readonly, alone=self._alone, patient=self._patient)
            raw.execute(f"SAVEPOINT {self._savepoint}")
            self.has_begun = True
            if self.readonly:
                backend.begin_reading(raw)

    def lend(self) -> RawConnection:
        """Return the driver's connection, set as a caller expects it."""
        self.held.backend.lend(self.held.raw)
        raw: RawConnection = self.held.raw
        return raw

    def open_session(self) -> Session:
        """Return a session, which ends with the block."""
        connection = self.held.connection
        if connection.get_transaction() is None:
            connection.begin()  # It sends nothing; it lets the session join.
        session = Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
        self._session, self.sessions = session, (*self.sessions, session)
        return session

    def execute_many(self, program: Program, bound: Iterable[Bound]) -> int:
        """Run *program* once for each of *bound*, and return how many rows that wrote. An interrupt ends the block."""
        self.held.batch_begins()
        try:
            written: int = program.execute_many(self.held.raw, bound).rowcount
        except SwarmDBError:
            self.held.batch_ends()
            raise
        self.held.batch_ends()
        return written

    def leave(self, *, keep: bool) -> None:
        """End the block: keep what it did, which the outermost commits, or undo it.

        Raises:
            TransactionError: If the transaction is no longer the one that the block began, or something is pending in
                a read-only session, or if the block has ended before.
        """
        try:
            if self.is_inherited:
                if keep:
                    raise TransactionError(_INHERITED)
                return
            if self.has_ended:  # It was left before, and its connection may be another's by now.
                raise TransactionError("a block is left once, and this one was left before")
            if self.outer is None:
                self.held.look_for_batch()
            try:
                if keep:
                    with translating(self._connections.where):
                        self._keep()
                else:
                    self._undo()
            except BaseException:
                self._undo()
                self._settle()
                raise
            self._settle()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Have the block be over, undone with its connection, unless it is over already."""
        if self.has_ended:
            return
        if not self.is_over and not self.is_inherited:
            self._connections.discard(self.held)  # A block around it notices.
        self._end()

    def abandon_with(self, owner: object) -> None:
        """Abandon the block once nobody has *owner* any more, if each try to end it was interrupted."""
        # A destructor would always run, and swallow an interrupt that comes just then.
        self._guard = weakref.ref(owner, self._abandon_at_last)

    def _abandon_at_last(self, _: object) -> None:
        try:
            self.abandon()
        except BaseException:  # One more interrupt, which goes nowhere from here, and must not leave the lock.
            self.abandon()
            raise

    def _keep(self) -> None:
        _innermost(self._blocks, self.task)  # What is abandoned inside would be kept as well.
        self.check_alive()
        if self._session is not None:
            if self.readonly and (self._session.new or self._session.dirty or self._session.deleted):
                raise TransactionError("a read-only session writes nothing, and this one has changes pending")
            self._session.flush()
            _refresh(self._session)
            _release(self._session, self.held.backend)
            self._close_session()
        self._restore_writes()
        try:
            self.held.raw.execute(f"RELEASE SAVEPOINT {self._savepoint}")
        except self.held.backend.error as error:
            if not self.held.backend.is_missing_savepoint(error):
                raise
            raise TransactionError(_ENDED_INSIDE) from error
        if self.outer is not None:
            self.outer.added += self.added
            return
        if not self.readonly:
            self._connections.check_file()
        root, raw = self.held.connection.get_transaction(), self.held.raw
        # Read only, there is nothing to commit, and a damaged file would fail even that.
        if root is None:
            raw.rollback() if self.readonly else raw.commit()
        else:
            root.rollback() if self.readonly else root.commit()

    def _undo(self) -> None:
        """Undo what the block did; again, which does no harm, if it was interrupted."""
        self._close_session()
        if self.is_over:
            return
        if not self.held.is_open:
            self._connections.discard(self.held)
            return
        with suppress(*self.held.backend.error, SQLAlchemyError, AssertionError):
            self._restore_writes()
            if self.outer is not None and self.has_begun and self.held.in_transaction:
                self.held.raw.execute(f"ROLLBACK TO SAVEPOINT {self._savepoint}")
                self.held.raw.execute(f"RELEASE SAVEPOINT {self._savepoint}")
                self.has_begun = False
            if self.outer is None:
                # SQLAlchemy, interrupted at it, stays in a reference cycle, and keeps the connection and its lock.
                self.held.raw.rollback()
                if (root := self.held.connection.get_transaction()) is not None:
                    root.rollback()
            return
        self._connections.discard(self.held)  # Which undoes it in any case.

    def _settle(self) -> None:
        """Have the block be over, and give back its connection, if that is as it should be."""
        held = self.held
        if self.outer is not None:
            self._end()
        # A transaction that SQLAlchemy was interrupted at beginning or ending is not active, and still in the way.
        elif (
            not is_interrupted()
            and held.is_open
            and not held.in_transaction
            and held.connection.get_transaction() is None
        ):
            held.backend.take_back(held.raw, held.usual)
            self._end()  # From here on, the connection may be another's.
            self._connections.give(held)

    def _end(self) -> None:
        if self in self._blocks:  # Not by position: those of other tasks end in any order.
            self._blocks.remove(self)
        self.has_ended, self._guard = True, None

    def check_alive(self) -> None:
        """Raise `TransactionError` if the block's transaction is not open any more."""
        if self.is_over or not self.held.in_transaction:
            raise TransactionError(_ENDED_INSIDE)

    def expire(self, table: FromClause) -> None:
        """Have the block's sessions read again what they have loaded from *table*."""
        for session in self.sessions:
            for loaded in session.identity_map.values():
                if inspect(loaded).mapper.local_table is table:
                    session.expire(loaded)

    def _close_session(self) -> None:
        # After a commit there is nothing to undo; what else it fails at, the block's own end undoes.
        if self._session is not None:
            with suppress(SQLAlchemyError, AssertionError):  # The latter after an interrupt.
                self._session.close()

    def _restore_writes(self) -> None:
        if self.readonly and (self.outer is None or not self.outer.readonly):
            self.held.backend.end_reading(self.held.raw, self._savepoint)


def _innermost(blocks: list[Block], task: object) -> Block | None:
    """Return the block that *task* opened last of those that are open, and abandon those that nobody can end."""
    for block in reversed(blocks[:]):
        if block.is_abandoned:
            block.abandon()  # Its guard was interrupted at it.
        elif block.task is task and block.has_begun:
            return block
    return None


_ENDED_INSIDE = (
    "the transaction of this block was ended inside it: by a raw commit() or rollback(), by a call that commits, such "
    "as executescript(), or by the database itself; what came after is rolled back"
)
_INHERITED = "this block was opened before a fork: its transaction is the parent process's"


class _Ending:
    """What ends the block of an `_Opening`, by which alone it is called."""

    block: Block | None = None

    def __init__(self, scope: "Scope") -> None:
        self._scope = scope

    def __call__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        block = self.block
        assert block is not None
        try:
            block.leave(keep=kind is None)
        finally:
            del error, traceback
        if kind is None and block.outer is None:
            self._scope._clean_after(block.added)


class _Exit:
    """Makes what ends a block no method, but the `_Opening` itself, which is called.

    An interrupt can come at the first step of a function, before its first line. The frame in its traceback has the
    function's arguments then, of a method also the object, for as long as anybody has the error.
    """

    def __get__(self, opening: "_Opening[Any] | None", kind: type["_Opening[Any]"]) -> Callable[..., None]:
        return operator.call if opening is None else opening  # `contextlib.ExitStack` asks the class.


class _Opening(AbstractContextManager[G]):
    """Opens a block for a ``with`` statement, and ends it, wherever interrupts come, and however many.

    It is no generator: an exception that comes out of one in the place of the one that went in leaves a reference cycle
    behind, with the frames of all callers. An interrupt inside SQLAlchemy, or `contextlib.ExitStack`, still does so,
    but none of those frames has what ends the block, and it is abandoned once nobody has.
    """

    def __init__(self, scope: "Scope", give: Callable[[Block], G], **options: bool) -> None:
        self._scope = scope
        self._give = give
        self._options = options
        self._ending = _Ending(scope)
        self._ends: dict[str, Callable[..., None]] = {}
        self.hand_over = partial(self._ends.pop, "the block", self._ending)

    #: To call it is to hand over what ends the block, and to call that: then nobody else has it, even where this object
    #: has a name. All of it is done in C, up to the first line of `_Ending`, so that no interrupt comes between.
    __call__ = property(operator.methodcaller("hand_over"))

    def __enter__(self) -> G:
        end: Callable[..., None] | None = None
        try:
            if self._ending.block is not None:
                raise RuntimeError("a transaction is entered once; each block needs one of its own")
            end = partial(self._ending)
            block = self._ending.block = self._scope._new_block(**self._options)
            block.abandon_with(end)
            try:
                block.begin()
                given = self._give(block)
                self._ends["the block"] = end  # No call, so that no interrupt comes between this and the return.
                return given
            except BaseException:
                block.leave(keep=False)
                raise
        finally:
            del self, end

    __exit__ = _Exit()


class Scope:
    """Runs statements in the caller's transaction if there is one, and each in its own if there is none."""

    _clock: Callable[[], datetime]
    #: When a write last looked whether old rows are to be removed, and from when on one looks again.
    _cleanup_seen: datetime
    _cleanup_due: datetime
    _connections: Connections
    _location: Location
    _programs: Programs

    def transaction(self) -> AbstractContextManager[RawConnection]:
        """Open a transaction and give the driver's connection in it.

        What the block did is committed when it ends, and rolled back if it raises anything at all. Domain methods
        called inside, by this thread and asyncio task, are part of it. A block inside a block is a savepoint: if it
        raises, only what it did is undone. The write lock is taken at the start, so what was read stays true until
        the commit.

        Placeholders are the driver's; on SQLite that is ``?``, and rows are `sqlite3.Row`. Neither ``commit()``
        nor ``rollback()`` may be called inside. What raw SQL raises inside the block is the driver's own error.

        Yields:
            The driver's connection, good until the block ends.

        Raises:
            BusyError: If another writer keeps the lock for longer than the busy timeout, or another asyncio task of
                this thread has it.
            TransactionError: If the block is inside a read-only session, if this thread's `_get_connection` has
                a transaction open, or if the transaction was ended inside the block.
            ClosedError: After `close`.
        """
        return _Opening(self, Block.lend)

    def session(self, *, readonly: bool = False) -> AbstractContextManager[Session]:
        """Open a transaction and give a typed SQLModel session in it.

        What is pending is flushed and committed when the block ends, and rolled back if it raises anything at all.
        Domain methods called inside, by this thread and asyncio task, are part of it: they see what the session
        has pending, and what the session has loaded is read again after they write. ``session.commit()`` inside the
        block flushes; only the end of the outermost block makes it durable. What the session raises itself inside the
        block, at ``flush()`` or ``exec()``, is SQLAlchemy's own error.

        Args:
            readonly: Give a consistent snapshot instead: no write lock is taken, writes of others in the meantime stay
                invisible, and every attempt to write is refused.

        Yields:
            The session, good until the block ends.

        Raises:
            BusyError: As `transaction`; a read-only session waits for nobody.
            ConflictError: If what was pending at the end breaks a constraint.
            TransactionError: As `transaction`, or if something was pending at the end of a read-only session.
            ClosedError: After `close`.
        """
        return _Opening(self, Block.open_session, readonly=readonly)

    def _is_cleanup_due(self) -> bool:
        """Whether it is time to look: also after the clock was set back, which may have been years ahead."""
        return not self._cleanup_seen <= self._clock() < self._cleanup_due

    def _clean_if_due(self) -> None:
        """Remove a few old rows if it is time to. Retention is a group of its own, which defines this."""

    # What the operation groups are made of.

    def _rows(self, query: Query[R], values: Mapping[str, Any]) -> list[R]:
        """Return the typed rows of *query*."""
        return self._decoder(query).decode(self._fetch(self._programs[query], values))

    def _decoder(self, query: Query[R]) -> RowDecoder[R]:
        """Return what turns the rows of *query* into objects."""
        rows: RowDecoder[R] | None = self._programs[query].rows
        assert rows is not None
        return rows

    def _tuples(self, statement: Statement, values: Mapping[str, Any]) -> list[Row]:
        """Return the rows of *statement* as the driver gives them."""
        return self._fetch(self._programs[statement], values)

    def _fetch(self, program: Program, values: Mapping[str, Any]) -> list[Row]:
        bound = program.bind(values)
        local = self._connections.local
        if (local.blocks or local.pinned) and (block := self._reading_block()) is not None:
            return program.fetch(block.held.raw, bound)
        held = self._connections.take()
        try:
            return program.fetch(held.raw, bound)
        except StorageError:
            if held.is_open:
                raise
        finally:
            self._connections.give(held)
        held = self._connections.take()  # The server went away. It may be back, and reading twice harms nobody.
        try:
            return program.fetch(held.raw, bound)
        finally:
            self._connections.give(held)

    def _insert(self, statement: Insert, values: Mapping[str, Any]) -> int:
        """Add a row, and return its number."""
        return self._programs.backend.inserted_key(self._write(statement, values))

    def _write(self, statement: Statement, values: Mapping[str, Any]) -> Any:
        """Run *statement* and return its cursor, for what became of it."""
        program = self._programs[statement]
        bound = program.bind(values)
        local = self._connections.local
        if (local.blocks or local.pinned) and (block := self._writing_block()) is not None:
            with block.held.backend.guarded(block.held.raw, self._connections.where):
                cursor = program.execute(block.held.raw, bound)
            if statement.writes is None:
                block.added += 1  # Which changes nothing that was loaded.
            else:
                block.expire(statement.writes)
            return cursor
        if self._is_cleanup_due():
            self._clean_if_due()
        held = self._connections.take()
        try:
            return program.execute(held.raw, bound)
        finally:
            self._connections.give(held)

    def _write_returning(self, query: Query[R], values: Mapping[str, Any]) -> list[R]:
        """Run a *query* that writes, and return the rows that it wrote."""
        program = self._programs[query]
        bound = program.bind(values)
        local = self._connections.local
        if (local.blocks or local.pinned) and (block := self._writing_block()) is not None:
            with block.held.backend.guarded(block.held.raw, self._connections.where):
                rows = program.fetch(block.held.raw, bound)
            block.expire(table_of(query.model))
        else:
            if self._is_cleanup_due():
                self._clean_if_due()
            held = self._connections.take()
            try:
                rows = program.fetch(held.raw, bound)
            finally:
                self._connections.give(held)
        return self._decoder(query).decode(rows)

    def _write_many(self, program: Program, bound: Iterable[Bound]) -> None:
        """Run *program* for each of *bound*, all or none."""
        with self._block(alone=False) as block:
            block.added += block.execute_many(program, bound)

    # Blocks

    def _reading_block(self) -> Block | None:
        block = self._own_block()
        if block is not None:
            self._prepare(block)
        elif self._location.is_in_memory:
            self._refuse_to_wait()  # In memory, a writer keeps readers waiting too.
        return block

    def _writing_block(self) -> Block | None:
        block = self._own_block()
        if block is None:
            self._refuse_to_wait()
        elif block.readonly:
            raise TransactionError(_READ_ONLY)
        else:
            self._prepare(block)
        return block

    def _own_block(self) -> Block | None:
        """Return the innermost block that this thread and task have open."""
        return _innermost(self._connections.local.blocks, _current_task())

    def _prepare(self, block: Block) -> None:
        """Make what the block's sessions have pending visible to the statement that follows."""
        self._connections.check_open()
        block.check_alive()
        if block.sessions:
            with translating(self._connections.where):
                for session in block.sessions:
                    session.flush()

    def _refuse_to_wait(self) -> None:
        """Raise where waiting for the write lock would be waiting for this very thread."""
        local = self._connections.local
        if any(not block.readonly for block in local.blocks):
            raise BusyError(
                f"{self._connections.where}: another asyncio task of this thread has a transaction open, "
                "which can't end while this call waits for it"
            )
        if local.pinned is not None and local.pinned.held.in_transaction:
            raise TransactionError(
                "the connection that _get_connection() gave this thread has a transaction open: commit() it or "
                "rollback() first, or use transaction(), which domain methods join"
            )

    def _block(
        self, *, readonly: bool = False, alone: bool = True, patient: bool = True
    ) -> AbstractContextManager[Block]:
        """Open a transaction, or a savepoint in the one that this thread and task have open.

        Args:
            readonly: Whether it refuses writes, and shows one snapshot.
            alone: Whether what it reads has to stay true until it commits.
            patient: Whether it waits for other writers; else it raises `BusyError` at once. Only a cleanup doesn't, and
                begins no other one.
        """
        return _Opening(self, _itself, readonly=readonly, alone=alone, patient=patient)

    def _new_block(self, *, readonly: bool = False, alone: bool = True, patient: bool = True) -> Block:
        """Return a block that is to begin, in the one that this thread and task have open, or on a connection."""
        connections = self._connections
        connections.check_open()
        outer = self._own_block() if connections.local.blocks else None
        if outer is not None:
            if outer.readonly and not readonly:
                raise TransactionError(_READ_ONLY)
            self._prepare(outer)
            with translating(connections.where):
                for session in outer.sessions:
                    session.connection()  # Its savepoint must stand outside this block's, which would end it.
            return Block(outer.held, outer.task, outer, connections, readonly=readonly)
        if not readonly or self._location.is_in_memory:
            self._refuse_to_wait()
        if not readonly and patient and self._is_cleanup_due():
            self._clean_if_due()
        task = _current_task()
        return Block(connections.take(), task, None, connections, readonly=readonly, alone=alone, patient=patient)

    def _clean_after(self, added: int) -> None:
        """Remove more old rows for so many that were added: else batches would add rows faster than those go."""
        for _ in range(added // ROWS_A_STEP):
            if not self._is_cleanup_due():
                break
            self._clean_if_due()


_READ_ONLY = "session(readonly=True) refuses writes; use session() or transaction()"


def _itself(block: Block) -> Block:
    return block


def _refresh(session: Session) -> None:
    """Read again what domain methods changed, so that it can be read after the session as well."""
    for loaded in session.identity_map.values():
        if inspect(loaded).expired_attributes:
            with suppress(InvalidRequestError):  # Its row is gone.
                session.refresh(loaded)


def _release(session: Session, backend: Backend) -> None:
    """Commit a session that was flushed, which only releases its savepoint."""
    try:
        session.commit()
    except PendingRollbackError as error:
        raise TransactionError(
            "a flush of this session failed inside the block, and its error was caught; call session.rollback() after "
            "such an error, or let it end the block"
        ) from error
    except DBAPIError as error:
        if not backend.is_missing_savepoint(error.orig):
            raise
        raise TransactionError(_ENDED_INSIDE) from error


def _current_task() -> object | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # No event loop runs in this thread.
        return None
