"""Where a swarm of agents keeps its events, its registry, its memory and its metrics.

Examples:
    >>> from moai_flow.memory import SwarmDB
    >>> with SwarmDB(":memory:") as db:
    ...     _ = db.store_memory("session-1", "context_hint", "language", "python")
    ...     db.get_memory("session-1", "context_hint", "language")
    'python'
"""

from moai_flow.memory.aio import AsyncConnection, AsyncCursor, AsyncSession, AsyncSwarmDB, AsyncTrackedAgent
from moai_flow.memory.db import SwarmDB
from moai_flow.memory.engine import Durability
from moai_flow.memory.enums import (
    AgentMetricType,
    AgentMetricTypeLike,
    AgentStatus,
    AgentStatusLike,
    EventType,
    EventTypeLike,
    MemoryType,
    MemoryTypeLike,
    SwarmMetricType,
    SwarmMetricTypeLike,
    TaskResult,
    TaskResultLike,
)
from moai_flow.memory.errors import (
    AgentNotFoundError,
    BusyError,
    ClosedError,
    ConflictError,
    CorruptDataError,
    InvalidInputError,
    SchemaError,
    StorageError,
    SwarmDBError,
    TransactionError,
)
from moai_flow.memory.inputs import AgentMetricData, EventData, SwarmMetricData, TaskMetricData
from moai_flow.memory.models import (
    AgentEvent,
    AgentMetric,
    EventCursor,
    RegisteredAgent,
    SchemaInfo,
    SessionMemory,
    SwarmMetric,
    TaskMetric,
)
from moai_flow.memory.operations.maintenance import CheckReport, ForeignTime, KeptRows, TableFault, UnlistedValue
from moai_flow.memory.operations.retention import CleanedTable, CleanupReport, RetentionPolicy
from moai_flow.memory.operations.summaries import (
    AgentOrder,
    AgentSummary,
    Aggregate,
    FigureSummary,
    MetricBucket,
    SeriesMetric,
    SwarmSummary,
    TaskSummary,
)
from moai_flow.memory.scope import RawConnection, RawCursor
from moai_flow.memory.tracking import TrackedAgent, TrackedTask

__all__ = [
    "AgentEvent",
    "AgentMetric",
    "AgentMetricData",
    "AgentMetricType",
    "AgentMetricTypeLike",
    "AgentNotFoundError",
    "AgentOrder",
    "AgentStatus",
    "AgentStatusLike",
    "AgentSummary",
    "Aggregate",
    "AsyncConnection",
    "AsyncCursor",
    "AsyncSession",
    "AsyncSwarmDB",
    "AsyncTrackedAgent",
    "BusyError",
    "CheckReport",
    "CleanedTable",
    "CleanupReport",
    "ClosedError",
    "ConflictError",
    "CorruptDataError",
    "Durability",
    "EventCursor",
    "EventData",
    "EventType",
    "EventTypeLike",
    "FigureSummary",
    "ForeignTime",
    "InvalidInputError",
    "KeptRows",
    "MemoryType",
    "MemoryTypeLike",
    "MetricBucket",
    "RawConnection",
    "RawCursor",
    "RegisteredAgent",
    "RetentionPolicy",
    "SchemaError",
    "SchemaInfo",
    "SeriesMetric",
    "SessionMemory",
    "StorageError",
    "SwarmDB",
    "SwarmDBError",
    "SwarmMetric",
    "SwarmMetricData",
    "SwarmMetricType",
    "SwarmMetricTypeLike",
    "SwarmSummary",
    "TableFault",
    "TaskMetric",
    "TaskMetricData",
    "TaskResult",
    "TaskResultLike",
    "TaskSummary",
    "TrackedAgent",
    "TrackedTask",
    "TransactionError",
    "UnlistedValue",
]
