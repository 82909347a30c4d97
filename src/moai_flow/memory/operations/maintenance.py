"""Looking after the database: compacting, copying, and checking that all is well."""

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Dialect,
    LargeBinary,
    MetaData,
    Table,
    Text,
    delete,
    exists,
    func,
    insert,
    literal_column,
    select,
    type_coerce,
)

from moai_flow.memory.backends import SQLite, translating
from moai_flow.memory.connections import Held, copy_to
from moai_flow.memory.engine import hard_links, log_bytes, path_of_file
from moai_flow.memory.errors import (
    CorruptDataError,
    InvalidInputError,
    SchemaError,
    StorageError,
    SwarmDBError,
    TransactionError,
)
from moai_flow.memory.files import PRIVATE, belong_together, make_folder, mode_of
from moai_flow.memory.migrations import time_columns, unnormalised
from moai_flow.memory.models import TABLES, Record, SchemaInfo, SessionMemory, rowid_column, table_of
from moai_flow.memory.scope import Scope
from moai_flow.memory.statements import RowDecoder, Statement
from moai_flow.memory.types import EnumText, is_postgresql

_VERSION = Statement(select(table_of(SchemaInfo).c.value).where(table_of(SchemaInfo).c.key == "version"))
_SIZE_ON_SERVER = Statement(select(func.pg_database_size(func.current_database())))
_PRAGMAS = {"page_count": "PRAGMA page_count", "page_size": "PRAGMA page_size"}

#: For how long vacuum() keeps writers waiting for readers, in seconds: for all but long ones.
_READERS_WAITED_FOR = 1.0

#: How many rows are checked at a time.
_CHUNK = 1000

# The versions that have the bug, but for the minor versions that mend it, each from a patch on.
_WAL_RESET_FIRST, _WAL_RESET_LAST = (3, 7, 0), (3, 51, 2)
_WAL_RESET_MENDED: dict[tuple[int, ...], int] = {(3, 44): 6, (3, 50): 7}


@dataclass(frozen=True)
class UnlistedValue:
    """A word in an enum's column that the enum does not list. It reads as a member that keeps it.

    Attributes:
        table: The table's name.
        column: The column's name.
        value: The word.
        rows: How many rows hold it.
    """

    table: str
    column: str
    value: str
    rows: int


@dataclass(frozen=True)
class ForeignTime:
    """Times that another program wrote in a format of its own. They read by the rule for files of older programs.

    Attributes:
        table: The table's name.
        column: The column's name.
        rows: How many rows hold one.
    """

    table: str
    column: str
    rows: int


@dataclass(frozen=True)
class CheckReport:
    """What `SwarmDB.check` found.

    Attributes:
        sqlite_version: The version of SQLite in use.
        has_wal_reset_bug: Whether that version has a rare bug that can corrupt a file in WAL mode.
        integrity: What SQLite's own integrity check complains about. Empty is good.
        undecodable: An error for each value that can't be decoded. Empty is good.
        unlisted: Words outside the enums. They are readable, and no fault.
        foreign_times: Times in another program's format. They are readable, and no fault.
        quarantined: How many rows were moved into quarantine tables.
        wal_bytes: How large the log of what was not yet moved into the file is; None if the database has no file. Some
            megabytes are usual. It grows while somebody keeps a transaction open, a reader as well.
        hard_links: How many names the database's file has; None if it has no file. With more than one, programs that
            open it by different ones lose each other's writes.
    """

    sqlite_version: str
    has_wal_reset_bug: bool
    integrity: tuple[str, ...] = ()
    undecodable: tuple[CorruptDataError, ...] = ()
    unlisted: tuple[UnlistedValue, ...] = ()
    foreign_times: tuple[ForeignTime, ...] = ()
    quarantined: int = 0
    wal_bytes: int | None = None
    hard_links: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the file is sound, and every row can be read."""
        return not self.integrity and len(self.undecodable) == 0

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do about it, a sentence or two for each kind of finding, the worst first. Empty if all is well."""
        rows = len({(error.table, *map(repr, error.row.items())) for error in self.undecodable})
        found = {
            _ADVICE_DAMAGE: bool(self.integrity),
            _ADVICE_MOVED.format(rows=_rows(self.quarantined)): bool(self.quarantined),
            _ADVICE_UNDECODABLE.format(rows=_rows(rows)): bool(rows) and not self.quarantined,
            _ADVICE_LINKS.format(names=self.hard_links): (self.hard_links or 0) > 1,
            _ADVICE_UNLISTED.format(rows=_rows(sum(word.rows for word in self.unlisted))): bool(self.unlisted),
            _ADVICE_TIMES.format(rows=_rows(sum(times.rows for times in self.foreign_times))): bool(self.foreign_times),
            _ADVICE_BUG.format(version=self.sqlite_version): self.has_wal_reset_bug,
        }
        return tuple(sentence for sentence, is_due in found.items() if is_due)


_ADVICE_DAMAGE = (
    "The file is damaged: a disk, a crash of the machine or another program has written over parts of it. Stop the "
    "programs that use it, and keep a copy of the file with its -wal and -shm as they are. Then take the last backup "
    "that checks well, or save what can be read: sqlite3 swarm.db .recover | sqlite3 saved.db. If only indexes are "
    "named, sqlite3 swarm.db REINDEX mends them. Ask what the disk's own health check says."
)
_ADVICE_MOVED = (
    "{rows} moved into tables whose names end in _quarantine, whole and as stored; everything else can be read again. "
    "Look at them with sqlite3 or psql, put right what you need, and drop those tables when you are done."
)
_ADVICE_UNDECODABLE = (
    "{rows} can't be read, and calls that meet one raise CorruptDataError; nothing else is affected. Mend each with "
    "SQL, or run swarmdb check --quarantine, or check(quarantine=True), which moves them aside, whole, so that "
    "nothing is lost. Find out which program wrote them: SwarmDB refuses such values."
)
_ADVICE_LINKS = (
    "The file has {names} names (hard links), and SQLite keeps a log for each: programs that open it by different ones "
    "lose each other's writes. Nothing is wrong as long as all of them use the same. A name that was meant as a backup "
    "is none, since it changes with the file: make one with swarmdb backup. Find the others with find -samefile, and "
    "remove them, or replace each by a symbolic link."
)
_ADVICE_UNLISTED = (
    "{rows} with words that SwarmDB does not list. They are read as they are: there is nothing to do, but look "
    "whether a word is a slip of the program that wrote it."
)
_ADVICE_TIMES = (
    "{rows} with times as an older program writes them. They are read, in the zone of this machine where they name "
    "none. If that program still writes, let it use SwarmDB."
)
_ADVICE_BUG = (
    "SQLite {version} has a rare bug that can damage a file which several programs write: nothing is wrong now; a "
    "Python with SQLite 3.51.3 or later, 3.50.7 or 3.44.6 does not have it. Until then, keep backups."
)


def _rows(number: int) -> str:
    return f"{number:,} row" if number == 1 else f"{number:,} rows"


class MaintenanceOperations(Scope):
    """Keeping the database small, safe and sound."""

    @property
    def db_path(self) -> Path:
        """The database's file, as an absolute path.

        Raises:
            StorageError: If the database is in memory, or on a server.
        """
        if self._location.path is None:
            raise StorageError(
                f"a database {'on a server' if self._location.is_on_server else 'in memory'} has no file"
            )
        return self._location.path

    @property
    def schema_version(self) -> str:
        """The version of the schema, as the database says.

        Raises:
            SchemaError: If it says none any more.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        row = self._tuples(_VERSION, {})
        if not row or not isinstance(row[0][0], str):
            raise SchemaError(f"{self._location}: the database does not say its schema version any more")
        version: str = row[0][0]
        return version

    def size_bytes(self) -> int:
        """Return how large the database is, in bytes, without the log of what was not yet moved into it.

        On PostgreSQL it is the whole database, with the tables of others in it.

        Raises:
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        if self._location.is_on_server:
            ((size,),) = self._tuples(_SIZE_ON_SERVER, {})
            return int(size)
        pages = self._pragma("page_count")
        return int(pages) * int(self._pragma("page_size"))

    def vacuum(self) -> None:
        """Rebuild the database's file, which gives the space of deleted rows back to the disk.

        It takes as long as copying the file, needs as much free space again, and keeps writers waiting meanwhile. If
        somebody is reading, the file shrinks with the first writes after that. On PostgreSQL it is a plain ``VACUUM``
        of SwarmDB's tables: the space is used again, and nobody waits.

        Raises:
            TransactionError: Inside a transaction.
            BusyError: If another user keeps the database for longer than the busy timeout.
            StorageError: If the disk is full, or the database can't be written.
            ClosedError: After `close`.
        """
        self._refuse_in_block("vacuum()")
        self._refuse_to_wait()
        held = self._connections.take()
        try:
            with translating(self._connections.where):
                if self._location.is_on_server:
                    held.raw.execute("VACUUM " + ", ".join(str(model.__tablename__) for model in TABLES))
                    return
                held.raw.execute("VACUUM")
                # The rebuilt pages are in the log; this moves them into the file and cuts the file to its new size. It
                # has the write lock while it waits for readers, so it doesn't wait for long ones: later writes do the
                # same, but only once no two reads overlap.
                with SQLite.impatient(held.raw, _READERS_WAITED_FOR):
                    held.raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self._connections.give(held)

    def backup(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Copy the database, as it is at this moment, into a file, while others go on reading and writing.

        The file appears when it is complete, never half-written, and may be read by those who may read the database.
        For a database on a server there are the server's own tools, such as ``pg_dump``.

        Args:
            path: The file to write. Its folder is made if it is missing.
            overwrite: Whether to replace the file if it exists.

        Returns:
            The file's absolute path.

        Raises:
            InvalidInputError: If *path* is a folder, the database itself or its log, or exists and *overwrite* is not
                set.
            TransactionError: Inside a transaction, whose changes the copy would lack.
            BusyError: If a writer keeps a database in memory for longer than the busy timeout.
            StorageError: If the file can't be written, or the database is on a server.
            ClosedError: After `close`.
        """
        self._refuse_in_block("backup()")
        if self._location.is_on_server:
            self._connections.check_open()
            raise StorageError(f"{self._location}: backup() copies a file; a server's database is copied by pg_dump")
        if self._location.is_in_memory:
            self._refuse_to_wait()
        target = path_of_file(path, field="path")
        if self._location.path is not None and belong_together(target, self._location.path):
            raise InvalidInputError("path", str(path), "a file that is not the database itself")
        taken = InvalidInputError("path", str(path), "a file that does not exist yet, or overwrite=True")
        if target.exists() and not overwrite:
            raise taken
        held = self._connections.take()
        try:
            make_folder(target.parent)
            mode = PRIVATE if self._location.path is None else mode_of(self._location.path)
            try:
                copy_to(held.raw, target, mode, overwrite=overwrite)
            except FileExistsError as error:
                raise taken from error
        except SwarmDBError:
            raise
        except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
            raise StorageError(f"{target}: the backup can't be written: {error}") from error
        finally:
            self._connections.give(held)
        return target

    def check(self, *, quarantine: bool = False) -> CheckReport:
        """Check that the database is sound, and that every row in it can be read.

        It reads every row, so it takes a while on a large database. Others go on reading and writing meanwhile, but
        with *quarantine* writers wait.

        Args:
            quarantine: Whether to move each row that can't be decoded, whole and as it is stored, into a table beside
                its own: ``agent_events_quarantine`` and so on. There it is kept, and bothers nobody.

        Returns:
            What was found.

        Raises:
            TransactionError: If rows are to be moved inside a read-only session.
            BusyError: If rows are to be moved, and another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        with self._block(readonly=not quarantine) as block, translating(self._connections.where):
            connection, raw = block.held.connection, block.held.raw
            integrity: list[str] = []
            undecodable: list[CorruptDataError] = []
            unlisted: Counter[tuple[str, str, str]] = Counter()
            moved = 0
            with block.held.backend.reading_leniently(raw):
                if not self._location.is_on_server:
                    with _noting_damage(integrity, "integrity_check"):
                        integrity += [row[0] for row in raw.execute("PRAGMA integrity_check") if row[0] != "ok"]
                for model in TABLES:
                    with _noting_damage(integrity, str(model.__tablename__)):
                        bad_rows = _inspect(block.held, RowDecoder(model, connection.dialect), undecodable, unlisted)
                        if quarantine and bad_rows:
                            moved += _move_aside(connection, model, bad_rows)
            foreign_times = [] if self._location.is_on_server else list(_foreign_times(connection))
        return CheckReport(
            sqlite_version=sqlite3.sqlite_version,
            has_wal_reset_bug=not self._location.is_on_server and has_wal_reset_bug(sqlite3.sqlite_version_info),
            integrity=tuple(integrity),
            undecodable=tuple(undecodable),
            unlisted=tuple(UnlistedValue(*place, rows) for place, rows in sorted(unlisted.items())),
            foreign_times=tuple(foreign_times),
            quarantined=moved,
            wal_bytes=log_bytes(self._location),
            hard_links=hard_links(self._location),
        )

    def _pragma(self, name: Literal["page_count", "page_size"]) -> int:
        block = self._reading_block()
        held = self._connections.take() if block is None else block.held
        try:
            with translating(self._connections.where):
                value: int = held.raw.execute(_PRAGMAS[name]).fetchone()[0]
                return value
        finally:
            if block is None:
                self._connections.give(held)

    def _refuse_in_block(self, call: str) -> None:
        if self._own_block() is not None:
            raise TransactionError(f"{call} can't run inside a transaction")


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether a version of SQLite has the bug that is described at https://sqlite.org/wal.html#walresetbug."""
    if version[:2] in _WAL_RESET_MENDED:
        return version[2] < _WAL_RESET_MENDED[version[:2]]
    return _WAL_RESET_FIRST <= version <= _WAL_RESET_LAST


@contextmanager
def _noting_damage(integrity: list[str], place: str) -> Iterator[None]:
    """Note that SQLite found the file damaged, instead of ending the check there."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        integrity.append(f"{place}: {error}")


def _foreign_times(connection: Connection) -> Iterator[ForeignTime]:
    for model, column in time_columns():
        if rows := connection.scalar(select(func.count()).where(unnormalised(column))):
            yield ForeignTime(str(model.__tablename__), column.name, rows)


def _inspect(
    held: Held,
    decoder: RowDecoder[Any],
    undecodable: list[CorruptDataError],
    unlisted: Counter[tuple[str, str, str]],
) -> list[Any]:
    """Add what a table's rows have wrong with them, and return the addresses of those that can't be decoded."""
    table = table_of(decoder.model)
    vocabularies = [
        (index, column.name, column.type.vocabulary)
        for index, column in enumerate(table.columns)
        if isinstance(column.type, EnumText)
    ]
    bad_rows = []
    dialect = held.connection.dialect
    everything = str(select(*table.columns, _address(decoder.model, dialect)).compile(dialect=dialect))
    for chunk in held.backend.chunks(held.raw, everything, _CHUNK):
        rows = [row[:-1] for row in chunk]
        if not decoder.are_sound(rows):
            for row, (*_, address) in zip(rows, chunk, strict=True):
                if faults := decoder.faults(row):
                    undecodable.extend(faults)
                    bad_rows.append(address)
        for index, name, vocabulary in vocabularies:
            for word, times in Counter(row[index] for row in rows).items():
                if isinstance(word, str) and not vocabulary.read(word).is_listed:
                    unlisted[table.name, name, word] += times
    return bad_rows


def _address(model: type[Record], dialect: Dialect) -> ColumnElement[Any]:
    """Return what tells a table's rows apart, whatever they hold, as long as the transaction lasts."""
    if not is_postgresql(dialect):
        return rowid_column
    number = next((column for column in table_of(model).primary_key if column.identity), None)
    return literal_column("ctid::text", Text) if number is None else number


def _move_aside(connection: Connection, model: type[Record], addresses: list[Any]) -> int:
    """Move rows, as they are stored, into the table's quarantine, and return how many those are."""
    table, dialect = table_of(model), connection.dialect
    # On SQLite, BLOB columns keep whatever they are given; a server's columns hold nothing but their type.
    columns = (Column(column.name, column.type if is_postgresql(dialect) else LargeBinary) for column in table.columns)
    quarantine = Table(f"{table.name}_quarantine", MetaData(), *columns)
    quarantine.create(connection, checkfirst=True)
    moved = 0
    for address in addresses:
        condition: ColumnElement[bool] = _address(model, dialect) == address
        if model is SessionMemory:
            # With it goes what it replaced: else an older value of the key would come back.
            bad = table.alias()
            same_key = (table.c[name] == bad.c[name] for name in ("session_id", "memory_type", "key"))
            condition = exists().where(bad.c.id == address, table.c.id <= bad.c.id, *same_key)
        whole_rows = select(*(type_coerce(column, LargeBinary) for column in table.columns)).where(condition)
        copied = insert(quarantine).from_select(quarantine.columns.keys(), whole_rows)
        moved += connection.execute(copied, execution_options={"preserve_rowcount": True}).rowcount
        connection.execute(delete(table).where(condition))
    return moved
