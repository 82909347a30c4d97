"""Copying a database into another one, of either kind."""

import json
import math
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from moai_flow.memory import (
    AgentMetric,
    BusyError,
    ClosedError,
    ConflictError,
    CorruptDataError,
    EventData,
    InvalidInputError,
    StorageError,
    SwarmDB,
    TransactionError,
)
from moai_flow.memory.models import TABLES, SchemaInfo, columns
from moai_flow.memory.transfer import Progress, copy_database
from postgres import Server
from reliability.injecting import injecting

MODELS = [model for model in TABLES if model is not SchemaInfo]
NAMES = [str(model.__tablename__) for model in MODELS]
EVENT: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}

#: Pairs of kinds: all that there are with a file or a server on each side.
WAYS = [("file", "server"), ("server", "file"), ("file", "file"), ("server", "server")]

NewStore = Callable[[str], SwarmDB]


@pytest.fixture
def new_url(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Gives URLs of databases that are empty, or not there yet."""
    servers: list[tuple[Server, str]] = []
    files = 0

    def new(kind: str) -> str:
        nonlocal files
        if kind == "server":
            server: Server = request.getfixturevalue("postgres_server")
            servers.append((server, server.create_database()))
            return servers[-1][1]
        files += 1
        return "sqlite://" if kind == "memory" else f"sqlite:///{tmp_path}/{files}.db"

    yield new
    for server, url in servers:
        server.drop_database(url)


@pytest.fixture
def new(new_url: Callable[[str], str]) -> Iterator[NewStore]:
    """Opens empty databases."""
    stores: list[SwarmDB] = []

    def open_one(kind: str) -> SwarmDB:
        stores.append(SwarmDB(url=new_url(kind)))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def source(path: Path) -> Iterator[SwarmDB]:
    """A file with a little of everything."""
    with SwarmDB(path) as db:
        fill(db)
        yield db


def fill(db: SwarmDB, rows: int = 3) -> None:
    """Add rows to every table."""
    start = datetime(2025, 11, 30, tzinfo=UTC)
    for number in range(rows):
        moment = start + timedelta(seconds=number // 2)  # Two at a time, so that the order has to be total.
        db.insert_event({**EVENT, "agent_id": f"a-{number % 7}", "timestamp": moment, "metadata": {"n": number}})
        db.register_agent(f"a-{number}", "t", metadata={"n": number})
        db.store_memory("s", "semantic", f"k-{number % 2}", {"n": number})
        db.store_task_metric(f"t-{number % 5}", "a", number, "success", timestamp=moment)
        db.store_agent_metric("a", "duration", number / 3, timestamp=moment)
        db.store_swarm_metric("w", "health", number / 7, timestamp=moment)


def server_run(url: Any, statement: str, *parameters: Any) -> list[Any]:
    """Run a statement as another program would."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def file_run(path: Path, statement: str, *parameters: Any) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, parameters).fetchall()


def raw_run(db: SwarmDB, statement: str) -> list[Any]:
    if db._location.is_on_server:
        return server_run(db._location.url, statement)
    with db.transaction() as raw:
        return [tuple(row) for row in raw.execute(statement).fetchall()]


def stored(db: SwarmDB) -> dict[str, list[Any]]:
    """Return every row of a file, each value with its type, as SQLite has them."""
    found = {}
    for model in MODELS:
        names = [column.name for column in columns(model)]
        shown = ", ".join(f"{name}, typeof({name})" for name in names)
        found[str(model.__tablename__)] = sorted(raw_run(db, f"SELECT {shown} FROM {model.__tablename__}"), key=repr)
    return found


def counted(db: SwarmDB) -> dict[str, int]:
    return {name: raw_run(db, f"SELECT count(*) FROM {name}")[0][0] for name in NAMES}


def retention(db: SwarmDB) -> str:
    ((value,),) = raw_run(db, "SELECT value FROM schema_info WHERE key = 'retention'")
    return str(value)


def answers(db: SwarmDB) -> dict[str, list[Any]]:
    """Return what the domain methods say, in their order."""
    found: dict[str, list[Any]] = {
        "newest": db.get_events(limit=10_000),
        "oldest": list(db.iter_events()),
        "errors": db.get_events(event_type="error", limit=10_000),
        "agents": db.list_agents(),
        "active": db.get_active_agents(),
        "memories": db.list_memories("s"),
        "tasks": db.get_task_metrics(limit=10_000),
        "agent metrics": db.get_agent_metrics(limit=10_000),
        "swarm metrics": db.get_swarm_metrics(limit=10_000),
    }
    return {name: [dict(row) for row in rows] for name, rows in found.items()}


# What is copied

INSERTS: dict[str, list[tuple[Any, ...]]] = {
    "agent_events": [
        (-5, "e--5", "spawn", "a", "t", "0001-01-01T00:00:00.000000+00:00", "{}", "2025-11-30T10:00:00.000001+00:00"),
        (0, "", "decision", "", "", "9999-12-31T23:59:59.999999+00:00", None, "1969-12-31T23:59:59.999999+00:00"),
        (1, "\\N", "ERROR", "\\.", 'tab\tline\nreturn\r"quote"\\', "2025-11-30T10:00:00.000000+00:00",
         '  {"a": 1,\n "a":2, "n": 123456789012345678901234567890,"e":1e23 , "z": -0.0, "u": "\\u00e9\\ud83d"}\n',
         "2025-11-30T10:00:00.000000+00:00"),
        (7, "é🐝\u200b", " spawn", "日本語", "%s ? :x", "2025-11-30T10:00:00.100000+00:00",
         '{"nul": "\\u0000", "lone": "\\ud800", "deep": ' + "[" * 150 + "]" * 150 + "}",
         "2025-11-30T10:00:00.000000+00:00"),
        (2**53 + 1, "e-large", "error", "a", "t", "2025-11-30T10:00:00.000000+00:00", "{}",
         "2025-11-30T10:00:00.000000+00:00"),
    ],
    "agent_registry": [
        ("", "t", "lost", -62_135_596_800.0, None, None, None, "2025-11-30T10:00:00.000000+00:00"),
        ("B", "t", "running", 253_402_300_799.999, 0.1 + 0.2, -(2**63), "{}", "2025-11-30T10:00:00.000000+00:00"),
        ("a", "t", "complete", 1764411089.95, 1764411089.9500002, 2**63 - 1, '{"ä": "ö"}',
         "2025-11-30T10:00:00.000000+00:00"),
        ("\uffff", "t", "spawned", 0.0, 1e-300, 0, "{}", "2025-11-30T10:00:00.000000+00:00"),
        ("🐝", "t", "spawned", 5e-324, 5.0, 1, "{}", "2025-11-30T10:00:00.000000+00:00"),  # Not so in UTF-16.
    ],
    "session_memory": [
        (3, "s", "semantic", "k", None, "2025-11-30T10:00:00.000000+00:00", None, "2025-11-30T10:00:00.000000+00:00"),
        (4, "s", "rumour", "", "null", "2025-11-30T10:00:00.000000+00:00", 2**62, "2025-11-30T10:00:00.000000+00:00"),
        (9, "s", "episodic", "k", '"\\u00e4 \\/"', "2025-11-30T10:00:00.000000+00:00", 1,
         "2025-11-30T10:00:00.000000+00:00"),
        (10, "s", "episodic", "k", "1e23", "2025-11-30T10:00:00.000000+00:00", 0, "2025-11-30T10:00:00.000000+00:00"),
        (11, "s", "episodic", "n", "-0", "2025-11-30T10:00:00.000000+00:00", -1, "2025-11-30T10:00:00.000000+00:00"),
    ],
    "task_metrics": [
        ("", "", None, "gave up", None, None, "0001-01-01 00:00:00"),
        ("t", "a", 1, "success", 2, 3, "2025-11-30 10:00:00"),
        ("t", "a", 1, "success", 2, 3, "2025-11-30 10:00:00.000001"),
        ("t", "a", 1, "success", 2, 3, "2025-11-30 10:00:01"),
        ("ü", "a", 2**63 - 1, "timeout", -1, 0, "9999-12-31 23:59:59.999999"),
    ],
    "agent_metrics": [
        (2, "a", "duration", 5e-324, None, "2025-11-30 10:00:00"),
        (3, "a", "mood", 1.7976931348623157e308, '{"k":  []}', "2025-11-30 10:00:00.500000"),
        (4, "a", "duration", math.inf, "{}", "2025-11-30 10:00:00"),
        (6, "a", "duration", -math.inf, "{}", "2025-11-30 10:00:00"),
    ],
    "swarm_metrics": [
        (1, "w", "health", 0.1, '{"nan": "no"}', "0001-01-01 00:00:00"),
        (100, "w", "weather", -1e-7, None, "9999-12-31 23:59:59.999999"),
    ],
}  # fmt: skip


@pytest.fixture
def hostile(path: Path) -> Iterator[SwarmDB]:
    """A file with all that raw SQL can put into it and the package reads."""
    with SwarmDB(path) as db:
        for table, rows in INSERTS.items():
            for row in rows:
                file_run(path, f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", *row)
        yield db


def test_a_file_comes_back_from_a_server_as_it_was(hostile: SwarmDB, new: NewStore) -> None:
    server, back = new("server"), new("file")
    there = copy_database(hostile, server, batch_size=2)
    here = copy_database(server, back, batch_size=3)

    assert stored(back) == stored(hostile)
    assert there == here
    assert [(table.table, table.rows) for table in there.tables] == [(name, len(INSERTS[name])) for name in NAMES]
    assert answers(hostile) == answers(server) == answers(back)
    assert server.check().unlisted == back.check().unlisted == hostile.check().unlisted
    assert raw_run(server, "SELECT metadata::text FROM agent_events ORDER BY id") == [
        (row[6],) for row in INSERTS["agent_events"]
    ]
    assert raw_run(server, "SELECT value IS NULL, value::text FROM session_memory ORDER BY id") == [
        (row[4] is None, row[4]) for row in INSERTS["session_memory"]
    ]


def test_a_server_comes_back_from_a_file_as_it_was(new: NewStore) -> None:
    server, file, back = new("server"), new("file"), new("server")
    fill(server, 20)
    zero = server.store_agent_metric("a", "duration", 0.0)
    raw_run(server, f"UPDATE agent_metrics SET value = '-0' WHERE metric_id = {zero}")
    raw_run(server, "UPDATE swarm_metrics SET value = 'Infinity' WHERE metric_id = 3")
    raw_run(server, 'UPDATE agent_events SET metadata = \'{"b":1, "a": 1e23 , "b": 2}\' WHERE id = 2')

    assert copy_database(server, file, batch_size=7) == copy_database(file, back, batch_size=100)
    assert answers(server) == answers(file) == answers(back)
    # SQLite keeps no sign of zero, which is equal without it; between servers it is kept.
    direct = new("server")
    copy_database(server, direct)
    assert raw_run(direct, f"SELECT value::text FROM agent_metrics WHERE metric_id = {zero}") == [("-0",)]
    assert raw_run(back, f"SELECT value::text FROM agent_metrics WHERE metric_id = {zero}") == [("0",)]


@pytest.mark.parametrize(("kind", "other"), [*WAYS, ("memory", "file"), ("file", "memory"), ("memory", "server")])
def test_every_kind_of_database_is_copied_into_every_other(kind: str, other: str, new: NewStore) -> None:
    source, target = new(kind), new(other)
    fill(source, 30)
    copy_database(source, target, batch_size=11)

    assert answers(target) == answers(source)
    assert len(target.get_events()) == 30


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 6, 10])
def test_no_row_is_lost_where_a_batch_ends(rows: int, new: NewStore) -> None:
    source, target = new("file"), new("server")
    fill(source, rows)
    steps: list[Progress] = []
    report = copy_database(source, target, batch_size=5, progress=steps.append)

    assert counted(target) == dict.fromkeys(NAMES, rows)
    assert [(table.copied, table.already_there) for table in report.tables] == [(rows, 0)] * len(NAMES)
    done = [*range(5, rows, 5), rows] if rows else []
    assert steps == [
        Progress(activity, name, number, rows) for activity in ("copy", "verify") for name in NAMES for number in done
    ]


def test_times_of_another_program_are_copied_as_the_moments_that_they_mean(source: SwarmDB, new: NewStore) -> None:
    path = source.db_path
    file_run(path, "UPDATE agent_events SET timestamp = '2025-11-30T10:00:00.5' WHERE id = 1")
    file_run(path, "UPDATE agent_metrics SET timestamp = '2025-11-30T10:00:00+09:00' WHERE metric_id = 1")
    # Of one task, in an order that is not that of their moments.
    for moment in ("2025-11-30 10:00:00", "2025-11-30T01:00:00+00:00", "2025-11-30T23:00:00+23:00"):
        file_run(path, "INSERT INTO task_metrics VALUES ('z', 'a', 1, 'success', 0, 0, ?)", moment)
    server, back = new("server"), new("file")
    copy_database(source, server, batch_size=1)
    copy_database(server, back, batch_size=2)

    by_moment = {(row["task_id"], row["timestamp"]) for row in answers(source)["tasks"]}
    for copy in (server, back):
        assert {(row["task_id"], row["timestamp"]) for row in answers(copy)["tasks"]} == by_moment
        assert copy.get_agent_metrics(limit=9)[0].timestamp == source.get_agent_metrics(limit=9)[0].timestamp
    assert back.check().foreign_times == ()
    assert copy_database(source, server, resume=True).tables[3].already_there == 6


def test_the_checksum_of_many_rows_is_the_sum_of_theirs(path: Path, new: NewStore) -> None:
    total = 0
    with SwarmDB(path) as source:
        while total < 2**256 or total % 2**256 < 2**255:  # So that all bits of the checksum count.
            source.register_agent(f"a-{total}", "t")
            rows = file_run(path, "SELECT * FROM agent_registry")
            shown = [json.dumps((*row[:-1], row[-1].replace("+00:00", "Z")), separators=(",", ":")) for row in rows]
            total = sum(int.from_bytes(sha256(row.encode()).digest()) for row in shown)
        report = copy_database(source, new("server"))

    assert report.tables[1].checksum == f"{total % 2**256:064x}"


def test_the_checksum_is_what_it_is_said_to_be(source: SwarmDB, new: NewStore) -> None:
    report = copy_database(source, new("server"))
    ((*row,),) = file_run(source.db_path, "SELECT * FROM agent_registry WHERE agent_id = 'a-0'")
    file_run(source.db_path, "DELETE FROM agent_registry WHERE agent_id <> 'a-0'")
    row[-1] = row[-1].replace("+00:00", "Z")
    digest = sha256(json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()

    assert copy_database(source, new("file")).tables[1].checksum == digest != report.tables[1].checksum


# Numbers


@pytest.mark.parametrize(("kind", "other"), WAYS)
def test_no_number_that_the_source_has_given_is_given_again(kind: str, other: str, new: NewStore) -> None:
    source, target = new(kind), new(other)
    fill(source, 4)
    raw_run(source, "DELETE FROM agent_events WHERE id > 2")
    raw_run(source, "DELETE FROM session_memory")
    copy_database(source, target)

    for db in (source, target):
        db.insert_event(EVENT)
        db.store_memory("s", "semantic", "k", 1)
        assert db.store_agent_metric("a", "duration", 1) == 5
        assert db.store_swarm_metric("w", "health", 1) == 5
        assert raw_run(db, "SELECT id FROM agent_events ORDER BY id") == [(1,), (2,), (5,)]
        assert raw_run(db, "SELECT id FROM session_memory") == [(5,)]


@pytest.mark.parametrize(("kind", "other"), WAYS)
def test_nor_is_the_first_one_but_where_none_was_given_it_is(kind: str, other: str, new: NewStore) -> None:
    source, target = new(kind), new(other)
    source.store_agent_metric("a", "duration", 1)
    copy_database(source, target)

    assert target.store_agent_metric("a", "duration", 1) == 2
    assert target.store_swarm_metric("w", "health", 1) == 1


@pytest.mark.parametrize(("kind", "other"), WAYS)
def test_numbers_that_the_target_itself_has_given_are_not_given_again(kind: str, other: str, new: NewStore) -> None:
    source, target = new(kind), new(other)
    fill(source, 2)
    fill(target, 9)
    for name in NAMES:
        raw_run(target, f"DELETE FROM {name}")
    copy_database(source, target)

    assert target.store_agent_metric("a", "duration", 1) == 10


def test_where_a_number_could_not_be_noted_the_targets_own_stays(
    source: SwarmDB, new_url: Callable[[str], str]
) -> None:
    fill(source, 20)
    raw_run(source, "DELETE FROM agent_metrics WHERE metric_id > 3")  # So that 23 has to be noted.
    noting = 0
    for _ in range(2):  # First to see which statement does it.
        with injecting() as injector, SwarmDB(url=new_url("file")) as target:
            fill(target, 9)
            for name in NAMES:
                raw_run(target, f"DELETE FROM {name}")
            injector.arm(noting, sqlite3.OperationalError("disk I/O error"))
            if not noting:
                copy_database(source, target)
                (noting,) = [n for n, sent in enumerate(injector.sent, 1) if "INSERT INTO sqlite_sequence" in sent]
            else:
                with pytest.raises(StorageError, match="disk I/O error"):
                    copy_database(source, target)
                assert target.store_agent_metric("a", "duration", 1) == 10


def test_a_number_that_was_given_by_hand_counts_as_well(new: NewStore) -> None:
    source, target = new("server"), new("server")
    metric = AgentMetric(metric_id=41, agent_id="a", metric_type="duration", value=1)  # type: ignore[arg-type]
    with source.session() as session:
        session.add(metric)
    raw_run(source, "UPDATE agent_metrics SET metadata = '{}'")
    copy_database(source, target)

    assert target.store_agent_metric("a", "duration", 1) == 42


# A target that has rows


@pytest.mark.parametrize("kind", ["file", "server"])
@pytest.mark.parametrize("table", NAMES)
def test_a_target_with_a_row_is_refused_and_stays_as_it_was(
    table: str, kind: str, source: SwarmDB, new: NewStore
) -> None:
    target = new(kind)
    fill(target, 1)
    for name in NAMES:
        if name != table:
            raw_run(target, f"DELETE FROM {name}")
    before = answers(target)
    with pytest.raises(InvalidInputError, match=r"without rows, or resume=True .*--continue"):
        copy_database(source, target)

    assert answers(target) == before
    assert retention(target) == "default"


def test_what_was_added_to_the_source_is_copied_by_resuming(source: SwarmDB, new: NewStore) -> None:
    target = new("server")
    copy_database(source, target)
    source.insert_event(EVENT)
    source.register_agent("b", "t")
    source.store_task_metric("t-2", "a", 1, "success")  # The last task, whose rows are there.
    source.store_task_metric("t-3", "a", 1, "success")
    report = copy_database(source, target, resume=True)

    assert answers(target) == answers(source)
    assert [(table.copied, table.already_there) for table in report.tables] == [
        (1, 3), (1, 3), (0, 3), (2, 3), (0, 3), (0, 3)
    ]  # fmt: skip
    assert [table.rows for table in report.tables] == [4, 4, 3, 5, 3, 3]


@pytest.mark.parametrize("kind", ["file", "server"])
@pytest.mark.parametrize(
    ("table", "tampering"),
    [
        ("agent_events", "UPDATE agent_events SET metadata = '{\"n\": 0} ' WHERE id = 1"),
        ("agent_events", "UPDATE agent_events SET timestamp = '2025-11-30 00:00:00.000001+00:00' WHERE id = 1"),
        ("agent_registry", "UPDATE agent_registry SET complete_time = 1 WHERE agent_id = 'a-0'"),
        ("session_memory", "DELETE FROM session_memory WHERE id = 1"),
        ("task_metrics", "INSERT INTO task_metrics VALUES ('a', 'a', 1, 'success', 0, 0, '2025-11-30 00:00:00+00:00')"),
        ("task_metrics", "UPDATE task_metrics SET tokens_used = NULL WHERE task_id = 't-0'"),
        ("agent_metrics", "UPDATE agent_metrics SET value = 1e-300 WHERE metric_id = 1"),
        ("swarm_metrics", "UPDATE swarm_metrics SET metric_id = 9 WHERE metric_id = 3"),
    ],
)
def test_a_row_of_the_target_that_was_changed_is_found(
    table: str, tampering: str, kind: str, source: SwarmDB, new: NewStore
) -> None:
    target = new(kind)
    copy_database(source, target)
    raw_run(target, tampering)
    tampered = answers(target)
    with pytest.raises(StorageError, match=rf"not hold the same as the source in {table} \(source: 3 rows.*empty data"):
        copy_database(source, target, resume=True)

    assert answers(target) == tampered
    assert retention(target) == "off"


@pytest.mark.parametrize(
    ("kind", "was", "became"),
    [("file", "9e999", "-9e999"), ("server", "'Infinity'", "'-Infinity'"), ("server", "'Infinity'", "'NaN'")],
)
def test_a_figure_that_is_not_finite_is_not_taken_for_another_one(
    kind: str, was: str, became: str, new: NewStore
) -> None:
    source, target = new(kind), new(kind)
    fill(source, 1)
    raw_run(source, f"UPDATE agent_metrics SET value = {was}")
    copy_database(source, target)
    raw_run(target, f"UPDATE agent_metrics SET value = {became}")
    with pytest.raises(StorageError, match="not hold the same as the source in agent_metrics"):
        copy_database(source, target, resume=True)


def test_every_table_that_is_not_the_same_is_named_and_no_other(source: SwarmDB, new: NewStore) -> None:
    target = new("file")
    copy_database(source, target)
    raw_run(target, "DELETE FROM session_memory WHERE id = 1")
    raw_run(target, "UPDATE swarm_metrics SET value = 5 WHERE metric_id = 1")
    with pytest.raises(StorageError, match="not hold the same") as caught:
        copy_database(source, target, resume=True)

    said = str(caught.value)
    assert said.startswith(f"{target.db_path}: ")
    assert [name for name in NAMES if f"{name} (source: 3 rows" in said] == ["session_memory", "swarm_metrics"]
    assert "target: 2 rows" in said


def test_a_row_of_the_source_that_has_changed_since_is_found(source: SwarmDB, new: NewStore) -> None:
    target = new("server")
    copy_database(source, target)
    source.update_agent_status("a-0", "running")
    with pytest.raises(StorageError, match=r"agent_registry \(source: 3 rows.*target: 3 rows"):
        copy_database(source, target, resume=True)


def test_rows_that_are_in_the_way_are_named(source: SwarmDB, new: NewStore) -> None:
    target = new("server")
    source.insert_event(EVENT, event_id="taken")
    target.insert_event(EVENT, event_id="taken")
    with pytest.raises(
        ConflictError, match=r"(?s)taken.*row of agent_events with id=4, and nothing of its batch"
    ) as caught:
        copy_database(source, target, resume=True)

    assert counted(target)["agent_events"] == 1
    cause = caught.value.__cause__
    assert isinstance(cause, ConflictError)
    assert isinstance(cause.__cause__, psycopg.errors.UniqueViolation)


@pytest.mark.parametrize("kind", ["file", "server"])
def test_it_is_the_row_itself_wherever_in_its_batch_it_is(kind: str, path: Path, new: NewStore) -> None:
    target = new(kind)
    target.insert_event(EVENT)
    raw_run(target, "UPDATE agent_events SET id = -1")  # Before all others, which are all to be copied.
    with SwarmDB(path) as source:
        for number in range(1, 9):
            source.insert_event(EVENT, event_id=f"e-{number}")
        for number in range(1, 9):
            for size in (8, 5, 1):
                raw_run(target, "DELETE FROM agent_events WHERE id > 0")
                raw_run(target, f"UPDATE agent_events SET event_id = 'e-{number}'")
                with pytest.raises(ConflictError, match=rf"row of agent_events with id={number}, and"):
                    copy_database(source, target, batch_size=size, resume=True)
                assert counted(target)["agent_events"] == 1 + (number - 1) // size * size


# Interruptions

PROGRAM = """
import sys
from moai_flow.memory import SwarmDB
from moai_flow.memory.transfer import copy_database

with SwarmDB(url=sys.argv[1]) as source, SwarmDB(url=sys.argv[2]) as target:
    copy_database(source, target, batch_size=20, progress=lambda step: print(*step[:3], flush=True))
"""


def kill_at(source: str, target: str, step: str) -> None:
    """Copy in a process of its own, and kill it when it has said that it is so far, wherever it is by then."""
    program = [sys.executable, "-c", PROGRAM, source, target]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as copying:
        assert copying.stdout is not None
        assert any(line.strip() == step for line in copying.stdout)
        copying.kill()
    assert copying.returncode != 0


@pytest.mark.parametrize("step", ["copy agent_events 100", "copy task_metrics 80", "verify agent_registry 20"])
@pytest.mark.parametrize(("kind", "other"), WAYS[:2])
def test_a_copy_that_was_killed_can_be_gone_on_with(
    kind: str, other: str, step: str, new_url: Callable[[str], str]
) -> None:
    urls = new_url(kind), new_url(other)
    with SwarmDB(url=urls[0]) as source:
        fill(source, 400)
    kill_at(*urls, step)
    with SwarmDB(url=urls[0]) as source, SwarmDB(url=urls[1]) as target:
        there = counted(target)
        assert retention(target) == "off"
        with pytest.raises(InvalidInputError, match="without rows"):
            copy_database(source, target)
        report = copy_database(source, target, batch_size=33, resume=True)

        assert 100 <= there["agent_events"] <= 400
        assert step.startswith("verify") or there["swarm_metrics"] < 400
        assert [table.already_there for table in report.tables] == list(there.values())
        assert [table.rows for table in report.tables] == [400] * len(NAMES)
        assert answers(target) == answers(source)
        assert retention(target) == "default"
        assert target.store_agent_metric("a", "duration", 1) == 401


def test_what_a_killed_copy_has_under_way_is_waited_for(source: SwarmDB, new: NewStore) -> None:
    target = new("server")
    plain = make_url(target._location.url).set(drivername="postgresql").render_as_string(hide_password=False)
    with SwarmDB(url=target._location.url, busy_timeout=0.2) as impatient, psycopg.connect(plain) as killed:
        killed.execute("INSERT INTO agent_metrics VALUES (1, 'a', 'duration', 1, '{}', now())")
        with pytest.raises(BusyError, match="busy timeout"):
            copy_database(source, impatient, resume=True)
        killed.rollback()
        copy_database(source, impatient, resume=True)

    assert answers(target) == answers(source)


@pytest.mark.parametrize("table", NAMES)
def test_it_is_waited_for_whichever_table_it_is_in(table: str, source: SwarmDB, new: NewStore) -> None:
    url = new("server")._location.url
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with SwarmDB(url=url, busy_timeout=0.05) as impatient, psycopg.connect(plain) as killed:
        killed.execute(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE".encode())  # As every writer does.
        with pytest.raises(BusyError, match="busy timeout"):
            copy_database(source, impatient)


def test_who_only_reads_the_target_is_not_waited_for(source: SwarmDB, new: NewStore) -> None:
    url = new("server")._location.url
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with SwarmDB(url=url, busy_timeout=0.2) as impatient, psycopg.connect(plain) as reader:
        for name in NAMES:
            reader.execute(f"SELECT * FROM {name}".encode())
        copy_database(source, impatient)

        assert answers(impatient) == answers(source)


def test_what_a_killed_copy_still_commits_is_there_already(source: SwarmDB, new: NewStore) -> None:
    target = new("server")
    plain = make_url(target._location.url).set(drivername="postgresql").render_as_string(hide_password=False)
    first = min(source.get_agent_metrics(), key=lambda metric: metric.metric_id or 0)
    with source.transaction() as raw:
        (metadata,) = raw.execute("SELECT metadata FROM agent_metrics ORDER BY metric_id").fetchone()
    with ThreadPoolExecutor(1) as pool, psycopg.connect(plain) as killed:
        row = (first.metric_id, first.agent_id, first.metric_type.value, first.value, metadata, first.timestamp)
        killed.execute("INSERT INTO agent_metrics VALUES (%s, %s, %s, %s, %s, %s)", row)
        copying = pool.submit(copy_database, source, target, resume=True)
        while killed.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() == (0,):
            pass
        killed.commit()
        report = copying.result()

    assert [table.already_there for table in report.tables if table.table == "agent_metrics"] == [1]


def test_what_a_killed_copy_still_commits_is_not_welcome_to_another_one(source: SwarmDB, new: NewStore) -> None:
    target = new("server")
    plain = make_url(target._location.url).set(drivername="postgresql").render_as_string(hide_password=False)
    with ThreadPoolExecutor(1) as pool, psycopg.connect(plain) as killed:
        killed.execute("INSERT INTO agent_events VALUES (9, 'e', 'spawn', 'a', 't', now(), '{}', now())")
        copying = pool.submit(copy_database, source, target)
        while killed.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() == (0,):
            assert not copying.done()
        killed.commit()
        with pytest.raises(InvalidInputError, match="without rows"):
            copying.result()

    assert counted(target) == {**dict.fromkeys(NAMES, 0), "agent_events": 1}


def test_an_exception_between_two_batches_leaves_what_was_written(source: SwarmDB, new: NewStore) -> None:
    target = new("file")

    def interrupt(step: Progress) -> None:
        if step[:3] == ("copy", "agent_registry", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_database(source, target, batch_size=2, progress=interrupt)
    assert counted(target) == dict(zip(NAMES, (3, 2, 0, 0, 0, 0), strict=True))

    copy_database(source, target, resume=True)
    assert answers(target) == answers(source)


def interrupting_after(number: int) -> Callable[[Progress], None]:
    """Return what ends a copy after so many batches."""
    batches = count(1)

    def interrupt(step: Progress) -> None:
        if next(batches) == number:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize("kind", ["file", "server"])
def test_a_copy_can_be_gone_on_with_after_every_row(kind: str, hostile: SwarmDB, new: NewStore) -> None:
    target = new(kind)
    for number in range(1, sum(map(len, INSERTS.values())) + 1):
        with pytest.raises(KeyboardInterrupt):
            copy_database(hostile, target, resume=True, batch_size=1, progress=interrupting_after(number))
        assert sum(counted(target).values()) == number
    report = copy_database(hostile, target, resume=True)

    assert [table.already_there for table in report.tables] == [table.rows for table in report.tables]
    assert answers(target) == answers(hostile)


def test_a_target_that_another_program_keeps_is_waited_for_no_longer_than_it_says(
    source: SwarmDB, tmp_path: Path
) -> None:
    with SwarmDB(tmp_path / "copy.db", busy_timeout=0.05) as target:
        with closing(sqlite3.connect(target.db_path)) as other:

            def keep(step: Progress) -> None:
                if step[:3] == ("copy", "agent_registry", 2):
                    other.execute("BEGIN IMMEDIATE")

            with pytest.raises(BusyError, match="busy timeout") as caught:
                copy_database(source, target, batch_size=2, progress=keep)
            assert "row" not in str(caught.value)  # None of them is to blame.
        copy_database(source, target, resume=True)

        assert answers(target) == answers(source)


@pytest.mark.parametrize(("kind", "other"), WAYS[:2])
def test_writers_on_the_source_do_no_harm(kind: str, other: str, new: NewStore) -> None:
    source, target = new(kind), new(other)
    fill(source, 30)
    before = answers(source)
    with SwarmDB(url=source._location.url) as writer:

        def write(step: Progress) -> None:
            if step.activity == "copy":
                writer.insert_event(EVENT)
                writer.register_agent("a-0", "changed", "running")
                writer.register_agent(f"new-{step.table}-{step.done}", "t")
                writer.delete_agent("a-29")
                writer.store_memory("s", "semantic", "k-0", step.done)
                writer.store_swarm_metric("w", "health", 1)

        report = copy_database(source, target, batch_size=10, progress=write)

    assert [table.rows for table in report.tables] == [30] * len(NAMES)
    assert answers(target) == before != answers(source)


@pytest.mark.parametrize("kind", ["file", "server"])
def test_who_writes_to_the_target_while_it_is_verified_is_neither_held_up_nor_counted(
    kind: str, source: SwarmDB, new: NewStore
) -> None:
    target = new(kind)
    with SwarmDB(url=target._location.url, busy_timeout=0.2) as writer:

        def write(step: Progress) -> None:
            if step.activity == "verify":
                for _ in range(3):
                    writer.insert_event(EVENT)
                    writer.store_swarm_metric("w", "health", 1)

        report = copy_database(source, target, batch_size=2, progress=write)

    assert [table.rows for table in report.tables] == [3] * len(NAMES)
    assert counted(target)["swarm_metrics"] > 3


def test_one_database_is_copied_into_two_at_once(new: NewStore) -> None:
    source, target, other_target = new("server"), new("server"), new("server")
    fill(source)
    with SwarmDB(url=source._location.url, busy_timeout=0.2) as again:

        def copy_as_well(step: Progress) -> None:
            if step[:3] == ("copy", "agent_events", 3):
                copy_database(again, other_target)

        copy_database(source, target, progress=copy_as_well)

    assert answers(target) == answers(other_target) == answers(source)


# Rows that can't be copied


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("UPDATE agent_events SET metadata = '{' WHERE id = 8", r"agent_events\.metadata of the row with id=8: holds"),
        ("UPDATE agent_events SET agent_type = CAST(x'ff' AS TEXT) WHERE id = 8", r"agent_type .*id=8: .*not UTF-8"),
        ("UPDATE agent_events SET timestamp = 'once' WHERE id = 8", r"agent_events\.timestamp of the row with id=8"),
        ("UPDATE agent_events SET created_at = NULL WHERE id = 8", r"created_at of the row with id=8: holds NULL"),
        ("UPDATE agent_events SET agent_id = x'61' WHERE id = 8", r"agent_id of the row with id=8"),
    ],
)
def test_a_row_that_can_not_be_decoded_ends_the_copy_before_its_batch(
    damage: str, named: str, path: Path, new: NewStore
) -> None:
    target = new("server")
    with SwarmDB(path) as source:
        fill(source, 12)
        file_run(path, damage)
        with pytest.raises(CorruptDataError, match=rf"{named}.*\(in {path}; swarmdb check --quarantine") as caught:
            copy_database(source, target, batch_size=5)
        assert caught.value.row == {"id": 8}
        assert counted(target) == {**dict.fromkeys(NAMES, 0), "agent_events": 5}

        source.check(quarantine=True)
        copy_database(source, target, batch_size=5, resume=True)
        assert answers(target) == answers(source)
        assert counted(target)["agent_events"] == 11


@pytest.mark.parametrize("kind", ["file", "server"])
def test_an_agent_without_an_id_ends_the_copy(kind: str, source: SwarmDB, new: NewStore) -> None:
    target = new(kind)
    file_run(source.db_path, "INSERT INTO agent_registry VALUES (NULL, 't', 'spawned', 1, NULL, NULL, NULL, 'x')")
    with pytest.raises(CorruptDataError, match=r"agent_registry\.agent_id of the row with agent_id=None: holds NULL"):
        copy_database(source, target)

    assert counted(target)["agent_registry"] == 0


def test_a_row_of_the_target_that_can_not_be_decoded_is_named(source: SwarmDB, new: NewStore) -> None:
    target = new("file")
    copy_database(source, target)
    raw_run(target, "UPDATE agent_registry SET spawn_time = 1e300 WHERE agent_id = 'a-0'")
    with pytest.raises(CorruptDataError, match=rf"agent_registry\.spawn_time.*\(in {target.db_path}; "):
        copy_database(source, target, resume=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("agent_type = 'a' || char(0)", "NUL"),
        ("metadata = '{\"n\": NaN}'", "NaN"),
        ("agent_id = hex(randomblob(4000))", "index row size"),
    ],
)
def test_a_row_that_a_server_can_not_hold_is_named(change: str, named: str, path: Path, new: NewStore) -> None:
    target = new("server")
    with SwarmDB(path) as source:
        fill(source, 12)
        file_run(path, f"UPDATE agent_events SET {change} WHERE id = 8")
        with pytest.raises(
            StorageError, match=rf"(?s){named}.*can't take the row of agent_events with id=8,"
        ) as caught:
            copy_database(source, target, batch_size=5)
        assert str(caught.value).startswith(str(target._location))
        assert counted(target) == {**dict.fromkeys(NAMES, 0), "agent_events": 5}

        file_run(path, "DELETE FROM agent_events WHERE id = 8")
        copy_database(source, target, batch_size=5, resume=True)
        assert answers(target) == answers(source)


def test_what_sqlite_can_not_hold_is_named(new: NewStore) -> None:
    source, target = new("server"), new("file")
    fill(source, 12)
    raw_run(source, "UPDATE agent_metrics SET value = 'NaN' WHERE metric_id = 8")
    with pytest.raises(ConflictError, match=r"NOT NULL.*row of agent_metrics with metric_id=8,"):
        copy_database(source, target, batch_size=5)

    assert counted(target)["agent_metrics"] == 5


def test_a_damaged_index_of_keys_does_not_hide_rows(source: SwarmDB, new: NewStore) -> None:
    path = source.db_path
    target = new("file")
    raw_run(source, "DELETE FROM task_metrics")
    empty = "(SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_task_metrics_1')"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            f"UPDATE sqlite_master SET rootpage = {empty} WHERE name = 'sqlite_autoindex_agent_registry_1'"
        )
    with SwarmDB(path) as damaged, pytest.raises(StorageError, match=r"3 rows of agent_registry, .* gives 0: it is"):
        copy_database(damaged, target)


# What can't be a pair


def test_a_database_is_not_copied_into_itself(source: SwarmDB, tmp_path: Path) -> None:
    path = source.db_path
    (tmp_path / "link.db").symlink_to(path)
    urls = [f"sqlite:///{path}", f"sqlite:///{tmp_path}/link.db", f"sqlite:///file:{path}?uri=true"]
    for resume in (False, True):
        with pytest.raises(InvalidInputError, match="another database than the source"):
            copy_database(source, source, resume=resume)
        for url in urls:
            with SwarmDB(url=url) as other, pytest.raises(InvalidInputError, match="another database than the source"):
                copy_database(source, other, resume=resume)


def test_nor_is_one_in_memory(new: NewStore) -> None:
    with new("memory") as db, pytest.raises(InvalidInputError, match="another database than the source"):
        copy_database(db, db)


def test_a_server_database_is_not_copied_into_itself_but_into_another_schema(
    postgres_url: str, source: SwarmDB
) -> None:
    url = make_url(postgres_url)
    server_run(url, "CREATE SCHEMA other")
    other_schema = url.update_query_dict({"options": "-csearch_path=other"})
    with SwarmDB(url=url) as one, SwarmDB(url=url.set(drivername="postgresql+psycopg")) as again:
        for resume in (False, True):
            with pytest.raises(InvalidInputError, match="another database than the source"):
                copy_database(one, again, resume=resume)
        copy_database(source, one)
        with SwarmDB(url=other_schema) as other:
            copy_database(one, other)
            assert answers(other) == answers(source)
            assert other.store_agent_metric("a", "duration", 1) == 4
        assert one.store_agent_metric("a", "duration", 1) == 4


def test_a_servers_copy_of_a_database_is_another_one(postgres_server: Server, postgres_url: str) -> None:
    SwarmDB(url=postgres_url).close()
    url = postgres_server.copy_database(postgres_url)  # In which the tables have the same numbers.
    try:
        with SwarmDB(url=postgres_url) as one, SwarmDB(url=url) as other:
            one.store_agent_metric("a", "duration", 1)
            copy_database(one, other)

            assert answers(other) == answers(one)
    finally:
        postgres_server.drop_database(url)


def test_a_transaction_that_is_open_is_not_joined(source: SwarmDB, new: NewStore) -> None:
    target = new("file")
    for db in (source, target):
        with db.transaction(), pytest.raises(TransactionError, match="inside a transaction"):
            copy_database(source, target)
    assert counted(target) == dict.fromkeys(NAMES, 0)


def test_a_batch_has_5000_rows_unless_it_is_given_another_size(source: SwarmDB, new: NewStore) -> None:
    source.insert_events([EVENT] * 4998)
    steps: list[Progress] = []
    copy_database(source, new("file"), progress=steps.append)

    assert [step.done for step in steps if step.table == "agent_events"] == [5000, 5001] * 2


def test_a_batch_has_a_row_at_least(source: SwarmDB, new: NewStore) -> None:
    for size in (0, -1, 2.5):
        with pytest.raises(InvalidInputError, match="batch_size"):
            copy_database(source, new("file"), batch_size=size)  # type: ignore[arg-type]


def test_a_closed_database_is_said_to_be_closed(source: SwarmDB, new: NewStore) -> None:
    target = new("file")
    target.close()
    with pytest.raises(ClosedError):
        copy_database(source, target)
    with pytest.raises(ClosedError):
        copy_database(target, source)


# Retention


@pytest.mark.parametrize("mark", ["off", "default", None])
def test_the_mark_of_retention_is_the_sources_in_the_end_and_off_until_then(
    mark: str | None, source: SwarmDB, new: NewStore
) -> None:
    target = new("server")
    if mark is None:
        raw_run(source, "DELETE FROM schema_info WHERE key = 'retention'")
    else:
        raw_run(source, f"UPDATE schema_info SET value = '{mark}' WHERE key = 'retention'")
    meanwhile = set()
    copy_database(source, target, progress=lambda _: meanwhile.add(retention(target)))

    assert meanwhile == {"off"}
    assert retention(target) == (mark or "off")
    assert target.schema_version == source.schema_version


@pytest.mark.parametrize("kind", ["file", "server"])
def test_the_mark_of_retention_is_that_which_the_source_had_at_the_beginning(kind: str, new: NewStore) -> None:
    source, target = new(kind), new("file")
    fill(source)
    with SwarmDB(url=source._location.url) as other:

        def set_off(step: Progress) -> None:
            raw_run(other, "UPDATE schema_info SET value = 'off' WHERE key = 'retention'")

        copy_database(source, target, progress=set_off)

    assert (retention(source), retention(target)) == ("off", "default")
