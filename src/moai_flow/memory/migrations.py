"""Bringing a file of an older program, or an empty one, to this version: once, under the write lock, all or nothing."""

import re
import sqlite3
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ClauseElement,
    Column,
    ColumnElement,
    Connection,
    MetaData,
    Table,
    Text,
    and_,
    bindparam,
    func,
    insert,
    inspect,
    not_,
    null,
    select,
    type_coerce,
    update,
)
from sqlalchemy.engine.interfaces import ReflectedColumn
from sqlalchemy.schema import CreateIndex, CreateTable

from moai_flow.memory.backends import SQLite, translated
from moai_flow.memory.connections import Connections, Held, copy_to
from moai_flow.memory.engine import Location, check_settings, create
from moai_flow.memory.errors import BusyError, ConflictError, InvalidInputError, SchemaError, StorageError, shown
from moai_flow.memory.files import mode_of
from moai_flow.memory.models import (
    TABLES,
    AgentEvent,
    Record,
    RegisteredAgent,
    SchemaInfo,
    SessionMemory,
    columns,
    rowid_column,
    table_of,
)
from moai_flow.memory.statements import Program, Statement
from moai_flow.memory.types import ISOText, UTCDateTime, decode_time, encode_iso

#: The version of the schema that this package reads and writes.
VERSION = "2.1.0"

_READ_VERSION = "SELECT value FROM schema_info WHERE key = 'version'"
_CHUNK = 10_000


def read_version(raw: sqlite3.Connection) -> str | None:
    """Return the version that the database says it has, or None if it says none."""
    try:
        with SQLite.reading_leniently(raw):  # What is not UTF-8 is none of ours.
            row = raw.execute(_READ_VERSION).fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # Anything but a missing table or column.
            raise
        return None
    return None if row is None else str(row[0])


def bring_up_to_date(held: Held, location: Location, *, wal_wait: float | None, now: datetime) -> None:
    """Bring the database to `VERSION`. One that has it already is only read, without a lock.

    Args:
        held: An open connection to it.
        location: Where it is.
        wal_wait: How long, in seconds, to try to switch its file to WAL; None leaves the journal to its owner.
        now: What the database notes as the time of it.

    Raises:
        SchemaError: If the database is of a newer version, or one of its tables is not what its name says.
        BusyError: If another program keeps it locked for longer than *wal_wait*.
        StorageError: If the copy that is made of an older file can't be written, or a server's database does not hold
            every text.
        InvalidInputError: If connections to a server are set so that values would change.
    """
    if location.is_on_server:
        _bring_server_up_to_date(held, location, now)
        return
    raw = held.raw
    version = read_version(raw)
    _check_known(version, location)
    if version != VERSION:
        _adoptable(raw, location)  # Before anything is written: the switch to WAL is.
    if location.path is not None and wal_wait is not None:
        _use_write_ahead_log(raw, location, wal_wait)
    if version == VERSION:
        return
    with held.connection.begin():
        raw.execute("BEGIN IMMEDIATE")
        version = read_version(raw)
        if version != VERSION:  # Nobody did it while this process waited for the lock.
            _check_known(version, location)
            _migrate(held, location, version, now)


def check_openable(raw: sqlite3.Connection, location: Location) -> tuple[str | None, bool]:
    """Return the version of a file's schema, and whether it has any of our tables: opening it would do the rest.

    Raises:
        SchemaError: If it is of a newer version, or one of its tables is not what its name says.
    """
    version = read_version(raw)
    _check_known(version, location)
    return version, len(_adoptable(raw, location)) > 0


def time_columns() -> Iterator[tuple[type[Record], Column[Any]]]:
    """Yield every column that holds a time as text."""
    for model in TABLES:
        for column in columns(model):
            if isinstance(column.type, ISOText | UTCDateTime):
                yield model, column


def unnormalised(column: Column[Any]) -> ColumnElement[bool]:
    """Return the condition for rows whose time is text, but not as this version writes it."""
    stored = type_coerce(column, Text)
    patterns = [_GLOB_ISO] if isinstance(column.type, ISOText) else [_GLOB_SECONDS, _GLOB_FRACTION]
    return and_(func.typeof(column) == "text", *(not_(stored.bool_op("GLOB")(pattern)) for pattern in patterns))


#: What a new database notes about itself. It may be cleaned up unasked: its owner made it with this program.
_FIRST_MARKS = (("version", VERSION), ("retention", "default"))


# On a server

#: Who migrates a database holds this lock, which stands for nothing but that. The number is SwarmDB's own.
_ADVISORY_LOCK = 0x53_77_61_72_6D_44_42


def server_tables() -> MetaData:
    """Return the tables as PostgreSQL takes them, where a key can't be nullable."""
    tables = MetaData()
    for model in TABLES:
        table = table_of(model).to_metadata(tables)
        for column in table.primary_key:
            column.nullable = False
        for index in table.indexes:
            # Said in the model, it would load PostgreSQL's dialect for whoever imports the package.
            index.dialect_options["postgresql"]["where"] = index.dialect_options["sqlite"]["where"]
    return tables


def server_ddl(location: Location) -> list[str]:
    """Return the statements that make an empty database on a server one of this version.

    Raises:
        InvalidInputError: If *location* is not on a server.
    """
    if not location.is_on_server:
        raise InvalidInputError("db", str(location), "a PostgreSQL URL: on SQLite, opening a file makes its tables")
    tables, dialect = server_tables(), create(location).dialect
    ddl: list[ClauseElement] = []
    for table in tables.sorted_tables:
        ddl.append(CreateTable(table))
        ddl += [CreateIndex(index) for index in sorted(table.indexes, key=lambda index: str(index.name))]
    info = tables.tables[str(SchemaInfo.__tablename__)]
    rows = [{"key": key, "value": value, "updated_at": func.now()} for key, value in _FIRST_MARKS]
    statements = [*ddl, insert(info).values(rows)]
    return [
        str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True})).strip()
        for statement in statements
    ]


def found_version(location: Location) -> str | None:
    """Return the version that a database says it has, without changing it; None if it says none.

    Raises:
        SchemaError: If that is newer than this package's, or none of SwarmDB's.
        StorageError: If it can't be read.
    """
    where = str(location)
    if location.path is not None and not location.path.exists():
        return None
    connections = Connections(create(location), where, kept=0)
    held = connections.take()
    try:
        version = _version_on_server(held.raw) if location.is_on_server else read_version(held.raw)
    except held.backend.error as error:
        raise translated(error, where) from error
    finally:
        connections.discard(held)
    _check_known(version, location)
    return version


def _bring_server_up_to_date(held: Held, location: Location, now: datetime) -> None:
    check_settings(held.raw, location)
    if _version_on_server(held.raw) == VERSION:
        return
    raw, backend = held.raw, held.backend
    with held.connection.begin():
        backend.begin(raw, readonly=False, alone=False)
        raw.execute("SELECT pg_advisory_xact_lock(%s)", (_ADVISORY_LOCK,))
        version = _version_on_server(held.raw)
        if version != VERSION:  # Nobody did it while this process waited for the lock.
            _check_known(version, location)
            _migrate_server(held.connection, location, now)
    backend.take_back(raw, held.usual)


_HAS_VERSION = """
    SELECT count(*) = 2 FROM pg_attribute
    WHERE attrelid = to_regclass('schema_info') AND attname IN ('key', 'value') AND atttypid = 'text'::regtype
"""


def _version_on_server(raw: Any) -> str | None:
    # Asking a table that is missing, or another program's, would be an error, which ends a transaction there.
    (is_there,) = raw.execute(_HAS_VERSION).fetchone()
    row = raw.execute(_READ_VERSION).fetchone() if is_there else None
    return None if row is None else str(row[0])


def _migrate_server(connection: Connection, location: Location, now: datetime) -> None:
    tables, found = server_tables(), inspect(connection)
    adopted = [table for table in tables.sorted_tables if found.has_table(table.name)]
    views = {*found.get_view_names(), *found.get_materialized_view_names()}
    for table in adopted:
        if table.name in views:
            raise _is_view(table, location)
        _check_server_columns(table, found.get_columns(table.name), location)
    tables.create_all(connection, checkfirst=True)
    for table in adopted:
        for index in table.indexes:
            index.create(connection, checkfirst=True)
    info = tables.tables[str(SchemaInfo.__tablename__)]
    for key, value, keep in (("version", VERSION, False), ("retention", "off" if adopted else "default", True)):
        old = connection.scalar(select(info.c.value).where(info.c.key == key))
        row = {"key": key, "value": value, "updated_at": now}
        if old is None:
            connection.execute(insert(info), row)
        elif not keep:
            connection.execute(update(info).where(info.c.key == key), row)


def _check_server_columns(table: Table, found: Sequence[ReflectedColumn], location: Location) -> None:
    dialect = location.url.get_dialect()()
    present = {column["name"]: column["type"].compile(dialect) for column in found}
    wanted = {column.name: column.type.compile(dialect) for column in table.columns}
    wrong = [
        f"{name} ({present.get(name, 'missing')}, not {kind})"
        for name, kind in wanted.items()
        if present.get(name) != kind
    ]
    if wrong:
        raise SchemaError(
            f"{location}: its table {table.name} has other columns than SwarmDB's: {', '.join(wrong)}; "
            "keep SwarmDB in a database of its own"
        )


def _check_known(version: str | None, location: Location) -> None:
    if version is None or version == VERSION:
        return
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){2}", version):
        raise SchemaError(f"{location}: its schema version is {shown(version)}, which is none of SwarmDB's")
    if _as_numbers(version) > _as_numbers(VERSION):
        raise SchemaError(
            f"{location}: its schema version is {version}, and this package knows {VERSION} at most; "
            "upgrade moai-flow-memory to open it"
        )


def _as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _use_write_ahead_log(raw: sqlite3.Connection, location: Location, wait: float) -> None:
    """Switch the file to WAL, where readers and a writer don't wait for each other. The file remembers it."""
    if raw.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
        return
    # This one statement does not wait by itself while somebody else has the file.
    deadline = time.monotonic() + wait
    while True:
        try:
            raw.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            if time.monotonic() > deadline:
                raise BusyError(f"{location}: another program keeps the file locked: {error}") from error
        time.sleep(0.01)


def _migrate(held: Held, location: Location, version: str | None, now: datetime) -> None:
    raw: sqlite3.Connection = held.raw
    adopted = _adoptable(raw, location)
    if adopted and location.path is not None:
        _copy_aside(location.path, version or "unversioned")
    Record.metadata.create_all(held.connection, checkfirst=True)
    for model in adopted:
        for index in table_of(model).indexes:
            index.create(held.connection, checkfirst=True)
    if adopted:
        with SQLite.reading_leniently(raw):  # What is not UTF-8 is no time, and stays.
            _normalise_times(held, str(location))
    noted = encode_iso(now)
    upsert = "INSERT INTO schema_info (key, value, updated_at) VALUES (?, ?, ?) ON CONFLICT (key) DO "
    raw.execute(
        upsert + "UPDATE SET value = excluded.value, updated_at = excluded.updated_at", ("version", VERSION, noted)
    )
    # Whether rows may one day be removed unasked: never from a file whose owner did not expect it.
    raw.execute(upsert + "NOTHING", ("retention", "off" if adopted else "default", noted))


def _adoptable(raw: sqlite3.Connection, location: Location) -> list[type[Record]]:
    """Return the models whose tables the file has already.

    Raises:
        SchemaError: If one of those is not what its name says.
    """
    present = dict(raw.execute("SELECT lower(name), type FROM sqlite_master WHERE type IN ('table', 'view')"))
    adopted = [model for model in TABLES if str(model.__tablename__) in present]
    for model in adopted:
        if present[str(model.__tablename__)] == "view":
            raise _is_view(table_of(model), location)
        _check_columns(raw, model, location)
    return adopted


def _is_view(table: Table, location: Location) -> SchemaError:
    return SchemaError(
        f"{location}: its {table.name} is a view, so it is not SwarmDB's; keep SwarmDB in a database of its own"
    )


def _check_columns(raw: sqlite3.Connection, model: type[Record], location: Location) -> None:
    table = str(model.__tablename__)
    present = {row[1] for row in raw.execute(f"PRAGMA table_info({table})")}
    missing = [column.name for column in columns(model) if column.name not in present]
    if missing:
        raise SchemaError(
            f"{location}: its table {table} has no column {', '.join(missing)}, so it is not SwarmDB's; "
            "keep SwarmDB in a file of its own"
        )
    try:
        raw.execute(str(select(rowid_column).select_from(table_of(model)))).close()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # Anything but a missing column.
            raise
        raise SchemaError(
            f"{location}: its table {table} is WITHOUT ROWID, which SwarmDB's is not; "
            "copy its rows into one that is not either"
        ) from None


def _copy_aside(path: Path, version: str) -> None:
    """Copy the file to ``<file>.<version>.bak``, unless that exists: an earlier copy is never overwritten."""
    target = path.with_name(f"{path.name}.{version}.bak")
    try:
        if target.exists():
            return
        # Through a connection of its own: it reads what is committed, whatever journal the file uses.
        with closing(sqlite3.connect(path)) as source:
            copy_to(source, target, mode_of(path))
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"{path}: the copy to {target} that comes before the migration failed: {error}") from error


# Times of older programs


def _glob(example: str) -> str:
    return example.replace("0", "[0-9]")


_GLOB_SECONDS = _glob("0000-00-00 00:00:00")
_GLOB_FRACTION = _glob("0000-00-00 00:00:00.000000")
_GLOB_ISO = _glob("0000-00-00T00:00:00.000000") + "+00:00"

_QUARTER = timedelta(minutes=15)
_TOLERANCE = timedelta(seconds=5)
_WEST, _EAST = timedelta(hours=-12), timedelta(hours=14)

# What stands beside a writer's local time and says the same moment in UTC.
_REFERENCES: dict[Column[Any], ColumnElement[Any]] = {
    table_of(AgentEvent).c.timestamp: type_coerce(table_of(AgentEvent).c.created_at, Text),
    table_of(SessionMemory).c.timestamp: type_coerce(table_of(SessionMemory).c.created_at, Text),
    # As they are stored: what no datetime holds says nothing, and stays.
    table_of(RegisteredAgent).c.last_updated: type_coerce(
        func.coalesce(table_of(RegisteredAgent).c.complete_time, table_of(RegisteredAgent).c.spawn_time), Text
    ),
}


@dataclass(frozen=True)
class _Zones:
    """Which offset from UTC the writers of a file had, by their local time."""

    moments: list[datetime]
    offsets: list[timedelta]

    def nearest(self, local: datetime) -> timedelta | None:
        """Return the offset of the row whose local time is nearest to *local*, or None if no row tells."""
        if not self.moments:
            return None
        after = bisect_left(self.moments, local)
        candidates = range(max(after - 1, 0), min(after + 1, len(self.moments)))
        return self.offsets[min(candidates, key=lambda index: abs(self.moments[index] - local))]


def _normalise_times(held: Held, where: str) -> None:
    """Rewrite every time as UTC in this version's format. What is no time at all stays, for `check` to name."""
    zones = _find_zones(held.connection)
    for model, column in time_columns():
        statement = Statement(
            update(table_of(model)).where(rowid_column == bindparam("rowid_")).values({column: bindparam("moment")})
        )
        program = Program(statement, held.connection.dialect, where)
        for rowid, stored, beside in _in_chunks(held.connection, column):
            moment = _moment(stored, beside, zones)
            if moment is not None:
                _store(held.raw, program, rowid, moment)


def _moment(stored: str, beside: Any, zones: _Zones) -> datetime | None:
    """Return what a *stored* time means, or None if it is none."""
    local = _local_time(stored)
    offset = None
    if local is not None:
        offset = _offset(local, beside)
        offset = zones.nearest(local) if offset is None else offset
    try:
        return decode_time(stored) if local is None or offset is None else (local - offset).replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def _store(raw: sqlite3.Connection, program: Program, rowid: int, moment: datetime) -> None:
    while True:
        try:
            program.execute(raw, program.bind({"rowid_": rowid, "moment": moment}))
        except ConflictError as error:
            cause = error.__cause__
            if not isinstance(cause, sqlite3.Error) or cause.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
                raise
            # Another metric of the task has this time in its key: take the next free one, as an insert would.
            try:
                moment += timedelta(microseconds=1)
            except OverflowError:
                return  # The last moment of all is taken: this one stays as it is written.
        else:
            return


def _find_zones(connection: Connection) -> _Zones:
    # One sample an hour is plenty, and keeps this small for any file.
    samples: dict[datetime, tuple[datetime, timedelta]] = {}
    for column in _REFERENCES:
        for _, stored, beside in _in_chunks(connection, column):
            local = _local_time(stored)
            if local is not None and (offset := _offset(local, beside)) is not None:
                samples[local.replace(minute=0, second=0, microsecond=0)] = (local, offset)
    ordered = [samples[hour] for hour in sorted(samples)]
    return _Zones([local for local, _ in ordered], [offset for _, offset in ordered])


def _in_chunks(connection: Connection, column: Column[Any]) -> Iterator[tuple[int, str, Any]]:
    """Yield rowid, stored time and reference of what is not normalised. Rows may be changed in between."""
    last = -(2**63)
    while True:
        rows = connection.execute(
            select(rowid_column, type_coerce(column, Text), _REFERENCES.get(column, null()))
            .select_from(column.table)
            .where(unnormalised(column), rowid_column > last)
            .order_by(rowid_column)
            .limit(_CHUNK)
        ).all()
        if not rows:
            return
        yield from (tuple(row) for row in rows)
        last = rows[-1][0]


def _local_time(stored: str) -> datetime | None:
    """Return *stored* as a naive local time, or None if it is not one."""
    try:
        moment = datetime.fromisoformat(stored)
    except ValueError:
        return None
    return moment if moment.tzinfo is None and stored[10:11] == "T" else None


def _offset(local: datetime, beside: Any) -> timedelta | None:
    """Return how far *local* is from the moment *beside* it, if that is an offset that a zone can have."""
    if isinstance(beside, str) and _local_time(beside) is not None:
        return None  # A local time itself, which says nothing.
    try:
        moment = datetime.fromtimestamp(beside, UTC) if isinstance(beside, float) else decode_time(str(beside))
    except (ValueError, OverflowError, OSError):
        return None
    apart = local - moment.replace(tzinfo=None)
    offset = round(apart / _QUARTER) * _QUARTER
    return offset if abs(apart - offset) <= _TOLERANCE and _WEST <= offset <= _EAST else None
