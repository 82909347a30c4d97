"""Figures as a line, a table, JSON and a plot."""

import json
import platform
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .measuring import Measurement

RAW = "sqlite3"


def line(found: Measurement) -> str:
    """Return one measurement as one line of text."""
    verdict = "" if found.at_most is None else f"  {'ok' if found.is_met else 'OVER'} (at most {found.at_most})"
    name = found.name if found.against == RAW else f"{found.name} / {found.against}"
    return (
        f"{found.rows:>9,} {found.durability:6} {name:52} {found.ours_us:12.1f} us {found.theirs_us:12.1f} us "
        f"{found.ratio:6.2f} [{found.spread[0]:.2f} to {found.spread[1]:.2f}]{verdict}"
    )


def environment() -> dict[str, str]:
    """Return what the figures were measured with."""
    return {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "system": platform.system()}


def write_json(found: Iterable[Measurement], target: Path) -> None:
    """Write every figure."""
    document = {"environment": environment(), "measurements": [measurement.as_json() for measurement in found]}
    target.write_text(json.dumps(document, indent=1) + "\n")


def write_markdown(found: Sequence[Measurement], target: Path) -> None:
    """Write the tables of the docs: a row for each operation, a column for each size."""
    raw = [measurement for measurement in found if measurement.against == RAW]
    sizes = sorted({measurement.rows for measurement in raw})
    heads = ["Operation", "Durability", *(f"{size:,} rows" for size in sizes), "µs a call", "At most"]
    lines = _table(heads, (_row(group, sizes) for group in _by_operation(raw)), numbers_from=2)
    others = [measurement for measurement in found if measurement.against != RAW]
    if others:
        heads = ["Operation", "Against", "Durability", "Ratio", "µs a call", "µs a call there"]
        times = Counter((measurement.name, measurement.against) for measurement in others)
        rows = (
            [
                measurement.name
                if times[measurement.name, measurement.against] == 1
                else f"{measurement.name}, of {measurement.rows:,} rows",
                measurement.against,
                measurement.durability,
                f"**{measurement.ratio:.2f}**" if measurement.ratio > 1 else f"{measurement.ratio:.2f}",
                f"{measurement.ours_us:,.0f}",
                f"{measurement.theirs_us:,.0f}",
            ]
            for measurement in others
        )
        lines += ["", *_table(heads, rows, numbers_from=3)]
    target.write_text("\n".join(lines) + "\n")


def write_plot(found: Iterable[Measurement], target: Path) -> None:
    """Draw the ratios to raw `sqlite3` at the largest size as bars, as SVG."""
    import matplotlib as mpl  # An extra of its own brings it.
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "swarmdb"  # The same figures give the same file.
    groups = _by_operation([measurement for measurement in found if measurement.against == RAW])
    chosen = [group[-1] for group in groups if group[-1].durability != "full"]
    names = [measurement.name for measurement in chosen]
    figure = Figure(figsize=(8, 0.27 * len(chosen) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [measurement.ratio for measurement in chosen], color="#3f51b5", label="SwarmDB")
    marks = [(at, measurement.at_most) for at, measurement in enumerate(chosen) if measurement.at_most is not None]
    axes.plot([bar for _, bar in marks], [at for at, _ in marks], "|", color="#c62828", markersize=10, label="at most")
    axes.axvline(1, color="#616161", linewidth=1)
    axes.set_xlabel("multiple of raw sqlite3: 1 is equal, less is faster")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.legend(loc="upper right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(target, format="svg", metadata={"Date": None})


def _by_operation(found: Iterable[Measurement]) -> list[list[Measurement]]:
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in found:
        groups.setdefault((measurement.name, measurement.durability), []).append(measurement)
    return [sorted(group, key=lambda measurement: measurement.rows) for group in groups.values()]


def _row(group: list[Measurement], sizes: Sequence[int]) -> list[str]:
    ratios = {measurement.rows: f"{measurement.ratio:.2f}" for measurement in group}
    bars = {measurement.at_most for measurement in group} - {None}
    largest = group[-1]
    return [
        largest.name,
        largest.durability,
        *(ratios.get(size, "") for size in sizes),
        f"{largest.ours_us:,.0f}",
        " ".join(str(bar) for bar in bars),
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int) -> list[str]:
    rules = ["---:" if at >= numbers_from else "---" for at in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows)]
