"""Putting a backup in the place of a database: whole or not at all, and never under somebody who has it open.

The pages are written into the file that is there, in one transaction. Another file by that name would be no way: who
has just opened the old one might take the new one's log for its own, and write pages of the one into the other.
"""

import os
import shutil
import sqlite3
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from moai_flow.memory import inputs
from moai_flow.memory.backends import translated
from moai_flow.memory.connections import copy_to, is_open_here
from moai_flow.memory.engine import Location, check_file_of_log, locate, path_of_file
from moai_flow.memory.errors import BusyError, InvalidInputError, SchemaError, StorageError, SwarmDBError
from moai_flow.memory.files import belong_together, companions, flush_folder, make_file, make_folder, mode_of
from moai_flow.memory.forks import using
from moai_flow.memory.migrations import check_openable

_LOG, _INDEX, _JOURNAL = "-wal", "-shm", "-journal"

#: The bytes that every user of an SQLite file has a lock on, on POSIX: https://sqlite.org/src/file/src/os.h and
#: https://sqlite.org/walformat.html#wal_locks ("dead man switch").
_SHARED_BYTES, _INDEX_BYTES = (0x40000002, 510), (128, 1)


@dataclass(frozen=True)
class RestoreReport:
    """What `restore_backup` did.

    Attributes:
        path: The database's file, as an absolute path.
        size_bytes: How large it is.
        schema_version: The version of its schema, as the backup says; None if it says none, as the oldest do. Opening
            it brings it to this package's.
        kept: Where the file is that was replaced; None if there was none, or it was not to be kept.
    """

    path: Path
    size_bytes: int
    schema_version: str | None
    kept: Path | None


def restore_backup(
    backup: str | os.PathLike[str],
    db_path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    keep: bool = True,
    busy_timeout: float = 5.0,
) -> RestoreReport:
    """Put a copy of *backup* in the place of the database *db_path*.

    The backup is checked before it takes the place, in one transaction: until then, and if anything fails, the database
    is as it was. Nobody may have it open meanwhile. What it replaces, complete with what its log held, is kept beside
    it as ``<file>.<time in UTC>.bak``. The backup itself stays as it is. A database that is too damaged for a
    transaction is copied there first, and emptied.

    Args:
        backup: The file of a database, as `SwarmDB.backup` makes it.
        db_path: The file to write. Its folder is made if it is missing.
        overwrite: Whether to replace the file if it exists.
        keep: Whether to keep the file that is replaced. Without it, its rows are lost.
        busy_timeout: How long to wait for those who have the database open, in seconds.

    Returns:
        What was done.

    Raises:
        InvalidInputError: If one of the two is no path, or both are one file; if *backup* does not exist; or if
            *db_path* does and *overwrite* is not set.
        SchemaError: If the backup is none of a SwarmDB, or of a newer version.
        BusyError: If somebody has the database open, or a backup that is in use stays locked.
        StorageError: If the backup is damaged or can't be read, or the file can't be written.
    """
    busy_timeout = inputs.number(busy_timeout, field="busy_timeout")
    source = path_of_file(backup, field="backup").resolve()
    target = path_of_file(db_path, field="db_path").resolve()
    if not source.is_file():
        raise InvalidInputError("backup", str(backup), "a file that exists")
    if belong_together(target, source):
        raise InvalidInputError("db_path", str(db_path), "another file than the backup")
    if target.exists() and not overwrite:
        raise InvalidInputError("db_path", str(db_path), "a file that does not exist yet, or overwrite=True")
    unfinished = target.with_name(f"{target.name}.{uuid4().hex}.tmp")
    try:
        make_folder(target.parent)
        with using(source):
            version = _copy(source, unfinished, target, busy_timeout)
        if is_open_here(target):
            raise _in_use(target)
        with using(target), closing(sqlite3.connect(unfinished)) as copy:
            kept = _put_in_place(copy, target, keep=keep, patience=busy_timeout)
    except SwarmDBError:
        raise
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise translated(error, str(target)) from error
    except OSError as error:
        raise StorageError(f"{target}: the backup can't be put there: {error}") from error
    finally:
        for leftover in (unfinished, *companions(unfinished)):
            with suppress(OSError):
                leftover.unlink()
    return RestoreReport(target, target.stat().st_size, version, kept)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


# The copy


def _copy(source: Path, unfinished: Path, target: Path, patience: float) -> str | None:
    """Copy a backup, check the copy, and return the version of its schema.

    Raises:
        SchemaError: If it is none of a SwarmDB, or of a newer version.
        BusyError: If it stays locked.
        StorageError: If it is damaged, or there is no room for the copy beside *target*.
    """
    location = Location(locate(source, None).url, source)
    check_file_of_log(location)
    make_file(unfinished)
    try:
        with (
            closing(_reading(source, patience)) as original,
            closing(sqlite3.connect(unfinished)) as copy,
        ):
            _copy_all(original, copy, source, patience)
            # Whoever opens it first in its new place switches it back.
            copy.execute("PRAGMA journal_mode = DELETE").fetchone()
            complaints = [row[0] for row in copy.execute("PRAGMA integrity_check(10)") if row[0] != "ok"]
            if complaints:
                raise StorageError(f"{source}: the backup is damaged: {'; '.join(complaints)}")
            version, is_ours = check_openable(copy, location)
    except SwarmDBError:
        raise
    except (sqlite3.Error, UnicodeDecodeError) as error:
        what = (
            f"{target}: the backup can't be put there"
            if _is_of_writing(error)
            else f"{source}: the backup can't be read"
        )
        raise translated(error, what) from error
    if not is_ours:
        raise SchemaError(f"{source}: it has none of SwarmDB's tables, so it is no backup of one")
    return version


def _is_of_writing(error: Exception) -> bool:
    """Whether a copy failed where it was written, rather than where it was read."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) and code not in (
        sqlite3.SQLITE_IOERR_READ,
        sqlite3.SQLITE_IOERR_SHORT_READ,
    )


def _copy_all(original: sqlite3.Connection, copy: sqlite3.Connection, source: Path, patience: float) -> None:
    deadline = time.monotonic() + patience

    def give_up(status: int, remaining: int, total: int) -> None:
        if status in _LOCKED and time.monotonic() > deadline:
            raise BusyError(f"{source}: another program keeps the backup locked")

    original.backup(copy, progress=give_up)


def _reading(source: Path, patience: float) -> sqlite3.Connection:
    """Open a backup. In a folder that can't be written, where SQLite needs files beside it, it must have no log."""
    raw = sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True, timeout=patience)
    try:
        raw.execute("SELECT 1 FROM sqlite_master").fetchall()
    except sqlite3.OperationalError as error:
        raw.close()
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        if any(_beside(source, ending).exists() for ending in (_LOG, _JOURNAL)):
            raise
        return sqlite3.connect(f"{source.as_uri()}?immutable=1", uri=True)
    except BaseException:
        raw.close()
        raise
    return raw


# Its place

_DAMAGED = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT})
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


def _put_in_place(copy: sqlite3.Connection, target: Path, *, keep: bool, patience: float) -> Path | None:
    """Replace what a file holds, or make it, and return where the old content is kept."""
    kept = None
    if target.exists() and not _is_empty(target):
        try:
            return _replace(copy, target, keep=keep, patience=patience)
        except SwarmDBError:
            raise
        except UnicodeDecodeError:
            pass  # SQLite would quote the damage, and Python can't read that.
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in _DAMAGED:
                raise
    kept = _move_aside(target, keep=keep)
    with suppress(FileExistsError):
        make_file(target)
    return _replace(copy, target, keep=keep, patience=patience) or kept


def _is_empty(target: Path) -> bool:
    return target.stat().st_size == 0  # SQLite would remove its log, unread.


def _replace(copy: sqlite3.Connection, target: Path, *, keep: bool, patience: float) -> Path | None:
    """Replace all pages of a file in one transaction, with nobody beside, and return where the old ones are kept.

    Raises:
        sqlite3.DatabaseError: If the file is too damaged for it.
        BusyError: If somebody has it open, and does not close it.
    """
    kept = None
    try:
        with closing(sqlite3.connect(target, timeout=0, isolation_level=None)) as raw:
            _lock(raw, target, patience)
            if keep and raw.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                aside = _name_aside(target)
                copy_to(raw, aside, mode_of(target))
                kept = aside
            copy.backup(raw)
    except sqlite3.Error:
        # Where no journal is left, the file is as it was, and the next attempt needs the room.
        if kept is not None and not _beside(target, _JOURNAL).exists():
            kept.unlink()
        raise
    return kept


def _lock(raw: sqlite3.Connection, target: Path, patience: float) -> None:
    """Move the log into the file, remove it, and lock the file until it is closed."""
    raw.execute("PRAGMA locking_mode = EXCLUSIVE").fetchone()
    deadline = time.monotonic() + patience
    while True:
        try:
            raw.execute("PRAGMA journal_mode = DELETE").fetchone()
            raw.execute("BEGIN EXCLUSIVE")
            raw.execute("COMMIT")  # In this mode it keeps the lock.
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _LOCKED:
                raise
            if time.monotonic() > deadline:
                raise _in_use(target) from error
            time.sleep(0.01)
        else:
            return


def _name_aside(target: Path) -> Path:
    return target.with_name(f"{target.name}.{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.bak")


# A file that SQLite can't lock, as it is damaged, empty or missing, and what is left beside it


def _move_aside(target: Path, *, keep: bool) -> Path | None:
    """Empty a file, move its log out of the way, and return where its content is kept.

    Raises:
        BusyError: If another process has it open.
    """
    aside = _name_aside(target)
    with ExitStack() as opened:
        file = _locked_by_bytes(target, _SHARED_BYTES, target, opened)
        _locked_by_bytes(_beside(target, _INDEX), _INDEX_BYTES, target, opened)
        if keep and file is not None and not _is_empty(target):
            make_file(aside, mode_of(target))
            try:
                with aside.open("r+b") as kept:
                    shutil.copyfileobj(file, kept)
                    kept.flush()
                    os.fsync(kept.fileno())
            except OSError:
                aside.unlink()
                raise
        for ending in (_LOG, _JOURNAL):
            path = _beside(target, ending)
            if keep and path.exists():
                path.rename(_beside(aside, ending))
            else:
                path.unlink(missing_ok=True)
        flush_folder(target.parent)
        _beside(target, _INDEX).unlink(missing_ok=True)
        if file is not None:
            file.truncate(0)
    return aside if aside.exists() else None


def _locked_by_bytes(path: Path, place: tuple[int, int], target: Path, opened: ExitStack) -> BinaryIO | None:
    """Open a file, if it is there, and lock the bytes that SQLite would lock.

    Raises:
        BusyError: If another process has it open.
    """
    try:
        file = opened.enter_context(path.open("r+b"))
    except FileNotFoundError:
        return None
    with suppress(ModuleNotFoundError):  # Windows has other locks, and moves no log that is open.
        fcntl: Any = import_module("fcntl")
        start, length = place
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except BlockingIOError:
            raise _in_use(target) from None
    return file


def _in_use(target: Path) -> BusyError:
    return BusyError(f"{target}: somebody has the database open; stop every program that uses it, and restore again")
