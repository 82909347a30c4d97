"""Figures about tasks, agents and whole swarms, by time."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cache
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
)
from moai_flow.memory.errors import InvalidInputError
from moai_flow.memory.models import AgentMetric, Record, SwarmMetric, TaskMetric, table_of, unsearched
from moai_flow.memory.scope import Scope
from moai_flow.memory.statements import Insert, Query, Statement, insert_for

R = TypeVar("R", bound=Record)

_TASKS = table_of(TaskMetric)


def _insert_unless_taken(dialect: Dialect) -> Executable:
    key = [_TASKS.c.task_id, _TASKS.c.timestamp]
    insertion = insert_for(dialect, _TASKS)
    clause: Executable = insertion.on_conflict_do_nothing(index_elements=key)
    return clause


_INSERT_TASK = Statement(_insert_unless_taken)


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
        kept = self._clock() if timestamp is None else inputs.moment(timestamp, field="timestamp")
        row = {
            "task_id": inputs.text(task_id, field="task_id"),
            "agent_id": inputs.text(agent_id, field="agent_id"),
            "duration_ms": inputs.whole_or_none(duration_ms, field="duration_ms"),
            "result": inputs.parse(TaskResult, result, field="result"),
            "tokens_used": inputs.whole(tokens_used, field="tokens_used"),
            "files_changed": inputs.whole(files_changed, field="files_changed"),
            "timestamp": kept,
        }
        while not self._write(_INSERT_TASK, row).rowcount:
            try:
                kept = row["timestamp"] = kept + timedelta(microseconds=1)
            except OverflowError:
                raise InvalidInputError("timestamp", timestamp, "a time after which another one fits") from None
        return kept

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
        row = {
            "agent_id": inputs.text(agent_id, field="agent_id"),
            "metric_type": inputs.parse(AgentMetricType, metric_type, field="metric_type"),
        }
        return self._store_figure(_INSERT_AGENT, row, value, metadata, timestamp)

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
        row = {
            "swarm_id": inputs.text(swarm_id, field="swarm_id"),
            "metric_type": inputs.parse(SwarmMetricType, metric_type, field="metric_type"),
        }
        return self._store_figure(_INSERT_SWARM, row, value, metadata, timestamp)

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

    def _store_figure(
        self,
        statement: Insert,
        row: dict[str, Any],
        value: float,
        metadata: dict[str, Any] | None,
        timestamp: datetime | str | None,
    ) -> int:
        row["value"] = inputs.number(value, field="value")
        row["metadata"] = inputs.json_object(metadata, field="metadata")
        row["timestamp"] = self._clock() if timestamp is None else inputs.moment(timestamp, field="timestamp")
        return self._insert(statement, row)

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
