"""Try on a real file what SwarmDB promises for the worst day: ``python -m tests.reliability``."""

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from . import contention, crash, power, soak
from .units import BreachError


def main() -> int:
    """Run what is wanted, print its figures, and tell by the exit status whether every promise was kept."""
    options = _options()
    status = 0
    for name, trial in _trials(options):
        if not any(word in name for word in options.only):
            continue
        print(f"{name} ...", flush=True)
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="swarmdb-reliability-") as folder:
            try:
                print(f"{name}: {trial(Path(folder))}. It took {time.perf_counter() - begun:.0f} s.", flush=True)
            except BreachError as breach:
                status = 1
                print(f"{name}: BROKEN: {breach}", flush=True)
    return status


def _trials(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[Path], object]]]:
    short = options.short
    rounds, moments = (10, 20) if short else (200, 200)
    for durability in ("normal", "full"):
        yield f"crash, {durability}", partial(_crash_writers, durability, rounds)
    postgres = _postgres()
    if (install := postgres.installed()) is not None:
        yield "crash, postgresql", lambda folder: _crash_clients(postgres.started(install), folder, rounds)
    for durability in ("normal", "full"):
        trial = partial(power.run, durability=durability, moments=moments, seed=options.seed, say=_say)
        yield f"power, {durability}", trial
    yield "contention", lambda folder: contention.run(folder, seconds=5 if short else 60, seed=options.seed)
    yield "contention, opening", lambda folder: f"the slowest took {contention.open_at_once(folder):.2f} s"
    yield "contention, long reader", contention.long_reader
    yield (
        "soak",
        lambda folder: soak.run(folder, operations=20_000 if short else 1_000_000, days=60 if short else 100, say=_say),
    )


def _postgres() -> Any:
    """Return the module that starts the tests' server, which is no package's."""
    path = Path(__file__).parents[1] / "postgres.py"
    spec = importlib.util.spec_from_file_location("postgres", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["postgres"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _crash_writers(durability: Any, rounds: int, folder: Path) -> crash.CrashFigures:
    return crash.run(f"sqlite:///{folder / 'swarm.db'}", folder, durability=durability, rounds=rounds, say=_say)


def _crash_clients(started: Any, folder: Path, rounds: int) -> crash.CrashFigures:
    with started as server:
        return crash.run(server.create_database(), folder, rounds=rounds, say=_say)


def _say(line: str) -> None:
    print(line, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only what has one of these in its name: crash, power, contention, soak",
    )
    parser.add_argument("--short", action="store_true", help="a few rounds of each, as the test suite does")
    parser.add_argument("--seed", type=int, default=0, help="what chance begins with")
    parser.add_argument("--folder", type=Path, help="where the files are made: a disk, as files are for real")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
