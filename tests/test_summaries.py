"""What metrics come to, held against plain Python that has nothing in common with the SQL."""

import math
import os
import random
import sqlite3
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args
from zoneinfo import ZoneInfo

import psycopg
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, delete

from moai_flow.memory import (
    AgentMetric,
    AgentMetricType,
    AgentOrder,
    AgentSummary,
    Aggregate,
    CorruptDataError,
    FigureSummary,
    InvalidInputError,
    MetricBucket,
    SwarmDB,
    SwarmMetric,
    SwarmMetricType,
    SwarmSummary,
    TaskMetric,
    TaskResult,
    TaskSummary,
)
from test_schema import SPECIFIED

LARGEST = 2**63 - 1
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
NOON = datetime(2025, 11, 30, 12, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LOST = TaskResult.read("lost")


# The reference


def exactly(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def percentile(values: Iterable[float], percent: int) -> float:
    """Return SQL's percentile_cont, computed in fractions and rounded once."""
    ordered = sorted(map(Fraction, values))
    place = Fraction(percent, 100) * (len(ordered) - 1)
    below = ordered[math.floor(place)]
    return float(below + (ordered[math.ceil(place)] - below) * (place - math.floor(place)))


AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "count": len,
    "sum": lambda values: exactly(sum(map(Fraction, values), Fraction())),
    "mean": lambda values: exactly(sum(map(Fraction, values), Fraction()) / len(values)),
    "min": lambda values: float(min(values)),
    "max": lambda values: float(max(values)),
    "p50": lambda values: percentile(values, 50),
    "p95": lambda values: percentile(values, 95),
    "p99": lambda values: percentile(values, 99),
}


def facts_of_tasks(tasks: Iterable[TaskMetric]) -> dict[str, Any]:
    tasks = list(tasks)
    durations = [task.duration_ms for task in tasks if task.duration_ms is not None]
    return {
        "count": len(tasks),
        "results": {**dict.fromkeys(TaskResult, 0), **Counter(task.result for task in tasks)},
        "success_rate": float(Fraction(sum(task.result == "success" for task in tasks), len(tasks))) if tasks else None,
        "tokens_used": sum(task.tokens_used for task in tasks),
        "files_changed": sum(task.files_changed for task in tasks),
        "measured": len(durations),
        "mean_ms": AGGREGATES["mean"](durations) if durations else None,
        **{f"p{percent}_ms": percentile(durations, percent) if durations else None for percent in (50, 95, 99)},
        "max_ms": max(durations, default=None),
    }


def facts_of_figures(metrics: Sequence[SwarmMetric]) -> FigureSummary:
    values = [metric.value for metric in metrics]
    _, newest = max(enumerate(metrics), key=lambda numbered: (numbered[1].timestamp, numbered[0]))
    return FigureSummary(
        latest=newest.value,
        latest_at=newest.timestamp,
        count=len(values),
        mean=AGGREGATES["mean"](values),
        minimum=min(values),
        maximum=max(values),
        p50=percentile(values, 50),
        p95=percentile(values, 95),
        p99=percentile(values, 99),
    )


def series_of(
    timed: Iterable[tuple[datetime, float]], size: timedelta, agg: str, since: datetime | None, until: datetime | None
) -> list[MetricBucket]:
    buckets: defaultdict[datetime, list[float]] = defaultdict(list)
    for moment, value in timed:
        buckets[moment - (moment - EPOCH) % size].append(value)
    edges = [*buckets] if since is None or until is None else []
    if (since is None or until is None) and not edges:
        return []
    first = min(edges) if since is None else since - (since - EPOCH) % size
    end = max(edges) + size if until is None else until
    found = []
    while first < end and since != end:
        values = buckets.get(first, [])
        empty = 0.0 if agg in ("count", "sum") else None
        found.append(MetricBucket(first, len(values), AGGREGATES[agg](values) if values else empty))
        first += size
    return found


def within(rows: Iterable[Any], since: datetime | None, until: datetime | None) -> list[Any]:
    return [
        row for row in rows if (since is None or row.timestamp >= since) and (until is None or row.timestamp < until)
    ]


# Rows by chance

MOMENTS = st.one_of(
    st.sampled_from(
        [
            NOON,
            NOON - timedelta(microseconds=1),
            NOON.replace(microsecond=999_999),
            EPOCH,
            EPOCH - timedelta(microseconds=1),
            EPOCH - timedelta(seconds=1),
            datetime(2025, 10, 26, 0, 59, 59, 999_999, tzinfo=UTC),  # Summer time ends in Europe a moment later.
            datetime(2025, 3, 30, 1, tzinfo=UTC),
        ]
    ),
    st.datetimes(datetime(2025, 11, 29), datetime(2025, 12, 1), timezones=st.just(UTC)),  # noqa: DTZ001 (bounds are naive)
    st.datetimes(datetime(1969, 12, 30), datetime(1970, 1, 2), timezones=st.just(UTC)),  # noqa: DTZ001
)
COUNTS = st.one_of(st.integers(0, 5), st.sampled_from([2**31, 2**32, 2**53 + 1, LARGEST - 1, LARGEST]))
VALUES = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.1, 0.2, 0.3, 1e16, -1e16, 5e-324, -1.7976931348623157e308, 1.7976931348623157e308, 2.0**32]),
).map(lambda value: value + 0.0)
NAMES = st.sampled_from(["a", "B", "ä"])


@st.composite
def tasks(draw: st.DrawFn) -> list[TaskMetric]:
    row = st.tuples(
        NAMES, st.none() | st.integers(0, 2) | COUNTS, st.sampled_from([*TaskResult, LOST]), COUNTS, COUNTS, MOMENTS
    )
    return [
        TaskMetric(
            task_id=f"t{number}",
            agent_id=agent,
            duration_ms=duration,
            result=result,
            tokens_used=tokens,
            files_changed=files,
            timestamp=moment,
        )
        for number, (agent, duration, result, tokens, files, moment) in enumerate(draw(st.lists(row, max_size=25)))
    ]


WINDOWS = st.tuples(st.none() | MOMENTS, st.none() | MOMENTS)

# Each example empties the tables first, so they may share the store.
on_each_store = settings(
    max_examples=int(os.environ.get("MOAI_TEST_EXAMPLES", "30")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def fill(db: SwarmDB, rows: Iterable[Any]) -> None:
    """Make *rows* all metrics that there are, in their order."""
    with db.session() as session:
        for model in (TaskMetric, AgentMetric, SwarmMetric):
            session.exec(delete(model))
        for row in rows:
            session.add(type(row)(**{name: row[name] for name in row.keys() if name != "metric_id"}))  # noqa: SIM118
            session.flush()


@on_each_store
@given(rows=tasks(), window=WINDOWS, agent=NAMES)
def test_summaries_of_tasks_are_what_plain_python_says(
    db: SwarmDB, rows: list[TaskMetric], window: tuple[datetime | None, datetime | None], agent: str
) -> None:
    since, until = window
    assume(since is None or until is None or since <= until)
    fill(db, rows)
    counted = within(rows, since, until)
    of_agents: dict[str, list[TaskMetric]] = {}
    for row in counted:
        of_agents.setdefault(row.agent_id, []).append(row)

    assert db.summarize_tasks(since=since, until=until) == TaskSummary(**facts_of_tasks(counted))
    of_one = TaskSummary(**facts_of_tasks(of_agents.get(agent, [])))
    assert db.summarize_tasks(agent, since=since, until=until) == of_one
    assert db.summarize_agents(since=since, until=until) == [
        AgentSummary(agent_id=name, **facts_of_tasks(of_agents[name])) for name in sorted(of_agents)
    ]


@on_each_store
@given(
    rows=tasks(),
    metric=st.sampled_from(["duration_ms", "tokens_used", "files_changed", "success_rate"]),
    size=st.sampled_from([timedelta(minutes=17), HOUR, timedelta(hours=7), DAY, timedelta(days=7)]),
    window=WINDOWS,
    agent=st.none() | NAMES,
)
def test_series_of_tasks_are_what_plain_python_says(
    db: SwarmDB, rows: list[TaskMetric], metric: Any, size: timedelta, window: Any, agent: str | None
) -> None:
    since, until = window
    assume(since is None or until is None or since <= until)
    counted = [row for row in within(rows, since, until) if agent is None or row.agent_id == agent]
    timed = [
        (row.timestamp, float(row.result == "success") if metric == "success_rate" else row[metric])
        for row in counted
        if metric != "duration_ms" or row.duration_ms is not None
    ]
    edges = [moment for moment in (since, until, *(moment for moment, _ in timed)) if moment is not None]
    assume(not edges or (max(edges) - min(edges)) / size < 500)  # Plain Python is slow.
    fill(db, rows)

    for agg in get_args(Aggregate):
        found = db.metric_series(metric, bucket=size, agg=agg, of=agent, since=since, until=until)
        assert found == series_of(timed, size, agg, since, until)


FIGURES = st.lists(
    st.tuples(st.sampled_from(["s", "t"]), st.sampled_from([*SwarmMetricType]), VALUES, MOMENTS), max_size=20
)


@on_each_store
@given(drawn=FIGURES, window=WINDOWS)
@example(
    drawn=[("s", SwarmMetricType.HEALTH, value, NOON) for value in (1e308, 1e308, 1e308, -1e308, 5e-324, 1.0, 1e-9)],
    window=(None, None),
)
@example(drawn=[("s", SwarmMetricType.HEALTH, 0.1, NOON)] * 10, window=(NOON, NOON + DAY))
def test_summaries_of_swarms_are_what_plain_python_says(db: SwarmDB, drawn: Any, window: Any) -> None:
    since, until = window
    assume(since is None or until is None or since <= until)
    rows = [
        SwarmMetric(swarm_id=swarm, metric_type=kind, value=value, timestamp=moment)
        for swarm, kind, value, moment in drawn
    ]
    fill(db, rows)
    of_types: dict[SwarmMetricType, list[SwarmMetric]] = {}
    for row in within(rows, since, until):
        if row.swarm_id == "s":
            of_types.setdefault(row.metric_type, []).append(row)

    assert db.summarize_swarm("s", since=since, until=until) == SwarmSummary(
        "s", {kind: facts_of_figures(of_types[kind]) for kind in of_types}
    )


@on_each_store
@given(drawn=FIGURES, of=st.none() | st.sampled_from(["s", "t"]))
def test_series_of_figures_are_what_plain_python_says(db: SwarmDB, drawn: Any, of: str | None) -> None:
    rows: list[Any] = []
    for owner, kind, value, moment in drawn:
        rows.append(SwarmMetric(swarm_id=owner, metric_type=kind, value=value, timestamp=moment))
        about_agent = AgentMetricType.THROUGHPUT if kind == "throughput" else AgentMetricType.DURATION
        rows.append(AgentMetric(agent_id=owner, metric_type=about_agent, value=value, timestamp=moment))
    fill(db, rows)
    timed = [(moment, value) for owner, kind, value, moment in drawn if kind == "throughput" and of in (None, owner)]
    for agg in get_args(Aggregate):
        expected = series_of(timed, 30 * DAY, agg, None, None)
        assert db.metric_series(SwarmMetricType.THROUGHPUT, bucket=30 * DAY, agg=agg, of=of) == expected
        assert db.metric_series(AgentMetricType.THROUGHPUT, bucket=30 * DAY, agg=agg, of=of) == expected


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=50))
def test_the_reference_agrees_with_the_standard_library(values: list[int]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")

    assert [percentile(values, percent) for percent in (50, 95, 99)] == [cuts[49], cuts[94], cuts[98]]
    assert AGGREGATES["mean"](values) == statistics.mean(values)


# Facts


def test_a_summary_of_no_tasks_is_empty(db: SwarmDB) -> None:
    assert db.summarize_tasks() == TaskSummary(
        count=0,
        results=dict.fromkeys(TaskResult, 0),
        success_rate=None,
        tokens_used=0,
        files_changed=0,
        measured=0,
        mean_ms=None,
        p50_ms=None,
        p95_ms=None,
        p99_ms=None,
        max_ms=None,
    )
    assert db.summarize_agents() == []
    assert db.summarize_swarm("s") == SwarmSummary("s", {})


def test_percentiles_are_linear_between_the_values_next_to_them(db: SwarmDB) -> None:
    for number, duration in enumerate([10, 20, 30, 40]):
        db.store_task_metric(f"t{number}", "a", duration, "success")

    summary = db.summarize_tasks()
    assert (summary.p50_ms, summary.p95_ms, summary.p99_ms) == (25.0, 38.5, 39.7)


def test_equal_values_around_a_percentile_are_ranked_one_by_one(db: SwarmDB) -> None:
    for number, duration in enumerate([10, 5, 5, 1, 5, 5, 9, 5]):
        db.store_task_metric(f"t{number}", "a", duration, "success")

    for summary in (db.summarize_tasks(), db.summarize_tasks("a"), *db.summarize_agents()):
        assert (summary.p50_ms, summary.p95_ms, summary.p99_ms) == (5.0, 9.65, 9.93)


def test_the_numbers_have_the_types_that_they_are_declared_with(db: SwarmDB) -> None:
    for duration in (3, 4):
        db.store_task_metric("t", "a", duration, "success", 1, 2)
    db.store_swarm_metric("s", "health", 3)

    (agent,) = db.summarize_agents()
    for name in ("count", "tokens_used", "files_changed", "measured", "max_ms"):
        assert type(getattr(agent, name)) is int
    for name in ("success_rate", "mean_ms", "p50_ms", "p95_ms", "p99_ms"):
        assert type(getattr(agent, name)) is float
    assert {type(number) for number in agent.results.values()} == {int}
    figure = db.summarize_swarm("s").figures[SwarmMetricType.HEALTH]
    assert {type(value) for name, value in vars(figure).items() if name not in {"count", "latest_at"}} == {float}
    assert (type(figure.count), figure.latest_at.tzinfo) == (int, UTC)
    for agg in get_args(Aggregate):
        (bucket,) = db.metric_series("duration_ms", bucket=DAY, agg=agg)
        assert (type(bucket.count), type(bucket.value), bucket.start.tzinfo) == (int, float, UTC)


def test_results_of_older_programs_are_members_too(db: SwarmDB) -> None:
    fill(db, [TaskMetric(task_id=f"t{n}", agent_id="a", result=TaskResult.read(word)) for n, word in enumerate("zYaz")])

    results = db.summarize_tasks().results
    assert list(results.items()) == [*((result, 0) for result in TaskResult), ("Y", 1), ("a", 1), ("z", 2)]
    assert all(isinstance(result, TaskResult) for result in results)
    assert db.summarize_tasks().success_rate == 0


def test_types_of_figures_that_older_programs_wrote_are_members_too(db: SwarmDB) -> None:
    mood = SwarmMetricType.read("mood")
    others = (SwarmMetricType.read("Zeal"), mood, SwarmMetricType.read("awe"))
    fill(
        db,
        [
            SwarmMetric(swarm_id="s", metric_type=kind, value=1.0, timestamp=NOON)
            for kind in (*others, SwarmMetricType.LATENCY, SwarmMetricType.THROUGHPUT)
        ],
    )

    assert list(db.summarize_swarm("s").figures) == ["throughput", "latency", "Zeal", "awe", "mood"]
    assert db.metric_series(mood, bucket=DAY, agg="sum") == [MetricBucket(NOON.replace(hour=0), 1, 1.0)]


def test_totals_do_not_overflow(db: SwarmDB) -> None:
    for number in range(3):
        db.store_task_metric(f"t{number}", "a", LARGEST, "success", LARGEST, LARGEST)

    summary = db.summarize_tasks()
    assert (summary.tokens_used, summary.files_changed, summary.max_ms) == (3 * LARGEST, 3 * LARGEST, LARGEST)
    assert summary.mean_ms == summary.p50_ms == float(LARGEST)


def test_null_counts_are_zero(db: SwarmDB) -> None:
    with db.transaction() as conn:
        conn.execute(
            "INSERT INTO task_metrics (task_id, agent_id, result, tokens_used, files_changed) "
            "VALUES ('t', 'a', 'success', NULL, NULL)"
        )

    assert (db.summarize_tasks().tokens_used, db.summarize_tasks().files_changed) == (0, 0)
    (bucket,) = db.metric_series("tokens_used", bucket=DAY, agg="min")
    assert (bucket.count, bucket.value) == (1, 0.0)


def test_negative_durations_of_other_programs_are_added_up(db: SwarmDB) -> None:
    fill(
        db,
        [
            TaskMetric(task_id=str(value), agent_id="a", duration_ms=value, result=TaskResult.SUCCESS, timestamp=NOON)
            for value in (-(2**63), -5, 7)
        ],
    )

    (total,) = db.metric_series("duration_ms", bucket=DAY, agg="sum")
    assert (total.value, db.summarize_tasks().p50_ms) == (float(2 - 2**63), -5.0)


# Filters and order


def test_since_is_inclusive_and_until_is_not(db: SwarmDB) -> None:
    for number in range(3):
        db.store_task_metric(f"t{number}", "a", number, "success", timestamp=NOON + number * HOUR)
        db.store_swarm_metric("s", "health", number, timestamp=NOON + number * HOUR)
    since, until = NOON + HOUR, NOON + 2 * HOUR

    assert db.summarize_tasks(since=since, until=until).max_ms == 1
    assert [agent.count for agent in db.summarize_agents(since=since, until=until)] == [1]
    assert db.summarize_swarm("s", since=since, until=until).figures[SwarmMetricType.HEALTH].latest == 1
    assert db.metric_series("duration_ms", bucket=HOUR, since=since, until=until) == [MetricBucket(since, 1, 1.0)]
    assert db.summarize_tasks(since=since, until=since).count == 0
    assert db.summarize_tasks("", since=since).count == 0
    assert db.metric_series("duration_ms", bucket=HOUR, of="") == []


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("order_by", get_args(AgentOrder))
def test_agents_come_in_a_total_order_with_those_without_a_figure_last(
    db: SwarmDB, order_by: AgentOrder, *, descending: bool
) -> None:
    for number, (agent, duration, result) in enumerate(
        [("d", 5, "success"), ("c", None, "failure"), ("b", 5, "success"), ("a", None, "failure"), ("e", 9, "failure")]
    ):
        db.store_task_metric(f"t{number}", agent, duration, result, tokens_used=number % 2)  # type: ignore[arg-type]

    found = db.summarize_agents(order_by=order_by, descending=descending)
    figures = [getattr(agent, order_by) for agent in found]
    known = [figure for figure in figures if figure is not None]
    assert known == sorted(known, reverse=descending)
    assert figures == known + [None] * (len(figures) - len(known))
    for one, next_one in pairwise(found):
        if order_by != "agent_id" and getattr(one, order_by) == getattr(next_one, order_by):
            assert one.agent_id < next_one.agent_id
    assert len(found) == 5
    assert db.summarize_agents(order_by=order_by, descending=descending, limit=3) == found[:3]
    assert db.summarize_agents(order_by=order_by, limit=0) == []


# Series


def test_a_series_has_its_empty_buckets(db: SwarmDB) -> None:
    db.store_task_metric("t0", "a", 10, "success", timestamp=NOON + timedelta(minutes=59))
    db.store_task_metric("t1", "a", 20, "failure", timestamp=NOON + 2 * HOUR)
    starts = [NOON, NOON + HOUR, NOON + 2 * HOUR]

    for agg, values in {"mean": [10, None, 20], "count": [1, 0, 1], "sum": [10, 0, 20], "p99": [10, None, 20]}.items():
        found = db.metric_series("duration_ms", bucket=HOUR, agg=agg)  # type: ignore[arg-type]
        assert [bucket.start for bucket in found] == starts
        assert [bucket.count for bucket in found] == [1, 0, 1]
        assert [bucket.value for bucket in found] == values
    assert [bucket.value for bucket in db.metric_series("success_rate", bucket=DAY)] == [0.5]


def test_a_zero_has_no_sign(db: SwarmDB) -> None:
    db.store_swarm_metric("s", "health", -0.0)

    health = db.summarize_swarm("s").figures[SwarmMetricType.HEALTH]
    values = (health.latest, health.mean, health.minimum, health.maximum, health.p50, health.p95, health.p99)
    assert [math.copysign(1, value) for value in values] == [1] * 7


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_no_float_holds_is_infinite(db: SwarmDB, sign: int) -> None:
    for _ in range(2):
        db.store_agent_metric("a", "duration", sign * 1.5e308)
    (bucket,) = db.metric_series(AgentMetricType.DURATION, bucket=timedelta(days=1), agg="sum")

    assert bucket.value == sign * math.inf


def test_floats_of_every_magnitude_are_added_up_to_their_last_bit(db: SwarmDB) -> None:
    # Of each pair, only the last bits are left, and all bits where the two are one apart.
    pairs = [
        (value, left)
        for exponent in range(-1074, 1024)
        if exponent % 32 in (0, 1, 31) or exponent < -1020
        for power in [math.ldexp(1.0, exponent)]
        for value, left in (
            (math.nextafter(power, math.inf), -power),
            (power, -math.nextafter(power, 0)),
            (power * 1.5, math.nextafter(power, math.inf)),
        )
        if value < math.inf and left
    ]
    largest = math.ldexp(math.nextafter(1, 0), 1024)
    pairs += [(largest, -math.nextafter(largest, 0)), (-largest, 0.0), (math.nextafter(2.0**32, 0), 2.0**-1074)]
    second = timedelta(seconds=1)
    fill(
        db,
        (
            AgentMetric(agent_id="a", metric_type=AgentMetricType.DURATION, value=value, timestamp=NOON + n * second)
            for n, pair in enumerate(pairs)
            for value in pair
        ),
    )

    for agg in ("sum", "mean", "p50", "min", "max"):
        found = db.metric_series(AgentMetricType.DURATION, bucket=second, agg=agg)
        assert [bucket.value for bucket in found] == [AGGREGATES[agg](pair) for pair in pairs]


def test_whole_numbers_of_every_magnitude_are_added_up_to_their_last_bit(db: SwarmDB) -> None:
    values = [sign * 2**exponent + more for exponent in range(63) for sign in (1, -1) for more in (-1, 0, 1)]
    durations = [LARGEST, -LARGEST - 1, *values]
    fill(
        db,
        (
            TaskMetric(task_id=str(n), agent_id="a", duration_ms=duration, result=TaskResult.SUCCESS, timestamp=NOON)
            for n, duration in enumerate(durations)
        ),
    )

    summary = db.summarize_tasks()
    assert summary.mean_ms == -1 / len(durations)
    assert (summary.max_ms, summary.p50_ms) == (LARGEST, percentile(durations, 50))


@pytest.mark.parametrize("count", [1, 2, 3, 20, 21, 22, 100, 101, 102])
def test_percentiles_of_any_number_of_values_are_what_plain_python_says(db: SwarmDB, count: int) -> None:
    durations = {"small": [number**3 for number in range(count)], "large": [2**62 + n**3 for n in range(count)]}
    fill(
        db,
        [
            TaskMetric(
                task_id=f"{agent}{n}", agent_id=agent, duration_ms=duration, result=TaskResult.SUCCESS, timestamp=NOON
            )
            for agent, of_agent in durations.items()
            for n, duration in enumerate(of_agent)
        ],
    )

    for agent, summary in [
        *((summary.agent_id, summary) for summary in db.summarize_agents()),
        *((agent, db.summarize_tasks(agent)) for agent in durations),
    ]:
        found = (summary.p50_ms, summary.p95_ms, summary.p99_ms)
        assert found == tuple(percentile(durations[agent], percent) for percent in (50, 95, 99))


def test_of_what_was_removed_meanwhile_there_is_no_series(path: Path) -> None:
    class Late(SwarmDB):
        """Adds up once the metrics are gone."""

        def _figure_rows(self, *arguments: Any, **options: Any) -> Any:
            with self.transaction() as raw:
                raw.execute("DELETE FROM agent_metrics")
            return super()._figure_rows(*arguments, **options)

    with Late(path) as db:
        db.store_agent_metric("a", "duration", 1, timestamp="2025-01-01T00:00:00Z")
        kind = AgentMetricType.DURATION
        assert db.metric_series(kind, bucket=timedelta(days=1), since="2025-01-01T00:00:00Z") == []


def test_a_series_reaches_from_since_to_the_last_moment_before_until(db: SwarmDB) -> None:
    db.store_task_metric("t", "a", 10, "success", timestamp=NOON)

    def starts(since: datetime | None, until: datetime | None) -> list[datetime]:
        return [bucket.start for bucket in db.metric_series("duration_ms", bucket=HOUR, since=since, until=until)]

    tick = timedelta(microseconds=1)
    assert starts(NOON - HOUR, NOON) == [NOON - HOUR]
    assert starts(NOON - HOUR - tick, NOON) == [NOON - 2 * HOUR, NOON - HOUR]
    assert starts(NOON - HOUR, NOON + tick) == [NOON - HOUR, NOON]
    assert starts(NOON - HOUR, None) == [NOON - HOUR, NOON]
    assert starts(None, NOON + 2 * HOUR) == [NOON, NOON + HOUR]
    assert starts(None, None) == [NOON]
    assert starts(NOON + HOUR, None) == []
    assert starts(None, NOON) == []
    assert starts(NOON + timedelta(minutes=1), NOON + timedelta(minutes=1)) == []


def test_buckets_before_1970_are_aligned_to_the_epoch_too(db: SwarmDB) -> None:
    for number, moment in enumerate([EPOCH - timedelta(microseconds=1), EPOCH - 7 * DAY, EPOCH]):
        db.store_agent_metric("a", "duration", number, timestamp=moment)

    found = db.metric_series(AgentMetricType.DURATION, bucket=7 * DAY, agg="sum")
    assert found == [MetricBucket(EPOCH - 7 * DAY, 2, 1.0), MetricBucket(EPOCH, 1, 2.0)]


def test_a_moment_of_the_year_1_is_in_the_bucket_that_began_before_it(db: SwarmDB) -> None:
    first = datetime.min.replace(tzinfo=UTC)
    db.store_task_metric("t", "a", 1, "success", timestamp=first + 1.5 * HOUR)

    found = db.metric_series("duration_ms", bucket=HOUR, agg="count", since=first, until=first + 3 * HOUR)
    assert found == [MetricBucket(first + n * HOUR, count, float(count)) for n, count in enumerate([0, 1, 0])]


def test_buckets_are_whole_seconds_whatever_the_fraction(db: SwarmDB) -> None:
    second = timedelta(seconds=1)
    for number, fraction in enumerate([0, 1, 499_999, 500_000, 999_500, 999_999]):
        db.store_task_metric(f"t{number}", "a", 1, "success", timestamp=NOON + timedelta(microseconds=fraction))

    assert db.metric_series("duration_ms", bucket=second, agg="count") == [MetricBucket(NOON, 6, 6.0)]


def test_the_first_and_the_last_moment_have_buckets(db: SwarmDB) -> None:
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    for moment in (first, last):
        db.store_task_metric("t", "a", 1, "success", timestamp=moment)

    for moment in (first, last):
        (bucket,) = db.metric_series(
            "duration_ms", bucket=DAY, since=moment, until=first + HOUR if moment == first else None
        )
        assert (bucket.start, bucket.count) == (moment.replace(hour=0, minute=0, second=0, microsecond=0), 1)
    with pytest.raises(InvalidInputError, match="year 1"):
        db.metric_series("duration_ms", bucket=9 * DAY, until=first + HOUR)


@pytest.fixture
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ZoneInfo]:
    """Run in a zone that has daylight saving, and return it."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield ZoneInfo("Europe/Berlin")
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("change", [datetime(2025, 3, 30, 1, tzinfo=UTC), datetime(2025, 10, 26, 1, tzinfo=UTC)])
def test_daylight_saving_plays_no_part(db: SwarmDB, in_berlin: ZoneInfo, change: datetime) -> None:
    for number in range(-4, 5):
        moment = (change + number * timedelta(minutes=30)).astimezone(in_berlin)
        db.store_task_metric(f"t{number}", "a", number + 4, "success", timestamp=moment)

    hours = db.metric_series("duration_ms", bucket=HOUR, agg="count")
    assert [bucket.start for bucket in hours] == [change + number * HOUR for number in range(-2, 3)]
    assert [bucket.count for bucket in hours] == [2, 2, 2, 2, 1]
    midnight = change.replace(hour=0)
    days = db.metric_series("duration_ms", bucket=DAY, agg="sum", since=midnight - DAY, until=midnight + 2 * DAY)
    assert [bucket.start for bucket in days] == [midnight - DAY, midnight, midnight + DAY]
    assert [bucket.value for bucket in days] == [1.0, 35.0, 0.0]


def test_too_many_buckets_are_refused_before_anything_is_added_up(db: SwarmDB) -> None:
    day = timedelta(seconds=100_000)
    assert len(db.metric_series("duration_ms", bucket=timedelta(seconds=1), since=EPOCH, until=EPOCH + day)) == 100_000

    for moment in (EPOCH, EPOCH + day):
        db.store_task_metric("t", "a", 1, "success", timestamp=moment)
    with pytest.raises(InvalidInputError, match="at most 100,000 buckets, not 100,001"):
        db.metric_series("duration_ms", bucket=timedelta(seconds=1))
    several: list[dict[str, Any]] = [
        {"since": EPOCH},
        {"until": EPOCH + 2 * day},
        {"since": EPOCH, "until": EPOCH + 2 * day},
    ]
    for bounds in several:
        with pytest.raises(InvalidInputError, match="bucket"):
            db.metric_series("duration_ms", bucket=timedelta(seconds=1), **bounds)
    assert len(db.metric_series("duration_ms", bucket=timedelta(seconds=2))) == 50_001


@pytest.mark.parametrize("bounds", [{}, {"until": NOON + HOUR}, {"since": NOON, "until": NOON + 2 * DAY}])
def test_they_are_refused_by_the_first_and_the_last_time_alone(path: Path, bounds: dict[str, Any]) -> None:
    class Idle(SwarmDB):
        """Adds nothing up."""

        def _figure_rows(self, *arguments: Any, **options: Any) -> Any:
            raise AssertionError("it was asked to add up")

    with Idle(path) as db:
        for moment in (NOON - 2 * DAY, NOON):
            db.store_task_metric("t", "a", 1, "success", timestamp=moment)
        with pytest.raises(InvalidInputError, match="at most 100,000 buckets"):
            db.metric_series("duration_ms", bucket=timedelta(seconds=1), **bounds)


# What is refused


@pytest.mark.parametrize(
    "bucket",
    [timedelta(0), -HOUR, timedelta(milliseconds=999), timedelta(seconds=1, microseconds=1), 3600, None],
)
def test_a_bucket_is_whole_seconds(db: SwarmDB, bucket: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"bucket: got .*whole seconds"):
        db.metric_series("duration_ms", bucket=bucket)


@pytest.mark.parametrize("metric", ["throughput", "duration", "health", "", None, 1, TaskResult.SUCCESS, []])
def test_a_word_of_an_enum_is_no_metric_but_its_member_is(db: SwarmDB, metric: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"member of .*AgentMetricType\.THROUGHPUT"):
        db.metric_series(metric, bucket=HOUR)


def test_the_success_rate_of_tasks_is_not_that_of_agents(db: SwarmDB) -> None:
    db.store_task_metric("t", "a", 1, "failure")
    db.store_agent_metric("a", "success_rate", 0.25)

    assert [bucket.value for bucket in db.metric_series("success_rate", bucket=DAY)] == [0.0]
    assert [bucket.value for bucket in db.metric_series(AgentMetricType.SUCCESS_RATE, bucket=DAY)] == [0.25]


def test_what_cannot_be_meant_is_refused(db: SwarmDB) -> None:
    later, earlier = NOON, NOON - timedelta(microseconds=1)
    calls: dict[str, Callable[[], object]] = {
        "until": lambda: db.summarize_tasks(since=later, until=earlier),
        "until: got": lambda: db.summarize_agents(since=later, until=earlier),
        "until: ": lambda: db.summarize_swarm("s", since=later, until=earlier),
        "until:": lambda: db.metric_series("duration_ms", bucket=HOUR, since=later, until=earlier),
        "agent_id": lambda: db.summarize_tasks("no\0"),
        "swarm_id": lambda: db.summarize_swarm(None),  # type: ignore[arg-type]
        "swarm_id: got": lambda: db.summarize_swarm("lone\ud800"),
        "of": lambda: db.metric_series("duration_ms", bucket=HOUR, of=1),  # type: ignore[arg-type]
        "agg": lambda: db.metric_series("duration_ms", bucket=HOUR, agg="p90"),  # type: ignore[arg-type]
        "order_by": lambda: db.summarize_agents(order_by="results"),  # type: ignore[arg-type]
        "descending: got 'no', expected True or False": lambda: db.summarize_agents(descending="no"),  # type: ignore[arg-type]
        "limit": lambda: db.summarize_agents(limit=-1),
        "since": lambda: db.summarize_tasks(since="soon"),
    }
    for field, call in calls.items():
        with pytest.raises(InvalidInputError, match=f"^{field}"):
            call()


# Values that can't be counted


@pytest.mark.parametrize(
    ("column", "stored"),
    [("duration_ms", "'12 s'"), ("duration_ms", "1.5"), ("tokens_used", "x'00'"), ("files_changed", "'many'")],
)
def test_a_value_that_its_column_cannot_hold_is_named(local_db: SwarmDB, column: str, stored: str) -> None:
    for name in "abc":
        local_db.store_task_metric(name, name, 5, "success", timestamp=NOON)
    with local_db.transaction() as conn:
        conn.execute(f"UPDATE task_metrics SET {column} = {stored} WHERE task_id = 'b'")

    metric: Any = column
    for call in (
        lambda: local_db.summarize_tasks(),
        lambda: local_db.summarize_tasks("b"),
        lambda: local_db.summarize_agents(),
        lambda: local_db.metric_series(metric, bucket=HOUR),
        lambda: local_db.metric_series(metric, bucket=HOUR, agg="p95"),
    ):
        with pytest.raises(CorruptDataError) as caught:
            call()
        assert (caught.value.table, caught.value.column) == ("task_metrics", column)
        assert caught.value.row["task_id"] == "b"
    assert local_db.summarize_tasks("a").count == 1  # Others are not concerned.
    assert local_db.summarize_tasks(since=NOON + HOUR).count == 0
    local_db.check(quarantine=True)
    assert local_db.summarize_tasks().count == 2


@pytest.mark.parametrize("column", ["agent_id", "result"])
def test_bytes_in_the_place_of_a_word_are_named(local_db: SwarmDB, column: str) -> None:
    local_db.store_task_metric("t", "a", 5, "success")
    with local_db.transaction() as conn:
        conn.execute(f"UPDATE task_metrics SET {column} = x'61'")

    with pytest.raises(CorruptDataError, match=column):
        local_db.summarize_agents()


@pytest.mark.parametrize(
    "stored", ["'soon'", "'now'", "'2460000.5'", "'2025-02-30 10:00:00'", "'10:00:00'", "x'00'", "'20251130T100000'"]
)
def test_a_time_that_cannot_be_put_into_a_bucket_is_named(local_db: SwarmDB, stored: str) -> None:
    for moment in (NOON, NOON + HOUR):
        local_db.store_swarm_metric("s", "health", 5, timestamp=moment)
    with local_db.transaction() as conn:
        conn.execute(f"UPDATE swarm_metrics SET timestamp = {stored} WHERE metric_id = 1")

    for call in (
        lambda: local_db.metric_series(SwarmMetricType.HEALTH, bucket=HOUR),
        lambda: local_db.metric_series(SwarmMetricType.HEALTH, bucket=HOUR, of="s", agg="p50"),
        lambda: local_db.summarize_swarm("s"),
    ):
        with pytest.raises(CorruptDataError) as caught:
            call()
        assert (caught.value.column, caught.value.row) == ("timestamp", {"metric_id": 1})


@pytest.mark.parametrize("bounds", [{}, {"since": NOON - DAY}])
def test_it_is_named_where_no_other_time_is_there(local_db: SwarmDB, bounds: dict[str, Any]) -> None:
    local_db.store_swarm_metric("s", "health", 5)
    with local_db.transaction() as conn:
        conn.execute("UPDATE swarm_metrics SET timestamp = 'soon'")

    with pytest.raises(CorruptDataError, match=r"timestamp of the row with metric_id=1"):
        local_db.metric_series(SwarmMetricType.HEALTH, bucket=HOUR, **bounds)


def test_times_in_other_formats_are_put_where_they_read(local_db: SwarmDB) -> None:
    with local_db.transaction() as conn:
        for number, text in enumerate(["2025-11-30 12:00:00", "2025-11-30", "2025-11-30T01:00:00+00:00"]):
            conn.execute("INSERT INTO task_metrics VALUES (?, 'a', 1, 'success', 0, 0, ?)", (str(number), text))

    found = local_db.metric_series("duration_ms", bucket=HOUR, agg="count")
    assert {bucket.start.hour: bucket.count for bucket in found if bucket.count} == {0: 1, 1: 1, 12: 1}
    assert sum(bucket.count for bucket in found) == local_db.summarize_tasks().count


@pytest.mark.parametrize("value", ["9e999", "-9e999"])
def test_a_figure_that_is_not_finite_is_named(local_db: SwarmDB, value: str) -> None:
    local_db.store_swarm_metric("s", "health", 5)
    local_db.store_swarm_metric("s", "health", 5)
    with local_db.transaction() as conn:
        conn.execute(f"UPDATE swarm_metrics SET value = {value} WHERE metric_id = 2")

    with pytest.raises(CorruptDataError, match=r"value of the row with metric_id=2: holds -?inf, where a finite"):
        local_db.summarize_swarm("s")


def test_what_is_named_is_within_what_was_asked_for(local_db: SwarmDB) -> None:
    for swarm, day in (("r", NOON), ("s", NOON - DAY), ("s", NOON), ("s", NOON + DAY)):
        local_db.store_swarm_metric(swarm, "health", 5, timestamp=day)
    with local_db.transaction() as conn:
        conn.execute("UPDATE swarm_metrics SET value = 9e999")

    window: dict[str, Any] = {"since": NOON, "until": NOON + HOUR}
    for call in (
        lambda: local_db.summarize_swarm("s", **window),
        lambda: local_db.metric_series(SwarmMetricType.HEALTH, bucket=HOUR, of="s", **window),
    ):
        with pytest.raises(CorruptDataError, match="metric_id=3: holds inf"):
            call()


@pytest.mark.parametrize("column", ["value = 'NaN'", "value = '-Infinity'", "timestamp = 'infinity'"])
def test_what_only_a_server_holds_is_named(postgres_url: str, column: str) -> None:
    with SwarmDB(url=postgres_url) as db:
        db.store_swarm_metric("s", "health", 5)
        db.store_swarm_metric("s", "health", 5)
        with db.transaction() as conn:
            conn.execute(f"UPDATE swarm_metrics SET {column} WHERE metric_id = 2")

        for call in (
            lambda: db.summarize_swarm("s"),
            lambda: db.metric_series(SwarmMetricType.HEALTH, bucket=timedelta(days=9999)),
        ):
            with pytest.raises(CorruptDataError, match=f"{column.split()[0]} of the row with metric_id=2"):
                call()


def test_the_newest_figures_time_is_in_utc_whatever_zone_a_callers_engine_has(postgres_url: str) -> None:
    engine = create_engine(postgres_url, connect_args={"options": "-c TimeZone=Asia/Tokyo"})
    with SwarmDB(engine=engine) as db:
        db.store_swarm_metric("s", "health", 5, timestamp=NOON)
        latest_at = db.summarize_swarm("s").figures[SwarmMetricType.HEALTH].latest_at

    assert (latest_at, latest_at.tzinfo) == (NOON, UTC)
    engine.dispose()


# Inside transactions


def test_a_figure_that_is_missing_plays_no_part(path: Path) -> None:
    with closing(sqlite3.connect(path)) as raw:  # A table that is less strict than the original program's.
        raw.executescript(SPECIFIED.replace("value REAL NOT NULL", "value REAL"))
        raw.execute("INSERT INTO schema_info (key, value) VALUES ('version', '2.0.0')")
        insertion = "INSERT INTO swarm_metrics (swarm_id, metric_type, value, timestamp) VALUES ('s', ?, ?, ?)"
        times = ("2025-11-30T10:00:00+00:00", "2025-11-30T12:00:00+00:00", "no time")
        raw.executemany(
            insertion, [("health", value, time) for value, time in zip((0.5, None, None), times, strict=True)]
        )
        raw.execute(insertion, ("latency", None, times[0]))
        raw.commit()
    with SwarmDB(path) as db:
        found = db.summarize_swarm("s").figures

    assert list(found) == [SwarmMetricType.HEALTH]
    health = found[SwarmMetricType.HEALTH]
    assert (health.count, health.latest, health.latest_at) == (1, 0.5, NOON - 2 * HOUR)


@pytest.mark.parametrize(
    ("table", "column", "summarize"),
    [
        ("task_metrics", "result", lambda db: db.summarize_tasks()),
        ("task_metrics", "result", lambda db: db.metric_series("success_rate", bucket=DAY)),
        ("task_metrics", "agent_id", lambda db: db.summarize_agents()),
        ("swarm_metrics", "metric_type", lambda db: db.summarize_swarm("s")),
    ],
)
def test_a_word_that_is_missing_is_named(
    path: Path, table: str, column: str, summarize: Callable[[SwarmDB], object]
) -> None:
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(SPECIFIED.replace(" NOT NULL", ""))
        raw.execute("INSERT INTO schema_info (key, value) VALUES ('version', '2.0.0')")
        raw.commit()
    with SwarmDB(path) as db:
        db.store_task_metric("t", "a", 1, "success", timestamp=NOON)
        db.store_swarm_metric("s", "health", 1, timestamp=NOON)
        summarize(db)
        with db.transaction() as raw_of_ours:
            raw_of_ours.execute(f"UPDATE {table} SET {column} = NULL")

        with pytest.raises(CorruptDataError, match=rf"{table}\.{column}.*holds NULL"):
            summarize(db)


def test_a_summary_sees_what_its_transaction_has_written(db: SwarmDB) -> None:
    with db.session() as session:
        session.add(TaskMetric(task_id="t", agent_id="a", duration_ms=5, result=TaskResult.SUCCESS, timestamp=NOON))
        assert db.summarize_tasks().count == 1
        assert db.metric_series("duration_ms", bucket=HOUR) == [MetricBucket(NOON, 1, 5.0)]
        session.rollback()
    assert db.summarize_tasks().count == 0


# A million rows

AGENTS = 1000


def generated(rows: int) -> Iterator[tuple[Any, ...]]:
    chance = random.Random(20251130)
    results = ["success"] * 17 + ["failure", "timeout", "cancelled"]
    times = [f"2025-{month:02}-{day:02} 10:00:00" for month in (10, 11) for day in range(1, 31)]
    for number in range(rows):
        drawn = chance.random()
        duration = None if drawn < 0.05 else int(200 / drawn**2)
        agent = f"agent-{int(drawn * 7e6) % AGENTS:04}"
        yield (
            f"task-{number:07}",
            agent,
            duration,
            results[number * 7 % 20],
            number % 3001,
            number % 7,
            times[number % 60],
        )


def assert_agents_are(db: SwarmDB, rows: Iterable[tuple[Any, ...]]) -> None:
    durations: defaultdict[str, list[int]] = defaultdict(list)
    results: defaultdict[str, Counter[str]] = defaultdict(Counter)
    tokens, files = Counter[str](), Counter[str]()
    for _, agent, duration, result, used, changed, _ in rows:
        if duration is not None:
            durations[agent].append(duration)
        results[agent][result] += 1
        tokens[agent] += used
        files[agent] += changed
    found = db.summarize_agents()

    assert [summary.agent_id for summary in found] == sorted(results)
    assert len(found) == AGENTS
    for summary in found:
        agent = summary.agent_id
        cuts = statistics.quantiles(durations[agent], n=100, method="inclusive")
        ended = {result: results[agent][result] for result in TaskResult}
        count = sum(ended.values())
        assert summary == AgentSummary(
            agent_id=agent,
            count=count,
            results=ended,
            success_rate=ended[TaskResult.SUCCESS] / count,
            tokens_used=tokens[agent],
            files_changed=files[agent],
            measured=len(durations[agent]),
            mean_ms=statistics.mean(durations[agent]),
            p50_ms=cuts[49],
            p95_ms=cuts[94],
            p99_ms=cuts[98],
            max_ms=max(durations[agent]),
        )


@pytest.mark.timeout(300)
def test_a_million_tasks_of_a_thousand_agents_come_to_the_last_digit(path: Path) -> None:
    SwarmDB(path).close()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA synchronous = OFF")
        indexes = raw.execute("SELECT name FROM sqlite_master WHERE name LIKE 'idx_task_metrics_%'").fetchall()
        for (name,) in indexes:  # Kept up to date, they would take most of the time, and this test needs none.
            raw.execute(f"DROP INDEX {name}")
        raw.executemany("INSERT INTO task_metrics VALUES (?, ?, ?, ?, ?, ?, ?)", generated(1_000_000))
        raw.commit()

    with SwarmDB(path) as db:
        assert_agents_are(db, generated(1_000_000))


def test_as_many_as_a_server_is_given_at_once_come_to_the_last_digit(postgres_url: str) -> None:
    with SwarmDB(url=postgres_url) as db:
        with psycopg.connect(postgres_url.replace("postgresql+psycopg", "postgresql")) as raw, raw.cursor() as cursor:
            cursor.execute("SET TIME ZONE 'UTC'")
            with cursor.copy("COPY task_metrics FROM STDIN") as copy:
                for row in generated(100_000):
                    copy.write_row(row)

        assert_agents_are(db, generated(100_000))
