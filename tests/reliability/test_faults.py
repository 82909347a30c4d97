"""Whatever goes wrong: the right error, a store that works on, and a file that holds all of a call or nothing.

MOAI_TEST_EXAMPLES is how thorough the long ones are: 100 by default; 10000 takes about an hour.
"""

import gc
import inspect
import multiprocessing
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, Pool, QueuePool, create_engine
from sqlalchemy.exc import SQLAlchemyError

from conftest import Clock, url_of
from moai_flow.memory import AgentMetric, AgentMetricType, BusyError, StorageError, SwarmDB, SwarmDBError, files
from moai_flow.memory.engine import locate
from moai_flow.memory.migrations import found_version
from moai_flow.memory.models import TABLES
from moai_flow.memory.restoring import restore_backup
from reliability.calls import CALLS, EVENT, IN_STEPS, SILENT, WAITS, content, prepare
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
        # A server takes a while to notice that a connection is gone, and keeps its locks until then.
        db = SwarmDB(url=self._url, clock=self._clock, busy_timeout=20 if self._is_on_server else 0.2)
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
    """Raises an exception where Python would handle a signal: as a function begins, or has come back from C."""

    def __init__(self, at: int, kind: type[BaseException] = KeyboardInterrupt) -> None:
        self.events = 0
        self.place: object = None
        self._at = at
        self._kind = kind

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
            raise self._kind  # Python then takes the profile function away.


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
    share = 24 if subject.db._location.is_on_server else 12
    tries = min(counter.events, EXAMPLES // share)
    if name == "store_swarm_metrics":  # A batch on a server has a pipeline, which is in the way at few places.
        tries = min(counter.events, EXAMPLES * 4)
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


class AlarmError(Exception):
    """What a program's own handler of a signal raises, as its timeout."""


def test_what_a_signals_handler_raises_comes_out_as_it_is(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(db: SwarmDB) -> None:
        with db.session() as session, db.session():
            session.add(AgentMetric(agent_id="b", metric_type=AgentMetricType.DURATION, value=1, timestamp=moment))
            db.register_agent("b", "t")

    moment = datetime(2025, 11, 30, tzinfo=UTC)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    for _ in range(2):
        call(subject.db)
        after = content(subject.db)
        subject.renew()
    with Interrupter(0) as counter:
        call(subject.db)
    subject.renew()
    tries = min(counter.events, 4 * EXAMPLES)
    with without_cycle_collector():
        for number in range(tries):
            interrupter = Interrupter(1 + counter.events * number // tries, AlarmError)
            raised = False
            try:
                with interrupter:
                    call(subject.db)
            except AlarmError:
                raised = True
            verify(subject, "a session", after, f"{number} {interrupter.place}", raised=raised)


INTERRUPTED = """
import gc, random, signal, sys
from moai_flow.memory import AgentEvent, EventType, SwarmDB, TransactionError

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

def caught(db):
    with db.transaction():
        db.insert_event(EVENT)
        try:
            with db.transaction():
                db.insert_event(EVENT)
                db.insert_events([EVENT] * 2)
        except KeyboardInterrupt:
            pass

def typed(db):
    with db.session() as session:
        db.insert_event(EVENT)
        session.add(AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t"))

def reading(db):
    with db.transaction():
        db.insert_event(EVENT)
        with db.session(readonly=True):
            db.get_events()

# What interrupts pydantic while it builds a model, at the first use, comes out as pydantic's SchemaError.
AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t")
signal.signal(signal.SIGALRM, interrupt)
gc.disable()
db = SwarmDB(path, busy_timeout=0)
interrupted = 0
CALLS = {single: [1], batch: [3], block: [3], nested: [3], caught: [1, 4], typed: [2], reading: [1]}
for call, rows in CALLS.items():
    for _ in range(tries):
        before = len(db.get_events(limit=10**9))
        done = False
        first, every = rng.uniform(20e-6, 3e-3 if call is typed else 1e-3), rng.choice([0, 50e-6, 100e-6, 300e-6])
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
        except TransactionError:
            assert call is caught  # What could not be undone by itself is undone with all around it.
        signal.setitimer(signal.ITIMER_REAL, 0)
        interrupted += not done
        added = len(db.get_events(limit=10**9)) - before
        assert added in rows or (added == 0 and not done), (call, added, done)
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
    arguments = [sys.executable, "-c", INTERRUPTED, str(path), str(3 * EXAMPLES), "1"]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 0
    with SwarmDB(path) as db:
        assert db.check().ok


# The file


def test_a_file_that_was_removed_while_open_takes_no_more_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
        for file in path.parent.glob("swarm.db*"):
            file.unlink()
        monkeypatch.setattr(files, "TRUSTED", 0)  # It looks once a second.
        db._connections._file._trusted_until = 0  # type: ignore[union-attr]
        for call in (lambda: db.register_agent("b", "t"), db.list_agents, db.transaction().__enter__):
            with pytest.raises(StorageError, match="removed, renamed or replaced while it was open"):
                call()
        assert not path.exists()


def test_a_file_that_was_replaced_while_open_is_noticed_and_left_alone(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.db"
    with SwarmDB(other) as db:
        db.register_agent("other", "t")
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
        other.replace(path)
        monkeypatch.setattr(files, "TRUSTED", 0)
        db._connections._file._trusted_until = 0  # type: ignore[union-attr]
        with pytest.raises(StorageError, match="replaced"):
            db.register_agent("b", "t")
    for leftover in ("-wal", "-shm"):
        Path(f"{path}{leftover}").unlink(missing_ok=True)
    with SwarmDB(path) as db:
        assert [agent.agent_id for agent in db.list_agents()] == ["other"]


def test_a_block_whose_file_was_replaced_does_not_commit_into_the_old_one(path: Path, tmp_path: Path) -> None:
    with SwarmDB(tmp_path / "other.db") as other, SwarmDB(path) as db:
        db._get_connection()
        other.backup(tmp_path / "copy.db")
        with pytest.raises(StorageError, match="replaced"), db.transaction():
            db.register_agent("a", "t")
            path.rename(tmp_path / "renamed.db")
            (tmp_path / "copy.db").rename(path)
            db._connections._file._trusted_until = 0  # type: ignore[union-attr]
        with pytest.raises(StorageError, match="replaced"):
            db._get_connection()
    with SwarmDB(tmp_path / "renamed.db") as db:
        assert db.list_agents() == []


def test_no_connection_is_opened_to_another_file_than_the_first(path: Path, tmp_path: Path) -> None:
    """Another thread's connection is not trusted for a second: it is new, and would lead to the new file."""
    with SwarmDB(path) as db, SwarmDB(tmp_path / "other.db") as other:
        other.backup(path, overwrite=True)
        errors: list[BaseException] = []

        def call() -> None:
            try:
                db.list_agents()
            except StorageError as error:
                errors.append(error)

        with db.transaction(), without_cycle_collector():
            before = open_files(path)
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            assert open_files(path) == before
        assert "replaced" in str(errors)


def test_a_read_that_failed_is_made_again_only_if_its_connection_was_lost(path: Path) -> None:
    with injecting() as injector, SwarmDB(path) as db:
        injector.arm(1, sqlite3.DatabaseError("malformed"))
        with pytest.raises(StorageError, match="malformed"):
            db.get_events()
        assert len(injector.sent) == 1


def test_a_file_that_is_seen_again_is_worked_on(path: Path) -> None:
    with SwarmDB(path) as db:
        db._connections._file._trusted_until = 0  # type: ignore[union-attr]
        db.register_agent("a", "t")
        assert db._connections._file._trusted_until > 0  # type: ignore[union-attr]


AS_NOBODY = """
import os, sys
from moai_flow.memory import StorageError, SwarmDB
from datetime import UTC, datetime
from pathlib import Path
path, what = Path(sys.argv[1]), sys.argv[2]
if os.geteuid() == 0:
    os.setuid(65534)
db = SwarmDB(path)
db.register_agent("a", "t")
if what == "file":
    os.chmod(path, 0)
elif what == "folder":
    os.chmod(path.parent, 0)
else:
    db.close()
    before = path.read_bytes()
    place = path if what == "read-only file" else path.parent
    os.chmod(place, 0o444 if place is path else 0o555)
    try:
        db = SwarmDB(path)
        if place is path:
            print("copied", oct(db.backup(path.with_name("copy.db")).stat().st_mode & 0o777), end=" ")
        db.register_agent("b", "t")
    except StorageError as error:
        print("refused:", error)
    db.close()
    os.chmod(place, 0o700)
    assert path.read_bytes() == before
    sys.exit()
for name in "bcd":  # What is open stays so.
    try:
        db.register_agent(name, "t")
        print("written", end=" ")
    except StorageError as error:
        print("refused:", error)
try:
    db.check()
except StorageError:  # Where the folder may not be looked into.
    assert what == "folder"
db.close()
os.chmod(path.parent, 0o700)
os.chmod(path, 0o600)
with SwarmDB(path) as db:
    print(len(db.list_agents()), db.check().ok)
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("file", "written written written 4 True"),
        ("folder", "written written written 4 True"),
        ("read-only file", "copied 0o444 refused"),
        ("read-only folder", "refused"),
    ],
)
def test_permissions_that_are_missing_or_are_lost(what: str, said: str) -> None:
    """As another user than root, who may do everything."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        place = Path(folder) / "place"
        place.mkdir()
        if os.geteuid() == 0:
            Path(folder).chmod(0o755)
            os.chown(place, 65534, 65534)
        program = [sys.executable, "-c", AS_NOBODY, str(place / "swarm.db"), what]
        ran = subprocess.run(program, capture_output=True, text=True, check=False)
    if "PermissionError" in ran.stderr and "site-packages" in ran.stderr:
        pytest.skip("nobody may not read Python's packages here")
    assert ran.returncode == 0, ran.stderr
    assert said in ran.stdout


def test_a_file_of_zero_bytes_becomes_a_database(path: Path) -> None:
    path.touch()
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
        assert db.check().ok


DEAD_WITH_A_LOG = """
import os, sys
from moai_flow.memory import SwarmDB
db = SwarmDB(sys.argv[1])
db.insert_events([{"event_type": "spawn", "agent_id": "a", "agent_type": "t"}] * 500)
os._exit(0)
"""


@pytest.fixture
def log(path: Path) -> Path:
    """The log of a database whose only program died, with 500 events in it."""
    subprocess.run([sys.executable, "-c", DEAD_WITH_A_LOG, path], check=True)
    return path.with_name("swarm.db-wal")


@pytest.mark.parametrize("lost", ["emptied", "removed"])
def test_a_log_whose_file_was_lost_is_not_deleted_and_can_be_read(lost: str, log: Path, path: Path) -> None:
    os.truncate(path, 0) if lost == "emptied" else path.unlink()
    whole, link = log.read_bytes(), path.with_name("link.db")
    link.symlink_to(path)
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    for call in (
        lambda: SwarmDB(path),
        lambda: SwarmDB(link),
        lambda: SwarmDB(url=f"sqlite:///file:{path}?mode=ro"),
        lambda: SwarmDB(engine=engine),
        lambda: restore_backup(path, path.with_name("restored.db")) if path.exists() else SwarmDB(path),
        lambda: found_version(locate(path, None)) or SwarmDB(path),
    ):
        with pytest.raises(StorageError, match=r"was emptied or removed, but its log is there: swarm\.db-wal has \d"):
            call()
        assert log.read_bytes() == whole
        assert path.exists() == (lost == "emptied")

    saved = path.with_name("saved.db")
    shutil.copy(log, f"{saved}-wal")
    saved.write_bytes(bytes(4096))  # As the guide Reliability says.
    with SwarmDB(saved) as db:
        assert len(db.get_events(limit=1000)) == 500
        assert db.check().ok
    log.unlink()
    with SwarmDB(path) as db:
        assert db.get_events() == []


def test_a_log_whose_file_is_emptied_while_it_is_open_is_not_deleted(log: Path, path: Path) -> None:
    """By a new connection, as another thread's is."""
    with SwarmDB(path) as db:
        assert len(db.get_events(limit=1000)) == 500
        os.truncate(path, 0)
        held = db._connections.take()
        with pytest.raises(StorageError, match="emptied"):
            db.list_agents()
        db._connections.give(held)
        assert log.stat().st_size > 0


@pytest.mark.parametrize("pool", [NullPool, QueuePool])
def test_a_log_whose_file_is_emptied_is_not_deleted_by_a_call_on_an_engine_of_the_callers(
    pool: type[Pool], path: Path
) -> None:
    """Such an engine makes its connections itself, and may have none between two calls."""
    engine = create_engine(f"sqlite:///{path}", poolclass=pool)
    with SwarmDB(engine=engine) as db:
        engine.dispose()
        log = path.with_name("swarm.db-wal")
        subprocess.run([sys.executable, "-c", DEAD_WITH_A_LOG, path], check=True)
        os.truncate(path, 0)
        whole = log.read_bytes()
        for call in (db.list_agents, db._get_connection, lambda: db.register_agent("a", "t")):
            with pytest.raises(StorageError, match="emptied or removed, but its log is there"):
                call()
            assert log.read_bytes() == whole
    engine.dispose()


def test_a_log_of_nothing_hinders_nobody(path: Path) -> None:
    path.with_name("swarm.db-wal").touch()
    with SwarmDB(path) as db:
        assert db.check().ok


def open_one_after_the_other(folder: Path, start: Event) -> None:
    start.wait()
    for number in range(50):
        with SwarmDB(folder / f"{number}.db") as db:
            db.register_agent(str(os.getpid()), "t")


def test_fresh_files_that_many_open_and_close_at_once_are_never_taken_for_lost(tmp_path: Path) -> None:
    """A file is empty for a moment, and its log comes and goes."""
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Event()
    openers = [spawn.Process(target=open_one_after_the_other, args=(tmp_path, start)) for _ in range(4)]
    for opener in openers:
        opener.start()
    start.set()
    for opener in openers:
        opener.join()
    assert [opener.exitcode for opener in openers] == [0] * 4


def test_a_file_that_is_locked_beyond_the_timeout_is_busy_and_then_usable(path: Path) -> None:
    with SwarmDB(path, busy_timeout=0.01) as db, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for name, call in CALLS.items():
            if name in ("insert_event", "insert_events", "register_agent", "transaction", "session", "cleanup"):
                with pytest.raises(BusyError):
                    call(db, path.parent)
                assert_nothing_is_left(db, name)
        assert db.list_agents() == []
        other.execute("ROLLBACK")
        db.register_agent("a", "t")


@pytest.mark.parametrize("hours", [-24 * 400, -1, 1, 24 * 29])
def test_a_clock_that_jumps_changes_no_order_of_writing_and_loses_nothing(
    db: SwarmDB, clock: Clock, hours: float
) -> None:
    db.register_agent("a", "t")
    db.store_memory("s", "semantic", "k", "first")
    db.insert_event(EVENT, event_id="first")
    first = db.store_task_metric("task", "a", 1, "success")
    clock.advance(hours=hours)
    db.store_memory("s", "semantic", "k", "second")
    db.insert_event(EVENT, event_id="second")
    second = db.store_task_metric("task", "a", 1, "success")
    db.update_agent_status("a", "complete")

    assert db.get_memory("s", "semantic", "k") == "second"
    assert [event.event_id for event in islice(db.watch_events(0), 2)] == ["first", "second"]
    assert (second > first) == (hours > 0)
    assert [memory.value for memory in db.memory_history("s", "semantic", "k")] == ["second", "first"]
    assert db.check().ok
    if hours < 0:
        assert len(db.get_events()) == 2
        assert len(db.get_task_metrics()) == 2


# Damage


def read_everything(db: SwarmDB, folder: Path) -> None:
    """Call everything; each answers, or raises an error of ours."""
    for name, call in CALLS.items():
        if name not in ("backup", "vacuum", "check quarantine", WAITS):
            # What a session raises itself is SQLAlchemy's.
            with suppress(SwarmDBError, *([SQLAlchemyError] if name.startswith("session") else [])):
                call(db, folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with some hundred rows."""
    path = tmp_path_factory.mktemp("sound") / "swarm.db"
    with SwarmDB(path) as db:
        prepare(db)
        rows: list[Any] = [{**EVENT, "metadata": {"number": number}} for number in range(200)]
        db.insert_events(rows)
    return path.read_bytes()


def damaged_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    # Half of them in the first pages, where there is the schema.
    end = len(changed) if rng.random() < 0.5 else 3 * 4096
    for _ in range(rng.choice([1, 2, 20])):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damaged_page(content: bytes, rng: random.Random) -> bytes:
    page = rng.randrange(len(content) // 4096) * 4096
    return content[:page] + rng.choice([bytes(4096), rng.randbytes(4096)]) + content[page + 4096 :]


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def test_a_file_that_sqlite_cannot_quote_is_named_as_damaged(sound: bytes, path: Path) -> None:
    path.write_bytes(sound.replace(b"CREATE TABLE agent_metrics", b"CREATE T\xe9\xe9LE agent_metrics"))
    with pytest.raises(StorageError, match="the file is damaged"):
        SwarmDB(path)


def test_wrong_bytes_that_make_sense_are_read_as_they_are(path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_memory("s", "semantic", "limit", 1000)
    path.write_bytes(path.read_bytes().replace(b"1000", b"9000"))
    with SwarmDB(path) as db:
        assert db.get_memory("s", "semantic", "limit") == 9000
        assert db.check().ok


def rows_of(db: SwarmDB, table: str) -> list[tuple[str, ...]]:
    with db.session(readonly=True) as session:
        rows = session.connection().exec_driver_sql(f"SELECT * FROM {table}")
        return sorted(tuple(map(repr, row)) for row in rows)


@pytest.fixture
def owners(sound: bytes, path: Path) -> dict[int, str]:
    """Which table each page of the file belongs to, with its indexes; SQLite's own as the schema."""
    path.write_bytes(sound)
    with closing(sqlite3.connect(path)) as connection:
        try:
            pages = connection.execute(
                "SELECT pageno, coalesce(tbl_name, 'schema') FROM dbstat LEFT JOIN sqlite_master USING (name)"
            ).fetchall()
        except sqlite3.OperationalError:
            pytest.skip("this SQLite does not tell whose a page is")
    return dict(pages)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("damage", [damaged_bits, damaged_page])
def test_what_damage_did_not_hit_reads_as_it_was(
    sound: bytes, owners: dict[int, str], path: Path, tmp_path: Path, damage: Any
) -> None:
    """Of what it hit, SQLite can't tell: it has no checksums."""
    tables = [str(model.__tablename__) for model in TABLES]
    with SwarmDB(path) as db:
        before = {table: rows_of(db, table) for table in tables}
    rng = random.Random(2)
    compared = 0
    for number in range(EXAMPLES // 3):
        content = damage(sound, rng)
        pages = range(len(sound) // 4096)
        hit = {owners.get(page + 1) for page in pages if content[page * 4096 :][:4096] != sound[page * 4096 :][:4096]}
        if hit & {"schema", "schema_info"}:
            continue
        damaged = tmp_path / f"{number}.db"
        damaged.write_bytes(content)
        with SwarmDB(damaged) as db:
            for table in set(tables) - hit:
                assert rows_of(db, table) == before[table]
                compared += 1
    assert compared > 0


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("damage", [damaged_bits, damaged_page, truncated])
def test_a_damaged_file_is_read_or_refused(sound: bytes, tmp_path: Path, damage: Any) -> None:
    rng = random.Random(1)
    for number in range(EXAMPLES // 3):
        path = tmp_path / f"{number}.db"
        path.write_bytes(damage(sound, rng))
        try:
            with SwarmDB(path, busy_timeout=0.1) as db:
                # A file that was opened is reported on, however damaged, and one that is damaged is not written to.
                for report in (db.check(), db.check(quarantine=True)):
                    assert not (report.integrity and report.quarantined)
                read_everything(db, tmp_path)
                db.check(quarantine=True)
                with suppress(SwarmDBError):
                    db.backup(tmp_path / "copy.db", overwrite=True)
                assert_nothing_is_left(db, f"example {number}")
        except SwarmDBError:
            pass
        for file in tmp_path.glob(f"{number}.db*"):
            file.unlink()
    gc.collect()
    assert open_files(tmp_path) == []
