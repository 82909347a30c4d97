"""Watching the event log: in order, without a gap or a repetition, whoever writes it."""

import json
import multiprocessing
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from conftest import url_of
from moai_flow.memory import (
    AgentEvent,
    BusyError,
    ClosedError,
    CorruptDataError,
    EventData,
    EventType,
    InvalidInputError,
    StorageError,
    SwarmDB,
    TransactionError,
)
from moai_flow.memory.operations import events as internals
from postgres import Server

SPAWN = multiprocessing.get_context("spawn")


def event(agent_id: str = "a", event_type: EventType = EventType.SPAWN) -> EventData:
    return {"event_type": event_type, "agent_id": agent_id, "agent_type": "t"}


def agents(events: Iterable[AgentEvent], count: int) -> list[str]:
    return [found.agent_id for found in islice(events, count)]


class Watcher:
    """A watcher that is asked for one poll at a time, so that a test sees when there is nothing."""

    def __init__(self, db: SwarmDB, after: int = 0, poll: float = 0.5) -> None:
        self._db = db
        self._watch = internals._Watch(internals._after(frozenset()), {}, poll)
        self.place = internals._Place(after, after)

    def poll(self) -> list[str]:
        events, self.place = self._db._poll(self._watch, self.place)
        return [found.agent_id for found in events]


# Order and position


def test_events_come_in_the_order_of_their_ids_whatever_their_time(db: SwarmDB) -> None:
    for day in (3, 1, 2):
        db.insert_event({**event(str(day)), "timestamp": f"2025-01-0{day}T00:00:00Z"})

    found = list(islice(db.watch_events(0), 3))
    assert [one.agent_id for one in found] == ["3", "1", "2"]
    assert [type(one) for one in found] == [AgentEvent] * 3
    assert {one.event_id: dict(one) for one in found} == {one.event_id: dict(one) for one in db.get_events()}


def test_it_begins_with_what_is_inserted_after_the_call(db: SwarmDB) -> None:
    db.insert_event(event("before"))
    events = db.watch_events()
    db.insert_event(event("after"))

    assert agents(events, 1) == ["after"]


def test_of_an_empty_log_it_begins_with_the_first(db: SwarmDB) -> None:
    events = db.watch_events()
    db.insert_event(event("first"))

    assert agents(events, 1) == ["first"]


def test_new_events_come_while_it_waits(db: SwarmDB) -> None:
    events = db.watch_events(poll=0.001)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(agents, events, 250)
        for number in range(50):
            db.insert_event(event(f"{number}"))
            db.insert_events(event(f"{number}-{at}") for at in range(4))

        assert found.result() == [
            name for number in range(50) for name in (f"{number}", *(f"{number}-{at}" for at in range(4)))
        ]


@pytest.mark.parametrize("count", [1, 99, 100, 101, 250])
def test_pages_follow_each_other_and_so_do_polls(db: SwarmDB, count: int) -> None:
    db.insert_events(event(str(number)) for number in range(count))
    events = db.watch_events(0)

    assert agents(events, count) == [str(number) for number in range(count)]
    db.insert_events(event(f"more-{number}") for number in range(count))
    assert agents(events, count) == [f"more-{number}" for number in range(count)]


def test_it_goes_on_from_a_kept_id_or_the_event_itself(db: SwarmDB) -> None:
    db.insert_events(event(str(number)) for number in range(6))
    last = list(islice(db.watch_events(0), 2))[-1]
    kept = json.loads(json.dumps(last.id))

    assert agents(db.watch_events(kept), 4) == ["2", "3", "4", "5"]
    assert agents(db.watch_events(last), 4) == ["2", "3", "4", "5"]


def test_an_id_stays_a_position_though_its_event_is_gone(db: SwarmDB) -> None:
    db.insert_events(event(str(number)) for number in range(3))
    kept = [found.id for found in islice(db.watch_events(0), 3)]
    db.cleanup_old_events(0)
    with db.transaction() as raw:
        raw.execute("DELETE FROM agent_events")
    events = db.watch_events(kept[-1])
    db.insert_event(event("new"))  # Its number is a new one as well, or it would not come.

    assert agents(events, 1) == ["new"]


def test_what_was_rolled_back_never_comes(db: SwarmDB) -> None:
    db.insert_event(event("first"))
    with suppress(KeyError), db.transaction():
        db.insert_event(event("undone"))
        raise KeyError
    with db.transaction():
        with suppress(KeyError), db.session():
            db.insert_event(event("undone"))
            raise KeyError
        db.insert_event(event("second"))
    db.insert_event(event("third"))

    assert agents(db.watch_events(0), 3) == ["first", "second", "third"]


def test_what_is_not_committed_does_not_come(db: SwarmDB) -> None:
    inserted, seen = threading.Event(), threading.Event()

    def write() -> None:
        with db.transaction():
            db.insert_event(event("later"))
            inserted.set()
            if not db._location.is_in_memory:  # There, it keeps the reader waiting.
                seen.wait()

    watcher = Watcher(db)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        inserted.wait()
        if not db._location.is_in_memory:
            assert watcher.poll() == []
        seen.set()
        writing.result()

    assert watcher.poll() == ["later"]
    assert watcher.poll() == []


# Filters


@pytest.fixture
def mixed(db: SwarmDB) -> SwarmDB:
    for agent_id in ("a", "B", "ä"):
        for event_type in EventType:
            db.insert_event(event(agent_id, event_type))
    return db


ALL = [(agent_id, event_type) for agent_id in ("a", "B", "ä") for event_type in ("spawn", "complete", "error")]


@pytest.mark.parametrize("types", [None, "error", EventType.ERROR, ["error", "spawn"], {EventType.SPAWN}])
def test_filters_combine(mixed: SwarmDB, types: Any) -> None:
    mixed.insert_event(event("end"))
    for agent_ids in (None, "a", "ä", ("a", "a", "ä", "", "no one"), {"a": 1, "B": 2}.keys()):
        for exclude_agent in (None, "a", ""):
            wanted = [
                (agent_id, kind)
                for agent_id, kind in ALL
                if (types is None or kind in ([types] if isinstance(types, str) else types))
                and (agent_ids is None or agent_id in ([agent_ids] if isinstance(agent_ids, str) else agent_ids))
                and agent_id != exclude_agent
            ]
            events = mixed.watch_events(0, types=types, agent_ids=agent_ids, exclude_agent=exclude_agent)
            assert [(found.agent_id, found.event_type) for found in islice(events, len(wanted))] == wanted


def test_what_a_filter_leaves_out_is_left_out(db: SwarmDB) -> None:
    db.insert_events(event(agent_id) for agent_id in "abcabc")
    names = (name for name in ["a", "b", "%", "'; --", '"', "x" * 100_000])

    assert agents(db.watch_events(0, agent_ids=names, exclude_agent="b"), 2) == ["a", "a"]
    assert agents(db.watch_events(0, agent_ids="c", types=("spawn", "error")), 2) == ["c", "c"]


def test_an_event_between_many_that_do_not_match_comes(db: SwarmDB) -> None:
    db.insert_events(event(str(number)) for number in range(500))

    assert agents(db.watch_events(0, agent_ids=["499", "250"]), 2) == ["250", "499"]


def test_a_type_that_a_row_brought_is_a_filter(db: SwarmDB) -> None:
    db.insert_events([event("a"), event("b"), event("c")])
    with db.transaction() as raw:
        raw.execute("UPDATE agent_events SET event_type = 'decision' WHERE agent_id IN ('b', 'c')")
    (found,) = islice(db.watch_events(0, agent_ids="b"), 1)

    assert found.event_type == "decision"
    assert agents(db.watch_events(0, types=found.event_type), 2) == ["b", "c"]
    assert agents(db.watch_events(0, types=["spawn", found.event_type]), 3) == ["a", "b", "c"]


def test_any_number_of_names_is_one_statement(file_db: SwarmDB) -> None:
    file_db.insert_event(event("7"))
    for count in (1, 2, 3, 50_000):
        assert agents(file_db.watch_events(0, agent_ids=map(str, range(7, 7 + count))), 1) == ["7"]
    before = len(file_db._programs), internals._after.cache_info().currsize
    for count in (4, 5, 6):
        assert agents(file_db.watch_events(0, agent_ids=map(str, range(7, 7 + count))), 1) == ["7"]

    assert (len(file_db._programs), internals._after.cache_info().currsize) == before


# Refusals


@pytest.fixture(scope="module")
def empty() -> Iterator[SwarmDB]:
    with SwarmDB(":memory:") as db:
        yield db


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"after": -1}, "after: got -1"),
        ({"after": True}, "after: got True"),
        ({"after": 1.0}, "after: got 1.0"),
        ({"after": "7"}, "after: got '7'"),
        ({"after": 2**63}, "after"),
        ({"after": AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t")}, "after: .*was read from"),
        ({"types": "explode"}, "types: got 'explode', expected one of 'spawn', 'complete', 'error'"),
        ({"types": ["spawn", "explode"]}, r"types\[1\]: got 'explode'"),
        ({"types": [None]}, r"types\[0\]: got None"),
        ({"types": []}, r"types: got \[\], expected at least one, or None for any"),
        ({"types": 7}, "types: got 7"),
        ({"types": EventType.read("a\0b")}, "types"),
        ({"agent_ids": ()}, r"agent_ids: got \(\), expected at least one, or None for any"),
        ({"agent_ids": 7}, "agent_ids: got 7, expected one, a collection of them, or None for any"),
        ({"agent_ids": ["a", None]}, r"agent_ids\[1\]: got None, expected text"),
        ({"agent_ids": ["a", "\ud800"]}, r"agent_ids\[1\].*surrogates"),
        ({"agent_ids": "\0"}, "agent_ids"),
        ({"exclude_agent": 7}, "exclude_agent: got 7"),
        ({"exclude_agent": "\0"}, "exclude_agent"),
        ({"poll": 0}, "poll: got 0"),
        ({"poll": -1}, "poll: got -1"),
        ({"poll": float("nan")}, "poll: got nan"),
        ({"poll": float("inf")}, "poll: got inf"),
        ({"poll": 3601}, "poll: got 3601"),
        ({"poll": "1"}, "poll: got '1'"),
        ({"poll": None}, "poll: got None"),
    ],
)
def test_bad_arguments_are_refused_at_once(empty: SwarmDB, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        empty.watch_events(**arguments)


def test_it_may_sleep_for_an_hour(empty: SwarmDB) -> None:
    empty.insert_event(event("a"))

    assert next(empty.watch_events(0, poll=3600)).agent_id == "a"


def test_an_empty_name_is_a_filter(db: SwarmDB) -> None:
    db.insert_event(event("a"))

    assert agents(db.watch_events(0, agent_ids=["", "a"], exclude_agent=""), 1) == ["a"]


Block = Callable[[SwarmDB], Any]
BLOCKS: list[Block] = [SwarmDB.transaction, SwarmDB.session, lambda db: db.session(readonly=True)]


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_refused_inside_a_transaction(db: SwarmDB, block: Block) -> None:
    db.insert_events(event(str(number)) for number in range(3))
    waiting, begun = db.watch_events(0), db.watch_events(0)
    next(begun)
    with block(db):
        for after in (None, 0):
            with pytest.raises(TransactionError, match="inside a transaction"):
                db.watch_events(after)
        for events in (waiting, begun):  # The second has more of its page at hand, which makes no difference.
            with pytest.raises(TransactionError, match="inside a transaction"):
                next(events)

    assert agents(db.watch_events(1), 2) == ["1", "2"]


def test_transactions_between_events_are_fine(db: SwarmDB) -> None:
    db.insert_event(event("0"))
    seen = []
    for found in db.watch_events(0):
        seen.append(found.agent_id)
        if len(seen) == 5:
            break
        with db.transaction():
            db.insert_event(event(str(len(seen))))

    assert seen == ["0", "1", "2", "3", "4"]


def test_another_threads_transaction_is_none_of_its_business(file_db: SwarmDB) -> None:
    file_db.insert_event(event("committed"))
    with file_db.transaction(), ThreadPoolExecutor(1) as pool:
        file_db.insert_event(event("pending"))
        assert pool.submit(lambda: agents(file_db.watch_events(0), 1)).result() == ["committed"]


def test_it_does_not_wait_for_what_this_thread_left_open(db: SwarmDB) -> None:
    raw = db._get_connection()
    events = db.watch_events(0)
    raw.execute("UPDATE agent_registry SET agent_type = 't'")
    with pytest.raises(TransactionError, match=r"commit\(\) it or rollback\(\) first"):
        next(events)
    with pytest.raises(TransactionError, match=r"commit\(\) it or rollback\(\) first"):
        db.watch_events(0)
    raw.rollback()
    db.insert_event(event("a"))

    assert agents(db.watch_events(0), 1) == ["a"]


def test_it_does_not_wait_for_another_task_of_this_thread(db: SwarmDB) -> None:
    import asyncio

    async def hold(inside: asyncio.Event, leave: asyncio.Event) -> None:
        with db.transaction():
            inside.set()
            await leave.wait()

    async def main() -> None:
        inside, leave = asyncio.Event(), asyncio.Event()
        holder = asyncio.create_task(hold(inside, leave))
        await inside.wait()
        with pytest.raises(BusyError, match="another asyncio task"):
            db.watch_events(0)
        leave.set()
        await holder

    asyncio.run(main())


def test_after_close_the_next_poll_says_so(db: SwarmDB) -> None:
    db.insert_events(event(str(number)) for number in range(2))
    events, waiting = db.watch_events(0), db.watch_events(2)
    first = next(events).agent_id
    db.close()

    assert [first, next(events).agent_id] == ["0", "1"]  # It has been read already.
    for watcher in (events, waiting):
        with pytest.raises(ClosedError):
            next(watcher)
        with pytest.raises(StopIteration):
            next(watcher)
    with pytest.raises(ClosedError):
        db.watch_events(0)


def test_it_ends_while_it_waits_when_another_thread_closes(db: SwarmDB) -> None:
    db.insert_event(event())
    events = db.watch_events(0, poll=0.001)
    next(events)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, events)
        db.close()
        with pytest.raises(ClosedError):
            waiting.result()


def test_it_holds_no_connection_between_polls(file_db: SwarmDB) -> None:
    file_db.insert_events(event() for _ in range(150))
    events = file_db.watch_events(0)
    next(events)

    file_db.vacuum()  # It would fail with a read under way.
    assert len(list(islice(events, 149))) == 149


def test_it_takes_constant_memory(file_db: SwarmDB) -> None:
    file_db.insert_events({**event(), "metadata": {"text": "x" * 1000}} for _ in range(10_000))
    tracemalloc.start()
    count = sum(1 for _ in islice(file_db.watch_events(0), 10_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert count == 10_000
    assert peak < 3_000_000  # All of them would take more than 10 MB.


# Events that can't be decoded


def test_one_that_cannot_be_decoded_is_named_after_all_before_it(db: SwarmDB) -> None:
    db.insert_events(event(str(number)) for number in range(8))
    with db.transaction() as raw:
        raw.execute("UPDATE agent_events SET metadata = '[1]' WHERE agent_id IN ('3', '4', '7')")

    seen: list[str] = []
    faults, after = [], 0
    for _ in range(3):
        with pytest.raises(CorruptDataError, match=r"agent_events\.metadata of the row with id=\d:") as caught:
            seen.extend(found.agent_id for found in db.watch_events(after))
        after = caught.value.row["id"]
        faults.append(after)
    db.insert_event(event("new"))
    seen += agents(db.watch_events(after), 1)

    assert seen == ["0", "1", "2", "5", "6", "new"]
    assert faults == [4, 5, 8]


def test_one_that_the_filter_leaves_out_disturbs_nobody(db: SwarmDB) -> None:
    db.insert_events(event(agent_id) for agent_id in ("good", "bad", "good"))
    with db.transaction() as raw:
        raw.execute("UPDATE agent_events SET metadata = '[1]' WHERE agent_id = 'bad'")

    assert agents(db.watch_events(0, agent_ids="good"), 2) == ["good", "good"]
    assert agents(db.watch_events(0, exclude_agent="bad"), 2) == ["good", "good"]


# On PostgreSQL, where transactions commit out of the order of ids


@pytest.fixture
def store(postgres_url: str) -> Iterator[SwarmDB]:
    with SwarmDB(url=postgres_url) as db:
        yield db


def connect(url: str, **options: Any) -> "psycopg.Connection[Any]":
    """Return a connection of another program's, in its own transactions."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, **options)


INSERT = (
    "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp) "
    "VALUES (%s, 'spawn', %s, 't', now())"
)


def insert(connection: "psycopg.Connection[Any]", agent_id: str) -> None:
    connection.execute(INSERT, (agent_id, agent_id))


@pytest.mark.parametrize("ends", ["commit", "rollback", "close"])
def test_a_higher_id_waits_for_a_lower_one_that_may_still_come(postgres_url: str, store: SwarmDB, ends: str) -> None:
    store.insert_event(event("before"))
    watcher = Watcher(store)
    with closing(connect(postgres_url)) as first:
        insert(first, "lower")
        store.insert_event(event("higher"))
        assert [watcher.poll() for _ in range(5)] == [[]] * 5
        store.insert_event(event("highest"))
        assert watcher.poll() == []
        getattr(first, ends)()

    expected = ["before", *(["lower"] if ends == "commit" else []), "higher", "highest"]
    seen: list[str] = []
    while seen != expected:
        seen += watcher.poll()
        assert seen == expected[: len(seen)]
    assert watcher.poll() == []
    assert agents(store.watch_events(0), len(expected)) == expected


def test_it_waits_for_those_that_may_bring_a_lower_id_and_for_no_others(postgres_url: str, store: SwarmDB) -> None:
    watcher = Watcher(store)
    with closing(connect(postgres_url)) as first, closing(connect(postgres_url)) as second:
        insert(first, "1")
        store.insert_event(event("2"))
        assert watcher.poll() == []
        insert(second, "3")  # It begins while the watcher waits for the first, and is higher.
        store.insert_event(event("4"))
        first.commit()

        assert watcher.poll() == ["1", "2"]
        assert watcher.poll() == []
        second.commit()
        assert watcher.poll() == ["3", "4"]


def test_a_number_that_was_drawn_by_who_has_no_transaction_id_is_waited_for(postgres_url: str, store: SwarmDB) -> None:
    """The hole of snapshots: a number is drawn before the row is written, which is what a transaction id is for."""
    with connect(postgres_url, autocommit=True) as other:
        other.execute("""
            CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF NEW.agent_id = 'slow' THEN PERFORM pg_advisory_xact_lock(42); END IF; RETURN NEW; END $$
        """)
        other.execute("CREATE TRIGGER wait BEFORE INSERT ON agent_events FOR EACH ROW EXECUTE FUNCTION wait()")
        other.execute("SELECT pg_advisory_lock(42)")
        store.insert_event(event("first"))  # A sequence logs the first of every 32, which takes a transaction id.
        watcher = Watcher(store)
        waits = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(store.insert_event, event("slow"))
            while not (found := other.execute(waits).fetchall()):
                pass
            store.insert_event(event("higher"))
            identity = "SELECT backend_xid FROM pg_stat_activity WHERE pid = %s"
            assert other.execute(identity, found[0]).fetchone() == (None,)
            assert [watcher.poll() for _ in range(5)] == [[]] * 5
            other.execute("SELECT pg_advisory_unlock(42)")
            writing.result()

    assert watcher.poll() == ["first", "slow", "higher"]
    assert [found.id for found in islice(store.watch_events(0), 3)] == [1, 2, 3]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_transaction_that_is_prepared_meanwhile_is_still_waited_for(
    postgres_server: Server, postgres_url: str, store: SwarmDB, *, restarts: bool
) -> None:
    watcher = Watcher(store)
    with closing(connect(postgres_url)) as first:
        if first.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
            pytest.skip("the server prepares no transactions")
        insert(first, "lower")
        store.insert_event(event("higher"))
        assert watcher.poll() == []
        first.execute("PREPARE TRANSACTION 'swarm'")
    if restarts:  # It has another name then.
        postgres_server.stop()
        postgres_server.start()
    assert [watcher.poll() for _ in range(3)] == [[]] * 3
    assert Watcher(store).poll() == []  # Nor does one that finds it prepared pass it by.
    with connect(postgres_url, autocommit=True) as other:
        other.execute("COMMIT PREPARED 'swarm'")

    assert watcher.poll() == ["lower", "higher"]


@pytest.mark.parametrize("mode", ["EXCLUSIVE", "SHARE ROW EXCLUSIVE"])
def test_a_writer_that_locked_the_table_is_one_as_well(postgres_url: str, store: SwarmDB, mode: str) -> None:
    store.insert_event(event("before"))
    with closing(connect(postgres_url)) as first:
        first.execute(f"LOCK TABLE agent_events IN {mode} MODE".encode())
        insert(first, "locked")

        assert Watcher(store).poll() == []  # What it has to wait for holds the one lock beside the other.
        first.commit()
    assert Watcher(store).poll() == ["before", "locked"]


def test_other_locks_are_not_waited_for(postgres_url: str, store: SwarmDB) -> None:
    """Reading, building an index and vacuuming, and writing other tables, or this one of another schema."""
    store.insert_event(event("a"))
    with closing(connect(postgres_url)) as other:
        other.execute("CREATE SCHEMA elsewhere")
        other.execute("CREATE TABLE elsewhere.agent_events (id int)")
        other.commit()
        other.execute("INSERT INTO elsewhere.agent_events VALUES (1)")
        other.execute("UPDATE schema_info SET value = value")
        other.execute("SELECT * FROM agent_events")
        other.execute("LOCK TABLE agent_events IN SHARE UPDATE EXCLUSIVE MODE")

        assert Watcher(store).poll() == ["a"]


def test_a_writer_that_waits_for_the_table_is_not_waited_for(postgres_url: str, store: SwarmDB) -> None:
    store.insert_event(event("a"))
    waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'agent_events'::regclass AND NOT granted"
    with ThreadPoolExecutor(1) as pool, closing(connect(postgres_url)) as other:
        other.execute("LOCK TABLE agent_events IN SHARE MODE")
        inserting = pool.submit(store.insert_event, event("b"))
        while other.execute(waiting).fetchone() == (0,):
            pass

        assert Watcher(store).poll() == ["a"]
        other.rollback()
        inserting.result()


def test_nor_is_one_in_a_copy_of_the_database(postgres_server: Server, postgres_url: str) -> None:
    with SwarmDB(url=postgres_url) as store:
        store.insert_event(event("a"))
    copy = postgres_server.copy_database(postgres_url)  # In which the table has the same number.
    try:
        with SwarmDB(url=postgres_url) as store, closing(connect(copy)) as other:
            insert(other, "b")

            assert Watcher(store).poll() == ["a"]
    finally:
        postgres_server.drop_database(copy)


def test_it_looks_ever_less_often_whether_a_writer_has_ended(postgres_url: str, store: SwarmDB) -> None:
    with closing(connect(postgres_url)) as other:
        insert(other, "lower")
        store.insert_event(event("higher"))
        watcher, eager = Watcher(store), Watcher(store, poll=0.001)
        pauses = []
        for _ in range(9):
            assert watcher.poll() == eager.poll() == []
            pauses.append((watcher.place.pause, eager.place.pause))

    assert pauses == [(pause, 0.001) for pause in (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5)]


def test_the_tables_may_be_in_a_schema_of_their_own(postgres_url: str) -> None:
    with connect(postgres_url, autocommit=True) as other:
        other.execute("CREATE SCHEMA swarm")
    url = make_url(postgres_url).update_query_dict({"options": "-csearch_path=swarm"})
    with SwarmDB(url=url) as db, closing(connect(postgres_url, options="-csearch_path=swarm")) as first:
        watcher = Watcher(db)
        insert(first, "lower")
        db.insert_event(event("higher"))
        assert watcher.poll() == []
        first.commit()

        assert watcher.poll() == ["lower", "higher"]


def test_an_insert_that_was_undone_to_a_savepoint_is_not_waited_for(postgres_url: str, store: SwarmDB) -> None:
    with closing(connect(postgres_url)) as first:
        first.execute("SAVEPOINT s")
        insert(first, "undone")
        store.insert_event(event("higher"))
        assert Watcher(store).poll() == []
        first.execute("ROLLBACK TO SAVEPOINT s")

        assert Watcher(store).poll() == ["higher"]


def test_a_watcher_waits_for_a_writer_by_itself(postgres_url: str, store: SwarmDB) -> None:
    with ThreadPoolExecutor(1) as pool, closing(connect(postgres_url)) as first:
        insert(first, "lower")
        store.insert_event(event("higher"))
        waiting = pool.submit(agents, store.watch_events(0, poll=0.01), 2)
        looks = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%pg_locks%%' AND pid <> pg_backend_pid()"
        with connect(postgres_url, autocommit=True) as other:
            while other.execute(looks).fetchone() == (0,):
                pass
        first.commit()

        assert waiting.result() == ["lower", "higher"]


def test_a_standby_is_refused(postgres_url: str, store: SwarmDB) -> None:
    store.insert_event(event("a"))
    with connect(postgres_url, autocommit=True) as other:
        other.execute("CREATE SCHEMA standby")
        other.execute("CREATE FUNCTION standby.pg_is_in_recovery() RETURNS bool LANGUAGE sql AS 'SELECT true'")
    path = "-csearch_path=standby,pg_catalog,public"
    with SwarmDB(url=make_url(postgres_url).update_query_dict({"options": path})) as db:
        with pytest.raises(StorageError, match="standby"):
            db.watch_events()
        with pytest.raises(StorageError, match="standby"):  # The server became one.
            Watcher(db).poll()


def test_a_time_that_no_datetime_holds_is_named_after_all_before_it(postgres_url: str, store: SwarmDB) -> None:
    store.insert_events(event(str(number)) for number in range(4))
    with connect(postgres_url, autocommit=True) as other:
        other.execute("UPDATE agent_events SET timestamp = 'infinity' WHERE agent_id = '2'")

    events = store.watch_events(0)
    assert agents(events, 2) == ["0", "1"]
    with pytest.raises(CorruptDataError, match=r"agent_events\.timestamp") as caught:
        next(events)
    assert agents(store.watch_events(caught.value.row["id"]), 1) == ["3"]


def test_the_log_is_read_by_its_key_on_the_server_too(store: SwarmDB) -> None:
    store.insert_events(event(str(number)) for number in range(2000))
    filters = {"types": '["spawn"]', "agent_ids": '["7", "8"]', "exclude_agent": "8"}
    program = store._programs[internals._after(frozenset(filters))]
    bound = program.bind({**filters, "position": 0, "until": 2000, "limit": 100})
    with store.transaction() as raw:
        raw.execute("ANALYZE agent_events")
        plan = "\n".join(row[0] for row in raw.execute(f"EXPLAIN {program.sql}", bound).fetchall())

    assert "Index Scan using agent_events_pkey" in plan
    assert "hashed SubPlan" in plan
    assert "Sort" not in plan


# Acceptance: processes


WRITERS, EACH = 8, 1250

# What it got is on the disk before it asks for the next; what it had not finished to write, it had not got.
WATCH = """
import sys
from pathlib import Path
from moai_flow.memory import SwarmDB

url, kept = sys.argv[1], Path(sys.argv[2])
lines = kept.read_text().splitlines(keepends=True) if kept.exists() else []
if lines and not lines[-1].endswith("\\n"):
    del lines[-1]
kept.write_text("".join(lines))
after = int(lines[-1].split()[0]) if lines else 0
with SwarmDB(url=url) as db, kept.open("a", buffering=1) as got:
    for event in db.watch_events(after, poll=0.01):
        got.write(f"{event.id} {event.event_id}\\n")
        if event.agent_id == "end":
            break
"""


class UndoneError(Exception):
    pass


# Module level: a spawned process imports it from here.
def write(url: str, number: int, results: Connection) -> None:
    """Write events in transactions of all lengths, some of which are undone, and send the ids of those that stay."""
    chance = random.Random(number)
    kept: list[str] = []
    with SwarmDB(url=url) as db:
        while len(kept) < EACH:
            size = min(chance.choice([1, 1, 1, 2, 5, 20, 150]), EACH - len(kept))
            try:
                if size == 1:
                    kept.append(db.insert_event(event(str(number))))
                    continue
                with db.transaction():
                    ids: list[str] = []
                    while len(ids) < size:
                        ids += db.insert_events([event(str(number))] * min(chance.randint(1, 30), size - len(ids)))
                        if chance.random() < 0.2:
                            threading.Event().wait(chance.random() * 0.02)
                    if chance.random() < 0.2:
                        raise UndoneError
                kept += ids
            except (UndoneError, BusyError):
                continue
    results.send(kept)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["file", "postgresql"])
def test_a_watcher_sees_10000_events_of_8_processes_once_and_in_order_through_a_kill(
    kind: str, path: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url, got = url_of(kind, path, request), tmp_path / "got"
    SwarmDB(url=url).close()
    command = [sys.executable, "-c", WATCH, url, str(got)]

    def lines() -> int:
        return got.read_bytes().count(b"\n") if got.exists() else 0

    pipes = [SPAWN.Pipe(duplex=False) for _ in range(WRITERS)]
    writers = [SPAWN.Process(target=write, args=(url, number, send)) for number, (_, send) in enumerate(pipes)]
    watcher = subprocess.Popen(command)
    try:
        for writer in writers:
            writer.start()
        for goal in (1500, 3500):
            while lines() < goal:
                assert watcher.poll() is None
                threading.Event().wait(0.001)
            watcher.kill()
            watcher.wait()
            watcher = subprocess.Popen(command)
        written = [receive.recv() for receive, _ in pipes]
        for writer in writers:
            writer.join()
        with SwarmDB(url=url) as db:
            last = db.insert_event(event("end"))
        assert watcher.wait(timeout=60) == 0
    finally:
        watcher.kill()
        watcher.wait()

    seen = [line.split() for line in got.read_text().splitlines()]
    numbers = [int(number) for number, _ in seen]
    assert numbers == sorted(set(numbers))
    stored, got_ids = {last}.union(*written), {event_id for _, event_id in seen}
    assert (len(stored - got_ids), len(got_ids - stored)) == (0, 0)  # Missed, and undone.
    assert len(seen) == len(stored) == WRITERS * EACH + 1
    for ids in written:  # Each writer's own events come in the order in which it wrote them.
        mine = set(ids)
        assert [event_id for _, event_id in seen if event_id in mine] == ids
