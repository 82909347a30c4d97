"""Cleaning up, compacting, copying and checking."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from conftest import Clock, url_of
from moai_flow.memory import (
    BusyError,
    CheckReport,
    CorruptDataError,
    EventData,
    ForeignTime,
    InvalidInputError,
    KeptRows,
    SchemaError,
    StorageError,
    SwarmDB,
    TableFault,
    TransactionError,
    UnlistedValue,
)
from moai_flow.memory.operations.maintenance import has_wal_reset_bug

GOOD = "2025-11-30T10:00:00.000000+00:00"
EVENT = "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp, metadata, created_at) VALUES "
MEMORY = "INSERT INTO session_memory (session_id, memory_type, key, value, timestamp, ttl_hours, created_at) VALUES "
AGENT = "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time, last_updated) VALUES "


def run(db: SwarmDB, sql: str, *values: Any) -> None:
    with db.transaction() as conn:
        conn.execute(sql, values)


def event(db: SwarmDB, agent_id: str, timestamp: Any) -> str:
    return db.insert_event({"event_type": "spawn", "agent_id": agent_id, "agent_type": "t", "timestamp": timestamp})


def test_cleanup_deletes_what_is_older_than_the_days_to_the_microsecond(db: SwarmDB, clock: Clock) -> None:
    event(db, "old", clock.now - timedelta(days=30, microseconds=1))
    event(db, "on the mark", clock.now - timedelta(days=30))
    event(db, "new", clock.now)
    event(db, "future", clock.now + timedelta(days=1))

    assert db.cleanup_old_events() == 1
    assert {found.agent_id for found in db.get_events()} == {"on the mark", "new", "future"}
    clock.advance(microseconds=1)
    assert db.cleanup_old_events(days=0) == 2
    assert db.cleanup_old_events(days=10**12) == 0
    assert [found.agent_id for found in db.get_events()] == ["future"]


def test_cleanup_leaves_other_tables_alone(db: SwarmDB, clock: Clock) -> None:
    db.register_agent("a", "t")
    db.store_memory("s", "semantic", "k", 1)
    db.store_task_metric("t", "a", 1, "success")
    clock.advance(days=20)
    db.cleanup_old_events(days=1)

    assert len(db.list_agents()) == len(db.list_memories("s")) == len(db.get_task_metrics()) == 1


def test_vacuum_gives_space_back(file_db: SwarmDB, clock: Clock) -> None:
    file_db.insert_events(
        {"event_type": "spawn", "agent_id": "a", "agent_type": "t", "metadata": {"text": "x" * 1000}}
        for _ in range(2000)
    )
    full = file_db.size_bytes()
    clock.advance(days=1)
    file_db.cleanup_old_events(days=0)
    assert file_db.size_bytes() == full
    file_db.vacuum()

    assert file_db.size_bytes() < full / 5
    assert file_db.db_path.stat().st_size == file_db.size_bytes()


def test_vacuum_and_size_in_memory() -> None:
    with SwarmDB(":memory:") as db:
        db.vacuum()
        assert db.size_bytes() > 0
        with db.transaction():
            db.insert_events({"event_type": "spawn", "agent_id": "a", "agent_type": "t" * 1000} for _ in range(100))
            assert db.size_bytes() > 100_000


def test_a_backup_is_a_database_of_that_moment(local_db: SwarmDB, tmp_path: Path) -> None:
    local_db.register_agent("a", "t")
    target = local_db.backup(tmp_path / "deep" / "copy.local_db")
    local_db.register_agent("b", "t")

    assert target == tmp_path / "deep" / "copy.local_db"
    assert [path.name for path in target.parent.iterdir()] == ["copy.local_db"]
    with SwarmDB(target) as copy:
        assert [agent.agent_id for agent in copy.list_agents()] == ["a"]
        assert copy.check().ok


def test_a_backup_is_taken_while_others_write(file_db: SwarmDB, tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            file_db.insert_events([{"event_type": "spawn", "agent_id": "a", "agent_type": "t"}] * 10)

    writer = threading.Thread(target=write)
    writer.start()
    for number in range(10):
        with SwarmDB(file_db.backup(tmp_path / f"copy-{number}.db")) as copy:
            assert sum(1 for _ in copy.iter_events()) % 10 == 0
            assert copy.check().ok
    stop.set()
    writer.join()


def test_a_backup_replaces_no_file_unless_told_to(file_db: SwarmDB, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    target.write_text("mine")
    with pytest.raises(InvalidInputError, match="overwrite=True"):
        file_db.backup(target)
    assert target.read_text() == "mine"
    file_db.backup(str(target), overwrite=True)
    with SwarmDB(target) as copy:
        assert copy.list_agents() == []


def test_of_backups_that_want_the_same_place_at_once_one_gets_it(file_db: SwarmDB, tmp_path: Path) -> None:
    file_db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"})
    barrier = threading.Barrier(4)

    def back_up(target: Path) -> bool:
        barrier.wait()
        try:
            file_db.backup(target)
        except InvalidInputError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        for number in range(20):
            target = tmp_path / f"{number}.db"
            assert sum(pool.map(back_up, [target] * 4)) == 1
            with SwarmDB(target) as copy:
                assert len(copy.get_events()) == 1
    assert list(tmp_path.glob("*.tmp")) == []


def test_what_was_put_in_its_place_while_a_backup_was_made_stays(file_db: SwarmDB, tmp_path: Path) -> None:
    file_db.store_memory("s", "semantic", "k", "x" * 50_000_000)
    target = tmp_path / "copy.db"
    with ThreadPoolExecutor(1) as pool:
        backup = pool.submit(file_db.backup, target)
        while not list(tmp_path.glob("copy.db.*.tmp")):
            assert not backup.done()
        target.write_text("mine")
        with pytest.raises(InvalidInputError, match="does not exist yet"):
            backup.result()
    assert target.read_text() == "mine"
    assert list(tmp_path.glob("copy.db.*")) == []


def test_a_backup_into_a_folder_or_the_database_itself_is_refused(file_db: SwarmDB, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="not of a folder"):
        file_db.backup(tmp_path)
    with pytest.raises(InvalidInputError, match="not the database itself"):
        file_db.backup(file_db.db_path, overwrite=True)
    (tmp_path / "link.db").symlink_to(file_db.db_path)
    with pytest.raises(InvalidInputError, match="not the database itself"):
        file_db.backup(tmp_path / "link.db", overwrite=True)


@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
def test_a_backup_into_what_belongs_to_the_database_is_refused(ending: str, file_db: SwarmDB, tmp_path: Path) -> None:
    file_db.register_agent("a", "t")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link.db").symlink_to(f"{file_db.db_path}{ending}")
    inode = Path(f"{file_db.db_path}-wal").stat().st_ino
    for target in (f"swarm.db{ending}", f"link/swarm.db{ending}", "link.db"):
        with pytest.raises(InvalidInputError, match="not the database itself"):
            file_db.backup(tmp_path / target, overwrite=True)
    assert Path(f"{file_db.db_path}-wal").stat().st_ino == inode

    with SwarmDB(tmp_path / f"other{ending}") as oddly_named:  # The backup would take it for what was left beside it.
        with pytest.raises(InvalidInputError, match="not the database itself"):
            oddly_named.backup(tmp_path / "other", overwrite=True)
        assert oddly_named.check().ok


DEAD = """
import os, sys
from moai_flow.memory import SwarmDB
db = SwarmDB(sys.argv[1])
for number in range(50):
    db.register_agent(str(number), "t")
os._exit(0)
"""


def hot_journal(path: Path) -> Path:
    """Return the journal of a database whose program died in a transaction that had reached the file."""
    program = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("CREATE TABLE t (i)")
db.execute("BEGIN")
db.executemany("INSERT INTO t VALUES (?)", [(number,) for number in range(9999)])
db.execute("COMMIT")
db.execute("PRAGMA cache_size = 1")  # What is changed goes into the file at once.
db.execute("BEGIN")
db.execute("UPDATE t SET i = -i")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program, path], check=True)
    return path.with_name(f"{path.name}-journal")


def test_a_backup_takes_the_place_of_a_database_that_died(file_db: SwarmDB, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    subprocess.run([sys.executable, "-c", DEAD, target], check=True)
    assert target.with_name("copy.db-wal").exists()
    file_db.register_agent("a", "t")
    file_db.backup(target, overwrite=True)

    with SwarmDB(target) as copy:
        assert [agent.agent_id for agent in copy.list_agents()] == ["a"]
        assert copy.check().ok


@pytest.mark.parametrize("lost", ["emptied", "removed"])
def test_a_backup_deletes_no_log_whose_file_was_lost(lost: str, file_db: SwarmDB, tmp_path: Path) -> None:
    target, log = tmp_path / "copy.db", tmp_path / "copy.db-wal"
    subprocess.run([sys.executable, "-c", DEAD, target], check=True)
    os.truncate(target, 0) if lost == "emptied" else target.unlink()
    whole, files = log.read_bytes(), sorted(tmp_path.glob("copy.db*"))
    assert whole
    with pytest.raises(InvalidInputError if target.exists() else StorageError, match=r"does not exist yet|its log"):
        file_db.backup(target)
    with pytest.raises(StorageError, match="emptied or removed, but its log is there"):
        file_db.backup(target, overwrite=True)
    assert log.read_bytes() == whole
    assert sorted(tmp_path.glob("copy.db*")) == files
    assert file_db.list_agents() == []


def test_what_is_left_beside_no_file_and_holds_nothing_does_a_backup_no_harm(file_db: SwarmDB, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    subprocess.run([sys.executable, "-c", DEAD, target], check=True)
    target.unlink()
    os.truncate(tmp_path / "copy.db-wal", 0)  # Its index tells of 50 agents still.
    shutil.copy(hot_journal(tmp_path / "other.db"), tmp_path / "copy.db-journal")
    file_db.register_agent("a", "t")

    with SwarmDB(file_db.backup(target)) as copy:
        assert [agent.agent_id for agent in copy.list_agents()] == ["a"]
        assert copy.check().ok


def test_a_backup_of_what_is_in_memory_waits_for_a_writer_and_then_gives_up(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def write() -> None:
        with db.transaction():
            db.register_agent("a", "t")
            entered.set()
            leave.wait()

    with SwarmDB(":memory:", busy_timeout=0.1) as db:
        with db.session(readonly=True), ThreadPoolExecutor(1) as pool:
            pool.submit(db.list_agents).result()  # There are two connections now.
        writer = threading.Thread(target=write)
        writer.start()
        entered.wait()
        with pytest.raises(BusyError, match="kept the database from being copied"):
            db.backup(tmp_path / "copy.db")
        leave.set()
        writer.join()
        assert list(tmp_path.iterdir()) == []
        db.backup(tmp_path / "copy.db")


def test_threads_may_back_up_to_the_same_file(file_db: SwarmDB, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for made in [pool.submit(file_db.backup, tmp_path / "copy.db", overwrite=True) for _ in range(12)]:
            made.result()

    with SwarmDB(tmp_path / "copy.db") as copy:
        assert copy.check().ok


@pytest.mark.parametrize("target", ["", "x\0y", 5, None, "~nosuchuser/x.db"])
def test_a_backup_to_what_is_no_path_is_refused(local_db: SwarmDB, target: Any) -> None:
    with pytest.raises(InvalidInputError, match="path"):
        local_db.backup(target)


def test_a_backup_that_cannot_be_written_leaves_nothing(file_db: SwarmDB, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="the backup can't be written"):
        file_db.backup(tmp_path / "file" / "copy.db")

    file_db.register_agent("a", "t")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("swarm")) == ["file"]


NO_ROOM = """
import resource, signal, sys
from moai_flow.memory import StorageError, SwarmDB
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with SwarmDB(sys.argv[1]) as db:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        db.backup(sys.argv[2])
    except StorageError as error:
        print(error)
"""


def test_a_backup_for_which_there_is_no_room_leaves_nothing(path: Path, tmp_path: Path) -> None:
    with SwarmDB(path) as db:
        db.store_memory("s", "semantic", "k", "x" * 2_000_000)
    program = [sys.executable, "-c", NO_ROOM, str(path), str(tmp_path / "copy.db")]

    assert "the backup can't be written" in subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert [file.name for file in tmp_path.iterdir()] == ["swarm.db"]


def test_a_version_that_is_gone_is_a_schema_error(db: SwarmDB) -> None:
    run(db, "DELETE FROM schema_info")
    with pytest.raises(SchemaError, match="does not say its schema version"):
        db.schema_version  # noqa: B018 (a property that raises)


def test_a_sound_database_checks_ok(db: SwarmDB) -> None:
    event(db, "a", GOOD)
    db.register_agent("a", "t")
    db.store_memory("s", "semantic", "k", None)
    db.store_task_metric("t", "a", None, "success")
    db.store_agent_metric("a", "duration", 1)
    report = db.check()

    assert report.ok
    assert (report.integrity, report.undecodable, report.unlisted, report.foreign_times) == ((), (), (), ())
    assert report.sqlite_version == sqlite3.sqlite_version
    affected = has_wal_reset_bug(sqlite3.sqlite_version_info)
    assert report.has_wal_reset_bug == (affected and not db._location.is_on_server)


USED_UP = "has used up its numbers: a row has 9223372036854775807, and none can be added"
ERROR = CorruptDataError("agent_events", "metadata", {"id": 1}, "holds '{'")
SAME_ROW = CorruptDataError("agent_events", "timestamp", {"id": 1}, "holds 'soon'")
OTHER_ROW = CorruptDataError("agent_registry", "status", {"agent_id": "a"}, "holds NULL")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"integrity": ("row 1 missing from index",)}, "The file is damaged.*last backup.*REINDEX"),
        ({"tables": (TableFault("t", "is missing"),)}, "^A table is not as SwarmDB makes it.*DELETE FROM schema_info"),
        ({"tables": (TableFault("t", USED_UP),)}, "^A program gave a row the highest number.*UPDATE sqlite_sequence"),
        ({"undecodable": (ERROR, SAME_ROW)}, "^1 row can't be read.*swarmdb check --quarantine"),
        ({"undecodable": (ERROR, SAME_ROW, OTHER_ROW)}, "^2 rows can't be read"),
        ({"undecodable": (ERROR,), "quarantined": 3}, "^3 rows moved into tables whose names end in _quarantine"),
        ({"undecodable": (ERROR,), "kept": (KeptRows("t", "r", 2),)}, "^2 rows could not be moved without a loss"),
        ({"hard_links": 2}, "^The file has 2 names .*find -samefile"),
        ({"unlisted": (UnlistedValue("agent_events", "event_type", "x", 5),)}, "^5 rows with words.*nothing to do"),
        ({"foreign_times": (ForeignTime("agent_events", "timestamp", 1200),)}, "^1,200 rows with times"),
        ({"has_wal_reset_bug": True}, r"^SQLite 3\.40\.1 has a rare bug.*3\.51\.3"),
    ],
)
def test_each_kind_of_finding_comes_with_what_to_do(found: dict[str, Any], said: str) -> None:
    clean: dict[str, Any] = {"sqlite_version": "3.40.1", "has_wal_reset_bug": False, "hard_links": 1}
    assert CheckReport(**clean).advice == ()
    (advice,) = CheckReport(**{**clean, **found}).advice
    assert re.search(said, advice)


def test_a_second_name_of_the_file_is_found(file_db: SwarmDB, tmp_path: Path) -> None:
    assert file_db.check().hard_links == 1
    (tmp_path / "link.db").symlink_to(file_db.db_path)
    assert file_db.check().hard_links == 1
    (tmp_path / "other.db").hardlink_to(file_db.db_path)
    report = file_db.check()

    assert report.hard_links == 2
    assert report.ok
    assert any("2 names" in advice for advice in report.advice)
    (tmp_path / "other.db").unlink()
    with SwarmDB(tmp_path / "link.db") as by_link:
        assert by_link.check().hard_links == 1


def test_what_has_no_file_has_no_second_name(db: SwarmDB) -> None:
    assert (db.check().hard_links is None) == (db._location.path is None)


def test_the_worst_comes_first() -> None:
    report = CheckReport("3.40.1", has_wal_reset_bug=True, integrity=("damage",), undecodable=(ERROR,))
    assert [advice.split()[0] for advice in report.advice] == ["The", "1", "SQLite"]


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((4, 0, 0), False),
    ],
)
def test_versions_of_sqlite_with_the_wal_reset_bug_are_known(version: tuple[int, ...], affected: bool) -> None:  # noqa: FBT001
    assert has_wal_reset_bug(version) is affected


BROKEN = {
    "agent_events.metadata": (EVENT + "('e', 'spawn', 'a', 't', ?, '{bad', ?)", (GOOD, GOOD)),
    "agent_events.metadata ": (EVENT + "('e', 'spawn', 'a', 't', ?, '[1]', ?)", (GOOD, GOOD)),
    "agent_events.metadata  ": (EVENT + "('e', 'spawn', 'a', 't', ?, CAST(x'7bff7d' AS TEXT), ?)", (GOOD, GOOD)),
    "agent_events.timestamp": (EVENT + "('e', 'spawn', 'a', 't', 'soon', '{}', ?)", (GOOD,)),
    "agent_events.created_at": (EVENT + "('e', 'spawn', 'a', 't', ?, '{}', NULL)", (GOOD,)),
    "agent_events.agent_type": (EVENT + "('e', 'spawn', 'a', x'00ff', ?, '{}', ?)", (GOOD, GOOD)),
    "agent_events.agent_type ": (EVENT + "('e', 'spawn', 'a', CAST(x'ff61' AS TEXT), ?, '{}', ?)", (GOOD, GOOD)),
    "agent_registry.spawn_time": (AGENT + "('a', 't', 'running', 'soon', ?)", (GOOD,)),
    "agent_registry.spawn_time ": (AGENT + "('a', 't', 'running', 9e999, ?)", (GOOD,)),
    "agent_registry.spawn_time  ": (AGENT + "('a', 't', 'running', 1e18, ?)", (GOOD,)),
    "session_memory.value": (MEMORY + "('s', 'semantic', 'k', '{bad', ?, NULL, ?)", (GOOD, GOOD)),
    "session_memory.value ": (MEMORY + "('s', 'semantic', 'k', x'01', ?, NULL, ?)", (GOOD, GOOD)),
    "session_memory.value  ": (MEMORY + "('s', 'semantic', 'k', ?, ?, NULL, ?)", ("[" * 100_000, GOOD, GOOD)),
    "session_memory.ttl_hours": (MEMORY + "('s', 'semantic', 'k', '1', ?, 'long', ?)", (GOOD, GOOD)),
    "session_memory.timestamp": (MEMORY + "('s', 'semantic', 'k', '1', 'soon', 5, ?)", (GOOD,)),
}


def read_all(db: SwarmDB) -> None:
    db.get_events()
    db.list_agents()
    db.get_memory("s", "semantic", "k", as_type=int)
    db.memory_history("s", "semantic", "k")


@pytest.mark.parametrize(("where", "row"), BROKEN.items(), ids=list(BROKEN))
def test_a_value_that_cannot_be_decoded_is_named_and_can_be_moved_away(
    local_db: SwarmDB, where: str, row: tuple[str, tuple[Any, ...]]
) -> None:
    run(local_db, row[0], *row[1])
    table, _, column = where.strip().partition(".")
    with pytest.raises(CorruptDataError) as caught:
        read_all(local_db)
    error = caught.value
    assert (error.table, error.column) == (table, column)
    assert list(error.row.values()) in ([1], ["a"])
    assert where.strip() in str(error)

    report = local_db.check()
    assert not report.ok
    assert [(fault.table, fault.column, fault.row) for fault in report.undecodable] == [(table, column, error.row)]
    stored = contents(local_db, table)

    moved = local_db.check(quarantine=True)
    assert moved.quarantined == 1
    assert not moved.ok
    assert contents(local_db, f"{table}_quarantine") == stored
    assert local_db.check().ok
    read_all(local_db)


def contents(db: SwarmDB, table: str) -> list[Any]:
    """Return a table's rows as hexadecimal, with each value's type."""
    with db.transaction() as conn:
        columns = [row["name"] for row in conn.execute(f"PRAGMA table_info({table})")]
        select = ", ".join(f"typeof({column}), hex({column})" for column in columns)
        return [tuple(row) for row in conn.execute(f"SELECT {select} FROM {table}")]


def test_a_bad_row_among_good_ones_is_the_only_one_moved(local_db: SwarmDB) -> None:
    event(local_db, "good", GOOD)
    run(local_db, *[EVENT + "('bad', 'spawn', 'a', 't', 'soon', '{', ?)", GOOD])
    event(local_db, "good too", GOOD)
    with pytest.raises(CorruptDataError, match=r"agent_events\.timestamp of the row with id=2: holds 'soon'"):
        local_db.get_events()
    with pytest.raises(CorruptDataError):
        list(local_db.iter_events())
    assert local_db.get_events("good")[0].agent_id == "good"

    assert [fault.column for fault in local_db.check(quarantine=True).undecodable] == ["timestamp", "metadata"]
    assert [found.agent_id for found in local_db.get_events()] == ["good too", "good"]


def test_an_error_that_is_kept_keeps_no_statement_under_way(path: Path) -> None:
    event: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}
    with SwarmDB(path) as db, closing(sqlite3.connect(path)) as other:
        db.insert_events([event] * 2)
        with other:
            other.execute("UPDATE agent_events SET agent_type = CAST(x'ff' AS TEXT)")
        with pytest.raises(CorruptDataError) as kept:
            db.get_events()
        with other:
            other.execute("DELETE FROM agent_events")
        db.insert_event(event)  # Behind an old snapshot, SQLite would refuse it at once.
        assert kept.value.column == "agent_type"


def test_quarantine_of_a_memory_takes_what_it_replaced_along(local_db: SwarmDB) -> None:
    local_db.store_memory("s", "semantic", "k", "older")
    local_db.store_memory("s", "semantic", "other", "kept")
    run(local_db, *[MEMORY + "('s', 'semantic', 'k', '{bad', ?, NULL, ?)", GOOD, GOOD])
    assert local_db.check(quarantine=True).quarantined == 2

    assert local_db.get_memory("s", "semantic", "k", default="absent") == "absent"
    assert local_db.get_memory("s", "semantic", "other") == "kept"
    run(local_db, *[MEMORY + "('s', 'semantic', 'k', '{bad', ?, NULL, ?)", GOOD, GOOD])
    assert local_db.check(quarantine=True).quarantined == 1
    assert len(contents(local_db, "session_memory_quarantine")) == 3


def test_a_memory_of_no_type_is_moved_with_what_it_replaced(path: Path) -> None:
    with SwarmDB(path) as db:
        (made,) = execute(path, "SELECT sql FROM sqlite_master WHERE name = 'session_memory'")
        execute(path, "DROP TABLE session_memory", made[0].replace("memory_type TEXT NOT NULL", "memory_type TEXT"))
        for memory_type in (None, None, "semantic"):
            run(db, MEMORY + "('s', ?, 'k', '1', ?, NULL, ?)", memory_type, GOOD, GOOD)
        report = db.check(quarantine=True)
        assert (report.quarantined, report.kept) == (2, ())
        assert db.check().ok
        assert db.get_memory("s", "semantic", "k") == 1


# What other programs add


def execute(where: Path | str, *statements: str) -> list[Any]:
    """Run SQL as another program would, and return the last statement's rows."""
    with connected(where) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        rows = cursor.fetchall() if cursor.description else []
        connection.commit()
    return rows


def connected(where: Path | str) -> Any:
    if isinstance(where, Path):
        return closing(sqlite3.connect(where))
    return closing(psycopg.connect(make_url(where).set(drivername="postgresql").render_as_string(hide_password=False)))


@pytest.fixture(params=["file", "postgresql"])
def shared(request: pytest.FixtureRequest, path: Path) -> Iterator[tuple[SwarmDB, Path | str]]:
    """A store with three events and three agents, of which the second can't be read, and where others open it."""
    url = url_of(request.param, path, request)
    with SwarmDB(url=url) as db:
        for name in ("first", "bad", "last"):
            event(db, name, GOOD)
            db.register_agent(name, "t")
        where = path if request.param == "file" else url
        for table in ("agent_events", "agent_registry"):
            execute(where, f"UPDATE {table} SET metadata = '[1]' WHERE agent_id = 'bad'")
        yield db, where


def test_quarantine_takes_the_columns_of_other_programs_along(shared: tuple[SwarmDB, Path | str]) -> None:
    db, where = shared
    kind = "STORED" if isinstance(where, str) else "VIRTUAL"
    for table in ("agent_events", "agent_registry"):
        execute(
            where,
            f'ALTER TABLE {table} ADD COLUMN "the Owner\'s %" TEXT',
            f"ALTER TABLE {table} ADD COLUMN begins TEXT GENERATED ALWAYS AS (substr(agent_type, 1, 1)) {kind}",
            f"UPDATE {table} SET \"the Owner's %\" = 'precious'",
        )
    report = db.check(quarantine=True)

    assert (report.quarantined, report.kept) == (2, ())
    for table in ("agent_events", "agent_registry"):
        columns = 'agent_id, "the Owner\'s %", begins'
        assert execute(where, f"SELECT {columns} FROM {table}_quarantine") == [("bad", "precious", "t")]
        assert execute(where, f"SELECT agent_id FROM {table} ORDER BY agent_id") == [("first",), ("last",)]
    assert db.check().ok


def test_a_quarantine_that_lacks_a_new_column_is_not_used(shared: tuple[SwarmDB, Path | str]) -> None:
    db, where = shared
    assert db.check(quarantine=True).quarantined == 2
    execute(
        where,
        "ALTER TABLE agent_events ADD COLUMN owner TEXT",
        "UPDATE agent_events SET metadata = '[1]', owner = 'precious' WHERE agent_id = 'last'",
    )
    (kept,) = db.check(quarantine=True).kept
    assert kept == KeptRows("agent_events", TAKEN, 1)

    execute(where, "ALTER TABLE agent_events_quarantine RENAME TO earlier")
    assert db.check(quarantine=True).quarantined == 1
    assert execute(where, "SELECT agent_id, owner FROM agent_events_quarantine") == [("last", "precious")]


TAKEN = "agent_events_quarantine is there already, and is not the table that SwarmDB makes"


@pytest.mark.parametrize(
    "action",
    ["", "ON DELETE CASCADE", "ON DELETE SET NULL", "DEFERRABLE INITIALLY DEFERRED"],
    ids=lambda words: words[-8:],
)
def test_a_row_that_others_refer_to_stays_and_they_with_it(shared: tuple[SwarmDB, Path | str], action: str) -> None:
    db, where = shared
    event(db, "bad", GOOD)
    execute(where, "UPDATE agent_events SET metadata = '[1]' WHERE agent_id = 'bad'")
    execute(
        where,
        f"CREATE TABLE notes (event BIGINT REFERENCES agent_events(id) {action}, text TEXT)",
        f"CREATE TABLE owners (agent TEXT REFERENCES agent_registry {action}, name TEXT)",
        "INSERT INTO notes VALUES (2, 'precious'), (1, 'good')",
        "INSERT INTO owners VALUES ('bad', 'precious')",
    )
    before = execute(where, "SELECT * FROM agent_events WHERE id = 2")
    report = db.check(quarantine=True)

    assert report.quarantined == 1
    assert report.kept == (
        KeptRows("agent_events", "a row of notes refers to it", 1),
        KeptRows("agent_registry", "a row of owners refers to it", 1),
    )
    assert not report.ok
    assert [advice[:27] for advice in report.advice[:2]] == [
        "1 row moved into tables who",
        "2 rows could not be moved w",
    ]
    assert execute(where, "SELECT * FROM notes ORDER BY event") == [(1, "good"), (2, "precious")]
    assert execute(where, "SELECT * FROM owners") == [("bad", "precious")]
    assert execute(where, "SELECT * FROM agent_events WHERE id = 2") == before
    execute(where, "DROP TABLE notes", "DROP TABLE owners")
    assert db.check(quarantine=True).quarantined == 2
    assert db.check().ok


def test_a_reference_may_be_written_in_other_letters_and_to_several_columns(path: Path) -> None:
    with SwarmDB(path) as db:
        event(db, "bad", GOOD)
        execute(
            path,
            "UPDATE agent_events SET metadata = '{'",
            "CREATE UNIQUE INDEX pair ON agent_events (id, agent_id)",
            "CREATE TABLE notes (agent, event, FOREIGN KEY (agent, event) REFERENCES AGENT_events (AGENT_ID, ID))",
            "INSERT INTO notes VALUES ('bad', 2), ('other', 1)",
        )
        assert db.check(quarantine=True).quarantined == 1
        execute(
            path,
            "INSERT INTO agent_events SELECT * FROM agent_events_quarantine",
            "INSERT INTO notes VALUES ('bad', 1)",
        )
        assert db.check(quarantine=True).kept == (KeptRows("agent_events", "a row of notes refers to it", 1),)


ACTIONS = {
    "healthy rows": "DELETE FROM agent_events WHERE agent_id = 'last'",
    "another table": "DELETE FROM agent_registry WHERE agent_id = old.agent_id",
    "another program's table": "DELETE FROM notes WHERE agent = old.agent_id",
    "another program's column": "UPDATE notes SET agent = NULL WHERE agent = old.agent_id",
}


@pytest.mark.parametrize("time", ["BEFORE", "AFTER"])
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_a_row_whose_going_would_set_off_a_trigger_stays(
    shared: tuple[SwarmDB, Path | str], action: str, time: str
) -> None:
    db, where = shared
    run(db, "UPDATE agent_registry SET metadata = NULL")
    execute(where, "CREATE TABLE notes (agent TEXT)", "INSERT INTO notes VALUES ('bad')")
    if isinstance(where, str):
        execute(
            where,
            f"CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {action}; RETURN old; END $$",
            f"CREATE TRIGGER act {time} DELETE ON agent_events FOR EACH ROW EXECUTE FUNCTION act()",
        )
    else:
        execute(where, f'CREATE TRIGGER act {time}/* of ours */delete ON "Agent_Events" BEGIN {action}; END')
    tables = ("agent_events", "agent_registry", "notes")
    before = [execute(where, f"SELECT * FROM {table}") for table in tables]
    report = db.check(quarantine=True)

    assert (report.quarantined, report.kept) == (0, (KeptRows("agent_events", RUNS.format("agent_events"), 1),))
    assert [execute(where, f"SELECT * FROM {table}") for table in tables] == before
    execute(where, "DROP TRIGGER act" + (" ON agent_events" if isinstance(where, str) else ""))
    assert db.check(quarantine=True).quarantined == 1
    assert db.check().ok


RUNS = "{} has a trigger or rule that would run: act"


@pytest.mark.parametrize("action", ["ignore", "abort, 'never'", "fail, 'never'", "rollback, 'never'"])
def test_rows_that_a_trigger_keeps_are_not_counted_as_moved(path: Path, action: str) -> None:
    with SwarmDB(path) as db:
        for name in ("kept", "bad"):
            event(db, name, GOOD)
        execute(
            path,
            "UPDATE agent_events SET metadata = '{'",
            "CREATE TRIGGER act BEFORE DELETE ON agent_events WHEN old.agent_id = 'kept' "
            f"BEGIN SELECT raise({action}); END",
        )
        report = db.check(quarantine=True)
        assert (report.quarantined, report.kept) == (0, (KeptRows("agent_events", RUNS.format("agent_events"), 2),))
        assert len(report.undecodable) == 2
        execute(path, "DROP TRIGGER act")
        assert db.check(quarantine=True).quarantined == 2
        assert sorted(execute(path, "SELECT agent_id FROM agent_events_quarantine")) == [("bad",), ("kept",)]
        assert db.check().ok


def test_a_trigger_that_only_this_connection_has_keeps_rows_too(local_db: SwarmDB) -> None:
    event(local_db, "bad", GOOD)
    run(local_db, "UPDATE agent_events SET metadata = '{'")
    with local_db.transaction() as conn:
        conn.execute("CREATE TEMP TRIGGER act AFTER DELETE ON main.agent_events BEGIN DELETE FROM agent_registry; END")
        assert local_db.check(quarantine=True).kept == (KeptRows("agent_events", RUNS.format("agent_events"), 1),)
        conn.execute("DROP TRIGGER act")
    assert local_db.check(quarantine=True).quarantined == 1


def test_triggers_of_other_events_keep_nothing(shared: tuple[SwarmDB, Path | str]) -> None:
    db, where = shared
    act = "BEGIN SELECT raise(abort, 'never'); END"
    if isinstance(where, str):
        execute(where, FUNCTION.format("RAISE EXCEPTION 'never'"))
        act = "FOR EACH ROW EXECUTE FUNCTION act()"
    for event_ in ("INSERT", "UPDATE"):
        execute(where, f"CREATE TRIGGER act_{event_} BEFORE {event_} ON agent_events {act}")
    report = db.check(quarantine=True)

    assert (report.quarantined, report.kept) == (2, ())
    assert execute(where, "SELECT agent_id FROM agent_events_quarantine") == [("bad",)]


FUNCTION = "CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {}; RETURN NULL; END $$"


def test_a_row_whose_coming_would_set_off_a_trigger_stays(shared: tuple[SwarmDB, Path | str]) -> None:
    db, where = shared
    assert db.check(quarantine=True).quarantined == 2
    action = "DELETE FROM agent_events_quarantine"
    act = f"BEGIN {action}; END"
    if isinstance(where, str):
        execute(where, FUNCTION.format(action))
        act = "FOR EACH ROW EXECUTE FUNCTION act()"
    execute(
        where,
        "UPDATE agent_events SET metadata = '[1]' WHERE agent_id = 'last'",
        f"CREATE TRIGGER act AFTER INSERT ON agent_events_quarantine {act}",
    )
    (kept,) = db.check(quarantine=True).kept
    assert kept == KeptRows("agent_events", RUNS.format("agent_events_quarantine"), 1)
    assert execute(where, "SELECT agent_id FROM agent_events_quarantine") == [("bad",)]
    assert execute(where, "SELECT agent_id FROM agent_events ORDER BY id") == [("first",), ("last",)]


def test_a_trigger_or_a_rule_of_a_server_keeps_rows(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url) as db:
        event(db, "bad", GOOD)
        db.register_agent("bad", "t")
        db.store_memory("s", "semantic", "bad", 1)
        execute(
            postgres_url,
            "UPDATE agent_events SET metadata = '[1]'",
            "UPDATE agent_registry SET metadata = '[1]'",
            "UPDATE session_memory SET ttl_hours = 1, timestamp = 'infinity'",
            FUNCTION.format("NULL"),
            "CREATE TRIGGER act BEFORE DELETE ON agent_events FOR EACH ROW EXECUTE FUNCTION act()",
            "CREATE RULE act AS ON DELETE TO agent_registry DO INSTEAD NOTHING",
            "CREATE TABLE heir () INHERITS (session_memory)",
            "CREATE TRIGGER act AFTER INSERT OR DELETE ON heir FOR EACH ROW EXECUTE FUNCTION act()",
        )
        tables = ("agent_events", "agent_registry", "session_memory")
        report = db.check(quarantine=True)
        assert report.quarantined == 0
        assert report.kept == tuple(KeptRows(table, RUNS.format(table), 1) for table in tables)
        assert execute(postgres_url, "SELECT to_regclass('agent_registry_quarantine')") == [(None,)]

        execute(
            postgres_url,
            "ALTER TABLE agent_events DISABLE TRIGGER act",
            "ALTER TABLE agent_registry DISABLE RULE act",
            "ALTER TABLE heir DISABLE TRIGGER act",
        )
        assert db.check(quarantine=True).quarantined == 3
        assert db.check().ok


# What a quarantine may have been given, what is then said, and how many rows are moved.
KEYS = {
    "UNIQUE (agent_id) ON CONFLICT IGNORE": (
        "a policy or a key of another program keeps it from being copied or deleted",
        2,
    ),
    "UNIQUE (agent_id) ON CONFLICT ABORT": ("UNIQUE constraint failed: agent_events_quarantine.agent_id", 2),
    # These undo what was moved before.
    "UNIQUE (agent_id) ON CONFLICT ROLLBACK": ("UNIQUE constraint failed: agent_events_quarantine.agent_id", 0),
    "FOREIGN KEY (id) REFERENCES schema_info DEFERRABLE INITIALLY DEFERRED": ("FOREIGN KEY constraint failed", 0),
}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.split()[-1])
def test_rows_that_a_key_of_the_quarantine_refuses_are_not_counted_as_moved(path: Path, key: str) -> None:
    with SwarmDB(path) as db:
        for name in ("bad", "bad", "other"):
            event(db, name, GOOD)
        names = [row[1] for row in execute(path, "PRAGMA table_info(agent_events)")]
        execute(
            path,
            "UPDATE agent_events SET metadata = '{'",
            f"CREATE TABLE agent_events_quarantine ({' BLOB, '.join(names)} BLOB, {key})",
        )
        reason, moved = KEYS[key]
        report = db.check(quarantine=True)
        assert (report.quarantined, report.kept) == (moved, (KeptRows("agent_events", reason, 3 - moved),))
        assert execute(path, "SELECT count(*) FROM agent_events") == [(3 - moved,)]
        assert execute(path, "SELECT count(*) FROM agent_events_quarantine") == [(moved,)]


@pytest.mark.parametrize(
    "taken",
    [
        "CREATE TABLE agent_events_quarantine (id INTEGER PRIMARY KEY, why TEXT)",
        "CREATE TABLE agent_events_quarantine (id TEXT, event_id TEXT, event_type TEXT, agent_id TEXT, "
        "agent_type TEXT, timestamp TEXT, metadata TEXT, created_at TEXT)",
        "CREATE VIEW agent_events_quarantine AS SELECT * FROM agent_events",
    ],
)
def test_a_quarantine_that_is_another_programs_is_left_alone(shared: tuple[SwarmDB, Path | str], taken: str) -> None:
    db, where = shared
    execute(where, taken)
    before = execute(where, "SELECT * FROM agent_events_quarantine")
    report = db.check(quarantine=True)

    assert report.quarantined == 1
    ((table, reason, rows),) = [(kept.table, kept.reason, kept.rows) for kept in report.kept]
    assert (table, rows) == ("agent_events", 1)
    assert reason in (TAKEN, 'relation "agent_events_quarantine" already exists')
    assert execute(where, "SELECT * FROM agent_events_quarantine") == before
    assert execute(where, "SELECT agent_id FROM agent_events ORDER BY id") == [("first",), ("bad",), ("last",)]
    assert execute(where, "SELECT agent_id FROM agent_registry ORDER BY agent_id") == [("first",), ("last",)]


def test_a_failed_quarantine_leaves_the_block_around_it_usable(shared: tuple[SwarmDB, Path | str]) -> None:
    db, where = shared
    execute(where, "CREATE VIEW agent_events_quarantine AS SELECT * FROM agent_events")
    with db.transaction():
        db.register_agent("before", "t")
        assert [kept.rows for kept in db.check(quarantine=True).kept] == [1]
        db.register_agent("after", "t")
    assert [agent.agent_id for agent in db.list_agents()][:2] == ["after", "before"]


def test_deleting_a_memory_whose_time_is_none_removes_nothing(local_db: SwarmDB) -> None:
    run(local_db, *[MEMORY + "('s', 'semantic', 'k', '1', 'soon', 5, ?)", GOOD])
    with pytest.raises(CorruptDataError, match=r"session_memory\.timestamp"):
        local_db.delete_memory("s", "semantic", "k")

    assert len(contents(local_db, "session_memory")) == 1


def test_a_status_is_written_though_another_value_of_the_row_is_bad(local_db: SwarmDB) -> None:
    run(local_db, AGENT + "('a', 't', 'running', 'soon', ?)", GOOD)
    with pytest.raises(CorruptDataError, match="spawn_time"):
        local_db.update_agent_status("a", "complete")

    with local_db.transaction() as conn:
        assert conn.execute("SELECT status FROM agent_registry").fetchone()["status"] == "complete"


def test_a_row_that_a_cleanup_cannot_read_is_named(local_db: SwarmDB, clock: Clock) -> None:
    run(local_db, *[MEMORY + "(CAST(x'ff' AS TEXT), 'semantic', 'k', '1', ?, 5, ?)", GOOD, GOOD])
    clock.advance(days=365)
    with pytest.raises(CorruptDataError, match=r"session_memory\.session_id of the row with id=1"):
        local_db.cleanup(0)


def test_quarantine_is_refused_in_a_read_only_session(db: SwarmDB) -> None:
    with db.session(readonly=True):
        assert db.check().ok
        with pytest.raises(TransactionError, match="refuses writes"):
            db.check(quarantine=True)


def test_what_older_programs_wrote_as_json_is_read(local_db: SwarmDB) -> None:
    for text in ('"\\ud800"', "NaN", "[" * 500 + "]" * 500):
        run(local_db, MEMORY + "('s', 'semantic', 'k', ?, ?, NULL, ?)", text, GOOD, GOOD)
        local_db.get_memory("s", "semantic", "k")
        assert local_db.check().ok


@pytest.mark.parametrize("kind", ["file", "postgresql"])
def test_a_missing_table_or_column_is_named_and_can_be_made_again(
    request: pytest.FixtureRequest, path: Path, kind: str
) -> None:
    url = url_of(kind, path, request)
    with SwarmDB(url=url) as db:
        run(db, "DROP TABLE swarm_metrics")
        run(db, "ALTER TABLE agent_events RENAME COLUMN event_type TO kind")
        report = db.check()
        assert not report.ok
        assert report.tables == (
            TableFault("agent_events", "has no column event_type"),
            TableFault("swarm_metrics", "is missing"),
        )
        with pytest.raises(StorageError, match="swarm_metrics"):
            db.get_swarm_metrics()

        # As the advice says.
        run(db, "ALTER TABLE agent_events RENAME COLUMN kind TO event_type")
        run(db, "DELETE FROM schema_info WHERE key = 'version'")
        SwarmDB(url=url).close()
        assert db.check().tables == ()
        assert db.get_swarm_metrics() == []


@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
def test_a_view_in_the_place_of_a_table_is_named(shared: tuple[SwarmDB, Path | str], kind: str) -> None:
    db, where = shared
    if kind.startswith("M") and not isinstance(where, str):
        kind = "VIEW"  # SQLite has no other.
    execute(where, "ALTER TABLE agent_events RENAME TO other", f"CREATE {kind} agent_events AS SELECT * FROM other")
    assert db.check(quarantine=True).tables == (TableFault("agent_events", "is no table"),)

    # As the advice says.
    execute(where, f"DROP {kind} agent_events", "ALTER TABLE other RENAME TO agent_events")
    assert db.check(quarantine=True).tables == ()
    assert [event.agent_id for event in db.get_events()] == ["last", "first"]


def test_a_table_without_rowid_is_named(path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
        ((made,),) = execute(path, "SELECT sql FROM sqlite_master WHERE name = 'agent_registry'")
        indexes = execute(
            path, "SELECT name, sql FROM sqlite_master WHERE tbl_name = 'agent_registry' AND name LIKE 'idx%'"
        )
        execute(
            path,
            "ALTER TABLE agent_registry RENAME TO other",
            f"{made} WITHOUT ROWID",
            "INSERT INTO agent_registry SELECT * FROM other",
            "DROP TABLE other",
            *(sql for _, sql in indexes),
        )
        assert db.check(quarantine=True).tables == (TableFault("agent_registry", "is WITHOUT ROWID"),)
    execute(path, "DELETE FROM schema_info WHERE key = 'version'")
    with pytest.raises(SchemaError, match="its table agent_registry is WITHOUT ROWID"):
        SwarmDB(path)

    # As the advice says.
    execute(path, "ALTER TABLE agent_registry RENAME TO was", *(f"DROP INDEX {name}" for name, _ in indexes))
    with SwarmDB(path) as db:
        execute(path, "INSERT INTO agent_registry SELECT * FROM was")
        assert db.check().ok
        assert [agent.agent_id for agent in db.list_agents()] == ["a"]


@pytest.mark.parametrize("table", ["agent_events", "session_memory"])
def test_numbers_that_are_used_up_are_named(local_db: SwarmDB, table: str) -> None:
    def write() -> None:
        event(local_db, "a", GOOD)
        local_db.store_memory("s", "semantic", "k", 1)

    write()
    run(local_db, f"UPDATE {table} SET id = 9223372036854775806")
    run(local_db, f"UPDATE sqlite_sequence SET seq = 9223372036854775806 WHERE name = '{table}'")
    assert local_db.check().ok
    write()
    report = local_db.check()
    assert not report.ok
    assert report.tables == (TableFault(table, USED_UP),)
    with pytest.raises(StorageError, match="full"):
        write()

    # As the advice says.
    run(local_db, f"UPDATE {table} SET id = 1000000 + id % 2")
    run(local_db, f"UPDATE sqlite_sequence SET seq = (SELECT max(id) FROM {table}) WHERE name = '{table}'")
    assert local_db.check().ok
    write()


def test_a_damaged_file_is_reported(path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_events({"event_type": "spawn", "agent_id": str(number), "agent_type": "t"} for number in range(500))
    with closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'idx_agent_events_agent_id'"
        ).fetchone()
    content = bytearray(path.read_bytes())
    content[(root - 1) * 4096 + 8 : root * 4096] = b"\x55" * 4088
    path.write_bytes(content)

    with SwarmDB(path) as db:
        report = db.check()
        assert not report.ok
        assert report.integrity


def zeroed(path: Path, name: str) -> None:
    """Overwrite the first page of a table or an index with zeros."""
    ((root,),) = execute(path, f"SELECT rootpage FROM sqlite_master WHERE name = '{name}'")
    content = bytearray(path.read_bytes())
    content[(root - 1) * 4096 : root * 4096] = bytes(4096)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["agent_events", "agent_registry", "session_memory", "task_metrics", "idx_agent_events_timestamp"]
)
@pytest.mark.parametrize("quarantine", [False, True])
def test_wherever_the_damage_is_the_rest_is_checked_and_nothing_is_written(
    path: Path,
    name: str,
    quarantine: bool,  # noqa: FBT001
) -> None:
    with SwarmDB(path) as db:
        event(db, "a", GOOD)
        db.store_agent_metric("bad", "duration", 1.0)
        run(db, "UPDATE agent_metrics SET metadata = '{'")
    zeroed(path, name)
    before = path.read_bytes()
    with SwarmDB(path) as db:
        report = db.check(quarantine=quarantine)

    assert not report.ok
    assert report.integrity
    assert [(fault.table, fault.column) for fault in report.undecodable] == [("agent_metrics", "metadata")]
    assert report.quarantined == 0
    kept = KeptRows("agent_metrics", "the file is damaged, and nothing is written into it", 1)
    assert report.kept == ((kept,) if quarantine else ())
    assert path.read_bytes() == before
