"""Following tasks and agents, and giving up those fallen silent."""

from datetime import datetime, timedelta
from typing import Any, assert_type

from moai_flow.memory import RegisteredAgent, SwarmDB, TaskResult, TrackedAgent, TrackedTask


def tasks(db: SwarmDB) -> None:
    assert_type(db.track_task("t", "a"), TrackedTask)
    with db.track_task(task_id="t", agent_id="a") as task:
        assert_type(task, TrackedTask)
        assert_type((task.task_id, task.agent_id), tuple[str, str])
        task.tokens_used += 1200
        task.files_changed = 2
        task.result = "failure"
        task.result = TaskResult.TIMEOUT
    assert_type(task.duration_ms, int | None)
    assert_type(task.timestamp, datetime | None)


def results(task: TrackedTask) -> None:
    assert_type(task.result, TaskResult | None)
    assert_type((task.tokens_used, task.files_changed), tuple[int, int])


def agents(db: SwarmDB) -> None:
    assert_type(db.track_agent("a", "expert-backend"), TrackedAgent)
    with db.track_agent("a", "expert-backend", metadata={"model": "large-4"}) as agent:
        assert_type(agent, TrackedAgent)
        assert_type((agent.agent_id, agent.agent_type), tuple[str, str])
        assert_type(agent.heartbeat(), bool)
        assert_type(agent.metadata, dict[str, Any])
        agent.metadata["files"] = ["orders.py"]
        agent.metadata = {"files": []}
    assert_type(agent.duration_ms, int | None)


def an_exception_is_never_swallowed(db: SwarmDB) -> int:
    with db.track_agent("a", "expert-backend"), db.track_task("t", "a"):
        return 7


def silence(db: SwarmDB) -> None:
    assert_type(db.mark_stale_agents(timedelta(minutes=5)), list[RegisteredAgent])
    db.mark_stale_agents(timedelta(minutes=5), reason="the host went away")


def mistakes(db: SwarmDB) -> None:
    db.track_task("t")  # type: ignore[call-arg]
    db.track_agent("a")  # type: ignore[call-arg]
    db.track_agent("a", "expert-backend", "large-4")  # type: ignore[arg-type]
    db.mark_stale_agents(300)  # type: ignore[arg-type]
    with db.track_task("t", "a") as task:
        task.tokens_used = 1.5  # type: ignore[assignment]
        task.result = "ok"  # type: ignore[assignment]
        task.task_id = "u"  # type: ignore[misc]
        task.duration_ms = 5  # type: ignore[misc]
        task.timestamp = None  # type: ignore[misc]
    with db.track_agent("a", "expert-backend") as agent:
        agent.metadata = "large-4"  # type: ignore[assignment]
        agent.agent_id = "b"  # type: ignore[misc]
        agent.heartbeat("a")  # type: ignore[call-arg]
    db.track_task("t", "a").metadata  # type: ignore[attr-defined]  # noqa: B018
