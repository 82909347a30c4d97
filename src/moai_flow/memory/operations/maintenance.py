"""Looking after the database: compacting, copying, and checking that all is well."""

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError

from moai_flow.memory.backends import SQLite, is_damage, translated, translating
from moai_flow.memory.catalogue import fault_of, has_used_up_its_numbers
from moai_flow.memory.connections import Held, copy_to
from moai_flow.memory.engine import hard_links, log_bytes, path_of_file
from moai_flow.memory.errors import (
    ConflictError,
    CorruptDataError,
    InvalidInputError,
    SchemaError,
    StorageError,
    SwarmDBError,
    TransactionError,
)
from moai_flow.memory.files import PRIVATE, belong_together, make_folder, mode_of
from moai_flow.memory.migrations import time_columns, unnormalised
from moai_flow.memory.models import TABLES, Record, SchemaInfo, table_of
from moai_flow.memory.quarantine import address_of, move_aside
from moai_flow.memory.scope import Scope
from moai_flow.memory.statements import RowDecoder, Statement
from moai_flow.memory.types import EnumText, is_postgresql

_VERSION = Statement(select(table_of(SchemaInfo).c.value).where(table_of(SchemaInfo).c.key == "version"))
_SIZE_ON_SERVER = Statement(select(func.pg_database_size(func.current_database())))
_PRAGMAS = {"page_count": "PRAGMA page_count", "page_size": "PRAGMA page_size"}

# As VACUUM itself decides, which only warns. PostgreSQL 17 has a right of its own for it.
_NOT_OURS_TO_VACUUM = """
    SELECT string_agg(relname, ', ') FROM pg_class
    WHERE oid IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name) AND NOT (
        pg_has_role(relowner, 'USAGE')
        OR pg_has_role((SELECT datdba FROM pg_database WHERE datname = current_database()), 'USAGE')
        OR CASE WHEN current_setting('server_version_num')::int >= 170000
            THEN has_table_privilege(pg_class.oid, 'MAINTAIN') ELSE false END
    )
"""

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
class TableFault:
    """A table that is not as SwarmDB needs it, so that calls which use it fail.

    Attributes:
        table: The table's name.
        reason: What is wrong with it, as words that follow the name.
    """

    table: str
    reason: str


@dataclass(frozen=True)
class KeptRows:
    """Rows that can't be read, and that could not be moved aside either. They are where they were.

    Attributes:
        table: The table's name.
        reason: What is in the way.
        rows: How many rows it keeps.
    """

    table: str
    reason: str
    rows: int


@dataclass(frozen=True)
class CheckReport:
    """What `SwarmDB.check` found.

    Attributes:
        sqlite_version: The version of SQLite in use.
        has_wal_reset_bug: Whether that version has a rare bug that can corrupt a file in WAL mode.
        integrity: What SQLite's own integrity check complains about. Empty is good.
        tables: Tables that calls can't use as they are. Empty is good.
        undecodable: An error for each value that can't be decoded. Empty is good.
        unlisted: Words outside the enums. They are readable, and no fault.
        foreign_times: Times in another program's format. They are readable, and no fault.
        quarantined: How many rows were moved into quarantine tables.
        kept: Rows that were to be moved, and could not be. Empty is good.
        wal_bytes: How large the log of what was not yet moved into the file is; None if the database has no file. Some
            megabytes are usual. It grows while somebody keeps a transaction open, a reader as well.
        hard_links: How many names the database's file has; None if it has no file. With more than one, programs that
            open it by different ones lose each other's writes.
    """

    sqlite_version: str
    has_wal_reset_bug: bool
    integrity: tuple[str, ...] = ()
    tables: tuple[TableFault, ...] = ()
    undecodable: tuple[CorruptDataError, ...] = ()
    unlisted: tuple[UnlistedValue, ...] = ()
    foreign_times: tuple[ForeignTime, ...] = ()
    quarantined: int = 0
    kept: tuple[KeptRows, ...] = ()
    wal_bytes: int | None = None
    hard_links: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the file and its tables are sound, and every row can be read."""
        return not self.integrity and not self.tables and len(self.undecodable) == 0

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do about it, a sentence or two for each kind of finding, the worst first. Empty if all is well."""
        rows = len({(error.table, *map(repr, error.row.items())) for error in self.undecodable})
        found = {
            ADVICE_DAMAGE: bool(self.integrity),
            _ADVICE_TABLES: any(fault.reason != _USED_UP for fault in self.tables),
            _ADVICE_USED_UP: any(fault.reason == _USED_UP for fault in self.tables),
            _ADVICE_MOVED.format(rows=_rows(self.quarantined)): bool(self.quarantined),
            _ADVICE_KEPT.format(rows=_rows(sum(kept.rows for kept in self.kept))): bool(self.kept),
            _ADVICE_UNDECODABLE.format(rows=_rows(rows)): bool(rows) and not self.quarantined and not self.kept,
            _ADVICE_LINKS.format(names=self.hard_links): (self.hard_links or 0) > 1,
            _ADVICE_UNLISTED.format(rows=_rows(sum(word.rows for word in self.unlisted))): bool(self.unlisted),
            _ADVICE_TIMES.format(rows=_rows(sum(times.rows for times in self.foreign_times))): bool(self.foreign_times),
            _ADVICE_BUG.format(version=self.sqlite_version): self.has_wal_reset_bug,
        }
        return tuple(sentence for sentence, is_due in found.items() if is_due)


#: What to do about a damaged file, also where it can't even be opened.
ADVICE_DAMAGE = (
    "The file is damaged: a disk, a crash of the machine or another program has written over parts of it. Stop the "
    "programs that use it, and keep a copy of the file with its -wal and -shm as they are. Then take the last backup "
    "that checks well, or save what can be read: sqlite3 swarm.db .recover | sqlite3 saved.db. If only indexes are "
    "named, sqlite3 swarm.db REINDEX mends them. Ask what the disk's own health check says."
)
_ADVICE_TABLES = (
    "A table is not as SwarmDB makes it: calls that use it fail, and its rows were not looked at. Put the table back "
    "under its name. If there is none any more, rename what has the name, drop the indexes of that, and DELETE FROM "
    "schema_info WHERE key = 'version': whoever opens the database next makes what is missing, and rows can be copied "
    "into it. Find out which program changed it."
)
_USED_UP = "has used up its numbers: a row has 9223372036854775807, and none can be added"
_ADVICE_USED_UP = (
    "A program gave a row the highest number that there is, and SQLite says that the disk is full when another is "
    "added. Give that row a free number, such as UPDATE agent_events SET id = 1000000 WHERE id = 9223372036854775807, "
    "and then UPDATE sqlite_sequence SET seq = (SELECT max(id) FROM agent_events) WHERE name = 'agent_events'."
)
_ADVICE_MOVED = (
    "{rows} moved into tables whose names end in _quarantine, whole and as stored; no call meets them any more. "
    "Look at them with sqlite3 or psql, put right what you need, and drop those tables when you are done."
)
_ADVICE_KEPT = (
    "{rows} could not be moved without a loss, and stay where they were: calls that meet one raise CorruptDataError. "
    "Where rows of another table refer to them, mend them with SQL, or delete what refers to them first; where a "
    "trigger is in the way, drop it for as long as it takes; where a quarantine table is not SwarmDB's, rename it. "
    "Then check again."
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
            StorageError: If the disk is full, the database can't be written, or on PostgreSQL it is another role's.
            ClosedError: After `close`.
        """
        self._refuse_in_block("vacuum()")
        self._refuse_to_wait()
        held = self._connections.take()
        try:
            with translating(self._connections.where):
                if self._location.is_on_server:
                    _vacuum_on_server(held.raw, self._connections.where)
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
            StorageError: If the file can't be written, or was emptied or removed while its log is there; or if the
                database is on a server.
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

        It reads every row, so it takes a while on a large database. Others go on reading and writing meanwhile. Where
        rows are to be moved, it then reads once more, and writers wait.

        Args:
            quarantine: Whether to move each row that can't be decoded, whole and as it is stored, into a table beside
                its own: ``agent_events_quarantine`` and so on. There it is kept, and bothers nobody.
                A row that could not go without a loss stays: see `CheckReport.kept`.

        Returns:
            What was found.

        Raises:
            TransactionError: With *quarantine*, inside a read-only session.
            BusyError: If rows are to be moved, and another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        outer = self._own_block()
        if quarantine and outer is not None and outer.readonly:
            raise TransactionError("check(quarantine=True) moves rows, and session(readonly=True) refuses writes")
        with self._block(readonly=True) as block, translating(self._connections.where):
            found = _inspected(block.held)
        moved, kept = 0, Counter[tuple[str, str]]()
        if quarantine and found.bad_rows and found.integrity:
            kept = found.kept_for(_DAMAGED)
        elif quarantine and found.bad_rows:
            try:
                # Rows may have come and gone meanwhile.
                with self._block() as block, translating(self._connections.where):
                    found = _inspected(block.held)
                    moved, kept = _move_aside(block.held, self._connections.where, found)
            except (ConflictError, StorageError) as error:
                # A full disk ends the transaction, and a key of the quarantine may only be looked at as it commits.
                reason = str(error).removeprefix(f"{self._connections.where}: ")
                moved, kept = 0, found.kept_for(reason)
        return CheckReport(
            sqlite_version=sqlite3.sqlite_version,
            has_wal_reset_bug=not self._location.is_on_server and has_wal_reset_bug(sqlite3.sqlite_version_info),
            integrity=tuple(found.integrity),
            tables=tuple(found.tables),
            undecodable=tuple(found.undecodable),
            unlisted=tuple(UnlistedValue(*place, rows) for place, rows in sorted(found.unlisted.items())),
            foreign_times=tuple(found.foreign_times),
            quarantined=moved,
            kept=tuple(KeptRows(*place, rows) for place, rows in sorted(kept.items())),
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


def _vacuum_on_server(raw: Any, where: str) -> None:
    names = [str(model.__tablename__) for model in TABLES]
    (refused,) = raw.execute(_NOT_OURS_TO_VACUUM, (names,)).fetchone()
    if refused is not None:
        raise StorageError(f"{where}: only the owner may vacuum {refused}; nothing was done")
    raw.execute("VACUUM " + ", ".join(names))


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
    except (sqlite3.Error, UnicodeDecodeError, DBAPIError) as error:
        if not is_damage(error):
            raise
        integrity.append(str(translated(error, place)))


def _foreign_times(connection: Connection, model: type[Record]) -> Iterator[ForeignTime]:
    for owner, column in time_columns():
        if owner is model and (rows := connection.scalar(select(func.count()).where(unnormalised(column)))):
            yield ForeignTime(str(model.__tablename__), column.name, rows)


@dataclass(frozen=True)
class _Findings:
    """What is wrong with a database, and the addresses of the rows that can't be decoded, by table."""

    integrity: list[str] = field(default_factory=list)
    tables: list[TableFault] = field(default_factory=list)
    undecodable: list[CorruptDataError] = field(default_factory=list)
    unlisted: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    foreign_times: list[ForeignTime] = field(default_factory=list)
    bad_rows: dict[str, list[Any]] = field(default_factory=dict)

    def kept_for(self, reason: str) -> Counter[tuple[str, str]]:
        """Return how many rows are kept, by table, where all are for one reason."""
        return Counter({(table, reason): len(rows) for table, rows in self.bad_rows.items()})


_DAMAGED = "the file is damaged, and nothing is written into it"


def _inspected(held: Held) -> _Findings:
    """Look at everything, inside a transaction."""
    found, connection = _Findings(), held.connection
    is_on_server = is_postgresql(connection.dialect)
    with held.backend.reading_leniently(held.raw):
        if not is_on_server:
            with _noting_damage(found.integrity, "integrity_check"):
                complaints = held.raw.execute("PRAGMA integrity_check")
                found.integrity.extend(row[0] for row in complaints if row[0] != "ok")
        for model in TABLES:
            with _noting_damage(found.integrity, str(model.__tablename__)):
                if (fault := fault_of(connection, table_of(model))) is not None:
                    found.tables.append(TableFault(str(model.__tablename__), fault))
                    continue
                _inspect(held, RowDecoder(model, connection.dialect), found)
                if not is_on_server:
                    if has_used_up_its_numbers(connection, str(model.__tablename__)):
                        found.tables.append(TableFault(str(model.__tablename__), _USED_UP))
                    found.foreign_times.extend(_foreign_times(connection, model))
    return found


def _inspect(held: Held, decoder: RowDecoder[Any], found: _Findings) -> None:
    """Add what a table's rows have wrong with them."""
    table = table_of(decoder.model)
    vocabularies = [
        (index, column.name, column.type.vocabulary)
        for index, column in enumerate(table.columns)
        if isinstance(column.type, EnumText)
    ]
    dialect = held.connection.dialect
    everything = str(select(*table.columns, address_of(decoder.model, dialect)).compile(dialect=dialect))
    for chunk in held.backend.chunks(held.raw, everything, _CHUNK):
        rows = [row[:-1] for row in chunk]
        if not decoder.are_sound(rows):
            for row, (*_, address) in zip(rows, chunk, strict=True):
                if faults := decoder.faults(row):
                    found.undecodable.extend(faults)
                    found.bad_rows.setdefault(table.name, []).append(address)
        for index, name, vocabulary in vocabularies:
            for word, times in Counter(row[index] for row in rows).items():
                if isinstance(word, str) and not vocabulary.read(word).is_listed:
                    found.unlisted[table.name, name, word] += times


def _move_aside(held: Held, where: str, found: _Findings) -> tuple[int, Counter[tuple[str, str]]]:
    """Move the rows that were found, and return how many went, and how many did not, by table and reason."""
    moved = 0
    kept: Counter[tuple[str, str]] = Counter()
    with held.backend.reading_leniently(held.raw):
        for model in TABLES:
            name = str(model.__tablename__)
            if name in found.bad_rows:
                went, stayed = move_aside(held, where, model, found.bad_rows[name])
                moved += went
                kept.update({(name, reason): rows for reason, rows in stayed.items()})
    return moved, kept
