"""Whatever goes wrong: the right error, a store that works on, and a file that holds all of a call or nothing.

MOAI_TEST_EXAMPLES is how thorough the long ones are: 100 by default; 10000 takes about an hour.
"""

import gc
import inspect
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import Clock, url_of
from moai_flow.memory import SwarmDB, SwarmDBError
from reliability.calls import CALLS, IN_STEPS, SILENT, content, prepare
from reliability.injecting import Injector, injecting

EXAMPLES = int(os.environ.get("MOAI_TEST_EXAMPLES", "100"))


def test_every_public_method_is_called() -> None:
    methods = {name for name, _ in inspect.getmembers(SwarmDB) if not name.startswith("_")}
    assert methods - SILENT == {name.split()[0] for name in CALLS}


# What is left behind


def assert_nothing_is_left(db: SwarmDB, where: str) -> None:
    """No block, no connection that nobody has, no lock. It holds at once, before the cycle collector comes by."""
    connections = db._connections
    assert connections.local.blocks == []
    kept = [*connections._idle, *([connections._anchor] if connections._anchor else [])]
    assert [held for held in list(connections._open) if held.is_open and held not in kept] == [], where
    assert not any(held.in_transaction for held in kept)


def open_files(path: Path) -> list[str]:
    """Return which files of a database this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:
            continue  # It was the listing's own.
        if target.startswith(str(path)):
            found.append(target)
    return found


@contextmanager
def without_cycle_collector() -> Iterator[None]:
    """What is only found by the cycle collector counts as leaked."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Errors at every statement


def sqlite_error(kind: type[sqlite3.Error], message: str, code: int | None) -> Callable[[], BaseException]:
    def make() -> BaseException:
        error = kind(message)
        if code is not None:
            error.sqlite_errorcode = code
        return error

    return make


ON_SQLITE: list[Callable[[], BaseException]] = [
    sqlite_error(sqlite3.OperationalError, "disk I/O error", sqlite3.SQLITE_IOERR),
    KeyboardInterrupt,
    sqlite_error(sqlite3.OperationalError, "database is locked", sqlite3.SQLITE_BUSY),
    MemoryError,
    sqlite_error(sqlite3.OperationalError, "database or disk is full", sqlite3.SQLITE_FULL),
    sqlite_error(sqlite3.DatabaseError, "database disk image is malformed", sqlite3.SQLITE_CORRUPT),
    sqlite_error(sqlite3.OperationalError, "Could not decode to UTF-8 column", None),
]


def on_postgresql() -> list[Callable[[], BaseException]]:
    from psycopg import OperationalError, errors

    return [
        lambda: errors.DiskFull("no room"),
        KeyboardInterrupt,
        lambda: errors.LockNotAvailable("locked"),
        MemoryError,
        lambda: errors.SerializationFailure("changed"),
        lambda: OperationalError("the connection is lost"),
    ]


class Subject:
    """A store that is made anew once a call has changed it."""

    def __init__(self, kind: str, folder: Path, request: pytest.FixtureRequest, injector: Injector) -> None:
        self.folder = folder
        self.injector = injector
        self._url = url_of(kind, folder / "swarm.db", request)
        self._clock = Clock()
        self._number = 0
        self._is_on_server = kind == "postgresql"
        self.db = self._opened()
        self.before = content(self.db)

    def _opened(self) -> SwarmDB:
        self.injector.arm(0, None)
        if not self._is_on_server:
            self._number += 1
            self._url = f"sqlite:///{self.folder}/{self._number}.db"
        db = SwarmDB(url=self._url, clock=self._clock, busy_timeout=0.2)
        if self._is_on_server:
            with db.transaction() as conn:
                names = "agent_events, agent_registry, session_memory, task_metrics, agent_metrics, swarm_metrics"
                conn.execute(f"TRUNCATE {names} RESTART IDENTITY")
        prepare(db)
        return db

    def renew(self) -> None:
        self.db.close()
        self.db = self._opened()


@pytest.fixture(params=["file", "postgresql"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    with injecting() as injector:
        made = Subject(request.param, tmp_path, request, injector)
        yield made
        injector.arm(0, None)
        made.db.close()
    gc.collect()  # A connection of sqlite3 refers to itself; one that is lost as it is made waits for this.
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("name", CALLS)
def test_an_error_at_any_statement_leaves_all_or_nothing(subject: Subject, name: str) -> None:
    injector, call = subject.injector, CALLS[name]
    is_on_server = subject.db._location.is_on_server
    if is_on_server and name == "backup":
        pytest.skip("a server's database is copied by its own tools")
    errors = on_postgresql() if is_on_server else ON_SQLITE
    injector.arm(0, None)
    call(subject.db, subject.folder)
    statements = list(injector.sent)
    after = content(subject.db)
    changed = after != subject.before
    if changed:
        subject.renew()
    turn = list(CALLS).index(name)
    with without_cycle_collector():
        for at in range(1, len(statements) + 1):
            for is_after in (False, True):
                turn += 1
                each = errors if EXAMPLES >= 1000 else [errors[turn % len(errors)]]
                for make in each:
                    inject(subject, name, at, make(), after, is_after=is_after)


def inject(subject: Subject, name: str, at: int, error: BaseException, after: Any, *, is_after: bool) -> None:
    subject.injector.arm(at, error, is_after=is_after)
    raised = False
    try:
        CALLS[name](subject.db, subject.folder)
    except SwarmDBError:
        raised = True
    except BaseException as caught:
        # What a session raises itself is SQLAlchemy's.
        if caught is not error and not (name.startswith("session") and caught.__cause__ is error):
            raise
        raised = True
    where = f"{name}, {type(error).__name__} {'after' if is_after else 'before'} {subject.injector.sent[at - 1 : at]}"
    del error
    subject.injector.arm(0, None)
    verify(subject, name, after, where, raised=raised)


def verify(subject: Subject, name: str, after: Any, where: str, *, raised: bool) -> None:
    """Verify that a call which met a fault did all or nothing, and all if it returned, and that the store works."""
    assert_nothing_is_left(subject.db, where)
    now = content(subject.db)
    if not raised:
        assert now == after, where
    elif name not in IN_STEPS:
        assert now in (subject.before, after), where
    subject.db.register_agent("works", "t")
    assert subject.db.delete_agent("works")
    if now != subject.before:
        subject.renew()


# Interrupts


class Interrupter:
    """Raises KeyboardInterrupt where Python would handle a signal: as a function begins, or has come back from C."""

    def __init__(self, at: int) -> None:
        self.events = 0
        self.place: object = None
        self._at = at

    def __enter__(self) -> "Interrupter":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: Any, kind: str, argument: Any) -> None:
        if kind not in ("call", "c_return") or frame.f_code.co_filename == __file__:
            return
        self.events += 1
        if self.events == self._at:
            self.place = frame.f_code.co_qualname if kind == "call" else argument
            raise KeyboardInterrupt  # Python then takes the profile function away.


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_anywhere_leaves_all_or_nothing(
    subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CALLS[name]
    if subject.db._location.is_on_server and name == "backup":
        pytest.skip("a server's database is copied by its own tools")
    call(subject.db, subject.folder)
    after = content(subject.db)
    subject.renew()
    call(subject.db, subject.folder)  # Statements are compiled at the first time, and not again.
    subject.renew()
    with Interrupter(0) as counter:
        call(subject.db, subject.folder)
    if after != subject.before:
        subject.renew()
    # What comes up in a destructor goes nowhere.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    tries = min(counter.events, EXAMPLES // 8)
    with without_cycle_collector():
        for number in range(tries):
            at = 1 + (counter.events * number + list(CALLS).index(name)) // tries
            raised = False
            interrupter = Interrupter(at)
            try:
                with interrupter:
                    call(subject.db, subject.folder)
            except KeyboardInterrupt:
                raised = True
            verify(subject, name, after, f"{name}, at {at} {interrupter.place}", raised=raised)


INTERRUPTED = """
import gc, random, signal, sqlite3, sys, time
from moai_flow.memory import SwarmDB

path, tries, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
EVENT = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}
rng = random.Random(seed)
armed = False

def interrupt(*_):
    if armed:
        raise KeyboardInterrupt

def single(db):
    db.insert_event(EVENT)

def batch(db):
    db.insert_events([EVENT] * 3)

def block(db):
    with db.transaction() as conn:
        db.insert_event(EVENT)
        conn.execute("SELECT 1")
        db.insert_events([EVENT] * 2)

def nested(db):
    with db.transaction():
        db.insert_event(EVENT)
        with db.transaction():
            db.insert_events([EVENT] * 2)

signal.signal(signal.SIGALRM, interrupt)
gc.disable()
db = SwarmDB(path, busy_timeout=0)
acknowledged = interrupted = 0
for call, rows in ((single, 1), (batch, 3), (block, 3), (nested, 3)):
    for _ in range(tries):
        before = len(db.get_events(limit=10**9))
        done = False
        first, every = rng.uniform(20e-6, 1e-3), rng.choice([0, 50e-6, 100e-6, 300e-6])
        try:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, first, every)
                call(db)
                done = True
            finally:
                armed = False
        except KeyboardInterrupt:
            armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        interrupted += not done
        added = len(db.get_events(limit=10**9)) - before
        assert added == rows or (added == 0 and not done), (call, added, done)
        with db.transaction():
            pass
        assert db._connections.local.blocks == []
        taken = [held for held in list(db._connections._open) if held.is_open and held not in db._connections._idle]
        assert taken == [], (call, taken)
        db.cleanup_old_events(0)
print(interrupted)
"""


def test_signals_in_quick_succession_leave_neither_lock_nor_connection_nor_half_a_block(path: Path) -> None:
    # In a process of its own: the signal that has a resolution fine enough is the one that pytest-timeout uses.
    arguments = [sys.executable, "-c", INTERRUPTED, path, str(5 * EXAMPLES), "1"]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 0
    with SwarmDB(path) as db:
        assert db.check().ok
