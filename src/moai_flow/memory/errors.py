"""Every error that SwarmDB raises.

    SwarmDBError
    ├── InvalidInputError      also ValueError
    ├── AgentNotFoundError     also LookupError
    ├── ConflictError          also sqlite3.IntegrityError
    ├── BusyError              also sqlite3.OperationalError
    ├── StorageError           also sqlite3.OperationalError
    ├── SchemaError
    ├── CorruptDataError
    ├── TransactionError
    └── ClosedError

The ``sqlite3`` bases keep ``except`` clauses true that were written for the bare driver.
"""

import sqlite3
from reprlib import Repr
from typing import Any, Self

_brief = Repr()
_brief.maxlevel = 3
_brief.maxstring = _brief.maxother = _brief.maxlong = 80


def shown(value: object) -> str:
    """Return *value* as it is shown in messages: short, however large or deep it is."""
    try:
        return _brief.repr(value)
    except ValueError:  # An int of more digits than Python prints.
        return f"an {type(value).__name__} of many digits"


def _rebuild(error: type["SwarmDBError"], args: tuple[Any, ...], facts: dict[str, Any]) -> "SwarmDBError":
    rebuilt = error.__new__(error, *args)
    rebuilt.args = args
    rebuilt.__dict__.update(facts)
    return rebuilt


class SwarmDBError(Exception):
    """The root of every error that SwarmDB raises on its own account."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by calling the class with the message alone, which would break a process pool.
        return _rebuild, (type(self), self.args, self.__dict__)


class InvalidInputError(SwarmDBError, ValueError):
    """A value that was passed in can't be accepted, or a stored one is not of the type asked for. Nothing was written.

    Attributes:
        field: The parameter or key, with the path inside it where it has one: ``metadata['scores'][3]``.
        value: What was passed.
        expected: What would be accepted, in words.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: got {shown(value)}, expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected

    def within(self, container: str) -> Self:
        """Return the same error for the field as a part of *container*: ``events[3].timestamp``."""
        return type(self)(f"{container}.{self.field}", self.value, self.expected)


class AgentNotFoundError(SwarmDBError, LookupError):
    """No agent is registered under this id.

    Attributes:
        agent_id: The id that was looked for.
    """

    def __init__(self, agent_id: str) -> None:
        super().__init__(f"no agent is registered as {agent_id!r}; call register_agent() first")
        self.agent_id = agent_id


class ConflictError(SwarmDBError, sqlite3.IntegrityError):
    """A row with this key exists already, or another constraint of the schema refuses it. Nothing was written."""


class BusyError(SwarmDBError, sqlite3.OperationalError):
    """Another user held the database for longer than the busy timeout. Nothing was written; a retry may succeed."""


class StorageError(SwarmDBError, sqlite3.OperationalError):
    """The database can't be opened, read or written: a full disk, a read-only file, a file of another kind."""


class SchemaError(SwarmDBError):
    """The database's tables are of a newer version, or not SwarmDB's. Nothing was written."""


class CorruptDataError(SwarmDBError):
    """A stored value can't be decoded as what its column holds.

    `SwarmDB.check` lists every such row, and can move them out of the way.

    Attributes:
        table: The table's name.
        column: The column's name.
        row: The row's primary key by column name, as stored.
        reason: What is wrong with the value.
    """

    def __init__(self, table: str, column: str, row: dict[str, Any], reason: str) -> None:
        key = ", ".join(f"{name}={value!r}" for name, value in row.items())
        super().__init__(f"{table}.{column} of the row with {key}: {reason}; check() lists every such row")
        self.table = table
        self.column = column
        self.row = row
        self.reason = reason


class TransactionError(SwarmDBError):
    """A transaction was used in a way that it can't keep its promise. The call that raises it did nothing.

    Where the block itself ends with it, what the block did is rolled back.
    """


class ClosedError(SwarmDBError):
    """The database was closed before this call."""
