"""Figures about tasks, agents and whole swarms, by time."""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from functools import cache
from operator import itemgetter, lt
from typing import Any, TypeVar

from sqlalchemy import Dialect, Executable, bindparam, select

from moai_flow.memory import inputs
from moai_flow.memory.enums import (
    AgentMetricType,
    AgentMetricTypeLike,
    SwarmMetricType,
    SwarmMetricTypeLike,
    TaskResult,
    TaskResultLike,
    Vocabulary,
)
from moai_flow.memory.errors import InvalidInputError
from moai_flow.memory.inputs import AgentMetricData, SwarmMetricData, TaskMetricData
from moai_flow.memory.models import AgentMetric, Record, SwarmMetric, TaskMetric, table_of, unsearched
from moai_flow.memory.scope import Scope
from moai_flow.memory.statements import Bound, Insert, Program, Query, Statement, insert_for

R = TypeVar("R", bound=Record)

#: Values by the names of their columns.
Columns = Mapping[str, list[Any]]

#: A task and a time: the key of one of its metrics.
Key = tuple[str, datetime]

MICROSECOND = timedelta(microseconds=1)

_TASKS = table_of(TaskMetric)


def _insert_unless_taken(dialect: Dialect) -> Executable:
    key = [_TASKS.c.task_id, _TASKS.c.timestamp]
    insertion = insert_for(dialect, _TASKS)
    clause: Executable = insertion.on_conflict_do_nothing(index_elements=key)
    return clause


_INSERT_TASK = Statement(_insert_unless_taken)
_IS_TAKEN = Statement(
    select(_TASKS.c.task_id).where(
        _TASKS.c.task_id == bindparam("task_id"), _TASKS.c.timestamp == bindparam("timestamp")
    )
)


def _numbered(model: type[Record], owner: str) -> Insert:
    table = table_of(model)
    return Insert(table, (owner, "metric_type", "value", "metadata", "timestamp"), number=table.c.metric_id)


_INSERT_AGENT, _INSERT_SWARM = _numbered(AgentMetric, "agent_id"), _numbered(SwarmMetric, "swarm_id")


@cache
def _newest(model: type[R], names: frozenset[str]) -> Query[R]:
    table = table_of(model)
    conditions: dict[str, Any] = {
        "since": table.c.timestamp >= bindparam("since"),
        "until": table.c.timestamp < bindparam("until"),
    }
    narrowest = next((name for name in ("task_id", "agent_id") if name in names), None)
    for name in names - conditions.keys():
        # No index of tasks has two of these, and SQLite can't know that a task has fewer rows than an agent.
        searched = model is not TaskMetric or narrowest in (None, name)
        conditions[name] = (table.c[name] if searched else unsearched(table.c[name])) == bindparam(name)
    tie = table.c.task_id if model is TaskMetric else table.c.metric_id
    return Query(
        model,
        select(table)
        .where(*(conditions[name] for name in sorted(names)))
        .order_by(table.c.timestamp.desc(), tie.desc())
        .limit(bindparam("limit")),
    )


class MetricOperations(Scope):
    """Recording figures, and reading them back, newest first."""

    def store_task_metric(
        self,
        task_id: str,
        agent_id: str,
        duration_ms: int | None,
        result: TaskResultLike,
        tokens_used: int = 0,
        files_changed: int = 0,
        timestamp: datetime | str | None = None,
    ) -> datetime:
        """Record one finished task.

        Args:
            task_id: The task.
            agent_id: The agent that did it.
            duration_ms: How long it took, in milliseconds; None if nobody measured.
            result: How it ended.
            tokens_used: How many tokens it used.
            files_changed: How many files it changed.
            timestamp: When it ended. Naive ones are local time. Default: now.

        Returns:
            The time under which it is kept, in UTC: with the task's id, its key. A task that has a metric of the same
            microsecond takes the next free one.

        Raises:
            InvalidInputError: If a value can't be accepted.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        given = {
            "task_id": task_id,
            "agent_id": agent_id,
            "duration_ms": duration_ms,
            "result": result,
            "tokens_used": tokens_used,
            "files_changed": files_changed,
            "timestamp": timestamp,
        }
        row = _task_row(given, self._clock())
        while not self._write(_INSERT_TASK, row).rowcount:
            row["timestamp"] = _next_time(row["timestamp"])
        kept: datetime = row["timestamp"]
        return kept

    def store_task_metrics(self, metrics: Iterable[TaskMetricData | TaskMetric]) -> list[datetime]:
        """Record many finished tasks in one transaction: all of them, or none.

        Args:
            metrics: What `store_task_metric` takes, as dicts, any number of times. Those without a time are of one
                moment, now. A `TaskMetric`, stored or not, does as well.

        Returns:
            The times under which they are kept, in UTC, in the order given. The rule for a microsecond that is taken is
            that of `store_task_metric`, as if each came after the one before it.

        Raises:
            InvalidInputError: As `store_task_metric`, or if a key is missing or unknown; the field begins with the
                metric's index: ``metrics[3].result``.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        now, program = self._clock(), self._programs[_INSERT_TASK]
        columns, bound = _batch(metrics, TaskMetric, TaskMetricData, program, _task_columns, _task_row, now)
        wanted: list[Key] = list(zip(columns["task_id"], columns["timestamp"], strict=True))
        is_in_order = all(map(lt, wanted, wanted[1:]))
        is_free = is_in_order or len(set(wanted)) == len(wanted)
        keys, taken = wanted, set[Key]()
        while True:
            if taken or not is_free:
                keys = _free(wanted, taken)
                bound = [program.rebind(row, timestamp=time) for row, (_, time) in zip(bound, keys, strict=True)]
            # In the order of keys, two batches never wait for each other.
            if is_in_order:  # And stays so: a free time is never passed by one that was before it.
                in_order = bound
            else:
                in_order = [row for _, row in sorted(zip(keys, bound, strict=True), key=itemgetter(0))]
            try:
                with self._block(alone=False) as block:
                    if block.execute_many(program, in_order) < len(in_order) > 0:
                        raise _TakenError
                    block.added += len(in_order)
            except _TakenError:  # Which is rare: only now is it worth a look, by which.
                taken.update(key for key in keys if self._tuples(_IS_TAKEN, {"task_id": key[0], "timestamp": key[1]}))
            else:
                return [time for _, time in keys]

    def store_agent_metric(
        self,
        agent_id: str,
        metric_type: AgentMetricTypeLike,
        value: float,
        metadata: dict[str, Any] | None = None,
        timestamp: datetime | str | None = None,
    ) -> int:
        """Record one figure about an agent.

        Args:
            agent_id: The agent.
            metric_type: What is measured.
            value: The figure, a finite number.
            metadata: A JSON object to keep with it.
            timestamp: When it was measured. Naive ones are local time. Default: now.

        Returns:
            The metric's number, `AgentMetric.metric_id`.

        Raises:
            InvalidInputError: If a value can't be accepted.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        given = {"agent_id": agent_id, "metric_type": metric_type, "value": value}
        row = _agent_row({**given, "metadata": metadata, "timestamp": timestamp}, self._clock())
        return self._insert(_INSERT_AGENT, row)

    def store_agent_metrics(self, metrics: Iterable[AgentMetricData | AgentMetric]) -> int:
        """Record many figures about agents in one transaction: all of them, or none.

        Args:
            metrics: What `store_agent_metric` takes, as dicts, any number of times. Those without a time are of one
                moment, now. An `AgentMetric` does as well; it is added as a new one, whatever its number.

        Returns:
            How many were recorded.

        Raises:
            InvalidInputError: As `store_agent_metric`, or if a key is missing or unknown; the field begins with the
                metric's index: ``metrics[3].value``.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        now, program = self._clock(), self._programs[_INSERT_AGENT]
        _, bound = _batch(metrics, AgentMetric, AgentMetricData, program, _agent_columns, _agent_row, now)
        self._write_many(program, bound)
        return len(bound)

    def store_swarm_metric(
        self,
        swarm_id: str,
        metric_type: SwarmMetricTypeLike,
        value: float,
        metadata: dict[str, Any] | None = None,
        timestamp: datetime | str | None = None,
    ) -> int:
        """Record one figure about a whole swarm.

        Args:
            swarm_id: The swarm.
            metric_type: What is measured.
            value: The figure, a finite number.
            metadata: A JSON object to keep with it.
            timestamp: When it was measured. Naive ones are local time. Default: now.

        Returns:
            The metric's number, `SwarmMetric.metric_id`.

        Raises:
            InvalidInputError: If a value can't be accepted.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        given = {"swarm_id": swarm_id, "metric_type": metric_type, "value": value}
        row = _swarm_row({**given, "metadata": metadata, "timestamp": timestamp}, self._clock())
        return self._insert(_INSERT_SWARM, row)

    def store_swarm_metrics(self, metrics: Iterable[SwarmMetricData | SwarmMetric]) -> int:
        """Record many figures about swarms in one transaction: all of them, or none.

        Args:
            metrics: What `store_swarm_metric` takes, as dicts, any number of times. Those without a time are of one
                moment, now. A `SwarmMetric` does as well; it is added as a new one, whatever its number.

        Returns:
            How many were recorded.

        Raises:
            InvalidInputError: As `store_swarm_metric`, or if a key is missing or unknown; the field begins with the
                metric's index: ``metrics[3].value``.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        now, program = self._clock(), self._programs[_INSERT_SWARM]
        _, bound = _batch(metrics, SwarmMetric, SwarmMetricData, program, _swarm_columns, _swarm_row, now)
        self._write_many(program, bound)
        return len(bound)

    def get_task_metrics(
        self,
        task_id: str | None = None,
        agent_id: str | None = None,
        result: TaskResultLike | None = None,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        limit: int = 100,
    ) -> list[TaskMetric]:
        """Return task metrics, newest first; of two at the same time, the greater task id first.

        Args:
            task_id: Only metrics of this task.
            agent_id: Only metrics of this agent.
            result: Only tasks that ended like this.
            since: Only metrics at or after this time. Naive ones are local time.
            until: Only metrics before this time.
            limit: How many at most; 0 returns none.

        Returns:
            The metrics, at most *limit*.

        Raises:
            InvalidInputError: If a filter can't be accepted, or *limit* is negative.
            CorruptDataError: If a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        filters = {
            "task_id": inputs.text_filter(task_id, field="task_id"),
            "agent_id": inputs.text_filter(agent_id, field="agent_id"),
            "result": inputs.recognise_filter(TaskResult, result, field="result"),
        }
        return self._metrics(TaskMetric, filters, since, until, limit)

    def get_agent_metrics(
        self,
        agent_id: str | None = None,
        metric_type: AgentMetricTypeLike | None = None,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        limit: int = 100,
    ) -> list[AgentMetric]:
        """Return agent metrics, newest first; of two at the same time, the one recorded later first.

        Args:
            agent_id: Only metrics of this agent.
            metric_type: Only metrics of this type.
            since: Only metrics at or after this time. Naive ones are local time.
            until: Only metrics before this time.
            limit: How many at most; 0 returns none.

        Returns:
            The metrics, at most *limit*.

        Raises:
            InvalidInputError: If a filter can't be accepted, or *limit* is negative.
            CorruptDataError: If a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        filters = {
            "agent_id": inputs.text_filter(agent_id, field="agent_id"),
            "metric_type": inputs.recognise_filter(AgentMetricType, metric_type, field="metric_type"),
        }
        return self._metrics(AgentMetric, filters, since, until, limit)

    def get_swarm_metrics(
        self,
        swarm_id: str | None = None,
        metric_type: SwarmMetricTypeLike | None = None,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        limit: int = 100,
    ) -> list[SwarmMetric]:
        """Return swarm metrics, newest first; of two at the same time, the one recorded later first.

        Args:
            swarm_id: Only metrics of this swarm.
            metric_type: Only metrics of this type.
            since: Only metrics at or after this time. Naive ones are local time.
            until: Only metrics before this time.
            limit: How many at most; 0 returns none.

        Returns:
            The metrics, at most *limit*.

        Raises:
            InvalidInputError: If a filter can't be accepted, or *limit* is negative.
            CorruptDataError: If a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        filters = {
            "swarm_id": inputs.text_filter(swarm_id, field="swarm_id"),
            "metric_type": inputs.recognise_filter(SwarmMetricType, metric_type, field="metric_type"),
        }
        return self._metrics(SwarmMetric, filters, since, until, limit)

    def _metrics(
        self,
        model: type[R],
        filters: Mapping[str, Any],
        since: datetime | str | None,
        until: datetime | str | None,
        limit: int,
    ) -> list[R]:
        values = {
            **filters,
            "since": inputs.moment_filter(since, field="since"),
            "until": inputs.moment_filter(until, field="until"),
        }
        given = {name: value for name, value in values.items() if value is not None}
        given["limit"] = inputs.whole(limit, field="limit")
        return self._rows(_newest(model, frozenset(given) - {"limit"}), given)


_COUNTS = ("tokens_used", "files_changed")


class _TakenError(Exception):
    """The key of at least one row of a batch belongs to another."""


def _batch(
    metrics: Iterable[object],
    model: type[Record],
    shape: type[Any],
    program: Program,
    columns_of: Callable[[Columns, datetime], Columns],
    row_of: Callable[[Mapping[str, Any], datetime], dict[str, Any]],
    now: datetime,
) -> tuple[Columns, list[Bound]]:
    """Return the values of *metrics* by column, and by row as *program* wants them.

    Dicts of plain values are checked column by column, which is a third of the work. What is anything else, or wrong,
    is found to be so there, and looked at row by row.
    """
    if isinstance(metrics, dict | Record) or not isinstance(metrics, Iterable):
        raise InvalidInputError("metrics", metrics, "a list, or another iterable, of metrics")
    metrics = list(metrics)
    try:
        columns = columns_of(_columns(metrics, shape), now)
        return columns, program.bind_columns(columns)
    except InvalidInputError:
        rows: list[dict[str, Any]] = []
        bound: list[Bound] = []
    for metric in metrics:
        try:
            if isinstance(metric, dict):
                given = inputs.entries(metric, shape)
            elif isinstance(metric, model):
                given = {name: metric[name] for name in shape.__annotations__}
            else:
                raise InvalidInputError(
                    "metric", metric, f"a {shape.__name__} (a dict), or an object of {model.__name__}"
                )
            row = row_of(given, now)
            bound.append(program.bind(row))
        except InvalidInputError as error:
            raise error.within(f"metrics[{len(rows)}]") from None
        rows.append(row)
    return {name: [row[name] for row in rows] for name in shape.__annotations__}, bound


def _columns(metrics: list[Any], shape: type[Any]) -> Columns:
    """Return the values of dicts by key; where one has not the key, what that means.

    Raises:
        InvalidInputError: If one is no dict, or has other keys than *shape*.
    """
    if not set(map(type, metrics)) <= {dict}:
        raise InvalidInputError("metric", metrics, "dicts")
    for names in set(map(tuple, metrics)):
        inputs.entries(dict.fromkeys(names), shape)
    columns = {}
    for name in shape.__annotations__:
        absent = 0 if name in _COUNTS else None
        columns[name] = [metric.get(name, absent) for metric in metrics]
    return columns


def _task_columns(given: Columns, now: datetime) -> Columns:
    return {
        "task_id": inputs.texts(given["task_id"], field="task_id"),
        "agent_id": inputs.texts(given["agent_id"], field="agent_id"),
        "duration_ms": inputs.wholes_or_none(given["duration_ms"], field="duration_ms"),
        "result": inputs.members(TaskResult, given["result"], field="result"),
        "tokens_used": inputs.wholes(given["tokens_used"], field="tokens_used"),
        "files_changed": inputs.wholes(given["files_changed"], field="files_changed"),
        "timestamp": inputs.moments(given["timestamp"], now, field="timestamp"),
    }


def _agent_columns(given: Columns, now: datetime) -> Columns:
    return {
        "agent_id": inputs.texts(given["agent_id"], field="agent_id"),
        **_figure_columns(AgentMetricType, given, now),
    }


def _swarm_columns(given: Columns, now: datetime) -> Columns:
    return {
        "swarm_id": inputs.texts(given["swarm_id"], field="swarm_id"),
        **_figure_columns(SwarmMetricType, given, now),
    }


def _figure_columns(vocabulary: type[Vocabulary], given: Columns, now: datetime) -> Columns:
    return {
        "metric_type": inputs.members(vocabulary, given["metric_type"], field="metric_type"),
        "value": [inputs.number(value, field="value") for value in given["value"]],
        "metadata": [inputs.json_object(value, field="metadata") for value in given["metadata"]],
        "timestamp": inputs.moments(given["timestamp"], now, field="timestamp"),
    }


def _task_row(given: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    timestamp = given.get("timestamp")
    return {
        "task_id": inputs.text(given["task_id"], field="task_id"),
        "agent_id": inputs.text(given["agent_id"], field="agent_id"),
        "duration_ms": inputs.whole_or_none(given.get("duration_ms"), field="duration_ms"),
        "result": inputs.parse(TaskResult, given["result"], field="result"),
        "tokens_used": inputs.whole(given.get("tokens_used", 0), field="tokens_used"),
        "files_changed": inputs.whole(given.get("files_changed", 0), field="files_changed"),
        "timestamp": now if timestamp is None else inputs.moment(timestamp, field="timestamp"),
    }


def _agent_row(given: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    return {"agent_id": inputs.text(given["agent_id"], field="agent_id"), **_figure(AgentMetricType, given, now)}


def _swarm_row(given: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    return {"swarm_id": inputs.text(given["swarm_id"], field="swarm_id"), **_figure(SwarmMetricType, given, now)}


def _figure(vocabulary: type[Vocabulary], given: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    timestamp = given.get("timestamp")
    return {
        "metric_type": inputs.parse(vocabulary, given["metric_type"], field="metric_type"),
        "value": inputs.number(given["value"], field="value"),
        "metadata": inputs.json_object(given.get("metadata"), field="metadata"),
        "timestamp": now if timestamp is None else inputs.moment(timestamp, field="timestamp"),
    }


def _next_time(time: datetime) -> datetime:
    try:
        return time + MICROSECOND
    except OverflowError:
        raise InvalidInputError("timestamp", time, "a time after which another one fits") from None


def _free(wanted: Iterable[Key], taken: Iterable[Key]) -> list[Key]:
    """Return for each key the first one from it on that is neither taken nor an earlier one's."""
    #: For each key in use, a time up to which there is no free one.
    full: dict[Key, datetime] = {key: key[1] for key in taken}
    found: list[Key] = []
    for key in wanted:
        passed = []
        while (until := full.get(key)) is not None:
            passed.append(key)
            try:
                key = key[0], _next_time(until)
            except InvalidInputError as error:
                raise error.within(f"metrics[{len(found)}]") from None
        # However many ask for the same time, each looks at few of those that are in use.
        full.update(dict.fromkeys((*passed, key), key[1]))
        found.append(key)
    return found
