"""The event log."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import assert_type

from moai_flow.memory import AgentEvent, EventCursor, EventData, EventType, EventTypeLike, SwarmDB


def writing(db: SwarmDB) -> None:
    event: EventData = {"event_type": "spawn", "agent_id": "a", "agent_type": "expert-backend"}
    assert_type(db.insert_event(event), str)
    assert_type(db.insert_event(event_data=event, event_id="e-1"), str)
    db.insert_event(
        {
            "event_type": EventType.COMPLETE,
            "agent_id": "a",
            "agent_type": "expert-backend",
            "timestamp": "2025-11-30T10:00:00Z",
            "metadata": {"prompt": "Design API", "attempts": [1, 2]},
        }
    )
    db.insert_event({**event, "timestamp": datetime.now(UTC)})
    made = AgentEvent(event_type=EventType.ERROR, agent_id="a", agent_type="expert-backend", metadata={"code": 7})
    assert_type(db.insert_event(made), str)
    assert_type(db.insert_events([event, made]), list[str])
    assert_type(db.insert_events(event for _ in range(3)), list[str])


def reading(db: SwarmDB) -> None:
    assert_type(db.get_events(), list[AgentEvent])
    db.get_events("a", "spawn", 50)
    db.get_events(agent_id="a", event_type=EventType.SPAWN, limit=10)
    page = db.get_events(since="2025-11-30", until=datetime.now(UTC))
    cursor = assert_type(page[-1].cursor, EventCursor)
    db.get_events(before=page[-1])
    db.get_events(before=cursor)
    db.get_events(before=EventCursor(datetime.now(UTC), 7))
    assert_type(db.iter_events("a", "error", since="2025-11-30", batch_size=100), Iterator[AgentEvent])


def watching(db: SwarmDB) -> None:
    event = next(assert_type(db.watch_events(), Iterator[AgentEvent]))
    db.watch_events(0)
    db.watch_events(event, types="error", agent_ids="a", exclude_agent="me", poll=0.1)
    db.watch_events(after=event.id, types=["error", EventType.SPAWN], agent_ids={"a", "b"})
    db.watch_events(types=(kind for kind in EventType), agent_ids=(name for name in "ab"), poll=1)


def words(event_type: EventTypeLike) -> None:
    assert_type(EventType(event_type), EventType)
    assert_type(EventType.read("decision"), EventType)
    assert_type(EventType.SPAWN.is_listed, bool)


def mistakes(db: SwarmDB, event: AgentEvent) -> None:
    db.insert_event({"event_type": "spawn", "agent_id": "a"})  # type: ignore[arg-type]
    db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "b", "model": "c"})  # type: ignore[arg-type]
    db.insert_event({"event_type": "spwan", "agent_id": "a", "agent_type": "b"})  # type: ignore[arg-type]
    db.insert_event({"event_type": "spawn", "agent_id": 7, "agent_type": "b"})  # type: ignore[arg-type]
    db.insert_event("spawn")  # type: ignore[arg-type]
    db.insert_events([{"event_type": "spawn", "agent_id": "a"}])  # type: ignore[list-item]
    db.insert_events({"event_type": "spawn", "agent_id": "a", "agent_type": "b"})  # type: ignore[dict-item]
    incomplete: EventData = {"event_type": "spawn", "agent_id": "a"}  # type: ignore[typeddict-item]
    incomplete["model"] = "c"  # type: ignore[typeddict-unknown-key]
    incomplete["event_type"] = "spwan"  # type: ignore[typeddict-item]
    db.get_events(event_type="spwan")  # type: ignore[arg-type]
    db.get_events(limit="10")  # type: ignore[arg-type]
    db.get_events("a", "spawn", 10, "2025-11-30")  # type: ignore[call-arg]
    db.get_events(before="2025-11-30")  # type: ignore[arg-type]
    db.watch_events("7")  # type: ignore[arg-type]
    db.watch_events(event.cursor)  # type: ignore[arg-type]
    db.watch_events(0, "error")  # type: ignore[call-arg]
    db.watch_events(types="spwan")  # type: ignore[arg-type]
    db.watch_events(types=["spwan"])  # type: ignore[list-item]
    db.watch_events(agent_ids=[7])  # type: ignore[list-item]
    db.watch_events(exclude_agent=["a"])  # type: ignore[arg-type]
    AgentEvent(event_type=EventType.SPAWN, agent_id="a")  # type: ignore[call-arg]
