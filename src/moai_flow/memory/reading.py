"""Reading whole tables, as what their rows say, whichever database keeps them."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Column, Dialect, Select, bindparam, func, select, type_coerce

from moai_flow.memory.db import SwarmDB
from moai_flow.memory.errors import CorruptDataError
from moai_flow.memory.models import Record, columns, table_of
from moai_flow.memory.statements import Query, Row, RowDecoder, Statement
from moai_flow.memory.types import AsStored, ISOText, UTCDateTime

#: How many rows are decoded at a time: with more, most time goes to the cycle collector.
_CHECKED_AT_ONCE = 100

#: How many rows are read at a time.
_CHUNK = 500

#: The names of the columns that say when a row was written, or was last: each table has one of them.
_WRITTEN = ("timestamp", "last_updated", "updated_at")


def time_of(model: type[Record]) -> Column[datetime]:
    """Return the column that says when a row was written; where rows change, when it last was."""
    table = table_of(model)
    return next(table.c[name] for name in _WRITTEN if name in table.c)


def key_of(model: type[Record]) -> list[Any]:
    """Return the columns of a table's key, as they are stored and ordered."""
    return [
        type_coerce(column, AsStored) if isinstance(column.type, UTCDateTime) else column
        for column in table_of(model).primary_key.columns
    ]


@cache
def count(model: type[Record], names: frozenset[str] = frozenset()) -> Statement:
    """Return the statement that counts a table's rows; *names* is which of ``since`` and ``until`` bound them."""
    return Statement(_bounded(select(func.count()).select_from(table_of(model)), model, names))


@cache
def _everything(model: type[Record], names: frozenset[str]) -> Query[Any]:
    return Query(model, _bounded(select(table_of(model)), model, names).order_by(*key_of(model)))


def _bounded(rows: Select[Any], model: type[Record], names: frozenset[str]) -> Select[Any]:
    time = time_of(model)
    bounds = {"since": time >= bindparam("since"), "until": time < bindparam("until")}
    return rows.where(*(bounds[name] for name in sorted(names)))


class StoredTable:
    """The rows of one table of one database, as what they say, whichever database keeps them.

    Times are moments; everything else is as it is stored, JSON as its text.
    """

    def __init__(self, db: SwarmDB, model: type[Record], dialect: Dialect) -> None:
        self.db = db
        self.model = model
        self.name = str(model.__tablename__)
        self._decoder: RowDecoder[Any] = RowDecoder(model, dialect)
        self._times = [
            index for index, column in enumerate(columns(model)) if isinstance(column.type, ISOText | UTCDateTime)
        ]

    def chunks(self, raw: Any, bounds: Mapping[str, datetime]) -> Generator[list[Row], None, None]:
        """Yield all rows in the order of their keys, some at a time, without holding more.

        Args:
            raw: The driver's connection, in a transaction.
            bounds: The moments ``since`` and ``until`` by which `time_of` is bounded, if it is.

        Raises:
            CorruptDataError: If a value is not what its column holds.
            StorageError: If the database can't be read.
        """
        program = self.db._programs[_everything(self.model, frozenset(bounds))]
        with self.naming_database(), closing(program.chunks(raw, program.bind(bounds), _CHUNK)) as chunks:
            for stored in chunks:
                yield self.decoded(stored)

    def decoded(self, stored: Sequence[Row]) -> list[Row]:
        """Return what rows say that are as the driver gives them.

        Raises:
            CorruptDataError: If a value is not what its column holds.
        """
        said: list[Row] = []
        with self.naming_database():
            for begin in range(0, len(stored), _CHECKED_AT_ONCE):
                rows = stored[begin : begin + _CHECKED_AT_ONCE]
                decoded = self._decoder.columns_of(rows)
                by_column: list[Sequence[Any]] = list(zip(*rows, strict=True))
                for index in self._times:
                    by_column[index] = decoded[index]
                said += zip(*by_column, strict=True)
        return said

    @contextmanager
    def naming_database(self) -> Iterator[None]:
        """Have errors about a row say in which database it is, and what moves it out of the way."""
        try:
            yield
        except CorruptDataError as error:
            reason = (
                f"{error.reason} (in {self.db._location}; swarmdb check --quarantine, or check(quarantine=True), moves "
                "such rows aside)"
            )
            raise CorruptDataError(error.table, error.column, error.row, reason) from error
