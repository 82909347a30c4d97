"""What the metrics come to: totals, shares, percentiles and series, computed in the database."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import chain
from typing import Any, Literal, NoReturn, TypeAlias, get_args

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Dialect,
    Executable,
    FromClause,
    Select,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
)

from moai_flow.memory import inputs
from moai_flow.memory.aggregates import (
    EPOCH,
    Ranks,
    bucket_start,
    epoch_seconds,
    float_parts,
    float_total,
    how_many,
    is_misplaced,
    ranked,
    scale_of,
    seconds_since_epoch,
    shift_for,
    starts_between,
    whole_number,
    whole_parts,
    whole_total,
)
from moai_flow.memory.enums import AgentMetricType, SwarmMetricType, TaskResult
from moai_flow.memory.errors import CorruptDataError, InvalidInputError, shown
from moai_flow.memory.models import AgentMetric, Record, SwarmMetric, TaskMetric, table_of, unsearched
from moai_flow.memory.scope import Scope
from moai_flow.memory.statements import Query, Row, Statement
from moai_flow.memory.types import Real, UTCDateTime

#: By which figure `SwarmDB.summarize_agents` puts agents in order.
AgentOrder: TypeAlias = Literal[
    "agent_id",
    "count",
    "success_rate",
    "tokens_used",
    "files_changed",
    "measured",
    "mean_ms",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "max_ms",
]

#: What `SwarmDB.metric_series` makes of the values in a bucket.
Aggregate: TypeAlias = Literal["count", "sum", "mean", "min", "max", "p50", "p95", "p99"]

_TaskFigure: TypeAlias = Literal["duration_ms", "tokens_used", "files_changed", "success_rate"]

#: What `SwarmDB.metric_series` follows: a figure of tasks, or a type of figures about agents or swarms.
SeriesMetric: TypeAlias = _TaskFigure | AgentMetricType | SwarmMetricType

#: How many buckets a series may have.
_MOST_BUCKETS = 100_000

_PERCENTS = (50, 95, 99)
_FIRST_MOMENT = datetime.min.replace(tzinfo=UTC)
_SECOND, _TICK = timedelta(seconds=1), timedelta(microseconds=1)


@dataclass(frozen=True)
class TaskSummary:
    """What task metrics come to.

    Attributes:
        count: How many tasks.
        results: How many of them ended in each way: the listed ways always, and others that rows bring.
        success_rate: The share of all tasks that succeeded, from 0 to 1; None without tasks.
        tokens_used: How many tokens they used in all.
        files_changed: How many files they changed in all.
        measured: How many of them have a duration.
        mean_ms: Their mean duration, in milliseconds; like the rest, None where nothing was measured.
        p50_ms: The median duration, in milliseconds.
        p95_ms: The 95th percentile of the durations, in milliseconds.
        p99_ms: The 99th percentile of the durations, in milliseconds.
        max_ms: The longest duration, in milliseconds.
    """

    count: int
    results: Mapping[TaskResult, int]
    success_rate: float | None
    tokens_used: int
    files_changed: int
    measured: int
    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: int | None


@dataclass(frozen=True)
class AgentSummary(TaskSummary):
    """What the task metrics of one agent come to.

    Attributes:
        agent_id: The agent.
    """

    agent_id: str


@dataclass(frozen=True)
class MetricBucket:
    """One bucket of a series.

    Attributes:
        start: When it begins, in UTC. It ends where the next one begins.
        count: How many values are in it.
        value: What the values come to, in the metric's own unit. An empty bucket has None, but a count or sum of 0.
    """

    start: datetime
    count: int
    value: float | None


@dataclass(frozen=True)
class FigureSummary:
    """What one type of figure about a swarm comes to, in the unit of its writer.

    Attributes:
        latest: The newest figure; of two at the same time, the one recorded later.
        latest_at: When that was measured, in UTC.
        count: How many figures.
        mean: Their mean.
        minimum: The lowest.
        maximum: The highest.
        p50: The median.
        p95: The 95th percentile.
        p99: The 99th percentile.
    """

    latest: float
    latest_at: datetime
    count: int
    mean: float
    minimum: float
    maximum: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class SwarmSummary:
    """What the metrics of one swarm come to.

    Attributes:
        swarm_id: The swarm.
        figures: The types of figures that it has metrics of, in the order of the enum, and others after them.
    """

    swarm_id: str
    figures: Mapping[SwarmMetricType, FigureSummary]


# The statements. Each reads the database once, so that all it says is about the same rows. One part of it adds up, and
# below that, in a UNION, stand the values next to percentiles, for which NULL stands in the first part.

_TASKS = table_of(TaskMetric)
_SUMMED = (_TASKS.c.duration_ms, _TASKS.c.tokens_used, _TASKS.c.files_changed)
# Without the cast it is of 32 bits on PostgreSQL, where a shift by as many does nothing.
_HAS_SUCCEEDED = cast(
    case((_TASKS.c.result == literal_column("'success'"), whole_number(1)), else_=whole_number(0)), BigInteger
)
_RANK_COLUMNS = 4


def _matching(columns: Any, names: Iterable[str]) -> list[ColumnElement[bool]]:
    """Return the conditions on a table's *columns* for the filters in *names*."""
    bounds = {"since": columns.timestamp >= bindparam("since"), "until": columns.timestamp < bindparam("until")}
    return [bounds[name] if name in bounds else columns[name] == bindparam(name) for name in sorted(names)]


def _with_ranks(totals: Select[Any], rows: Select[Any], keys: Sequence[str], percents: Sequence[int]) -> Executable:
    """Return the rows of *totals*, which begin with *keys*, and below them those of `ranked`."""
    missing = [null() for _ in totals.selected_columns][len(keys) :]
    found = ranked(rows, keys, percents).subquery()
    group, ranks = found.c[: len(keys)], found.c[len(keys) :]
    return union_all(totals.add_columns(*[null()] * _RANK_COLUMNS), select(*group, *missing, *ranks))


@cache
def _tasks(names: frozenset[str], *, by_agent: bool) -> Statement:
    """Return totals for each result: agent if asked for, result, count, measured, misplaced, longest, and parts."""
    # SQLite would read all rows in the order of an index by agent or by result, and with it nearly each from another
    # page, rather than only those that the window is about.
    keys = [unsearched(_TASKS.c.agent_id).label("agent_id")] if by_agent else []
    result = unsearched(_TASKS.c.result) if names or by_agent else _TASKS.c.result
    duration = _TASKS.c.duration_ms

    def clause(dialect: Dialect) -> Executable:
        conditions = _matching(_TASKS.c, names)
        misplaced = how_many(is_misplaced(_read_of_tasks(by_agent=by_agent), dialect))
        parts = chain.from_iterable(map(whole_parts, _SUMMED))
        totals = (
            select(*keys, result, func.count(), func.count(duration), misplaced, func.max(duration), *parts)
            .where(*conditions)
            .group_by(*keys, result)
        )
        measured = select(*keys, duration.label("value")).where(duration.is_not(None), *conditions)
        return _with_ranks(totals, measured, [key.name for key in keys], _PERCENTS)

    return Statement(clause)


def _read_of_tasks(*, by_agent: bool) -> list[Column[Any]]:
    return [*([_TASKS.c.agent_id] if by_agent else []), _TASKS.c.result, *_SUMMED]


@cache
def _misplaced_tasks(names: frozenset[str], *, by_agent: bool) -> Query[TaskMetric]:
    columns = _read_of_tasks(by_agent=by_agent)
    return Query(
        TaskMetric,
        lambda dialect: select(_TASKS).where(is_misplaced(columns, dialect), *_matching(_TASKS.c, names)).limit(1),
    )


@dataclass(frozen=True)
class _Figure:
    """A figure of one table's rows.

    Attributes:
        model: The table.
        column: The column that it comes from.
        value: The figure of a row; NULL where it has none.
    """

    model: type[Record]
    column: Column[Any]
    value: ColumnElement[Any]

    @property
    def columns(self) -> Any:
        """The table's columns."""
        return table_of(self.model).c

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers, rather than floats."""
        return not isinstance(self.column.type, Real)

    @property
    def owner(self) -> str:
        """The column of the agent or swarm that it is about."""
        return "swarm_id" if self.model is SwarmMetric else "agent_id"

    def is_misplaced(self, dialect: Dialect) -> ColumnElement[bool]:
        """Return whether a row's figure can't be counted, or its type be read."""
        read = [self.column] if self.model is TaskMetric else [self.column, self.columns.metric_type]
        return is_misplaced(read, dialect)

    def is_untimed(self, dialect: Dialect) -> ColumnElement[bool]:
        """Return whether a row's time can't be read."""
        return epoch_seconds(self.columns.timestamp, dialect).is_(None)

    def counted(self, misplaced: ColumnElement[bool]) -> list[ColumnElement[Any]]:
        """Return of a row what `totals` takes."""
        scale = null() if self.is_whole else scale_of(self.value)
        flag = case((misplaced, whole_number(1)), else_=whole_number(0))
        return [scale.label("scale"), flag.label("misplaced"), self.value.label("value")]

    def totals(self, rows: FromClause, misplaced: ColumnElement[int]) -> list[ColumnElement[Any]]:
        """Return what `_Values` takes of each group of *rows*, which have one scale."""
        value, scale = rows.c.value, rows.c.scale
        parts = whole_parts(value) if self.is_whole else float_parts(value, scale)
        return [scale, func.count(), misplaced, func.min(value), func.max(value), *parts]


def _of_tasks(column: Column[Any], value: ColumnElement[Any]) -> _Figure:
    return _Figure(TaskMetric, column, value)


_FIGURES = {
    "duration_ms": _of_tasks(_TASKS.c.duration_ms, _TASKS.c.duration_ms),
    "tokens_used": _of_tasks(_TASKS.c.tokens_used, func.coalesce(_TASKS.c.tokens_used, whole_number(0))),
    "files_changed": _of_tasks(_TASKS.c.files_changed, func.coalesce(_TASKS.c.files_changed, whole_number(0))),
    "success_rate": _of_tasks(_TASKS.c.result, _HAS_SUCCEEDED),
    "agent_metrics": _Figure(AgentMetric, table_of(AgentMetric).c.value, table_of(AgentMetric).c.value),
    "swarm_metrics": _Figure(SwarmMetric, table_of(SwarmMetric).c.value, table_of(SwarmMetric).c.value),
}


@cache
def _series(figure: str, names: frozenset[str], percent: int | None) -> Statement:
    """Return totals for each bucket and scale: the bucket's start, and what `_Values.add` takes."""
    of = _FIGURES[figure]

    def clause(dialect: Dialect) -> Executable:
        # Times are what costs most: that one can't be read shows in the bucket that it makes.
        seconds = epoch_seconds(of.columns.timestamp, dialect)
        start = bucket_start(seconds, bindparam("bucket", type_=BigInteger), bindparam("shift", type_=BigInteger))
        start = start.label("start")
        has_figure = [of.value.is_not(None), *_matching(of.columns, names)]
        rows = select(start, *of.counted(of.is_misplaced(dialect))).where(*has_figure).subquery()
        misplaced = case((rows.c.start.is_(None), func.count()), else_=func.sum(rows.c.misplaced))
        totals = select(rows.c.start, *of.totals(rows, misplaced)).group_by(rows.c.start, rows.c.scale)
        if percent is None:
            return totals.add_columns(*[null()] * _RANK_COLUMNS)
        return _with_ranks(totals, select(start, of.value.label("value")).where(*has_figure), ["start"], [percent])

    return Statement(clause)


@cache
def _edges(figure: str, names: frozenset[str]) -> Statement:
    """Return the second of the first row that has the figure, and that of the last one; nothing where there is none."""
    of = _FIGURES[figure]
    timestamp = of.columns.timestamp

    def clause(dialect: Dialect) -> Executable:
        rows = select(epoch_seconds(timestamp, dialect).label("second"))
        rows = rows.where(of.value.is_not(None), *_matching(of.columns, names)).limit(1)
        first, last = (rows.order_by(order).subquery() for order in (timestamp, timestamp.desc()))
        return union_all(select(first), select(last))

    return Statement(clause)


@cache
def _misplaced_figures(figure: str, names: frozenset[str]) -> Query[Any]:
    of = _FIGURES[figure]

    def clause(dialect: Dialect) -> Executable:
        has_figure = [of.value.is_not(None), *_matching(of.columns, names)]
        found = or_(of.is_misplaced(dialect), of.is_untimed(dialect))
        return select(table_of(of.model)).where(found, *has_figure).limit(1)

    return Query(of.model, clause)


@cache
def _swarm(names: frozenset[str]) -> Statement:
    """Return totals for each type and scale: the type, its newest value and its time, and what `_Values.add` takes."""
    of = _FIGURES["swarm_metrics"]
    newest = table_of(of.model).alias()

    def clause(dialect: Dialect) -> Executable:
        kind, conditions = of.columns.metric_type, [of.value.is_not(None), *_matching(of.columns, names)]
        misplaced = or_(of.is_misplaced(dialect), of.is_untimed(dialect))
        rows = select(kind, *of.counted(misplaced)).where(*conditions).subquery()
        readable = case((epoch_seconds(newest.c.timestamp, dialect).is_not(None), newest.c.timestamp))
        latest = [
            select(column)
            .where(newest.c.metric_type == rows.c.metric_type, newest.c.value.is_not(None), *_matching(newest.c, names))
            .order_by(newest.c.timestamp.desc(), newest.c.metric_id.desc())
            .limit(1)
            .scalar_subquery()
            for column in (newest.c.value, readable)
        ]
        sums = of.totals(rows, func.sum(rows.c.misplaced))
        totals = select(rows.c.metric_type, *latest, *sums).group_by(rows.c.metric_type, rows.c.scale)
        values = select(kind, of.value.label("value")).where(*conditions)
        return _with_ranks(totals, values, ["metric_type"], _PERCENTS)

    return Statement(clause)


# What Python makes of their rows


class _Values:
    """What the values of one group come to."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0
        self.ranks = Ranks()
        self._least: list[float] = []
        self._greatest: list[float] = []

    def add(self, row: Sequence[Any]) -> None:
        """Take one row: the scale, what was added up, and the columns of `ranked`."""
        scale, count, _, least, greatest, *parts = row[:-_RANK_COLUMNS]
        if count is None:
            self.ranks.add(*row[-_RANK_COLUMNS:])
            return
        self.count += count
        self.total += whole_total(*parts) if scale is None else float_total(scale, *parts)
        self._least.append(least)
        self._greatest.append(greatest)

    @property
    def mean(self) -> float:
        """The mean, computed exactly and rounded once."""
        return float(self.total / self.count)

    @property
    def minimum(self) -> float:
        """The lowest value."""
        return min(self._least) + 0.0  # Databases differ in whether they keep a zero's sign.

    @property
    def maximum(self) -> float:
        """The highest value."""
        return max(self._greatest) + 0.0

    @property
    def sum(self) -> float:
        """The sum, computed exactly and rounded once."""
        try:
            return float(self.total)
        except OverflowError:
            return math.inf if self.total > 0 else -math.inf

    def aggregate(self, agg: Aggregate) -> float:
        """Return what *agg* makes of the values, of which there is at least one."""
        match agg:
            case "count":
                return float(self.count)
            case "sum":
                return self.sum
            case "mean":
                return self.mean
            case "min":
                return self.minimum
            case "max":
                return self.maximum
            case _:
                return self.ranks.at(_PERCENT_OF[agg])


_PERCENT_OF = {"p50": 50, "p95": 95, "p99": 99}


def _grouped(rows: Iterable[Row]) -> Mapping[Any, list[Row]]:
    """Return rows by their first column, without it."""
    groups: defaultdict[Any, list[Row]] = defaultdict(list)
    for key, *rest in rows:
        groups[key].append(rest)
    return groups


def _task_figures(rows: Iterable[Row]) -> dict[str, Any]:
    """Return what a `TaskSummary` says, of the rows of `_tasks` about one agent or about all."""
    results = dict.fromkeys(TaskResult, 0)
    unlisted: dict[TaskResult, int] = {}
    measured = duration = tokens = files = 0
    longest: list[int] = []
    ranks = Ranks()
    for result, ended_so, with_duration, _, most, *parts, upto, size, times, value in rows:
        if result is None:
            ranks.add(upto, size, times, value)
            continue
        member = TaskResult.read(result)
        (results if member.is_listed else unlisted)[member] = ended_so
        measured += with_duration
        longest += [] if most is None else [most]
        duration, tokens, files = (
            total + whole_total(*parts[at : at + 2])
            for at, total in zip((0, 2, 4), (duration, tokens, files), strict=True)
        )
    results |= dict(sorted(unlisted.items()))
    count = sum(results.values())
    return {
        "count": count,
        "results": results,
        "success_rate": results[TaskResult.SUCCESS] / count if count else None,
        "tokens_used": tokens,
        "files_changed": files,
        "measured": measured,
        "mean_ms": duration / measured if measured else None,
        **{f"p{percent}_ms": ranks.at(percent) if measured else None for percent in _PERCENTS},
        "max_ms": max(longest, default=None),
    }


class SummaryOperations(Scope):
    """What the metrics come to, computed in the database."""

    def summarize_tasks(
        self,
        agent_id: str | None = None,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
    ) -> TaskSummary:
        """Return what task metrics come to.

        Totals are exact, and the rest is rounded once, so every database gives the same numbers. A percentile is
        linear between the two durations next to it, as SQL's percentile_cont has it. Which rows are within the times
        is told as `get_task_metrics` does: of times that another program wrote in a format of its own, which `check`
        names, that may be off by a day.

        Args:
            agent_id: Only metrics of this agent.
            since: Only metrics at or after this time. Naive ones are local time.
            until: Only metrics before this time.

        Returns:
            The summary. Without metrics it has a count of 0.

        Raises:
            InvalidInputError: If a filter can't be accepted, or *until* is before *since*.
            CorruptDataError: If a value that is counted can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        values = _given({"agent_id": inputs.text_filter(agent_id, field="agent_id"), **_window(since, until)})
        return TaskSummary(**_task_figures(self._task_rows(values, by_agent=False)))

    def summarize_agents(
        self,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        order_by: AgentOrder = "agent_id",
        descending: bool = False,
        limit: int | None = None,
    ) -> list[AgentSummary]:
        """Return what the task metrics of each agent come to: see `summarize_tasks`.

        Args:
            since: Only metrics at or after this time. Naive ones are local time.
            until: Only metrics before this time.
            order_by: The figure by which the agents are put in order. Of two with the same, the lesser id comes first,
                and those that have None come last, whichever the direction.
            descending: Whether the greatest comes first.
            limit: How many at most; 0 returns none, None returns all.

        Returns:
            The summaries of all agents that have metrics within the times, at most *limit*.

        Raises:
            InvalidInputError: If a parameter can't be accepted, *limit* is negative, or *until* is before *since*.
            CorruptDataError: If a value that is counted can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        values = _given(_window(since, until))
        _one_of(AgentOrder, order_by, field="order_by")
        descending = inputs.flag(descending, field="descending")
        limit = inputs.whole_or_none(limit, field="limit")
        agents = _grouped(self._task_rows(values, by_agent=True))
        found = [AgentSummary(agent_id=agent, **_task_figures(agents[agent])) for agent in sorted(agents)]
        has_figure = [summary for summary in found if getattr(summary, order_by) is not None]
        has_none = [summary for summary in found if getattr(summary, order_by) is None]
        has_figure.sort(key=lambda summary: getattr(summary, order_by), reverse=descending)
        return (has_figure + has_none)[:limit]

    def metric_series(
        self,
        metric: SeriesMetric,
        *,
        bucket: timedelta,
        agg: Aggregate = "mean",
        of: str | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
    ) -> list[MetricBucket]:
        """Return how a metric went over time, in buckets of equal length.

        Buckets are counted from the Unix epoch, in UTC: those of a day begin at midnight in UTC, whatever the zone and
        its daylight saving. The first one is that of *since*, or else of the first metric, and the last one that of
        the last moment before *until*, or else of the last metric; those between are there, empty or not. Only metrics
        within *since* and *until* are counted. Tasks without a duration play no part in the durations.

        Args:
            metric: A figure of tasks, or the type of a figure about agents or swarms, as the member of its enum.
                The success rate of tasks is the mean of 1 for each that succeeded and 0 for each other.
            bucket: The length of a bucket: whole seconds, at least one.
            agg: What the values in a bucket come to. Percentiles are as `summarize_tasks` has them.
            of: Only metrics of this agent, or of this swarm if the metric is a swarm's.
            since: Only metrics at or after this time. Naive ones are local time.
            until: Only metrics before this time.

        Returns:
            The buckets, oldest first; none where there is neither a metric nor both bounds.

        Raises:
            InvalidInputError: If a parameter can't be accepted, *until* is before *since*, there would be more than
                100,000 buckets, or a bucket would begin before the year 1.
            CorruptDataError: If a value that is counted, or its time, can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        figure, filters = _followed(metric)
        filters[_FIGURES[figure].owner] = inputs.text_filter(of, field="of")
        size = _seconds_of(bucket)
        _one_of(Aggregate, agg, field="agg")
        window = _window(since, until)
        values = _given(filters | window)
        names = frozenset(values)
        since, until = window.values()
        if since is not None and since == until:
            return []  # No moment is between them.
        edges = [] if since is None else [seconds_since_epoch(since)]
        edges += [] if until is None else [(until - EPOCH - _TICK) // _SECOND]
        reach = edges
        if len(edges) < 2:  # So many that they are refused are not to be added up first.
            seconds = [second for (second,) in self._tuples(_edges(figure, names), values)]
            if not seconds:
                return []
            reach = [*edges, *(second for second in seconds if second is not None)]
        if reach:
            _starts(reach, size, bucket)
        statement = _series(figure, names, _PERCENT_OF.get(agg))
        groups = _grouped(
            self._figure_rows(figure, statement, {**values, "bucket": size, "shift": shift_for(size)}, at=3)
        )
        if not groups and len(edges) < 2:
            return []  # They were removed meanwhile.
        found = []
        for start in _starts([*edges, *groups], size, bucket):
            value = _Values()
            for row in groups.get(start, ()):
                value.add(row)
            come_to = value.aggregate(agg) if value.count else 0.0 if agg in ("count", "sum") else None
            found.append(MetricBucket(EPOCH + start * _SECOND, value.count, come_to))
        return found

    def summarize_swarm(
        self,
        swarm_id: str,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
    ) -> SwarmSummary:
        """Return what the metrics of one swarm come to, for each type of figure: see `summarize_tasks`.

        Args:
            swarm_id: The swarm.
            since: Only metrics at or after this time. Naive ones are local time.
            until: Only metrics before this time.

        Returns:
            The summary, with the types that have metrics within the times.

        Raises:
            InvalidInputError: If a parameter can't be accepted, or *until* is before *since*.
            CorruptDataError: If a value that is counted can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        if swarm_id is None:
            raise InvalidInputError("swarm_id", swarm_id, "the id of a swarm")
        values = _given({"swarm_id": inputs.text_filter(swarm_id, field="swarm_id"), **_window(since, until)})
        names = frozenset(values)
        groups = _grouped(self._figure_rows("swarm_metrics", _swarm(names), values, at=5))
        types = {SwarmMetricType.read(word): rows for word, rows in groups.items()}
        listed = [kind for kind in SwarmMetricType if kind in types]
        unlisted = sorted(kind for kind in types if not kind.is_listed)
        return SwarmSummary(swarm_id, {kind: _figure_summary(types[kind]) for kind in [*listed, *unlisted]})

    def _task_rows(self, values: Mapping[str, Any], *, by_agent: bool) -> list[Row]:
        names = frozenset(values)
        misplaced = _misplaced_tasks(names, by_agent=by_agent)
        return self._sound_rows(_tasks(names, by_agent=by_agent), values, misplaced, at=4 if by_agent else 3)

    def _figure_rows(self, figure: str, statement: Statement, values: Mapping[str, Any], *, at: int) -> list[Row]:
        names = frozenset(values) - {"bucket", "shift"}
        return self._sound_rows(statement, values, _misplaced_figures(figure, names), at=at)

    def _sound_rows(
        self, statement: Statement, values: Mapping[str, Any], misplaced: Query[Any], *, at: int
    ) -> list[Row]:
        """Return the rows of *statement*, if their column *at* says that no row holds what can't be counted."""
        while True:
            rows = self._tuples(statement, values)
            if not any(row[at] for row in rows):
                return rows
            for row in self._rows(misplaced, values):  # Most are found as they are decoded.
                _refuse(row)


def _refuse(row: Record) -> NoReturn:
    """Raise for a *row* that can be decoded, but holds a time or a figure that the database can't count."""
    table = table_of(type(row))
    key = {column.name: row[column.name] for column in table.primary_key}
    value = row.get("value", 0)
    if math.isfinite(value):
        raise CorruptDataError(table.name, "timestamp", key, "holds a time in a format that the database can't read")
    raise CorruptDataError(table.name, "value", key, f"holds {shown(value)}, where a finite number is expected")


def _figure_summary(rows: Iterable[Row]) -> FigureSummary:
    values, latest = _Values(), (math.nan, EPOCH)
    for value, moment, *rest in rows:
        values.add(rest)
        if value is not None:
            latest = value + 0.0, _decoded(moment)
    return FigureSummary(
        latest=latest[0],
        latest_at=latest[1],
        count=values.count,
        mean=values.mean,
        minimum=values.minimum,
        maximum=values.maximum,
        **{f"p{percent}": values.ranks.at(percent) for percent in _PERCENTS},
    )


def _decoded(moment: Any) -> datetime:
    decoded = UTCDateTime.decode(moment) if isinstance(moment, str) else moment.astimezone(UTC)
    assert decoded is not None
    return decoded


# What callers pass in


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _window(since: datetime | str | None, until: datetime | str | None) -> dict[str, datetime | None]:
    """Return the bounds in UTC."""
    window = {
        "since": inputs.moment_filter(since, field="since"),
        "until": inputs.moment_filter(until, field="until"),
    }
    first, end = window.values()
    if first is not None and end is not None and end < first:
        raise InvalidInputError("until", until, f"a time that is not before since, {first}")
    return window


def _one_of(alias: Any, value: object, *, field: str) -> None:
    words = get_args(alias)
    if value not in words:
        raise InvalidInputError(field, value, "one of " + ", ".join(map(repr, words)))


def _followed(metric: SeriesMetric) -> tuple[str, dict[str, Any]]:
    """Return which figure *metric* is, and the filter that makes it so."""
    if isinstance(metric, AgentMetricType):
        return "agent_metrics", {"metric_type": inputs.recognise(AgentMetricType, metric, field="metric")}
    if isinstance(metric, SwarmMetricType):
        return "swarm_metrics", {"metric_type": inputs.recognise(SwarmMetricType, metric, field="metric")}
    figures = get_args(_TaskFigure)
    if metric not in figures:
        named = ", ".join(map(repr, figures))
        raise InvalidInputError(
            "metric",
            metric,
            f"one of {named}, or a member of AgentMetricType or SwarmMetricType, such as AgentMetricType.THROUGHPUT",
        )
    return metric, {}


def _seconds_of(bucket: timedelta) -> int:
    if not isinstance(bucket, timedelta) or bucket < _SECOND or bucket.microseconds:
        raise InvalidInputError("bucket", bucket, "a timedelta of whole seconds, at least one")
    return bucket // _SECOND


def _starts(seconds: Iterable[int], size: int, bucket: timedelta) -> range:
    """Return the starts of the buckets that *seconds* fall into, and of those between."""
    seconds = list(seconds)
    starts = starts_between(min(seconds), max(seconds), size)
    if len(starts) > _MOST_BUCKETS:
        raise InvalidInputError(
            "bucket", bucket, f"a length that makes at most {_MOST_BUCKETS:,} buckets, not {len(starts):,}"
        )
    if starts.start < seconds_since_epoch(_FIRST_MOMENT):
        raise InvalidInputError("bucket", bucket, "a length of which no bucket begins before the year 1")
    return starts
