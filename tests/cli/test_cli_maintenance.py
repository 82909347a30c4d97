"""Commands that look after a database."""

import json
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cli.running import Command
from moai_flow.memory import RetentionPolicy, SwarmDB
from moai_flow.memory.migrations import VERSION
from postgres import Server


def execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def damage(path: Path) -> None:
    """Leave what can't be read, what is outside the enums, and what another program wrote."""
    execute(
        path,
        "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp, metadata)"
        " VALUES ('e', 'decision', 'a', 't', '2025-11-04T12:00:00', '{')",
    )
    execute(
        path,
        "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time) VALUES (x'00ff', 't', 'lost', 'once')",
    )


def removed(answer: Any) -> dict[str, int]:
    return {table["table"]: table["rows"] for table in answer["tables"] if table["rows"]}


def test_cleanup_removes_what_is_old(swarmdb: Command, store: Path) -> None:
    with SwarmDB(store) as db:
        db.insert_event({"event_type": "spawn", "agent_id": "a-2", "agent_type": "expert-frontend"})
        before = db.size_bytes()

    tried = swarmdb("cleanup", "--days", "1", "--dry-run", "--db", store, "--json").json
    assert tried["dry_run"]
    assert removed(tried)["agent_events"] == 3
    out = swarmdb("cleanup", "--days", "1", "--dry-run", "--db", store).out
    assert out.startswith("Would be removed")
    assert len(swarmdb("events", "--db", store, "--json").json) == 4

    everything = swarmdb("cleanup", "--days", "0", "--dry-run", "--db", store, "--json").json
    assert removed(everything)["agent_events"] == 4

    done = swarmdb("cleanup", "--days", "1", "--db", store, "--json").json
    assert done == {**done, "dry_run": False}
    assert removed(done) == removed(tried)
    assert swarmdb("cleanup", "--days", "1", "--db", store).out.startswith("Removed")
    assert removed(swarmdb("cleanup", "--db", store, "--json").json) == {}
    assert len(swarmdb("events", "--db", store, "--json").json) == 1
    with SwarmDB(store) as db:
        assert db.size_bytes() == before


def test_cleanup_keeps_what_the_database_keeps_unless_told_otherwise(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"})
        db.insert_event({"event_type": "error", "agent_id": "a", "agent_type": "t", "timestamp": "2001-01-01"})

    assert removed(swarmdb("cleanup", "--db", path, "--json").json) == {"agent_events": 1}
    SwarmDB(path, retention=RetentionPolicy.keep_all()).close()
    failed = swarmdb("cleanup", "--db", path)
    assert failed.status == 1
    assert failed.err == (
        "swarmdb: days: got None, expected a number of days, or a policy, since this database keeps all\n"
    )


@pytest.mark.parametrize(
    ("policy", "shown", "as_json"),
    [
        (
            RetentionPolicy(events=timedelta(days=90), memory=None),
            "retention       events: 90 days; memory: for ever; task metrics: 30 days; ",
            {
                "events": 90.0,
                "memory": None,
                "task_metrics": 30.0,
                "agent_metrics": 30.0,
                "swarm_metrics": 30.0,
                "agents": None,
            },
        ),
        (
            RetentionPolicy(events=timedelta(hours=36), memory=timedelta(0)),
            "retention       events: 1.5 days; memory: 0 days; task metrics: 30 days; ",
            {
                "events": 1.5,
                "memory": 0.0,
                "task_metrics": 30.0,
                "agent_metrics": 30.0,
                "swarm_metrics": 30.0,
                "agents": None,
            },
        ),
        (
            RetentionPolicy.keep_all(),
            "retention       off: nothing is removed by itself\n",
            "off: nothing is removed by itself",
        ),
    ],
)
def test_status_says_what_is_removed_by_itself(
    swarmdb: Command, path: Path, policy: RetentionPolicy, shown: str, as_json: Any
) -> None:
    SwarmDB(path, retention=policy).close()

    assert shown in swarmdb("status", "--db", path).out
    status = swarmdb("status", "--db", path, "--json").json
    assert (status["retention"], status["last_cleanup"]) == (as_json, None)


def test_status_says_that_the_retention_is_of_no_use(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db, db.transaction() as raw:
        raw.execute("UPDATE schema_info SET value = 'soon' WHERE key = 'retention'")

    assert "holds 'soon', which is no policy" in swarmdb("status", "--db", path).out


def test_vacuum_gives_space_back(swarmdb: Command, store: Path) -> None:
    with SwarmDB(store) as db:
        db.store_memory("s-1", "semantic", "long", "x" * 500_000)
        db.delete_memory("s-1", "semantic", "long")
        before = db.size_bytes()
    assert swarmdb("vacuum", "--db", store).out.startswith(f"{before:,} bytes before, ")

    with SwarmDB(store) as db:
        assert db.size_bytes() < before / 2


def test_a_backup_is_a_whole_database(swarmdb: Command, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copies" / "copy.db"

    assert swarmdb("backup", copy, "--db", store).out == f"{copy}\n"
    assert len(swarmdb("events", "--db", copy, "--json").json) == 3


def test_a_backup_replaces_a_file_only_if_asked_to(swarmdb: Command, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    copy.write_text("precious")

    refused = swarmdb("backup", copy, "--db", store)
    assert (refused.status, refused.out) == (1, "")
    assert refused.err == f"swarmdb: {copy} exists; --overwrite replaces it\n"
    assert copy.read_text() == "precious"

    ran = swarmdb("backup", copy, "--overwrite", "--db", store, "--json")
    assert ran.json == {"path": str(copy), "size_bytes": copy.stat().st_size}


def test_a_servers_database_is_not_backed_up_whatever_the_path(
    swarmdb: Command, tmp_path: Path, postgres_url: str
) -> None:
    SwarmDB(url=postgres_url).close()
    (tmp_path / "there.db").write_text("precious")
    for name in ("there.db", "new.db"):
        ran = swarmdb("backup", name, "--db", postgres_url)

        assert (ran.status, ran.out) == (1, "")
        assert ran.err.endswith("a server's database is copied by pg_dump\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.db", "precious")]


def test_check_of_a_sound_database(swarmdb: Command, store: Path) -> None:
    report = swarmdb("check", "--db", store, "--json").json

    assert report["ok"] is True
    assert (report["integrity"], report["undecodable"], report["quarantined"]) == ([], [], 0)
    assert report["wal_bytes"] >= 0
    assert swarmdb("check", "--db", store).status == 0


def test_check_names_what_is_wrong_and_ends_with_1(swarmdb: Command, store: Path) -> None:
    damage(store)
    ran = swarmdb("check", "--db", store)

    assert (ran.status, ran.err) == (1, "")
    for word in ("agent_events", "metadata", "spawn_time", "decision", "00ff"):
        assert word in ran.out
    assert "What to do" in ran.out
    assert "swarmdb check --quarantine" in " ".join(ran.out.split())
    assert max(map(len, ran.out.splitlines())) <= 80
    advice = json.loads(swarmdb("check", "--db", store, "--json").out)["advice"]
    assert advice[0].startswith("2 rows can't be read")


def test_check_moves_what_is_wrong_aside_if_asked_to(swarmdb: Command, store: Path) -> None:
    damage(store)
    ran = swarmdb("check", "--quarantine", "--db", store, "--json")
    report = json.loads(ran.out)

    assert ran.status == 1
    assert report["ok"] is False
    assert report["quarantined"] == 2
    assert [(fault["column"], fault["row"]) for fault in report["undecodable"]] == [
        ("metadata", {"id": 4}),
        ("agent_id", {"agent_id": "00ff"}),
        ("spawn_time", {"agent_id": "00ff"}),
    ]
    assert report["unlisted"] == [
        {"table": "agent_events", "column": "event_type", "value": "decision", "rows": 1},
        {"table": "agent_registry", "column": "status", "value": "lost", "rows": 1},
    ]

    after = swarmdb("check", "--db", store, "--json").json
    assert after["ok"] is True


def test_check_prints_the_first_of_many_alike_and_how_many_more_there_are(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_events({"event_type": "spawn", "agent_id": "a", "agent_type": "t"} for _ in range(1234))
        db.register_agent("other", "t")
    execute(path, "UPDATE agent_events SET metadata = '{', event_type = 'word ' || (id % 15)")
    execute(path, "UPDATE agent_events SET timestamp = 'soon' WHERE id <= 10")
    execute(path, "UPDATE agent_registry SET metadata = '['")
    ran = swarmdb("check", "--db", path)

    lines = [line.split() for line in ran.out.splitlines()]
    assert sum(line[:2] == ["agent_events", "metadata"] for line in lines) == 5 + 1
    # The last one says that they are not in this program's format, either.
    assert sum(line[:2] == ["agent_events", "timestamp"] for line in lines) == 5 + 1 + 1
    assert sum(line[:2] == ["agent_registry", "metadata"] for line in lines) == 1
    assert sum(line[:2] == ["agent_events", "event_type"] for line in lines) == 5 + 1
    assert len(lines) < 120
    text = " ".join(ran.out.split())
    assert "1,229 more" in text
    assert "10 more" in text
    assert "1,235 rows can't be read" in text
    found = json.loads(swarmdb("check", "--db", path, "--json").out)
    assert len(found["undecodable"]) == 1234 + 10 + 1
    assert len(found["unlisted"]) == 15


def test_check_prints_as_many_as_it_has_room_for_and_no_word_of_more(swarmdb: Command, path: Path) -> None:
    with SwarmDB(path) as db:
        db.insert_events({"event_type": "spawn", "agent_id": "a", "agent_type": "t"} for _ in range(5))
    execute(path, "UPDATE agent_events SET metadata = '{'")
    lines = [line.split() for line in swarmdb("check", "--db", path).out.splitlines()]

    assert sum(line[:2] == ["agent_events", "metadata"] for line in lines) == 5
    assert not any("more:" in line for line in lines)


def test_check_says_which_rows_it_could_not_move_and_why(swarmdb: Command, store: Path) -> None:
    damage(store)
    execute(store, "CREATE TABLE notes (event INTEGER REFERENCES agent_events(id) ON DELETE CASCADE)")
    execute(store, "INSERT INTO notes VALUES (4)")
    ran = swarmdb("check", "--quarantine", "--db", store)

    assert (ran.status, ran.err) == (1, "")
    assert "Rows that could not be moved" in ran.out
    assert "a row of notes refers to it" in ran.out
    kept = json.loads(swarmdb("check", "--quarantine", "--db", store, "--json").out)["kept"]
    assert kept == [{"table": "agent_events", "reason": "a row of notes refers to it", "rows": 1}]


def test_check_tells_of_a_table_that_is_lost(swarmdb: Command, store: Path) -> None:
    execute(store, "DROP TABLE swarm_metrics")
    ran = swarmdb("check", "--db", store)

    assert (ran.status, ran.err) == (1, "")
    assert "Tables that can't be used" in ran.out
    assert " swarm_metrics " in ran.out
    (fault,) = json.loads(swarmdb("check", "--db", store, "--json").out)["tables"]
    assert fault["table"] == "swarm_metrics"


def test_check_tells_whether_sqlite_has_a_known_bug(
    swarmdb: Command, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ((3, 40, 1), (3, 52, 0)):
        monkeypatch.setattr(sqlite3, "sqlite_version_info", version)

        assert ("walresetbug" in swarmdb("check", "--db", store).out) == (version < (3, 52))


def test_migrate_tells_what_is_due_and_does_it(swarmdb: Command, postgres_url: str) -> None:
    ran = swarmdb("migrate", "--check", "--db", postgres_url)
    assert (ran.status, ran.out) == (1, "")
    assert f"no schema yet, and {VERSION} is due" in ran.err

    assert swarmdb("migrate", "--db", postgres_url).status == 0
    assert swarmdb("migrate", "--check", "--db", postgres_url).status == 0


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.0.0", f"has schema 2.0.0, and {VERSION} is due: run swarmdb migrate"),
        ("3.0.0", f"its schema version is 3.0.0, and this package knows {VERSION} at most; upgrade moai-flow-memory"),
        ("soon", "its schema version is 'soon', which is none of SwarmDB's"),
    ],
)
def test_migrate_tells_another_version_and_whether_it_can_do_something_about_it(
    swarmdb: Command, shared_url: str, version: str, said: str
) -> None:
    with SwarmDB(url=shared_url) as db:
        with db.transaction() as raw:
            raw.execute(f"UPDATE schema_info SET value = '{version}' WHERE key = 'version'")
        ran = swarmdb("migrate", "--check", "--db", shared_url)

        assert (ran.status, ran.out) == (1, "")
        assert said in ran.err
        assert ran.err.count("\n") == 1
        assert db.schema_version == version


def test_the_sql_of_migrate_makes_what_opening_makes(swarmdb: Command, postgres_server: Server) -> None:
    by_hand, by_opening = (postgres_server.create_database() for _ in range(2))
    ran = swarmdb("migrate", "--sql", "--db", by_hand)
    with psycopg.connect(by_hand.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(ran.out.encode())
    assert swarmdb("migrate", "--check", "--db", by_hand).status == 0
    SwarmDB(url=by_opening).close()
    seen = []
    for url in (by_hand, by_opening):
        with psycopg.connect(url.replace("+psycopg", "")) as connection:
            columns = (
                "SELECT table_name, column_name, data_type, is_nullable, column_default, collation_name, is_identity "
                "FROM information_schema.columns WHERE table_schema = 'public' ORDER BY table_name, ordinal_position"
            )
            indexes = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname"
            marks = "SELECT key, value FROM schema_info ORDER BY key"
            seen.append([connection.execute(query).fetchall() for query in (columns, indexes, marks)])
        postgres_server.drop_database(url)
    assert seen[0] == seen[1]


def test_migrate_on_a_file(swarmdb: Command, tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    assert swarmdb("migrate", "--check", "--db", str(path)).status == 1
    assert not path.exists()
    assert swarmdb("migrate", "--db", str(path)).status == 0
    assert swarmdb("migrate", "--check", "--db", str(path)).out == f"{path} has schema {VERSION}, as this program has\n"
    ran = swarmdb("migrate", "--sql", "--db", str(path))
    assert (ran.status, ran.out) == (1, "")
    assert "a PostgreSQL URL" in ran.err
