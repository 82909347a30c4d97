"""Agent lifecycle events: an append-only log."""

from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import bindparam, func, or_, select, type_coerce
from sqlmodel import col

from moai_flow.memory import inputs
from moai_flow.memory.enums import EventType, EventTypeLike
from moai_flow.memory.errors import InvalidInputError
from moai_flow.memory.inputs import EventData
from moai_flow.memory.models import AgentEvent, EventCursor, new_id, table_of, unsearched
from moai_flow.memory.scope import Scope
from moai_flow.memory.statements import Insert, Query, Statement
from moai_flow.memory.types import AsStored

_EVENTS = table_of(AgentEvent)
_ID, _TIME = (list(_EVENTS.columns.keys()).index(name) for name in ("id", "timestamp"))

#: How many events of a page are objects at a time: with more, most time goes to the cycle collector.
_DECODED_AT_ONCE = 100

NEWEST_FIRST = (col(AgentEvent.timestamp).desc(), col(AgentEvent.id).desc())
OLDEST_FIRST = (col(AgentEvent.timestamp), col(AgentEvent.id))

_INSERT = Insert(
    _EVENTS,
    ("event_id", "event_type", "agent_id", "agent_type", "timestamp", "metadata", "created_at"),
)
_LAST_ID = Statement(select(func.max(_EVENTS.c.id)))


def _matching(names: frozenset[str]) -> list[Any]:
    """Return the conditions for the filters in *names*."""
    event_type, timestamp = _EVENTS.c.event_type, _EVENTS.c.timestamp
    conditions = {
        "agent_id": _EVENTS.c.agent_id == bindparam("agent_id"),
        # An agent has fewer events than a type has.
        "event_type": (unsearched(event_type) if "agent_id" in names else event_type) == bindparam("event_type"),
        "since": timestamp >= bindparam("since"),
        # A page's own bound is the tighter one.
        "until": (unsearched(timestamp) if "before_time" in names else timestamp) < bindparam("until"),
    }
    return [condition for name, condition in conditions.items() if name in names]


@cache
def _newest(names: frozenset[str]) -> Query[AgentEvent]:
    recent = select(_EVENTS).where(*_matching(names)).order_by(*NEWEST_FIRST).limit(bindparam("limit"))
    if "before_time" in names:
        # The event's own text, while it is there: a row of another program may be out of place by its own time.
        itself = _EVENTS.alias()
        stored = select(itself.c.timestamp).where(itself.c.id == bindparam("before_id")).scalar_subquery()
        before = func.coalesce(stored, bindparam("before_time", type_=_EVENTS.c.timestamp.type))
        recent = recent.where(
            _EVENTS.c.timestamp <= before,
            or_(_EVENTS.c.timestamp < before, _EVENTS.c.id < bindparam("before_id")),
        )
    return Query(AgentEvent, recent)


@cache
def _page(names: frozenset[str]) -> Query[AgentEvent]:
    page = select(_EVENTS).where(*_matching(names), unsearched(_EVENTS.c.id) <= bindparam("last_id"))
    # As it is stored: a row of another program may be out of place by its own time, and would be met for ever.
    stored = type_coerce(_EVENTS.c.timestamp, AsStored)
    if "after_time" in names:
        page = page.where(
            stored >= bindparam("after_time"),
            or_(stored > bindparam("after_time"), _EVENTS.c.id > bindparam("after_id")),
        )
    return Query(AgentEvent, page.order_by(*OLDEST_FIRST).limit(bindparam("limit")))


class EventOperations(Scope):
    """Writing and reading the event log."""

    def insert_event(self, event_data: EventData | AgentEvent, event_id: str | None = None) -> str:
        """Append one event.

        Args:
            event_data: The event: ``event_type``, ``agent_id`` and ``agent_type``, with ``timestamp`` (default: now)
                and ``metadata`` (a JSON object) if wanted. An `AgentEvent` that isn't stored yet does as well.
            event_id: Its id, unique in the database. Default: a new UUID of version 7.

        Returns:
            The event's id.

        Raises:
            InvalidInputError: If a key is missing or unknown, or a value can't be accepted.
            ConflictError: If an event with this id exists.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        row = self._event_row(event_data, event_id)
        self._write(_INSERT, row)
        inserted: str = row["event_id"]
        return inserted

    def insert_events(self, events: Iterable[EventData | AgentEvent]) -> list[str]:
        """Append many events in one transaction: all of them, or none.

        Args:
            events: What `insert_event` takes, any number of times. Each gets a new id; an `AgentEvent` keeps its own.

        Returns:
            The events' ids, in the order given.

        Raises:
            InvalidInputError: As `insert_event`; the field begins with the event's index: ``events[3].timestamp``.
            ConflictError: If an event with one of the ids exists.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        if isinstance(events, dict | AgentEvent) or not isinstance(events, Iterable):
            raise InvalidInputError("events", events, "a list, or another iterable, of events")
        program = self._programs[_INSERT]
        ids: list[str] = []
        bound = []
        for event in events:
            try:
                row = self._event_row(event, None)
                bound.append(program.bind(row))
            except InvalidInputError as error:
                raise error.within(f"events[{len(ids)}]") from None
            ids.append(row["event_id"])
        self._write_many(program, bound)
        return ids

    def get_events(
        self,
        agent_id: str | None = None,
        event_type: EventTypeLike | None = None,
        limit: int = 100,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        before: AgentEvent | EventCursor | None = None,
    ) -> list[AgentEvent]:
        """Return events, newest first; of two at the same time, the one that was inserted later comes first.

        Args:
            agent_id: Only events of this agent.
            event_type: Only events of this type.
            limit: How many at most; 0 returns none.
            since: Only events at or after this time. Naive ones are local time.
            until: Only events before this time.
            before: Continue after this event, the last one of the page before. Its `cursor` does as well, and may be
                kept anywhere.

        Returns:
            The events, at most *limit*.

        Raises:
            InvalidInputError: If a filter can't be accepted, or *limit* is negative.
            CorruptDataError: If a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        filters = _filters(agent_id, event_type, since, until)
        if before is not None:
            filters["before_time"], filters["before_id"] = _position(before)
        bounded = {**filters, "limit": inputs.whole(limit, field="limit")}
        return self._rows(_newest(frozenset(filters)), bounded)

    def iter_events(
        self,
        agent_id: str | None = None,
        event_type: EventTypeLike | None = None,
        *,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        batch_size: int = 1000,
    ) -> Iterator[AgentEvent]:
        """Iterate over events, oldest first, in constant memory.

        They are read in batches, and no connection is held between two of them, so it may take as long as it likes.
        Events that are inserted after the iteration began are not part of it.

        Args:
            agent_id: Only events of this agent.
            event_type: Only events of this type.
            since: Only events at or after this time. Naive ones are local time.
            until: Only events before this time.
            batch_size: How many events are read at once.

        Returns:
            An iterator over the events.

        Raises:
            InvalidInputError: If a filter can't be accepted, or *batch_size* is less than 1.
            CorruptDataError: While iterating, if a stored value can't be decoded.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        filters = _filters(agent_id, event_type, since, until)
        filters["limit"] = inputs.whole(batch_size, field="batch_size", least=1)
        ((last_id,),) = self._tuples(_LAST_ID, {})
        return self._pages({**filters, "last_id": last_id or 0})

    def _pages(self, values: dict[str, Any]) -> Iterator[AgentEvent]:
        while rows := self._tuples(query := _page(frozenset(values)), values):
            for begin in range(0, len(rows), _DECODED_AT_ONCE):
                yield from self._decoder(query).decode(rows[begin : begin + _DECODED_AT_ONCE])
            if len(rows) < values["limit"]:
                return
            values["after_time"], values["after_id"] = rows[-1][_TIME], rows[-1][_ID]
            values.pop("since", None)  # All that comes after is; as a second lower bound it would be searched by.

    def _append_event(
        self, event_type: EventType, agent_id: str, agent_type: str, timestamp: datetime, metadata: dict[str, Any]
    ) -> None:
        """Append an event about an agent of the registry, whose values need no check, however they came there."""
        row = {"event_id": new_id(), "event_type": event_type, "agent_id": agent_id, "agent_type": agent_type}
        self._write(_INSERT, {**row, "timestamp": timestamp, "metadata": metadata, "created_at": timestamp})

    def _event_row(self, event: EventData | AgentEvent, event_id: str | None) -> dict[str, Any]:
        if isinstance(event, AgentEvent):
            given: dict[str, Any] = {
                "event_type": event.event_type,
                "agent_id": event.agent_id,
                "agent_type": event.agent_type,
                "timestamp": event.timestamp,
                "metadata": event.metadata_,
            }
            event_id = event.event_id if event_id is None else event_id
        elif isinstance(event, dict):
            given = inputs.entries(dict(event), EventData)
        else:
            raise InvalidInputError("event_data", event, "a dict (EventData) or an AgentEvent")
        now = self._clock()
        timestamp = given.get("timestamp")
        return {
            "event_id": new_id() if event_id is None else inputs.text(event_id, field="event_id"),
            "event_type": inputs.parse(EventType, given["event_type"], field="event_type"),
            "agent_id": inputs.text(given["agent_id"], field="agent_id"),
            "agent_type": inputs.text(given["agent_type"], field="agent_type"),
            "timestamp": now if timestamp is None else inputs.moment(timestamp, field="timestamp"),
            "metadata": inputs.json_object(given.get("metadata"), field="metadata"),
            "created_at": now,
        }


def _filters(
    agent_id: str | None,
    event_type: EventTypeLike | None,
    since: datetime | str | None,
    until: datetime | str | None,
) -> dict[str, Any]:
    filters = {
        "agent_id": inputs.text_filter(agent_id, field="agent_id"),
        "event_type": inputs.recognise_filter(EventType, event_type, field="event_type"),
        "since": inputs.moment_filter(since, field="since"),
        "until": inputs.moment_filter(until, field="until"),
    }
    return {name: value for name, value in filters.items() if value is not None}


def _position(before: AgentEvent | EventCursor) -> tuple[datetime, int]:
    try:
        cursor = before.cursor if isinstance(before, AgentEvent) else EventCursor(*before)
    except (TypeError, ValueError):
        raise InvalidInputError("before", before, "an event that was read from this database, or its cursor") from None
    return inputs.moment(cursor.timestamp, field="before"), inputs.whole(cursor.id, field="before")
