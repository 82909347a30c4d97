"""Cross-session memory."""

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from conftest import Clock
from moai_flow.memory import CorruptDataError, InvalidInputError, MemoryType, SwarmDB


class Prefs(BaseModel):
    language: str
    tags: set[str] = set()
    since: datetime | None = None


@dataclasses.dataclass
class Point:
    x: int
    y: float


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), inner, max_size=5)
    ),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def shared() -> Any:
    with SwarmDB(":memory:") as store:
        yield store


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON_VALUES)
def test_plain_json_comes_back_equal(shared: SwarmDB, value: Any) -> None:
    shared.store_memory("s", "semantic", "k", value)

    found = shared.get_memory("s", "semantic", "k")
    assert found == value
    assert type(found) is type(value)


def test_memories_are_told_apart_by_session_type_and_key(db: SwarmDB) -> None:
    db.store_memory("s", "semantic", "k", 1)
    db.store_memory("s", "episodic", "k", 2)
    db.store_memory("t", "semantic", "k", 3)
    db.store_memory("s", "semantic", "l", 4)

    assert db.get_memory("s", "semantic", "k") == 1
    assert db.get_memory("s", MemoryType.EPISODIC, "k") == 2
    assert db.get_memory("t", "semantic", "k") == 3
    assert db.get_memory("s", "semantic", "l") == 4
    assert db.get_memory("t", "semantic", "l") is None


def test_the_latest_write_wins_by_sequence_and_not_by_clock(db: SwarmDB, clock: Clock) -> None:
    db.store_memory("s", "semantic", "k", "first")
    db.store_memory("s", "semantic", "k", "second")
    assert db.get_memory("s", "semantic", "k") == "second"

    clock.advance(hours=-5)
    db.store_memory("s", "semantic", "k", "third")
    assert db.get_memory("s", "semantic", "k") == "third"
    assert [memory.value for memory in db.list_memories("s")] == ["third"]
    assert [memory.value for memory in db.memory_history("s", "semantic", "k")] == ["third", "second", "first"]


def test_none_is_stored_and_default_answers_absence_only(db: SwarmDB) -> None:
    db.store_memory("s", "semantic", "k", None)

    assert db.get_memory("s", "semantic", "k", default="absent") is None
    assert db.get_memory("s", "semantic", "no such", default="absent") == "absent"
    assert db.list_memories("s")[0].value is None
    with db.transaction() as conn:
        assert conn.execute("SELECT CAST(value AS TEXT) FROM session_memory").fetchone()[0] == "null"


def test_a_memory_expires_at_its_time_to_live_exactly(db: SwarmDB, clock: Clock) -> None:
    db.store_memory("s", "semantic", "k", 1, ttl_hours=24)
    (stored,) = db.list_memories("s")
    clock.advance(hours=24, microseconds=-1)
    assert db.get_memory("s", "semantic", "k") == 1

    clock.advance(microseconds=1)
    assert stored.expires_at == clock.now
    assert db.get_memory("s", "semantic", "k") is None
    assert db.get_memory("s", "semantic", "k", default=7) == 7
    assert db.list_memories("s") == []


def test_an_older_value_never_comes_back(db: SwarmDB, clock: Clock) -> None:
    db.store_memory("s", "semantic", "k", "permanent")
    db.store_memory("s", "semantic", "k", "short", ttl_hours=1)
    clock.advance(hours=2)

    assert db.get_memory("s", "semantic", "k") is None
    assert db.list_memories("s") == []
    assert [memory.value for memory in db.memory_history("s", "semantic", "k")] == ["short", "permanent"]


def test_storing_again_revives_a_key(db: SwarmDB, clock: Clock) -> None:
    db.store_memory("s", "semantic", "k", 1, ttl_hours=1)
    clock.advance(hours=2)
    db.store_memory("s", "semantic", "k", 2)
    clock.advance(days=4000)

    assert db.get_memory("s", "semantic", "k") == 2


def test_a_time_to_live_beyond_the_calendar_never_ends(db: SwarmDB) -> None:
    db.store_memory("s", "semantic", "k", 1, ttl_hours=10**18)

    assert db.get_memory("s", "semantic", "k") == 1
    assert db.list_memories("s")[0].expires_at is None


def test_deleting_removes_the_history_and_says_whether_the_key_was_live(db: SwarmDB, clock: Clock) -> None:
    db.store_memory("s", "semantic", "k", 1)
    db.store_memory("s", "semantic", "k", 2)
    db.store_memory("s", "semantic", "kept", 3)

    assert db.delete_memory("s", "semantic", "k") is True
    assert db.delete_memory("s", "semantic", "k") is False
    assert db.memory_history("s", "semantic", "k") == []
    assert db.get_memory("s", "semantic", "kept") == 3

    db.store_memory("s", "semantic", "k", 4, ttl_hours=1)
    clock.advance(hours=1)
    assert db.delete_memory("s", "semantic", "k") is False
    assert db.memory_history("s", "semantic", "k") == []


def test_deleting_and_the_history_are_of_one_key_of_one_type_of_one_session(db: SwarmDB) -> None:
    others = [("t", "semantic", "k"), ("s", "episodic", "k"), ("s", "semantic", "l")]
    for address in [*others, ("s", "semantic", "k"), *others]:
        db.store_memory(*address, value=address)  # type: ignore[arg-type]

    assert [memory.value for memory in db.memory_history("s", "semantic", "k")] == [["s", "semantic", "k"]]
    assert db.delete_memory("s", "semantic", "k") is True
    for address in others:
        assert [memory.value for memory in db.memory_history(*address)] == [list(address)] * 2  # type: ignore[arg-type]


def test_a_session_lists_the_latest_of_each_key(db: SwarmDB) -> None:
    for memory_type, key, value in [
        ("semantic", "b", 1),
        ("semantic", "a", 2),
        ("episodic", "z", 3),
        ("semantic", "b", 4),
    ]:
        db.store_memory("s", MemoryType(memory_type), key, value)
    db.store_memory("other", "semantic", "a", 5)

    assert [(m.memory_type, m.key, m.value) for m in db.list_memories("s")] == [
        ("episodic", "z", 3),
        ("semantic", "a", 2),
        ("semantic", "b", 4),
    ]
    assert [m.value for m in db.list_memories("s", memory_type="semantic")] == [2, 4]
    assert [m.value for m in db.list_memories("s", "semantic", "b")] == [4]


def test_a_prefix_is_taken_to_the_letter(db: SwarmDB) -> None:
    for key in ("user_name", "userXname", "User_name", "user%", "übung", "user"):
        db.store_memory("s", "semantic", key, key)

    def keys(prefix: str) -> list[str]:
        return [memory.key for memory in db.list_memories("s", prefix=prefix)]

    assert keys("user_") == ["user_name"]
    assert keys("user%") == ["user%"]
    assert keys("ü") == ["übung"]
    assert len(keys("")) == 6


def test_the_history_is_latest_write_first(db: SwarmDB) -> None:
    numbers = [db.store_memory("s", "semantic", "k", value) for value in "abc"]

    history = db.memory_history("s", "semantic", "k")
    assert [memory.value for memory in history] == ["c", "b", "a"]
    assert [memory.id for memory in history] == numbers[::-1]


def test_as_type_gives_back_what_was_stored(db: SwarmDB) -> None:
    prefs = Prefs(language="python", tags={"a", "b"}, since=datetime(2025, 1, 1, tzinfo=UTC))
    db.store_memory("s", "semantic", "prefs", prefs)
    db.store_memory("s", "semantic", "points", (Point(1, 2.5), Point(3, 4)))

    assert db.get_memory("s", "semantic", "prefs", as_type=Prefs) == prefs
    assert db.get_memory("s", "semantic", "points", as_type=list[Point]) == [Point(1, 2.5), Point(3, 4)]
    assert db.get_memory("s", "semantic", "points") == [{"x": 1, "y": 2.5}, {"x": 3, "y": 4.0}]
    assert db.get_memory("s", "semantic", "absent", as_type=Prefs) is None
    assert db.get_memory("s", "semantic", "absent", as_type=Prefs, default=prefs) is prefs


def test_a_value_that_is_not_of_the_type_is_named(db: SwarmDB) -> None:
    db.store_memory("s", "semantic", "k", {"no": "language"})

    with pytest.raises(InvalidInputError, match=r"as_type: got .*Prefs.*\(language: Field required\)"):
        db.get_memory("s", "semantic", "k", as_type=Prefs)


@pytest.mark.parametrize("as_type", [{}, object(), 7])
def test_a_type_that_is_none_is_refused(db: SwarmDB, as_type: Any) -> None:
    db.store_memory("s", "semantic", "k", 1)

    with pytest.raises(InvalidInputError, match="as_type"):
        db.get_memory("s", "semantic", "k", as_type=as_type)


def test_a_stored_none_is_no_model(db: SwarmDB) -> None:
    db.store_memory("s", "semantic", "k", None)

    with pytest.raises(InvalidInputError, match="as_type"):
        db.get_memory("s", "semantic", "k", as_type=Prefs)


def test_a_value_that_is_no_json_is_no_fault_of_the_type(local_db: SwarmDB) -> None:
    local_db.store_memory("s", "semantic", "k", 1)
    with local_db.transaction() as conn:
        conn.execute("UPDATE session_memory SET value = '{'")

    with pytest.raises(CorruptDataError, match="value"):
        local_db.get_memory("s", "semantic", "k", as_type=int)


def test_null_of_an_older_program_reads_as_none(db: SwarmDB) -> None:
    with db.transaction() as conn:
        conn.execute(
            "INSERT INTO session_memory (session_id, memory_type, key, value, timestamp) "
            "VALUES ('s', 'semantic', 'k', NULL, '2025-11-30T10:00:00.000000+00:00')"
        )

    assert db.get_memory("s", "semantic", "k", default=1) is None
    nothing: Any = type(None)
    assert db.get_memory("s", "semantic", "k", as_type=nothing, default=1) is None
    assert db.list_memories("s")[0].value is None


def test_memories_of_a_type_that_an_older_program_wrote_are_found_by_it(db: SwarmDB) -> None:
    dream = MemoryType.read("dream")
    with db.transaction() as conn:
        conn.execute(
            "INSERT INTO session_memory (session_id, memory_type, key, value, timestamp) "
            "VALUES ('s', 'dream', 'k', '1', '2025-11-30T10:00:00.000000+00:00')"
        )
    db.store_memory("s", "semantic", "k", 2)

    assert db.get_memory("s", dream, "k") == 1
    assert [memory.value for memory in db.memory_history("s", dream, "k")] == [1]
    assert [(memory.memory_type, memory.value) for memory in db.list_memories("s", dream)] == [(dream, 1)]
    assert db.delete_memory("s", dream, "k") is True
    assert [memory.value for memory in db.list_memories("s")] == [2]


def test_an_expired_value_that_is_no_json_is_absent_like_any_other(local_db: SwarmDB, clock: Clock) -> None:
    local_db.store_memory("s", "semantic", "k", 1, ttl_hours=1)
    local_db.store_memory("s", "semantic", "l", 2)
    with local_db.transaction() as conn:
        conn.execute("UPDATE session_memory SET value = '{' WHERE key = 'k'")
    with pytest.raises(CorruptDataError, match="value"):
        local_db.list_memories("s")

    clock.advance(hours=1)
    assert [memory.value for memory in local_db.list_memories("s")] == [2]
    assert local_db.get_memory("s", "semantic", "k", default="absent") == "absent"


@pytest.mark.parametrize(
    ("column", "stored"), [("ttl_hours", "'long'"), ("ttl_hours", "x'01'"), ("timestamp", "'soon'")]
)
def test_an_end_that_cannot_be_told_is_named(local_db: SwarmDB, column: str, stored: str) -> None:
    local_db.store_memory("s", "semantic", "k", 1, ttl_hours=1)
    with local_db.transaction() as conn:
        conn.execute(f"UPDATE session_memory SET {column} = {stored}")

    calls: list[Callable[[], Any]] = [
        lambda: local_db.get_memory("s", "semantic", "k"),
        lambda: local_db.list_memories("s"),
        lambda: local_db.delete_memory("s", "semantic", "k"),
    ]
    for call in calls:
        with pytest.raises(CorruptDataError, match=column):
            call()


def test_the_fault_of_a_value_keeps_what_found_it(local_db: SwarmDB) -> None:
    local_db.store_memory("s", "semantic", "k", {"no": "language"})
    with pytest.raises(InvalidInputError) as refused:
        local_db.get_memory("s", "semantic", "k", as_type=Prefs)
    assert isinstance(refused.value.__cause__, ValidationError)

    with local_db.transaction() as conn:
        conn.execute("UPDATE session_memory SET value = '{'")
    with pytest.raises(CorruptDataError) as corrupt:
        local_db.get_memory("s", "semantic", "k")
    assert isinstance(corrupt.value.__cause__, ValueError)
