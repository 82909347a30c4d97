"""What a database really has: other programs may add columns to our tables, and rows that refer to theirs."""

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, Table, TableClause, TextClause, column, select, table, text
from sqlalchemy.exc import OperationalError

from moai_flow.memory.models import rowid_column
from moai_flow.memory.types import is_postgresql

_COLUMNS_IN_FILE = text("SELECT name, type FROM pragma_table_xinfo(:name)")
_COLUMNS_ON_SERVER = text("""
    SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    WHERE attrelid = to_regclass(:name) AND relkind IN ('r', 'p') AND attnum > 0 AND NOT attisdropped ORDER BY attnum
""")
_KIND_IN_FILE = text("""
    SELECT type FROM sqlite_master WHERE name = :name COLLATE NOCASE AND type IN ('table', 'view')
""")
_KIND_ON_SERVER = text("SELECT relkind::text FROM pg_class WHERE oid = to_regclass(:name)")
_USED_UP = text("SELECT seq FROM sqlite_sequence WHERE name = :name COLLATE NOCASE AND seq >= 9223372036854775807")
_REFERENCES_IN_FILE = text("""
    SELECT found.name || ' ' || key.id, NULL, found.name, key."from",
        coalesce(key."to", (SELECT name FROM pragma_table_xinfo(:name) AS part WHERE part.pk = key.seq + 1))
    FROM sqlite_master AS found, pragma_foreign_key_list(found.name) AS key
    WHERE found.type = 'table' AND key."table" = :name COLLATE NOCASE
""")
_REFERENCES_ON_SERVER = text("""
    SELECT key.oid::text, pg_namespace.nspname, pg_class.relname, theirs.attname, ours.attname
    FROM pg_constraint AS key
    JOIN pg_class ON pg_class.oid = key.conrelid
    JOIN pg_namespace ON pg_namespace.oid = pg_class.relnamespace
    CROSS JOIN unnest(key.conkey, key.confkey) AS pair (their_number, our_number)
    JOIN pg_attribute AS theirs ON theirs.attrelid = key.conrelid AND theirs.attnum = pair.their_number
    JOIN pg_attribute AS ours ON ours.attrelid = key.confrelid AND ours.attnum = pair.our_number
    WHERE key.contype = 'f' AND key.confrelid = to_regclass(:name)
""")
# A trigger's event is only in its text, which has that word. One that has it elsewhere is taken for such a one too.
_TRIGGER_IN_FILE = text("""
    SELECT name FROM (SELECT * FROM sqlite_master UNION ALL SELECT * FROM sqlite_temp_master)
    WHERE type = 'trigger' AND tbl_name = :name COLLATE NOCASE AND instr(lower(sql), :event) LIMIT 1
""")
# Rows of partitions, and of tables that inherit from this one, go with those tables' triggers.
_TRIGGER_ON_SERVER = text("""
    WITH RECURSIVE family (member) AS (
        SELECT to_regclass(:name)::oid UNION SELECT inhrelid FROM pg_inherits JOIN family ON inhparent = member
    )
    SELECT tgname::text FROM pg_trigger JOIN family ON tgrelid = member
    WHERE NOT tgisinternal AND tgenabled <> 'D' AND tgtype & CASE :event WHEN 'insert' THEN 4 ELSE 8 END <> 0
    UNION ALL
    SELECT rulename::text FROM pg_rewrite JOIN family ON ev_class = member
    WHERE ev_enabled <> 'D' AND ev_type::text = CASE :event WHEN 'insert' THEN '3' ELSE '4' END
    LIMIT 1
""")


@dataclass(frozen=True)
class Reference:
    """A foreign key to a table.

    Attributes:
        table: The table that has it.
        pairs: Its columns' names, each with the name of the column that it refers to.
    """

    table: TableClause
    pairs: tuple[tuple[str, str], ...]


def columns_of(connection: Connection, name: str) -> dict[str, str]:
    """Return the columns that a table has, in their order, with their types as it was made with.

    On PostgreSQL, what is no table has none; on SQLite, a view has columns too.
    """
    query = _COLUMNS_ON_SERVER if is_postgresql(connection.dialect) else _COLUMNS_IN_FILE
    return {row[0]: row[1] for row in connection.execute(query, {"name": name})}


def fault_of(connection: Connection, wanted: Table) -> str | None:
    """Return what is wrong with a table, as words that follow its name; None if it can be read and written."""
    on_server = is_postgresql(connection.dialect)
    kind = connection.scalar(_KIND_ON_SERVER if on_server else _KIND_IN_FILE, {"name": wanted.name})
    if kind not in _TABLES:
        return "is missing" if kind is None else "is no table"
    present = columns_of(connection, wanted.name)
    missing = [part.name for part in wanted.columns if part.name not in present]
    if missing:
        return f"has no column {', '.join(missing)}"
    return None if on_server or _has_rowid(connection, wanted) else WITHOUT_ROWID


def _has_rowid(connection: Connection, wanted: Table) -> bool:
    try:
        connection.execute(select(rowid_column).select_from(wanted).limit(0))
    except OperationalError as error:
        if getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR:  # Anything but a missing column.
            raise
        return False
    return True


#: What is said of a table that SQLite keeps by its key.
WITHOUT_ROWID = "is WITHOUT ROWID"


def has_used_up_its_numbers(connection: Connection, name: str) -> bool:
    """Whether a table in a file counts its rows, and has counted as far as SQLite can: no row can be added."""
    if connection.scalar(_KIND_IN_FILE, {"name": "sqlite_sequence"}) is None:
        return False
    return connection.scalar(_USED_UP, {"name": name}) is not None


#: What kinds of tables are called: in a file; on a server, and there with partitions.
_TABLES = ("table", "r", "p")


def trigger_of(connection: Connection, name: str, event: Literal["insert", "delete"]) -> str | None:
    """Return the name of a trigger, or of a server's rule, that may run at an *event* of a table; None if none does."""
    query = _TRIGGER_ON_SERVER if is_postgresql(connection.dialect) else _TRIGGER_IN_FILE
    found: str | None = connection.scalar(query, {"name": name, "event": event})
    return found


def references_to(connection: Connection, name: str, columns: Iterable[str]) -> Sequence[Reference]:
    """Return the foreign keys to a table that has these *columns*, whatever they do when a row goes."""
    own = {part.casefold(): part for part in columns}  # Elsewhere they may be written in other letters.
    query: TextClause = _REFERENCES_ON_SERVER if is_postgresql(connection.dialect) else _REFERENCES_IN_FILE
    keys = defaultdict(list)
    for key, schema, owner, theirs, ours in connection.execute(query, {"name": name}):
        if ours is not None and ours.casefold() in own:  # Else the key is at fault, and SQLite itself will say so.
            keys[key, schema, owner].append((theirs, own[ours.casefold()]))
    return [
        Reference(table(owner, *(column(theirs) for theirs, _ in pairs), schema=schema), tuple(pairs))
        for (_, schema, owner), pairs in keys.items()
    ]
