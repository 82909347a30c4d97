"""What the metrics come to."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import assert_type

from moai_flow.memory import (
    AgentMetricType,
    AgentOrder,
    AgentSummary,
    Aggregate,
    FigureSummary,
    MetricBucket,
    SeriesMetric,
    SwarmDB,
    SwarmMetricType,
    SwarmSummary,
    TaskResult,
    TaskSummary,
)


def tasks(db: SwarmDB) -> None:
    summary = assert_type(db.summarize_tasks(), TaskSummary)
    db.summarize_tasks("a", since="2025-11-30", until=datetime.now(UTC))
    assert_type(summary.count, int)
    assert_type(summary.results, Mapping[TaskResult, int])
    assert_type(summary.success_rate, float | None)
    assert_type((summary.tokens_used, summary.files_changed, summary.measured), tuple[int, int, int])
    assert_type((summary.mean_ms, summary.max_ms), tuple[float | None, int | None])
    assert_type((summary.p50_ms, summary.p95_ms), tuple[float | None, float | None])
    assert_type(summary.p99_ms, float | None)


def agents(db: SwarmDB, order: AgentOrder) -> None:
    assert_type(db.summarize_agents(), list[AgentSummary])
    (first,) = db.summarize_agents(since="2025-11-30", until=None, order_by="p95_ms", descending=True, limit=1)
    db.summarize_agents(order_by=order)
    assert_type(first.agent_id, str)
    assert_type(first.count, int)


def series(db: SwarmDB, metric: SeriesMetric, agg: Aggregate) -> None:
    hour = timedelta(hours=1)
    found = assert_type(db.metric_series("duration_ms", bucket=hour), list[MetricBucket])
    db.metric_series(AgentMetricType.THROUGHPUT, bucket=hour, agg="p99", of="a", since="2025-11-30")
    db.metric_series(SwarmMetricType.THROUGHPUT, bucket=hour, agg=agg, of="s", until=datetime.now(UTC))
    db.metric_series(metric, bucket=hour)
    assert_type(found[0].start, datetime)
    assert_type(found[0].count, int)
    assert_type(found[0].value, float | None)


def swarms(db: SwarmDB) -> None:
    summary = assert_type(db.summarize_swarm("s", since="2025-11-30"), SwarmSummary)
    assert_type(summary.swarm_id, str)
    figure = assert_type(summary.figures[SwarmMetricType.HEALTH], FigureSummary)
    assert_type((figure.latest, figure.latest_at, figure.count), tuple[float, datetime, int])
    assert_type((figure.mean, figure.minimum, figure.maximum), tuple[float, float, float])
    assert_type((figure.p50, figure.p95, figure.p99), tuple[float, float, float])


def mistakes(db: SwarmDB) -> None:
    hour = timedelta(hours=1)
    db.summarize_tasks("a", "2025-11-30")  # type: ignore[call-arg]
    db.summarize_agents(order_by="results")  # type: ignore[arg-type]
    db.metric_series("throughput", bucket=hour)  # type: ignore[arg-type]
    db.metric_series("duration_ms")  # type: ignore[call-arg]
    db.metric_series("duration_ms", bucket=3600)  # type: ignore[arg-type]
    db.metric_series("duration_ms", bucket=hour, agg="p90")  # type: ignore[arg-type]
    db.summarize_swarm()  # type: ignore[call-arg]
    db.summarize_tasks().count = 1  # type: ignore[misc]
