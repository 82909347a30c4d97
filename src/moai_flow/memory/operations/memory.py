"""Cross-session memory: JSON values under keys, with a time to live."""

from functools import cache, lru_cache
from typing import Any, TypeVar, cast, overload

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from sqlalchemy import bindparam, delete, func, select
from sqlmodel import col

from moai_flow.memory import inputs
from moai_flow.memory.enums import MemoryType, MemoryTypeLike
from moai_flow.memory.errors import CorruptDataError, InvalidInputError
from moai_flow.memory.models import SessionMemory, expiry, table_of
from moai_flow.memory.scope import Scope
from moai_flow.memory.statements import Insert, Query, Row, Statement
from moai_flow.memory.types import decode_json

T = TypeVar("T")
D = TypeVar("D")

_MEMORY = table_of(SessionMemory)
_KEY = (
    _MEMORY.c.session_id == bindparam("session_id"),
    _MEMORY.c.memory_type == bindparam("memory_type"),
    _MEMORY.c.key == bindparam("key"),
)
_NEWEST_WRITE_FIRST = col(SessionMemory.id).desc()

_ID, _VALUE, _TIME, _TTL = (
    list(_MEMORY.columns.keys()).index(name) for name in ("id", "value", "timestamp", "ttl_hours")
)

_INSERT = Insert(
    _MEMORY,
    ("session_id", "memory_type", "key", "value", "timestamp", "ttl_hours", "created_at"),
    number=_MEMORY.c.id,
)
_LATEST = Query(SessionMemory, select(_MEMORY).where(*_KEY).order_by(_NEWEST_WRITE_FIRST).limit(1))
_HISTORY = Query(SessionMemory, select(_MEMORY).where(*_KEY).order_by(_NEWEST_WRITE_FIRST))
_DELETE = Statement(delete(_MEMORY).where(*_KEY, _MEMORY.c.id <= bindparam("latest")), writes=_MEMORY)


@cache
def _latest_of_each(names: frozenset[str]) -> Query[SessionMemory]:
    conditions: list[Any] = [_MEMORY.c.session_id == bindparam("session_id")]
    if "memory_type" in names:
        conditions.append(_MEMORY.c.memory_type == bindparam("memory_type"))
    if "prefix" in names:
        # Not LIKE, which would fold case and give % and _ a meaning.
        conditions.append(func.substr(_MEMORY.c.key, 1, func.length(bindparam("prefix"))) == bindparam("prefix"))
    latest = select(func.max(_MEMORY.c.id)).where(*conditions).group_by(_MEMORY.c.memory_type, _MEMORY.c.key)
    return Query(
        SessionMemory,
        select(_MEMORY).where(_MEMORY.c.id.in_(latest)).order_by(_MEMORY.c.memory_type, _MEMORY.c.key),
    )


class MemoryOperations(Scope):
    """Storing values for later sessions, and finding them again."""

    def store_memory(
        self,
        session_id: str,
        memory_type: MemoryTypeLike,
        key: str,
        value: Any,
        ttl_hours: int | None = None,
    ) -> int:
        """Store a value under a key, now. It takes the place of the value that the key had; the history keeps that.

        Args:
            session_id: The session that it belongs to.
            memory_type: Which kind of memory it is.
            key: Its name within session and type.
            value: A JSON value: None, bool, int, finite float, str, list, or dict with str keys. Tuples, dates and
                times, UUIDs, decimals, paths, enums, dataclasses and pydantic models are stored as the JSON they
                dump to.
            ttl_hours: How many hours it lives, at least 1. Default: for ever.

        Returns:
            Its place in the sequence of writes, `SessionMemory.id`.

        Raises:
            InvalidInputError: If a value can't be accepted.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        now = self._clock()
        row = {
            **_address(session_id, inputs.parse(MemoryType, memory_type, field="memory_type"), key),
            "value": value,
            "timestamp": now,
            "ttl_hours": inputs.whole_or_none(ttl_hours, field="ttl_hours", least=1),
            "created_at": now,
        }
        return self._insert(_INSERT, row)

    @overload
    def get_memory(self, session_id: str, memory_type: MemoryTypeLike, key: str) -> Any: ...
    @overload
    def get_memory(self, session_id: str, memory_type: MemoryTypeLike, key: str, *, default: Any) -> Any: ...
    @overload
    def get_memory(self, session_id: str, memory_type: MemoryTypeLike, key: str, *, as_type: type[T]) -> T | None: ...
    @overload
    def get_memory(
        self, session_id: str, memory_type: MemoryTypeLike, key: str, *, as_type: type[T], default: D
    ) -> T | D: ...

    def get_memory(
        self,
        session_id: str,
        memory_type: MemoryTypeLike,
        key: str,
        *,
        as_type: type[Any] | None = None,
        default: Any = None,
    ) -> Any:
        """Return the value of a key: the latest that was stored, unless that has expired.

        An expired key is absent. What it held before does not come back.

        Args:
            session_id: The session that it belongs to.
            memory_type: Which kind of memory it is.
            key: Its name within session and type.
            as_type: What to validate the value as, with pydantic: a model, a dataclass, ``list[int]``, and so on. A
                TypedDict has to be ``typing_extensions``' own before Python 3.12.
            default: What to return if the key is absent. A stored None is not absence.

        Returns:
            The value, as JSON decodes or as *as_type*; *default* if the key is absent.

        Raises:
            InvalidInputError: If a parameter can't be accepted, or the stored value is no *as_type*.
            CorruptDataError: If the stored value is not JSON, or its time is none.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        found = self._tuples(_LATEST, _address(session_id, memory_type, key))
        row = next(filter(self._is_live, found), None)
        if row is None:
            return default
        stored = row[_VALUE]
        try:
            if as_type is None:
                return None if stored is None else decode_json(stored)
            return _validated(as_type, "null" if stored is None else stored)
        except ValueError as error:
            if isinstance(error, InvalidInputError):
                raise
            raise self._latest_fault(row) from error

    def list_memories(
        self, session_id: str, memory_type: MemoryTypeLike | None = None, prefix: str | None = None
    ) -> list[SessionMemory]:
        """Return what a session remembers: the latest value of each key, without those that have expired.

        Args:
            session_id: The session.
            memory_type: Only memories of this kind.
            prefix: Only keys that begin with this, to the letter.

        Returns:
            The memories, by type and key.

        Raises:
            InvalidInputError: If a filter can't be accepted.
            CorruptDataError: If a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        filters = {
            "session_id": inputs.text(session_id, field="session_id"),
            "memory_type": inputs.recognise_filter(MemoryType, memory_type, field="memory_type"),
            "prefix": inputs.text_filter(prefix, field="prefix"),
        }
        given = {name: value for name, value in filters.items() if value is not None}
        query = _latest_of_each(frozenset(given))
        return self._decoder(query).decode([row for row in self._tuples(query, given) if self._is_live(row)])

    def memory_history(self, session_id: str, memory_type: MemoryTypeLike, key: str) -> list[SessionMemory]:
        """Return all that was stored under a key and is still kept, expired and replaced values included.

        Args:
            session_id: The session that it belongs to.
            memory_type: Which kind of memory it is.
            key: Its name within session and type.

        Returns:
            The memories, latest write first.

        Raises:
            InvalidInputError: If a parameter can't be accepted.
            CorruptDataError: If a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        return self._rows(_HISTORY, _address(session_id, memory_type, key))

    def delete_memory(self, session_id: str, memory_type: MemoryTypeLike, key: str) -> bool:
        """Remove a key with its whole history. Of several calls at once, one does; what is stored meanwhile stays.

        Args:
            session_id: The session that it belongs to.
            memory_type: Which kind of memory it is.
            key: Its name within session and type.

        Returns:
            Whether the key had a value that was not expired.

        Raises:
            InvalidInputError: If a parameter can't be accepted.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            CorruptDataError: If the latest value's time can't be decoded. Nothing is removed.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        address = _address(session_id, memory_type, key)
        with self._block(alone=False):
            found = self._tuples(_LATEST, address)
            was_live = any(map(self._is_live, found))
            # On a server, others may store or delete between the two. What they store since stays, and what they have
            # deleted is theirs.
            latest = found[0][_ID] if found else 0
            deleted: int = self._write(_DELETE, {**address, "latest": latest}).rowcount
        return was_live and deleted > 0

    def _is_live(self, row: Row) -> bool:
        """Whether a row has not expired."""
        if row[_TTL] is None:
            return True
        decoder = self._decoder(_LATEST)
        expires = expiry(decoder.value(row, _TIME), decoder.value(row, _TTL))
        return expires is None or self._clock() < expires

    def _latest_fault(self, row: Row) -> CorruptDataError:
        return self._decoder(_LATEST).first_fault([row])


def _address(session_id: str, memory_type: MemoryTypeLike, key: str) -> dict[str, Any]:
    return {
        "session_id": inputs.text(session_id, field="session_id"),
        "memory_type": inputs.recognise(MemoryType, memory_type, field="memory_type"),
        "key": inputs.text(key, field="key"),
    }


def _validated(as_type: type[T], stored: str) -> T:
    try:
        validated: T = _adapter(cast(Any, as_type)).validate_json(stored)
    except ValidationError as error:
        decode_json(stored)  # What is no JSON at all is the row's fault, not the type's.
        problems = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
        raise InvalidInputError(
            "as_type", as_type, f"a type that the stored value is valid for ({problems})"
        ) from error
    except (PydanticUserError, TypeError) as error:
        raise InvalidInputError("as_type", as_type, f"a type that pydantic can validate ({error})") from error
    return validated


@lru_cache(maxsize=256)
def _adapter(as_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(as_type)
