"""The command that puts a backup in the place of a database."""

import ast
import multiprocessing
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from cli.running import Command, execute
from moai_flow.memory import BusyError, EventData, InvalidInputError, SchemaError, StorageError, SwarmDB
from moai_flow.memory.cli import app
from moai_flow.memory.restoring import _copy_all, _is_of_writing, _reading, _replace, restore_backup

SPAWN = multiprocessing.get_context("spawn")
DEAD = """
import os, sys
from moai_flow.memory import SwarmDB
db = SwarmDB(sys.argv[1])
for number in range(50):
    db.register_agent(f"dead-{number}", "t")
os._exit(0)
"""


def event(agent_id: str) -> EventData:
    return {"event_type": "spawn", "agent_id": agent_id, "agent_type": "t"}


def agents(path: Path) -> list[str]:
    with SwarmDB(path) as db:
        assert db.check().ok
        return sorted(agent.agent_id for agent in db.list_agents())


def die_with_a_log(path: Path) -> None:
    """Write agents in a process that ends without closing the file."""
    subprocess.run([sys.executable, "-c", DEAD, path], check=True)
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0


@pytest.fixture
def saved(path: Path, tmp_path: Path) -> Path:
    """A backup of a database that has changed since."""
    with SwarmDB(path) as db:
        db.register_agent("before", "t")
        saved = db.backup(tmp_path / "saved.db")
        db.register_agent("after", "t")
    return saved


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_backup_takes_the_place_and_what_was_there_is_kept(swarmdb: Command, saved: Path, path: Path) -> None:
    whole = saved.read_bytes()
    answer = swarmdb("restore", saved, "--db", path, "--overwrite", "--json").json

    kept = Path(answer["kept"])
    assert answer == {"path": str(path), "size_bytes": len(whole), "schema_version": "2.1.0", "kept": str(kept)}
    assert re.fullmatch(r"swarm\.db\.\d{8}-\d{6}-\d{6}\.bak", kept.name)
    assert agents(path) == ["before"]
    assert agents(kept) == ["after", "before"]
    assert saved.read_bytes() == whole
    assert files(path.parent) == ["saved.db", "swarm.db", kept.name]


def test_it_says_where_things_are(swarmdb: Command, saved: Path, path: Path) -> None:
    shown = swarmdb("restore", saved, "--db", path, "--overwrite").out.splitlines()

    assert shown[0] == str(path)
    assert shown[1].startswith(f"what was there before is {path}.")
    assert swarmdb("restore", saved, "--db", path, "--overwrite", "--discard").out == f"{path}\n"
    assert len(list(path.parent.glob("*.bak"))) == 1


def test_a_database_that_is_there_is_only_replaced_when_told_so(swarmdb: Command, saved: Path, path: Path) -> None:
    ran = swarmdb("restore", saved, "--db", path)

    assert (ran.status, ran.out) == (1, "")
    assert "--overwrite" in ran.err
    assert agents(path) == ["after", "before"]
    with pytest.raises(InvalidInputError, match="overwrite=True"):
        restore_backup(saved, path)
    path.unlink()
    assert swarmdb("restore", saved, "--db", path, "--json").json["kept"] is None
    assert agents(path) == ["before"]


def write_until(path: Path, stop: Event) -> None:
    with SwarmDB(path) as db:
        number = 0
        while not stop.is_set():
            with db.transaction():
                db.insert_events([event(f"{os.getpid()}-{number}")] * 3)
                db.register_agent(f"{os.getpid()}-{number}", "t")
            number += 1


def content(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as raw:
        return {
            table: raw.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall()
            for table in ("agent_events", "agent_registry", "schema_info")
        }


@pytest.mark.parametrize("destruction", ["deleted", "emptied", "overwritten", "truncated"])
def test_what_was_backed_up_beside_writers_comes_back_after_the_file_was_destroyed(
    destruction: str, swarmdb: Command, path: Path, tmp_path: Path
) -> None:
    stop = SPAWN.Event()
    SwarmDB(path).close()
    writers = [SPAWN.Process(target=write_until, args=(path, stop), daemon=True) for _ in range(2)]
    for writer in writers:
        writer.start()
    with SwarmDB(path) as db:
        for number in (20, 60):  # The second replaces the first.
            while len(db.list_agents()) < number:
                pass
            assert swarmdb("backup", "saved.db", "--db", path, "--overwrite").status == 0
    stop.set()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    saved = content(tmp_path / "saved.db")
    die_with_a_log(path)
    size = path.stat().st_size
    match destruction:
        case "deleted":
            path.unlink()
        case "emptied":
            os.truncate(path, 0)
        case "overwritten":
            path.write_bytes(os.urandom(size))
        case "truncated":
            os.truncate(path, size // 2)
    ran = swarmdb("restore", "saved.db", "--db", path, "--overwrite")

    assert (ran.status, ran.err) == (0, "")
    assert content(path) == saved
    assert len(saved["agent_registry"]) >= 60
    assert Counter(row[3] for row in saved["agent_events"]) == {row[0]: 3 for row in saved["agent_registry"]}
    with SwarmDB(path) as db:
        assert db.check().ok
        assert not any(agent.agent_id.startswith("dead") for agent in db.list_agents())
    # What the log held is kept too: beside the file, or moved into it, as far as it can be read.
    assert len(list(tmp_path.glob("swarm.db.*.bak*"))) >= 1


def test_the_log_of_a_database_that_died_is_part_of_what_is_kept_and_not_of_what_is_restored(
    saved: Path, path: Path
) -> None:
    die_with_a_log(path)
    done = restore_backup(saved, path, overwrite=True)

    assert agents(path) == ["before"]
    assert done.kept is not None
    assert len(agents(done.kept)) == 52


def test_without_keeping_nothing_of_a_destroyed_one_is_left(saved: Path, path: Path) -> None:
    die_with_a_log(path)
    path.write_bytes(b"rubbish" * 1000)
    restore_backup(saved, path, overwrite=True, keep=False)

    assert files(path.parent) == ["saved.db", "swarm.db"]
    assert agents(path) == ["before"]


@pytest.mark.parametrize("ending", ["-wal", "-journal"])
def test_what_stands_beside_a_database_that_is_gone_is_kept_unread(ending: str, saved: Path, path: Path) -> None:
    beside = path.with_name(f"swarm.db{ending}")
    for number in (1, 2):
        path.unlink() if number == 1 else os.truncate(path, 0)
        beside.write_bytes(b"what was committed last")
        restore_backup(saved, path, overwrite=True)
        kept = list(path.parent.glob(f"swarm.db.*.bak{ending}"))

        assert [file.read_bytes() for file in kept] == [b"what was committed last"] * number
        assert agents(path) == ["before"]
    os.truncate(path, 0)
    beside.write_bytes(b"what was committed last")
    restore_backup(saved, path, overwrite=True, keep=False)

    assert len(list(path.parent.glob(f"*{ending}"))) == 2


def hold_open(path: Path, is_open: Event, stop: Event) -> None:
    with SwarmDB(path) as db:
        db.list_agents()
        SwarmDB(path).close()  # To open a file again, and close it, releases no lock on it.
        is_open.set()
        stop.wait()
        db.list_agents()


@pytest.mark.parametrize("destruction", ["none", "overwritten", "deleted"])
def test_it_is_refused_while_another_process_has_the_database_open(
    destruction: str, saved: Path, path: Path, swarmdb: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BUSY_TIMEOUT", 0.2)
    is_open, stop = SPAWN.Event(), SPAWN.Event()
    holder = SPAWN.Process(target=hold_open, args=(path, is_open, stop), daemon=True)
    holder.start()
    is_open.wait()
    whole = path.read_bytes()
    if destruction == "overwritten":
        with path.open("r+b") as file:
            file.write(b"rubbish")
    elif destruction == "deleted":
        path.unlink()
    before = files(path.parent)
    ran = swarmdb("restore", saved, "--db", path, "--overwrite")

    assert (ran.status, ran.out) == (1, "")
    assert "stop every program that uses it" in ran.err
    assert files(path.parent) == before
    path.write_bytes(whole) if destruction != "deleted" else None
    stop.set()
    holder.join()
    assert holder.exitcode == 0
    assert restore_backup(saved, path, overwrite=True).path == path
    assert agents(path) == ["before"]


@pytest.mark.parametrize("destruction", ["none", "overwritten", "deleted"])
def test_it_is_refused_while_this_process_has_the_database_open(destruction: str, saved: Path, path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("now", "t")
        whole = path.read_bytes()
        if destruction == "overwritten":
            path.write_bytes(b"rubbish" * 2000)
        elif destruction == "deleted":
            path.unlink()
        with pytest.raises(BusyError, match="somebody has the database open"):
            restore_backup(saved, path, overwrite=True, busy_timeout=0)
        path.write_bytes(whole)
    assert restore_backup(saved, path, overwrite=True).kept is not None


def read_without_a_log(path: Path, is_open: Event, stop: Event) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode = DELETE").fetchall()
        raw.execute("BEGIN")
        raw.execute("SELECT * FROM agent_registry").fetchall()
        is_open.set()
        stop.wait()


def test_it_is_refused_while_another_process_reads_a_destroyed_database_without_a_log(saved: Path, path: Path) -> None:
    is_open, stop = SPAWN.Event(), SPAWN.Event()
    reader = SPAWN.Process(target=read_without_a_log, args=(path, is_open, stop), daemon=True)
    reader.start()
    is_open.wait()
    with path.open("r+b") as file:
        file.write(b"rubbish" * 1000)
    before = (path.read_bytes(), files(path.parent))
    with pytest.raises(BusyError, match="somebody has the database open"):
        restore_backup(saved, path, overwrite=True, busy_timeout=0)

    assert (path.read_bytes(), files(path.parent)) == before
    stop.set()
    reader.join()
    restore_backup(saved, path, overwrite=True)
    assert agents(path) == ["before"]


def test_it_is_refused_while_somebody_reads_a_database_without_a_log(saved: Path, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode = DELETE").fetchall()
        raw.execute("BEGIN")
        raw.execute("SELECT * FROM agent_registry").fetchall()
        before = files(path.parent)
        with pytest.raises(BusyError, match="somebody has the database open"):
            restore_backup(saved, path, overwrite=True, busy_timeout=0)
        assert files(path.parent) == before
    assert agents(path) == ["after", "before"]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_nobody_gets_at_a_database_from_when_it_is_kept_until_it_is_replaced(
    mode: str, saved: Path, path: Path, *, keep: bool
) -> None:
    tried: list[str] = []

    class Copy(sqlite3.Connection):
        """Copies once others have tried to read and to write."""

        def backup(self, target: sqlite3.Connection, **options: Any) -> None:
            assert len(list(path.parent.glob("*.bak"))) == keep
            for statement in ("SELECT * FROM agent_registry", "DELETE FROM agent_registry"):
                locked = pytest.raises(sqlite3.OperationalError, match="database is locked")
                with closing(sqlite3.connect(path, timeout=0)) as other, locked:
                    other.execute(statement)
                tried.append(statement)
            super().backup(target, **options)

    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute(f"PRAGMA journal_mode = {mode}").fetchone() == (mode.lower(),)
    with closing(sqlite3.connect(saved, factory=Copy)) as copy:
        _replace(copy, path, keep=keep, patience=0)

    assert len(tried) == 2
    assert agents(path) == ["before"]


def test_it_waits_for_who_is_about_to_close(saved: Path, path: Path) -> None:
    raw = sqlite3.connect(path, check_same_thread=False)
    raw.execute("SELECT * FROM agent_registry").fetchall()
    closing_soon = threading.Timer(0.3, raw.close)
    closing_soon.start()
    restore_backup(saved, path, overwrite=True, busy_timeout=60)
    closing_soon.join()

    assert agents(path) == ["before"]


def write_briefly(path: Path, name: str, stop: Event, acknowledged: Path) -> None:
    """Open the file again and again, write one event, and note what was acknowledged."""
    number = 0
    with acknowledged.open("a") as notes:
        while not stop.is_set():
            try:
                with SwarmDB(path) as db:
                    event_id = db.insert_event(event(name), event_id=f"{name}-{number}")
            except StorageError:  # It had the old file open when that was moved.
                number += 1
                continue
            time.sleep(0.005)  # Else a restore hardly ever finds the file free.
            notes.write(f"{event_id}\n")
            notes.flush()
            number += 1


def events(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as raw:
        return {event_id for (event_id,) in raw.execute("SELECT event_id FROM agent_events")}


def test_what_is_acknowledged_beside_restores_is_in_one_of_the_files_and_never_in_one_that_was_kept_before(
    saved: Path, path: Path, tmp_path: Path
) -> None:
    stop = SPAWN.Event()
    notes = [tmp_path / f"acknowledged-{number}" for number in range(2)]
    writers = [
        SPAWN.Process(target=write_briefly, args=(path, f"w{n}", stop, note), daemon=True)
        for n, note in enumerate(notes)
    ]
    for writer in writers:
        writer.start()
    while not all(note.exists() and note.stat().st_size for note in notes):
        pass
    kept: dict[Path, set[str]] = {}
    for _ in range(6):
        done = restore_backup(saved, path, overwrite=True, busy_timeout=60)
        assert done.kept is not None
        kept[done.kept] = events(done.kept)
    stop.set()
    for writer in writers:
        writer.join()

    assert [writer.exitcode for writer in writers] == [0] * 2
    assert {file: events(file) for file in kept} == kept
    acknowledged = {line for note in notes for line in note.read_text().splitlines()}
    assert acknowledged <= events(path).union(*kept.values())
    assert any(kept.values())
    assert agents(path) == ["before"]


def lose_a_row_of_an_index(path: Path) -> None:
    """Write a row while SQLite does not know of an index, as a page that is lost may leave it."""
    with closing(sqlite3.connect(path)) as raw:
        index = raw.execute("SELECT * FROM sqlite_master WHERE name = 'idx_agent_registry_status'").fetchone()
    for statement in (
        "DELETE FROM sqlite_master WHERE name = 'idx_agent_registry_status'",
        "UPDATE agent_registry SET status = 'lost'",
        "INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)",
    ):
        with closing(sqlite3.connect(path)) as raw, raw:
            raw.execute("PRAGMA writable_schema = ON")
            raw.execute(statement, index if "VALUES" in statement else ())


def unquotable(whole: bytes) -> bytes:
    """Return a file that SQLite complains about in words that are not UTF-8."""
    return whole.replace(b"CREATE TABLE agent_metrics", b"CREATE T\xe9\xe9LE agent_metrics")


def test_a_database_whose_schema_is_no_text_is_replaced_and_kept(saved: Path, path: Path) -> None:
    damaged = unquotable(path.read_bytes())
    path.write_bytes(damaged)
    done = restore_backup(saved, path, overwrite=True)

    assert agents(path) == ["before"]
    assert done.kept is not None
    assert done.kept.read_bytes() == damaged


def test_a_database_whose_first_page_is_malformed_is_replaced_and_kept(saved: Path, path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\x55" * 3996 + whole[4096:])
    with closing(sqlite3.connect(path)) as raw, pytest.raises(sqlite3.DatabaseError, match="malformed"):
        raw.execute("SELECT * FROM sqlite_master")
    done = restore_backup(saved, path, overwrite=True)

    assert agents(path) == ["before"]
    assert done.kept is not None
    assert done.kept.read_bytes()[100:] == b"\x55" * 3996 + whole[4096:]


def test_a_backup_that_is_damaged_or_none_is_refused_and_nothing_is_changed(
    swarmdb: Command, saved: Path, path: Path, tmp_path: Path
) -> None:
    whole = saved.read_bytes()
    (tmp_path / "index.db").write_bytes(whole)
    lose_a_row_of_an_index(tmp_path / "index.db")
    for name, damaged in {
        "half.db": whole[: len(whole) // 2],
        "quoted.db": unquotable(whole),
        "flipped.db": whole[:8192] + b"\x55" * 4096 + whole[12288:],
        "text.db": b"This is no database, and long enough for SQLite to see that it is none.\n" * 20,
        "empty.db": b"",
    }.items():
        (tmp_path / name).write_bytes(damaged)
    execute(tmp_path / "cookies.db", "CREATE TABLE cookies (name TEXT)")
    (tmp_path / "newer.db").write_bytes(whole)
    execute(tmp_path / "newer.db", "UPDATE schema_info SET value = '9.0.0' WHERE key = 'version'")
    before = (path.read_bytes(), files(tmp_path))
    for name, complaint in {
        "index.db": "the backup is damaged",
        "half.db": "malformed",
        "quoted.db": "the file is damaged",
        "flipped.db": "malformed",
        "text.db": "file is not a database",
        "empty.db": "none of SwarmDB's tables",
        "cookies.db": "none of SwarmDB's tables",
        "newer.db": "upgrade moai-flow-memory",
        "nowhere.db": "no backup at",
    }.items():
        ran = swarmdb("restore", name, "--db", path, "--overwrite")

        assert (ran.status, ran.out) == (1, ""), name
        assert complaint in ran.err
        assert name in ran.err
        assert ran.err.count("\n") == 1
        assert (path.read_bytes(), files(tmp_path)) == before
    with pytest.raises(SchemaError):
        restore_backup("empty.db", path, overwrite=True)
    for nothing in (tmp_path / "nowhere.db", os.devnull):
        with pytest.raises(InvalidInputError, match="backup"):
            restore_backup(nothing, path, overwrite=True)
    assert (path.read_bytes(), files(tmp_path)) == before


def test_a_backup_that_somebody_keeps_locked_is_busy(saved: Path, path: Path) -> None:
    with closing(sqlite3.connect(saved, isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode = DELETE").fetchall()
        raw.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BusyError):
            restore_backup(saved, path, overwrite=True, busy_timeout=0)
        with pytest.raises(BusyError), closing(sqlite3.connect(saved)) as original:  # Which was free a moment ago.
            _copy_all(original, sqlite3.connect(":memory:"), saved, 0)
    assert agents(path) == ["after", "before"]


def test_a_backup_that_is_in_use_is_restored_with_what_its_log_holds(saved: Path, path: Path) -> None:
    with SwarmDB(saved) as db:
        db.register_agent("late", "t")
        restore_backup(saved, path, overwrite=True)
        db.register_agent("later", "t")

    assert agents(path) == ["before", "late"]
    assert agents(saved) == ["before", "late", "later"]


AS_NOBODY = """
import os, sys
from pathlib import Path
from moai_flow.memory import StorageError, SwarmDB
from moai_flow.memory.restoring import restore_backup

def agents(path):
    with SwarmDB(path) as db:
        return sorted(agent.agent_id for agent in db.list_agents())

place = Path(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)
shelf, link, new = place / "shelf", place / "link.db", place / "new.db"
saved = shelf / "saved.db"
link.symlink_to(saved)
os.chmod(saved, 0o444)
os.chmod(shelf, 0o555)
for backup in (saved, link):
    restore_backup(backup, new, overwrite=True)
    print(agents(new), os.listdir(shelf))
before = new.read_bytes()
for ending in ("-wal", "-journal"):
    os.chmod(shelf, 0o755)
    unread = shelf / f"saved.db{ending}"
    unread.write_bytes(b"what was committed last")
    os.chmod(unread, 0o444)
    os.chmod(shelf, 0o555)
    for backup in (saved, link):
        try:
            restore_backup(backup, new, overwrite=True)
        except StorageError as error:
            print("refused", new.read_bytes() == before)
    os.chmod(shelf, 0o755)
    unread.unlink()
os.chmod(new, 0o444)
try:
    restore_backup(saved, new, overwrite=True, busy_timeout=1e6)
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_a_backup_in_a_folder_that_can_not_be_written_is_restored_unless_it_has_a_log_there(
    mode: str, saved: Path
) -> None:
    with closing(sqlite3.connect(saved)) as raw:
        assert raw.execute(f"PRAGMA journal_mode = {mode}").fetchone() == (mode.lower(),)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        shelf = Path(folder) / "place" / "shelf"
        shelf.mkdir(parents=True)
        shutil.copyfile(saved, shelf / "saved.db")
        if os.geteuid() == 0:
            Path(folder).chmod(0o755)
            for file in (shelf.parent, shelf, shelf / "saved.db"):
                os.chown(file, 65534, 65534)
        program = [sys.executable, "-c", AS_NOBODY, str(shelf.parent)]
        ran = subprocess.run(program, capture_output=True, text=True, check=False)
    if "PermissionError" in ran.stderr and "site-packages" in ran.stderr:
        pytest.skip("nobody may not read Python's packages here")
    *said, last = ran.stdout.splitlines()
    assert (said, ran.stderr) == (["['before'] ['saved.db']"] * 2 + ["refused True"] * 4, "")
    assert "new.db: " in last
    assert "open" not in last  # It can't be written, which no waiting would change.


def test_a_database_is_no_backup_of_itself(swarmdb: Command, saved: Path, path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(path)
    for backup, target in ((path, path), ("link.db", path), (path, "link.db")):
        ran = swarmdb("restore", backup, "--db", target, "--overwrite")

        assert (ran.status, ran.out) == (1, "")
        assert "another file than the backup" in ran.err
    assert agents(path) == ["after", "before"]


@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
def test_what_belongs_to_the_backup_or_the_database_is_not_the_other_one(ending: str, saved: Path, path: Path) -> None:
    oddly_named = path.with_name(f"swarm.db{ending}")
    shutil.copy(saved, oddly_named)
    whole = oddly_named.read_bytes()
    for source, target in ((oddly_named, path), (saved, saved.with_name(f"saved.db{ending}"))):
        with pytest.raises(InvalidInputError, match="another file than the backup"):
            restore_backup(source, target, overwrite=True)

    assert oddly_named.read_bytes() == whole
    assert files(path.parent) == sorted(["saved.db", "swarm.db", oddly_named.name])


def test_who_has_no_patience_restores_what_nobody_uses(saved: Path, path: Path) -> None:
    restore_backup(saved, path, overwrite=True, busy_timeout=0)

    assert agents(path) == ["before"]


def test_a_backup_is_waited_for_as_long_as_was_said(saved: Path) -> None:
    for patience in (0, 0.25, 3600):
        with closing(_reading(saved, patience)) as raw:
            assert raw.execute("PRAGMA busy_timeout").fetchone() == (patience * 1000,)


def test_a_backup_that_has_a_log_is_restored_as_a_file_that_needs_none_to_be_read(saved: Path, path: Path) -> None:
    with closing(sqlite3.connect(saved)) as raw:
        assert raw.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    restore_backup(saved, path, overwrite=True)
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert raw.execute("SELECT agent_id FROM agent_registry").fetchall() == [("before",)]

    assert saved.read_bytes()[18:20] == b"\2\2"  # Which is how SQLite notes that there may be one.
    assert files(path.parent)[:2] == ["saved.db", "swarm.db"]


@pytest.mark.parametrize("content", [None, b"rubbish" * 1000], ids=["sound", "destroyed"])
def test_what_is_kept_is_named_by_the_time_in_utc(
    content: bytes | None, saved: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # Where it is tomorrow, mostly.
    time.tzset()
    try:
        begin = datetime.now(UTC)
        kept = restore_backup(saved, path, overwrite=True).kept
        end = datetime.now(UTC)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert kept is not None
    moment = datetime.strptime(kept.name, "swarm.db.%Y%m%d-%H%M%S-%f.bak").replace(tzinfo=UTC)

    assert begin <= moment <= end


@pytest.mark.parametrize("is_empty", [True, False])
def test_of_a_database_without_tables_nothing_is_kept(saved: Path, path: Path, *, is_empty: bool) -> None:
    os.truncate(path, 0)
    if not is_empty:
        execute(path, "PRAGMA user_version = 1")
    assert (path.stat().st_size == 0) == is_empty

    assert restore_backup(saved, path, overwrite=True).kept is None
    assert files(path.parent) == ["saved.db", "swarm.db"]
    assert agents(path) == ["before"]


@pytest.mark.parametrize(
    ("name", "is_of_writing"),
    [
        ("SQLITE_FULL", True),
        ("SQLITE_IOERR_WRITE", True),
        ("SQLITE_IOERR_FSYNC", True),
        ("SQLITE_IOERR_READ", False),
        ("SQLITE_IOERR_SHORT_READ", False),
        ("SQLITE_CORRUPT", False),
        ("SQLITE_NOTADB", False),
    ],
)
def test_an_error_is_that_of_the_file_that_was_written_or_of_the_backup(name: str, *, is_of_writing: bool) -> None:
    error = sqlite3.OperationalError(name)
    error.sqlite_errorcode = getattr(sqlite3, name)

    assert _is_of_writing(error) == is_of_writing


def test_a_link_to_the_database_stays_one(saved: Path, path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    done = restore_backup(saved, link, overwrite=True)

    assert link.is_symlink()
    assert done.path == path
    assert agents(path) == agents(link) == ["before"]


def test_a_new_file_is_the_users_own_and_one_that_is_replaced_keeps_its_mode(
    saved: Path, path: Path, tmp_path: Path
) -> None:
    new = restore_backup(saved, tmp_path / "deep" / "deeper" / "new.db").path
    path.chmod(0o664)
    kept = [restore_backup(saved, path, overwrite=True).kept]
    path.write_bytes(b"rubbish" * 1000)
    kept.append(restore_backup(saved, path, overwrite=True).kept)

    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in list(new.parents)[:2]] == [0o700, 0o700]
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, *kept) if file is not None] == [0o664] * 3


MODES = """
import os, sys
from pathlib import Path
from moai_flow.memory.restoring import restore_backup

seen = {}

def look(event, arguments):
    for file in os.scandir(folder) if event in ("os.chmod", "sqlite3.connect", "sqlite3.connect/handle") else ():
        seen.setdefault(file.name.split(".")[-1], set()).add(file.stat().st_mode & 0o777)

saved, path = map(Path, sys.argv[1:])
folder = path.parent
os.umask(0)
sys.addaudithook(look)
restore_backup(saved, path, overwrite=True)
print(sorted((ending, sorted(map(oct, modes))) for ending, modes in seen.items() if ending != "db"))
"""


def test_what_is_half_written_may_be_read_by_nobody_who_may_not_read_the_whole(
    saved: Path, path: Path, tmp_path: Path
) -> None:
    saved.rename(tmp_path / "backup").chmod(0o644)
    for content in (b"rubbish" * 1000, None):
        if content is not None:
            path.write_bytes(content)
        path.chmod(0o640)
        program = [sys.executable, "-c", MODES, str(tmp_path / "backup"), str(path)]
        seen = subprocess.run(program, check=True, capture_output=True, text=True).stdout
        modes = dict(ast.literal_eval(seen))
        assert "0o600" in modes["tmp"]
        assert set(modes["tmp"]) | set(modes.get("bak", ())) <= {"0o600", "0o640"}


@pytest.mark.parametrize("times", [100, 10_000])  # What fits into a buffer, and what does not.
def test_what_is_kept_of_a_destroyed_file_is_flushed_before_that_is_emptied(
    times: int, saved: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rubbish = b"rubbish" * times
    path.write_bytes(rubbish)
    flushed: list[tuple[str, int]] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        assert path.stat().st_size == len(rubbish)
        flushed.append(("folder", 0) if stat.S_ISDIR(status.st_mode) else ("file", status.st_size))

    monkeypatch.setattr(os, "fsync", note)
    restore_backup(saved, path, overwrite=True)

    assert flushed == [("file", len(rubbish)), ("folder", 0)]


def test_an_older_schema_is_restored_as_it_is(saved: Path, path: Path) -> None:
    execute(saved, "UPDATE schema_info SET value = '2.0.0' WHERE key = 'version'")

    assert restore_backup(saved, path, overwrite=True).schema_version == "2.0.0"
    assert agents(path) == ["before"]


def test_what_can_not_be_written_is_a_storage_error_and_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="can't be put there"):
        restore_backup(saved, tmp_path / "file" / "swarm.db")

    assert files(tmp_path) == ["file", "saved.db", "swarm.db"]


def test_a_servers_database_is_not_restored_from_a_file(swarmdb: Command, saved: Path) -> None:
    ran = swarmdb("restore", saved, "--db", "postgresql://user@nowhere/x")

    assert (ran.status, ran.out) == (1, "")
    assert "pg_restore" in ran.err


NO_ROOM = """
import resource, signal, sys
from moai_flow.memory import StorageError, restoring

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

def keep_and_limit(*arguments, **options):
    keep(*arguments, **options)
    limit()

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
when, saved, path = sys.argv[1:]
keep = restoring.copy_to
if when == "at once":
    limit()
else:
    restoring.copy_to = keep_and_limit
try:
    restoring.restore_backup(saved, path, overwrite=True)
except StorageError as error:
    print(error)
"""


def restored_without_room(saved: Path, path: Path, *, when: str = "at once") -> str:
    """What a restore says where a file may have a megabyte: *at once*, or once the old database is kept."""
    program = [sys.executable, "-c", NO_ROOM, when, str(saved), str(path)]
    return subprocess.run(program, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("when", ["at once", "once it is kept"])
def test_where_there_is_no_room_for_the_backup_it_is_not_blamed_and_nothing_is_left(
    when: str, saved: Path, path: Path, tmp_path: Path
) -> None:
    with SwarmDB(saved) as db:
        db.store_memory("s", "semantic", "k", "x" * 2_000_000)
    before = files(tmp_path)
    said = restored_without_room(saved, path, when=when)

    assert said.startswith(f"{path}: ")
    assert ("the backup can't be put there" in said) == (when == "at once")
    assert files(tmp_path) == before
    assert agents(path) == ["after", "before"]


def test_where_there_is_no_room_to_keep_a_destroyed_database_nothing_is_left(
    saved: Path, path: Path, tmp_path: Path
) -> None:
    path.write_bytes(b"rubbish" * 300_000)
    before = files(tmp_path)

    assert f"{path}: the backup can't be put there: " in restored_without_room(saved, path)
    assert files(tmp_path) == before
    assert path.read_bytes() == b"rubbish" * 300_000


def test_where_there_is_no_room_to_keep_a_database_it_stays_as_it_is(saved: Path, path: Path, tmp_path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_memory("s", "semantic", "k", "x" * 2_000_000)
    before = files(tmp_path)

    said = restored_without_room(saved, path)
    assert said.startswith(f"{path}: ")
    assert "disk" in said
    assert files(tmp_path) == before
    assert agents(path) == ["after", "before"]
    with SwarmDB(path) as db:
        assert len(db.get_memory("s", "semantic", "k")) == 2_000_000


def test_what_was_kept_stays_where_a_journal_says_that_the_file_is_not_as_it_was(saved: Path, path: Path) -> None:
    class Interrupted:
        """A backup whose transaction can be undone no more, as the disk is gone."""

        def backup(self, raw: sqlite3.Connection) -> None:
            if leaves_journal:
                path.with_name("swarm.db-journal").write_bytes(b"the old pages")
            raise sqlite3.OperationalError("disk I/O error")

    for leaves_journal in (False, True):
        with pytest.raises(sqlite3.OperationalError):
            _replace(Interrupted(), path, keep=True, patience=0)  # type: ignore[arg-type]
        assert len(list(path.parent.glob("swarm.db.*.bak"))) == leaves_journal


@pytest.mark.parametrize("patience", [float("nan"), "soon", None])
def test_what_is_no_number_of_seconds_is_refused(patience: Any, saved: Path, path: Path) -> None:
    with pytest.raises(InvalidInputError, match="busy_timeout"):
        restore_backup(saved, path, overwrite=True, busy_timeout=patience)


@pytest.mark.parametrize("given", [5, "", "x\0y", None])
def test_what_is_no_path_is_refused(given: object, saved: Path) -> None:
    with pytest.raises(InvalidInputError, match="backup"):
        restore_backup(given, saved)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="db_path"):
        restore_backup(saved, given)  # type: ignore[arg-type]
