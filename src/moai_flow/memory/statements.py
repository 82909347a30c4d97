"""Core statements, compiled once for each dialect and run on the driver's own cursor.

A `Statement` is a module-level constant. `Programs` compiles it the first time an engine needs it; from then on a
call binds its values through the column types, runs the text, and decodes the rows column by column. This passes by
SQLAlchemy's execution events and ``echo``, so statements are logged here, at debug level.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from copy import copy
from itertools import chain
from typing import Any, Generic, TypeVar, cast

from sqlalchemy import Column, Dialect, Executable, Table, bindparam, insert, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import class_mapper
from sqlalchemy.sql import visitors
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ClauseElement

from moai_flow.memory.backends import backend_of, translated, translating
from moai_flow.memory.errors import CorruptDataError, SwarmDBError, shown
from moai_flow.memory.models import TABLES, Record, columns, table_of
from moai_flow.memory.types import Stored, is_postgresql, is_unicode

logger = logging.getLogger("moai_flow.memory")

R = TypeVar("R", bound=Record)
Row = Sequence[Any]

#: Values as a driver wants them.
Bound = tuple[Any, ...]


#: A clause, or what makes it for a dialect, where no clause suits all.
Clause = Executable | Callable[[Dialect], Executable]


class Statement:
    """A constant statement. One object is one statement: it is compared, and hashed, by identity."""

    def __init__(self, clause: Clause, *, writes: Table | None = None) -> None:
        """Wrap *clause*; *writes* is the table whose rows it changes or removes, if it does."""
        self.clause = clause
        self.writes = writes

    def clause_for(self, dialect: Dialect) -> Executable:
        """Return the clause to compile for *dialect*."""
        return self.clause if isinstance(self.clause, Executable) else self.clause(dialect)


class Insert(Statement):
    """A statement that adds rows to a table, with values for some of its columns."""

    def __init__(self, table: Table, columns: Iterable[str], *, number: Column[int] | None = None) -> None:
        """Add to *table*; *number* is the column whose value callers want to know, where the database gives it."""
        super().__init__(insert(table))
        self.columns = tuple(columns)
        self._table = table
        self._number = number

    def clause_for(self, dialect: Dialect) -> Executable:
        """Return the clause to compile for *dialect*. Where the driver does not tell the row's number, that does."""
        if self._number is None or not is_postgresql(dialect):
            return super().clause_for(dialect)
        return insert(self._table).returning(self._number)


class Query(Statement, Generic[R]):
    """A statement that returns whole rows of one table."""

    def __init__(self, model: type[R], clause: Clause) -> None:
        super().__init__(clause)
        self.model = model


def insert_for(dialect: Dialect, table: Table) -> Any:
    """Return *dialect*'s own INSERT of a whole row, which can be told what to do about a conflict."""
    values = {column.name: bindparam(column.name, type_=column.type) for column in table.columns}
    if is_postgresql(dialect):
        from sqlalchemy.dialects import postgresql  # Who uses SQLite alone does without it.

        return postgresql.insert(table).values(values)
    return sqlite.insert(table).values(values)


class Program:
    """A statement as one dialect runs it."""

    def __init__(self, statement: Statement, dialect: Dialect, where: str) -> None:
        """Compile *statement*; *where* is what errors call the database."""
        clause = cast(ClauseElement, statement.clause_for(dialect))
        column_keys = list(statement.columns) if isinstance(statement, Insert) else None
        compiled = cast(SQLCompiler, clause.compile(dialect=_by_position(dialect), column_keys=column_keys))
        self.sql = compiled.string
        self.backend = backend_of(dialect)
        self._where = where
        self._slots = [
            (name, compiled.binds[name].type.dialect_impl(dialect).bind_processor(dialect))
            for name in compiled.positiontup or ()
        ]
        # SQLite's LIMIT comes with an OFFSET of its own, and constants in the clause are binds as well.
        self._constants = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
        self.rows = RowDecoder(statement.model, dialect) if isinstance(statement, Query) else None
        self._clause = clause
        self._dialect = dialect

    def bind(self, values: Mapping[str, Any]) -> Bound:
        """Return *values*, by name, as the driver wants them: encoded, in the statement's order.

        Raises:
            InvalidInputError: If a value can't be encoded.
        """
        if self._constants:
            values = {**self._constants, **values}
        return tuple([values[name] if encode is None else encode(values[name]) for name, encode in self._slots])

    def bind_columns(self, columns: Mapping[str, Sequence[Any]]) -> list[Bound]:
        """Return the rows of *columns*, which have no other values than the statement's own, as `bind` does.

        Raises:
            InvalidInputError: If a value can't be encoded.
        """
        return list(
            zip(
                *[columns[name] if encode is None else map(encode, columns[name]) for name, encode in self._slots],
                strict=True,
            )
        )

    def rebind(self, bound: Bound, **values: Any) -> Bound:
        """Return *bound* with other *values*, by name, in the place of some of its own."""
        return tuple(
            [
                old if name not in values else values[name] if encode is None else encode(values[name])
                for old, (name, encode) in zip(bound, self._slots, strict=True)
            ]
        )

    def fetch(self, raw: Any, bound: Bound) -> list[Row]:
        """Run on a driver's connection and return every row.

        Raises:
            SwarmDBError: What the driver's error means.
        """
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s %r", self.sql, bound)
        cursor = self.backend.cursor(raw)
        try:
            rows: list[Row] = cursor.execute(self.sql, bound).fetchall()
        except self.backend.error as error:
            cursor.close()  # As below: who keeps the error keeps its frames.
            if self.rows is not None and self.backend.is_undecodable(error):
                with self.backend.reading_leniently(raw):
                    rows = self.backend.cursor(raw).execute(self.sql, bound).fetchall()
                if (fault := self.rows.find_fault(rows)) is not None:
                    raise fault from error
                return rows  # Somebody has mended or removed the row since.
            if self.rows is None and self.backend.is_undecodable(error):
                raise self._named(error, raw) from error
            raise translated(error, self._where) from error
        except BaseException:
            cursor.close()  # Stopped between its rows, the statement would be under way for as long as it is there.
            raise
        return rows

    def _named(self, error: Exception, raw: Any) -> SwarmDBError:
        """Return what names a row of the statement's tables that can't be decoded, if there is one."""
        tables = set(visitors.iterate(self._clause))
        for model in TABLES:
            if table_of(model) in tables:
                every_row = str(select(table_of(model)).compile(dialect=self._dialect))
                with self.backend.reading_leniently(raw):
                    rows = self.backend.cursor(raw).execute(every_row).fetchall()
                if (fault := RowDecoder(model, self._dialect).find_fault(rows)) is not None:
                    return fault
        return translated(error, self._where)

    def chunks(self, raw: Any, bound: Bound, size: int) -> Generator[list[Row], None, None]:
        """Run on a driver's connection, in a transaction, and yield *size* rows at a time, holding no more.

        Raises:
            SwarmDBError: What the driver's error means.
        """
        logger.debug("%s %r (in chunks)", self.sql, bound)
        try:
            yield from self.backend.chunks(raw, self.sql, size, bound)
        except self.backend.error as error:
            if self.rows is not None and self.backend.is_undecodable(error):
                with (
                    self.backend.reading_leniently(raw),
                    closing(self.backend.chunks(raw, self.sql, size, bound)) as again,
                ):
                    if (fault := self.rows.find_fault(chain.from_iterable(again))) is not None:
                        raise fault from error
            raise translated(error, self._where) from error

    def execute(self, raw: Any, bound: Bound) -> Any:
        """Run on a driver's connection and return the cursor, for its ``rowcount`` and ``lastrowid``.

        Raises:
            SwarmDBError: What the driver's error means.
        """
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s %r", self.sql, bound)
        try:
            return self.backend.cursor(raw).execute(self.sql, bound)
        except self.backend.error as error:
            raise translated(error, self._where) from error

    def execute_many(self, raw: Any, bound: Iterable[Bound]) -> Any:
        """Run once for each of *bound*, and return the cursor, for its ``rowcount``.

        The caller's transaction decides what stays if one of them fails.

        Raises:
            SwarmDBError: What the driver's error means.
        """
        logger.debug("%s (many)", self.sql)
        with translating(self._where):  # Interrupted, psycopg may fail at leaving its pipeline.
            cursor = self.backend.cursor(raw)
            cursor.executemany(self.sql, bound)
        return cursor


def _by_position(dialect: Dialect) -> Dialect:
    """Return *dialect* with parameters by position, which every driver takes, and psycopg faster than by name."""
    if dialect.positional:
        return dialect
    by_position = copy(dialect)
    by_position.positional, by_position.paramstyle = True, "format"
    return by_position


class Programs(dict[Statement, Program]):
    """The programs of one engine, each compiled when it is first asked for."""

    def __init__(self, dialect: Dialect, where: str) -> None:
        super().__init__()
        self.backend = backend_of(dialect)
        self._dialect = dialect
        self._where = where

    def __missing__(self, statement: Statement) -> Program:
        program = self[statement] = Program(statement, self._dialect, self._where)
        return program


class RowDecoder(Generic[R]):
    """Turns the driver's rows of one table into its typed objects, without a second validation."""

    def __init__(self, model: type[R], dialect: Dialect) -> None:
        self.model = model
        self.columns: list[Column[Any]] = list(columns(model))
        fields = {field.alias or name: name for name, field in model.model_fields.items()}
        self._names = [fields[column.name] for column in self.columns]
        self._decoders = [column.type.dialect_impl(dialect).result_processor(dialect, None) for column in self.columns]
        self._kinds = [
            _stored_kinds(model, name, column, dialect) for name, column in zip(self._names, self.columns, strict=True)
        ]
        self._key = [index for index, column in enumerate(self.columns) if column.primary_key]
        self._make = _maker(model, self._names)
        self._shapes: set[tuple[type, ...]] = set()
        class_mapper(model)  # Attributes work once the mapper has been configured, which this sees to.

    def decode(self, rows: Sequence[Row]) -> list[R]:
        """Return the objects of *rows*, which hold every column in the schema's order.

        They are detached: a session that adds one updates its row.

        Raises:
            CorruptDataError: If a value is not what its column holds.
        """
        try:
            return [self._decode_one(row) for row in rows] if len(rows) < _FEW else self._decode_many(rows)
        except ValueError as error:
            raise self.first_fault(rows) from error

    def _decode_one(self, row: Row) -> R:
        shape = tuple(map(type, row))
        if shape not in self._shapes:
            if not all(kind in kinds for kind, kinds in zip(shape, self._kinds, strict=True)):
                raise ValueError("not of the column's type")
            self._shapes.add(shape)  # There are few: each column has two or three types.
        values = [
            stored if decode is None else decode(stored) for stored, decode in zip(row, self._decoders, strict=True)
        ]
        return self._make(values)

    def _decode_many(self, rows: Sequence[Row]) -> list[R]:
        return list(map(self._make, zip(*self._decode_columns(rows), strict=True)))

    def _decode_columns(self, rows: Sequence[Row]) -> list[Sequence[Any]]:
        decoded: list[Sequence[Any]] = []
        for stored, kinds, decode in zip(zip(*rows, strict=True), self._kinds, self._decoders, strict=True):
            if not kinds.issuperset(map(type, stored)):
                raise ValueError("not of the column's type")
            decoded.append(stored if decode is None else list(map(decode, stored)))
        return decoded

    def are_sound(self, rows: Sequence[Row]) -> bool:
        """Whether `faults` would find nothing in any of *rows*, of which there is at least one."""
        try:
            self._sound_columns(rows)
        except ValueError:
            return False
        return True

    def columns_of(self, rows: Sequence[Row]) -> list[Sequence[Any]]:
        """Return what *rows* hold, of which there is at least one, decoded, column by column.

        Raises:
            CorruptDataError: If a value is not what its column holds.
        """
        try:
            return self._sound_columns(rows)
        except ValueError as error:
            raise self.first_fault(rows) from error

    def _sound_columns(self, rows: Sequence[Row]) -> list[Sequence[Any]]:
        decoded = self._decode_columns(rows)
        for stored, kinds in zip(zip(*rows, strict=True), self._kinds, strict=True):
            if str in kinds and not is_unicode("".join(filter(None, stored))):
                raise ValueError("not UTF-8")
        return decoded

    def value(self, row: Row, index: int) -> Any:
        """Return one value of *row*, decoded.

        Raises:
            CorruptDataError: If it is not what its column holds.
        """
        decode = self._decoders[index]
        try:
            if type(row[index]) not in self._kinds[index]:
                raise ValueError("not of the column's type")
            return row[index] if decode is None else decode(row[index])
        except ValueError as error:
            raise self.first_fault([row]) from error

    def faults(self, row: Row) -> list[CorruptDataError]:
        """Return what keeps *row* from being decoded, an error a column."""
        key = {self.columns[index].name: row[index] for index in self._key}
        found = []
        for value, column, kinds, decode in zip(row, self.columns, self._kinds, self._decoders, strict=True):
            reason, held = None, "NULL" if value is None else shown(value)
            if type(value) not in kinds:
                wanted = " or ".join(sorted("NULL" if kind is type(None) else kind.__name__ for kind in kinds))
                reason = f"holds {held}, where {wanted} is expected"
            elif isinstance(value, str) and not is_unicode(value):
                reason = f"holds {held}, which is not UTF-8"
            elif decode is not None:
                try:
                    decode(value)
                except ValueError as error:
                    reason = f"holds {held}, which can't be decoded: {error}"
            if reason is not None:
                found.append(CorruptDataError(str(self.model.__tablename__), column.name, key, reason))
        return found

    def first_fault(self, rows: Iterable[Row]) -> CorruptDataError:
        """Return what is wrong with *rows*, of which at least one can't be decoded."""
        fault = self.find_fault(rows)
        assert fault is not None
        return fault

    def find_fault(self, rows: Iterable[Row]) -> CorruptDataError | None:
        """Return the first thing that is wrong with *rows*, or None."""
        return next((fault for row in rows for fault in self.faults(row)), None)


def _maker(model: type[R], names: Sequence[str]) -> Callable[[Iterable[Any]], R]:
    new = model.__new__

    def make(values: Iterable[Any]) -> R:
        # As loading from an ORM session does it, without what a session needs: models make that on demand.
        made: R = new(model)
        made.__dict__.update(zip(names, values), _is_stored=True)  # noqa: B905 (it would cost as much as the rest)
        return made

    return make


#: From how many rows on decoding column by column is faster than row by row.
_FEW = 4


def _stored_kinds(model: type[Record], name: str, column: Column[Any], dialect: Dialect) -> frozenset[type]:
    """Return the types of a column's values as the driver gives them. SQLite itself takes anything anywhere."""
    assert isinstance(column.type, Stored)  # As those of every column of ours.
    kinds: frozenset[type] = column.type.stored_kinds(dialect)
    annotation = model.model_fields[name].annotation
    if getattr(column.type, "reads_null", False) or type(None) in getattr(annotation, "__args__", ()):
        kinds |= {type(None)}
    return kinds
