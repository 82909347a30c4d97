"""Errors, and the facts that they carry."""

import sqlite3
from typing import Any, assert_type

from moai_flow.memory import (
    AgentNotFoundError,
    BusyError,
    ClosedError,
    ConflictError,
    CorruptDataError,
    InvalidInputError,
    SchemaError,
    StorageError,
    SwarmDB,
    SwarmDBError,
    TransactionError,
)


def one_root() -> list[SwarmDBError]:
    return [
        InvalidInputError("limit", -1, "a whole number"),
        AgentNotFoundError("a"),
        ConflictError(),
        BusyError(),
        StorageError(),
        SchemaError(),
        CorruptDataError("agent_events", "timestamp", {"id": 1}, "is no time"),
        TransactionError(),
        ClosedError(),
    ]


def facts(db: SwarmDB) -> None:
    try:
        db.update_agent_status("a", "running")
    except AgentNotFoundError as unknown:
        assert_type(unknown.agent_id, str)
    except InvalidInputError as refused:
        assert_type(refused.field, str)
        assert_type(refused.value, object)
        assert_type(refused.expected, str)
        assert_type(refused.within("events[3]"), InvalidInputError)
    except CorruptDataError as corrupt:
        assert_type((corrupt.table, corrupt.column, corrupt.reason), tuple[str, str, str])
        assert_type(corrupt.row, dict[str, Any])


def other_bases(conflict: ConflictError, busy: BusyError, storage: StorageError) -> None:
    integrity: sqlite3.IntegrityError = conflict
    operational: list[sqlite3.OperationalError] = [busy, storage]
    lookup: LookupError = AgentNotFoundError("a")
    value: ValueError = InvalidInputError("limit", -1, "a whole number")
    print(integrity, operational, lookup, value)  # noqa: T201


def mistakes(busy: BusyError) -> None:
    integrity: sqlite3.IntegrityError = busy  # type: ignore[assignment]
    AgentNotFoundError()  # type: ignore[call-arg]
    print(integrity)  # noqa: T201
