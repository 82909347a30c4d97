"""Cleaning up, compacting, copying and checking."""

import re
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from conftest import Clock
from moai_flow.memory import (
    BusyError,
    CheckReport,
    CorruptDataError,
    EventData,
    ForeignTime,
    InvalidInputError,
    SchemaError,
    StorageError,
    SwarmDB,
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


def test_a_backup_takes_the_place_of_a_database_that_died(file_db: SwarmDB, tmp_path: Path) -> None:
    program = (
        "import os, sys; from moai_flow.memory import SwarmDB; db = SwarmDB(sys.argv[1]); "
        "[db.register_agent(str(number), 't') for number in range(50)]; os._exit(0)"
    )
    target = tmp_path / "copy.db"
    subprocess.run([sys.executable, "-c", program, target], check=True)
    assert target.with_name("copy.db-wal").exists()
    file_db.register_agent("a", "t")
    file_db.backup(target, overwrite=True)

    with SwarmDB(target) as copy:
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


ERROR = CorruptDataError("agent_events", "metadata", {"id": 1}, "holds '{'")
SAME_ROW = CorruptDataError("agent_events", "timestamp", {"id": 1}, "holds 'soon'")
OTHER_ROW = CorruptDataError("agent_registry", "status", {"agent_id": "a"}, "holds NULL")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"integrity": ("row 1 missing from index",)}, "The file is damaged.*last backup.*REINDEX"),
        ({"undecodable": (ERROR, SAME_ROW)}, "^1 row can't be read.*swarmdb check --quarantine"),
        ({"undecodable": (ERROR, SAME_ROW, OTHER_ROW)}, "^2 rows can't be read"),
        ({"undecodable": (ERROR,), "quarantined": 3}, "^3 rows moved into tables whose names end in _quarantine"),
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


def test_a_missing_table_is_a_storage_error(db: SwarmDB) -> None:
    run(db, "DROP TABLE swarm_metrics")
    with pytest.raises(StorageError, match="swarm_metrics"):
        db.check()
    with pytest.raises(StorageError, match="swarm_metrics"):
        db.get_swarm_metrics()


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
