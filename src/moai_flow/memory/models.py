"""Every table of the schema, in the schema's order.

The tables are those of the specification, to the column, so that other programs open the same file with raw SQL.
What is added is indexes, for the queries that `operations` makes.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from threading import RLock
from typing import Any, ClassVar, NamedTuple

import uuid_utils
from sqlalchemy import (
    Column,
    ColumnElement,
    Identity,
    Index,
    Integer,
    Table,
    UniqueConstraint,
    func,
    literal_column,
    text,
)
from sqlalchemy.orm import class_mapper, make_transient_to_detached, registry
from sqlalchemy.orm.base import DEFAULT_STATE_ATTR
from sqlmodel import Field, SQLModel

from moai_flow.memory.enums import (
    AgentMetricType,
    AgentStatus,
    EventType,
    MemoryType,
    SwarmMetricType,
    TaskResult,
)
from moai_flow.memory.types import (
    Count,
    EnumText,
    EpochSeconds,
    ISOText,
    JSONObjectText,
    JSONText,
    Plain,
    Real,
    UTCDateTime,
    Whole,
    utc_now,
)

_NOW: dict[str, Any] = {"server_default": text("CURRENT_TIMESTAMP")}
_ZERO: dict[str, Any] = {"server_default": text("0")}


def new_id() -> str:
    """Return a new UUID of version 7 (RFC 9562): ids made later sort later, which keeps inserts into indexes fast."""
    return str(uuid_utils.uuid7())


class _StateOnDemand:
    """What SQLAlchemy keeps about a row that was read, made when SQLAlchemy first asks for it.

    It costs more than the rest of the row, in time and in work for the cycle collector, and most rows are read and
    dropped without any session ever seeing them. Once it is there, the row's own attribute hides this one.
    """

    def __get__(self, row: "Record | None", model: "type[Record]") -> Any:
        # SQLAlchemy asks as well whether a class is an instance, and one under construction has a state yet.
        if row is None or "_is_stored" not in row.__dict__:
            raise AttributeError(DEFAULT_STATE_ATTR)
        with _one_at_a_time:
            if DEFAULT_STATE_ATTR not in row.__dict__:
                class_mapper(model).class_manager.setup_instance(row)
                make_transient_to_detached(row)  # It stands for a stored row: a session that adds it updates that.
        return row.__dict__[DEFAULT_STATE_ATTR]


_one_at_a_time = RLock()


# A registry of its own: SQLModel.metadata stays the application's, and neither creates the other's tables.
class Record(SQLModel, registry=registry()):
    """A row that reads as a typed object, and also by column name.

    ``agent.status``, ``agent["status"]`` and ``dict(agent)["status"]`` are the same object.
    """

    model_config = {
        "validate_by_name": True,
        "validate_by_alias": True,
        "serialize_by_alias": True,
        "validate_assignment": True,
        "defer_build": True,
    }

    _sa_instance_state: ClassVar[Any] = _StateOnDemand()

    def __getitem__(self, column: str) -> Any:
        if column in type(self).model_fields:
            return getattr(self, column)
        if column == "metadata" and "metadata_" in type(self).model_fields:
            return getattr(self, "metadata_")  # noqa: B009 (declared by some of the subclasses)
        raise KeyError(column)

    def __contains__(self, column: object) -> bool:
        return column in self.keys()

    def keys(self) -> list[str]:
        """Return the names of the row's columns."""
        return [field.alias or name for name, field in type(self).model_fields.items()]

    def get(self, column: str, default: Any = None) -> Any:
        """Return what the row holds in *column*, or *default* where the table has no such column."""
        return self[column] if column in self else default  # noqa: SIM401 (this is that get)


class EventCursor(NamedTuple):
    """A position in the order of events, to page from. It stays valid when its event is deleted.

    Attributes:
        timestamp: The event's time, in UTC.
        id: Its number in this database.
    """

    timestamp: datetime
    id: int


# Identity() is for SQLAlchemy: the numbers are nullable, as the specification has them, and without knowing that the
# database gives them it would refuse to insert two rows of one flush.
class AgentEvent(Record, table=True):
    """One thing that happened to an agent."""

    __tablename__: ClassVar[Any] = "agent_events"
    __table_args__: ClassVar[Any] = (
        UniqueConstraint("event_id"),
        Index("idx_agent_events_agent_id", "agent_id"),
        Index("idx_agent_events_event_type", "event_type"),
        Index("idx_agent_events_timestamp", "timestamp"),
        Index("idx_agent_events_agent_time", "agent_id", "timestamp", "id"),
        Index("idx_agent_events_type_time", "event_type", "timestamp", "id"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(
        default=None,
        primary_key=True,
        nullable=True,
        sa_type=Whole,
        sa_column_args=[Identity()],
        description="Its number in this database, given on insert.",
    )
    event_id: str = Field(default_factory=new_id, sa_type=Plain, description="Its own id: a UUID unless given.")
    event_type: EventType = Field(sa_type=EnumText(EventType), description="What happened.")
    agent_id: str = Field(sa_type=Plain, description="The agent that it happened to.")
    agent_type: str = Field(sa_type=Plain, description="What kind of agent that is.")
    timestamp: datetime = Field(default_factory=utc_now, sa_type=ISOText, description="When it happened, in UTC.")
    # Declarative classes reserve "metadata": only the column and the alias keep the name.
    metadata_: dict[str, Any] = Field(
        default_factory=dict,
        alias="metadata",
        sa_column=Column("metadata", JSONObjectText),
        description="Whatever else its writer wants to keep: a JSON object.",
    )
    created_at: datetime = Field(
        default_factory=utc_now,
        sa_type=ISOText,
        nullable=True,
        sa_column_kwargs=_NOW,
        description="When the row was written, in UTC.",
    )

    @property
    def cursor(self) -> EventCursor:
        """The event's position, for `SwarmDB.get_events(before=...)`. Only a stored event has one."""
        if self.id is None:
            raise ValueError("an event that was not read from a database has no position in it")
        return EventCursor(self.timestamp, self.id)


#: The condition of the index of agents that have not ended. A query has it to the letter, or SQLite uses another index.
HAS_NOT_ENDED = text("status NOT IN ('complete', 'error')")


class RegisteredAgent(Record, table=True):
    """One agent's present state."""

    __tablename__: ClassVar[Any] = "agent_registry"
    __table_args__: ClassVar[Any] = (
        Index("idx_agent_registry_status", "status"),
        Index("idx_agent_registry_agent_type", "agent_type"),
        # Only of those, which are few however many have ended.
        Index("idx_agent_registry_active", "spawn_time", "agent_id", sqlite_where=HAS_NOT_ENDED),
    )

    agent_id: str = Field(primary_key=True, nullable=True, sa_type=Plain, description="The agent's id.")
    agent_type: str = Field(sa_type=Plain, description="What kind of agent it is.")
    status: AgentStatus = Field(
        default=AgentStatus.SPAWNED, sa_type=EnumText(AgentStatus), description="What it is doing."
    )
    spawn_time: float = Field(
        default_factory=lambda: utc_now().timestamp(),
        sa_type=EpochSeconds,
        description="When it was last registered, in seconds since the epoch.",
    )
    complete_time: float | None = Field(
        default=None,
        sa_type=EpochSeconds,
        description="When it ended, in seconds since the epoch; None while it hasn't.",
    )
    duration_ms: int | None = Field(
        default=None, sa_type=Whole, description="How long it took, in milliseconds, where its writer said so."
    )
    metadata_: dict[str, Any] = Field(
        default_factory=dict,
        alias="metadata",
        sa_column=Column("metadata", JSONObjectText),
        description="Whatever else its writer wants to keep: a JSON object.",
    )
    last_updated: datetime = Field(
        default_factory=utc_now,
        sa_type=ISOText,
        nullable=True,
        sa_column_kwargs=_NOW,
        description="When the row was last written, in UTC.",
    )

    @property
    def spawned_at(self) -> datetime:
        """`spawn_time` as a datetime in UTC."""
        return datetime.fromtimestamp(self.spawn_time, UTC)

    @property
    def completed_at(self) -> datetime | None:
        """`complete_time` as a datetime in UTC."""
        return None if self.complete_time is None else datetime.fromtimestamp(self.complete_time, UTC)


class SessionMemory(Record, table=True):
    """One value that was stored under a key. The row with the highest id of a key is the key's value."""

    __tablename__: ClassVar[Any] = "session_memory"
    __table_args__: ClassVar[Any] = (
        Index("idx_session_memory_session_id", "session_id"),
        Index("idx_session_memory_memory_type", "memory_type"),
        Index("idx_session_memory_key", "key"),
        Index("idx_session_memory_entry", "session_id", "memory_type", "key", "id"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(
        default=None,
        primary_key=True,
        nullable=True,
        sa_type=Whole,
        sa_column_args=[Identity()],
        description="Its place in the sequence of writes.",
    )
    session_id: str = Field(sa_type=Plain, description="The session that it belongs to.")
    memory_type: MemoryType = Field(sa_type=EnumText(MemoryType), description="Which kind of memory it is.")
    key: str = Field(sa_type=Plain, description="Its name within session and type.")
    value: Any = Field(default=None, sa_column=Column("value", JSONText), description="A JSON value.")
    timestamp: datetime = Field(default_factory=utc_now, sa_type=ISOText, description="When it was stored, in UTC.")
    ttl_hours: int | None = Field(
        default=None, sa_type=Whole, description="How long it lives, in hours from its timestamp; None for ever."
    )
    created_at: datetime = Field(
        default_factory=utc_now,
        sa_type=ISOText,
        nullable=True,
        sa_column_kwargs=_NOW,
        description="When the row was written, in UTC.",
    )

    @property
    def expires_at(self) -> datetime | None:
        """The moment from which it reads as absent; None if it never expires."""
        return expiry(self.timestamp, self.ttl_hours)


def expiry(timestamp: datetime, ttl_hours: int | None) -> datetime | None:
    """Return when a memory stored at *timestamp* expires, or None for never."""
    if ttl_hours is None:
        return None
    try:
        return timestamp + timedelta(hours=ttl_hours)
    except OverflowError:
        return None  # Past the year 9999, which is as good as never.


class TaskMetric(Record, table=True):
    """One finished task."""

    __tablename__: ClassVar[Any] = "task_metrics"
    __table_args__: ClassVar[Any] = (
        Index("idx_task_metrics_agent", "agent_id", "timestamp"),
        Index("idx_task_metrics_time", "timestamp"),
        Index("idx_task_metrics_result", "result", "timestamp"),
    )

    task_id: str = Field(primary_key=True, sa_type=Plain, description="The task, as its caller names it.")
    agent_id: str = Field(sa_type=Plain, description="The agent that did it.")
    duration_ms: int | None = Field(default=None, sa_type=Whole, description="How long it took, in milliseconds.")
    result: TaskResult = Field(sa_type=EnumText(TaskResult), description="How it ended.")
    tokens_used: int = Field(
        default=0,
        sa_type=Count,
        nullable=True,
        sa_column_kwargs=_ZERO,
        description="How many tokens it used. NULL reads as 0.",
    )
    files_changed: int = Field(
        default=0,
        sa_type=Count,
        nullable=True,
        sa_column_kwargs=_ZERO,
        description="How many files it changed. NULL reads as 0.",
    )
    timestamp: datetime = Field(
        default_factory=utc_now,
        primary_key=True,
        nullable=True,
        sa_type=UTCDateTime,
        sa_column_kwargs=_NOW,
        description="When it was recorded, in UTC: with the task, the row's key.",
    )


class AgentMetric(Record, table=True):
    """One figure about one agent."""

    __tablename__: ClassVar[Any] = "agent_metrics"
    __table_args__: ClassVar[Any] = (
        Index("idx_agent_metrics_agent", "agent_id", "metric_type", "timestamp"),
        Index("idx_agent_metrics_type", "metric_type", "timestamp"),
        Index("idx_agent_metrics_agent_time", "agent_id", "timestamp", "metric_id"),
        Index("idx_agent_metrics_time", "timestamp", "metric_id"),
        {"sqlite_autoincrement": True},
    )

    metric_id: int | None = Field(
        default=None,
        primary_key=True,
        nullable=True,
        sa_type=Whole,
        sa_column_args=[Identity()],
        description="Its number in this database, given on insert.",
    )
    agent_id: str = Field(sa_type=Plain, description="The agent that it measures.")
    metric_type: AgentMetricType = Field(sa_type=EnumText(AgentMetricType), description="What it measures.")
    value: float = Field(sa_type=Real, description="The figure.")
    metadata_: dict[str, Any] = Field(
        default_factory=dict,
        alias="metadata",
        sa_column=Column("metadata", JSONObjectText),
        description="Whatever else its writer wants to keep: a JSON object.",
    )
    timestamp: datetime = Field(
        default_factory=utc_now,
        nullable=True,
        sa_type=UTCDateTime,
        sa_column_kwargs=_NOW,
        description="When it was measured, in UTC.",
    )


class SwarmMetric(Record, table=True):
    """One figure about a whole swarm."""

    __tablename__: ClassVar[Any] = "swarm_metrics"
    __table_args__: ClassVar[Any] = (
        Index("idx_swarm_metrics_swarm", "swarm_id", "metric_type", "timestamp"),
        Index("idx_swarm_metrics_type", "metric_type", "timestamp"),
        Index("idx_swarm_metrics_swarm_time", "swarm_id", "timestamp", "metric_id"),
        Index("idx_swarm_metrics_time", "timestamp", "metric_id"),
        {"sqlite_autoincrement": True},
    )

    metric_id: int | None = Field(
        default=None,
        primary_key=True,
        nullable=True,
        sa_type=Whole,
        sa_column_args=[Identity()],
        description="Its number in this database, given on insert.",
    )
    swarm_id: str = Field(sa_type=Plain, description="The swarm that it measures.")
    metric_type: SwarmMetricType = Field(sa_type=EnumText(SwarmMetricType), description="What it measures.")
    value: float = Field(sa_type=Real, description="The figure.")
    metadata_: dict[str, Any] = Field(
        default_factory=dict,
        alias="metadata",
        sa_column=Column("metadata", JSONObjectText),
        description="Whatever else its writer wants to keep: a JSON object.",
    )
    timestamp: datetime = Field(
        default_factory=utc_now,
        nullable=True,
        sa_type=UTCDateTime,
        sa_column_kwargs=_NOW,
        description="When it was measured, in UTC.",
    )


class SchemaInfo(Record, table=True):
    """One fact about the database itself: its version, and marks that maintenance leaves."""

    __tablename__: ClassVar[Any] = "schema_info"

    key: str = Field(primary_key=True, nullable=True, sa_type=Plain, description="What the fact is about.")
    value: str = Field(sa_type=Plain, description="The fact.")
    updated_at: datetime = Field(
        default_factory=utc_now,
        sa_type=ISOText,
        nullable=True,
        sa_column_kwargs=_NOW,
        description="When it was written, in UTC.",
    )


def unsearched(column: Column[Any]) -> ColumnElement[Any]:
    """Return *column* for a condition by which no index is to be searched.

    SQLite takes one index for a table, and one bound on each side. Left the choice, it may take the one that says
    least, or have to sort what it finds.
    """
    return func.coalesce(column, column)


#: SQLite's own number of a row, which every table has there, whatever its key.
rowid_column: ColumnElement[int] = literal_column("rowid", Integer)

#: Every table, in the schema's order.
TABLES: tuple[type[Record], ...] = (
    AgentEvent,
    RegisteredAgent,
    SessionMemory,
    TaskMetric,
    AgentMetric,
    SwarmMetric,
    SchemaInfo,
)


def table_of(model: type[Record]) -> Table:
    """Return a model's table."""
    return Record.metadata.tables[str(model.__tablename__)]


def columns(model: type[Record]) -> Iterator[Column[Any]]:
    """Yield the columns of a model's table, in the schema's order."""
    yield from table_of(model).columns
