"""The command that copies a database into another one."""

import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from cli.running import Command, on_terminal
from moai_flow.memory import EventData, SwarmDB
from moai_flow.memory.cli import copying

COPY = [sys.executable, "-m", "moai_flow.memory", "copy"]
EVENT: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}
HELD = {"agent_events": 3, "agent_registry": 2, "session_memory": 2, "task_metrics": 1}


def with_password(url: str) -> str:
    """Return the same place with a password, which the server does not ask for."""
    return make_url(url).set(password="s3cret").render_as_string(hide_password=False)


def events_at(url: str) -> int:
    """Return how many events a server's database has; none before it has the table."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain) as connection, suppress(psycopg.errors.UndefinedTable):
        ((events,),) = connection.execute("SELECT count(*) FROM agent_events")
        return int(events)
    return 0


def test_a_file_is_copied_to_a_server_and_back(
    swarmdb: Command, store: Path, postgres_url: str, tmp_path: Path
) -> None:
    back = tmp_path / "folder" / "back.db"
    there = swarmdb("copy", store, with_password(postgres_url), "--json").json
    here = swarmdb("copy", postgres_url, back, "--json", "--batch-size", "2").json

    assert there == here
    assert {table["table"]: table["rows"] for table in there["tables"] if table["rows"]} == HELD
    assert all(table["copied"] == table["rows"] and not table["already_there"] for table in there["tables"])
    assert all(re.fullmatch(r"[0-9a-f]{64}", table["checksum"]) for table in there["tables"])
    for command in (["events"], ["agents"], ["memory", "list", "s-1"]):
        answers = [swarmdb(*command, "--db", db, "--json").json for db in (store, postgres_url, back)]
        assert answers[0] == answers[1] == answers[2] != []


def test_what_was_copied_is_shown_in_80_columns(swarmdb: Command, store: Path) -> None:
    ran = swarmdb("copy", store, "copy.db")

    assert (ran.status, ran.err) == (0, "")
    assert re.search(r"agent_events +3 +3 +[0-9a-f]{36}", ran.out)
    assert re.search(r"swarm_metrics +0 +0 +0{36}", ran.out)
    assert max(map(len, ran.out.splitlines())) <= 80


def test_a_target_with_rows_is_only_taken_to_go_on(swarmdb: Command, store: Path) -> None:
    assert swarmdb("copy", store, "copy.db").status == 0
    before = Path("copy.db").read_bytes()
    ran = swarmdb("copy", store, "copy.db")

    assert (ran.status, ran.out) == (1, "")
    assert "--continue" in ran.err
    assert ran.err.count("\n") == 1
    assert Path("copy.db").read_bytes() == before

    with SwarmDB(store) as db:
        db.insert_event(EVENT)
    tables = swarmdb("copy", store, "copy.db", "--continue", "--json").json["tables"]
    assert [(table["copied"], table["already_there"]) for table in tables[:2]] == [(1, 3), (0, 2)]


def test_what_was_gone_on_with_is_shown_with_how_many_rows_are_new(swarmdb: Command, store: Path) -> None:
    swarmdb("copy", store, "copy.db")
    with SwarmDB(store) as db:
        db.insert_event(EVENT)
    ran = swarmdb("copy", store, "copy.db", "--continue")

    assert re.search(r"table +rows +new +checksum", ran.out)
    assert re.search(r"agent_events +4 +1 +[0-9a-f]{36}", ran.out)
    assert re.search(r"agent_registry +2 +0 +[0-9a-f]{36}", ran.out)


def test_a_copy_that_does_not_hold_the_same_ends_with_1(swarmdb: Command, store: Path) -> None:
    assert swarmdb("copy", store, "copy.db").status == 0
    with closing(sqlite3.connect("copy.db")) as connection, connection:
        connection.execute("UPDATE agent_registry SET agent_type = 'other' WHERE agent_id = 'a-1'")
    ran = swarmdb("copy", store, "copy.db", "--continue")

    assert (ran.status, ran.out) == (1, "")
    assert "not hold the same as the source in agent_registry (source: 2 rows" in ran.err
    assert ran.err.count("\n") == 1


def test_a_row_that_can_not_be_read_ends_it(swarmdb: Command, store: Path) -> None:
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("UPDATE agent_events SET metadata = '{' WHERE id = 2")
    ran = swarmdb("copy", store, "copy.db")

    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("swarmdb: agent_events.metadata of the row with id=2")
    assert "swarmdb check --quarantine" in ran.err
    assert ran.err.count("\n") == 1
    assert swarmdb("check", "--quarantine", "--db", store).status == 1
    assert swarmdb("copy", store, "copy.db", "--continue").status == 0


@pytest.mark.parametrize("target", ["copy.db", "swarm.db", "sqlite:///swarm.db"])
def test_a_source_that_does_not_exist_is_not_made_nor_is_a_target(
    swarmdb: Command, tmp_path: Path, target: str
) -> None:
    ran = swarmdb("copy", "nowhere/swarm.db", target)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("swarmdb: no database at ")
    assert list(tmp_path.iterdir()) == []


def test_a_servers_database_that_is_not_ours_is_no_source(swarmdb: Command, postgres_url: str, tmp_path: Path) -> None:
    ran = swarmdb("copy", with_password(postgres_url), "copy.db")

    assert (ran.status, ran.out) == (1, "")
    assert "has none of SwarmDB's tables" in ran.err
    assert "s3cret" not in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["swarm.db", "./swarm.db", "link.db"])
def test_a_database_is_not_copied_into_itself(swarmdb: Command, store: Path, target: str) -> None:
    Path("link.db").symlink_to(store)
    for option in ([], ["--continue"]):
        ran = swarmdb("copy", store, target, *option)

        assert (ran.status, ran.out) == (1, "")
        assert "another database than the source" in ran.err


def test_a_password_is_never_shown(swarmdb: Command, store: Path, postgres_url: str) -> None:
    secret = with_password(postgres_url)
    nowhere = make_url(secret).set(database="nowhere").render_as_string(hide_password=False)
    for arguments in ([store, secret], [store, secret], [secret, secret], [store, nowhere], [nowhere, store]):
        ran = swarmdb("copy", *arguments)

        assert ran.out + ran.err
        assert "s3cret" not in ran.out + ran.err


@pytest.mark.parametrize("arguments", [[], ["swarm.db"], ["swarm.db", "copy.db", "--batch-size", "0"]], ids=" ".join)
def test_wrong_usage_ends_with_2(arguments: list[str], swarmdb: Command, store: Path, tmp_path: Path) -> None:
    ran = swarmdb("copy", *arguments)

    assert (ran.status, ran.out) == (2, "")
    assert "Usage: swarmdb copy" in ran.err
    assert [file.name for file in tmp_path.iterdir()] == ["swarm.db"]


def test_a_copy_that_was_killed_is_gone_on_with(
    swarmdb: Command, path: Path, postgres_url: str, tmp_path: Path
) -> None:
    with SwarmDB(path) as db:
        db.insert_events([EVENT] * 4000)
    with subprocess.Popen([*COPY, path, postgres_url, "--batch-size", "10"], cwd=tmp_path) as running:
        while events_at(postgres_url) == 0:
            assert running.poll() is None
            time.sleep(0.02)
        running.kill()
    assert running.returncode == -9

    report = swarmdb("copy", path, postgres_url, "--continue", "--json").json
    assert 0 < report["tables"][0]["already_there"] < 4000
    assert report["tables"][0]["rows"] == events_at(postgres_url) == 4000


def test_an_interrupt_says_how_to_go_on(swarmdb: Command, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(copying, "copy_database", interrupted)
    ran = swarmdb("copy", store, "copy.db")

    assert (ran.status, ran.out) == (130, "")
    assert ran.err == "swarmdb: interrupted; with --continue, the same command goes on from here\n"


def test_a_terminal_shows_progress_and_standard_output_only_the_answer(store: Path, tmp_path: Path) -> None:
    progress, answer = on_terminal([*COPY, str(store), "copy.db", "--batch-size", "2"], tmp_path)

    for words in (b"copy agent_events", b"verify task_metrics", b"3/3"):
        assert words in progress
        assert words not in answer
    assert b"5/3" not in progress  # As it would be if what is done were added to what was.
    assert answer.startswith(b"Copied and verified")
