"""Where the database is, and what happens when it can't be opened or written."""

import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import URL, Engine, NullPool, create_engine, event, make_url
from sqlalchemy.pool import Pool, QueuePool, SingletonThreadPool, StaticPool

from conftest import Clock
from moai_flow.memory import (
    BusyError,
    InvalidInputError,
    RetentionPolicy,
    SchemaError,
    StorageError,
    SwarmDB,
    TransactionError,
)
from moai_flow.memory.connections import is_open_here

EVENT = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}


def test_the_default_is_under_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with SwarmDB() as db:
        assert db.db_path == tmp_path / ".moai" / "memory" / "swarm.db"
        monkeypatch.chdir("/")
        db.register_agent("a", "t")
        assert db.get_agent("a") is not None


@pytest.mark.parametrize(("variable", "value"), [("MOAI_DB_PATH", "{0}/x.db"), ("SWARMDB_URL", "sqlite:///{0}/x.db")])
def test_the_environment_says_otherwise(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value.format(tmp_path))
    with SwarmDB() as db:
        assert db.db_path == tmp_path / "x.db"
    with SwarmDB(tmp_path / "y.db") as db:
        assert db.db_path == tmp_path / "y.db"


def test_the_url_in_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOAI_DB_PATH", str(tmp_path / "x.db"))
    monkeypatch.setenv("SWARMDB_URL", f"sqlite:///{tmp_path}/y.db")
    with SwarmDB() as db:
        assert db.db_path == tmp_path / "y.db"


def test_a_path_may_be_text_relative_or_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("deep/er/x.db", Path("deep/er/x.db"), "~/deep/er/x.db"):
        with SwarmDB(given) as db:
            assert db.db_path == tmp_path / "deep" / "er" / "x.db"
            assert repr(db) == f"SwarmDB({str(db.db_path)!r})"


def test_urls_reach_files_and_memory(tmp_path: Path) -> None:
    for url in (
        f"sqlite:///{tmp_path}/x.db",
        f"sqlite+pysqlite:///{tmp_path}/x.db",
        make_url(f"sqlite:///{tmp_path}/x.db"),
        f"sqlite:///file:{tmp_path}/x.db?mode=rwc&uri=true",
        f"sqlite:///file://{tmp_path}/x.db?mode=rwc",
        f"sqlite:///file://localhost{tmp_path}/x.db?uri=1",
    ):
        with SwarmDB(url=url) as db:
            db.register_agent("a", "t")
            assert db.db_path == tmp_path / "x.db"
    for url in ("sqlite://", "sqlite:///:memory:"):
        with SwarmDB(url=url) as db:
            assert db.list_agents() == []
            with pytest.raises(StorageError, match="in memory has no file"):
                db.db_path  # noqa: B018 (a property that raises)


def test_a_uri_may_have_letters_in_percent(tmp_path: Path) -> None:
    with SwarmDB(url=f"sqlite:///file:{tmp_path}/a%2520b.db?uri=true") as db:
        assert db.db_path == tmp_path / "a b.db"
        db.register_agent("a", "t")
    assert [path.name for path in tmp_path.iterdir()] == ["a b.db"]


def test_a_uri_leads_to_one_file_wherever_the_program_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # In a URL as text, SQLAlchemy takes one layer of percent signs off, and SQLite another.
    with SwarmDB(url="sqlite:///file:x%2523%253Fy%2525.db?uri=true") as db:
        assert db.db_path == tmp_path / "x#?y%.db"
        monkeypatch.chdir(elsewhere)
        with db.session(readonly=True), ThreadPoolExecutor(1) as pool:  # The other thread opens a connection.
            pool.submit(db.register_agent, "a", "t").result()
        assert [agent.agent_id for agent in db.list_agents()] == ["a"]
        assert stat.S_IMODE(db.db_path.stat().st_mode) == 0o600
    assert list(elsewhere.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "x#?y%.db"]


def test_two_slashes_at_the_beginning_of_a_path_are_one(tmp_path: Path) -> None:
    for url in (f"sqlite:///file:///{tmp_path}/x.db", f"sqlite:////{tmp_path}/x.db", f"sqlite:///file:{tmp_path}/x.db"):
        with SwarmDB(url=url) as db:
            db.register_agent("a", "t")
            assert db.db_path.samefile(tmp_path / "x.db")
        with SwarmDB(url=db._location.url) as again:  # As the command does.
            assert again.get_agent("a") is not None


def test_in_a_uri_and_for_an_engine_of_the_callers_home_is_a_name_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "~").mkdir()
    for number, place in enumerate(
        (
            {"url": "sqlite:///file:~/n.db"},
            {"engine": create_engine("sqlite:///file:~/n.db?uri=true", poolclass=NullPool)},
            {"engine": create_engine("sqlite:///~/n.db", poolclass=NullPool)},
        )
    ):
        with SwarmDB(**place) as db:  # type: ignore[arg-type]
            assert db.db_path == tmp_path / "~" / "n.db"
            assert len(db.list_agents()) == number
            db.register_agent(str(number), "t")
    with SwarmDB(engine=create_engine("sqlite:///file:n.db", poolclass=NullPool)) as db:  # Without uri=true.
        assert db.db_path == tmp_path / "file:n.db"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file:n.db", "~"]


@pytest.mark.skipif(sys.platform == "win32", reason="a current directory can't be removed there")
def test_where_the_current_directory_is_gone_a_relative_path_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    engine = create_engine("sqlite:///x.db", poolclass=NullPool)
    (tmp_path / "gone").rmdir()
    for place in ({"db_path": "x.db"}, {"url": "sqlite:///file:x.db"}, {"engine": engine}):
        with pytest.raises(StorageError, match=r"x\.db: the current directory can't be found"):
            SwarmDB(**place)
    with SwarmDB(tmp_path / "x.db") as db:
        assert db.list_agents() == []


def test_a_file_that_never_changes_is_read_and_not_made(path: Path) -> None:
    url = f"sqlite:///file:{path}?immutable=1"
    with pytest.raises(StorageError):
        SwarmDB(url=url)
    assert not path.exists()
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
    with SwarmDB(url=url) as db:
        assert db.get_agent("a") is not None
        with pytest.raises(StorageError, match="readonly"):
            db.register_agent("b", "t")


@pytest.mark.parametrize("name", ["fa%20ct.db", "file:x.db", "a#b.db"])
def test_a_file_that_is_open_is_known_by_its_path_and_by_a_uri(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    uri = URL.create("sqlite", database=f"file:{quote(str(path))}", query={"uri": "true"})
    for place in ({"db_path": path}, {"url": uri}, {"engine": create_engine(uri, poolclass=NullPool)}):
        with SwarmDB(**place) as db, db.transaction():
            assert is_open_here(path)
        assert not is_open_here(path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"db_path": ""}, "db_path"),
        ({"db_path": 7}, "db_path"),
        ({"db_path": b"x.db"}, "db_path"),
        ({"db_path": "x\0.db"}, "db_path"),
        ({"db_path": "~nosuchuser/x.db"}, "db_path"),
        ({"url": "sqlite:///x.db?mode=ro"}, "url: got 'sqlite:///x.db.mode=ro', expected .*uri=true"),
        ({"engine": "sqlite:///x.db"}, "engine: got 'sqlite:///x.db', expected an SQLAlchemy engine"),
        ({"url": "no url"}, "url"),
        ({"url": "mysql://localhost/x"}, "url.*mysql"),
        ({"url": "sqlite+aiosqlite:///x.db"}, "url"),
        ({"url": "sqlite:///file:x?mode=memory&uri=true"}, "url"),
        ({"url": "sqlite:///file:/x?vfs=memdb&uri=true"}, "url"),
        ({"url": "sqlite:///file::memory:?uri=true"}, "url: .*'sqlite://' for one in memory"),
        ({"url": "sqlite:///file:?uri=true"}, "url: .*and a path"),
        ({"url": "sqlite:///file:%00?uri=true"}, "url"),
        ({"url": "sqlite:///file:x#y.db?uri=true"}, "url: .*a path without '.' and '#'"),
        ({"url": URL.create("sqlite", database="file:x?mode=ro")}, "url: .*a path without"),
        ({"url": "sqlite:///file://elsewhere/x.db?uri=true"}, "url: .*and a path"),
        ({"url": "sqlite:///file://localhost?uri=true"}, "url: .*and a path"),
        ({"url": "sqlite:///file:x?cache=shared&uri=true"}, "url: .*no parameters but mode=ro, rw or rwc, immutable"),
        ({"url": "sqlite:///file:x?nolock=1"}, "url: .*no parameters but"),
        ({"url": "sqlite:///file:x?timeout=5"}, "url: .*no parameters but"),
        ({"url": "sqlite:///file:x?mode=ro&mode=rw"}, "url: .*no parameters but"),
        ({"url": "sqlite:///file:x?uri=false"}, "url: .*no parameters but"),
        ({"db_path": "x.db", "url": "sqlite://"}, "url: got 'sqlite://', expected nothing, since db_path says"),
        ({"db_path": "x.db", "durability": "some"}, "durability: got 'some', expected one of 'normal', 'full'"),
        ({"db_path": "x.db", "busy_timeout": -1}, "busy_timeout"),
        ({"db_path": "x.db", "busy_timeout": float("nan")}, "busy_timeout"),
        ({"db_path": "x.db", "busy_timeout": 1e9}, "busy_timeout"),
        ({"db_path": "x.db", "busy_timeout": 2_147_483.5}, "busy_timeout: .*seconds from 0 to 2147483"),
        ({"db_path": "x.db", "page_cache_mib": 0}, "page_cache_mib"),
        ({"db_path": "x.db", "page_cache_mib": 0.5}, "page_cache_mib"),
        ({"db_path": "x.db", "page_cache_mib": 2_097_152}, "page_cache_mib"),
        # The server takes 0 for no limit at all.
        ({"db_path": "x.db", "statement_timeout": 0}, r"statement_timeout: .*seconds from 0\.001 to 2147483"),
        ({"db_path": "x.db", "statement_timeout": 0.0009}, "statement_timeout"),
        ({"db_path": "x.db", "statement_timeout": 2_147_483.5}, "statement_timeout"),
        ({"db_path": "x.db", "statement_timeout": "1"}, "statement_timeout: got '1'"),
        ({"db_path": "x.db", "pool_size": 0}, "pool_size: got 0, expected a whole number from 1"),
        ({"db_path": "x.db", "pool_size": 1.5}, "pool_size"),
        ({"db_path": "x.db", "retention": timedelta(days=1)}, "retention: .*a RetentionPolicy"),
    ],
)
def test_what_names_no_database_is_refused_and_makes_nothing(
    arguments: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=named):
        SwarmDB(**arguments)

    assert list(tmp_path.iterdir()) == []


def test_a_password_is_not_shown() -> None:
    with pytest.raises(InvalidInputError) as caught:
        SwarmDB(url="mysql://user:secret@localhost/x")

    assert "secret" not in str(caught.value)
    assert "secret" not in str(caught.value.value)
    with pytest.raises(InvalidInputError, match="since db_path says") as caught:
        SwarmDB("x.db", url="postgresql://user:secret@localhost/x")

    assert "secret" not in str(caught.value)
    assert "secret" not in str(caught.value.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"db_path.*not of a folder"):
        SwarmDB(tmp_path)


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"xxx: .*File name too long"):
        SwarmDB(tmp_path / ("x" * 300))


def test_a_file_where_a_folder_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/x\.db: its folder can't be made"):
        SwarmDB(tmp_path / "file" / "x.db")


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"\xff" * 2000])
def test_a_file_that_is_no_database_is_left_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"swarm\.db: file is not a database"):
        SwarmDB(path)

    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_version_that_can_not_be_read_is_not_taken_for_none(path: Path) -> None:
    SwarmDB(path).close()
    with closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'schema_info'").fetchone()
    content = path.read_bytes()
    path.write_bytes(content[: (root - 1) * 4096] + b"\x55" * 4096 + content[root * 4096 :])
    before = path.read_bytes()
    with pytest.raises(StorageError, match="malformed"):
        SwarmDB(path)

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]  # No copy, as of a file that is to be migrated.


def test_an_empty_file_becomes_a_database(path: Path) -> None:
    path.touch()
    with SwarmDB(path) as db:
        assert db.schema_version == "2.1.0"


@pytest.mark.parametrize("version", ["2.1.1", "3.0.0", "10.0.0", "2.0.0-beta", "banana", ""])
def test_a_newer_or_unknown_version_is_refused_unwritten(path: Path, version: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE schema_info (key TEXT PRIMARY KEY, value TEXT NOT NULL, updated_at TEXT)")
        connection.execute("INSERT INTO schema_info VALUES ('version', ?, 'x')", (version,))
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(SchemaError, match=rf"swarm\.db: its schema version is '?{version}"):
        SwarmDB(path)

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "version",
    [
        *("CAST(x'ff' AS TEXT)", "x'ff'", "2.1", "''", "'1.0.'", "'1.0.0' || char(10)", "'1.0.0.0'"),
        *("'0.0.1111111111'", "'1.0.' || printf('%.300c', '1')", "'0.0.' || printf('%.5000c', '1')"),
        "'\N{ARABIC-INDIC DIGIT ONE}.0.0'",
    ],
)
def test_a_version_that_is_no_three_short_numbers_is_refused_unwritten(path: Path, version: str) -> None:
    SwarmDB(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE schema_info SET value = {version} WHERE key = 'version'")
    before = path.read_bytes()
    with pytest.raises(SchemaError, match=r"its schema version is .*none of SwarmDB's") as caught:
        SwarmDB(path)

    assert len(str(caught.value)) < len(str(path)) + 200
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("present", [datetime.min, datetime.max, datetime(2025, 11, 30, 10)])  # noqa: DTZ001, DTZ901
@pytest.mark.parametrize("zone", [None, timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))])
def test_a_clock_from_which_no_age_can_be_counted_is_named(
    url: str, clock: Clock, present: datetime, zone: tzinfo | None
) -> None:
    policy = RetentionPolicy(agents=timedelta.max)
    with SwarmDB(url=url, clock=clock, retention=policy) as db:
        clock.now = present.replace(tzinfo=zone)
        if zone is not None and present.year == 2025:
            db.register_agent("a", "t")
            return
        for call in (
            lambda: db.register_agent("a", "t"),
            lambda: db.store_memory("s", "semantic", "k", 1, ttl_hours=1),
            lambda: db.cleanup(days=1),
            lambda: db.mark_stale_agents(timedelta(days=1)),
            lambda: db.insert_events([{"event_type": "spawn", "agent_id": "a", "agent_type": "t"}]),
        ):
            with pytest.raises(InvalidInputError, match=r"clock: got .*years 2 to 9998"):
                call()
        assert (db.list_agents(), db.get_events(), db.list_memories("s")) == ([], [], [])
    if not db._location.is_in_memory:
        with pytest.raises(InvalidInputError, match="clock"):
            SwarmDB(url=url, clock=clock, retention=RetentionPolicy.keep_all())


@pytest.mark.parametrize(
    ("table", "missing"),
    [
        ("task_metrics (task_id TEXT, cost REAL)", "task_metrics has no column agent_id, duration_ms"),
        ("schema_info (key TEXT, value TEXT)", "schema_info has no column updated_at, so it is not SwarmDB's"),
        ("Schema_Info (key TEXT, value TEXT)", "schema_info has no column updated_at, so it is not SwarmDB's"),
    ],
)
def test_tables_of_these_names_that_are_anothers_are_refused_unwritten(path: Path, table: str, missing: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE {table}")
    before = path.read_bytes()
    with pytest.raises(SchemaError, match=missing):
        SwarmDB(path)

    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.bak"))


@pytest.mark.parametrize("name", ["agent_registry", "Agent_Registry", "schema_info"])
def test_a_view_of_such_a_name_is_refused_unwritten(path: Path, name: str) -> None:
    SwarmDB(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE schema_info SET value = '1.0.0' WHERE key = 'version'")
        connection.execute(f"ALTER TABLE {name} RENAME TO moved")
        connection.execute(f"CREATE VIEW {name} AS SELECT * FROM moved")
    before = path.read_bytes()
    with pytest.raises(SchemaError, match=f"its {name.lower()} is a view, so it is not SwarmDB's"):
        SwarmDB(path)

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_other_tables_in_the_file_are_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE other (x)")
        connection.execute("INSERT INTO other VALUES (1)")
        connection.commit()
    with SwarmDB(path) as db:
        assert db.schema_version == "2.1.0"
        with db.transaction() as conn:
            assert [tuple(row) for row in conn.execute("SELECT * FROM other")] == [(1,)]


def test_opening_an_up_to_date_file_takes_no_write_lock_and_writes_nothing(path: Path) -> None:
    SwarmDB(path).close()
    before = path.read_bytes()
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with SwarmDB(path, busy_timeout=0) as db:
            assert db.list_agents() == []
            with pytest.raises(BusyError, match="another user held the database"):
                db.register_agent("a", "t")
        holder.execute("ROLLBACK")

    assert path.read_bytes() == before


def test_a_fresh_file_that_another_program_keeps_locked_is_waited_for(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BusyError, match="locked"):
            SwarmDB(path, busy_timeout=0.05)
        holder.execute("ROLLBACK")
        holder.execute("CREATE TABLE x (y)")
        holder.execute("BEGIN")
        holder.execute("SELECT * FROM x").fetchall()  # A reader is enough to keep a file from changing its journal.
        with pytest.raises(BusyError, match="another program keeps the file locked"):
            SwarmDB(path, busy_timeout=0.05)


def test_an_opening_that_fails_leaves_the_file_closed_while_its_error_is_kept(path: Path) -> None:
    with SwarmDB(path) as db:
        assert is_open_here(path)
        with db.transaction(), pytest.raises(BusyError) as kept:
            SwarmDB(path, busy_timeout=0, retention=RetentionPolicy.keep_all())
    assert not is_open_here(path)
    assert kept.traceback


@pytest.mark.parametrize("statement", ["SELECT * FROM x", "INSERT INTO x VALUES (1)"])
def test_a_program_that_leaves_in_time_is_waited_for(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE x (y)")
        other.execute("BEGIN")
        other.execute(statement).fetchall()
        leaving = threading.Timer(0.2, other.execute, ["COMMIT"])
        leaving.start()
        SwarmDB(path, busy_timeout=20).close()
        leaving.join()


def test_files_are_in_wal_mode_and_durability_is_set(path: Path) -> None:
    for durability, synchronous in (("normal", 1), ("full", 2)):
        with SwarmDB(path, durability=durability) as db:  # type: ignore[arg-type]
            conn = db._get_connection()
            assert conn.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
            assert conn.execute("PRAGMA synchronous").fetchone()[0] == synchronous
            assert conn.execute("PRAGMA foreign_keys").fetchone()[0] == 1
            assert conn.execute("PRAGMA busy_timeout").fetchone()[0] == 30_000
            assert conn.execute("PRAGMA cache_size").fetchone()[0] == -16 * 1024
            assert conn.execute("PRAGMA journal_size_limit").fetchone()[0] == 16 * 1024 * 1024


def test_the_page_cache_is_as_large_as_asked(path: Path) -> None:
    with SwarmDB(path, page_cache_mib=3) as db:
        assert db._get_connection().execute("PRAGMA cache_size").fetchone()[0] == -3 * 1024


def test_the_largest_settings_are_those_that_sqlite_counts(path: Path) -> None:
    with SwarmDB(path, busy_timeout=2_147_483, page_cache_mib=2_097_151) as db:
        assert db._get_connection().execute("PRAGMA busy_timeout").fetchone()[0] == 2_147_483_000
        assert db._get_connection().execute("PRAGMA cache_size").fetchone()[0] == -2_097_151 * 1024


def test_a_file_whose_journal_was_changed_is_in_wal_mode_again(path: Path) -> None:
    SwarmDB(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    with SwarmDB(path) as db:
        assert db._get_connection().execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_read_only_database_is_read_and_refuses_writes(path: Path) -> None:
    with SwarmDB(path) as db:
        db.register_agent("a", "t")
    before = path.read_bytes()
    with SwarmDB(url=f"sqlite:///file:{path}?mode=ro&uri=true") as db:
        assert db.get_agent("a") is not None
        for call in (
            lambda: db.register_agent("b", "t"),
            db.vacuum,
            lambda: db.insert_events([EVENT]),  # type: ignore[list-item]
        ):
            with pytest.raises(StorageError, match="readonly"):
                call()

    assert path.read_bytes() == before


def test_a_read_only_file_of_an_older_program_is_left_as_it_is(legacy: Path) -> None:
    before = legacy.read_bytes()
    with pytest.raises(StorageError, match="readonly"):
        SwarmDB(url=f"sqlite:///file:{legacy}?mode=ro&uri=true")

    assert legacy.read_bytes() == before


def test_a_file_without_permission_is_named(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read and write everything")
    SwarmDB(path).close()
    path.chmod(0o000)
    with pytest.raises(StorageError, match=r"swarm\.db: unable to open database file"):
        SwarmDB(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system needs to be root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_nothing_is_half_written(small_disk: Path) -> None:
    with SwarmDB(small_disk / "x.db") as db:
        db.register_agent("a", "t")
        before = db.list_agents()
        with pytest.raises(StorageError, match="full"):
            db.insert_events({**EVENT, "metadata": {"text": "x" * 1000}} for _ in range(1000))  # type: ignore[misc]
        with pytest.raises(StorageError, match="full"), db.transaction():
            db.register_agent("b", "t")
            for _ in range(1000):
                db.store_memory("s", "semantic", "k", "x" * 1000)

        assert db.list_agents() == before
        assert db.get_events() == []
        assert db.list_memories("s") == []
        assert db.check().ok
        db.register_agent("c", "t")


def test_no_room_is_named_and_nothing_is_half_written(path: Path) -> None:
    """The same without being root: a limit on the file's pages is SQLite's own full disk."""
    SwarmDB(path).close()
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def limit(raw: Any, record: object) -> None:
        raw.execute("PRAGMA max_page_count = 60")

    with SwarmDB(engine=engine) as db:
        db.register_agent("a", "t")
        with pytest.raises(StorageError, match="full"):
            db.insert_events({**EVENT, "metadata": {"text": "x" * 1000}} for _ in range(1000))  # type: ignore[misc]
        with pytest.raises(StorageError, match="full"), db.transaction():
            db.register_agent("b", "t")
            while True:
                db.store_memory("s", "semantic", "k", "x" * 10_000)
        with pytest.raises(StorageError, match="full"):
            db.store_memory("s", "semantic", "k", "x" * 1_000_000)

        assert [agent.agent_id for agent in db.list_agents()] == ["a"]
        assert db.get_events() == []
        assert db.list_memories("s") == []
        assert db.check().ok
        db.register_agent("c", "t")
    engine.dispose()


def test_a_file_size_limit_is_an_error_like_any_other(path: Path) -> None:
    program = """
import resource, signal, sys
from moai_flow.memory import StorageError, SwarmDB
db = SwarmDB(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    db.store_memory("s", "semantic", "k", "x" * 1_000_000)
except StorageError as error:
    print(error)
assert db.list_memories("s") == []
db.register_agent("a", "t")
"""
    assert resource.RLIMIT_FSIZE is not None
    ran = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)

    assert ran.stdout
    with SwarmDB(path) as db:
        assert db.check().ok
        assert len(db.list_agents()) == 1


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    """An engine of the caller's own."""
    made = create_engine(f"sqlite:///{path}", poolclass=QueuePool, pool_size=3, max_overflow=0, pool_timeout=5)
    yield made
    made.dispose()


def test_a_callers_engine_is_used_and_neither_changed_nor_disposed(engine: Engine, path: Path) -> None:
    with SwarmDB(engine=engine) as db:
        assert db.db_path == path
        db.register_agent("a", "t")
        with db.transaction() as conn:
            conn.execute("UPDATE agent_registry SET agent_type = 'u'")
        with engine.begin() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 0
            raw: Any = connection.connection.driver_connection
            assert (raw.isolation_level, raw.row_factory) == ("", None)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT agent_type FROM agent_registry").scalar() == "u"
        raw = connection.connection.driver_connection
        assert (raw.isolation_level, raw.row_factory) == ("", None)
    assert engine.pool.status().endswith("Current Checked out connections: 0")


def test_a_callers_engine_serves_several_threads(engine: Engine) -> None:
    with SwarmDB(engine=engine) as db:
        threads = [threading.Thread(target=db.register_agent, args=(str(number), "t")) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(db.list_agents()) == 12


def test_a_callers_engine_gets_nothing_back_that_a_dead_thread_left(engine: Engine) -> None:
    def leave_open() -> None:
        db._get_connection().execute("INSERT INTO schema_info (key, value) VALUES ('k', 'v')")

    with SwarmDB(engine=engine) as db:
        for _ in range(5):
            thread = threading.Thread(target=leave_open)
            thread.start()
            thread.join()
            with engine.connect() as connection:
                raw: Any = connection.connection.driver_connection
                assert (raw.isolation_level, raw.row_factory, raw.in_transaction) == ("", None, False)


def test_a_connection_of_a_callers_engine_that_is_given_up_is_no_complaint(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with SwarmDB(engine=engine) as db:
        with pytest.raises(TransactionError), db.transaction() as conn:
            conn.close()  # type: ignore[attr-defined]
        db.register_agent("a", "t")
    assert caplog.records == []


def test_an_engine_whose_statements_fail_is_a_storage_error(engine: Engine) -> None:
    engine.connect().close()

    @event.listens_for(engine, "checkout")
    def interrupt(raw: Any, record: object, proxy: object) -> None:
        raw.set_progress_handler(lambda: 1, 1)

    with pytest.raises(StorageError, match="interrupted"):
        SwarmDB(engine=engine)


@pytest.mark.parametrize("pool", [StaticPool, SingletonThreadPool, QueuePool])
def test_engines_without_a_file_or_a_connection_for_each_user_are_refused(path: Path, pool: type[Pool]) -> None:
    for url in ("sqlite://", f"sqlite:///{path}") if pool is not QueuePool else ("sqlite://",):
        engine = create_engine(url, poolclass=pool)
        with pytest.raises(InvalidInputError, match=r"engine.*':memory:'"):
            SwarmDB(engine=engine)
        engine.dispose()


def test_a_pool_of_one_is_enough_and_free_for_its_owner(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with SwarmDB(engine=engine) as db:
        db.register_agent("a", "t")
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM agent_registry").scalar() == 1
        with db.transaction():
            db.register_agent("b", "t")
    engine.dispose()


def test_a_connection_of_a_pool_of_one_that_was_closed_makes_room_for_its_successor(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with SwarmDB(engine=engine) as db:
        raw: Any = db._get_connection()
        raw.close()
        assert db._get_connection().execute("SELECT 1").fetchone()[0] == 1
    engine.dispose()


def test_a_fork_closes_what_is_in_a_callers_pool_and_each_side_opens_its_own(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}", poolclass=QueuePool)
    with SwarmDB(engine=engine) as db:
        with db.transaction() as parents:
            db.register_agent("a", "t")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # From 3.12 on, forking beside threads warns.
            child = os.fork()
        if child == 0:
            with suppress(sqlite3.ProgrammingError):  # It is closed.
                parents.execute("SELECT 1")
                os._exit(1)
            db.register_agent("b", "t")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert {agent.agent_id for agent in db.list_agents()} == {"a", "b"}
    engine.dispose()


def test_engines_of_other_databases_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"engine.*for SQLite, or for PostgreSQL"):
        SwarmDB(engine=create_engine("postgresql+pg8000://localhost/x", module=sqlite3))


def test_what_the_driver_takes_of_a_url_is_the_engines_own_affair(path: Path) -> None:
    for url in (f"sqlite:///{path}?timeout=5", f"sqlite:///file:{path}?timeout=5&uri=true"):
        engine = create_engine(url, poolclass=NullPool)
        with SwarmDB(engine=engine) as db:
            assert db._get_connection().execute("PRAGMA busy_timeout").fetchone()[0] == 5000
            assert db.db_path == path
    with pytest.raises(InvalidInputError, match="no parameters but"):
        SwarmDB(engine=create_engine(f"sqlite:///file:{path}?cache=shared&uri=true", poolclass=NullPool))


def test_the_same_file_by_two_objects_is_one_database(path: Path) -> None:
    with SwarmDB(path) as one, SwarmDB(path) as other:
        one.register_agent("a", "t")
        assert other.get_agent("a") == one.get_agent("a")
