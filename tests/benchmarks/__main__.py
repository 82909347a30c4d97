"""Measure every public operation against raw `sqlite3`: ``python -m tests.benchmarks``."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from moai_flow.memory import SwarmDB

from . import concurrency, copying, loops, report, server, starting
from .dataset import build_pair, copy_of, warm
from .measuring import Measurement
from .operations import CASES, Case, measure
from .raw import RawSwarm

#: In larger files, what a case adds is lost in the mass; smaller ones are copied, so that they keep their size.
LARGEST_COPIED = 100_000

#: Where disk flushes are compared, the number of rows plays no part.
FULL_ROWS = 100_000


def main() -> int:
    """Measure, print, and tell by the exit status whether every bar was met."""
    options = _options()
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="swarmdb-bench-") as folder:
        for measurement in _measurements(options, Path(folder)):
            found.append(measurement)
            print(report.line(measurement), flush=True)
    for target, write in (
        (options.json, report.write_json),
        (options.markdown, report.write_markdown),
        (options.plot, report.write_plot),
    ):
        if target is not None:
            write(found, target)
    return 0 if all(measurement.is_met for measurement in found) else 1


def _measurements(options: argparse.Namespace, folder: Path) -> Iterator[Measurement]:
    wanted = [case for case in CASES if options.only in case.name]
    for rows in options.rows:
        ours, raw = build_pair(folder, rows)
        # What adds most comes last: the file should be as large as it is said to be.
        for case in sorted(wanted, key=lambda case: case.writes):
            if rows <= case.most_rows:
                yield from _both(case, ours, raw, rows, options)
        if options.only in "open a file, read one agent":
            yield starting.measure_opening(ours, rounds=options.rounds, rows=rows)
        if rows <= LARGEST_COPIED:
            yield from _many_writers(ours, raw, rows, options)
        if options.only in "insert_event, longest wait during cleanup_old_events, 100,000" and rows == max(
            options.rows
        ):
            yield concurrency.measure_waits(ours, raw, rounds=options.rounds, rows=rows)
        for path in folder.iterdir():
            path.unlink()
    if options.only in "import moai_flow.memory":
        yield starting.measure_import(rounds=options.rounds * 2)
    yield from loops.measurements(folder, options.only, rounds=options.rounds)
    if options.server:
        yield from server.measurements(FULL_ROWS, options.only, rounds=options.rounds)
        yield from copying.measurements(folder, options.only, rounds=options.rounds)
    if options.peers:
        from . import peers  # What it imports is in an extra of its own.

        yield from peers.measurements(folder, rounds=options.rounds)


def _both(case: Case, ours: Path, raw: Path, rows: int, options: argparse.Namespace) -> Iterator[Measurement]:
    for durability in ("normal", "full") if case.writes and rows == FULL_ROWS else ("normal",):
        copied = case.writes and rows <= LARGEST_COPIED
        mine, other = (copy_of(path, "written") if copied else path for path in (ours, raw))
        for path in (mine, other):
            warm(path)
        with SwarmDB(mine, durability=durability) as store, closing(RawSwarm(other, durability=durability)) as floor:
            yield measure(case, store, floor, rows, durability=durability, rounds=options.rounds)


def _many_writers(ours: Path, raw: Path, rows: int, options: argparse.Namespace) -> Iterator[Measurement]:
    many = {"rows": rows, "rounds": options.rounds}
    if options.only in "insert_event, 8 threads" and rows == FULL_ROWS:
        for durability, each, at_most in (("normal", 250, 1.45), ("full", 100, 1.1)):
            mine, other = copy_of(ours, "threads"), copy_of(raw, "threads")
            yield concurrency.measure_threads(
                mine, other, threads=8, each=each, durability=durability, at_most=at_most, **many
            )
    if options.only in "insert_event, 4 processes" and rows == FULL_ROWS:
        mine, other = copy_of(ours, "processes"), copy_of(raw, "processes")
        yield concurrency.measure_processes(
            mine, other, processes=4, each=500, durability="normal", at_most=1.3, **many
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="rows of each table")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each side; the median of them counts")
    parser.add_argument("--only", default="", metavar="TEXT", help="only operations with this in their name")
    parser.add_argument("--server", action="store_true", help="measure on PostgreSQL too, on a server of its own")
    parser.add_argument("--peers", action="store_true", help="compare with other libraries too (extra: bench)")
    parser.add_argument("--folder", type=Path, help="where the files are made: a disk, to measure what a disk costs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure into this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table into this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios into this SVG file (extra: bench)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
