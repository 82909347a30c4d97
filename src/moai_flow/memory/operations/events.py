"""Agent lifecycle events: an append-only log."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import JSON, Dialect, Executable, Text, bindparam, cast, false, func, or_, select, text, type_coerce
from sqlmodel import col

from moai_flow.memory import inputs
from moai_flow.memory.enums import EventType, EventTypeLike
from moai_flow.memory.errors import CorruptDataError, InvalidInputError, StorageError, TransactionError
from moai_flow.memory.inputs import EventData
from moai_flow.memory.models import AgentEvent, EventCursor, new_id, table_of, unsearched
from moai_flow.memory.scope import Scope
from moai_flow.memory.statements import Insert, Query, Statement
from moai_flow.memory.types import AsStored, is_postgresql

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


# Watching

#: How long a watcher may sleep between two polls, in seconds, and for how long it first waits for a writer.
_LONGEST_POLL = 3600
_FIRST_LOOK = 0.005


def _among(column: Any, name: str, dialect: Dialect) -> Any:
    """Return the condition that *column* holds one of the texts of a JSON array: one statement, however many.

    Inside a function it is no condition to search by, nor to join by: the log is read from the cursor on.
    """
    given = bindparam(name, type_=Text)
    rows = func.json_array_elements_text(cast(given, JSON)) if is_postgresql(dialect) else func.json_each(given)
    return func.coalesce(column.in_(select(rows.table_valued("value").c.value)), false())


@cache
def _after(names: frozenset[str]) -> Query[AgentEvent]:
    def clause(dialect: Dialect) -> Executable:
        number, agent_id = _EVENTS.c.id, _EVENTS.c.agent_id
        page = select(_EVENTS).where(number > bindparam("position"), number <= bindparam("until"))
        if "types" in names:
            page = page.where(_among(_EVENTS.c.event_type, "types", dialect))
        if "agent_ids" in names:
            page = page.where(_among(agent_id, "agent_ids", dialect))
        if "exclude_agent" in names:
            page = page.where(agent_id != bindparam("exclude_agent"))
        return page.order_by(number).limit(bindparam("limit"))

    return Query(AgentEvent, clause)


# An INSERT takes this lock before it draws a number, and keeps it to the end of its transaction, or of the savepoint
# that undoes it. One that holds a stronger lock takes it as well. Prepared transactions have no process.
_WRITERS = Statement(
    text("""
    SELECT pg_is_in_recovery(), ARRAY(
        SELECT DISTINCT virtualtransaction FROM pg_locks
        WHERE locktype = 'relation' AND relation = to_regclass('agent_events') AND mode = 'RowExclusiveLock' AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    )
    """)
)
#: How the name of a prepared transaction begins there, after a restart.
_PREPARED = "-1/"


class _Watch(NamedTuple):
    """What a watcher looks for.

    Attributes:
        query: What reads a page of it.
        filters: The values of that query's filters.
        poll: How long to wait where there is nothing new, in seconds.
    """

    query: Query[AgentEvent]
    filters: dict[str, Any]
    poll: float


class _Place(NamedTuple):
    """How far a watcher has come.

    Attributes:
        position: The id up to which it has read.
        settled: The id up to which no more events can appear.
        awaited: The id that is settled next, when *writers* have ended.
        writers: The transactions that may still bring events up to there.
        pause: How long to wait before the next poll, in seconds.
    """

    position: int
    settled: int
    awaited: int = 0
    writers: frozenset[str] = frozenset()
    pause: float = 0


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
        return self._pages({**filters, "last_id": self._last_id()})

    def watch_events(
        self,
        after: int | AgentEvent | None = None,
        *,
        types: Iterable[EventTypeLike] | EventTypeLike | None = None,
        agent_ids: Iterable[str] | str | None = None,
        exclude_agent: str | None = None,
        poll: float = 0.5,
    ) -> Iterator[AgentEvent]:
        """Iterate over new events as they are committed, by any thread or process, in the order of their ids.

        None is missed, and none comes twice. The id of the last event is the cursor: kept anywhere, and given as
        *after*, it lets another watcher go on where this one was. The iteration never ends by itself. Between two
        polls it sleeps, and holds neither a connection nor a transaction.

        An event comes at the first poll after its commit; on PostgreSQL, once every transaction has ended that was
        writing events when it was committed. One that is deleted before it is read does not come.

        Args:
            after: Begin after the event with this id; 0 is the beginning of the log. An event that a watcher of this
                database gave does as well. Default: begin with what is inserted after this call.
            types: Only events of this type, or of one of these. An empty collection is refused.
            agent_ids: Only events of this agent, or of one of these. An empty collection is refused.
            exclude_agent: No events of this agent, such as the one that watches.
            poll: How long to sleep when there is nothing new, in seconds, up to an hour.

        Returns:
            An iterator over the events. One that has raised an error is over: go on with another.

        Raises:
            InvalidInputError: If a parameter can't be accepted.
            TransactionError: At the call or while iterating, inside a transaction of this thread and task, which
                would show what may be rolled back, or hide what is new; or while this thread's `_get_connection` has
                one open.
            CorruptDataError: While iterating, if a stored value can't be decoded, after all events before that one;
                ``error.row["id"]`` is the cursor to go on after it.
            BusyError: While iterating, if others keep a database in memory, or all connections of the pool, for longer
                than the busy timeout, or another asyncio task of this thread has a transaction open.
            StorageError: If the database can't be read, or is a standby, which does not know who is writing.
            ClosedError: After `close`, at the next poll.
        """
        return self._watching(*self._watch(after, types, agent_ids, exclude_agent, poll))

    def _watch(
        self,
        after: int | AgentEvent | None,
        types: Iterable[EventTypeLike] | EventTypeLike | None,
        agent_ids: Iterable[str] | str | None,
        exclude_agent: str | None,
        poll: float,
    ) -> "tuple[_Watch, _Place]":
        """Return what to watch, and where to begin; the parameters are those of `watch_events`."""
        filters = {
            "types": _as_array(inputs.recognise_filters(EventType, types, field="types")),
            "agent_ids": _as_array(inputs.text_filters(agent_ids, field="agent_ids")),
            "exclude_agent": inputs.text_filter(exclude_agent, field="exclude_agent"),
        }
        given = {name: value for name, value in filters.items() if value is not None}
        poll = inputs.number(poll, field="poll")
        if not 0 < poll <= _LONGEST_POLL:
            raise InvalidInputError("poll", poll, f"seconds, more than 0 and up to {_LONGEST_POLL}")
        position = None if after is None else _id_of(after)
        self._connections.check_open()
        self._refuse_to_watch()
        if self._location.is_on_server:
            self._writers()  # Where they can't be known, that is said at once.
        if position is None:
            position = self._last_id()
        return _Watch(_after(frozenset(given)), given, poll), _Place(position, position)

    def _watching(self, watch: _Watch, place: _Place) -> Iterator[AgentEvent]:
        while True:
            events, place = self._poll(watch, place)
            for event in events:
                yield event
                self._refuse_to_watch()
            if place.pause:
                time.sleep(place.pause)

    def _poll(self, watch: _Watch, place: _Place) -> tuple[list[AgentEvent], _Place]:
        """Return the next events after *place*, at most a page of them, and the place after these."""
        self._refuse_to_watch()
        if place.position == place.settled:
            place = self._advance(watch, place)
            if place.pause:
                return [], place
        until = place.settled
        values = {**watch.filters, "position": place.position, "limit": _DECODED_AT_ONCE}
        try:
            events = self._rows(watch.query, {**values, "until": until})
        except CorruptDataError as error:
            until = error.row["id"] - 1  # What comes before it comes first; the next poll meets it again.
            events = self._rows(watch.query, {**values, "until": until})
            if not events:
                raise
        last = events[-1].id if len(events) == _DECODED_AT_ONCE else until
        assert last is not None
        return events, place._replace(position=last)

    def _advance(self, watch: _Watch, place: _Place) -> _Place:
        """Return *place* with a later id settled, or with a pause if there is none yet.

        SQLite has one writer at a time, and gives ids in the order of commits. On PostgreSQL a transaction may commit
        an id that is lower than one that is visible already. But if id H is visible, every lower one has been drawn, by
        a transaction that had its lock by then. So, of all that may bring an id up to H, each is among those that hold
        the lock now, or has ended; what that one committed is visible to the statements that follow, since locks are
        released later. Once those that hold it now have ended, H is settled: whoever takes it later draws higher ids.
        """
        if place.writers:
            # One that was prepared for a two-phase commit has another name once the server has been restarted.
            writers = frozenset(name for name in self._writers() if name in place.writers or name.startswith(_PREPARED))
            if writers:
                return place._replace(writers=writers, pause=min(place.pause * 2, watch.poll))
            return place._replace(settled=place.awaited, writers=writers, pause=0)
        last = self._last_id()
        if last <= place.position:
            return place._replace(pause=watch.poll)
        if self._location.is_on_server and (writers := self._writers()):
            return place._replace(awaited=last, writers=writers, pause=min(_FIRST_LOOK, watch.poll))
        return place._replace(settled=last, pause=0)

    def _writers(self) -> frozenset[str]:
        """Return the transactions on the server that have written events, or are about to."""
        ((is_standby, writers),) = self._tuples(_WRITERS, {})
        if is_standby:
            raise StorageError(
                f"{self._location}: events can't be watched on a standby, which does not know who is writing on the "
                "primary: watch them there"
            )
        return frozenset(writers)

    def _refuse_to_watch(self) -> None:
        """Raise where watching would read inside a transaction, or wait for what this very thread has to end."""
        local = self._connections.local
        if not (local.blocks or local.pinned):
            return
        if self._own_block() is not None:
            raise TransactionError(
                "events can't be watched inside a transaction, which would show what may be rolled back, or hide what "
                "is new: call watch_events(), and take its events, outside of it"
            )
        self._refuse_to_wait()

    def _last_id(self) -> int:
        ((last_id,),) = self._tuples(_LAST_ID, {})
        return last_id or 0

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


def _id_of(event: int | AgentEvent) -> int:
    number = event.id if isinstance(event, AgentEvent) else event
    if number is None:
        raise InvalidInputError("after", event, "an event that was read from this database, or its id")
    return inputs.whole(number, field="after")


def _as_array(words: Sequence[str] | None) -> str | None:
    return None if words is None else json.dumps(words)
