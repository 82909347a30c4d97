"""What can't be done ends with one line on stderr and status 1, what makes no sense with status 2."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cli.running import Command
from moai_flow.memory import SwarmDB
from moai_flow.memory.cli import app

READING = [
    ["status"],
    ["agents"],
    ["events"],
    ["events", "--follow"],
    ["metrics"],
    ["top"],
    ["memory", "list", "s"],
    ["memory", "get", "s", "semantic", "k"],
    ["memory", "delete", "s", "semantic", "k"],
    ["cleanup"],
    ["vacuum"],
    ["backup", "copy.db"],
    ["check"],
    ["export", "agent_events"],
]
SET = ["memory", "set", "s", "semantic", "k"]


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_no_command_makes_a_database_that_it_does_not_find(
    command: list[str], swarmdb: Command, tmp_path: Path
) -> None:
    for option in (["--db", "folder/nowhere.db"], []):
        ran = swarmdb(*command, *option)

        assert (ran.status, ran.out) == (1, "")
        assert ran.err.startswith("swarmdb: no database at ")
        assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def text_file(path: Path) -> None:
    path.write_text("This is no database, and long enough for SQLite to see that it is none.\n" * 20)


def empty_file(path: Path) -> None:
    path.touch()


def another_programs_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE cookies (name TEXT)")


def newer_version(path: Path) -> None:
    SwarmDB(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE schema_info SET value = '3.0.0' WHERE key = 'version'")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (text_file, "file is not a database"),
        (empty_file, "no database at"),
        (another_programs_database, "no database at"),
        (newer_version, "its schema version is 3.0.0"),
        (Path.mkdir, "not of a folder"),
    ],
)
@pytest.mark.parametrize("command", [["status"], ["check"], ["cleanup"]], ids=" ".join)
def test_a_file_that_is_no_database_of_ours_stays_as_it_is(
    make: Callable[[Path], None], said: str, command: list[str], swarmdb: Command, path: Path
) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    ran = swarmdb(*command, "--db", path)

    assert (ran.status, ran.out) == (1, "")
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["agents", "nobody"], "no agent is registered as 'nobody'"),
        (["agents", ""], "agent_id: got ''"),
        (["events", "--since", "yesterday"], "since: got 'yesterday'"),
        (["events", "--until", "2025-13-01"], "until: got '2025-13-01'"),
        (["events", "--limit", "-1"], "limit: got -1"),
        (["events", "--follow", "--limit", "-1"], "limit: got -1"),
        (["events", "--follow", "--since", "yesterday"], "since: got 'yesterday'"),
        (["metrics", "--since", "yesterday"], "since: got 'yesterday'"),
        (["metrics", "--since", "2025-12-01", "--until", "2025-11-01"], "until: got '2025-11-01'"),
        (["metrics", "--last", "1h", "--until", "2025-11-01"], "until: got '2025-11-01'"),
        (["metrics", "--agent", "nobody"], "no agent 'nobody': it has no metrics"),
        (["metrics", "--agent", ""], "no agent '': it has no metrics"),
        (["cleanup", "--days", "-1"], "days: got -1"),
        (["backup", "."], "path: got '.'"),
        (["backup", "swarm.db"], "not the database itself"),
        (["memory", "get", "s-1", "semantic", "nothing"], "has the key 'nothing'"),
        ([*SET, "hello"], "VALUE: got 'hello', expected JSON"),
        ([*SET, "NaN"], "value: got nan"),
        ([*SET, '"\\u0000"'], "value: got"),
        ([*SET, "1", "--ttl-hours", "0"], "ttl_hours: got 0"),
    ],
    ids=str,
)
def test_what_can_not_be_done_is_said_in_one_line(command: list[str], said: str, swarmdb: Command, store: Path) -> None:
    ran = swarmdb(*command, "--db", store)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("swarmdb: ")
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_what_a_file_has_sqlite_say_does_not_move_the_cursor(swarmdb: Command, store: Path) -> None:
    message = "no\x1b[2J\n\u202e"
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute(
            f"CREATE TRIGGER t BEFORE INSERT ON session_memory BEGIN SELECT RAISE(ABORT, '{message}'); END"
        )
    ran = swarmdb(*SET, "1", "--db", store)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err.endswith(": no\\x1b[2J \\u202e\n")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (":memory:", "expected a database that is there"),
        ("", "the path of a file"),
        ("x" * 300, "name too long"),
        ("postgresql://user:secret@127.0.0.1:1/swarm", "Connection refused"),
        ("mysql://user:secret@host/swarm", "SQLAlchemy URL"),
        ("/dev/null/swarm.db", "/dev/null"),
        ("line\nbreak.db", "no database at"),
    ],
)
def test_a_place_where_no_database_can_be(place: str, said: str, swarmdb: Command) -> None:
    for command in (["status"], ["demo"]) if said != "no database at" else (["status"],):
        ran = swarmdb(*command, "--db", place)

        assert (ran.status, ran.out) == (1, "")
        assert said in ran.err
        assert "secret" not in ran.err
        assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ["nothing"],
        ["--nothing"],
        ["status", "extra"],
        ["events", "--type", "erorr"],
        ["events", "--limit", "many"],
        ["agents", "--status", "runing"],
        ["memory", "list"],
        ["memory", "list", "s-1", "--type", "semantics"],
        ["memory", "get", "s-1", "semantics", "language"],
        ["memory", "set", "s-1", "semantics", "language", "1"],
        ["demo", "--processes", "0"],
        ["demo", "--threads", "1000"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(command: list[str], swarmdb: Command, store: Path, tmp_path: Path) -> None:
    known = [*command, "--db", store] if len(command) > 1 else command
    ran = swarmdb(*known)

    assert (ran.status, ran.out) == (2, "")
    assert "Usage: swarmdb" in ran.err
    assert {file.name for file in tmp_path.iterdir()} <= {"swarm.db"}


@pytest.mark.parametrize("command", [[*SET, "1"], ["cleanup"], ["vacuum"]], ids=" ".join)
def test_a_database_that_another_program_keeps_locked(
    command: list[str], swarmdb: Command, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BUSY_TIMEOUT", 0.05)
    with closing(sqlite3.connect(store)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        ran = swarmdb(*command, "--db", store)

        assert (ran.status, ran.out) == (1, "")
        assert "locked" in ran.err
        assert ran.err.count("\n") == 1
        assert swarmdb("status", "--db", store).status == 0


@pytest.mark.parametrize(
    "command",
    [["status"], ["check"], [*SET, "1"], ["migrate"], ["copy", "swarm.db", "other.db"]],
    ids=" ".join,
)
def test_how_long_others_are_waited_for_is_the_same_for_every_command(
    command: list[str], swarmdb: Command, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOAI_DB_PATH", str(store))
    monkeypatch.setattr(app, "BUSY_TIMEOUT", -1.0)  # Whoever is given it says so.
    ran = swarmdb(*command)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("swarmdb: busy_timeout: got -1.0, ")


def test_a_row_that_can_not_be_read_is_named(swarmdb: Command, store: Path) -> None:
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("UPDATE agent_events SET metadata = '{' WHERE id = 2")
    ran = swarmdb("events", "--db", store)

    assert ran.status == 1
    assert ran.err.startswith("swarmdb: agent_events.metadata of the row with id=2")
    assert swarmdb("status", "--db", store).status == 0


def test_a_damaged_file_is_said_to_be_damaged(swarmdb: Command, store: Path) -> None:
    with closing(sqlite3.connect(store)) as connection:
        ((page,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'agent_events'")
        ((size,),) = connection.execute("PRAGMA page_size")
    content = bytearray(store.read_bytes())
    content[(page - 1) * size : page * size] = b"\xff" * size
    store.write_bytes(content)

    for command in ("events", "vacuum"):
        ran = swarmdb(command, "--db", store)

        assert (ran.status, ran.out) == (1, "")
        assert "malformed" in ran.err
        assert ran.err.count("\n") == 1
    checked = swarmdb("check", "--db", store)
    assert (checked.status, checked.err) == (1, "")
    assert "take the last backup that checks well" in " ".join(checked.out.split())


def test_a_command_that_reads_by_itself_says_so_as_well(swarmdb: Command, store: Path) -> None:
    with closing(sqlite3.connect(store)) as connection:
        pages = connection.execute("SELECT rootpage FROM sqlite_master WHERE tbl_name = 'agent_events'").fetchall()
        ((size,),) = connection.execute("PRAGMA page_size")
    content = bytearray(store.read_bytes())
    for (page,) in pages:
        content[(page - 1) * size : page * size] = b"\xff" * size
    store.write_bytes(content)
    ran = swarmdb("status", "--db", store)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err == f"swarmdb: {store}: database disk image is malformed\n"


@pytest.mark.parametrize("keep", [2000, 5000, 30_000])
def test_check_says_what_to_do_about_a_file_that_is_too_damaged_to_open(
    swarmdb: Command, store: Path, keep: int
) -> None:
    store.write_bytes(store.read_bytes()[:keep] if keep > 2000 else b"garbage " * keep)
    ran = swarmdb("check", "--db", store)

    assert (ran.status, ran.out) == (1, "")
    assert "take the last backup that checks well" in ran.err
    assert ran.err.count("\n") == 1
