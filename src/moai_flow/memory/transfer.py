"""Copying a database into another one, of either kind, and proving that the copy holds the same."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from pydantic_core import to_json
from sqlalchemy import Dialect, bindparam, func, select, text, tuple_

from moai_flow.memory import inputs
from moai_flow.memory.backends import translating
from moai_flow.memory.db import SwarmDB
from moai_flow.memory.errors import ConflictError, InvalidInputError, StorageError, SwarmDBError
from moai_flow.memory.models import TABLES, Record, SchemaInfo, columns, table_of
from moai_flow.memory.operations.retention import MARK
from moai_flow.memory.reading import StoredTable, count, key_of
from moai_flow.memory.statements import Query, Row, Statement, insert_for
from moai_flow.memory.types import ISOText, Real, UTCDateTime, is_postgresql

#: What is copied: every table but the one of facts about the database itself.
_MODELS: tuple[type[Record], ...] = tuple(model for model in TABLES if model is not SchemaInfo)

#: How many rows are read, and written in one transaction, at a time.
BATCH_SIZE = 5000


class Progress(NamedTuple):
    """How far a copy is.

    Attributes:
        activity: What is done with the rows of a table: first all tables are copied, then all are verified.
        table: The table's name.
        done: How many rows have been gone through, those that were there already among them.
        total: How many there are.
    """

    activity: Literal["copy", "verify"]
    table: str
    done: int
    total: int


@dataclass(frozen=True)
class CopiedTable:
    """One table of a copy that was verified.

    Attributes:
        table: The table's name.
        copied: How many rows were written.
        already_there: How many rows an earlier, interrupted copy had written.
        checksum: What source and target have in common, in 64 hexadecimal digits: the sum, modulo 2**256, of the
            SHA-256 of every row. A row counts as the JSON array of its values, in the order of the columns, with JSON
            as the text that is stored and times in UTC. The order of rows does not matter.
    """

    table: str
    copied: int
    already_there: int
    checksum: str

    @property
    def rows(self) -> int:
        """How many rows the table has, in the source and in the target."""
        return self.copied + self.already_there


@dataclass(frozen=True)
class CopyReport:
    """What `copy_database` did.

    Attributes:
        tables: The tables, in the schema's order.
    """

    tables: tuple[CopiedTable, ...]


def copy_database(
    source: SwarmDB,
    target: SwarmDB,
    *,
    resume: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[Progress], None] | None = None,
) -> CopyReport:
    """Copy every row of *source* into *target*, and verify that both hold the same.

    Rows keep their numbers, and the target gives none again that the source has ever given. JSON is copied to the
    letter, and a time as the moment that it means. The source is read as it is at the beginning: others may go on
    writing to it, and what they write is not copied. Nobody else should write to the target until the end. Nothing is
    deleted on either side: automatic retention is off in the target from the beginning, and at the end as it is in the
    source.

    Rows are written in the order of their keys, each batch in one transaction. So *resume* goes on after the last key
    in the target, whatever it was that interrupted the copy. If rows before it have changed since, on either side, the
    verification fails.

    Args:
        source: Where the rows are. It is only read.
        target: Where they go: a database without rows, or with *resume* one that has a part of them.
        resume: Go on with a copy that was interrupted. After a complete one, it copies what was added to the source.
        batch_size: How many rows are read, and written in one transaction, at a time; 5,000 unless given.
        progress: Called after each batch, in this thread.

    Returns:
        What was copied, by table.

    Raises:
        InvalidInputError: If *source* and *target* are one database, if *target* has rows and *resume* is not set, or
            if *batch_size* is less than 1. Nothing was written.
        CorruptDataError: If a row can't be decoded. Nothing of its batch was written.
        ConflictError: If the target refuses a row, because of others that it has. Nothing of its batch was written.
        TransactionError: If this thread has a transaction open on one of the two.
        BusyError: If another writer keeps the target for longer than the busy timeout.
        StorageError: If the source can't be read; if the target can't be written, or can't hold a value; or if the two
            do not hold the same in the end.
        ClosedError: If one of the two is closed.
    """
    size = inputs.whole(batch_size, field="batch_size", least=1)
    for db in (source, target):
        db._refuse_in_block("copy_database()")
    if source is target:
        raise _same(target)
    tell = progress or (lambda _: None)
    with source._block(readonly=True) as reading:
        if _is_same(source, target):
            raise _same(target)
        present = _find_present(target, is_welcome=resume)
        _set_retention(target, "off")
        originals = [_Table(source, model, reading.held.connection.dialect) for model in _MODELS]
        written = []
        for table, there in zip(originals, present, strict=True):
            written.append(_copy(table, target, there, size, tell))
            _advance_numbers(source, target, table.model)
        retention = source._tuples(_RETENTION, {})
    with target._block(readonly=True) as verifying:
        copies = [_Table(target, model, verifying.held.connection.dialect) for model in _MODELS]
        for table in copies:
            for _ in table.batches(size, "verify", tell):
                pass  # Reading them is what counts them.
    report = _compared(originals, copies, written)
    # Where the source has no mark, nobody has agreed to rows being removed.
    _set_retention(target, retention[0][0] if retention else "off")
    return report


# What a copy begins with


def _same(target: SwarmDB) -> InvalidInputError:
    return InvalidInputError("target", str(target._location), "another database than the source")


_CLAIM = Statement(text("SELECT pg_advisory_xact_lock(:name), CAST(CAST('agent_events' AS regclass) AS oid)"))
_TRY_CLAIM = Statement(text("SELECT pg_try_advisory_xact_lock(:name), CAST(CAST('agent_events' AS regclass) AS oid)"))


def _is_same(source: SwarmDB, target: SwarmDB) -> bool:
    """Whether both lead to the same tables, by whatever path, host or socket. *source* has a transaction open."""
    here, there = source._location, target._location
    if here.path is not None and there.path is not None:
        return here.path.samefile(there.path)
    if not (here.is_on_server and there.is_on_server):
        return False
    # Who finds this lock taken is in the database where it was taken, though perhaps in another schema.
    name = {"name": secrets.randbits(63)}
    ((_, table),) = source._tuples(_CLAIM, name)
    with target._block(readonly=True):
        ((is_free, same_table),) = target._tuples(_TRY_CLAIM, name)
    return not is_free and table == same_table


_WAIT_FOR_WRITERS = Statement(
    text("LOCK TABLE " + ", ".join(str(model.__tablename__) for model in _MODELS) + " IN SHARE MODE")
)


class _Present(NamedTuple):
    """What a table of the target has already.

    Attributes:
        last: The greatest value in the first column of the key; None if there is no row.
        ends: The keys of the rows with that value.
    """

    last: Any
    ends: frozenset[tuple[Any, ...]]

    def has(self, key: tuple[Any, ...]) -> bool:
        """Whether the row with *key* was written. Within one value of the first column, any order will do."""
        return key[0] < self.last or key in self.ends


def _find_present(target: SwarmDB, *, is_welcome: bool) -> list[_Present]:
    """Return what the target has already, by table.

    Raises:
        InvalidInputError: If it has rows, and they are not welcome.
    """
    found = []
    with target._block(alone=False) as block:
        # What a copy that was killed has sent to a server may still be on its way into the table.
        if target._location.is_on_server:
            target._write(_WAIT_FOR_WRITERS, {})
        for model in _MODELS:
            table = _Table(target, model, block.held.connection.dialect)
            ((rows,),) = target._tuples(count(model), {})
            if rows and not is_welcome:
                raise InvalidInputError(
                    "target",
                    str(target._location),
                    "a database without rows, or resume=True (in the shell --continue) to go on with an interrupted "
                    "copy",
                )
            ((last,),) = target._tuples(_last(model), {})
            ends = table.decoded(target._tuples(_with_last(model), {"last": last}))
            found.append(_Present(last, frozenset(map(table.key, ends))))
    return found


# Reading


@cache
def _last(model: type[Record]) -> Statement:
    return Statement(select(func.max(key_of(model)[0])))


@cache
def _with_last(model: type[Record]) -> Query[Any]:
    return Query(model, select(table_of(model)).where(key_of(model)[0] == bindparam("last")))


@cache
def _page(model: type[Record], *, is_first: bool) -> Query[Any]:
    page, key = select(table_of(model)), key_of(model)
    if not is_first:
        after = [bindparam(f"after_{number}", type_=column.type) for number, column in enumerate(key)]
        page = page.where(tuple_(*key) > tuple_(*after))
    return Query(model, page.order_by(*key).limit(bindparam("limit")))


class _Table(StoredTable):
    """The rows of one table of one database, which are counted as they are read."""

    def __init__(self, db: SwarmDB, model: type[Record], dialect: Dialect) -> None:
        super().__init__(db, model, dialect)
        self.content = _Content(model)
        self._key = [index for index, column in enumerate(columns(model)) if column.primary_key]

    def batches(
        self, size: int, activity: Literal["copy", "verify"], tell: Callable[[Progress], None]
    ) -> Iterator[list[Row]]:
        """Yield all rows in the order of their keys, and count them in `content`. It wants a transaction around it.

        Raises:
            CorruptDataError: If a value is not what its column holds.
            StorageError: If the database does not give all rows.
        """
        ((total,),) = self.db._tuples(count(self.model), {})
        for stored in self._pages(size):
            rows = self.decoded(stored)
            self.content.add(rows)
            yield rows
            tell(Progress(activity, self.name, self.content.rows, total))
        if self.content.rows != total:
            raise StorageError(
                f"{self.db._location}: of the {total} rows of {self.name}, the index of their keys gives "
                f"{self.content.rows}: it is damaged"
            )

    def _pages(self, size: int) -> Iterator[list[Row]]:
        values: dict[str, Any] = {"limit": size}
        while True:
            with self.naming_database():
                stored = self.db._tuples(_page(self.model, is_first=len(values) == 1), values)
            if stored:
                yield stored
            if len(stored) < size:
                return
            values |= {f"after_{number}": stored[-1][index] for number, index in enumerate(self._key)}

    def key(self, row: Row) -> tuple[Any, ...]:
        """Return the key of a decoded row."""
        return tuple(row[index] for index in self._key)


class _Content:
    """How many rows a table has, and their checksum."""

    def __init__(self, model: type[Record]) -> None:
        self.rows = 0
        self._sum = 0
        self._floats = [index for index, column in enumerate(columns(model)) if isinstance(column.type, Real)]

    @property
    def checksum(self) -> str:
        """The checksum, as `CopiedTable` explains it."""
        return f"{self._sum % 2**256:064x}"

    def add(self, rows: Sequence[Row]) -> None:
        """Count decoded rows."""
        self.rows += len(rows)
        if self._floats:
            by_column: list[Sequence[Any]] = list(zip(*rows, strict=True))
            for index in self._floats:  # SQLite keeps no sign of zero; the sum has none either.
                by_column[index] = [None if value is None else value + 0.0 for value in by_column[index]]
            rows = list(zip(*by_column, strict=True))
        digests = (sha256(to_json(row, inf_nan_mode="constants")).digest() for row in rows)
        self._sum += sum(map(int.from_bytes, digests))


# Writing


def _copy(table: _Table, target: SwarmDB, there: _Present, size: int, tell: Callable[[Progress], None]) -> int:
    """Copy the rows of a table that are not *there*, and return how many those are."""
    written = 0
    write = _writer(target, table.model)
    for rows in table.batches(size, "copy", tell):
        new = rows if there.last is None else [row for row in rows if not there.has(table.key(row))]
        if not new:
            continue
        try:
            write(new)
        except SwarmDBError as error:
            if _is_about_a_row(error):
                raise _refusal(error, target, table, write, new) from error
            raise
        written += len(new)
    return written


def _writer(target: SwarmDB, model: type[Record]) -> Callable[[Sequence[Row]], None]:
    """Return what writes decoded rows of a table into *target*, all or none."""
    return _server_writer(target, model) if target._location.is_on_server else _file_writer(target, model)


def _file_writer(target: SwarmDB, model: type[Record]) -> Callable[[Sequence[Row]], None]:
    program = target._programs[_insert(model)]
    times = [
        (index, column.type.encode)
        for index, column in enumerate(columns(model))
        if isinstance(column.type, ISOText | UTCDateTime)
    ]

    def write(rows: Sequence[Row]) -> None:
        by_column: list[Sequence[Any]] = list(zip(*rows, strict=True))
        for index, encode in times:
            by_column[index] = list(map(encode, by_column[index]))
        target._write_many(program, zip(*by_column, strict=True))

    return write


@cache
def _insert(model: type[Record]) -> Statement:
    return Statement(lambda dialect: insert_for(dialect, table_of(model)))


def _server_writer(target: SwarmDB, model: type[Record]) -> Callable[[Sequence[Row]], None]:
    statement = f"COPY {model.__tablename__} ({', '.join(column.name for column in columns(model))}) FROM STDIN"

    def write(rows: Sequence[Row]) -> None:
        with (
            target._block(alone=False) as block,
            translating(str(target._location)),
            block.held.raw.cursor().copy(statement) as stream,
        ):
            for row in rows:
                stream.write_row(row)

    return write


# What PostgreSQL calls an error about the data, or about an index that can't hold it:
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_DATA, _LIMIT = "22", "54"


def _is_about_a_row(error: SwarmDBError) -> bool:
    """Whether *error* comes from what a row holds."""
    cause = error.__cause__
    state = getattr(cause, "sqlstate", None) or ""
    # Both drivers have a class of this name, and psycopg raises it by itself where a text has a NUL.
    return isinstance(error, ConflictError) or type(cause).__name__ == "DataError" or state[:2] in (_DATA, _LIMIT)


class _UndoneError(Exception):
    """Ends a transaction that was only for trying."""


def _refusal(
    error: SwarmDBError,
    target: SwarmDB,
    table: _Table,
    write: Callable[[Sequence[Row]], None],
    rows: Sequence[Row],
) -> SwarmDBError:
    """Return *error*, which writing *rows* has raised, with the row that it is about."""

    def are_taken(first: Sequence[Row]) -> bool:
        try:
            with target._block(alone=False):
                write(first)
                raise _UndoneError
        except _UndoneError:
            return True
        except SwarmDBError:
            return False

    taken, refused = 0, len(rows)  # So many are taken; with so many, the last is not.
    while refused - taken > 1:
        middle = (taken + refused) // 2
        taken, refused = (middle, refused) if are_taken(rows[:middle]) else (taken, middle)
    names = [column.name for column in table_of(table.model).primary_key.columns]
    key = ", ".join(f"{name}={value!r}" for name, value in zip(names, table.key(rows[taken]), strict=True))
    return type(error)(
        f"{error}: the target can't take the row of {table.name} with {key}, and nothing of its batch was copied; "
        "change the row in the source, or what stands in its way in the target, and go on with resume=True (in the "
        "shell --continue)"
    )


# Numbers and marks

_LAST_NUMBER_IN_FILE = "SELECT seq FROM sqlite_sequence WHERE name = :table"
_LAST_NUMBER_ON_SERVER = """
    SELECT last_value FROM pg_sequences WHERE (schemaname, sequencename) IN (
        SELECT nspname, relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE pg_class.oid = CAST(pg_get_serial_sequence(:table, :column) AS regclass)
    )
"""
#: The last number that a table has given, which may be that of a row that is gone. None, or no row, if it gave none.
_LAST_NUMBER = Statement(
    lambda dialect: text(_LAST_NUMBER_ON_SERVER if is_postgresql(dialect) else _LAST_NUMBER_IN_FILE)
)
_SET_ON_SERVER = Statement(text("SELECT setval(CAST(pg_get_serial_sequence(:table, :column) AS regclass), :last)"))
_FORGET_IN_FILE = Statement(text("DELETE FROM sqlite_sequence WHERE name = :table"))
_SET_IN_FILE = Statement(text("INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :last)"))


def _advance_numbers(source: SwarmDB, target: SwarmDB, model: type[Record]) -> None:
    """Have the target give no number that the source has given, or that a row has."""
    table = table_of(model)
    number = next((column for column in table.primary_key if column.identity), None)
    if number is None:
        return
    names = {"table": table.name, "column": number.name}
    given = [row[0] for row in source._tuples(_LAST_NUMBER, names) if row[0] is not None]
    ((greatest,),) = source._tuples(_last(model), {})
    own = [row[0] for row in target._tuples(_LAST_NUMBER, names) if row[0] is not None]
    last = max([*given, *own, greatest or 0])
    if last < 1 or last in own:
        return
    with target._block(alone=False):
        if target._location.is_on_server:
            target._write(_SET_ON_SERVER, {**names, "last": last})
        else:
            target._write(_FORGET_IN_FILE, names)
            target._write(_SET_IN_FILE, {**names, "last": last})


_INFO = table_of(SchemaInfo)
_RETENTION = Statement(select(_INFO.c.value).where(_INFO.c.key == "retention"))


def _set_retention(target: SwarmDB, value: str) -> None:
    target._write(MARK, {"key": "retention", "value": value, "updated_at": target._clock()})


# Verifying


def _compared(originals: Sequence[_Table], copies: Sequence[_Table], written: Sequence[int]) -> CopyReport:
    """Return the report of a copy whose tables were all read, if those of source and target hold the same.

    Raises:
        StorageError: If they don't.
    """
    tables, wrong = [], []
    for table, copy, new in zip(originals, copies, written, strict=True):
        wanted, got = table.content, copy.content
        if (wanted.rows, wanted.checksum) == (got.rows, got.checksum):
            tables.append(CopiedTable(table.name, new, wanted.rows - new, wanted.checksum))
        else:
            wrong.append(
                f"{table.name} (source: {wanted.rows} rows, checksum {wanted.checksum}; "
                f"target: {got.rows} rows, checksum {got.checksum})"
            )
    if wrong:
        raise StorageError(
            f"{copies[0].db._location}: it does not hold the same as the source in {', '.join(wrong)}: rows were "
            "changed in the target, or in the source since an interrupted copy began; nothing was deleted; copy into "
            "an empty database"
        )
    return CopyReport(tuple(tables))
