"""The registry."""

from datetime import timedelta
from typing import assert_type

from moai_flow.memory import AgentStatus, AgentStatusLike, RegisteredAgent, SwarmDB


def writing(db: SwarmDB) -> None:
    assert_type(db.register_agent("a", "expert-backend"), RegisteredAgent)
    db.register_agent(agent_id="a", agent_type="expert-backend", status="spawned", metadata={"priority": "high"})
    assert_type(db.update_agent_status("a", "running"), RegisteredAgent)
    db.update_agent_status("a", AgentStatus.COMPLETE, duration_ms=3000)
    assert_type(db.heartbeat("a"), bool)
    assert_type(db.delete_agent("a"), bool)


def reading(db: SwarmDB) -> None:
    agent = assert_type(db.get_agent("a"), RegisteredAgent | None)
    if agent:
        assert_type(agent.status, AgentStatus)
    assert_type(db.get_active_agents(), list[RegisteredAgent])
    assert_type(db.list_agents("error", agent_type="expert-backend"), list[RegisteredAgent])
    assert_type(db.find_stale_agents(timedelta(minutes=5)), list[RegisteredAgent])


def words(status: AgentStatusLike) -> None:
    assert_type(AgentStatus(status).is_active, bool)


def mistakes(db: SwarmDB) -> None:
    db.get_agent("a").status  # type: ignore[union-attr]  # noqa: B018
    db.update_agent_status("a", "runing")  # type: ignore[arg-type]
    db.update_agent_status("a", "complete", duration_ms=1.5)  # type: ignore[arg-type]
    db.update_agent_status("a")  # type: ignore[call-arg]
    db.register_agent("a", "expert-backend", "new")  # type: ignore[arg-type]
    db.register_agent("a", "expert-backend", metadata="high")  # type: ignore[arg-type]
    db.register_agent("a")  # type: ignore[call-arg]
    db.list_agents(status="done")  # type: ignore[arg-type]
    db.delete_agent(7)  # type: ignore[arg-type]
    db.heartbeat()  # type: ignore[call-arg]
    db.find_stale_agents(300)  # type: ignore[arg-type]
