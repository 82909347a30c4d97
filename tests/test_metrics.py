"""Task, agent and swarm metrics."""

from datetime import UTC, datetime, timedelta

import pytest

from conftest import Clock
from moai_flow.memory import (
    AgentMetricType,
    InvalidInputError,
    SwarmDB,
    SwarmMetricType,
    TaskMetric,
    TaskResult,
)


def test_a_task_metric_comes_back_typed(db: SwarmDB, clock: Clock) -> None:
    kept = db.store_task_metric("t", "a", 1200, "timeout", tokens_used=7, files_changed=2)

    assert kept == clock.now
    assert db.get_task_metrics() == [
        TaskMetric(
            task_id="t",
            agent_id="a",
            duration_ms=1200,
            result=TaskResult.TIMEOUT,
            tokens_used=7,
            files_changed=2,
            timestamp=clock.now,
        )
    ]


def test_a_duration_may_be_unknown(db: SwarmDB) -> None:
    db.store_task_metric("t", "a", None, "success")

    (found,) = db.get_task_metrics()
    assert (found.duration_ms, found.tokens_used, found.files_changed) == (None, 0, 0)


def test_metrics_of_a_task_at_the_same_time_take_the_next_free_microsecond(db: SwarmDB, clock: Clock) -> None:
    kept = [db.store_task_metric("t", "a", None, "success") for _ in range(3)]
    db.store_task_metric("other", "a", None, "success")

    assert kept == [clock.now + timedelta(microseconds=number) for number in range(3)]
    assert [found.timestamp for found in db.get_task_metrics(task_id="t")] == kept[::-1]
    assert db.get_task_metrics(task_id="other")[0].timestamp == clock.now


def test_times_with_and_without_a_fraction_are_in_order(local_db: SwarmDB) -> None:
    for text in ("10:00:00", "10:00:00.5", "10:00:01", "09:59:59.999999"):
        local_db.store_swarm_metric("s", "health", 1, timestamp=f"2025-11-30T{text}+00:00")

    with local_db.transaction() as conn:
        stored = [row["timestamp"] for row in conn.execute("SELECT timestamp FROM swarm_metrics ORDER BY timestamp")]
    assert stored == [
        "2025-11-30 09:59:59.999999",
        "2025-11-30 10:00:00",
        "2025-11-30 10:00:00.500000",
        "2025-11-30 10:00:01",
    ]
    assert [found.timestamp.second for found in local_db.get_swarm_metrics()] == [1, 0, 0, 59]


def test_agent_and_swarm_metrics_come_back_typed(db: SwarmDB, clock: Clock) -> None:
    first = db.store_agent_metric("a", "success_rate", 0.5, {"window": 10})
    second = db.store_agent_metric("a", AgentMetricType.THROUGHPUT, 3)
    swarm = db.store_swarm_metric("s", "latency", 12.5)

    newest, oldest = db.get_agent_metrics()
    assert (newest.metric_id, oldest.metric_id) == (second, first)
    assert (oldest.metric_type, oldest.value, oldest.metadata_) == (AgentMetricType.SUCCESS_RATE, 0.5, {"window": 10})
    assert (type(newest.value), newest.value, newest.timestamp) == (float, 3.0, clock.now)
    (found,) = db.get_swarm_metrics()
    assert (found.metric_id, found.swarm_id, found.metric_type) == (swarm, "s", SwarmMetricType.LATENCY)


def test_metrics_are_filtered(db: SwarmDB) -> None:
    day = datetime(2025, 1, 1, tzinfo=UTC)
    for number, result in enumerate(TaskResult):
        db.store_task_metric(f"t{number}", f"a{number % 2}", number, result, timestamp=day + timedelta(days=number))
    for number, agent_type in enumerate(AgentMetricType):
        db.store_agent_metric(f"a{number % 2}", agent_type, number, timestamp=day + timedelta(days=number))
    for number, swarm_type in enumerate(SwarmMetricType):
        db.store_swarm_metric(f"s{number % 2}", swarm_type, number, timestamp=day + timedelta(days=number))

    assert [metric.task_id for metric in db.get_task_metrics()] == ["t3", "t2", "t1", "t0"]
    assert [metric.task_id for metric in db.get_task_metrics(agent_id="a1")] == ["t3", "t1"]
    assert [metric.task_id for metric in db.get_task_metrics(result="failure")] == ["t1"]
    assert [metric.task_id for metric in db.get_task_metrics("t2", "a0", TaskResult.TIMEOUT)] == ["t2"]
    since, until = day + timedelta(days=1), day + timedelta(days=3)
    assert [metric.task_id for metric in db.get_task_metrics(since=since, until=until)] == ["t2", "t1"]
    assert [metric.value for metric in db.get_agent_metrics(since=since, until=until)] == [2, 1]
    assert [metric.value for metric in db.get_agent_metrics("a1")] == [3, 1]
    assert [metric.value for metric in db.get_agent_metrics("a1", "success_rate")] == [1]
    assert [metric.value for metric in db.get_swarm_metrics(metric_type="health")] == [0]
    assert [metric.value for metric in db.get_swarm_metrics("s0", since=since, until=until)] == [2]
    assert [metric.value for metric in db.get_swarm_metrics(limit=1)] == [3]
    assert db.get_swarm_metrics(limit=0) == []
    assert db.get_task_metrics(task_id="") == []


def test_a_time_after_which_no_other_fits_is_refused(db: SwarmDB) -> None:
    last = datetime.max.replace(tzinfo=UTC)
    db.store_task_metric("t", "a", None, "success", timestamp=last)

    with pytest.raises(InvalidInputError, match="timestamp"):
        db.store_task_metric("t", "a", None, "success", timestamp=last)


def test_null_counts_read_as_zero(db: SwarmDB) -> None:
    with db.transaction() as conn:
        conn.execute(
            "INSERT INTO task_metrics (task_id, agent_id, result, tokens_used, files_changed) "
            "VALUES ('t', 'a', 'success', NULL, NULL)"
        )
        conn.execute("INSERT INTO agent_metrics (agent_id, metric_type, value) VALUES ('a', 'duration', 7)")

    (task,) = db.get_task_metrics()
    assert (task.tokens_used, task.files_changed) == (0, 0)
    (agent,) = db.get_agent_metrics()
    assert agent.metadata_ == {}
    assert abs(agent.timestamp - datetime.now(UTC)) < timedelta(minutes=1)
