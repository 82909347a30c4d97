"""How long rows are kept, and removing those that are older: by itself, little by little, or by hand."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, Self, TypeAlias

from sqlalchemy import (
    Column,
    ColumnElement,
    Dialect,
    Executable,
    and_,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    or_,
    select,
)

from moai_flow.memory import inputs
from moai_flow.memory.enums import AgentStatus
from moai_flow.memory.errors import BusyError, CorruptDataError, InvalidInputError, SwarmDBError
from moai_flow.memory.models import (
    AgentEvent,
    AgentMetric,
    Record,
    RegisteredAgent,
    SchemaInfo,
    SessionMemory,
    SwarmMetric,
    TaskMetric,
    expiry,
    rowid_column,
    table_of,
)
from moai_flow.memory.scope import ROWS_A_STEP, Scope
from moai_flow.memory.statements import Statement, insert_for
from moai_flow.memory.types import decode_json, decode_time, encode_iso, is_postgresql, is_unicode

logger = logging.getLogger("moai_flow.memory")

_MONTH = timedelta(days=30)
_DAY, _HOUR, _SECOND = timedelta(days=1), timedelta(hours=1), timedelta(seconds=1)
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True)
class RetentionPolicy:
    """How long rows are kept, by table. None keeps a table's rows for ever.

    Attributes:
        events: The age of events, from their timestamp.
        memory: How long a memory is kept that nobody can get any more, from when it expired or was replaced. What
            `SwarmDB.get_memory` returns is never removed.
        task_metrics: The age of task metrics.
        agent_metrics: The age of agent metrics.
        swarm_metrics: The age of swarm metrics.
        agents: How long an agent stays registered after it has ended. Agents that have not are never removed.

    Raises:
        InvalidInputError: If an age is negative, or neither a `timedelta` nor None.
    """

    events: timedelta | None = _MONTH
    memory: timedelta | None = _MONTH
    task_metrics: timedelta | None = _MONTH
    agent_metrics: timedelta | None = _MONTH
    swarm_metrics: timedelta | None = _MONTH
    agents: timedelta | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            age = getattr(self, field.name)
            if age is not None and not (isinstance(age, timedelta) and age >= timedelta()):
                raise InvalidInputError(field.name, age, "a timedelta of zero or more, or None for ever")

    @classmethod
    def keep_all(cls) -> Self:
        """Return the policy by which nothing is removed."""
        return cls(None, None, None, None, None, None)

    @classmethod
    def of_days(cls, days: int) -> Self:
        """Return the policy by which everything but agents is kept for so many days.

        Raises:
            InvalidInputError: If *days* is negative or no whole number.
        """
        days = inputs.whole(days, field="days")
        age = timedelta(days=days) if days <= timedelta.max.days else None  # Older than time itself.
        return cls(age, age, age, age, age, None)

    @property
    def is_off(self) -> bool:
        """Whether nothing is removed by it."""
        return self == self.keep_all()


#: The ages of a policy.
_Name: TypeAlias = Literal["events", "memory", "task_metrics", "agent_metrics", "swarm_metrics", "agents"]

#: What is cleaned up, in this order.
_MODELS: dict[_Name, type[Record]] = {
    "events": AgentEvent,
    "memory": SessionMemory,
    "task_metrics": TaskMetric,
    "agent_metrics": AgentMetric,
    "swarm_metrics": SwarmMetric,
    "agents": RegisteredAgent,
}
_NAMES = tuple(_MODELS)


@dataclass(frozen=True)
class CleanedTable:
    """What a cleanup removed from one table.

    Attributes:
        table: The table's name.
        rows: How many rows were removed, or with a dry run, would be.
        before: Rows went that ended, expired, were replaced or happened before this moment, in UTC; None if the policy
            keeps the table's rows for ever.
    """

    table: str
    rows: int
    before: datetime | None


@dataclass(frozen=True)
class CleanupReport:
    """What `SwarmDB.cleanup` did.

    Attributes:
        dry_run: Whether nothing was removed, but only counted.
        tables: The tables, each once.
    """

    dry_run: bool
    tables: tuple[CleanedTable, ...]

    @property
    def rows(self) -> int:
        """How many rows were removed from all tables, or with a dry run, would be."""
        return sum(table.rows for table in self.tables)


# What is removed

#: How many rows are removed at a time: as part of somebody's write, and by a cleanup that was asked for. The latter is
#: as fast as one statement for all, and lets other writers in between.
_FEW, _MANY = ROWS_A_STEP, 50_000

#: How many memories are looked at in a search for those that can go.
_LOOKED_AT = 5000

#: A cleanup pauses between two chunks, for this share of the time that the last one took. SQLite has no queue: who
#: waits for the write lock asks for it now and then, and has to find it free.
_PAUSE = 0.03


def _is_old(column: Column[Any]) -> ColumnElement[bool]:
    """Return the condition for times before *cutoff*. What sorts before all times is none, and stays for `check`."""
    return and_(column >= datetime.min.replace(tzinfo=UTC), column < bindparam("cutoff"))


def _oldest(model: type[Record]) -> Statement:
    """Return what deletes the *limit* oldest rows before *cutoff*."""
    table = table_of(model)
    old = _is_old(table.c.timestamp)

    def clause(dialect: Dialect) -> Executable:
        if is_postgresql(dialect):
            place: ColumnElement[Any] = literal_column("ctid")
            oldest = select(place).select_from(table).where(old).order_by(table.c.timestamp).limit(bindparam("limit"))
            return delete(table).where(place == any_(func.array(oldest.scalar_subquery())))
        oldest = select(rowid_column).select_from(table).where(old).order_by(table.c.timestamp)
        return delete(table).where(rowid_column.in_(oldest.limit(bindparam("limit"))))

    return Statement(clause, writes=table)


def _count_oldest(model: type[Record]) -> Statement:
    table = table_of(model)
    return Statement(select(func.count()).select_from(table).where(_is_old(table.c.timestamp)))


_BY_TIME: tuple[_Name, ...] = ("events", "task_metrics", "agent_metrics", "swarm_metrics")
_DELETE_OLDEST = {name: _oldest(_MODELS[name]) for name in _BY_TIME}
_COUNT_OLDEST = {name: _count_oldest(_MODELS[name]) for name in _BY_TIME}

_AGENTS = table_of(RegisteredAgent)


def _last_agent(dialect: Dialect) -> Executable:
    """Return what tells the last id of the next *limit* agents. On SQLite, an id may be no text; those come last."""
    following = select(_AGENTS.c.agent_id).where(_AGENTS.c.agent_id > bindparam("after"))
    if not is_postgresql(dialect):
        following = following.where(_AGENTS.c.agent_id < literal_column("x''"))
    slice_ = following.order_by(_AGENTS.c.agent_id).limit(bindparam("limit")).subquery()
    return select(func.max(slice_.c.agent_id))


_LAST_AGENT = Statement(_last_agent)
_ENDED_BEFORE = and_(
    or_(_AGENTS.c.status == AgentStatus.COMPLETE, _AGENTS.c.status == AgentStatus.ERROR),
    _AGENTS.c.complete_time < bindparam("cutoff"),
)
_IN_SLICE = and_(_AGENTS.c.agent_id > bindparam("after"), _AGENTS.c.agent_id <= bindparam("last"))
_DELETE_AGENTS = Statement(delete(_AGENTS).where(_IN_SLICE, _ENDED_BEFORE), writes=_AGENTS)
_COUNT_AGENTS = Statement(select(func.count()).select_from(_AGENTS).where(_ENDED_BEFORE))

_MEMORY = table_of(SessionMemory)
_NEXT_MEMORIES = (
    select(_MEMORY.c.id).where(_MEMORY.c.id > bindparam("after")).order_by(_MEMORY.c.id).limit(bindparam("limit"))
)
_LAST_MEMORY = Statement(select(func.max(_NEXT_MEMORIES.subquery().c.id)))
_NEWER = _MEMORY.alias()
#: When the next value of the key came, which is one look into an index, however many there are.
_NEXT_TIMESTAMP = (
    select(_NEWER.c.timestamp)
    .where(
        *(_NEWER.c[name] == _MEMORY.c[name] for name in ("session_id", "memory_type", "key")),
        _NEWER.c.id > _MEMORY.c.id,
    )
    .order_by(_NEWER.c.id)
    .limit(1)
)
_WAS_REPLACED = _NEXT_TIMESTAMP.scalar_subquery() < bindparam("cutoff")
#: What may be dead: all that was replaced before the cutoff, and what has expired, which is not for SQL to say.
_MAYBE_DEAD = Statement(
    select(
        _MEMORY.c.id,
        _MEMORY.c.session_id,
        _MEMORY.c.memory_type,
        _MEMORY.c.key,
        _WAS_REPLACED,
        _MEMORY.c.timestamp,
        _MEMORY.c.ttl_hours,
    )
    .where(
        _MEMORY.c.id > bindparam("after"),
        _MEMORY.c.id <= bindparam("last"),
        _MEMORY.c.timestamp < bindparam("cutoff"),
        or_(_MEMORY.c.ttl_hours.is_not(None), _WAS_REPLACED),
    )
    .order_by(_MEMORY.c.id)
    .limit(bindparam("limit"))
)
_DELETE_MEMORY = Statement(
    delete(_MEMORY).where(
        *(_MEMORY.c[name] == bindparam(name) for name in ("session_id", "memory_type", "key")),
        _MEMORY.c.id <= bindparam("last"),
    ),
    writes=_MEMORY,
)


class _DeadMemory(NamedTuple):
    """A memory that nobody can get any more."""

    id: int
    session_id: str
    memory_type: str
    name: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What its value was stored under."""
        return self.session_id, self.memory_type, self.name


class _Place(NamedTuple):
    """How far a cleanup is: in which table, and after which key of it.

    Attributes:
        began: When it began, which is what ages are counted from to its end.
        name: The table.
        after: The last key that was looked at; None before the first, and where rows are found by their time.
    """

    began: datetime
    name: _Name = _NAMES[0]
    after: Any = None

    @property
    def next_table(self) -> "_Place | None":
        """The place behind this table; None behind the last one."""
        following = _NAMES[_NAMES.index(self.name) + 1 :]
        return _Place(self.began, following[0]) if following else None


class _Done(NamedTuple):
    """What one step of a cleanup did.

    Attributes:
        rows: How many rows it removed.
        after: Where in the table to go on; None if the table is done.
    """

    rows: int
    after: Any = None


# Marks

_INFO = table_of(SchemaInfo)
_VERSION, _RETENTION, _LAST_CLEANUP = "version", "retention", "last_cleanup"
_MARKS = Statement(
    select(_INFO.c.key, _INFO.c.value, _INFO.c.updated_at).where(
        or_(_INFO.c.key == _VERSION, _INFO.c.key == _RETENTION, _INFO.c.key == _LAST_CLEANUP)
    )
)


def _upsert_mark(dialect: Dialect) -> Executable:
    mark = insert_for(dialect, _INFO)
    changed = {"value": mark.excluded.value, "updated_at": mark.excluded.updated_at}
    clause: Executable = mark.on_conflict_do_update(index_elements=["key"], set_=changed)
    return clause


MARK = Statement(_upsert_mark, writes=_INFO)

#: Only one process cleans up a server's database at a time: who holds this lock, whose number is SwarmDB's own.
_CLAIM = Statement(select(func.pg_try_advisory_xact_lock(0x53_77_61_72_6D_44_43)))


def _encode_policy(policy: RetentionPolicy) -> str:
    if policy.is_off:
        return "off"
    if policy == RetentionPolicy():
        return "default"
    ages = {name: getattr(policy, name) for name in _NAMES}
    return json.dumps({name: None if age is None else age // _TICK for name, age in ages.items()})


def _decode_policy(text: str) -> RetentionPolicy:
    """Return the policy that a mark says.

    Raises:
        ValueError: If it says none.
    """
    if text == "default":
        return RetentionPolicy()
    if text == "off":
        return RetentionPolicy.keep_all()
    ages = decode_json(text)
    if not isinstance(ages, dict) or set(ages) != set(_NAMES):
        raise ValueError(f"ages of {', '.join(_NAMES)} are expected")
    try:
        return RetentionPolicy(**{name: None if age is None else age * _TICK for name, age in ages.items()})
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _encode_place(place: _Place) -> str:
    return json.dumps({"began": encode_iso(place.began), "table": place.name, "after": place.after})


def _decode_place(text: str) -> _Place | None:
    """Return how far a cleanup is, or None if the mark says that the last one was completed.

    Raises:
        ValueError: If it says no place that a cleanup comes to; so does TypeError.
    """
    if not text.startswith("{"):
        return None
    found = decode_json(text)
    name, after = found.get("table"), found.get("after")
    if name not in _NAMES:
        raise ValueError(f"no table is called {name!r}")
    if name == "memory" and after is not None:
        inputs.whole(after, field="after")
    if name == "agents" and after is not None and not (isinstance(after, str) and is_unicode(after)):
        raise ValueError(f"{after!r} is no agent's id")
    return _Place(decode_time(found.get("began")), name, after)


class _Marks(NamedTuple):
    """What a database says about its retention.

    Attributes:
        policy: How long rows are kept.
        completed: When a cleanup was last completed, or the database was made; None if it doesn't say.
        place: How far a cleanup is that is under way; None if none is.
    """

    policy: RetentionPolicy
    completed: datetime | None
    place: _Place | None

    def due(self, now: datetime) -> "_Place | None":
        """Return where to go on, or None while nothing is to be done.

        A mark from the future was left by a clock that was wrong.
        """
        if self.policy.is_off:
            return None
        if self.place is not None and now - _DAY < self.place.began <= now + _HOUR:
            return self.place
        if self.place is None and self.completed is not None and now - _DAY < self.completed <= now + _DAY:
            return None
        if self.place is not None and self.place.name not in _BY_TIME and self.place.began <= now:
            return self.place._replace(began=now)  # A day was not enough to look at all rows of this table.
        return _Place(now)


class RetentionOperations(Scope):
    """Removing what is older than it need be."""

    @property
    def retention(self) -> RetentionPolicy:
        """How long rows are kept before they are removed by themselves, for whoever uses the database.

        A new database has the default of `RetentionPolicy`. In one that an older program made, everything is kept
        until somebody opens it with ``SwarmDB(..., retention=...)``.

        Raises:
            CorruptDataError: If the database says something that is no policy.
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        text = self._mark_texts().get(_RETENTION, ("off", None))[0]
        try:
            return _decode_policy(text)
        except ValueError as error:
            key = {"key": _RETENTION}
            raise CorruptDataError(
                "schema_info", "value", key, f"holds {text!r}, which is no policy: {error}"
            ) from error

    @property
    def last_cleanup(self) -> datetime | None:
        """When rows were last removed by themselves, to the end, in UTC; None if they never were, or are being now.

        Raises:
            StorageError: If the database can't be read.
            ClosedError: After `close`.
        """
        text = self._mark_texts().get(_LAST_CLEANUP, ("{", None))[0]
        return None if text.startswith("{") else _moment(text)

    def cleanup(
        self, days: int | None = None, *, policy: RetentionPolicy | None = None, dry_run: bool = False
    ) -> CleanupReport:
        """Remove old rows from all tables, now. It changes nothing about what is removed by itself, see `retention`.

        Rows are removed in chunks, each in a transaction of its own, and others write in between; inside the caller's
        transaction, all of it is part of that. Rows that another cleanup is removing at the same time are left to
        that one. The value of a memory that has not expired is never removed, whatever its age, nor is an agent that
        has not ended.

        Args:
            days: Remove what is older than so many days, from every table but the registry.
            policy: Remove what is older than this says.
            dry_run: Remove nothing, and count what would be removed.

        Returns:
            What was removed from which table.

        Raises:
            InvalidInputError: If *days* is negative or no whole number; if both *days* and *policy* are given; or if
                neither is, and the database's own `retention` is off.
            TransactionError: Inside a read-only session, unless it is a dry run.
            BusyError: If another writer keeps the database for longer than the busy timeout. What was removed until
                then stays removed.
            CorruptDataError: If neither is given, and the database's own `retention` is no policy.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        if days is not None:
            if policy is not None:
                raise InvalidInputError("policy", policy, "None, since days says what is old")
            policy = RetentionPolicy.of_days(days)
        elif policy is None:
            policy = self.retention
            if policy.is_off:
                raise InvalidInputError("days", days, "a number of days, or a policy, since this database keeps all")
        elif not isinstance(policy, RetentionPolicy):
            raise InvalidInputError("policy", policy, "a RetentionPolicy")
        remove = self._count_old if dry_run else self._clean
        now = self._clock()
        cleaned = []
        with self._nothing_by_itself():
            for name in _NAMES:
                cutoff = _cutoff(policy, name, now)
                rows = 0 if cutoff is None else remove(name, cutoff)
                cleaned.append(CleanedTable(str(_MODELS[name].__tablename__), rows, cutoff))
        return CleanupReport(dry_run, tuple(cleaned))

    def cleanup_old_events(self, days: int = 30) -> int:
        """Delete events older than *days*, as `cleanup` does.

        Args:
            days: Age in days, counted from now. Zero deletes all that happened before now.

        Returns:
            How many events were deleted.

        Raises:
            InvalidInputError: If *days* is negative or no whole number.
            BusyError: If another writer keeps the database for longer than the busy timeout.
            StorageError: If the database can't be written.
            ClosedError: After `close`.
        """
        cutoff = _cutoff(RetentionPolicy.of_days(days), "events", self._clock())
        with self._nothing_by_itself():
            return 0 if cutoff is None else self._clean("events", cutoff)

    # By hand

    @contextmanager
    def _nothing_by_itself(self) -> Iterator[None]:
        """Put off what a write would remove by itself, so that a report has all."""
        due, self._cleanup_due = self._cleanup_due, self._clock() + _HOUR
        try:
            yield
        finally:
            self._cleanup_due = due

    def _clean(self, name: _Name, cutoff: datetime) -> int:
        """Remove all of a table's old rows, in chunks, and return how many those were."""
        removed, done = 0, _Done(0)
        while True:
            begun = time.monotonic()
            done = self._step(name, cutoff, done.after, _MANY)
            removed += done.rows
            if done.after is None:
                return removed
            if self._own_block() is None:
                time.sleep((time.monotonic() - begun) * _PAUSE)

    def _count_old(self, name: _Name, cutoff: datetime) -> int:
        if name == "memory":
            return sum(len(dead) for dead, _ in self._dead_memories(cutoff, 0, _MANY))
        statement = _COUNT_AGENTS if name == "agents" else _COUNT_OLDEST[name]
        ((rows,),) = self._tuples(statement, {"cutoff": _bound(name, cutoff)})
        return int(rows)

    # In steps

    def _step(self, name: _Name, cutoff: datetime, after: Any, limit: int) -> _Done:
        """Remove at most *limit* of a table's old rows, from a place in it on."""
        if name == "memory":
            for dead, last in self._dead_memories(cutoff, after or 0, limit):
                return _Done(self._delete_memories(dead), last)
            return _Done(0)
        if name == "agents":
            ((last,),) = self._tuples(_LAST_AGENT, {"after": after or "", "limit": limit})
            if last is None:
                return _Done(0)
            bounds = {"after": after or "", "last": last, "cutoff": _bound(name, cutoff)}
            return _Done(self._write(_DELETE_AGENTS, bounds).rowcount, last)
        rows: int = self._write(_DELETE_OLDEST[name], {"cutoff": cutoff, "limit": limit}).rowcount
        # On a server, others may remove some of the same rows: a chunk that is not full need not be the last one.
        goes_on = rows > 0 if self._location.is_on_server else rows == limit
        return _Done(rows, 0 if goes_on else None)

    def _dead_memories(self, cutoff: datetime, after: int, limit: int) -> Iterator[tuple[list[_DeadMemory], int]]:
        """Yield, slice by slice, what nobody has been able to get since before *cutoff*, and the slice's last id."""
        while True:
            ((last,),) = self._tuples(_LAST_MEMORY, {"after": after, "limit": max(limit, _LOOKED_AT)})
            if last is None:
                return
            bounds = {"after": after, "last": last, "cutoff": cutoff, "limit": limit}
            candidates = self._tuples(_MAYBE_DEAD, bounds)
            if len(candidates) == limit:
                last = candidates[-1][0]
            yield [_DeadMemory(*row[:4]) for row in candidates if row[4] or _has_expired(row[5], row[6], cutoff)], last
            after = last

    def _delete_memories(self, dead: list[_DeadMemory]) -> int:
        """Delete memories, each with all that were stored before it under its key, which would come back otherwise."""
        latest = {memory.key: memory for memory in dead}  # They come in the order of their ids.
        removed = 0
        if not latest:
            return 0
        with self._block(alone=False):
            for memory in latest.values():
                session_id, memory_type, key = memory.key
                values = {"session_id": session_id, "memory_type": memory_type, "key": key, "last": memory.id}
                removed += self._write(_DELETE_MEMORY, values).rowcount
        return removed

    # By itself

    def _clean_if_due(self) -> None:
        """Remove a few old rows if it is time to; at once or not at all, since somebody's write waits for it."""
        now = self._clock()
        # Other threads, and what is written here, need not look as well.
        self._cleanup_seen, self._cleanup_due = now, now + _HOUR
        try:
            self._cleanup_due = self._clean_few(now)
        except BusyError:
            self._cleanup_due = now + _SECOND  # Whoever keeps us waiting writes too, and may do it.
        except SwarmDBError as error:
            # The write that this is part of may well succeed, and an hour later this may, too.
            logger.warning("%s: old rows can't be removed: %s", self._location, error)

    def _clean_few(self, now: datetime) -> datetime:
        """Do a step, and return when to look again."""
        marks = self._marks()
        if marks.due(now) is None:
            return _next_look(marks, now)
        with self._block(alone=False, patient=False):
            if self._location.is_on_server and self._tuples(_CLAIM, {}) == [(False,)]:
                return now + _SECOND
            marks = self._marks()
            place = marks.due(now)
            if place is None:
                return _next_look(marks, now)  # Another process has done it since.
            left = _FEW
            while place is not None and left > 0:
                cutoff = _cutoff(marks.policy, place.name, min(place.began, now))  # Another's clock may be ahead.
                done = _Done(0) if cutoff is None else self._step(place.name, cutoff, place.after, left)
                left -= max(done.rows, 0 if done.after is None else _FEW // 4)  # Looking costs time as well.
                place = place.next_table if done.after is None else place._replace(after=done.after)
            value = encode_iso(now) if place is None else _encode_place(place)
            self._write(MARK, {"key": _LAST_CLEANUP, "value": value, "updated_at": now})
        return now if place is not None else now + _HOUR

    def _marks(self) -> _Marks:
        texts = self._mark_texts()
        try:
            policy = _decode_policy(texts[_RETENTION][0])
        except (KeyError, ValueError):
            policy = RetentionPolicy.keep_all()  # Where it is not clear what may go, nothing goes.
        try:
            value, _ = texts[_LAST_CLEANUP]
            place = _decode_place(value)
            completed = _moment(value) if place is None else None
        except KeyError:
            place, completed = None, _moment(texts.get(_VERSION, ("", None))[1])
        except (ValueError, TypeError):
            place, completed = None, None
        return _Marks(policy, completed, place)

    def _mark_texts(self) -> Mapping[str, tuple[str, Any]]:
        # On SQLite, what is no text may stand there, and says nothing.
        return {key: (str(value), updated_at) for key, value, updated_at in self._tuples(_MARKS, {})}

    def _set_retention(self, policy: RetentionPolicy) -> None:
        """Have the database keep rows for as long as *policy* says; nothing is written if it does already."""
        text = _encode_policy(policy)
        if self._mark_texts().get(_RETENTION, ("off", None))[0] != text:
            with self._nothing_by_itself():  # By the policy that ends here.
                self._write(MARK, {"key": _RETENTION, "value": text, "updated_at": self._clock()})


def _next_look(marks: _Marks, now: datetime) -> datetime:
    """Return when to look again: when the day is over, but somebody may change the policy before."""
    if marks.completed is None or marks.policy.is_off:
        return now + _HOUR
    return min(marks.completed + _DAY, now + _HOUR)


def _cutoff(policy: RetentionPolicy, name: _Name, now: datetime) -> datetime | None:
    """Return before which moment a table's rows are old; None for never."""
    age: timedelta | None = getattr(policy, name)
    try:
        return None if age is None else now - age
    except OverflowError:
        return None  # Older than time itself.


def _bound(name: _Name, cutoff: datetime) -> Any:
    """Return a cutoff as the table's own times are: those of agents are numbers."""
    return cutoff.timestamp() if name == "agents" else cutoff


def _has_expired(timestamp: Any, ttl_hours: Any, cutoff: datetime) -> bool:
    """Whether a memory has expired before *cutoff*. One whose time can't be read stays, for `check` to name."""
    moment = _moment(timestamp)
    if moment is None or type(ttl_hours) is not int:
        return False
    expires = expiry(moment, ttl_hours)
    return expires is not None and expires < cutoff


def _moment(stored: Any) -> datetime | None:
    """Return a time as a row holds it, in UTC; None if it is none."""
    if isinstance(stored, datetime):
        return stored.astimezone(UTC)
    try:
        return decode_time(stored)
    except (ValueError, TypeError):
        return None
