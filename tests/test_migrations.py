"""Files of older programs."""

import math
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, event

from moai_flow.memory import (
    AgentStatus,
    BusyError,
    CorruptDataError,
    EventType,
    MemoryType,
    SchemaError,
    StorageError,
    SwarmDB,
)
from moai_flow.memory.models import TABLES, Record, SchemaInfo, SessionMemory, columns
from postgres import in_memory
from test_schema import SPECIFIED

FOREIGN = ("semantic_knowledge", "code_patterns")
MEMORY = tuple(column.name for column in columns(SessionMemory) if column.name != "id")
METRICS = ("task_metrics", "agent_metrics", "swarm_metrics")


def everything(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def rows(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def run(path: Path, sql: str, *values: Any) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(sql, values)
        connection.commit()


@pytest.fixture(params=["UTC", "Asia/Seoul", "America/St_Johns", "Pacific/Apia"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Wherever the file is opened."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def old(path: Path) -> Path:
    """An empty file of version 2.0.0."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SPECIFIED)
        connection.execute("INSERT INTO schema_info (key, value) VALUES ('version', '2.0.0')")
        connection.commit()
    return path


def add_event(path: Path, agent_id: str, timestamp: str, created_at: str = "2025-11-30 12:00:00") -> None:
    run(
        path,
        "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp, created_at) "
        "VALUES (?, 'spawn', ?, 't', ?, ?)",
        agent_id,
        agent_id,
        timestamp,
        created_at,
    )


def test_the_originals_file_comes_back_typed_wherever_it_is_opened(legacy: Path, zone: str) -> None:
    with SwarmDB(legacy) as db:
        events = list(db.iter_events())
        agents = db.list_agents()
        (memory,) = db.list_memories("session123")

    assert [event.event_type for event in events] == [EventType.SPAWN, EventType.COMPLETE] * 2
    assert [event.timestamp for event in events] == [
        datetime(2025, 11, 29, 10, 11, 29, 953194, tzinfo=UTC),
        datetime(2025, 11, 29, 10, 11, 30, 59204, tzinfo=UTC),
        datetime(2025, 11, 29, 10, 12, 37, 210974, tzinfo=UTC),
        datetime(2025, 11, 29, 10, 12, 37, 316444, tzinfo=UTC),
    ]
    for timestamp, created_at in [
        (memory.timestamp, memory.created_at),
        *((e.timestamp, e.created_at) for e in events),
    ]:
        assert abs(timestamp - created_at) < timedelta(seconds=1)
    assert events[0].metadata_ == {"prompt": "Design REST API", "model": "claude-sonnet-4"}
    assert [agent.duration_ms for agent in agents] == [1500, 100]
    for agent in agents:
        assert agent.status is AgentStatus.COMPLETE
        assert agent.completed_at is not None
        assert abs(agent.last_updated - agent.completed_at) < timedelta(seconds=1)
    assert memory.memory_type is MemoryType.CONTEXT_HINT
    assert (memory.key, memory.value) == ("user_preference", {"language": "python", "style": "functional"})


def test_no_row_and_no_foreign_table_is_lost(legacy: Path) -> None:
    tables = ("agent_events", "agent_registry", "session_memory", *FOREIGN)
    counts = [rows(legacy, f"SELECT count(*) FROM {table}") for table in tables]
    foreign = [line for line in everything(legacy) if any(table in line for table in FOREIGN)]
    SwarmDB(legacy).close()

    assert [rows(legacy, f"SELECT count(*) FROM {table}") for table in tables] == counts
    assert [line for line in everything(legacy) if any(table in line for table in FOREIGN)] == foreign


def test_a_copy_of_the_file_as_it_was_stands_beside_it(legacy: Path) -> None:
    before = everything(legacy)
    SwarmDB(legacy).close()

    assert everything(legacy.with_name("legacy.db.2.0.0.bak")) == before
    assert [path.name for path in legacy.parent.glob("*.bak*")] == ["legacy.db.2.0.0.bak"]


def test_a_second_opening_changes_nothing(legacy: Path) -> None:
    SwarmDB(legacy).close()
    before = legacy.read_bytes()
    SwarmDB(legacy).close()

    assert legacy.read_bytes() == before


def test_what_is_left_is_readable_by_raw_sql(legacy: Path) -> None:
    SwarmDB(legacy).close()

    assert rows(legacy, "SELECT timestamp, created_at FROM agent_events WHERE id = 1") == [
        ("2025-11-29T10:11:29.953194+00:00", "2025-11-29T10:11:29.000000+00:00")
    ]
    assert rows(legacy, "SELECT value FROM schema_info WHERE key = 'version'") == [("2.1.0",)]


def test_an_adopted_file_is_marked_so_that_nothing_is_removed_unasked(legacy: Path, path: Path) -> None:
    SwarmDB(legacy).close()
    SwarmDB(path).close()
    mark = "SELECT value FROM schema_info WHERE key = 'retention'"

    assert rows(legacy, mark) == [("off",)]
    assert rows(path, mark) == [("default",)]


def test_an_original_client_may_go_on_writing(legacy: Path, zone: str) -> None:
    SwarmDB(legacy).close()
    # It opens the file and writes its version, a row whose zone shows, and one whose zone does not.
    run(legacy, "UPDATE schema_info SET value = '2.0.0' WHERE key = 'version'")
    add_event(legacy, "later", "2025-12-01T19:00:00.5", "2025-12-01 10:00:01")
    run(legacy, "UPDATE agent_registry SET status = 'running', last_updated = '2025-12-01T19:00:02.000001'")
    with SwarmDB(legacy) as db:
        (later,) = db.get_events("later")
        assert later.timestamp == datetime(2025, 12, 1, 10, 0, 0, 500_000, tzinfo=UTC)
        assert {agent.last_updated for agent in db.list_agents()} == {datetime(2025, 12, 1, 10, 0, 2, 1, tzinfo=UTC)}
        assert db.schema_version == "2.1.0"
        assert len(list(db.iter_events())) == 5
        assert db.check().foreign_times == ()

    assert rows(legacy, "SELECT value FROM schema_info WHERE key = 'retention'") == [("off",)]
    assert len(list(legacy.parent.glob("*.bak*"))) == 1
    assert "2025-11-29T19:11:29.953194" in "".join(everything(legacy.with_name("legacy.db.2.0.0.bak")))


def test_rows_that_an_original_client_adds_read_as_local_time_until_then(
    file_db: SwarmDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Seoul")
    time.tzset()
    try:
        add_event(file_db.db_path, "a", "2025-12-01T19:00:00.5", "2025-12-01 10:00:01")
        (event,) = file_db.get_events()
        (named,) = [time for time in file_db.check().foreign_times if time.column == "timestamp"]
    finally:
        monkeypatch.undo()
        time.tzset()

    assert event.timestamp == datetime(2025, 12, 1, 10, 0, 0, 500_000, tzinfo=UTC)
    assert (named.table, named.rows) == ("agent_events", 1)


def test_reading_on_passes_rows_of_an_original_client_that_are_out_of_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Seoul")
    time.tzset()
    try:
        with SwarmDB(path) as db:
            for agent_id, hour in (("0", 0), ("5", 5), ("12", 12)):
                moment = datetime(2025, 11, 30, hour, tzinfo=UTC)
                db.insert_event({"event_type": "spawn", "agent_id": agent_id, "agent_type": "t", "timestamp": moment})
            add_event(path, "original", "2025-11-30T10:00:00")  # 01:00 in UTC, between the others by its text.
            oldest_first = [event.agent_id for event in db.iter_events(batch_size=1)]
            page = db.get_events(limit=1)
            newest_first = [event.agent_id for event in page]
            while page := db.get_events(limit=1, before=page[-1]):
                newest_first += [event.agent_id for event in page]
    finally:
        monkeypatch.undo()
        time.tzset()

    assert oldest_first == ["0", "5", "original", "12"]
    assert newest_first == oldest_first[::-1]


def test_a_file_that_this_version_made_and_an_original_client_opened_keeps_its_mark(file_db: SwarmDB) -> None:
    file_db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"})
    before = file_db.get_events()
    run(file_db.db_path, "UPDATE schema_info SET value = '2.0.0' WHERE key = 'version'")
    with SwarmDB(file_db.db_path) as db:
        assert db.get_events() == before

    assert rows(file_db.db_path, "SELECT value FROM schema_info WHERE key = 'retention'") == [("default",)]


def test_a_file_of_1_0_0_gets_its_metrics_tables(old: Path) -> None:
    for table in METRICS:
        run(old, f"DROP TABLE {table}")
    run(old, "UPDATE schema_info SET value = '1.0.0'")
    add_event(old, "a", "2025-11-29T19:11:29.953194", "2025-11-29 10:11:29")
    with SwarmDB(old) as db:
        db.store_task_metric("t", "a", 1, "success")
        assert len(db.get_events()) == len(db.get_task_metrics()) == 1

    assert old.with_name("swarm.db.1.0.0.bak").exists()


def test_a_file_that_says_no_version_is_adopted(old: Path) -> None:
    run(old, "DELETE FROM schema_info")
    add_event(old, "a", "2025-11-29T19:11:29.953194", "2025-11-29 10:11:29")
    with SwarmDB(old) as db:
        assert db.schema_version == "2.1.0"
        assert len(db.get_events()) == 1

    assert old.with_name("swarm.db.unversioned.bak").exists()


def test_the_zone_is_found_row_by_row_through_daylight_saving(old: Path, zone: str) -> None:
    # Berlin: UTC+1 in winter, UTC+2 in summer.
    add_event(old, "winter", "2025-01-15T11:00:00", "2025-01-15 10:00:00")
    add_event(old, "summer", "2025-07-15T12:00:00", "2025-07-15 10:00:03")
    # Imported later: nothing beside them says the zone, but the row nearest in time does.
    add_event(old, "winter too", "2025-02-01T11:00:00", "2025-08-20 21:34:11")
    add_event(old, "summer too", "2025-06-15T12:00:00")
    with SwarmDB(old) as db:
        found = {event.agent_id: event.timestamp for event in db.iter_events() if event.agent_id.startswith("winter")}
    with closing(sqlite3.connect(old)) as connection:
        stored = dict(connection.execute("SELECT agent_id, timestamp FROM agent_events").fetchall())

    assert set(stored.values()) == {
        "2025-01-15T10:00:00.000000+00:00",
        "2025-07-15T10:00:00.000000+00:00",
        "2025-02-01T10:00:00.000000+00:00",
        "2025-06-15T10:00:00.000000+00:00",
    }
    assert {timestamp.hour for timestamp in found.values()} == {10}


def test_an_hour_that_comes_twice_is_told_apart_by_its_row(old: Path) -> None:
    add_event(old, "first", "2025-10-26T02:30:00", "2025-10-26 00:30:00")
    add_event(old, "again", "2025-10-26T02:30:00", "2025-10-26 01:30:00")
    with SwarmDB(old) as db:
        assert [(event.agent_id, event.timestamp.hour) for event in db.iter_events()] == [("first", 0), ("again", 1)]


def test_quarter_hour_zones_and_the_ends_of_the_world_are_found(old: Path) -> None:
    for name, local in {
        "Kathmandu": "2025-01-15T15:45:00",
        "Baker Island": "2025-01-14T22:00:00",
        "Kiritimati": "2025-01-16T00:00:00",
        "London": "2025-01-15T10:00:00",
    }.items():
        add_event(old, name, local, "2025-01-15 10:00:00")
    with SwarmDB(old) as db:
        assert {event.timestamp for event in db.iter_events()} == {datetime(2025, 1, 15, 10, tzinfo=UTC)}


def test_where_no_row_tells_the_zone_it_is_the_processs(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_event(old, "far", "2025-01-15T19:00:00", "2025-09-01 00:00:00")  # No zone is that far away.
    add_event(old, "between", "2025-01-15T19:00:00", "2025-01-15 10:07:00")  # None is 8:53 ahead.
    add_event(old, "unsaid", "2025-01-15T19:00:00", "not a time")
    add_event(old, "local", "2025-01-15T19:00:00", "2025-01-15T10:00:00")  # Local itself: it says nothing.
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        SwarmDB(old).close()
    finally:
        monkeypatch.undo()
        time.tzset()

    assert rows(old, "SELECT DISTINCT timestamp FROM agent_events") == [("2025-01-15T10:00:00.000000+00:00",)]


def test_every_format_of_an_older_file_becomes_one(old: Path) -> None:
    add_event(old, "a", "2025-11-29 10:00:00")
    add_event(old, "b", "2025-11-29T10:00:00Z")
    add_event(old, "c", "2025-11-29T12:00:00.25+02:00")
    add_event(old, "d", "2025-11-29T10:00:00.000000+00:00")
    add_event(old, "e", "2025-11-29")
    for number, timestamp in enumerate(("2025-11-29 10:00:00.5", "2025-11-29T10:00:00+00:00", "2025-11-29 10:00:00")):
        run(
            old,
            "INSERT INTO swarm_metrics (swarm_id, metric_type, value, timestamp) VALUES ('s', 'health', ?, ?)",
            number,
            timestamp,
        )
    SwarmDB(old).close()

    assert [text for (text,) in rows(old, "SELECT timestamp FROM agent_events ORDER BY agent_id")] == [
        "2025-11-29T10:00:00.000000+00:00",
        "2025-11-29T10:00:00.000000+00:00",
        "2025-11-29T10:00:00.250000+00:00",
        "2025-11-29T10:00:00.000000+00:00",
        "2025-11-29T00:00:00.000000+00:00",
    ]
    assert [text for (text,) in rows(old, "SELECT timestamp FROM swarm_metrics ORDER BY value")] == [
        "2025-11-29 10:00:00.500000",
        "2025-11-29 10:00:00",
        "2025-11-29 10:00:00",
    ]


def test_task_metrics_that_meet_in_the_same_instant_are_both_kept(old: Path) -> None:
    for timestamp in ("2025-11-29 10:00:00", "2025-11-29T10:00:00Z", "2025-11-29T12:00:00+02:00"):
        run(
            old,
            "INSERT INTO task_metrics (task_id, agent_id, result, timestamp) VALUES ('t','a','success',?)",
            timestamp,
        )
    with SwarmDB(old) as db:
        assert [metric.timestamp.microsecond for metric in db.get_task_metrics("t")] == [2, 1, 0]


def test_what_is_no_time_is_left_for_check_to_name(old: Path) -> None:
    add_event(old, "a", "yesterday")
    add_event(old, "b", "0001-01-01T00:00:00+14:00")
    run(old, "UPDATE agent_events SET created_at = CAST(x'ff' AS TEXT) WHERE id = 1")
    with SwarmDB(old) as db:
        assert {(fault.column, fault.row["id"]) for fault in db.check().undecodable if fault.column == "timestamp"} == {
            ("timestamp", 1),
            ("timestamp", 2),
        }

    assert rows(old, "SELECT timestamp FROM agent_events ORDER BY id") == [
        ("yesterday",),
        ("0001-01-01T00:00:00+14:00",),
    ]


def test_what_stands_beside_a_time_but_tells_no_zone_is_passed_over(old: Path, zone: str) -> None:
    add_event(old, "local too", "2025-11-29T19:00:00", "2025-11-29T19:00:00")
    add_event(old, "tells the zone", "2025-11-29T19:11:29.953194", "2025-11-29 10:11:29")
    agent = "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time, last_updated) "
    agent += "VALUES (?, 't', 'running', ?, '2025-11-29T19:00:00')"
    for number, spawned in enumerate((1e300, 1e12, -1e300, 3e11, "soon", b"x")):  # No datetime holds any of these.
        run(old, agent, f"a{number}", spawned)
    SwarmDB(old).close()

    moment = "2025-11-29T10:00:00.000000+00:00"
    assert rows(old, "SELECT timestamp FROM agent_events WHERE agent_id = 'local too'") == [(moment,)], zone
    assert rows(old, "SELECT DISTINCT last_updated FROM agent_registry") == [(moment,)]


#: A value as raw SQL may have left it in any column: what SQL makes of it, and it.
ODD = st.one_of(
    st.sampled_from(
        [
            "2025-11-30 10:00:00",
            "2025-11-30T19:00:00",
            "2025-11-30T10:00:00.5+14:00",
            "9999-12-31 23:59:59.999999",
            "9999-12-31T23:59:59.999999Z",
            "0001-01-01T00:00:00",
            "2025-02-30 10:00:00",
            "2025-11-30T24:00:00",
            "{",
            b"x",
            None,
            1764496800.0,
            1764496800,
            1764496800000,
            1e300,
            math.inf,
            -math.inf,
            2**63 - 1,
            -(2**63),
        ]
    ).map(lambda value: ("?", value)),
    st.one_of(st.text(max_size=4), st.binary(max_size=4), st.floats(), st.integers(-(2**63), 2**63 - 1)).map(
        lambda value: ("?", value)
    ),
    st.binary(max_size=4).map(lambda value: ("CAST(? AS TEXT)", value)),  # Text that need not be UTF-8.
)


@given(
    version=st.sampled_from(["1.0.0", "2.0.0"]),
    model=st.sampled_from([model for model in TABLES if model is not SchemaInfo]),
    is_typed=st.booleans(),
    given_rows=st.lists(st.lists(ODD, min_size=8, max_size=8), min_size=1, max_size=3),
)
@settings(max_examples=30, deadline=None)
def test_a_file_opens_whatever_it_holds_and_no_row_is_lost(
    version: str, model: type[Record], *, is_typed: bool, given_rows: list[list[tuple[str, Any]]]
) -> None:
    table = str(model.__tablename__)
    number = "metric_id" if table in ("agent_metrics", "swarm_metrics") else "id"
    names = [column.name for column in columns(model) if column.name != number]
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path = Path(folder, "swarm.db")
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(SPECIFIED)
            for metrics in METRICS if version == "1.0.0" else ():
                connection.execute(f"DROP TABLE {metrics}")
            connection.execute("INSERT INTO schema_info (key, value) VALUES ('version', ?)", (version,))
            if not is_typed or (version == "1.0.0" and table in METRICS):
                # As a program may have made it that is less particular: any column holds anything.
                connection.execute(f"DROP TABLE IF EXISTS {table}")
                numbered = number in {column.name for column in columns(model)}
                first = [f"{number} INTEGER PRIMARY KEY"] if numbered else []
                connection.execute(f"CREATE TABLE {table} ({', '.join(first + names)})")
            for row in given_rows:
                places = ", ".join(place for place, _ in row[: len(names)])
                with suppress(sqlite3.IntegrityError):  # The column's own constraints refuse it.
                    connection.execute(
                        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({places})",
                        [value for _, value in row[: len(names)]],
                    )
            (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
            connection.commit()

        with SwarmDB(path) as db:
            assert rows(path, f"SELECT count(*) FROM {table}") == [(count,)]
            for call in (db.list_agents, db.get_events, db.get_task_metrics, db.summarize_tasks):
                with suppress(CorruptDataError):
                    call()
            moved = db.check(quarantine=True).quarantined
            assert db.check().undecodable == ()
        assert rows(path, f"SELECT count(*) FROM {table}") == [(count - moved,)]
        if moved:
            assert rows(path, f"SELECT count(*) FROM {table}_quarantine") == [(moved,)]


def test_memories_that_have_no_key_can_be_moved_away(old: Path) -> None:
    run(old, "DROP TABLE session_memory")
    run(old, f"CREATE TABLE session_memory (id INTEGER PRIMARY KEY, {', '.join(MEMORY)})")
    run(old, f"INSERT INTO session_memory ({', '.join(MEMORY)}) VALUES (NULL, NULL, NULL, '1', 'soon', NULL, NULL)")
    with SwarmDB(old) as db:
        assert db.check(quarantine=True).quarantined == 1
        assert db.check().undecodable == ()


def test_a_metric_for_which_the_last_moment_is_taken_stays_as_it_is(old: Path) -> None:
    insert = "INSERT INTO task_metrics (task_id, agent_id, result, timestamp) VALUES ('t', 'a', 'success', ?)"
    last = ("9999-12-31 23:59:59.999999", "9999-12-31T23:59:59.999999Z")
    for timestamp in last:
        run(old, insert, timestamp)
    SwarmDB(old).close()

    assert rows(old, "SELECT timestamp FROM task_metrics ORDER BY timestamp") == [(timestamp,) for timestamp in last]


def test_a_local_time_that_would_be_before_the_year_1_in_utc_stays(old: Path) -> None:
    add_event(old, "first", "0001-01-01T00:00:00", "0001-01-01 00:00:00")
    add_event(old, "tells the zone", "2025-11-29T19:11:29.953194", "2025-11-29 10:11:29")
    run(old, "UPDATE agent_events SET created_at = '2025-11-30T10:00:00' WHERE agent_id = 'first'")  # No reference.
    SwarmDB(old).close()

    assert rows(old, "SELECT timestamp FROM agent_events ORDER BY id") == [
        ("0001-01-01T00:00:00",),
        ("2025-11-29T10:11:29.953194+00:00",),
    ]


def test_rows_with_numbers_below_1_are_brought_up_to_date_too(old: Path) -> None:
    for number in (-(2**62), -1, 0, 1):
        add_event(old, str(number), "2025-11-29T19:11:29.953194", "2025-11-29 10:11:29")
        run(old, "UPDATE agent_events SET id = ? WHERE agent_id = ?", number, str(number))
    SwarmDB(old).close()

    assert rows(old, "SELECT DISTINCT timestamp FROM agent_events") == [("2025-11-29T10:11:29.953194+00:00",)]


def test_a_file_of_many_rows_is_brought_up_to_date_in_chunks(old: Path) -> None:
    with closing(sqlite3.connect(old)) as connection:
        connection.executemany(
            "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp, created_at) "
            "VALUES (?, 'spawn', 'a', 't', ?, '2025-11-29 10:11:29')",
            [(f"e-{number}", f"2025-11-29T19:11:29.{number:06}") for number in range(25_000)],
        )
        connection.commit()
    with SwarmDB(old) as db:
        assert sum(1 for _ in db.iter_events()) == 25_000
        assert db.check().foreign_times == ()

    assert rows(old, "SELECT min(timestamp), max(timestamp) FROM agent_events") == [
        ("2025-11-29T10:11:29.000000+00:00", "2025-11-29T10:11:29.024999+00:00")
    ]


@pytest.mark.parametrize("table", ["agent_events", "schema_info"])
def test_a_migration_that_fails_leaves_the_file_as_it_was(old: Path, table: str) -> None:
    for metrics in METRICS:
        run(old, f"DROP TABLE {metrics}")
    add_event(old, "a", "2025-11-29T19:11:29.953194", "2025-11-29 10:11:29")
    # Whatever makes a write fail, such as a trigger of the file's own.
    run(old, f"CREATE TRIGGER t BEFORE UPDATE ON {table} BEGIN SELECT RAISE(ABORT, 'no'); END")
    before = everything(old)
    with pytest.raises(sqlite3.IntegrityError, match="no"):
        SwarmDB(old)

    assert everything(old) == before


def test_a_migration_that_is_killed_is_done_by_the_next_opening(legacy: Path) -> None:
    program = """
import os, signal, sys
from moai_flow.memory import migrations, SwarmDB
normalise = migrations._normalise_times
def normalise_and_die(held, where):
    normalise(held, where)
    os.kill(os.getpid(), signal.SIGKILL)
migrations._normalise_times = normalise_and_die
SwarmDB(sys.argv[1])
"""
    killed = subprocess.run([sys.executable, "-c", program, legacy], check=False)
    assert killed.returncode == -9
    assert rows(legacy, "SELECT value FROM schema_info") == [("2.0.0",)]
    with SwarmDB(legacy) as db:
        assert len(db.get_events()) == 4
        assert db.check().ok


@pytest.mark.parametrize("length", [240, 246])
def test_a_copy_that_cannot_be_written_stops_the_migration(length: int, old: Path) -> None:
    # A name almost as long as a file may have leaves no room for the unfinished copy's, or for the copy's itself.
    old = old.rename(old.with_name("x" * length))
    before = everything(old)
    with pytest.raises(StorageError, match=r"\.2\.0\.0\.bak that comes before the migration failed"):
        SwarmDB(old)

    assert everything(old) == before
    assert not list(old.parent.glob("*.bak*"))


def test_an_earlier_copy_stays_and_what_takes_its_place_but_is_none_stops_the_migration(old: Path) -> None:
    copy = old.with_name("swarm.db.2.0.0.bak")
    copy.symlink_to(old.with_name("nowhere"))
    before = everything(old)
    with pytest.raises(StorageError, match="that comes before the migration failed"):
        SwarmDB(old)
    assert everything(old) == before
    copy.unlink()
    log = copy.with_name(f"{copy.name}-wal")
    log.write_bytes(b"of an earlier copy")  # SQLite would play it into this one.
    with pytest.raises(StorageError, match=r"2\.0\.0\.bak: the file was emptied or removed, but its log is there"):
        SwarmDB(old)
    assert (everything(old), log.read_bytes()) == (before, b"of an earlier copy")
    copy.write_bytes(b"earlier")
    SwarmDB(old).close()

    assert copy.read_bytes() == b"earlier"
    assert rows(old, "SELECT value FROM schema_info WHERE key = 'version'") == [("2.1.0",)]


def test_what_another_program_made_of_a_file_that_was_waited_for_counts(old: Path) -> None:
    waits = threading.Event()
    engine = create_engine(f"sqlite:///{old}", connect_args={"timeout": 60})

    @event.listens_for(engine, "connect")
    def trace(raw: Any, record: object) -> None:
        raw.set_trace_callback(lambda sql: waits.set() if sql == "BEGIN IMMEDIATE" else None)

    run(old, "PRAGMA journal_mode = WAL")
    with closing(sqlite3.connect(old, isolation_level=None)) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("UPDATE schema_info SET value = '9.0.0' WHERE key = 'version'")
        opening = pool.submit(SwarmDB, engine=engine)
        assert waits.wait(60)
        holder.execute("COMMIT")
        with pytest.raises(SchemaError, match="upgrade"):
            opening.result()
    engine.dispose()

    assert rows(old, "SELECT key, value FROM schema_info") == [("version", "9.0.0")]
    assert not list(old.parent.glob("*.bak"))


def test_a_file_that_another_program_writes_to_is_waited_for(legacy: Path) -> None:
    with closing(sqlite3.connect(legacy, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(BusyError):
            SwarmDB(legacy, busy_timeout=0.05)
        holder.execute("ROLLBACK")
    SwarmDB(legacy).close()


def test_words_that_the_enums_do_not_list_keep_their_value(old: Path) -> None:
    run(
        old,
        "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp) "
        "VALUES ('e', 'decision', 'a', 't', '2025-11-29T10:00:00Z')",
    )
    with SwarmDB(old) as db:
        (event,) = db.get_events()
        assert type(event.event_type) is EventType
        assert event.event_type == "decision"
        assert not event.event_type.is_listed
        assert db.get_events(event_type=event.event_type) == [event]
        (unlisted,) = db.check().unlisted
        assert (unlisted.table, unlisted.column, unlisted.value, unlisted.rows) == (
            "agent_events",
            "event_type",
            "decision",
            1,
        )
        assert db.check().ok
