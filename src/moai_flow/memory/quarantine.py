"""Moving rows that can't be read into tables beside their own, so that nothing is lost."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Dialect,
    FromClause,
    MetaData,
    Table,
    TableClause,
    Text,
    and_,
    bindparam,
    cast,
    column,
    delete,
    exists,
    insert,
    literal_column,
    or_,
    select,
    table,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import UserDefinedType

from moai_flow.memory.backends import translated
from moai_flow.memory.catalogue import Reference, columns_of, references_to, trigger_of
from moai_flow.memory.connections import Held
from moai_flow.memory.errors import BusyError
from moai_flow.memory.models import Record, SessionMemory, rowid_column, table_of
from moai_flow.memory.types import is_postgresql, is_unicode


class _Kept(Exception):  # noqa: N818 (it never leaves this module)
    """Rows can't be moved without losing something, or at all."""


class _NothingMoved(Exception):  # noqa: N818 (nor does it)
    """Every row was kept."""


class _Named(UserDefinedType[Any]):
    """A type by its name, which may be one of another program's."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **options: Any) -> str:
        return self.name


def address_of(model: type[Record], dialect: Dialect) -> ColumnElement[Any]:
    """Return what tells a table's rows apart, whatever they hold, as long as the transaction lasts."""
    if not is_postgresql(dialect):
        return rowid_column
    number = _number_of(model)
    return literal_column("tableoid::text || ctid::text", Text) if number is None else number


def _number_of(model: type[Record]) -> ColumnElement[Any] | None:
    return next((part for part in table_of(model).primary_key if part.identity), None)


def move_aside(held: Held, where: str, model: type[Record], addresses: Sequence[Any]) -> tuple[int, Counter[str]]:
    """Move rows, whole and as they are stored, into the table's quarantine.

    Args:
        held: A connection with a transaction open.
        where: What errors call the database.
        model: The table's.
        addresses: Which rows, by `address_of`.

    Returns:
        How many rows were moved, which may be more: with a memory goes what it replaced, since an older value of the
        key would come back. And how many of *addresses* were not, by the reason: those are as they were.
    """
    kept: Counter[str] = Counter()
    moved, dialect = 0, held.connection.dialect
    try:
        with held.backend.savepoint(held.raw, where):
            source, target = _tables(held, str(table_of(model).name))
            _refuse_triggers(held.connection, source, target)
            references = references_to(held.connection, source.name, target.columns.keys())
            move = _Move(source, target, references, _condition(model, source, dialect))
            for address in addresses:
                try:
                    with held.backend.savepoint(held.raw, where):
                        moved += move(held.connection, address)
                except (_Kept, DBAPIError) as error:
                    kept[_reason(error, held)] += 1
            if not moved:
                raise _NothingMoved  # Which leaves no empty table behind.
    except _NothingMoved:
        pass
    except (_Kept, DBAPIError) as error:
        kept[_reason(error, held)] += len(addresses)
    return moved, kept


def _reason(error: _Kept | DBAPIError, held: Held) -> str:
    """Return why rows were kept.

    Raises:
        DBAPIError: *error*, if that is for another reason than the rows.
    """
    if isinstance(error, _Kept):
        return str(error)
    # A full disk, for one, can end the whole transaction, and what was moved before is undone with it.
    if isinstance(translated(error, ""), BusyError) or not held.in_transaction:
        raise error
    return str(error.orig).partition("\n")[0]


def _tables(held: Held, name: str) -> tuple[TableClause, TableClause]:
    """Return a table as it is, with all columns that it has, and its quarantine, which is made if it is missing."""
    connection, is_on_server = held.connection, is_postgresql(held.connection.dialect)
    columns = columns_of(connection, name)
    if not all(map(is_unicode, columns)):
        raise _Kept(f"{name} has a column whose name is not UTF-8")
    # On SQLite, BLOB columns keep whatever they are given; a server's columns hold nothing but their type.
    wanted = columns if is_on_server else dict.fromkeys(columns, "BLOB")
    target = f"{name}_quarantine"
    present = columns_of(connection, target)
    if not present:
        Table(target, MetaData(), *(Column(part, _Named(kind)) for part, kind in wanted.items())).create(connection)
    elif not wanted.items() <= present.items():
        raise _Kept(f"{target} is there already, and is not the table that SwarmDB makes")
    hidden = ["tableoid", "ctid"] if is_on_server else [rowid_column.name]
    return table(name, *map(column, dict.fromkeys([*columns, *hidden]))), table(target, *map(column, columns))


def _refuse_triggers(connection: Connection, source: TableClause, target: TableClause) -> None:
    """Refuse to move what a trigger would see go or come: it may do anything to any row."""
    for name, trigger in (
        (source.name, trigger_of(connection, source.name, "delete")),
        (target.name, trigger_of(connection, target.name, "insert")),
    ):
        if trigger is not None:
            raise _Kept(f"{name} has a trigger or rule that would run: {trigger}")


def _condition(model: type[Record], source: TableClause, dialect: Dialect) -> ColumnElement[bool]:
    """Return the condition for the row at an address, and for what has to go with it."""
    address: ColumnElement[Any] = bindparam("address")
    row: ColumnElement[bool] = _place(model, source, dialect) == address
    if model is not SessionMemory:
        return row
    bad = source.alias()
    # Where one of these is NULL, as an older program may have let it, each row of the key is bad by itself.
    same_key = (source.c[part] == bad.c[part] for part in ("session_id", "memory_type", "key"))
    return or_(row, exists().where(_place(model, bad, dialect) == address, source.c.id <= bad.c.id, *same_key))


def _place(model: type[Record], source: FromClause, dialect: Dialect) -> ColumnElement[Any]:
    """Return `address_of` as a column of *source*."""
    number = _number_of(model) if is_postgresql(dialect) else rowid_column
    if number is None:
        return cast(source.c.tableoid, Text).concat(cast(source.c.ctid, Text))
    place: ColumnElement[Any] = source.c[number.name]
    return place


class _Move:
    """Moves one row after the other: its statements are made once for a table."""

    def __init__(
        self,
        source: TableClause,
        target: TableClause,
        references: Sequence[Reference],
        condition: ColumnElement[bool],
    ) -> None:
        """Move from *source* to *target* what meets *condition*, unless one of *references* leads to it."""
        self._referring = []
        for reference in references:
            child = reference.table.alias()
            refers = and_(*(source.c[ours] == child.c[theirs] for theirs, ours in reference.pairs))
            self._referring.append((reference.table.name, select(exists().where(condition, refers))))
        names = target.columns.keys()
        rows = select(*(source.c[name] for name in names)).where(condition)
        self._copy = insert(target).from_select(names, rows)
        self._delete = delete(source).where(condition)

    def __call__(self, connection: Connection, address: Any) -> int:
        """Move a row, and what has to go with it, and return how many those are.

        Raises:
            _Kept: If that would take something along, or leave something behind.
        """
        bound, counted = {"address": address}, {"preserve_rowcount": True}
        for name, is_referring in self._referring:
            # Whatever the key does then: delete its row as well, forget what it referred to, or fail at the commit.
            if connection.scalar(is_referring, bound):
                raise _Kept(f"a row of {name} refers to it")
        copied = connection.execute(self._copy, bound, execution_options=counted).rowcount
        deleted = connection.execute(self._delete, bound, execution_options=counted).rowcount
        if deleted != copied:
            raise _Kept("a policy or a key of another program keeps it from being copied or deleted")
        return copied
