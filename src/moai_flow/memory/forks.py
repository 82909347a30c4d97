"""What forks have to do with files: before one, what is idle is closed; what is in use then, the child is refused.

SQLite keeps its locks by file, not by connection, in memory that a forked child inherits: the child's own connections
would take none. See https://sqlite.org/howtocorrupt.html#_carrying_an_open_database_file_across_a_fork_
"""

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from moai_flow.memory.errors import StorageError
from moai_flow.memory.files import identity_of

T = TypeVar("T")

#: How long a fork waits for the calls of other threads to end, in seconds.
_CALLS_WAITED_FOR = 1.0

_IN_USE_AT_FORK = (
    "this process was forked while its parent had the file in use: in a call of another thread, in a block, or by a "
    "connection of _get_connection(). SQLite's locks can't be trusted here then, and writes would be lost. Fork before "
    "the file is in use, or start processes by 'spawn' or 'forkserver'"
)


class Concerned(Protocol):
    """Who has connections to a database."""

    def is_in_use_elsewhere(self) -> bool:
        """Whether another thread has one in use, for which a fork waits."""

    def let_go(self) -> None:
        """Close what is idle; more may become so, and this be called again."""

    def settle(self) -> None:
        """Close what else can be closed, once, at the end of the wait."""

    def forget_all(self) -> None:
        """Leave every connection to the parent process; see `leave_to_parent`."""


_concerned: "weakref.WeakSet[Concerned]" = weakref.WeakSet()

#: By thread, that a fork is about to happen.
under_way: dict[int, threading.Event] = {}

#: The files that the parent had in use when it forked this process.
_left_to_parent: set[tuple[int, int]] = set()

#: Who works with which file by connections that nobody concerned knows of: the thread, the path, and a mark of its own.
_uses: set[tuple[int, Path, object]] = set()


def concern(one: Concerned) -> None:
    """Have forks ask *one*, as long as it is there."""
    _concerned.add(one)


def those_in(weak: "weakref.WeakSet[T]") -> list[T]:
    """Return what is in a set that other threads add to."""
    while True:
        try:
            return list(weak)
        except RuntimeError:
            pass  # Another thread has added one meanwhile.


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Have forks count the file as in use inside the block."""
    wait()
    use = threading.get_ident(), path, object()
    _uses.add(use)
    try:
        yield
    finally:
        _uses.discard(use)


def wait() -> None:
    """Wait until no other thread is about to fork. Ask `under_way` first: it is nearly always empty."""
    for thread, fork in list(under_way.items()):
        if thread != threading.get_ident():
            fork.wait(2 * _CALLS_WAITED_FOR)


def leave_to_parent(identity: tuple[int, int] | None) -> None:
    """Refuse a file from now on, since the parent had it in use when it forked this process."""
    if identity is not None:
        _left_to_parent.add(identity)


def check(path: Path, where: str) -> None:
    """Raise `StorageError` if the parent had the file in use; *where* is what errors call the database."""
    if _left_to_parent and identity_of(path) in _left_to_parent:
        raise refusal(where)


def refusal(where: str) -> StorageError:
    """Return the error of who would use what is the parent's."""
    return StorageError(f"{where}: {_IN_USE_AT_FORK}")


def _before() -> None:
    own = threading.get_ident()
    under_way.setdefault(own, threading.Event())  # It is there already where a signal's handler forks inside of this.
    concerned = those_in(_concerned)
    deadline = time.monotonic() + _CALLS_WAITED_FOR
    while True:
        for one in concerned:
            one.let_go()
        is_in_use = any(one.is_in_use_elsewhere() for one in concerned)
        if not (is_in_use or any(thread != own for thread, *_ in tuple(_uses))) or time.monotonic() > deadline:
            break
        time.sleep(0.0005)
    for one in concerned:
        one.settle()


def _after_in_parent() -> None:
    if (fork := under_way.pop(threading.get_ident(), None)) is not None:
        fork.set()


def _after_in_child() -> None:
    under_way.clear()
    for _, path, _ in _uses:
        leave_to_parent(identity_of(path))
    _uses.clear()
    for one in _concerned:
        one.forget_all()


# Where there is no fork, there is nothing to register with.
getattr(os, "register_at_fork", dict)(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
