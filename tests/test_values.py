"""Enums, errors, JSON and statements: the small parts."""

import copy
import dataclasses
import logging
import math
import pickle
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_serializer

from moai_flow.memory import (
    AgentEvent,
    AgentMetricType,
    AgentNotFoundError,
    AgentStatus,
    BusyError,
    CorruptDataError,
    EventType,
    InvalidInputError,
    MemoryType,
    SwarmDB,
    SwarmDBError,
    SwarmMetricType,
    TaskResult,
)
from moai_flow.memory import errors as errors_module
from moai_flow.memory.types import decode_json, decode_time, encode_json


class Color(StrEnum):
    RED = "red"


class Model(BaseModel):
    tags: set[str]
    by_number: dict[int, str]
    maybe: float | None = None


class Odd(Enum):
    NAN = math.nan
    INFINITY = math.inf
    SET = frozenset({1})
    NUL = "x\0y"
    BYTES = b"abc"


class Serialized(BaseModel):
    text: str

    @field_serializer("text")
    def with_nul(self, text: str) -> str:
        return text + "\0"


class Keys(BaseModel):
    of: dict[Any, int]


@dataclasses.dataclass
class Data:
    inner: Model
    raw: bytes


def test_the_vocabularies_are_the_specifications() -> None:
    assert list(EventType) == ["spawn", "complete", "error"]
    assert list(AgentStatus) == ["spawned", "running", "complete", "error"]
    assert list(MemoryType) == ["semantic", "episodic", "context_hint"]
    assert list(TaskResult) == ["success", "failure", "timeout", "cancelled"]
    assert list(AgentMetricType) == ["duration", "success_rate", "error_count", "throughput"]
    assert list(SwarmMetricType) == ["health", "throughput", "latency", "resource"]


def test_an_unlisted_word_is_a_member_that_keeps_it() -> None:
    member = EventType.read("decision")

    assert isinstance(member, EventType)
    assert (member, member.value, member.name, str(member)) == ("decision",) * 4
    assert member == EventType.read("decision") != EventType.SPAWN
    assert len({member, EventType.read("decision"), "decision"}) == 1
    assert not member.is_listed
    # A name is not a value: SQLModel's default would have stored it.
    assert not EventType.read("SPAWN").is_listed
    assert EventType.read("spawn") is EventType.SPAWN
    assert EventType.SPAWN.is_listed


@pytest.mark.parametrize("member", [EventType.read("decision"), EventType.SPAWN])
def test_members_survive_pickling_and_copying(member: EventType) -> None:
    for made in (pickle.loads(pickle.dumps(member)), copy.copy(member), copy.deepcopy(member)):
        assert type(made) is EventType
        assert made == member
        assert made.is_listed == member.is_listed
    assert pickle.loads(pickle.dumps(EventType.SPAWN)) is EventType.SPAWN


def test_rows_survive_pickling_and_copying(db: SwarmDB) -> None:
    db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t", "metadata": {"k": [1]}})
    (event,) = db.get_events()

    for made in (pickle.loads(pickle.dumps(event)), copy.copy(event), copy.deepcopy(event)):
        assert made == event
        assert made.cursor == event.cursor
    assert event != AgentEvent(event_type=EventType.SPAWN, agent_id="a", agent_type="t")


def test_rows_are_dumped_by_column_name_and_validated_back(db: SwarmDB) -> None:
    db.insert_event({"event_type": "spawn", "agent_id": "a", "agent_type": "t", "metadata": {"k": [1]}})
    (event,) = db.get_events()

    dumped = event.model_dump_json()
    assert '"metadata":{"k":[1]}' in dumped
    assert AgentEvent.model_validate_json(dumped) == event
    assert AgentEvent.model_validate(dict(event)) == event


def test_only_listed_states_are_active() -> None:
    assert [status for status in AgentStatus if status.is_active] == ["spawned", "running"]
    assert not AgentStatus.read("hibernating").is_active


ERRORS: list[SwarmDBError] = [
    InvalidInputError("limit", -1, "a whole number"),
    AgentNotFoundError("ghost"),
    CorruptDataError("agent_events", "metadata", {"id": 7}, "holds '{'"),
    BusyError("busy"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_survive_pickling_with_their_facts(error: SwarmDBError) -> None:
    made = pickle.loads(pickle.dumps(error))

    assert type(made) is type(error)
    assert str(made) == str(error)
    assert vars(made) == vars(error)


def test_every_error_is_in_the_tree_that_its_module_draws() -> None:
    assert errors_module.__doc__ is not None
    for name, value in vars(errors_module).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, SwarmDBError)
            assert name in errors_module.__doc__
            for base in value.__bases__:
                assert base.__name__ in errors_module.__doc__ or base is Exception


def test_messages_are_short_whatever_the_value() -> None:
    values: list[Any] = ["x" * 10**6, 10**5000, list(range(10**5)), {"k": {"k": {"k": {"k": {}}}}}, None]
    for value in values:
        assert len(str(InvalidInputError("value", value, "something else"))) < 200


@pytest.mark.parametrize(
    ("value", "decoded"),
    [
        ((1, (2,)), [1, [2]]),
        (datetime(2025, 11, 30, 10, tzinfo=UTC), "2025-11-30T10:00:00Z"),
        ([date(2025, 11, 30), time(10), timedelta(minutes=1)], ["2025-11-30", "10:00:00", "PT1M"]),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.50"), "1.50"),
        ({"path": Path("a/b"), "color": Color.RED}, {"path": "a/b", "color": "red"}),
        ({Color.RED: 1}, {"red": 1}),
        (Model(tags={"a"}, by_number={1: "x"}), {"tags": ["a"], "by_number": {"1": "x"}, "maybe": None}),
        (
            Data(Model(tags=set(), by_number={}), b"raw"),
            {"inner": {"tags": [], "by_number": {}, "maybe": None}, "raw": "raw"},
        ),
        ("\\u0000 is only text here, as is Infinity", "\\u0000 is only text here, as is Infinity"),
        (10**30, 10**30),
        ("a 🐝 and a ü", "a 🐝 and a ü"),
    ],
)
def test_what_is_not_plain_json_is_stored_as_the_json_it_dumps_to(value: Any, decoded: Any) -> None:
    assert decode_json(encode_json(value, field="value")) == decoded


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Model(tags={"a\0"}, by_number={}), r"value\.tags\[0\]"),
        (Model(tags=set(), by_number={1: "\0"}), r"value\.by_number\[1\]"),
        ({"m": Model(tags=set(), by_number={}, maybe=math.inf)}, r"value\['m'\]\.maybe"),
        (Data(Model(tags=set(), by_number={}), b"\xff"), "value: got Data"),
        ([1, {"x": 2j}], r"value\[1\]\['x'\]: got 2j"),
        (Data, "value: got <class"),
        (Odd.NAN, "value: got nan"),
        ({"a": Odd.INFINITY}, r"value\['a'\]: got inf"),
        (Odd.SET, "value: got frozenset"),
        (Odd.NUL, r"value: got 'x\\x00y'"),
        (Odd.BYTES, "value: got b'abc'"),
        (Serialized(text="a"), r"value\['text'\]: got 'a\\x00'"),
        (Keys(of={1: 1, "1": 2}), r"value\.of: got .*keys that differ as text"),
    ],
)
def test_what_json_would_change_inside_is_named(value: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        encode_json(value, field="value")


@given(st.text())
def test_no_text_is_decoded_as_json_by_luck(text: str) -> None:
    try:
        decode_json(text)
    except ValueError:
        return
    assert text.strip()[0] in '0123456789-"[{tfnNI'


@pytest.mark.parametrize("text", ["", "soon", "2025-13-01", "9999-12-31T23:59:59-10:00"])
def test_what_is_no_time_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        decode_time(text)


def test_statements_are_logged_at_debug_level(db: SwarmDB, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="moai_flow.memory"):
        db.register_agent("a", "t")
        db.insert_events([{"event_type": "spawn", "agent_id": "b", "agent_type": "t"}])
        db.store_memory("s", "semantic", "k", 1)
    messages = [record.getMessage() for record in caplog.records]

    assert any("INSERT INTO agent_registry" in message and "'a'" in message for message in messages)
    assert any("INSERT INTO agent_events" in message for message in messages)
    assert any("INSERT INTO session_memory" in message for message in messages)
    caplog.clear()
    db.get_agent("a")
    assert caplog.records == []
