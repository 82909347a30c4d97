"""The event log."""

import json
import time
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone

import pytest

from conftest import Clock
from moai_flow.memory import (
    AgentEvent,
    ConflictError,
    EventCursor,
    EventData,
    EventType,
    InvalidInputError,
    SwarmDB,
)


def event(agent_id: str = "a", event_type: EventType = EventType.SPAWN, timestamp: str | None = None) -> EventData:
    data: EventData = {"event_type": event_type, "agent_id": agent_id, "agent_type": "t"}
    if timestamp is not None:
        data["timestamp"] = timestamp
    return data


def test_an_event_comes_back_typed(db: SwarmDB, clock: Clock) -> None:
    event_id = db.insert_event(
        {
            "event_type": "error",
            "agent_id": "a",
            "agent_type": "t",
            "timestamp": "2025-11-30T19:00:00+09:00",
            "metadata": {"reason": "no luck", "tries": [1, 2.5, None, True]},
        }
    )

    (found,) = db.get_events()
    assert type(found) is AgentEvent
    assert found.event_id == event_id
    assert found.event_type is EventType.ERROR
    assert found.timestamp == datetime(2025, 11, 30, 10, tzinfo=UTC)
    assert found.timestamp.tzinfo is UTC
    assert found.created_at == clock.now
    assert found.metadata_ == {"reason": "no luck", "tries": [1, 2.5, None, True]}


def test_an_event_reads_like_a_row_as_well(db: SwarmDB) -> None:
    db.insert_event({**event(), "metadata": {"k": 1}})

    (found,) = db.get_events()
    assert found["metadata"] is found.metadata_
    assert found["metadata_"] is found.metadata_
    assert dict(found)["event_type"] is found.event_type
    assert list(dict(found)) == [
        "id",
        "event_id",
        "event_type",
        "agent_id",
        "agent_type",
        "timestamp",
        "metadata",
        "created_at",
    ]
    assert "metadata" in found
    assert "no_such" not in found
    assert found.get("no_such", 7) == 7
    with pytest.raises(KeyError):
        found["no_such"]


def test_time_and_metadata_are_optional(db: SwarmDB, clock: Clock) -> None:
    db.insert_event(event())
    db.insert_event({**event(), "metadata": None})

    for found in db.get_events():
        assert found.timestamp == clock.now
        assert found.metadata_ == {}


def test_an_instance_is_taken_as_well(db: SwarmDB) -> None:
    made = AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t", metadata={"k": 1})

    assert db.insert_event(made) == made.event_id
    (found,) = db.get_events()
    assert (found.event_id, found.timestamp, found.metadata_) == (made.event_id, made.timestamp, {"k": 1})


def test_an_instance_can_be_given_another_id(db: SwarmDB) -> None:
    made = AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t")

    assert db.insert_event(made, "mine") == "mine"
    assert db.get_events()[0].event_id == "mine"


def test_generated_ids_sort_by_time(db: SwarmDB) -> None:
    ids = [db.insert_event(event()) for _ in range(50)]

    assert ids == sorted(ids)
    assert len(set(ids)) == 50


def test_an_id_is_taken_once(db: SwarmDB) -> None:
    db.insert_event(event(), "e-1")

    with pytest.raises(ConflictError, match=r"event_id"):
        db.insert_event(event("b"), "e-1")
    assert [found.agent_id for found in db.get_events()] == ["a"]


def test_events_come_newest_first_and_ties_latest_insert_first(db: SwarmDB) -> None:
    for agent_id, timestamp in [("1", "2025-01-02"), ("2", "2025-01-03"), ("3", "2025-01-02"), ("4", "2025-01-01")]:
        db.insert_event(event(agent_id, timestamp=timestamp + "T00:00:00Z"))

    assert [found.agent_id for found in db.get_events()] == ["2", "3", "1", "4"]
    assert [found.agent_id for found in db.iter_events()] == ["4", "1", "3", "2"]


def test_since_is_inclusive_and_until_exclusive(db: SwarmDB) -> None:
    for hour in range(4):
        db.insert_event(event(str(hour), timestamp=f"2025-01-01T0{hour}:00:00Z"))
    since, until = "2025-01-01T01:00:00Z", datetime(2025, 1, 1, 4, tzinfo=timezone(timedelta(hours=1)))

    assert [found.agent_id for found in db.get_events(since=since, until=until)] == ["2", "1"]
    assert [found.agent_id for found in db.iter_events(since=since, until=until)] == ["1", "2"]


def test_an_empty_filter_is_a_filter(db: SwarmDB) -> None:
    db.insert_event(event())

    assert db.get_events(agent_id="") == []
    assert list(db.iter_events(agent_id="")) == []


def test_filters_combine(db: SwarmDB) -> None:
    for agent_id in "ab":
        for event_type in EventType:
            db.insert_event(event(agent_id, event_type))

    found = db.get_events("a", "error", 5)
    assert [(one.agent_id, one.event_type) for one in found] == [("a", "error")]
    assert len(list(db.iter_events(event_type=EventType.ERROR))) == 2


def test_limit_is_100_by_default_and_zero_is_none(db: SwarmDB) -> None:
    db.insert_events(event() for _ in range(101))

    assert len(db.get_events()) == 100
    assert len(db.get_events(limit=200)) == 101
    assert db.get_events(limit=0) == []


def test_pages_follow_each_other_without_gap_or_repetition(db: SwarmDB) -> None:
    db.insert_events(event(str(number), timestamp=f"2025-01-01T00:00:0{number // 4}Z") for number in range(10))

    page = db.get_events(limit=3)
    seen = [found.agent_id for found in page]
    while page := db.get_events(limit=3, before=page[-1]):
        seen += [found.agent_id for found in page]
    assert seen == [str(number) for number in reversed(range(10))]


def test_a_page_continues_from_a_kept_cursor_though_its_event_is_gone(db: SwarmDB) -> None:
    db.insert_events(event(str(day), timestamp=f"2025-01-0{day}T00:00:00Z") for day in (1, 2, 3))
    kept = json.dumps(db.get_events(limit=2)[-1].cursor, default=datetime.isoformat)
    with db.transaction() as conn:
        conn.execute("DELETE FROM agent_events WHERE agent_id = '2'")

    timestamp, number = json.loads(kept)
    cursor = EventCursor(datetime.fromisoformat(timestamp), number)
    assert [found.agent_id for found in db.get_events(before=cursor)] == ["1"]


def test_pages_follow_each_other_past_an_event_whose_time_another_program_wrote(local_db: SwarmDB) -> None:
    local_db.insert_event(event("ours", timestamp="2025-01-01T01:00:00Z"))
    with local_db.transaction() as conn:
        conn.execute(
            "INSERT INTO agent_events (event_id, event_type, agent_id, agent_type, timestamp) "
            "VALUES ('x', 'spawn', 'theirs', 't', '2025-01-01 23:00:00')"
        )
    seen = page = local_db.get_events(limit=1)
    while page and len(seen) < 5:
        page = local_db.get_events(limit=1, before=page[-1])
        seen = [*seen, *page]

    assert [found.agent_id for found in seen] == ["ours", "theirs"]  # In the order of their texts.


@pytest.mark.parametrize(
    "before",
    [
        AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t"),
        ("not a cursor",),
        EventCursor("yesterday", 1),  # type: ignore[arg-type]
        EventCursor(datetime(2025, 1, 1, tzinfo=UTC), -1),
        7,
    ],
)
def test_what_is_no_position_is_refused(db: SwarmDB, before: AgentEvent | EventCursor) -> None:
    with pytest.raises(InvalidInputError, match="before"):
        db.get_events(before=before)


def test_only_an_event_that_was_read_has_a_position() -> None:
    with pytest.raises(ValueError, match="not read from a database"):
        AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t").cursor  # noqa: B018 (it raises)


def test_a_batch_returns_its_ids_in_order(db: SwarmDB) -> None:
    made = AgentEvent(event_type=EventType.ERROR, agent_id="c", agent_type="t")
    ids = db.insert_events([event("a"), event("b"), made])

    assert ids[2] == made.event_id
    assert [found.event_id for found in db.iter_events()] == ids


def test_a_batch_is_all_or_nothing(db: SwarmDB) -> None:
    db.insert_event(event(), "taken")
    taken = AgentEvent(event_type=EventType.SPAWN, agent_id="z", agent_type="t", event_id="taken")

    with pytest.raises(ConflictError):
        db.insert_events([event("b"), taken, event("c")])
    with pytest.raises(InvalidInputError, match=r"events\[1\]\.timestamp: got 'soon'"):
        db.insert_events([event("b"), event("c", timestamp="soon")])
    with pytest.raises(InvalidInputError, match=r"events\[2\]\.metadata\['x'\]"):
        db.insert_events([event("b"), event("c"), {**event("d"), "metadata": {"x": float("nan")}}])
    assert [found.agent_id for found in db.get_events()] == ["a"]


def test_an_empty_batch_writes_nothing(db: SwarmDB) -> None:
    assert db.insert_events([]) == []
    assert db.get_events() == []


def test_iteration_is_in_batches_and_ends_where_it_began(db: SwarmDB) -> None:
    db.insert_events(event(str(number)) for number in range(7))

    events = db.iter_events(batch_size=3)
    seen = [next(events).agent_id]
    db.insert_event(event("later"))
    seen += [found.agent_id for found in events]
    assert seen == [str(number) for number in range(7)]
    assert len(list(db.iter_events(batch_size=4))) == 8


def test_iteration_holds_no_connection_between_batches(file_db: SwarmDB) -> None:
    file_db.insert_events(event() for _ in range(10))
    events = file_db.iter_events(batch_size=5)
    next(events)

    file_db.vacuum()  # It would fail with a read under way.
    assert len(list(events)) == 9


def test_iteration_takes_constant_memory(file_db: SwarmDB) -> None:
    file_db.insert_events({**event(), "metadata": {"text": "x" * 1000}} for _ in range(10_000))
    tracemalloc.start()
    count = sum(1 for _ in file_db.iter_events(batch_size=100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert count == 10_000
    assert peak < 3_000_000  # All of them would take more than 10 MB.


def test_bad_arguments_of_an_iteration_are_refused_at_once(db: SwarmDB) -> None:
    with pytest.raises(InvalidInputError, match="batch_size"):
        db.iter_events(batch_size=0)
    with pytest.raises(InvalidInputError, match="since"):
        db.iter_events(since="whenever")


def test_naive_times_are_local(db: SwarmDB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        db.insert_event(event(timestamp="2025-11-30T19:00:00"))
        db.insert_event({**event(), "timestamp": datetime(2025, 11, 30, 19)})  # noqa: DTZ001 (naive on purpose)
        found = db.get_events(since=datetime(2025, 11, 30, 18, 59))  # noqa: DTZ001
    finally:
        monkeypatch.undo()
        time.tzset()

    assert [one.timestamp for one in found] == [datetime(2025, 11, 30, 10, tzinfo=UTC)] * 2


def test_a_word_that_no_text_can_hold_is_refused_as_a_filter(db: SwarmDB) -> None:
    for word in ("a\ud800b", "a\0b"):
        with pytest.raises(InvalidInputError, match="event_type"):
            db.get_events(event_type=EventType.read(word))


@pytest.mark.parametrize("batch_size", [1000, 150, 101, 100])
def test_an_iteration_leaves_none_of_many_out(db: SwarmDB, batch_size: int) -> None:
    db.insert_events({"event_type": "spawn", "agent_id": "a", "agent_type": "t"} for _ in range(305))

    assert [event.id for event in db.iter_events(batch_size=batch_size)] == list(range(1, 306))


def test_when_an_event_was_written_is_kept_beside_when_it_happened(db: SwarmDB, clock: Clock) -> None:
    happened = clock.now - timedelta(days=1)
    db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t", "timestamp": happened})

    (event,) = db.get_events()
    assert (event.timestamp, event.created_at) == (happened, clock.now)
