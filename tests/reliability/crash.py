"""Writers that are killed at random moments, again and again, on one database."""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import text

from moai_flow.memory import BusyError, SwarmDB

from .units import check_integrity, check_units, demand, found, is_server, totals, units, write

#: A server process that has imported everything, and forks the writers: else a round would take seconds.
FORKS = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class CrashFigures:
    """What the rounds came to."""

    rounds: int
    kills: int
    acknowledged: int
    unheard: int

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.kills} kills, {self.acknowledged:,} acknowledged calls, all there and whole; "
            f"{self.unheard:,} more had been committed when their writers died"
        )


def run(
    url: str,
    notes: Path,
    *,
    durability: Any = "normal",
    rounds: int = 200,
    processes: int = 8,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> CrashFigures:
    """Kill all writers of every round with SIGKILL, and see each time what the database has.

    Raises:
        BreachError: If it isn't what was promised.
    """
    FORKS.set_forkserver_preload(["moai_flow.memory", __name__])
    chance = random.Random(seed)
    acknowledged, unheard = 0, 0
    SwarmDB(url=url).close()
    with SwarmDB(url=url) as db:
        before = totals(db)
    for number in range(rounds):
        prefixes = [f"r{number}/w{writer}" for writer in range(processes)]
        lists = [notes / prefix.replace("/", "-") for prefix in prefixes]
        workers = [
            FORKS.Process(target=_write, args=(url, durability, prefix, number, path), daemon=True)
            for prefix, path in zip(prefixes, lists, strict=True)
        ]
        for worker in workers:
            worker.start()
        # Now and then they die while they open the file.
        if chance.random() < 0.8:
            _wait_until(partial(_has_begun, lists))
        chance.shuffle(workers)
        for worker in workers:
            time.sleep(chance.expovariate(60))
            worker.kill()
        for worker in workers:
            worker.join()
            demand(worker.exitcode == -9, "no writer fails", worker.exitcode)
        heard = {prefix: _lines(path) for prefix, path in zip(prefixes, lists, strict=True)}
        unheard += _check(url, f"r{number}", heard, before)
        acknowledged += sum(map(len, heard.values()))
        for path in lists:
            path.unlink(missing_ok=True)
        if number % 20 == 19:
            say(f"  round {number + 1}: {acknowledged:,} acknowledged")
    return CrashFigures(rounds, rounds * processes, acknowledged, unheard)


def _write(url: str, durability: Any, prefix: str, seed: int, path: Path) -> None:
    notes = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    with SwarmDB(url=url, durability=durability) as db:
        for kind, name in units(prefix, f"{seed} {prefix}"):
            while True:
                try:
                    write(db, kind, name)
                except BusyError:
                    if not is_server(db):
                        raise
                else:
                    break
            os.write(notes, f"{name}\n".encode())  # One call: all of the line or nothing of it.


def _has_begun(lists: list[Path]) -> bool:
    return any(path.exists() and path.stat().st_size for path in lists)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _check(url: str, round_: str, heard: dict[str, list[str]], before: Any) -> int:
    """Check what a round left, and that no earlier round lost anything; *before* is brought up to date."""
    with SwarmDB(url=url) as db:
        if is_server(db):
            # What a dead client had sent, the server may still be doing.
            _wait_until(lambda: _others(db) == 0)
        else:
            check_integrity(db.db_path)
        rows = found(db, round_)
        unheard = check_units(rows, heard)
        for tables in rows.values():
            before.update(tables)
        now = totals(db)
        demand(now == before, "rows of earlier rounds stay", now, before)
    return unheard


def _others(db: SwarmDB) -> int:
    with db.session(readonly=True) as session:
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "AND application_name = 'swarmdb' AND state <> 'idle'"
        )
        return int(session.connection().execute(text(query)).scalar_one())


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        demand(time.monotonic() < deadline, "something happens within a minute")
        time.sleep(0.002)
