"""Files: made for their owner alone, put in place as a whole, and whether one is still that which was opened."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from moai_flow.memory.errors import StorageError

#: Reading and writing for the owner, and nothing for anybody else.
PRIVATE = 0o600

#: How long the file at a path is taken to be the one that was opened, without looking, in seconds.
TRUSTED = 1.0


def make_folder(folder: Path) -> None:
    """Make *folder*, and those around it, for nobody but their owner. Those that exist stay as they are.

    Raises:
        OSError: If one can't be made.
    """
    if not folder.parent.exists():
        make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def make_file(path: Path, mode: int = PRIVATE) -> None:
    """Make an empty file at *path* with exactly this *mode*, whatever the process's umask would make of it.

    Raises:
        FileExistsError: If there is something already.
        OSError: If it can't be made.
    """
    # Never readable for more than that, not even for a moment. What exists is not opened: to close it would release the
    # locks that SQLite has on it in this process.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    if mode != PRIVATE:
        path.chmod(mode)


def companions(database: Path) -> list[Path]:
    """Return where SQLite keeps the log of a database, the index of that, and the journal."""
    return [database.with_name(f"{database.name}{ending}") for ending in ("-wal", "-shm", "-journal")]


def belong_together(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, or one of them to a file that SQLite takes for a part of the other.

    Raises:
        OSError: If one can't be looked at.
    """
    one, other = one.resolve(), other.resolve()
    is_same = one.exists() and other.exists() and one.samefile(other)
    return is_same or one in companions(other) or other in companions(one)


def put_in_place(finished: Path, target: Path, *, overwrite: bool) -> None:
    """Give a *finished* file the name *target*, at once and for good: a power cut leaves it.

    Raises:
        FileExistsError: If there is something at *target*, and *overwrite* is not set; of several who come at the same
            moment, one gets the place.
        OSError: If it can't be put there.
    """
    if overwrite:
        finished.replace(target)
    else:
        try:
            target.hardlink_to(finished)
        except FileExistsError:
            raise
        except OSError:  # The file system has no hard links, and so no way to ask for a name and take it at once.
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            finished.replace(target)
        else:
            finished.unlink()
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """Have the folder's names survive a power loss, where the system can do so."""
    with suppress(PermissionError):  # Windows opens no folder.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def mode_of(path: Path) -> int:
    """Return who may do what with a file.

    Raises:
        OSError: If it can't be looked at.
    """
    return path.stat().st_mode & 0o777


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return what tells the file at *path* from all others; None if there is none, or it can't be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def size_of(path: Path) -> int:
    """Return how many bytes a file has: none, where there is none that can be looked at."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


class OpenedFile:
    """The file that connections have open, as long as it is found where it was.

    One that was removed, or replaced by another, takes what is written into it along: SQLite does not notice.
    """

    def __init__(self, path: Path) -> None:
        """Remember which file is at *path*."""
        self._path = path
        self.identity = identity_of(path)
        self._trusted_until = time.monotonic() + TRUSTED

    def check(self, *, now: bool = False) -> None:
        """Look whether it is still there, unless that was done a moment ago; with *now*, even then.

        Raises:
            StorageError: If it isn't.
        """
        if not now and time.monotonic() < self._trusted_until:
            return
        if identity_of(self._path) != self.identity:
            raise StorageError(
                f"{self._path}: the file was removed, renamed or replaced while it was open, and what was written "
                "into it since is not in the file that is there now, if there is one; close this database and open "
                "it again"
            )
        self._trusted_until = time.monotonic() + TRUSTED
