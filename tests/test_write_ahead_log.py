"""The log beside a file: how large it gets, and that it shrinks again."""

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from driver import counting
from moai_flow.memory import EventData, SwarmDB, connections
from moai_flow.memory.engine import LOG_LIMIT_MIB, locate, log_bytes
from reliability.injecting import injecting

CUT = "PRAGMA wal_checkpoint(TRUNCATE)"
LIMIT = LOG_LIMIT_MIB * 1024 * 1024
LARGE: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "t", "metadata": {"text": "x" * 10_000}}


def wal_bytes(db: SwarmDB) -> int:
    found = db.check().wal_bytes
    assert found is not None
    return found


@contextmanager
def reading(db: SwarmDB) -> Iterator[None]:
    """Keep a snapshot open in another thread, as a report may that takes long."""
    has_begun, is_over = threading.Event(), threading.Event()
    seen: list[int] = []

    def read() -> None:
        with db.session(readonly=True):
            for _ in range(2):
                seen.append(len(db.list_agents()))
                has_begun.set()
                is_over.wait()

    thread = threading.Thread(target=read)
    thread.start()
    has_begun.wait()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert seen[0] == seen[1]


def test_a_long_reader_stops_no_writer_and_the_log_shrinks_once_it_ends(path: Path) -> None:
    with SwarmDB(path, busy_timeout=0) as db:
        with reading(db):
            for number in range(10):
                db.insert_events([LARGE] * 300)
                db.register_agent(str(number), "t")
            grown = wal_bytes(db)
            assert grown > LIMIT * 3 / 2
        assert wal_bytes(db) == grown  # Reading shrinks nothing.
        for _ in range(2):  # The first moves all of it into the file, and the second begins it again.
            db.insert_event(LARGE)

        assert wal_bytes(db) <= LIMIT
        assert len(db.list_agents()) == 10
        assert sum(1 for _ in db.iter_events()) == 3002


def test_a_log_that_has_grown_is_cut_by_who_only_reads_too(path: Path) -> None:
    """Where reads always overlap, SQLite itself finds no moment in which to begin the log again."""
    with SwarmDB(path) as db, SwarmDB(path) as reader:
        with reading(db):
            while wal_bytes(db) <= 2 * LIMIT:
                db.insert_events([LARGE] * 300)
        for _ in range(300):
            reader.get_agent("a")

        assert wal_bytes(db) == 0
        with reading(db):
            while wal_bytes(db) <= 2 * LIMIT:
                db.insert_events([LARGE] * 300)
            for _ in range(300):
                reader.get_agent("a")  # What can't be cut now is no failure.
            assert wal_bytes(db) > 2 * LIMIT


def look(db: SwarmDB) -> None:
    """Read once, where it is time to look at the log."""
    db._connections._uses = connections._LOOK_AFTER - 1
    db.get_agent("a")


def test_a_log_that_cannot_be_cut_is_left_for_longer_and_longer(path: Path) -> None:
    with counting() as sent, SwarmDB(path) as db, reading(db):
        while wal_bytes(db) <= 2 * LIMIT:
            db.insert_events([LARGE] * 300)
        sent.clear()
        for number in range(1, 9):
            db._connections._may_cut_from = 0
            look(db)
            look(db)  # Too soon.
            assert sent.count(CUT) == number
        assert db._connections._cut_again_after == connections._CUT_AGAIN_AT_LAST


def test_what_fails_as_the_log_is_cut_harms_no_call_and_leaves_no_connection(path: Path) -> None:
    with injecting() as injector, SwarmDB(path) as db:
        with reading(db):
            while wal_bytes(db) <= 2 * LIMIT:
                db.insert_events([LARGE] * 300)
            db._connections._may_cut_from = 0
            injector.arm(0, None)
            look(db)
            at = 1 + injector.sent.index(CUT)
            db._connections._may_cut_from = 0
            injector.arm(at, sqlite3.OperationalError("disk I/O error"))
            look(db)
            assert injector.has_raised
            db._connections._may_cut_from = 0
            injector.arm(at, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt) as caught:
                look(db)
        assert set(filter(lambda held: held.is_open, db._connections._open)) == set(db._connections._idle)
        assert caught.value.__traceback__ is not None  # It has what it came up in.


def test_vacuum_keeps_no_writer_waiting_for_a_reader(path: Path) -> None:
    with SwarmDB(path, busy_timeout=30) as db, SwarmDB(path, busy_timeout=5) as writer:
        db.insert_events([LARGE] * 1000)
        full = db.size_bytes()
        with reading(db), ThreadPoolExecutor(1) as pool:
            db.cleanup_old_events(0)
            vacuum = pool.submit(db.vacuum)
            while not vacuum.done():
                writer.register_agent("a", "t")
            vacuum.result()
        db.register_agent("b", "t")

        assert db.size_bytes() < full / 5
        assert path.stat().st_size == db.size_bytes()


def test_the_log_of_a_file_that_is_alone_stays_small(path: Path) -> None:
    with SwarmDB(path) as db:
        assert wal_bytes(db) > 0
        for _ in range(20):
            db.insert_events([LARGE] * 100)
        assert wal_bytes(db) < LIMIT / 2


def test_the_log_is_found_beside_the_file_that_a_link_leads_to(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.db"
    link.symlink_to(path)
    with SwarmDB(link) as db:
        db.register_agent("a", "t")

        assert wal_bytes(db) == path.with_name("swarm.db-wal").stat().st_size > 0


def test_a_file_that_nobody_has_open_has_no_log(path: Path) -> None:
    SwarmDB(path).close()

    assert log_bytes(locate(path, None)) == 0


def test_what_has_no_file_has_no_log(db: SwarmDB) -> None:
    assert (db.check().wal_bytes is None) == (db._location.path is None)
