"""The same work on what else is used to keep what agents remember.

Each peer runs as its documentation has it, on a file in WAL; where its durability can be chosen it is SwarmDB's
default, else SwarmDB takes the peer's. What a peer offers to asyncio only goes through its own thread hop, so
SwarmDB is called through one as well.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

from agents import SQLiteSession
from agents.extensions.memory import SQLAlchemySession
from diskcache import Cache
from langgraph.store.sqlite import SqliteStore

from moai_flow.memory import EventData, SwarmDB

from .dataset import METADATA, VALUE
from .measuring import Measurement, compare, timed
from .operations import STRIDE

#: How many values, or events, each store holds before anything is measured.
STORED = 10_000

SESSIONS = 100
ITEM = {"role": "user", "content": METADATA["prompt"], "model": METADATA["model"], "tags": METADATA["tags"]}
EVENT: EventData = {"event_type": "spawn", "agent_id": "agent-1", "agent_type": "coder", "metadata": ITEM}

Work = Callable[[int], object]
AsyncWork = Callable[[int], Coroutine[Any, Any, object]]


def measurements(folder: Path, *, rounds: int) -> Iterator[Measurement]:
    """Yield every comparison."""
    for compared in (_langgraph, _diskcache, _openai_sqlite, _openai_sqlalchemy):
        yield from compared(folder, rounds)


def _key(number: int) -> tuple[str, str]:
    number = number * STRIDE % STORED
    return f"session-{number % SESSIONS}", f"key-{number // SESSIONS}"


def _filled(path: Path, durability: Any) -> SwarmDB:
    db = SwarmDB(path, durability=durability)
    for number in range(STORED):
        session, key = _key(number)
        db.store_memory(session, "semantic", key, VALUE)
    events: list[EventData] = [{**EVENT, "agent_id": f"agent-{number % SESSIONS}"} for number in range(STORED)]
    db.insert_events(events)
    return db


def _langgraph(folder: Path, rounds: int) -> Iterator[Measurement]:
    with closing(sqlite3.connect(folder / "langgraph.db", check_same_thread=False, isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode = WAL")
        raw.execute("PRAGMA synchronous = NORMAL")
        store = SqliteStore(raw)
        store.setup()

        def put(number: int) -> None:
            session, key = _key(number)
            store.put((session, "semantic"), key, VALUE)

        def get(number: int) -> object:
            session, key = _key(number)
            return store.get((session, "semantic"), key)

        for number in range(STORED):
            put(number)
        with _filled(folder / "beside-langgraph.db", "normal") as db:
            peer = "LangGraph SqliteStore"
            yield from _compared(peer, "put a value", _storing(db), put, "normal", rounds)
            yield from _compared(peer, "get a value", _getting(db), get, "", rounds)
            yield from _compared(
                peer,
                "all 100 values of a session",
                lambda number: db.list_memories(f"session-{number % SESSIONS}", "semantic"),
                lambda number: store.search((f"session-{number % SESSIONS}", "semantic"), limit=100),
                "",
                rounds,
                calls=20,
            )


def _diskcache(folder: Path, rounds: int) -> Iterator[Measurement]:
    with Cache(str(folder / "diskcache")) as cache, _filled(folder / "beside-diskcache.db", "normal") as db:

        def put(number: int) -> None:
            cache.set(_key(number), VALUE)

        for number in range(STORED):
            put(number)
        yield from _compared("diskcache", "put a value", _storing(db), put, "normal", rounds)
        yield from _compared(
            "diskcache", "get a value", _getting(db), lambda number: cache.get(_key(number)), "", rounds
        )


def _openai_sqlite(folder: Path, rounds: int) -> Iterator[Measurement]:
    path = folder / "openai.db"
    sessions = [SQLiteSession(f"agent-{number}", path) for number in range(SESSIONS)]
    try:
        yield from _as_a_log("OpenAI Agents SQLiteSession", sessions, folder / "beside-openai.db", rounds)
    finally:
        for session in sessions:
            session.close()


def _openai_sqlalchemy(folder: Path, rounds: int) -> Iterator[Measurement]:
    url = f"sqlite+aiosqlite:///{folder / 'openai-sqlalchemy.db'}"
    with asyncio.Runner() as runner:
        first = SQLAlchemySession.from_url("agent-0", url=url, create_tables=True)
        sessions = [SQLAlchemySession(f"agent-{number}", engine=first.engine) for number in range(SESSIONS)]
        sessions[0] = first
        beside = folder / "beside-openai-sqlalchemy.db"
        yield from _as_a_log("OpenAI Agents SQLAlchemySession", sessions, beside, rounds, runner=runner)
        runner.run(first.engine.dispose())


def _as_a_log(
    peer: str, sessions: list[Any], beside: Path, rounds: int, *, runner: asyncio.Runner | None = None
) -> Iterator[Measurement]:
    """Compare conversations with the events of agents. These peers flush the disk at each commit."""

    async def append(number: int) -> None:
        await sessions[number % SESSIONS].add_items([ITEM])

    async def newest(number: int) -> object:
        return await sessions[number % SESSIONS].get_items(limit=100)

    async def fill() -> None:
        for session in sessions:
            await session.add_items([ITEM] * (STORED // SESSIONS))

    with _filled(beside, "full") as db:

        async def append_here(number: int) -> object:
            event: EventData = {**EVENT, "agent_id": f"agent-{number % SESSIONS}"}
            return await asyncio.to_thread(db.insert_event, event)

        async def newest_here(number: int) -> object:
            return await asyncio.to_thread(db.get_events, f"agent-{number % SESSIONS}", limit=100)

        runner = runner or asyncio.Runner()
        runner.run(fill())
        yield from _compared_in(runner, peer, "append an item", append_here, append, "full", rounds)
        yield from _compared_in(runner, peer, "newest 100 items", newest_here, newest, "", rounds)


def _storing(db: SwarmDB) -> Work:
    def store(number: int) -> None:
        session, key = _key(number)
        db.store_memory(session, "semantic", key, VALUE)

    return store


def _getting(db: SwarmDB) -> Work:
    def get(number: int) -> object:
        session, key = _key(number)
        return db.get_memory(session, "semantic", key)

    return get


def _compared(
    peer: str, what: str, ours: Work, theirs: Work, durability: str, rounds: int, *, calls: int = 200
) -> Iterator[Measurement]:
    mine, other = _rounds(ours, calls), _rounds(theirs, calls)
    yield compare(
        what,
        lambda: next(mine),
        lambda: next(other),
        rounds=rounds,
        calls=calls,
        against=peer,
        rows=STORED,
        durability=durability,
    )


def _compared_in(
    runner: asyncio.Runner, peer: str, what: str, ours: AsyncWork, theirs: AsyncWork, durability: str, rounds: int
) -> Iterator[Measurement]:
    async def all_of(work: AsyncWork, numbers: range) -> None:
        for number in numbers:
            await work(number)

    calls = 50
    begins = count(step=calls)

    def one_round(work: AsyncWork) -> float:
        begin = next(begins)
        return timed(lambda: runner.run(all_of(work, range(begin, begin + calls))))

    yield compare(
        what,
        lambda: one_round(ours),
        lambda: one_round(theirs),
        rounds=rounds,
        calls=calls,
        against=peer,
        rows=STORED,
        durability=durability,
    )


def _rounds(work: Work, calls: int) -> Iterator[float]:
    for begin in count(step=calls):

        def run(numbers: range = range(begin, begin + calls)) -> None:
            for number in numbers:
                work(number)

        yield timed(run)
