"""What is PostgreSQL's own: its types, its pool, its errors, and a server that goes away."""

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import create_engine, make_url

from moai_flow.memory import (
    AgentStatus,
    BusyError,
    ClosedError,
    CorruptDataError,
    EventData,
    InvalidInputError,
    RegisteredAgent,
    SchemaError,
    StorageError,
    SwarmDB,
    SwarmDBError,
    TransactionError,
    connections,
)
from moai_flow.memory.connections import Limit, Permits
from moai_flow.memory.migrations import VERSION
from moai_flow.memory.models import TABLES
from postgres import Server

EVENT: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}


@pytest.fixture
def store(postgres_url: str) -> Iterator[SwarmDB]:
    with SwarmDB(url=postgres_url) as db:
        yield db


def run(url: str, statement: str, *parameters: Any) -> list[Any]:
    """Run a statement as another program would."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


# Schema


def test_columns_have_the_servers_types(postgres_url: str, store: SwarmDB) -> None:
    found = run(
        postgres_url,
        "SELECT table_name || '.' || column_name, data_type, is_nullable, is_identity, collation_name "
        "FROM information_schema.columns WHERE table_schema = 'public'",
    )
    types = {name: (kind, nullable, identity, collation) for name, kind, nullable, identity, collation in found}

    assert types["agent_events.id"] == ("bigint", "NO", "YES", None)
    assert types["agent_events.timestamp"] == ("timestamp with time zone", "NO", "NO", None)
    assert types["agent_events.metadata"] == ("json", "YES", "NO", None)
    assert types["agent_events.agent_id"] == ("text", "NO", "NO", "C")
    assert types["agent_registry.spawn_time"] == ("double precision", "NO", "NO", None)
    assert types["agent_registry.duration_ms"] == ("bigint", "YES", "NO", None)
    assert types["task_metrics.timestamp"] == ("timestamp with time zone", "NO", "NO", None)


def test_indexes_have_the_same_names_as_on_sqlite(postgres_url: str, store: SwarmDB) -> None:
    with SwarmDB(":memory:") as other, other.transaction() as raw:
        named = "SELECT name FROM sqlite_master WHERE type = 'index' AND name LIKE 'idx%'"
        expected = {name for (name,) in raw.execute(named)}
    found = run(postgres_url, "SELECT indexname FROM pg_indexes WHERE schemaname = 'public'")

    assert {name for (name,) in found if name.startswith("idx")} == expected


def test_the_index_of_active_agents_holds_no_others(postgres_url: str, store: SwarmDB) -> None:
    ((definition,),) = run(
        postgres_url, "SELECT indexdef FROM pg_indexes WHERE indexname = 'idx_agent_registry_active'"
    )
    assert "WHERE" in definition
    assert "complete" in definition


def test_json_is_kept_to_the_letter(store: SwarmDB) -> None:
    value = {"b": 1, "a": 1e23, "ä": [1.0, -0.0, 2**70], "": None}
    store.store_memory("s", "semantic", "k", value)

    found = store.get_memory("s", "semantic", "k")
    assert found == value
    assert list(found) == list(value)
    assert [type(item) for item in found["ä"]] == [float, float, int]


@pytest.mark.parametrize("moment", [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)])
def test_the_first_and_the_last_moment_come_back(store: SwarmDB, moment: datetime) -> None:
    store.insert_event({**EVENT, "timestamp": moment})

    (event,) = store.get_events()
    assert event.timestamp == moment
    assert event.timestamp.tzinfo is UTC


# Opening


@pytest.mark.parametrize("driver", ["postgresql", "postgresql+psycopg"])
def test_both_spellings_of_the_url_open_it(postgres_url: str, driver: str) -> None:
    with SwarmDB(url=make_url(postgres_url).set(drivername=driver)) as db:
        assert db.schema_version == VERSION


def test_a_callers_engine_is_welcome_and_stays_as_it_was(postgres_url: str) -> None:
    engine = create_engine(postgres_url, pool_size=1, max_overflow=0)
    with SwarmDB(engine=engine) as db:
        with db.transaction():
            db.register_agent("a", "t")
        assert db.get_agent("a") is not None
        db.store_memory("s", "semantic", "k", {"n": 1})
        assert db.get_memory("s", "semantic", "k") == {"n": 1}
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar_one() == "read committed"
        assert not connection.connection.driver_connection.autocommit  # type: ignore[union-attr]
        assert connection.exec_driver_sql("SELECT value FROM session_memory").scalar_one() == {"n": 1}
    engine.dispose()


def test_a_newer_schema_is_refused_and_nothing_is_written(postgres_url: str, store: SwarmDB) -> None:
    run(postgres_url, "UPDATE schema_info SET value = '9.0.0' WHERE key = 'version'")
    with pytest.raises(SchemaError, match=r"9\.0\.0"):
        SwarmDB(url=postgres_url)
    assert run(postgres_url, "SELECT value FROM schema_info WHERE key = 'version'") == [("9.0.0",)]


def test_tables_of_another_kind_are_refused_and_nothing_is_made(postgres_url: str) -> None:
    run(postgres_url, "CREATE TABLE agent_registry (agent_id TEXT PRIMARY KEY, status INTEGER)")
    with pytest.raises(SchemaError, match=r"agent_registry.*agent_type \(missing.*status \(INTEGER"):
        SwarmDB(url=postgres_url)
    tables = run(postgres_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert tables == [("agent_registry",)]


@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
def test_a_view_of_such_a_name_is_refused_and_nothing_is_made(postgres_url: str, store: SwarmDB, kind: str) -> None:
    run(postgres_url, "DROP TABLE schema_info")
    run(postgres_url, "ALTER TABLE task_metrics RENAME TO moved")
    run(postgres_url, f"CREATE {kind} task_metrics AS SELECT * FROM moved")
    with pytest.raises(SchemaError, match="its task_metrics is a view, so it is not SwarmDB's"):
        SwarmDB(url=postgres_url)
    assert run(postgres_url, "SELECT to_regclass('schema_info')") == [(None,)]


#: What a role or a database may be set to, and the values that came back otherwise, or not at all, by it.
SETTINGS = {
    "client_encoding": "LATIN1",
    "DateStyle": "German",
    "extra_float_digits": "-5",
    "standard_conforming_strings": "off",
    "IntervalStyle": "iso_8601",
    "bytea_output": "escape",
    "TimeZone": "Asia/Kolkata",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_of_a_database_changes_what_comes_back(postgres_url: str, name: str) -> None:
    database = make_url(postgres_url).database
    run(postgres_url, f"ALTER DATABASE \"{database}\" SET {name} = '{SETTINGS[name]}'")
    moment = datetime(2026, 3, 4, 5, 6, 7, 123456, UTC)
    with SwarmDB(url=postgres_url) as db:
        db.insert_event({**EVENT, "agent_id": "日本\\'", "timestamp": moment})
        db.store_agent_metric("a", "duration", 0.1 + 0.2)
        db.store_memory("s", "semantic", "日本", {"path": "C:\\'", "n": 0.1 + 0.2})
        with db.transaction() as raw:
            (shown,) = raw.execute("SELECT timestamp FROM agent_events").fetchone()
        assert (db.get_events(agent_id="日本\\'")[0].timestamp, shown) == (moment, moment)
        assert [metric.value for metric in db.get_agent_metrics("a")] == [0.1 + 0.2]
        assert db.get_memory("s", "semantic", "日本") == {"path": "C:\\'", "n": 0.1 + 0.2}
        assert db._get_connection().execute("SHOW default_transaction_isolation").fetchone() == ("read committed",)
        assert db.check().ok


def test_where_transactions_are_read_only_by_default_everything_reads_and_nothing_writes(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url) as db:
        db.register_agent("a", "t")
    run(postgres_url, f'ALTER DATABASE "{make_url(postgres_url).database}" SET default_transaction_read_only = on')
    refusal = pytest.raises(StorageError, match="read-only transaction")
    with SwarmDB(url=postgres_url) as db:
        with refusal:
            db.insert_event(EVENT)
        with refusal:
            db.insert_events([EVENT])
        with refusal, db.transaction():
            db.register_agent("b", "t")
        with refusal, db.session() as session:
            session.add(RegisteredAgent(agent_id="c", agent_type="t", status=AgentStatus.RUNNING))
        with db.transaction(), db.session(readonly=True):
            assert [agent.agent_id for agent in db.list_agents()] == ["a"]
        assert db.check().ok
    with SwarmDB(url=f"{postgres_url}&options=-cdefault_transaction_read_only%3Doff") as db:
        assert db.insert_event(EVENT)


def test_an_empty_database_whose_transactions_are_read_only_by_default_is_left_so(postgres_url: str) -> None:
    run(postgres_url, f'ALTER DATABASE "{make_url(postgres_url).database}" SET default_transaction_read_only = on')
    with pytest.raises(StorageError, match="read-only transaction"):
        SwarmDB(url=postgres_url)
    assert run(postgres_url, "SELECT count(*) FROM pg_class WHERE relname = 'schema_info'") == [(0,)]


def test_what_the_url_says_of_the_encoding_changes_nothing(postgres_url: str) -> None:
    with SwarmDB(url=f"{postgres_url}&client_encoding=latin1") as db:
        db.register_agent("日本", "t")
        assert [agent.agent_id for agent in db.list_agents()] == ["日本"]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_does_not_hold_every_text_is_refused(
    postgres_server: Server, postgres_url: str, encoding: str
) -> None:
    name = f"test_{uuid4().hex[:12]}"
    run(postgres_url, f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    url = postgres_server.url(name)
    try:
        for _ in range(2):
            with pytest.raises(StorageError, match=f"its encoding is {encoding}.*ENCODING 'UTF8'"):
                SwarmDB(url=url)
        assert run(url, "SELECT count(*) FROM pg_class WHERE relname = 'schema_info'") == [(0,)]
    finally:
        postgres_server.drop_database(url)


@pytest.mark.parametrize("setting", ["client_encoding=LATIN1", "DateStyle=German", "extra_float_digits=0"])
def test_a_callers_engine_that_would_change_values_is_refused(postgres_url: str, setting: str) -> None:
    engine = create_engine(postgres_url, connect_args={"options": f"-c {setting}"})
    name = setting.partition("=")[0]
    with pytest.raises(InvalidInputError, match=f"engine: got '{name} = .*'options': '-c {name}="):
        SwarmDB(engine=engine)
    engine.dispose()
    assert run(postgres_url, "SELECT count(*) FROM pg_class WHERE relname = 'schema_info'") == [(0,)]


def open_at_once(url: str, barrier: Barrier, number: int, results: Any) -> None:
    barrier.wait()
    try:
        with SwarmDB(url=url) as db:
            db.register_agent(f"agent-{number}", "t")
            results.put(None)
    except SwarmDBError as error:
        results.put(repr(error))


@pytest.mark.parametrize("shape", ["fresh", "2.0.0"])
def test_16_processes_open_a_database_at_the_same_moment(postgres_url: str, shape: str) -> None:
    if shape == "2.0.0":
        with SwarmDB(url=postgres_url) as db:
            db.register_agent("before", "t")
        added = run(postgres_url, "SELECT indexname FROM pg_indexes WHERE indexname LIKE 'idx%_time'")
        for (name,) in added:
            run(postgres_url, f"DROP INDEX {name}")
        run(postgres_url, "UPDATE schema_info SET value = '2.0.0' WHERE key = 'version'")
        run(postgres_url, "DELETE FROM schema_info WHERE key = 'retention'")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(16), context.SimpleQueue()
    processes = [
        context.Process(target=open_at_once, args=(postgres_url, barrier, number, results)) for number in range(16)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [results.get() for _ in processes] == [None] * 16
    with SwarmDB(url=postgres_url) as db:
        assert len(db.list_agents()) == (16 if shape == "fresh" else 17)
        assert db.schema_version == VERSION
        # Rows that were there before are not removed unasked.
        with db.transaction() as raw:
            (retention,) = raw.execute("SELECT value FROM schema_info WHERE key = 'retention'").fetchone()
        assert retention == ("default" if shape == "fresh" else "off")
    indexes = run(postgres_url, "SELECT count(*) FROM pg_indexes WHERE indexname = 'idx_agent_events_agent_time'")
    assert indexes == [(1,)]


# Errors


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"database": "nowhere"}, "nowhere"),
        ({"query": {"host": "/nowhere"}}, "nowhere"),
        ({"username": "nobody"}, "nobody"),
        ({"host": "127.0.0.1", "port": 1, "query": {}}, "127.0.0.1"),
    ],
)
def test_what_cannot_be_reached_is_a_storage_error_without_the_password(
    postgres_url: str, change: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = make_url(postgres_url).set(password="s3cret", **change)
    with pytest.raises(StorageError, match=reason) as caught:
        SwarmDB(url=url)
    seen: BaseException | None = caught.value
    while seen is not None:
        assert "s3cret" not in str(seen) + repr(seen)
        seen = seen.__cause__ or seen.__context__
    assert "s3cret" not in caplog.text


def test_a_password_is_never_shown(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = make_url(postgres_url).set(password="s3cret")
    with SwarmDB(url=url) as db:
        db.insert_event(EVENT, event_id="e")
        shown = [repr(db), str(db._location)]
        with pytest.raises(SwarmDBError) as caught:
            db.insert_event(EVENT, event_id="e")
        shown += [str(caught.value), repr(caught.value)]
        with pytest.raises(StorageError) as caught:
            _ = db.db_path
        shown.append(str(caught.value))
    assert "s3cret" not in caplog.text + "".join(shown)


@pytest.mark.parametrize(
    "places",
    [
        {"url": "postgresql://user:s3cret@host:port/x"},
        {"url": "postgresql://user@127.0.0.1:1/x?password=s3cret"},
        {"url": "postgresql://user:s3cret\ud800@127.0.0.1:1/x"},
        {"url": "postgresql+asyncpg://user:s3cret@host/x?password=s3cret"},
        {"url": "mysql://user@host/x?passwd=s3cret"},
        {"url": "sqlite:///x.db?password=s3cret"},
        {"url": "sqlite:///x.db?PGPassword=s3cret"},
        {"db_path": "postgresql://user:s3cret@host:port/x"},
        {"db_path": "postgresql user:s3cret@host://"},
        {"engine": "postgresql://user:s3cret@host:port/x"},
        {"db_path": "x.db", "url": "postgresql://user:s3cret@host/x"},
        {"db_path": "postgresql://user:s3cret@host/x"},
        {"engine": "postgresql://user:s3cret@host/x"},
    ],
)
def test_a_password_in_the_wrong_place_is_not_shown_either(places: dict[str, Any], tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(SwarmDBError) as caught:
        SwarmDB(**places)
    assert "s3cret" not in str(caught.value) + repr(caught.value) + repr(vars(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_no_patience_is_no_waiting(postgres_url: str, store: SwarmDB) -> None:
    store.register_agent("a", "t")
    with SwarmDB(url=postgres_url, busy_timeout=0) as other, store.transaction():
        store.update_agent_status("a", "running")
        with pytest.raises(BusyError):
            other.update_agent_status("a", "complete")


@pytest.mark.parametrize("columns", ["version int", "key int, value text", "key text, value text"])
def test_a_schema_info_of_another_program_is_refused(postgres_url: str, columns: str) -> None:
    run(postgres_url, f"CREATE TABLE schema_info ({columns})")
    with pytest.raises(SchemaError, match="schema_info"):
        SwarmDB(url=postgres_url)


def test_a_lock_that_is_held_too_long_is_a_busy_error(postgres_url: str, store: SwarmDB) -> None:
    store.register_agent("a", "t")
    with SwarmDB(url=postgres_url, busy_timeout=0.1) as other, store.transaction():
        store.update_agent_status("a", "running")
        with pytest.raises(BusyError, match="busy timeout"):
            other.update_agent_status("a", "complete")
        assert other.get_agent("a").status == "spawned"  # type: ignore[union-attr]


def test_transactions_that_wait_for_each_other_are_a_busy_error(store: SwarmDB) -> None:
    for name in "ab":
        store.register_agent(name, "t")
    barrier = threading.Barrier(2)

    def update(first: str, second: str) -> str:
        try:
            with store.transaction():
                store.update_agent_status(first, "running")
                barrier.wait()
                store.update_agent_status(second, "running")
        except BusyError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        told = [future.result() for future in [pool.submit(update, "a", "b"), pool.submit(update, "b", "a")]]
    assert any("waited for each other" in message or "changed what this one had read" in message for message in told)


def test_read_modify_write_in_two_transactions_loses_no_update(store: SwarmDB) -> None:
    store.register_agent("counter", "t", metadata={"n": 0})
    threads, each = 4, 10
    ready = threading.Barrier(threads)

    def work() -> int:
        successes = 0
        ready.wait()
        while successes < each:
            try:
                with store.transaction():
                    agent = store.get_agent("counter")
                    assert agent is not None
                    store.register_agent("counter", "t", metadata={"n": agent.metadata_["n"] + 1})
            except BusyError:
                continue
            successes += 1
        return successes

    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(lambda _: work(), range(threads))) == threads * each
    assert store.get_agent("counter").metadata_ == {"n": threads * each}  # type: ignore[union-attr]


def test_a_statement_that_takes_too_long_is_a_storage_error(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url, statement_timeout=2) as db:
        with pytest.raises(psycopg.errors.QueryCanceled), db.transaction() as raw:
            raw.execute("SELECT pg_sleep(60)")
        db.register_agent("a", "t")


def test_the_longest_timeouts_are_those_that_the_server_counts(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url, statement_timeout=2_147_483, busy_timeout=2_147_483) as db, db.transaction() as raw:
        for name in ("statement_timeout", "lock_timeout"):
            assert raw.execute("SELECT setting FROM pg_settings WHERE name = %s", (name,)).fetchone() == ("2147483000",)


def test_a_caught_conflict_of_a_domain_call_leaves_the_block_as_it_was(store: SwarmDB) -> None:
    with store.transaction():
        store.insert_event(EVENT, event_id="taken")
        with pytest.raises(SwarmDBError):
            store.insert_event(EVENT, event_id="taken")
        store.register_agent("a", "t")
        with pytest.raises(psycopg.errors.InvalidSavepointSpecification), store.transaction() as raw:
            raw.execute("RELEASE SAVEPOINT swarmdb_call")  # None of those that a call sets is left.

    assert len(store.get_events()) == 1
    assert store.get_agent("a") is not None


def test_a_caught_error_of_raw_sql_ends_the_block_and_says_why(store: SwarmDB) -> None:
    with pytest.raises(TransactionError, match="block of its own"), store.transaction() as raw:
        store.register_agent("a", "t")
        with suppress(psycopg.Error):
            raw.execute("SELECT nothing")
        store.register_agent("b", "t")
    assert store.list_agents() == []

    with store.transaction() as raw:
        store.register_agent("a", "t")
        with suppress(psycopg.Error), store.transaction():
            raw.execute("SELECT nothing")
        store.register_agent("b", "t")
    assert len(store.list_agents()) == 2


def test_a_time_that_no_datetime_holds_is_named_and_can_be_moved_away(postgres_url: str, store: SwarmDB) -> None:
    for name in ("bad", "good"):
        store.insert_event({**EVENT, "agent_id": name})
        store.store_memory("s", "semantic", name, 1, ttl_hours=1)
    run(postgres_url, "UPDATE agent_events SET timestamp = 'infinity' WHERE agent_id = 'bad'")
    run(postgres_url, "UPDATE session_memory SET timestamp = '-infinity' WHERE key = 'bad'")
    with pytest.raises(CorruptDataError, match=r"agent_events\.timestamp of the row with id=1.*'infinity'"):
        store.get_events()
    with pytest.raises(CorruptDataError, match=r"session_memory\.timestamp"):
        store.get_memory("s", "semantic", "bad")
    assert store.get_memory("s", "semantic", "good") == 1
    with store.transaction():
        with pytest.raises(CorruptDataError):
            store.list_memories("s")
        store.register_agent("a", "t")

    assert [fault.column for fault in store.check().undecodable] == ["timestamp", "timestamp"]
    assert store.check(quarantine=True).quarantined == 2
    assert [event.agent_id for event in store.get_events()] == ["good"]
    assert [memory.key for memory in store.list_memories("s")] == ["good"]
    assert run(postgres_url, "SELECT timestamp::text FROM agent_events_quarantine") == [("infinity",)]


def test_vacuum_by_a_role_that_may_not_says_so(postgres_url: str, store: SwarmDB) -> None:
    store.register_agent("a", "t")
    role = f"role_{uuid4().hex[:12]}"
    url = make_url(postgres_url).update_query_dict({"options": f"-c role={role}"})
    run(postgres_url, f"CREATE ROLE {role}")
    try:
        run(postgres_url, f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        with SwarmDB(url=url) as other:
            with pytest.raises(StorageError, match=r"only the owner may vacuum agent_events, .*; nothing was done"):
                other.vacuum()
            for table in [str(model.__tablename__) for model in TABLES[1:]]:
                run(postgres_url, f"ALTER TABLE {table} OWNER TO {role}")
            with pytest.raises(StorageError, match=r"may vacuum agent_events; nothing"):
                other.vacuum()
            run(postgres_url, f"ALTER TABLE agent_events OWNER TO {role}")
            other.vacuum()
    finally:
        run(postgres_url, f"REASSIGN OWNED BY {role} TO CURRENT_USER")
        run(postgres_url, f"DROP OWNED BY {role}")
        run(postgres_url, f"DROP ROLE {role}")


def test_text_in_another_order_is_refused(postgres_url: str, store: SwarmDB) -> None:
    run(postgres_url, 'ALTER TABLE agent_registry ALTER agent_id TYPE TEXT COLLATE "default"')
    run(postgres_url, "UPDATE schema_info SET value = '2.0.0' WHERE key = 'version'")
    with pytest.raises(SchemaError, match=r'agent_registry.*agent_id \(TEXT, not TEXT COLLATE "C"\)'):
        SwarmDB(url=postgres_url)


def test_an_id_that_no_index_can_hold_is_a_storage_error(store: SwarmDB) -> None:
    noise = "".join(chr(0x4E00 + number * 7919 % 20000) for number in range(3000))  # It can't be compressed either.
    with pytest.raises(StorageError, match="index"):
        store.register_agent(noise, "t")
    store.register_agent("a", "t")


# Rows that can't be decoded


def test_a_value_that_cannot_be_decoded_is_named_and_can_be_moved_away(postgres_url: str, store: SwarmDB) -> None:
    for name in ("bad", "good"):
        store.insert_event({**EVENT, "agent_id": name})
        store.register_agent(name, "t")
    run(postgres_url, "UPDATE agent_events SET metadata = '[1]' WHERE agent_id = 'bad'")
    run(postgres_url, "UPDATE agent_registry SET spawn_time = 1e300 WHERE agent_id = 'bad'")
    with pytest.raises(CorruptDataError, match=r"agent_events\.metadata.*JSON object"):
        store.get_events()
    with pytest.raises(CorruptDataError, match=r"agent_registry\.spawn_time"):
        store.get_agent("bad")

    assert len(store.check().undecodable) == 2
    assert store.check(quarantine=True).quarantined == 2
    assert [event.agent_id for event in store.get_events()] == ["good"]
    assert store.get_agent("bad") is None
    assert store.check().ok
    assert run(postgres_url, "SELECT metadata::text FROM agent_events_quarantine") == [("[1]",)]
    assert run(postgres_url, "SELECT spawn_time FROM agent_registry_quarantine") == [(1e300,)]


# The pool, and a server that goes away


def test_the_pool_opens_as_many_connections_as_it_may(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url, pool_size=2, busy_timeout=0.2) as db:
        inside, leave = threading.Barrier(3), threading.Event()

        def hold() -> None:
            with db.session(readonly=True):
                inside.wait()
                leave.wait()

        holders = [threading.Thread(target=hold) for _ in range(2)]
        for holder in holders:
            holder.start()
        inside.wait()
        with pytest.raises(BusyError, match="all 2 connections"):
            db.get_agent("a")
        leave.set()
        for holder in holders:
            holder.join()
    with SwarmDB(url=postgres_url, pool_size=2) as db:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: db.insert_event(EVENT), range(100)))
        name = make_url(postgres_url).database
        ours = run(postgres_url, "SELECT count(*) FROM pg_stat_activity WHERE datname = %s", name)
        assert ours[0][0] <= 3  # The two, and the one that asks.
        assert len(db.get_events(limit=1000)) == 100


def test_a_read_goes_on_where_its_connection_was_lost_and_a_write_tells(postgres_url: str, store: SwarmDB) -> None:
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    lose = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"
    store.register_agent("a", "t")
    run(postgres_url, lose)
    assert store.get_agent("a") is not None

    run(postgres_url, lose)
    with pytest.raises(StorageError):
        store.register_agent("b", "t")
    assert [agent.agent_id for agent in store.list_agents()] == ["a"]  # It is never repeated in silence.
    store.register_agent("b", "t")

    with pytest.raises(SwarmDBError), store.transaction():
        store.register_agent("c", "t")
        run(postgres_url, lose)
        store.register_agent("d", "t")
    assert {agent.agent_id for agent in store.list_agents()} == {"a", "b"}


def test_the_first_error_of_a_lost_connection_is_told(postgres_url: str, store: SwarmDB) -> None:
    waiting = "datname = current_database() AND wait_event_type = 'Lock'"

    def lose() -> None:
        while not run(postgres_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {waiting}"):
            time.sleep(0.01)

    store.insert_event(EVENT)
    with SwarmDB(url=postgres_url) as other, other.transaction() as conn:
        conn.execute("LOCK agent_events")
        thread = threading.Thread(target=lose)
        with pytest.raises(StorageError, match="terminating connection"), store.transaction():
            store.register_agent("a", "t")
            thread.start()
            store.insert_event(EVENT)
        thread.join()
    assert store.list_agents() == []


def test_an_idle_connection_that_no_longer_answers_is_closed_and_a_write_takes_another(
    postgres_url: str, store: SwarmDB, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "_TRUSTED", 0)
    store.register_agent("a", "t")
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    assert len(run(postgres_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")) == 1
    store.register_agent("b", "t")
    gc.collect()
    assert caplog.records == []
    assert set(store._connections._open) == set(store._connections._idle)


def test_an_interrupt_while_a_connection_is_closed_takes_no_place_in_the_pool(postgres_url: str) -> None:
    def interrupt(frame: FrameType, kind: str, argument: object) -> None:
        if kind == "call" and frame.f_code.co_name == "invalidate":
            raise KeyboardInterrupt  # Python then takes the profile function away.

    with SwarmDB(url=postgres_url, pool_size=1, busy_timeout=0) as db:
        db.register_agent("a", "t")
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        run(postgres_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        sys.setprofile(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt) as kept:
                db.insert_event(EVENT)
        finally:
            sys.setprofile(None)
        assert len(db.list_agents()) == 1
        assert kept.value is not None


def test_of_many_idle_connections_that_were_lost_one_failed_call_is_enough(postgres_url: str, store: SwarmDB) -> None:
    together = threading.Barrier(4)
    store.register_agent("a", "t")  # The first write looks for old rows, and what reads goes on by itself.

    def hold(number: int) -> None:
        with store.session(readonly=True):
            together.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(4)))
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    assert len(run(postgres_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")) == 4
    with pytest.raises(StorageError):
        store.register_agent("a", "t")
    store.register_agent("b", "t")


def test_threads_that_hold_a_raw_connection_read_beside_it_however_small_the_pool(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url, pool_size=1, busy_timeout=5) as db:
        db.register_agent("a", "t")

        def read(number: int) -> object:
            db._get_connection().execute("SELECT 1")
            return db.get_agent("a")

        with ThreadPoolExecutor(4) as pool:
            assert None not in list(pool.map(read, range(8)))
        db._get_connection().close()  # type: ignore[attr-defined]
        assert db._get_connection().execute("SELECT 1").fetchone() == (1,)


def test_what_a_block_sets_on_its_connection_ends_with_it(store: SwarmDB) -> None:
    store.register_agent("a", "t")
    with store.transaction() as raw:
        raw.row_factory = dict_row  # type: ignore[attr-defined]
        assert store.get_agent("a") is not None
        assert store.store_memory("s", "semantic", "k", 1) > 0
        assert raw.execute("SELECT agent_id FROM agent_registry").fetchone() == {"agent_id": "a"}
    with store.transaction() as raw:
        assert raw.execute("SELECT agent_id FROM agent_registry").fetchone() == ("a",)


@contextlib.contextmanager
def interrupted_as_it_waits(url: str, exception: type[BaseException]) -> Iterator[None]:
    """Have a signal's handler raise *exception* in this thread, once the server says that somebody waits for a lock."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    def interrupt(number: int, frame: object) -> None:
        raise exception

    def watch() -> None:
        while not run(url, waiting):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    while run(url, waiting):  # Of a connection that was given up, until the server notices.
        time.sleep(0.01)
    previous = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(exception):
            yield
    finally:
        watcher.join()
        signal.signal(signal.SIGUSR1, previous)


class SoftLimitError(Exception):
    """What a job queue raises in a job that takes too long."""


@pytest.mark.parametrize("exception", [SoftLimitError, KeyboardInterrupt])
def test_an_interrupt_in_the_middle_of_a_statement_leaves_the_pool_whole(
    postgres_url: str, exception: type[BaseException]
) -> None:
    with SwarmDB(url=postgres_url, pool_size=1) as db, SwarmDB(url=postgres_url) as other:
        db.register_agent("a", "t")
        for _ in range(3):
            with other.transaction():
                other.update_agent_status("a", "running")
                with interrupted_as_it_waits(postgres_url, exception):
                    db.update_agent_status("a", "complete")
            assert db.get_agent("a") is not None
            db.register_agent("b", "t")


def test_an_interrupt_that_is_caught_in_a_block_leaves_it_as_it_was(postgres_url: str, store: SwarmDB) -> None:
    store.insert_event(EVENT)
    with SwarmDB(url=postgres_url) as other, store.transaction():
        store.register_agent("a", "t")
        with other.transaction() as conn:
            conn.execute("LOCK agent_events")
            with interrupted_as_it_waits(postgres_url, KeyboardInterrupt):
                store.insert_event(EVENT)
        store.register_agent("b", "t")
    assert len(store.list_agents()) == 2


def test_an_interrupt_of_a_batch_ends_its_connection_and_the_block_though_it_is_caught(
    postgres_url: str, store: SwarmDB
) -> None:
    with SwarmDB(url=postgres_url) as other, other.transaction() as conn:
        conn.execute("LOCK agent_events")
        with pytest.raises(TransactionError, match="ended inside"), store.transaction():
            store.register_agent("a", "t")
            with interrupted_as_it_waits(postgres_url, KeyboardInterrupt):
                store.insert_events([EVENT] * 3)
            # What the batch had not fetched would be taken for the answers to what comes next.
            store.register_agent("b", "t")
    assert store.list_agents() == []


@pytest.mark.parametrize("table", ["agent_events", "task_metrics"])
def test_a_second_interrupt_of_a_batch_leaves_no_connection_that_gives_the_answers_to_it(
    postgres_url: str, store: SwarmDB, table: str
) -> None:
    def interrupt_again(frame: FrameType, kind: str, argument: object) -> None:
        if kind == "call" and "moai_flow" in frame.f_code.co_filename:  # Whatever would look after the first one.
            raise KeyboardInterrupt  # Python then takes the profile function away.

    def interrupt(*_: object) -> None:
        sys.setprofile(interrupt_again)
        raise KeyboardInterrupt

    with SwarmDB(url=postgres_url) as other, other.transaction() as conn:
        conn.execute(f"LOCK {table}")
        with pytest.raises(TransactionError, match="ended inside"), store.transaction():
            store.register_agent("a", "t")
            try:
                with interrupted_as_it_waits(postgres_url, KeyboardInterrupt):
                    signal.signal(signal.SIGUSR1, interrupt)
                    if table == "agent_events":
                        store.insert_events([EVENT] * 3)
                    else:
                        store.store_task_metrics(
                            [{"task_id": "t", "agent_id": "a", "duration_ms": 1, "result": "success"}] * 3
                        )
            finally:
                sys.setprofile(None)
    store.register_agent("b", "t")
    assert run(postgres_url, "SELECT agent_id FROM agent_registry") == [("b",)]


@pytest.mark.parametrize("moment", [("return", "Pipeline.__enter__"), ("call", "Pipeline.__exit__")])
@pytest.mark.parametrize("error_is", ["raised", "caught"])
def test_a_batch_of_the_callers_own_that_was_interrupted_leaves_none_either(
    postgres_url: str, store: SwarmDB, moment: tuple[str, str], error_is: str
) -> None:
    def interrupt(frame: FrameType, kind: str, argument: object) -> None:
        if (kind, frame.f_code.co_qualname) == moment:
            raise KeyboardInterrupt  # Python then takes the profile function away.

    row = (
        "INSERT INTO agent_registry (agent_id, agent_type, status, spawn_time) VALUES (%s, 't', 'running', 1)",
        ["a"],
    )
    # Without its pipeline's end, psycopg raises an error of its own.
    caught = (KeyboardInterrupt, AssertionError)
    with pytest.raises(TransactionError if error_is == "caught" else caught), store.transaction() as raw:
        cursor = raw.cursor()
        sys.setprofile(interrupt)
        try:
            cursor.executemany(row[0], [row[1]] * 2)
        except caught:
            if error_is == "raised":
                raise
        finally:
            sys.setprofile(None)
    store.register_agent("b", "t")
    assert run(postgres_url, "SELECT agent_id FROM agent_registry") == [("b",)]


def test_a_place_in_the_pool_that_nobody_has_any_more_is_free_again() -> None:
    permits = Permits(Limit(connections=1, patience=0))
    permit = permits.take()
    assert permit is not None
    assert permits.take() is None
    del permit  # As an interrupt would leave it.
    assert permits.take() is not None


def test_errors_that_somebody_keeps_take_no_place_in_the_pool(postgres_server: Server, postgres_url: str) -> None:
    name, elsewhere = make_url(postgres_url).database, postgres_server.url("postgres")
    errors = []
    with SwarmDB(url=postgres_url, pool_size=1, busy_timeout=0) as db:
        run(elsewhere, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        run(elsewhere, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        for _ in range(3):
            try:
                db.register_agent("a", "t")
            except StorageError as error:
                errors.append(error)
        assert not any(isinstance(error, BusyError) for error in errors)
        run(elsewhere, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        assert db.list_agents() == []
    assert len(errors) == 3


def test_a_call_that_waits_for_a_place_has_it_when_another_gives_up_its_connection(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url, pool_size=1, busy_timeout=3600) as db:
        permits = db._connections._permits
        assert permits is not None
        thread = threading.Thread(target=db.list_agents)
        with suppress(KeyboardInterrupt), db.transaction():
            thread.start()
            while not permits._changed._waiters:  # type: ignore[attr-defined]
                time.sleep(0.001)
            raise KeyboardInterrupt
        thread.join()


def test_a_call_that_waits_for_a_place_while_the_database_is_closed_is_refused(postgres_url: str) -> None:
    db = SwarmDB(url=postgres_url, pool_size=1)
    refused = []

    def read() -> None:
        try:
            db.list_agents()
        except ClosedError as error:
            refused.append(error)

    permits = db._connections._permits
    assert permits is not None
    with db.transaction():
        thread = threading.Thread(target=read)
        thread.start()
        while not permits._changed._waiters:  # type: ignore[attr-defined]
            time.sleep(0.001)
        db.close()
    thread.join()
    assert len(refused) == 1


def test_threads_that_wait_for_a_place_never_have_more_than_there_are() -> None:
    permits = Permits(Limit(connections=2, patience=30))
    interval = sys.getswitchinterval()
    inside: list[int] = []
    most = []

    def work(number: int) -> None:
        for _ in range(300):
            permit = permits.take()
            assert permit is not None
            inside.append(number)
            most.append(len(inside))
            inside.remove(number)
            permit.give_back()
            permit.give_back()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert max(most) <= 2


def test_a_fork_leaves_the_connections_to_the_parent(postgres_url: str, store: SwarmDB) -> None:
    store.register_agent("a", "t")
    raw = store._get_connection()
    raw.execute("SELECT 1")
    raw.rollback()
    child = os.fork()
    if child == 0:
        store.register_agent("child", "t")
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    store.register_agent("b", "t")
    assert raw.execute("SELECT count(*) FROM agent_registry").fetchone() == (3,)
    raw.rollback()


def test_a_forked_child_has_all_places_of_the_pool(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url, pool_size=1, busy_timeout=0) as db:
        with db.transaction():
            db.register_agent("a", "t")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # From 3.12 on, forking beside threads warns.
                child = os.fork()
            if child == 0:
                os._exit(len(db.list_agents()))
            assert os.waitpid(child, 0)[1] == 0
        assert len(db.list_agents()) == 1


def test_deleting_a_key_many_times_at_once_is_no_error(store: SwarmDB) -> None:
    for number in range(20):
        store.store_memory("s", "semantic", f"k-{number}", 1)
    with ThreadPoolExecutor(4) as pool:
        deleted = list(pool.map(lambda number: store.delete_memory("s", "semantic", f"k-{number % 20}"), range(80)))
    assert sum(deleted) == 20
    assert store.list_memories("s") == []


WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def test_of_two_that_delete_a_key_at_once_one_is_told_that_it_was_live(postgres_url: str, store: SwarmDB) -> None:
    store.store_memory("s", "semantic", "k", 1)
    with ThreadPoolExecutor(1) as pool:
        with store.transaction():
            assert store.delete_memory("s", "semantic", "k") is True
            other = pool.submit(store.delete_memory, "s", "semantic", "k")
            while run(postgres_url, WAITING) == [(0,)]:
                assert not other.done()

        assert other.result() is False


@pytest.mark.parametrize("before", [[], [0, 1]])
def test_a_value_that_is_stored_while_its_key_is_deleted_stays(
    postgres_url: str, store: SwarmDB, before: list[int]
) -> None:
    for value in before:
        store.store_memory("s", "semantic", "k", value)
    with ThreadPoolExecutor(1) as pool:
        with store.transaction() as conn:
            conn.execute("LOCK TABLE session_memory IN EXCLUSIVE MODE")  # It keeps a DELETE waiting, but no SELECT.
            deleting = pool.submit(store.delete_memory, "s", "semantic", "k")
            while run(postgres_url, WAITING) == [(0,)]:
                assert not deleting.done()
            store.store_memory("s", "semantic", "k", 2)

        assert deleting.result() is bool(before)
    assert [memory.value for memory in store.memory_history("s", "semantic", "k")] == [2]


def write_until_told(url: str, number: int, opened: Barrier, stop: Any, results: Any, steps: Any) -> None:
    """Write, and note in *steps* how far this one is: 1 has written, 2 has met the stop, 3 has written after it."""
    acknowledged: list[str] = []
    failures: list[str] = []
    after = 0
    with SwarmDB(url=url) as db:
        opened.wait()
        while not stop.is_set():
            name = f"{number}-{uuid4()}"
            try:
                acknowledged.append(db.insert_event(EVENT, event_id=name))
                after += 1
                steps[number] = 3 if failures else 1
            except SwarmDBError:
                failures.append(name)
                after = 0
                steps[number] = 2
                time.sleep(0.01)
            except BaseException as error:
                results.put((acknowledged, failures, after, repr(error)))
                raise
    results.put((acknowledged, failures, after, None))


def test_8_writing_processes_go_on_after_the_server_was_stopped_and_started(
    postgres_server: Server, postgres_url: str
) -> None:
    SwarmDB(url=postgres_url).close()
    context = multiprocessing.get_context("spawn")
    opened, stop, results = context.Barrier(9), context.Event(), context.SimpleQueue()
    steps = context.Array("b", 8, lock=False)

    def wait_for(step: int) -> None:
        while not all(one == step for one in steps):
            time.sleep(0.01)

    writers = [
        context.Process(target=write_until_told, args=(postgres_url, number, opened, stop, results, steps))
        for number in range(8)
    ]
    for writer in writers:
        writer.start()
    found: list[Any] = []
    collector = threading.Thread(target=lambda: found.extend(results.get() for _ in writers))
    collector.start()
    opened.wait()
    wait_for(1)
    postgres_server.stop()
    wait_for(2)
    postgres_server.start()
    wait_for(3)
    stop.set()
    collector.join()
    for writer in writers:
        writer.join()

    assert [unexpected for *_, unexpected in found if unexpected is not None] == []
    acknowledged = {name for names, *_ in found for name in names}
    with SwarmDB(url=postgres_url) as db:
        there = {event.event_id for event in db.iter_events()}
    assert acknowledged <= there
    # Each met the stop, and wrote after it.
    assert [(len(failures), after) for _, failures, after, _ in found if not failures or not after] == []
