"""The agent registry."""

from datetime import UTC, datetime

import pytest

from conftest import Clock
from moai_flow.memory import AgentNotFoundError, AgentStatus, InvalidInputError, RegisteredAgent, SwarmDB


def test_an_agent_is_registered_now(db: SwarmDB, clock: Clock) -> None:
    registered = db.register_agent("a", "expert", metadata={"priority": "high"})

    assert registered == db.get_agent("a")
    assert registered.status is AgentStatus.SPAWNED
    assert registered.spawn_time == clock.now.timestamp()
    assert registered.spawned_at == registered.last_updated == clock.now
    assert (registered.complete_time, registered.completed_at, registered.duration_ms) == (None, None, None)
    assert registered["metadata"] == {"priority": "high"}


def test_an_unknown_agent_is_none(db: SwarmDB) -> None:
    assert db.get_agent("nobody") is None


@pytest.mark.parametrize("status", ["complete", "error"])
def test_an_end_sets_completion_time_and_duration_when_given(db: SwarmDB, clock: Clock, status: AgentStatus) -> None:
    db.register_agent("a", "t")
    clock.advance(seconds=3)

    ended = db.update_agent_status("a", status, duration_ms=2900)
    assert ended == db.get_agent("a")
    assert (ended.status, ended.completed_at, ended.duration_ms) == (status, clock.now, 2900)
    clock.advance(seconds=1)
    ended = db.update_agent_status("a", status)
    assert (ended.completed_at, ended.duration_ms, ended.last_updated) == (clock.now, 2900, clock.now)


@pytest.mark.parametrize("status", ["spawned", "running"])
def test_being_active_again_clears_both(db: SwarmDB, clock: Clock, status: AgentStatus) -> None:
    spawned = db.register_agent("a", "t").spawn_time
    db.update_agent_status("a", "complete", duration_ms=5)
    clock.advance(seconds=1)

    active = db.update_agent_status("a", status)
    assert (active.status, active.complete_time, active.duration_ms) == (status, None, None)
    assert active.spawn_time == spawned


def test_registering_again_is_a_respawn(db: SwarmDB, clock: Clock) -> None:
    db.register_agent("a", "t", metadata={"run": 1})
    db.update_agent_status("a", "error", duration_ms=5)
    clock.advance(hours=1)

    respawned = db.register_agent("a", "other", "running")
    assert respawned == db.get_agent("a")
    assert respawned.spawned_at == clock.now
    assert (respawned.agent_type, respawned.status, respawned.metadata_) == ("other", "running", {})
    assert (respawned.complete_time, respawned.duration_ms) == (None, None)
    assert len(db.list_agents()) == 1


def test_an_agent_can_be_registered_as_ended(db: SwarmDB, clock: Clock) -> None:
    assert db.register_agent("a", "t", "error").completed_at == clock.now


def test_updating_an_unknown_agent_says_so(db: SwarmDB) -> None:
    with pytest.raises(AgentNotFoundError, match=r"'ghost'; call register_agent\(\) first") as caught:
        db.update_agent_status("ghost", "running")

    assert caught.value.agent_id == "ghost"
    assert isinstance(caught.value, LookupError)
    assert db.list_agents() == []


def test_a_duration_belongs_to_an_end(db: SwarmDB) -> None:
    db.register_agent("a", "t")

    with pytest.raises(InvalidInputError, match="duration_ms: got 5, expected None"):
        db.update_agent_status("a", "running", duration_ms=5)
    assert db.get_agent("a") == db.list_agents()[0]


def test_active_agents_come_newest_spawn_first_in_a_total_order(db: SwarmDB, clock: Clock) -> None:
    for agent_id in ("b", "c", "a"):
        db.register_agent(agent_id, "t")
    clock.advance(seconds=1)
    db.register_agent("late", "t", "running")
    for agent_id, status in (("done", AgentStatus.COMPLETE), ("failed", AgentStatus.ERROR)):
        db.register_agent(agent_id, "t", status)

    assert [agent.agent_id for agent in db.get_active_agents()] == ["late", "c", "b", "a"]
    assert all(agent.status.is_active for agent in db.get_active_agents())


def test_agents_are_listed_by_status_and_type(db: SwarmDB) -> None:
    db.register_agent("a", "x")
    db.register_agent("b", "y", "running")
    db.register_agent("c", "y", "complete")

    def ids(agents: list[RegisteredAgent]) -> list[str]:
        return sorted(agent.agent_id for agent in agents)

    assert ids(db.list_agents()) == ["a", "b", "c"]
    assert ids(db.list_agents(status="running")) == ["b"]
    assert ids(db.list_agents(agent_type="y")) == ["b", "c"]
    assert ids(db.list_agents(AgentStatus.COMPLETE, "y")) == ["c"]
    assert ids(db.list_agents(agent_type="")) == []


def test_deleting_says_whether_there_was_one(db: SwarmDB) -> None:
    db.register_agent("a", "t")
    db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"})

    assert db.delete_agent("a") is True
    assert db.delete_agent("a") is False
    assert db.get_agent("a") is None
    assert len(db.get_events("a")) == 1


def test_what_was_given_earlier_does_not_follow_later_changes(db: SwarmDB) -> None:
    before = db.register_agent("a", "t")
    db.update_agent_status("a", "running")

    assert before.status == "spawned"


def test_fractions_of_seconds_are_kept(db: SwarmDB, clock: Clock) -> None:
    clock.now = datetime(2025, 11, 30, 10, 0, 0, 123456, tzinfo=UTC)

    assert db.register_agent("a", "t").spawned_at == clock.now
