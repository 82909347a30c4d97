"""Rows that domain methods return, as an ORM session meets them: like rows that it had loaded itself."""

import copy
import gc
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import inspect
from sqlalchemy.orm.exc import UnmappedInstanceError
from sqlmodel import select

from moai_flow.memory import AgentEvent, EventType, RegisteredAgent, SwarmDB


@pytest.fixture
def agent(db: SwarmDB) -> RegisteredAgent:
    db.register_agent("a", "t", metadata={"n": 1})
    found = db.get_agent("a")
    assert found is not None
    return found


def test_a_row_that_was_read_is_detached_and_one_that_was_made_is_transient(agent: RegisteredAgent) -> None:
    assert inspect(agent).detached
    assert inspect(agent).key == (RegisteredAgent, ("a",), None)
    assert inspect(RegisteredAgent(agent_id="a", agent_type="t")).transient


def test_its_state_is_made_once(agent: RegisteredAgent) -> None:
    assert "_sa_instance_state" not in vars(agent)
    assert inspect(agent) is inspect(agent)


def test_a_session_that_adds_it_updates_its_row(db: SwarmDB, agent: RegisteredAgent) -> None:
    agent.agent_type = "changed before"
    with db.session() as session:
        session.add(agent)
        agent.metadata_ = {"n": 2}

    found = db.get_agent("a")
    assert found is not None
    assert (found.agent_type, found.metadata_) == ("changed before", {"n": 2})
    assert len(db.list_agents()) == 1


def test_a_session_can_merge_refresh_and_delete_it(db: SwarmDB, agent: RegisteredAgent) -> None:
    db.update_agent_status("a", "running")
    with db.session() as session:
        session.add(agent)
        session.refresh(agent)
        assert agent.status == "running"
    other = db.get_agent("a")
    assert other is not None
    other.agent_type = "merged"
    with db.session() as session:
        merged = session.merge(other)
        assert merged is not other
        session.flush()
        assert session.exec(select(RegisteredAgent.agent_type)).one() == "merged"
        session.delete(merged)
    assert db.get_agent("a") is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda row: pickle.loads(pickle.dumps(row))])
@pytest.mark.parametrize("seen", [False, True], ids=["unseen", "seen by SQLAlchemy"])
def test_a_copy_is_equal_and_updates_the_row_as_well(
    db: SwarmDB, agent: RegisteredAgent, duplicate: Callable[[RegisteredAgent], RegisteredAgent], *, seen: bool
) -> None:
    if seen:
        inspect(agent)
    made = duplicate(agent)
    assert made == agent
    if duplicate is copy.copy and seen:
        return  # SQLModel shares the state then, whoever loaded the row.
    with db.session() as session:
        session.add(made)
        made.agent_type = "changed"

    found = db.get_agent("a")
    assert found is not None
    assert found.agent_type == "changed"


def test_it_equals_the_row_that_a_session_loads(db: SwarmDB, agent: RegisteredAgent) -> None:
    with db.session() as session:
        loaded = session.exec(select(RegisteredAgent)).one()
        assert loaded == agent
        assert loaded is not agent
        assert dict(loaded) == dict(agent)


def test_a_session_gives_back_the_row_that_was_added_to_it(db: SwarmDB, agent: RegisteredAgent) -> None:
    with db.session() as session:
        session.add(agent)
        assert session.exec(select(RegisteredAgent)).one() is agent
        assert session.get(RegisteredAgent, "a") is agent


def test_a_row_that_was_constructed_without_validation_is_not_taken_for_a_stored_one(db: SwarmDB) -> None:
    with pytest.raises(UnmappedInstanceError), db.session() as session:
        session.add(RegisteredAgent.model_construct(agent_id="new", agent_type="t"))


def test_threads_that_look_at_a_row_at_once_see_one_state(db: SwarmDB) -> None:
    db.insert_events({"event_type": "spawn", "agent_id": str(number), "agent_type": "t"} for number in range(500))
    barrier = threading.Barrier(4)

    def states(rows: list[AgentEvent]) -> list[Any]:
        found = []
        for row in rows:
            barrier.wait()
            found.append(inspect(row))
        return found

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            rows = db.get_events(limit=500)
            by_thread = list(pool.map(states, [rows] * 4))
    finally:
        sys.setswitchinterval(interval)
    assert all(len(set(map(id, of_one))) == 1 for of_one in zip(*by_thread, strict=True))


def test_several_new_rows_go_into_one_flush(db: SwarmDB) -> None:
    made = [AgentEvent(event_type=EventType.SPAWN, agent_id=name, agent_type="t") for name in "abc"]
    with db.session() as session:
        session.add_all(made)

    assert sorted(event.agent_id for event in db.get_events()) == ["a", "b", "c"]
    assert len({event.id for event in made}) == 3


def test_reading_many_rows_leaves_little_to_the_cycle_collector(db: SwarmDB) -> None:
    db.insert_events([{"event_type": "spawn", "agent_id": "a", "agent_type": "t"}] * 100)
    db.get_events()
    gc.collect()
    before = len(gc.get_objects())
    events = db.get_events()

    # The row, its values, its metadata, and pydantic's set of the fields that were set.
    assert (len(gc.get_objects()) - before) / len(events) < 5
