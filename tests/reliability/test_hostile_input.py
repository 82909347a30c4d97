"""Whatever is passed in is stored exactly or refused clearly, and whatever a file holds is read or named.

MOAI_TEST_EXAMPLES is how many examples each test takes: 100 by default; with 3000 it takes about an hour.
"""

import copy
import dataclasses
import math
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from conftest import Clock
from moai_flow.memory import (
    AgentNotFoundError,
    ConflictError,
    CorruptDataError,
    InvalidInputError,
    RetentionPolicy,
    SchemaError,
    SwarmDB,
)
from moai_flow.memory.models import TABLES, columns
from postgres import Server
from reliability.calls import CALLS, WAITS

EXAMPLES = int(os.environ.get("MOAI_TEST_EXAMPLES", "100"))
USUAL = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)

NUL, LONE, RTL, BOM = "a\0b", "lone\ud800", "\u202etxt.exe\u202c", "\ufeff"
STRANGE = ["", " ", NUL, LONE, RTL, BOM, "'; DROP TABLE agent_events; --", "%", "_", "\\", "?", ":x", "%s", "%(x)s",
           "{0}", "$1", "é", "e\u0301", "ﬀ", "\U0010ffff", "\r\n", "\x1b[2J", "NULL", "x" * 5000]  # fmt: skip
TEXTS = st.sampled_from(STRANGE) | st.text(st.characters(exclude_categories=()), max_size=20)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**400]),
    st.floats(),
    st.sampled_from([1.7e308, 5e-324, -0.0, math.inf, -math.inf, math.nan]),
)
MOMENTS = st.one_of(
    st.datetimes(timezones=st.none() | st.just(UTC) | st.timezones()),
    st.sampled_from([datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]),
    st.sampled_from([datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59)]),  # noqa: DTZ001 (local time is one of the cases)
    st.sampled_from(
        ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-14:00", "2025-02-30", "24:00", "soon", ""]
    ),
)
SPANS = st.timedeltas() | st.sampled_from([timedelta.min, timedelta(0), timedelta(microseconds=1), timedelta.max])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
#: Of no type that is asked for.
WRONG = st.sampled_from([b"bytes", object(), {1, 2}, 1 + 2j, [[]], (), Ellipsis, type, lambda: 0])
WORDS = st.sampled_from(["spawn", "complete", "error", "running", "semantic", "success", "duration", "health", "p95"])
ANYTHING = st.one_of(JSON, TEXTS, NUMBERS, MOMENTS, SPANS, WORDS, WRONG, st.dictionaries(TEXTS, WRONG, max_size=2))
LITTLE = st.sampled_from([0, 1, 5])


@pytest.fixture(scope="module")
def store() -> Iterator[SwarmDB]:
    """One store for all examples of this module."""
    with SwarmDB(":memory:") as db:
        yield db


# Every method, whatever is passed

#: Methods by name, and what each takes.
METHODS: dict[str, list[str]] = {
    "insert_event": ["event_data", "event_id"],
    "insert_events": ["events"],
    "get_events": ["agent_id", "event_type", "limit", "since", "until", "before"],
    "iter_events": ["agent_id", "event_type", "since", "until", "batch_size"],
    "watch_events": ["after", "types", "agent_ids", "exclude_agent"],
    "register_agent": ["agent_id", "agent_type", "status", "metadata"],
    "update_agent_status": ["agent_id", "status", "duration_ms"],
    "heartbeat": ["agent_id"],
    "find_stale_agents": ["older_than"],
    "mark_stale_agents": ["older_than", "reason"],
    "get_agent": ["agent_id"],
    "list_agents": ["status"],
    "delete_agent": ["agent_id"],
    "track_agent": ["agent_id", "agent_type", "metadata"],
    "track_task": ["task_id", "agent_id"],
    "store_memory": ["session_id", "memory_type", "key", "value", "ttl_hours"],
    "get_memory": ["session_id", "memory_type", "key"],
    "list_memories": ["session_id", "memory_type", "prefix"],
    "memory_history": ["session_id", "memory_type", "key"],
    "delete_memory": ["session_id", "memory_type", "key"],
    "store_task_metric": ["task_id", "agent_id", "duration_ms", "result", "tokens_used", "files_changed", "timestamp"],
    "store_task_metrics": ["metrics"],
    "store_agent_metric": ["agent_id", "metric_type", "value", "metadata", "timestamp"],
    "store_agent_metrics": ["metrics"],
    "store_swarm_metric": ["swarm_id", "metric_type", "value", "metadata", "timestamp"],
    "store_swarm_metrics": ["metrics"],
    "get_task_metrics": ["task_id", "agent_id", "result", "since", "until", "limit"],
    "get_agent_metrics": ["agent_id", "metric_type", "since", "until", "limit"],
    "get_swarm_metrics": ["swarm_id", "metric_type", "since", "until", "limit"],
    "summarize_tasks": ["agent_id", "since", "until"],
    "summarize_agents": ["since", "until", "order_by", "descending", "limit"],
    "summarize_swarm": ["swarm_id", "since", "until"],
    "metric_series": ["metric", "bucket", "agg", "of", "since", "until"],
    "cleanup": ["days", "policy"],
    "cleanup_old_events": ["days"],
}
_NOTHING_TAKEN = {
    "close", "db_path", "schema_version", "size_bytes", "vacuum", "retention", "last_cleanup", "get_active_agents",
    "check", "transaction", "session",  # They take words that Python itself tells apart.
    "backup",  # It takes a path, as the tests of opening and of backup do.
}  # fmt: skip
_FITTING: dict[str, st.SearchStrategy[Any]] = {
    "memory_type": st.just("semantic"), "event_type": st.just("spawn"), "status": st.just("running"),
    "result": st.just("success"), "value": st.just(1.0), "limit": st.just(3), "agent_id": st.just("a"),
    "agent_type": st.just("t"), "task_id": st.just("task"),
    "duration_ms": st.just(5), "session_id": st.just("s"), "key": st.just("k"),
    "swarm_id": st.just("s"), "older_than": st.just(timedelta(hours=1)), "bucket": st.just(timedelta(days=1)),
    "metric": st.just("duration_ms"), "agg": st.just("mean"), "metric_type": st.just("duration"),
    "event_data": st.fixed_dictionaries(
        {"event_type": st.just("spawn"), "agent_id": TEXTS, "agent_type": TEXTS},
        optional={"timestamp": MOMENTS, "metadata": ANYTHING},
    ),
    "events": st.lists(
        st.fixed_dictionaries({"event_type": st.just("spawn"), "agent_id": TEXTS, "agent_type": ANYTHING}), max_size=3
    ),
    "metrics": st.lists(
        st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("task_id", "agent_id", "result", "metric_type", "value", "other"), ANYTHING)
        ),
        max_size=3,
    ),
}  # fmt: skip


def test_every_method_that_takes_something_is_tried() -> None:
    assert METHODS.keys() | _NOTHING_TAKEN == {name.split()[0] for name in CALLS} | {"close", "db_path"}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_passed_is_taken_or_refused_as_bad_input(store: SwarmDB, name: str) -> None:
    names = METHODS[name]

    @settings(USUAL, max_examples=max(10, EXAMPLES // 4))
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        hostile = data.draw(st.sampled_from(names), label="hostile")
        arguments = {}
        for argument in names:
            if argument == hostile:
                arguments[argument] = data.draw(ANYTHING | _FITTING.get(argument, ANYTHING), label=argument)
            elif argument in _FITTING:
                arguments[argument] = data.draw(_FITTING[argument], label=argument)
        before = copy.copy(arguments)
        try:
            answer = getattr(store, name)(**arguments)
            if name in ("iter_events",):
                list(answer)
            elif name.startswith("track_"):
                with answer:
                    pass
        except (InvalidInputError, ConflictError, AgentNotFoundError):
            pass
        assert arguments.keys() == before.keys()

    attempt()
    assert store.check().ok


# Stored exactly


def storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


@pytest.fixture(scope="module", params=["memory", "postgresql"])
def keeper(request: pytest.FixtureRequest) -> Iterator[SwarmDB]:
    """One store of each kind for all examples of this module."""
    with ExitStack() as stack:
        url = "sqlite://"
        if request.param == "postgresql":
            server: Server = request.getfixturevalue("postgres_server")
            url = server.create_database()
            stack.callback(server.drop_database, url)
        yield stack.enter_context(SwarmDB(url=url))


@USUAL
@example("x" * 10_000_000)
@given(TEXTS)
def test_text_comes_back_equal_or_is_refused(keeper: SwarmDB, text: str) -> None:
    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except InvalidInputError:
            return InvalidInputError

    good = storable(text)
    name = text[:500]  # An index of PostgreSQL holds no more than 2,700 bytes.
    stored = attempt(lambda: keeper.store_memory("s", "semantic", "k", text))
    assert (stored is not InvalidInputError) == good
    registered = attempt(lambda: keeper.register_agent(name or "empty", "t", metadata={"text": text, name: 1}))
    assert (registered is not InvalidInputError) == good
    if good:
        assert keeper.get_memory("s", "semantic", "k") == text
        found = keeper.get_agent(name or "empty")
        assert found is not None
        assert found.metadata_ == {"text": text, name: 1}
        assert found.agent_id == (name or "empty")
        keeper.delete_agent(name or "empty")
    keeper.delete_memory("s", "semantic", "k")


def is_plain(value: Any) -> bool:
    """Whether *value* is JSON that has to come back equal."""
    match value:
        case bool() | None:
            return True
        case int():
            return True
        case float():
            return math.isfinite(value)
        case str():
            return storable(value)
        case list():
            return all(map(is_plain, value))
        case dict():
            return all(isinstance(key, str) and storable(key) and is_plain(inner) for key, inner in value.items())
    return False


@USUAL
@example([[[{"a": [10**300, -0.0, 5e-324]}]]])
@given(JSON)
def test_json_comes_back_equal_or_is_refused(keeper: SwarmDB, value: Any) -> None:
    try:
        keeper.store_memory("s", "episodic", "json", value)
    except InvalidInputError:
        assert not is_plain(value) or _has_huge_number(value)
        return
    assert is_plain(value)
    found = keeper.get_memory("s", "episodic", "json")
    assert found == value
    assert repr(found) == repr(value)  # Of the same types, and 0.0 is not -0.0.
    keeper.delete_memory("s", "episodic", "json")


def _has_huge_number(value: Any) -> bool:
    match value:
        case int():
            return abs(value) >= 10**4000
        case list():
            return any(map(_has_huge_number, value))
        case dict():
            return any(map(_has_huge_number, value.values()))
    return False


@pytest.mark.parametrize("depth", [10, 199, 200, 201, 1000, 100_000])
@pytest.mark.parametrize("shape", ["list", "dict", "mixed"])
def test_deep_json_comes_back_or_is_refused(keeper: SwarmDB, depth: int, shape: str) -> None:
    value: Any = 0
    for level in range(depth):
        value = [value] if shape == "list" or (shape == "mixed" and level % 2) else {"k": value}
    try:
        keeper.store_memory("s", "semantic", "deep", value)
    except InvalidInputError:
        assert depth > 199
    else:
        assert depth <= 201
        assert keeper.get_memory("s", "semantic", "deep") == value


def test_wide_json_comes_back(keeper: SwarmDB) -> None:
    value = {"numbers": list(range(200_000)), "texts": {str(number): "é" * 10 for number in range(50_000)}}
    keeper.store_memory("s", "semantic", "wide", value)

    assert keeper.get_memory("s", "semantic", "wide") == value


def test_json_that_holds_itself_is_refused(keeper: SwarmDB) -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidInputError):
        keeper.store_memory("s", "semantic", "k", value)


@USUAL
@given(MOMENTS)
def test_a_moment_comes_back_equal_or_is_refused(keeper: SwarmDB, moment: Any) -> None:
    try:
        wanted = (datetime.fromisoformat(moment) if isinstance(moment, str) else moment).astimezone(UTC)
    except (ValueError, OverflowError):
        wanted = None
    try:
        keeper.insert_event({"event_type": "spawn", "agent_id": "m", "agent_type": "t", "timestamp": moment}, "moment")
    except InvalidInputError:
        assert wanted is None
        return
    (found,) = keeper.get_events("m")
    assert found.timestamp == wanted
    keeper.cleanup_old_events(0)
    with keeper.transaction() as conn:
        conn.execute("DELETE FROM agent_events")


@USUAL
@given(NUMBERS)
def test_a_number_comes_back_equal_or_is_refused(keeper: SwarmDB, number: Any) -> None:
    try:
        keeper.store_agent_metric("n", "duration", number)
    except InvalidInputError:
        assert not _is_finite(number)
    else:
        (found,) = keeper.get_agent_metrics("n", limit=1)
        assert found.value == float(number)
    try:
        keeper.store_task_metric("n", "n", number, "success")
    except InvalidInputError:
        assert type(number) is not int or not 0 <= number < 2**63
    else:
        (task,) = keeper.get_task_metrics("n", limit=1)
        assert task.duration_ms == number
    with keeper.transaction() as conn:
        conn.execute("DELETE FROM agent_metrics")
        conn.execute("DELETE FROM task_metrics")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


# Rows with anything in any column

SQL_VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**62),  # Behind the largest as a row's number, SQLite has none left for the next.
    st.floats(),
    st.binary(max_size=12) | st.sampled_from([b"\xff", b'{"a": "\xff"}']),
    st.sampled_from(
        ["", "soon", "2025-11-30", "2025-11-30T10:00:00", "{", "{}", "[1]", "null", '"\\ud800"', "NaN", "[" * 2000]
    ),
    st.sampled_from(["spawn", "running", "semantic", "2025-11-30T10:00:00.000000+00:00", "2025-11-30 10:00:00"]),
    st.text(max_size=8).filter(storable),
)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", TABLES, ids=lambda model: str(model.__tablename__))
def test_a_row_of_arbitrary_values_is_read_or_named(model: Any, tmp_path: Path) -> None:
    names = [column.name for column in columns(model)]
    holes = ", ".join("CAST(? AS TEXT)" if number % 2 else "?" for number in range(len(names)))
    calls = [call for name, call in CALLS.items() if name not in ("backup", "vacuum", WAITS)]
    with SwarmDB(tmp_path / "swarm.db") as db, closing(sqlite3.connect(tmp_path / "swarm.db")) as raw:

        @settings(USUAL, max_examples=max(10, EXAMPLES // 4))
        @given(st.tuples(*(SQL_VALUES for _ in names)), st.booleans(), st.data())
        def attempt(row: tuple[Any, ...], as_text: bool, data: st.DataObject) -> None:  # noqa: FBT001
            marks = holes if as_text else ", ".join("?" * len(names))
            try:
                with raw:
                    raw.execute(f"DELETE FROM {model.__tablename__}")
                    raw.execute(
                        f"INSERT OR REPLACE INTO {model.__tablename__} ({', '.join(names)}) VALUES ({marks})", row
                    )
            except sqlite3.IntegrityError:
                return
            for call in calls:
                with suppress(CorruptDataError, ConflictError, AgentNotFoundError, SchemaError):
                    call(db, tmp_path)
            report = db.check(quarantine=True)
            assert report.integrity == ()
            assert db.check().ok
            for name in ("get_events", "list_agents", "list_memories", "get_task_metrics", "get_agent_metrics"):
                CALLS[name](db, tmp_path)

        attempt()


# A plain model

NAMES = st.sampled_from(["a", "b", "ä", "'; --", RTL])
KINDS = st.sampled_from(["semantic", "episodic"])
MINUTES = st.integers(0, 3)
BLOCKS = st.sampled_from(["transaction", "session"])
STATUSES = st.sampled_from(["spawned", "running", "complete", "error"])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)


@dataclasses.dataclass
class Model:
    """What a store holds, in plain Python."""

    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    agents: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    memories: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tasks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    measured: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def latest(self, now: datetime) -> dict[tuple[str, str, str], Any]:
        """Return the live memories by their key."""
        found = {(row["session"], row["kind"], row["key"]): row for row in self.memories}
        return {key: row["value"] for key, row in found.items() if row["expires"] is None or now < row["expires"]}

    def history(self, place: tuple[str, str, str]) -> list[dict[str, Any]]:
        """Return what was stored under one key, oldest first."""
        return [row for row in self.memories if (row["session"], row["kind"], row["key"]) == place]

    def silent(self, now: datetime, age: timedelta) -> list[str]:
        """Return the agents that are active and were not heard of for longer than *age*, longest silent first."""
        active = {name: row for name, row in self.agents.items() if row["status"] in ("spawned", "running")}
        found = [name for name, row in active.items() if row["seen"] < now - age]
        return sorted(found, key=lambda name: (active[name]["seen"], name))


class AgainstModel(RuleBasedStateMachine):
    """Each step is done on a store and on a model of plain lists and dicts."""

    url: Callable[[], str]
    server: Server | None = None

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.place = type(self).url()
        self.db = SwarmDB(url=self.place, clock=self.clock)
        self.other = SwarmDB(url=self.place, clock=self.clock)
        self.model = Model()
        self.saved: list[Model] = []  # As it was when each of the open blocks began.
        self.blocks: list[AbstractContextManager[object]] = []
        self.made = 0

    def teardown(self) -> None:
        while self.blocks:
            self._end(keep=True)
        self.db.close()
        self.other.close()
        if self.server is not None:
            self.server.drop_database(self.place)

    @rule(minutes=st.sampled_from([1, 59, 61, 60 * 23]))
    def time_passes(self, minutes: int) -> None:
        if self.clock.now < datetime(2025, 12, 25, tzinfo=UTC):  # Before retention would begin.
            self.clock.advance(minutes=minutes)

    @rule(agent=NAMES, kind=st.sampled_from(["spawn", "complete", "error"]), ago=MINUTES, metadata=PLAIN)
    def insert_event(self, agent: str, kind: Any, ago: int, metadata: Any) -> None:
        self.made += 1
        row = {
            "event_type": kind,
            "agent_id": agent,
            "agent_type": "t",
            "timestamp": self.clock() - timedelta(minutes=ago),
            "metadata": {"m": metadata},
        }
        event_id = self.db.insert_event(row, f"e-{self.made}")  # type: ignore[arg-type]
        self.model.events.append({**row, "event_id": event_id})

    @rule(agents=st.lists(NAMES, min_size=1, max_size=4), spoil=st.booleans())
    def insert_events(self, agents: list[str], *, spoil: bool) -> None:
        rows: list[Any] = [
            {"event_type": "spawn", "agent_id": agent, "agent_type": "t", "timestamp": self.clock()} for agent in agents
        ]
        if spoil:
            with pytest.raises(InvalidInputError):
                spoiled: Any = {**rows[0], "agent_id": NUL}
                self.db.insert_events([*rows, spoiled])
            return
        ids = self.db.insert_events(rows)
        self.model.events += [{**row, "metadata": {}, "event_id": made} for row, made in zip(rows, ids, strict=True)]

    @precondition(lambda self: self.model.events)
    @rule(number=st.integers(0))
    def insert_again(self, number: int) -> None:
        row = self.model.events[number % len(self.model.events)]
        with pytest.raises(ConflictError):
            self.db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t"}, row["event_id"])

    @rule(agent=NAMES, status=STATUSES)
    def register(self, agent: str, status: Any) -> None:
        self.db.register_agent(agent, "t", status)
        ended = self.clock() if status in ("complete", "error") else None
        now = self.clock()
        self.model.agents[agent] = {"status": status, "spawned": now, "seen": now, "ended": ended, "took": None}

    @rule(agent=NAMES, status=STATUSES, took=st.none() | st.integers(0, 2**63 - 1))
    def update(self, agent: str, status: Any, took: int | None) -> None:
        is_refused = took is not None and status in ("running", "spawned")
        if is_refused or agent not in self.model.agents:
            with pytest.raises(InvalidInputError if is_refused else AgentNotFoundError):
                self.db.update_agent_status(agent, status, took)
            return
        self.db.update_agent_status(agent, status, took)
        row = self.model.agents[agent]
        row["status"], row["seen"] = status, self.clock()
        if status in ("complete", "error"):
            row["ended"] = self.clock()
        elif status in ("running", "spawned"):
            row["ended"], row["took"] = None, None
        if took is not None:
            row["took"] = took

    @rule(agent=NAMES)
    def heartbeat(self, agent: str) -> None:
        row = self.model.agents.get(agent)
        if row is None:
            with pytest.raises(AgentNotFoundError):
                self.db.heartbeat(agent)
            return
        is_active = row["status"] in ("spawned", "running")
        assert self.db.heartbeat(agent) == is_active
        if is_active:
            row["seen"] = self.clock()

    @rule(minutes=st.sampled_from([1, 60]))
    def mark_stale(self, minutes: int) -> None:
        age = timedelta(minutes=minutes)
        wanted = self.model.silent(self.clock(), age)
        assert [row.agent_id for row in self.db.find_stale_agents(age)] == wanted
        assert [row.agent_id for row in self.db.mark_stale_agents(age)] == wanted
        for name in wanted:
            row = self.model.agents[name]
            (event,) = self.db.get_events(name, "error", 1)
            silent = self.clock() - row["seen"]
            metadata = {
                "reason": "stale",
                "last_updated": row["seen"].isoformat(timespec="microseconds"),
                "silent_seconds": silent.total_seconds(),
            }
            assert event["metadata"] == metadata
            row.update(status="error", seen=self.clock(), ended=self.clock())
            self.model.events.append({**event})

    @rule(agent=NAMES)
    def delete_agent(self, agent: str) -> None:
        assert self.db.delete_agent(agent) == (self.model.agents.pop(agent, None) is not None)

    @rule(session=NAMES, kind=KINDS, key=NAMES, value=PLAIN, ttl=st.sampled_from([None, 1, 24]))
    def store_memory(self, session: str, kind: Any, key: str, value: Any, ttl: int | None) -> None:
        self.db.store_memory(session, kind, key, value, ttl)
        expires = None if ttl is None else self.clock() + timedelta(hours=ttl)
        self.made += 1
        row = {"session": session, "kind": kind, "key": key, "value": value, "expires": expires}
        row |= {"at": self.clock(), "number": self.made}
        self.model.memories.append(row)

    @rule(session=NAMES, kind=KINDS, key=NAMES)
    def delete_memory(self, session: str, kind: Any, key: str) -> None:
        place = (session, kind, key)
        was_live = place in self.model.latest(self.clock())
        assert self.db.delete_memory(session, kind, key) == was_live
        self.model.memories = [row for row in self.model.memories if (row["session"], row["kind"], row["key"]) != place]

    @rule(task=NAMES, agent=NAMES, result=st.sampled_from(["success", "failure"]), tokens=st.integers(0, 2**63 - 1))
    def store_task(self, task: str, agent: str, result: Any, tokens: int) -> None:
        stored = self.db.store_task_metric(task, agent, None, result, tokens)
        taken = {(row["task"], row["at"]) for row in self.model.tasks}
        wanted = self.clock()
        while (task, wanted) in taken:
            wanted += timedelta(microseconds=1)
        assert stored == wanted
        self.model.tasks.append({"task": task, "agent": agent, "result": result, "tokens": tokens, "at": stored})

    @rule(agent=NAMES, kind=st.sampled_from(["duration", "throughput"]), value=st.floats(-1e300, 1e300), ago=MINUTES)
    def store_agent_metric(self, agent: str, kind: Any, value: float, ago: int) -> None:
        at = self.clock() - timedelta(minutes=ago)
        number = self.db.store_agent_metric(agent, kind, value, {"ago": ago}, at)
        self.model.measured.append({"agent": agent, "kind": kind, "value": value, "at": at, "number": number})

    @rule(agents=st.lists(NAMES, min_size=1, max_size=4), spoil=st.booleans())
    def store_agent_metrics(self, agents: list[str], *, spoil: bool) -> None:
        rows: list[Any] = [{"agent_id": agent, "metric_type": "duration", "value": 0.5} for agent in agents]
        if spoil:
            with pytest.raises(InvalidInputError):
                spoiled: Any = {**rows[0], "value": math.inf}
                self.db.store_agent_metrics([*rows, spoiled])
            return
        assert self.db.store_agent_metrics(rows) == len(rows)
        self.model.measured += [
            {"agent": agent, "kind": "duration", "value": 0.5, "at": self.clock(), "number": None} for agent in agents
        ]

    @rule(kinds=st.lists(BLOCKS, min_size=1, max_size=3))
    def begin(self, kinds: list[str]) -> None:
        for kind in kinds[: 3 - len(self.saved)]:
            self._begin(kind)

    @rule(every=st.booleans(), keep=st.booleans())
    def end(self, *, every: bool, keep: bool) -> None:
        for _ in range(len(self.blocks) if every else min(len(self.blocks), 1)):
            self._end(keep=keep)

    @rule(kind=BLOCKS, agent=NAMES, value=PLAIN, keep=st.booleans())
    def write_in_a_block(self, kind: str, agent: str, value: Any, *, keep: bool) -> None:
        self._begin(kind)
        self.register(agent, "running")
        self.store_memory("a", "semantic", agent, value, None)
        self.store_agent_metric(agent, "duration", 1.0, 0)
        self._end(keep=keep)

    def _begin(self, kind: str) -> None:
        block = getattr(self.db, kind)()
        block.__enter__()
        self.blocks.append(block)
        self.saved.append(copy.deepcopy(self.model))

    def _end(self, *, keep: bool) -> None:
        block, as_it_was = self.blocks.pop(), self.saved.pop()
        if keep:
            block.__exit__(None, None, None)
        else:
            block.__exit__(KeyError, KeyError(), None)
            self.model = as_it_was

    @precondition(lambda self: not self.saved)
    @rule(other=st.booleans())
    def restart(self, *, other: bool) -> None:
        if other:
            self.db, self.other = self.other, self.db
            return
        self.db.close()
        self.db = SwarmDB(url=self.place, clock=self.clock)

    @precondition(lambda self: self.saved)
    @rule()
    def read_from_outside(self) -> None:
        committed = self.saved[0]
        events = [event.event_id for event in self.other.iter_events()]
        assert sorted(events) == sorted(row["event_id"] for row in committed.events)
        assert {row.agent_id: row.status for row in self.other.list_agents()} == {
            name: row["status"] for name, row in committed.agents.items()
        }

    @precondition(lambda self: not self.saved)
    @rule()
    def vacuum_and_check(self) -> None:
        self.db.vacuum()
        assert self.db.check().ok

    @rule(days=st.sampled_from([0, 1]))
    def clean_up_events(self, days: int) -> None:
        cutoff = self.clock() - timedelta(days=days)
        kept = [row for row in self.model.events if row["timestamp"] >= cutoff]
        assert self.db.cleanup_old_events(days) == len(self.model.events) - len(kept)
        self.model.events = kept

    @rule(minutes=st.sampled_from([0, 60, 60 * 24]), dry=st.booleans())
    def clean_up(self, minutes: int, *, dry: bool) -> None:
        age = timedelta(minutes=minutes)
        cutoff = self.clock() - age
        policy = RetentionPolicy(age, age, age, age, age, age)
        left = copy.deepcopy(self.model)
        left.events = [row for row in left.events if row["timestamp"] >= cutoff]
        left.tasks = [row for row in left.tasks if row["at"] >= cutoff]
        left.measured = [row for row in left.measured if row["at"] >= cutoff]
        left.agents = {name: row for name, row in left.agents.items() if row["ended"] is None or row["ended"] >= cutoff}
        for place in {(row["session"], row["kind"], row["key"]) for row in left.memories}:
            history = left.history(place)
            for number, row in enumerate(history):
                is_replaced = number + 1 < len(history) and history[number + 1]["at"] < cutoff
                if is_replaced or (row["expires"] is not None and row["expires"] < cutoff):
                    gone = history[: number + 1]
                    left.memories = [memory for memory in left.memories if memory not in gone]
        report = self.db.cleanup(policy=policy, dry_run=dry)
        assert {table.table: table.rows for table in report.tables if table.rows} == {
            table: rows
            for table, rows in {
                "agent_events": len(self.model.events) - len(left.events),
                "session_memory": len(self.model.memories) - len(left.memories),
                "task_metrics": len(self.model.tasks) - len(left.tasks),
                "agent_metrics": len(self.model.measured) - len(left.measured),
                "agent_registry": len(self.model.agents) - len(left.agents),
            }.items()
            if rows
        }
        if not dry:
            self.model = left

    @rule(agent=st.none() | NAMES, kind=st.none() | st.sampled_from(["spawn", "error"]), limit=st.integers(0, 5))
    def read_events(self, agent: Any, kind: Any, limit: int) -> None:
        wanted = [
            row
            for row in self.model.events
            if (agent is None or row["agent_id"] == agent) and (kind is None or row["event_type"] == kind)
        ]
        order = {id(row): number for number, row in enumerate(self.model.events)}
        wanted.sort(key=lambda row: (row["timestamp"], order[id(row)]), reverse=True)
        found = self.db.get_events(agent, kind, limit)
        names = ("event_id", "event_type", "agent_id", "timestamp", "metadata")
        assert [[event[name] for name in names] for event in found] == [
            [row[name] for name in names] for row in wanted[:limit]
        ]
        oldest_first = list(self.db.iter_events(agent, kind, batch_size=2))
        assert [event.event_id for event in oldest_first] == [row["event_id"] for row in reversed(wanted)]

    @rule(agent=NAMES)
    def read_agents(self, agent: str) -> None:
        found = {row.agent_id: row for row in self.db.list_agents()}
        assert {
            name: {
                "status": row.status,
                "spawned": row.spawned_at,
                "seen": row.last_updated,
                "ended": row.completed_at,
                "took": row.duration_ms,
            }
            for name, row in found.items()
        } == self.model.agents
        active = {name for name, row in self.model.agents.items() if row["status"] in ("spawned", "running")}
        assert {row.agent_id for row in self.db.get_active_agents()} == active
        assert (self.db.get_agent(agent) is not None) == (agent in self.model.agents)

    @rule(session=NAMES, kind=KINDS, key=NAMES)
    def read_memory(self, session: str, kind: Any, key: str) -> None:
        live = self.model.latest(self.clock())
        absent = object()
        assert self.db.get_memory(session, kind, key, default=absent) == live.get((session, kind, key), absent)
        assert {(row.session_id, row.memory_type, row.key): row.value for row in self.db.list_memories(session)} == {
            place: value for place, value in live.items() if place[0] == session
        }
        history = [row["value"] for row in self.model.history((session, kind, key))]
        assert [row.value for row in self.db.memory_history(session, kind, key)] == history[::-1]

    @rule(agent=NAMES)
    def read_tasks(self, agent: str) -> None:
        wanted = [row for row in self.model.tasks if row["agent"] == agent]
        found = self.db.get_task_metrics(agent_id=agent, limit=1000)
        assert sorted((row.task_id, row.timestamp, row.result, row.tokens_used) for row in found) == sorted(
            (row["task"], row["at"], row["result"], row["tokens"]) for row in wanted
        )

    @rule(
        agent=st.none() | NAMES, kind=st.none() | st.sampled_from(["duration", "throughput"]), limit=st.integers(0, 9)
    )
    def read_agent_metrics(self, agent: Any, kind: Any, limit: int) -> None:
        order = {id(row): number for number, row in enumerate(self.model.measured)}
        wanted = [row for row in self.model.measured if agent in (None, row["agent"]) and kind in (None, row["kind"])]
        wanted.sort(key=lambda row: (row["at"], order[id(row)]), reverse=True)
        found = self.db.get_agent_metrics(agent, kind, limit=limit)
        assert [(row.agent_id, row.metric_type, row.value, row.timestamp) for row in found] == [
            (row["agent"], row["kind"], row["value"], row["at"]) for row in wanted[:limit]
        ]
        for row, modelled in zip(found, wanted, strict=False):
            assert modelled["number"] in (None, row.metric_id)


@pytest.mark.timeout(36000)
@pytest.mark.parametrize("kind", ["file", "postgresql"])
def test_a_store_does_what_plain_python_does(
    kind: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "postgresql":
        server: Server = request.getfixturevalue("postgres_server")
        monkeypatch.setattr(AgainstModel, "server", server)
        monkeypatch.setattr(AgainstModel, "url", server.create_database, raising=False)
    else:
        folder = tmp_path_factory.mktemp("model")
        numbers = iter(range(sys.maxsize))
        monkeypatch.setattr(
            AgainstModel, "url", staticmethod(lambda: f"sqlite:///{folder}/{next(numbers)}.db"), raising=False
        )
    sequences = EXAMPLES if kind == "file" else max(5, EXAMPLES // 5)
    run_state_machine_as_test(AgainstModel, settings=settings(USUAL, max_examples=sequences, stateful_step_count=50))
