"""Rows: typed attributes, and items by column name."""

from datetime import datetime
from typing import Any, assert_type

from moai_flow.memory import (
    AgentEvent,
    AgentMetric,
    AgentMetricType,
    AgentStatus,
    EventType,
    MemoryType,
    RegisteredAgent,
    SchemaInfo,
    SessionMemory,
    SwarmMetric,
    SwarmMetricType,
    TaskMetric,
    TaskResult,
)


def event(row: AgentEvent) -> None:
    assert_type(row.id, int | None)
    assert_type(row.event_id, str)
    assert_type(row.event_type, EventType)
    assert_type(row.agent_id, str)
    assert_type(row.agent_type, str)
    assert_type(row.timestamp, datetime)
    assert_type(row.metadata_, dict[str, Any])
    assert_type(row.created_at, datetime)


def agent(row: RegisteredAgent) -> None:
    assert_type(row.agent_id, str)
    assert_type(row.status, AgentStatus)
    assert_type(row.spawn_time, float)
    assert_type(row.complete_time, float | None)
    assert_type(row.spawned_at, datetime)
    assert_type(row.completed_at, datetime | None)
    assert_type(row.duration_ms, int | None)
    assert_type(row.metadata_, dict[str, Any])
    assert_type(row.last_updated, datetime)


def memory(row: SessionMemory) -> None:
    assert_type(row.id, int | None)
    assert_type(row.session_id, str)
    assert_type(row.memory_type, MemoryType)
    assert_type(row.key, str)
    assert_type(row.value, Any)
    assert_type(row.timestamp, datetime)
    assert_type(row.ttl_hours, int | None)
    assert_type(row.expires_at, datetime | None)


def metrics(task: TaskMetric, of_agent: AgentMetric, of_swarm: SwarmMetric) -> None:
    assert_type(task.task_id, str)
    assert_type(task.result, TaskResult)
    assert_type(task.duration_ms, int | None)
    assert_type((task.tokens_used, task.files_changed), tuple[int, int])
    assert_type(task.timestamp, datetime)
    assert_type(of_agent.metric_type, AgentMetricType)
    assert_type(of_agent.value, float)
    assert_type(of_swarm.metric_type, SwarmMetricType)
    assert_type(of_swarm.metric_id, int | None)


def info(row: SchemaInfo) -> None:
    assert_type((row.key, row.value, row.updated_at), tuple[str, str, datetime])


def items(row: RegisteredAgent) -> None:
    assert_type(row["status"], Any)
    assert_type(row.get("status"), Any)
    assert_type(row.keys(), list[str])
    assert_type("status" in row, bool)


def mistakes(row: RegisteredAgent, event: AgentEvent) -> None:
    row.state  # type: ignore[attr-defined]  # noqa: B018
    row.status = "runing"  # type: ignore[assignment]
    row.complete_time + 1  # type: ignore[operator]
    row.spawned_at = event.timestamp  # type: ignore[misc]
    row[0]  # type: ignore[index]
    AgentStatus.RUNING  # type: ignore[attr-defined]  # noqa: B018
