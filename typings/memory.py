"""Session memory."""

from dataclasses import dataclass
from typing import Any, assert_type

from pydantic import BaseModel

from moai_flow.memory import MemoryType, MemoryTypeLike, SessionMemory, SwarmDB


class Prefs(BaseModel):
    """What a session prefers."""

    language: str


@dataclass
class Tone:
    """How to answer."""

    terse: bool


def writing(db: SwarmDB) -> None:
    assert_type(db.store_memory("s", "context_hint", "prefs", {"language": "python"}), int)
    db.store_memory(session_id="s", memory_type=MemoryType.SEMANTIC, key="k", value=Prefs(language="de"), ttl_hours=24)
    assert_type(db.delete_memory("s", "context_hint", "prefs"), bool)


def reading(db: SwarmDB) -> None:
    assert_type(db.get_memory("s", "context_hint", "prefs"), Any)
    assert_type(db.get_memory("s", "context_hint", "prefs")["language"], Any)
    assert_type(db.get_memory("s", "context_hint", "prefs", default={}), Any)
    assert_type(db.get_memory("s", "context_hint", "prefs", as_type=Prefs), Prefs | None)
    assert_type(db.get_memory("s", "context_hint", "tone", as_type=Tone, default=Tone(terse=False)), Tone)
    assert_type(db.get_memory("s", "context_hint", "sizes", as_type=list[int]), list[int] | None)
    assert_type(db.get_memory("s", "context_hint", "sizes", as_type=list[int], default=0), list[int] | int)
    assert_type(db.list_memories("s"), list[SessionMemory])
    db.list_memories("s", "episodic", prefix="task-")
    assert_type(db.memory_history("s", "episodic", "task-7"), list[SessionMemory])


def words(memory_type: MemoryTypeLike) -> None:
    assert_type(MemoryType(memory_type), MemoryType)


def mistakes(db: SwarmDB) -> None:
    prefs: Prefs = db.get_memory("s", "context_hint", "prefs", as_type=Prefs)  # type: ignore[assignment]
    db.get_memory("s", "context_hint", "prefs", as_type=Prefs).language  # type: ignore[union-attr]  # noqa: B018
    prefs.language = 7  # type: ignore[assignment]
    db.get_memory("s", "context", "prefs")  # type: ignore[call-overload]
    db.get_memory("s", "context_hint", "prefs", {})  # type: ignore[call-overload]
    db.store_memory("s", "context", "prefs", {})  # type: ignore[arg-type]
    db.store_memory("s", "context_hint", "prefs")  # type: ignore[call-arg]
    db.store_memory("s", "context_hint", "prefs", {}, ttl_hours=0.5)  # type: ignore[arg-type]
    db.list_memories("s", "context")  # type: ignore[arg-type]
    db.memory_history("s", "context", "prefs")  # type: ignore[arg-type]
    db.delete_memory("s", "context", "prefs")  # type: ignore[arg-type]
