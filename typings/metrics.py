"""Figures about tasks, agents and swarms."""

from datetime import UTC, datetime
from typing import assert_type

from moai_flow.memory import (
    AgentMetric,
    AgentMetricData,
    AgentMetricType,
    AgentMetricTypeLike,
    SwarmDB,
    SwarmMetric,
    SwarmMetricData,
    SwarmMetricType,
    SwarmMetricTypeLike,
    TaskMetric,
    TaskMetricData,
    TaskResult,
    TaskResultLike,
)


def writing(db: SwarmDB) -> None:
    now = datetime.now(UTC)
    assert_type(db.store_task_metric("t", "a", 1200, "success"), datetime)
    db.store_task_metric("t", "a", None, TaskResult.TIMEOUT, tokens_used=900, files_changed=2, timestamp=now)
    assert_type(db.store_agent_metric("a", "success_rate", 0.9), int)
    db.store_agent_metric("a", AgentMetricType.DURATION, 1200, {"task": "t"}, now)
    assert_type(db.store_swarm_metric("s", "health", 1), int)
    db.store_swarm_metric("s", SwarmMetricType.LATENCY, 0.2, timestamp="2025-11-30T10:00:00Z")


def batches(db: SwarmDB) -> None:
    task: TaskMetricData = {"task_id": "t", "agent_id": "a", "result": "success"}
    made = TaskMetric(task_id="t", agent_id="a", result=TaskResult.FAILURE)
    assert_type(db.store_task_metrics([task, made]), list[datetime])
    db.store_task_metrics(
        [{"task_id": "t", "agent_id": "a", "result": TaskResult.TIMEOUT, "duration_ms": None, "tokens_used": 7}]
    )
    db.store_task_metrics({**task, "timestamp": "2025-11-30T10:00:00Z"} for _ in range(3))
    of_agent: AgentMetricData = {"agent_id": "a", "metric_type": "duration", "value": 1200}
    assert_type(db.store_agent_metrics([of_agent, {**of_agent, "metadata": {"task": "t"}}]), int)
    db.store_agent_metrics(db.get_agent_metrics())
    of_swarm: SwarmMetricData = {"swarm_id": "s", "metric_type": "health", "value": 1, "timestamp": None}
    assert_type(db.store_swarm_metrics(iter([of_swarm])), int)


def reading(db: SwarmDB) -> None:
    assert_type(db.get_task_metrics(), list[TaskMetric])
    db.get_task_metrics("t", "a", "failure", since="2025-11-30", until=datetime.now(UTC), limit=5)
    assert_type(db.get_agent_metrics("a", "duration", since="2025-11-30", limit=5), list[AgentMetric])
    assert_type(db.get_swarm_metrics("s", "latency", until="2025-11-30", limit=5), list[SwarmMetric])


def words(result: TaskResultLike, of_agent: AgentMetricTypeLike, of_swarm: SwarmMetricTypeLike) -> None:
    assert_type(TaskResult(result), TaskResult)
    assert_type(AgentMetricType(of_agent), AgentMetricType)
    assert_type(SwarmMetricType(of_swarm), SwarmMetricType)


def mistakes(db: SwarmDB) -> None:
    db.store_task_metric("t", "a", 1200, result="ok")  # type: ignore[arg-type]
    db.store_task_metric("t", "a", 1.5, "success")  # type: ignore[arg-type]
    db.store_task_metric("t", "a", 1200)  # type: ignore[call-arg]
    db.store_agent_metric("a", "latency", 0.2)  # type: ignore[arg-type]
    db.store_agent_metric("a", "duration", "1200")  # type: ignore[arg-type]
    db.store_swarm_metric("s", "success_rate", 0.9)  # type: ignore[arg-type]
    db.store_swarm_metric("s", AgentMetricType.DURATION, 1200)  # type: ignore[arg-type]
    db.get_task_metrics(result="ok")  # type: ignore[arg-type]
    db.get_task_metrics("t", "a", "success", "2025-11-30")  # type: ignore[call-arg]
    db.get_agent_metrics(metric_type="latency")  # type: ignore[arg-type]
    db.get_swarm_metrics(metric_type="duration")  # type: ignore[arg-type]
    db.store_task_metrics([{"task_id": "t", "agent_id": "a"}])  # type: ignore[list-item]
    db.store_task_metrics([{"task_id": "t", "agent_id": "a", "result": "ok"}])  # type: ignore[list-item]
    db.store_task_metrics({"task_id": "t", "agent_id": "a", "result": "success"})  # type: ignore[dict-item]
    db.store_agent_metrics([{"swarm_id": "s", "metric_type": "duration", "value": 1}])  # type: ignore[list-item]
    db.store_agent_metrics(db.get_swarm_metrics())  # type: ignore[arg-type]
    db.store_swarm_metrics([{"swarm_id": "s", "metric_type": "duration", "value": 1}])  # type: ignore[list-item]
    lacking: SwarmMetricData = {"swarm_id": "s", "metric_type": "health"}  # type: ignore[typeddict-item]
    lacking["unit"] = "s"  # type: ignore[typeddict-unknown-key]
