"""How a ratio is measured: both sides in turn, round by round, and the median of the rounds' ratios."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

#: Runs a side's next round, and returns how long it took, in seconds.
Timed = Callable[[], float]


@dataclass(frozen=True)
class Measurement:
    """One operation of one side, as a multiple of the other.

    Attributes:
        name: The operation.
        against: The other side.
        rows: How many rows each table had; 0 where that plays no part.
        durability: What the commits of both sides survive; empty where nothing is written.
        calls: How many calls a round made.
        ours_us: Microseconds a call, the median of the rounds.
        theirs_us: The same for the other side.
        ratio: The median of the rounds' ratios.
        spread: The first and third quartile of the rounds' ratios.
        at_most: The highest ratio that is acceptable; None where there is no such bar.
    """

    name: str
    against: str
    rows: int
    durability: str
    calls: int
    ours_us: float
    theirs_us: float
    ratio: float
    spread: tuple[float, float]
    at_most: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the ratio is acceptable."""
        return self.at_most is None or self.ratio <= self.at_most

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {**asdict(self), "is_met": self.is_met}


def compare(
    name: str,
    ours: Timed,
    theirs: Timed,
    *,
    rounds: int,
    calls: int,
    against: str = "sqlite3",
    rows: int = 0,
    durability: str = "",
    at_most: float | None = None,
) -> Measurement:
    """Run both sides in turn; who goes first alternates, so that a machine that slows down harms neither."""
    ours(), theirs()  # The first round fills caches.
    pairs = []
    for number in range(rounds):
        gc.collect()
        if number % 2:
            second = theirs()
            pairs.append((ours(), second))
        else:
            first = ours()
            pairs.append((first, theirs()))
    ratios = [mine / other for mine, other in pairs]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    return Measurement(
        name=name,
        against=against,
        rows=rows,
        durability=durability,
        calls=calls,
        ours_us=median(mine for mine, _ in pairs) / calls * 1e6,
        theirs_us=median(other for _, other in pairs) / calls * 1e6,
        ratio=median(ratios),
        spread=(low, high),
        at_most=at_most,
    )


def timed(work: Callable[[], object]) -> float:
    """Return how long *work* takes, in seconds."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
