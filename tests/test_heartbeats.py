"""Agents that say they are alive, and those that have fallen silent."""

import multiprocessing
import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from conftest import Clock, url_of
from moai_flow.memory import (
    AgentNotFoundError,
    CorruptDataError,
    EventType,
    InvalidInputError,
    RegisteredAgent,
    SwarmDB,
)

SPAWN = multiprocessing.get_context("spawn")
MINUTE = timedelta(minutes=1)


def ids(agents: list[RegisteredAgent]) -> list[str]:
    return [agent.agent_id for agent in agents]


def test_a_heartbeat_sets_the_time_and_nothing_else(db: SwarmDB, clock: Clock) -> None:
    before = db.register_agent("a", "t", "running", {"k": 1})
    db.register_agent("b", "t")
    clock.advance(seconds=5)

    assert db.heartbeat("a") is True
    after = db.get_agent("a")
    assert after is not None
    assert dict(after) == {**dict(before), "last_updated": clock.now}
    assert [agent.last_updated == clock.now for agent in db.list_agents()] == [False, True]


def test_heartbeats_write_no_events(db: SwarmDB, clock: Clock) -> None:
    with db.track_agent("a", "t") as agent:
        for _ in range(10):
            clock.advance(seconds=1)
            assert agent.heartbeat()
            assert db.heartbeat("a")
        assert [event.event_type for event in db.get_events()] == [EventType.SPAWN]


@pytest.mark.parametrize("status", ["complete", "error"])
def test_an_agent_that_has_ended_is_left_alone(db: SwarmDB, clock: Clock, status: Any) -> None:
    ended = db.register_agent("a", "t", status)
    clock.advance(seconds=5)

    assert db.heartbeat("a") is False
    assert db.get_agent("a") == ended


def test_an_unknown_agent_has_no_heartbeat(db: SwarmDB) -> None:
    with pytest.raises(AgentNotFoundError, match="'ghost'"):
        db.heartbeat("ghost")
    with pytest.raises(InvalidInputError, match="agent_id"):
        db.heartbeat("")


def test_a_heartbeat_is_part_of_the_callers_transaction(db: SwarmDB, clock: Clock) -> None:
    before = db.register_agent("a", "t")
    clock.advance(seconds=5)
    with pytest.raises(KeyError), db.transaction():
        db.heartbeat("a")
        raise KeyError

    assert db.get_agent("a") == before


def test_what_a_session_has_loaded_is_read_again_after_a_heartbeat(db: SwarmDB, clock: Clock) -> None:
    db.register_agent("a", "t")
    with db.session() as session:
        loaded = session.get_one(RegisteredAgent, "a")
        clock.advance(seconds=5)
        db.heartbeat("a")
        assert loaded.last_updated == clock.now


def test_an_agent_is_stale_when_it_was_silent_for_longer(db: SwarmDB, clock: Clock) -> None:
    db.register_agent("a", "t")
    clock.advance(minutes=1)
    assert db.find_stale_agents(MINUTE) == []
    clock.advance(microseconds=1)

    assert db.find_stale_agents(MINUTE) == [db.get_agent("a")]


def test_a_heartbeat_keeps_an_agent_from_being_stale(db: SwarmDB, clock: Clock) -> None:
    db.register_agent("alive", "t", "running")
    db.register_agent("dead", "t", "running")
    clock.advance(seconds=50)
    db.heartbeat("alive")
    clock.advance(seconds=50)

    assert ids(db.find_stale_agents(MINUTE)) == ["dead"]
    assert ids(db.mark_stale_agents(MINUTE)) == ["dead"]


def test_only_spawned_and_running_agents_are_stale_longest_silent_first(db: SwarmDB, clock: Clock) -> None:
    db.register_agent("later", "t")
    db.register_agent("z", "t")
    db.register_agent("b", "t", "running")
    for status in ("complete", "error"):
        db.register_agent(status, "t", status)
    db.register_agent("paused", "t")
    with db.transaction() as raw:
        raw.execute("UPDATE agent_registry SET status = 'paused' WHERE agent_id = 'paused'")
    clock.advance(seconds=1)
    db.heartbeat("later")
    clock.advance(hours=1)

    assert ids(db.find_stale_agents(MINUTE)) == ["b", "z", "later"]


def test_times_of_other_programs_are_judged_by_what_they_mean(
    local_db: SwarmDB, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        # Now is 10:00 in UTC, 19:00 in Tokyo; as text, each of these is before or after that at random.
        stored = {
            "local, fresh": "2025-11-30T18:59:30",
            "local, stale": "2025-11-30T18:30:00.000001",
            "utc, fresh": "2025-11-30 09:59:30",
            "utc, stale": "2025-11-30 09:20:00",
            "zone, fresh": "2025-11-30T05:59:30-04:00",
            "zone, stale": "2025-11-30T05:10:00-04:00",
        }
        for agent_id, text in stored.items():
            local_db.register_agent(agent_id, "t", "running")
            with local_db.transaction() as raw:
                raw.execute("UPDATE agent_registry SET last_updated = ? WHERE agent_id = ?", (text, agent_id))

        expected = ["zone, stale", "utc, stale", "local, stale"]
        assert ids(local_db.find_stale_agents(MINUTE)) == expected
        assert ids(local_db.mark_stale_agents(MINUTE)) == expected
        assert local_db.mark_stale_agents(MINUTE) == []
        silent = {event.agent_id: event.metadata_["silent_seconds"] for event in local_db.get_events()}
        assert silent == {"zone, stale": 3000.0, "utc, stale": 2400.0, "local, stale": 1799.999999}
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("span", [timedelta(0), timedelta(seconds=-1), 60, 60.0, None, "1 minute"])
def test_the_span_is_a_timedelta_greater_than_zero(db: SwarmDB, span: Any) -> None:
    for call in (db.find_stale_agents, db.mark_stale_agents):
        with pytest.raises(InvalidInputError, match=r"older_than: got .*, expected a timedelta greater than zero"):
            call(span)


def test_the_longest_span_finds_nobody(db: SwarmDB, clock: Clock) -> None:
    db.register_agent("a", "t")
    clock.advance(days=1000)

    assert db.find_stale_agents(timedelta.max) == []


def test_marking_ends_an_agent_and_writes_why(db: SwarmDB, clock: Clock) -> None:
    seen = db.register_agent("a", "expert", "running", {"k": 1})
    clock.advance(seconds=90)

    (marked,) = db.mark_stale_agents(MINUTE)
    assert marked == db.get_agent("a")
    assert (marked.status, marked.completed_at, marked.last_updated) == ("error", clock.now, clock.now)
    assert (marked.duration_ms, marked.metadata_, marked.spawn_time) == (None, {"k": 1}, seen.spawn_time)
    (event,) = db.get_events()
    assert (event.event_type, event.agent_id, event.agent_type) == ("error", "a", "expert")
    assert event.timestamp == clock.now
    assert event.metadata_ == {
        "reason": "stale",
        "last_updated": "2025-11-30T10:00:00.000000+00:00",
        "silent_seconds": 90.0,
    }
    assert db.mark_stale_agents(MINUTE) == []
    assert db.heartbeat("a") is False


def test_a_reason_is_kept_and_checked(db: SwarmDB, clock: Clock) -> None:
    db.register_agent("a", "t")
    clock.advance(hours=1)
    for bad in ("", 7, "no\0"):
        with pytest.raises(InvalidInputError, match="reason"):
            db.mark_stale_agents(MINUTE, bad)  # type: ignore[arg-type]
    db.mark_stale_agents(MINUTE, reason="the host went away")

    assert db.get_events()[0].metadata_["reason"] == "the host went away"


def test_marking_in_a_transaction_is_part_of_it(db: SwarmDB, clock: Clock) -> None:
    before = db.register_agent("a", "t")
    clock.advance(hours=1)
    with pytest.raises(KeyError), db.transaction():
        assert ids(db.mark_stale_agents(MINUTE)) == ["a"]
        raise KeyError

    assert (db.get_agent("a"), db.get_events()) == (before, [])


def test_an_agent_whose_type_another_program_left_empty_is_marked_too(db: SwarmDB, clock: Clock) -> None:
    for agent_id in ("a", "b"):
        db.register_agent(agent_id, "t")
    with db.transaction() as raw:
        raw.execute("UPDATE agent_registry SET agent_type = '' WHERE agent_id = 'a'")
    clock.advance(hours=1)

    assert ids(db.mark_stale_agents(MINUTE)) == ["a", "b"]
    assert sorted(event.agent_type for event in db.get_events()) == ["", "t"]


def test_a_row_that_cant_be_read_is_named(db: SwarmDB, clock: Clock) -> None:
    db.register_agent("a", "t")
    with db.transaction() as raw:
        raw.execute("UPDATE agent_registry SET last_updated = NULL")
    clock.advance(hours=1)

    with pytest.raises(CorruptDataError, match="last_updated"):
        db.mark_stale_agents(MINUTE)
    assert db.get_events() == []


class Interfering(Clock):
    """A clock that lets something happen when it is asked for a time, which is how a call meets another's work."""

    def __init__(self) -> None:
        super().__init__()
        self.at_reading: dict[int, Any] = {}
        self.readings = 0

    def __call__(self) -> datetime:
        self.readings += 1
        if interfere := self.at_reading.pop(self.readings, None):
            interfere()
        return self.now


@pytest.mark.parametrize("happens", ["beats", "ends", "is ended by raw SQL", "is respawned", "is deleted"])
def test_an_agent_that_is_heard_of_between_finding_and_marking_stays(
    path: Path, postgres_url: str, happens: str
) -> None:
    for url in (f"sqlite:///{path}", postgres_url):
        clock = Interfering()
        with SwarmDB(url=url, clock=clock) as db, SwarmDB(url=url, clock=clock) as other:
            db.register_agent("a", "t")
            db.register_agent("b", "t")
            clock.advance(hours=1)

            def interfere(other: SwarmDB = other) -> None:
                match happens:
                    case "beats":
                        other.heartbeat("a")
                    case "ends":
                        other.update_agent_status("a", "complete")
                    case "is ended by raw SQL":
                        with other.transaction() as raw:
                            raw.execute("UPDATE agent_registry SET status = 'complete' WHERE agent_id = 'a'")
                    case "is respawned":
                        other.register_agent("a", "t2")
                    case "is deleted":
                        other.delete_agent("a")

            clock.readings = 0
            # Judging reads the clock after the rows were read.
            clock.at_reading = {1: interfere}
            assert ids(db.mark_stale_agents(MINUTE)) == ["b"]
            assert [event.agent_id for event in db.get_events()] == ["b"]
            found = db.get_agent("a")
            if happens == "is deleted":
                assert found is None
            else:
                assert found is not None
                assert found.status == ("complete" if "end" in happens else "spawned")


# Processes. Module level: a spawned process imports these from here.


def standing_at(now: datetime) -> Clock:
    clock = Clock()
    clock.now = now
    return clock


def work_until_killed(url: str, now: datetime, ready: Connection) -> None:
    clock = standing_at(now)
    with SwarmDB(url=url, clock=clock) as db, db.track_agent("victim", "t") as agent:
        clock.advance(seconds=10)
        agent.heartbeat()
        ready.send("at work")
        threading.Event().wait()


def mark(url: str, now: datetime, start: Connection, found: Connection) -> None:
    with SwarmDB(url=url, clock=standing_at(now)) as db:
        found.send("ready")
        start.recv()
        found.send(ids(db.mark_stale_agents(MINUTE)))


@pytest.mark.parametrize("kind", ["file", "postgresql"])
def test_a_killed_agent_is_found_stale_and_marked_once_by_4_processes(
    kind: str, path: Path, clock: Clock, request: pytest.FixtureRequest
) -> None:
    url = url_of(kind, path, request)
    with SwarmDB(url=url, clock=clock) as db:
        receive, send = SPAWN.Pipe(duplex=False)
        victim = SPAWN.Process(target=work_until_killed, args=(url, clock.now, send))
        victim.start()
        assert receive.recv() == "at work"
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()

        assert [event.event_type for event in db.get_events()] == ["spawn"]
        running = db.get_agent("victim")
        assert running is not None
        assert (running.status, running.last_updated) == ("running", datetime(2025, 11, 30, 10, 0, 10, tzinfo=UTC))
        clock.advance(seconds=70)
        assert db.find_stale_agents(MINUTE) == []
        clock.advance(seconds=1)
        assert ids(db.find_stale_agents(MINUTE)) == ["victim"]

        starts, answers, markers = [], [], []
        for _ in range(4):
            start, begin = SPAWN.Pipe(duplex=False)
            answer, tell = SPAWN.Pipe(duplex=False)
            marker = SPAWN.Process(target=mark, args=(url, clock.now, start, tell))
            marker.start()
            starts.append(begin)
            answers.append(answer)
            markers.append(marker)
        for answer in answers:
            assert answer.recv() == "ready"
        for begin in starts:
            begin.send("go")
        found = sorted(answer.recv() for answer in answers)
        for marker in markers:
            marker.join()

        assert found == [[], [], [], ["victim"]]
        assert [event.event_type for event in db.get_events()] == ["error", "spawn"]
        assert db.get_events()[0].metadata_["silent_seconds"] == 61.0
