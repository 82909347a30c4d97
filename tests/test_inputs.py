"""Bad input: refused by name, before anything is written."""

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from enum import Enum, StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from moai_flow.memory import (
    AgentEvent,
    AgentMetricType,
    AgentStatus,
    EventType,
    InvalidInputError,
    MemoryType,
    SwarmDB,
    SwarmDBError,
)

EVENT = {"event_type": "spawn", "agent_id": "a", "agent_type": "t"}
ODD_KEYS: dict[Any, Any] = {"agent": "a", None: 1, 7: 2}


class Scores(BaseModel):
    scores: list[float]


class NoZone(tzinfo):
    def utcoffset(self, moment: datetime | None) -> Any:
        return 5

    def tzname(self, moment: datetime | None) -> None:
        return None

    def dst(self, moment: datetime | None) -> None:
        return None


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in EVENT.items() if name != key}


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "event of unknown type": (
        lambda db: db.insert_event({**EVENT, "event_type": "explode"}),
        "event_type: got 'explode', expected one of 'spawn', 'complete', 'error'",
    ),
    "event type that is none": (lambda db: db.insert_event({**EVENT, "event_type": 7}), "event_type: got 7"),
    "event type that can't be hashed": (
        lambda db: db.insert_event({**EVENT, "event_type": ["spawn"]}),
        "event_type: got",
    ),
    "event with unknown keys of several kinds": (
        lambda db: db.insert_event({**EVENT, **ODD_KEYS}),
        "only the keys agent_id, ",
    ),
    "filter by a type that a row brought, with NUL": (
        lambda db: db.get_events(event_type=EventType.read("a\0")),
        r"event_type: got 'a\\x00', expected text without",
    ),
    "time in a zone that is none": (
        lambda db: db.insert_event({**EVENT, "timestamp": datetime(2025, 11, 30, tzinfo=NoZone())}),
        "timestamp: got",
    ),
    "event without type": (lambda db: db.insert_event(without("event_type")), "event_type"),
    "event without agent": (lambda db: db.insert_event(without("agent_id")), "agent_id: .*a dict with agent_id, "),
    "event with unknown key": (lambda db: db.insert_event({**EVENT, "agent": "a"}), "^agent: .*only the keys"),
    "event that is no dict": (lambda db: db.insert_event([("event_type", "spawn")]), "event_data"),
    "empty agent id": (lambda db: db.insert_event({**EVENT, "agent_id": ""}), "agent_id: got '', expected text"),
    "agent id of another type": (lambda db: db.insert_event({**EVENT, "agent_id": 7}), "agent_id: got 7"),
    "empty agent type": (lambda db: db.insert_event({**EVENT, "agent_type": ""}), "agent_type"),
    "empty event id": (lambda db: db.insert_event(EVENT, ""), "event_id"),
    "event id with NUL": (lambda db: db.insert_event(EVENT, "a\0b"), r"event_id: got 'a\\x00b', expected text without"),
    "lone surrogate": (lambda db: db.insert_event({**EVENT, "agent_id": "\ud800"}), "agent_id.*surrogates"),
    "time that is none": (lambda db: db.insert_event({**EVENT, "timestamp": "soon"}), "timestamp: got 'soon'"),
    "time as a number": (lambda db: db.insert_event({**EVENT, "timestamp": 1764411089.9}), "timestamp"),
    "time out of range": (lambda db: db.insert_event({**EVENT, "timestamp": "0001-01-01T00:00:00+10:00"}), "timestamp"),
    "metadata that is no dict": (lambda db: db.insert_event({**EVENT, "metadata": [1]}), r"metadata: got \[1\]"),
    "metadata with NaN": (
        lambda db: db.insert_event({**EVENT, "metadata": {"a": [1, math.nan]}}),
        r"metadata\['a'\]\[1\]",
    ),
    "instance with an empty id": (
        lambda db: db.insert_event(AgentEvent(event_type=EventType.SPAWN, agent_id="", agent_type="t")),
        "agent_id",
    ),
    "batch with a bad one": (lambda db: db.insert_events([EVENT, without("agent_type")]), r"events\[1\]\.agent_type"),
    "event of a type that a row brought": (
        lambda db: db.insert_event({**EVENT, "event_type": EventType.read("decision")}),
        "event_type: .*expected one of",
    ),
    "state that a row brought": (lambda db: db.update_agent_status("a", AgentStatus.read("zombie")), "status: "),
    "memory of a type that a row brought": (
        lambda db: db.store_memory("s", MemoryType.read("dream"), "k", 1),
        "memory_type: .*expected one of",
    ),
    "figure of a type that a row brought": (
        lambda db: db.store_agent_metric("a", AgentMetricType.read("mood"), 1),
        "metric_type: .*expected one of",
    ),
    "batch that is none": (lambda db: db.insert_events(None), "events: got None"),
    "batch that is one event": (lambda db: db.insert_events(EVENT), "events: got {.*a list"),
    "batch that is one row": (
        lambda db: db.insert_events(AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t")),
        "^events: got .*a list",
    ),
    "negative limit": (lambda db: db.get_events(limit=-1), "limit: got -1, expected a whole number from 0"),
    "limit of another type": (lambda db: db.get_events(limit="many"), "limit"),
    "limit that is a bool": (lambda db: db.get_events(limit=True), "limit: got True"),
    "huge limit": (lambda db: db.get_events(limit=2**63), "limit"),
    "filter of unknown type": (lambda db: db.get_events(event_type="explode"), "event_type"),
    "filter of another type": (lambda db: db.get_events(agent_id=7), "agent_id: got 7, expected text, or None"),
    "filter with NUL": (lambda db: db.get_events(agent_id="\0"), "agent_id"),
    "since that is none": (lambda db: db.get_events(since="soon"), "since"),
    "until that is none": (lambda db: db.get_events(until="soon"), "until"),
    "agent with empty id": (lambda db: db.register_agent("", "t"), "agent_id"),
    "agent with empty type": (lambda db: db.register_agent("b", ""), "agent_type"),
    "agent in unknown state": (lambda db: db.register_agent("b", "t", "runing"), "status: got 'runing'"),
    "agent with bad metadata": (lambda db: db.register_agent("b", "t", metadata={"x": {1}}), r"metadata\['x'\]"),
    "update to unknown state": (lambda db: db.update_agent_status("a", "runing"), "status: got 'runing'"),
    "update without id": (lambda db: db.update_agent_status("", "running"), "agent_id"),
    "negative duration": (lambda db: db.update_agent_status("a", "complete", -1), "duration_ms: got -1"),
    "duration with a fraction": (lambda db: db.update_agent_status("a", "complete", 1.5), "duration_ms: got 1.5"),
    "agent by empty id": (lambda db: db.get_agent(""), "agent_id"),
    "agent by none": (lambda db: db.delete_agent(None), "agent_id: got None"),
    "list in unknown state": (lambda db: db.list_agents(status="runing"), "status"),
    "list of a type that is no text": (lambda db: db.list_agents(agent_type=7), "agent_type: got 7, expected text, or"),
    "list of a type with NUL": (lambda db: db.list_agents(agent_type="a\0"), "agent_type"),
    "no duration of an agent that runs": (lambda db: db.update_agent_status("a", "running", 0), "duration_ms: got 0"),
    "heartbeat of nobody": (lambda db: db.heartbeat(""), "agent_id: got ''"),
    "memory of unknown type": (lambda db: db.store_memory("s", "vague", "k", 1), "memory_type: got 'vague'"),
    "memory without session": (lambda db: db.store_memory("", "semantic", "k", 1), "session_id"),
    "memory without key": (lambda db: db.store_memory("s", "semantic", "", 1), "key"),
    "memory that is no JSON": (lambda db: db.store_memory("s", "semantic", "k", object()), "value: got <object"),
    "memory that is NaN": (lambda db: db.store_memory("s", "semantic", "k", math.nan), "value: got nan"),
    "memory with an infinity": (
        lambda db: db.store_memory("s", "semantic", "k", {"a": math.inf}),
        r"value\['a'\]: got inf",
    ),
    "memory that is a set": (lambda db: db.store_memory("s", "semantic", "k", {1}), r"value: got \{1\}, expected JSON"),
    "memory that is bytes": (lambda db: db.store_memory("s", "semantic", "k", b"x"), "value: got b'x'"),
    "memory with a key of another type": (
        lambda db: db.store_memory("s", "semantic", "k", {"a": {1: 2}}),
        r"value\['a'\]\[1\]: got 1, expected a key that is a string",
    ),
    "memory with NUL": (lambda db: db.store_memory("s", "semantic", "k", ["a\0"]), r"value\[0\].*without \\u0000"),
    "memory with NUL in a key": (lambda db: db.store_memory("s", "semantic", "k", {"a\0": 1}), r"value\['a\\x00'\]"),
    "memory with a lone surrogate": (
        lambda db: db.store_memory("s", "semantic", "k", ["\udfff"]),
        r"value\[0\].*surrog",
    ),
    "memory that holds itself": (lambda db: db.store_memory("s", "semantic", "k", circle()), "value: got .*JSON"),
    "memory that is too deep": (lambda db: db.store_memory("s", "semantic", "k", nested(1000)), "value: got .*JSON"),
    "memory that is a generator": (lambda db: db.store_memory("s", "semantic", "k", (x for x in "ab")), "value"),
    "model with NaN": (
        lambda db: db.store_memory("s", "semantic", "k", Scores(scores=[1, math.nan])),
        r"value\.scores\[1\]",
    ),
    "model class": (lambda db: db.store_memory("s", "semantic", "k", Scores), "value: got <class"),
    "time to live of nothing": (lambda db: db.store_memory("s", "semantic", "k", 1, ttl_hours=0), "ttl_hours: got 0"),
    "negative time to live": (lambda db: db.store_memory("s", "semantic", "k", 1, ttl_hours=-1), "ttl_hours: got -1"),
    "time to live with a fraction": (lambda db: db.store_memory("s", "semantic", "k", 1, ttl_hours=0.5), "ttl_hours"),
    "memory read by unknown type": (lambda db: db.get_memory("s", "vague", "k"), "memory_type"),
    "memory read by none": (lambda db: db.get_memory("s", None, "k"), "memory_type: got None"),
    "list without session": (lambda db: db.list_memories(""), "session_id"),
    "prefix of another type": (lambda db: db.list_memories("s", prefix=1), "prefix"),
    "history without key": (lambda db: db.memory_history("s", "semantic", ""), "key"),
    "delete by unknown type": (lambda db: db.delete_memory("s", "vague", "k"), "memory_type"),
    "task with unknown result": (
        lambda db: db.store_task_metric("t", "a", 1, "ok"),
        "result: got 'ok', expected one of",
    ),
    "task without id": (lambda db: db.store_task_metric("", "a", 1, "success"), "task_id"),
    "task without agent": (lambda db: db.store_task_metric("t", "", 1, "success"), "agent_id"),
    "task with negative duration": (lambda db: db.store_task_metric("t", "a", -1, "success"), "duration_ms"),
    "task with negative tokens": (lambda db: db.store_task_metric("t", "a", 1, "success", -1), "tokens_used"),
    "task with no number of tokens": (
        lambda db: db.store_task_metric("t", "a", 1, "success", None),
        "tokens_used: got None",
    ),
    "task with too many files": (lambda db: db.store_task_metric("t", "a", 1, "success", 0, 2**63), "files_changed"),
    "task at no time": (lambda db: db.store_task_metric("t", "a", 1, "success", timestamp="x"), "timestamp"),
    "metric of unknown type": (lambda db: db.store_agent_metric("a", "speed", 1), "metric_type: got 'speed'"),
    "metric that is NaN": (lambda db: db.store_agent_metric("a", "duration", math.nan), "value: got nan"),
    "metric that is infinite": (lambda db: db.store_swarm_metric("s", "health", math.inf), "value: got inf"),
    "metric that is text": (lambda db: db.store_swarm_metric("s", "health", "1"), "value: got '1'"),
    "metric that is a bool": (lambda db: db.store_swarm_metric("s", "health", value=True), "value: got True"),
    "metric beyond a float": (lambda db: db.store_swarm_metric("s", "health", 10**400), "value: got 1000"),
    "metric with bad metadata": (lambda db: db.store_swarm_metric("s", "health", 1, 7), "metadata: got 7"),
    "metrics by unknown result": (lambda db: db.get_task_metrics(result="ok"), "result"),
    "metrics by unknown type": (lambda db: db.get_agent_metrics(metric_type="x"), "metric_type"),
    "metrics of a task that is no text": (lambda db: db.get_task_metrics(7), "task_id: got 7"),
    "tasks of an agent with NUL": (lambda db: db.get_task_metrics(agent_id="a\0"), "agent_id: got"),
    "metrics of an agent that is no text": (lambda db: db.get_agent_metrics(7), "agent_id: got 7"),
    "metrics of a swarm that is no text": (lambda db: db.get_swarm_metrics(7), "swarm_id: got 7"),
    "figures of a swarm by unknown type": (lambda db: db.get_swarm_metrics(metric_type="mood"), "metric_type"),
    "metrics since no time": (lambda db: db.get_task_metrics(since="soon"), "since: got 'soon'"),
    "metrics until no time": (lambda db: db.get_agent_metrics(until="soon"), "until: got 'soon'"),
    "metrics with a limit that is a bool": (lambda db: db.get_task_metrics(limit=True), "limit: got True"),
    "metrics with negative limit": (lambda db: db.get_swarm_metrics(limit=-1), "limit"),
    "negative days": (lambda db: db.cleanup_old_events(days=-1), "days: got -1"),
    "days with a fraction": (lambda db: db.cleanup_old_events(days=0.5), "days: got 0.5"),
}


def circle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.fixture(scope="module")
def filled() -> Any:
    with SwarmDB(":memory:") as db:
        db.insert_event(EVENT)  # type: ignore[arg-type]
        db.register_agent("a", "t")
        db.store_memory("s", "semantic", "k", "v")
        yield db


def content(db: SwarmDB) -> list[str]:
    with db.session(readonly=True):
        raw: Any = db._get_connection()
        return list(raw.iterdump())


@pytest.mark.parametrize(("call", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_and_changes_nothing(filled: SwarmDB, call: Callable[[Any], Any], named: str) -> None:
    before = content(filled)
    with pytest.raises(InvalidInputError, match=named) as caught:
        call(filled)

    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SwarmDBError)
    assert str(caught.value).startswith(f"{caught.value.field}: got ")
    assert str(caught.value).endswith(f", expected {caught.value.expected}")
    assert len(str(caught.value)) < 400
    assert content(filled) == before


def test_models_refuse_what_their_columns_do() -> None:
    with pytest.raises(ValidationError, match="event_type"):
        AgentEvent(event_type="explode", agent_id="a", agent_type="t")  # type: ignore[arg-type]
    event = AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t")
    with pytest.raises(ValidationError, match="event_type"):
        event.event_type = "explode"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="not read from a database"):
        event.cursor  # noqa: B018 (a property that raises)


def test_the_largest_number_that_a_column_holds_is_taken(db: SwarmDB) -> None:
    largest = 2**63 - 1
    db.store_task_metric("t", "a", largest, "success", largest, largest)
    db.store_task_metrics(
        [{"task_id": "u", "agent_id": "a", "duration_ms": largest, "result": "success", "tokens_used": largest}]
    )

    (one,), (other,) = db.get_task_metrics("t"), db.get_task_metrics("u")
    assert {one.duration_ms, one.tokens_used, one.files_changed, other.duration_ms, other.tokens_used} == {largest}


class NewStyle(StrEnum):
    CODER = "coder-1"


class OldStyle(str, Enum):  # noqa: UP042 (as text it is "OldStyle.CODER")
    CODER = "coder-1"


@pytest.mark.parametrize("coder", [NewStyle.CODER, OldStyle.CODER])
def test_a_str_of_the_callers_own_enum_is_stored_as_text(coder: str, db: SwarmDB) -> None:
    db.register_agent(coder, "t")
    event_id = db.insert_event({"event_type": "spawn", "agent_id": coder, "agent_type": "t"}, coder)

    assert type(event_id) is str
    assert [event.event_id for event in db.get_events("coder-1")] == ["coder-1"]
    assert type(db.list_agents()[0].agent_id) is str
    assert db.get_agent("coder-1") is not None


@given(
    st.datetimes(
        min_value=datetime.min + timedelta(days=1),  # noqa: DTZ901 (hypothesis wants it naive)
        max_value=datetime.max - timedelta(days=1),  # noqa: DTZ901
        timezones=st.just(UTC) | st.timezones(),
    )
)
def test_every_moment_comes_back_as_the_same_instant(moment: datetime) -> None:
    from moai_flow.memory.types import decode_time, encode_datetime, encode_iso

    for encode in (encode_iso, encode_datetime):
        found = decode_time(encode(moment))
        assert found == moment.astimezone(UTC)
        assert found.tzinfo is UTC


@given(st.lists(st.datetimes(timezones=st.just(UTC)), min_size=2, max_size=2))
def test_the_order_of_texts_is_the_order_of_times(moments: list[datetime]) -> None:
    from moai_flow.memory.types import encode_datetime, encode_iso

    one, other = moments
    for encode in (encode_iso, encode_datetime):
        assert (encode(one) < encode(other)) == (one < other)


def test_a_time_of_another_zone_is_the_same_instant(db: SwarmDB) -> None:
    moment = datetime(2025, 11, 30, 12, 0, tzinfo=timezone(timedelta(hours=-3, minutes=-30)))
    db.store_swarm_metric("s", "health", 1, timestamp=moment)
    db.store_swarm_metric("s", "health", 1, timestamp=moment.isoformat())

    assert {found.timestamp for found in db.get_swarm_metrics()} == {moment}
