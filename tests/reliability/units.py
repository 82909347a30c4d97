"""Pieces of work that leave rows in one or several tables, and finding out which of them a database has."""

import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from moai_flow.memory import EventData, SwarmDB


class BreachError(Exception):
    """A promise was broken."""


def demand(is_kept: bool, promise: str, *facts: object) -> None:  # noqa: FBT001 (it reads like assert)
    """Raise `BreachError` unless a promise is kept."""
    if not is_kept:
        raise BreachError(": ".join([promise, *map(str, facts)]))


#: What one unit of each kind leaves behind, by table: all of it or nothing.
LEFT: Mapping[str, Mapping[str, int]] = {
    "event": {"agent_events": 1},
    "batch": {"agent_events": 20},
    "memory": {"session_memory": 1},
    "metric": {"task_metrics": 1},
    "metrics": {"agent_metrics": 10},
    "block": {
        "agent_events": 3,
        "agent_registry": 1,
        "session_memory": 1,
        "task_metrics": 1,
        "agent_metrics": 2,
        "swarm_metrics": 1,
    },
}
KINDS = tuple(LEFT)

#: The column of each table that tells whose work a row is.
_OWNERS = {
    "agent_events": "agent_id",
    "agent_registry": "agent_id",
    "session_memory": "session_id",
    "task_metrics": "agent_id",
    "agent_metrics": "agent_id",
    "swarm_metrics": "swarm_id",
}


def event(agent_id: str) -> EventData:
    """Return an event with some weight."""
    return {"event_type": "complete", "agent_id": agent_id, "agent_type": "t", "metadata": {"text": "x" * 200}}


def write(db: SwarmDB, kind: str, name: str) -> None:
    """Do one unit of work under a name of its own."""
    match kind:
        case "event":
            db.insert_event(event(name))
        case "batch":
            db.insert_events([event(name)] * 20)
        case "memory":
            db.store_memory(name, "semantic", "k", {"text": "x" * 200})
        case "metric":
            db.store_task_metric(name, name, 5, "success")
        case "metrics":
            db.store_agent_metrics({"agent_id": name, "metric_type": "duration", "value": 1} for _ in range(10))
        case _:
            _block(db, name)


def _block(db: SwarmDB, name: str) -> None:
    with db.transaction():
        db.register_agent(name, "t")
        db.insert_events([event(name)] * 2)
        with db.transaction():
            db.store_memory(name, "episodic", "k", 1)
            db.store_task_metric(name, name, 5, "success")
        for _ in range(2):
            db.store_agent_metric(name, "duration", 1)
        with db.session() as session:
            found = db.get_agent(name)
            demand(found is not None, "a block sees what it wrote", name)
            session.flush()
        db.store_swarm_metric(name, "health", 1)
        db.insert_event(event(name))


def units(prefix: str, seed: str) -> Iterator[tuple[str, str]]:
    """Yield kinds and names, for ever. The names end with a number that counts up."""
    chance = random.Random(seed)
    number = 0
    while True:
        kind = chance.choice(KINDS)
        yield kind, f"{prefix}/{kind}/{number}"
        number += 1


def found(db: SwarmDB, prefix: str) -> dict[str, Counter[str]]:
    """Return how many rows each unit has in each table, for the units whose names begin so."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    with db.session(readonly=True) as session:
        raw = session.connection()
        for table, owner in _OWNERS.items():
            query = f"SELECT {owner}, count(*) FROM {table} WHERE {owner} LIKE '{prefix}/%' GROUP BY {owner}"
            for name, count in raw.exec_driver_sql(query.replace("%", "%%") if is_server(db) else query):
                rows[name][table] += count
    return rows


def is_server(db: SwarmDB) -> bool:
    """Whether a database is on a server."""
    return db._location.is_on_server


def totals(db: SwarmDB) -> Counter[str]:
    """Return how many rows each table has."""
    with db.session(readonly=True) as session:
        raw = session.connection()
        return Counter({table: raw.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one() for table in _OWNERS})


def check_units(rows: Mapping[str, Mapping[str, int]], acknowledged: Mapping[str, Iterable[str]]) -> int:
    """Demand that units are whole, that none that was acknowledged is missing, and none is there that was not begun.

    Args:
        rows: What is there.
        acknowledged: By writer, the names of the units whose calls returned, in order.

    Returns:
        How many units are there though nobody heard of it: the calls that were under way.
    """
    for name, tables in rows.items():
        demand(dict(tables) == LEFT[name.split("/")[-2]], "no half of a transaction is there", name, dict(tables))
    unheard = 0
    present: dict[str, set[int]] = defaultdict(set)
    for name in rows:
        writer, _, number = name.rsplit("/", 2)
        present[writer].add(int(number))
    for writer, names in acknowledged.items():
        mine = list(names)
        missing = [name for name in mine if name not in rows]
        demand(not missing, "what was acknowledged is there", *missing[:5])
        extra = present[writer] - set(range(len(mine)))
        demand(extra <= {len(mine)}, "nothing is there that was not begun", writer, sorted(extra)[:5])
        unheard += len(extra)
    demand(present.keys() <= acknowledged.keys(), "nothing is there that nobody wrote", *present.keys())
    return unheard


def check_integrity(path: Path) -> None:
    """Demand that SQLite finds a file sound."""
    with closing(sqlite3.connect(path)) as raw:
        complaints: list[Any] = raw.execute("PRAGMA integrity_check").fetchall()
    demand(complaints == [("ok",)], "the file is sound", *complaints[:5])
