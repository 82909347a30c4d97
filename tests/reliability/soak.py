"""A long life in a short time: operations under a clock that runs fast, with old rows removed by themselves."""

import gc
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from moai_flow.memory import RetentionPolicy, SwarmDB
from moai_flow.memory.engine import log_bytes

from .units import demand, totals

WEEK = timedelta(days=7)


class Sample(NamedTuple):
    """How it stood after so many operations."""

    operations: int
    day: int
    rows: int
    file_bytes: int
    log_bytes: int
    memory_bytes: int
    descriptors: int

    def __str__(self) -> str:
        return (
            f"{self.operations:>9,} operations, day {self.day:>4}: {self.rows:>7,} rows, "
            f"file {self.file_bytes / 2**20:6.1f} MiB, log {self.log_bytes / 2**20:4.1f} MiB, "
            f"memory {self.memory_bytes / 2**20:6.1f} MiB, {self.descriptors} descriptors"
        )


@dataclass(frozen=True)
class SoakFigures:
    """The samples, in order."""

    samples: tuple[Sample, ...]
    seconds: float

    def __str__(self) -> str:
        done = self.samples[-1]
        return f"{done.operations:,} operations, {done.day} days in {self.seconds:.0f} s, flat in their second half"

    @property
    def flat(self) -> tuple[Sample, ...]:
        """The samples of the second half, when it is as full as it gets."""
        return self.samples[len(self.samples) // 2 :]


def run(
    folder: Path,
    *,
    operations: int = 1_000_000,
    days: int = 100,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> SoakFigures:
    """Do so many operations over so many days, with a retention of a week, finished agents included.

    Raises:
        BreachError: If the file, the process's memory or its open descriptors grow on and on.
    """
    now = datetime(2026, 1, 1, tzinfo=UTC)
    began, step = now, timedelta(days=days) / operations
    policy = RetentionPolicy(WEEK, WEEK, WEEK, WEEK, WEEK, agents=WEEK)
    chance, samples, begun = random.Random(seed), [], time.perf_counter()
    with SwarmDB(folder / "soak.db", retention=policy, clock=lambda: now) as db:
        for number in range(operations):
            now += step
            _operate(db, number, chance)
            if (number + 1) % (operations // 20) == 0:
                samples.append(_sample(db, number + 1, round((now - began) / timedelta(days=1))))
                say(f"  {samples[-1]}")
        demand(db.check().ok, "every row can be read")
    figures = SoakFigures(tuple(samples), time.perf_counter() - begun)
    _check(figures)
    return figures


def _operate(db: SwarmDB, number: int, chance: random.Random) -> None:
    agent = f"agent-{number // 10}"
    match number % 10:
        case 0:
            db.register_agent(agent, "t", "running")
        case 9:
            db.update_agent_status(agent, "complete" if chance.random() < 0.9 else "error")
        case 1 | 2 | 3:
            db.insert_event({"event_type": "spawn", "agent_id": agent, "agent_type": "t", "metadata": {"n": number}})
        case 4:
            db.store_task_metric(f"task-{number}", agent, number % 1000, "success")
        case 5:
            db.store_agent_metric(agent, "duration", chance.random())
        case 6:
            db.store_memory(f"session-{number % 50}", "semantic", f"key-{number % 200}", number)
        case 7:
            db.store_memory(f"session-{number // 1000}", "context_hint", "hint", {"n": number}, ttl_hours=24)
        case _:
            db.get_events(agent, limit=5)
            db.get_memory(f"session-{chance.randrange(50)}", "semantic", "key-0")


def _sample(db: SwarmDB, number: int, day: int) -> Sample:
    gc.collect()
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names are enough)
    size = db.db_path.stat().st_size
    return Sample(number, day, sum(totals(db).values()), size, log_bytes(db._location) or 0, memory, descriptors)


def _check(figures: SoakFigures) -> None:
    first, *rest = figures.flat
    for sample in rest:
        for name, share in {"rows": 1.25, "file_bytes": 1.25, "memory_bytes": 1.15}.items():
            then, now = getattr(first, name), getattr(sample, name)
            demand(now <= then * share, f"{name} stays flat", then, now)
        demand(sample.descriptors <= first.descriptors + 1, "no descriptor leaks", first, sample)
        demand(sample.log_bytes <= 2**24, "the log stays small", sample)
