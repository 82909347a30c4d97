"""How answers look: JSON for programs, tables for people."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from moai_flow.memory import CorruptDataError, ForeignTime, KeptRows, TableFault, UnlistedValue
from moai_flow.memory.models import Record

_BRIEF = 200

#: What a name may take of a line: as much as a UUID.
_NAME_WIDTH = 36


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return standard output, or standard error, where ``[brackets]`` and ``:colons:`` in data mean nothing.

    Its width is the terminal's, or what is given.
    """
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def progress(terminal: Console, *, is_seen: bool) -> Progress:
    """Return what shows bars while something is done, or nothing where nobody could see them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=terminal, disable=not is_seen)


def line(text: str) -> None:
    """Print a line, as long as it may be."""
    typer.echo(visible(text))


def counted(number: int, one: str, many: str) -> str:
    """Return a number of things, in words that fit it."""
    return f"{number:,} {one if number == 1 else many}" if number else f"no {many}"


def as_json(value: Any) -> None:
    """Print JSON: rows as objects by column name, times as ISO-8601, what JSON can't say as null."""
    typer.echo(json.dumps(_plain(value), indent=2))


def as_json_line(value: Any) -> None:
    """Print the same JSON on one line, at once."""
    typer.echo(json.dumps(_plain(value), separators=(",", ":")))


def name(heading: str) -> Column:
    """Return a column of names: one stays on its line while anything else can give way, unless it is very long."""
    return Column(heading, no_wrap=True, overflow="fold")


def text(heading: str) -> Column:
    """Return a column that shows all of its text, on as many lines as that takes."""
    return Column(heading, overflow="fold")


def time(heading: str) -> Column:
    """Return a column of times, with the hour under the day where there is no room beside it."""
    return Column(heading, min_width=len("2025-11-30"))


def number(heading: str) -> Column:
    """Return a column of numbers."""
    return Column(heading, justify="right", no_wrap=True)


def table(
    title: str, columns: Iterable[Column], rows: Iterable[Iterable[Any]], *, expendable: Sequence[str] = ()
) -> None:
    """Print a table, or that there is nothing to print. A tuple in a row is a cell of several lines.

    The columns with the headings in *expendable* are left out, in that order, as far as a terminal has no room for all.
    Where there is no terminal, such a table is as wide as it has to be.
    """
    kept = list(columns)
    cells = [tuple(map(_cell, row)) for row in rows]
    terminal = console()
    if expendable:
        widths = [_width(column, [row[place] for row in cells]) for place, column in enumerate(kept)]
        if terminal.is_terminal:
            headings = [str(column.header) for column in kept]
            places = _fitting(headings, widths, expendable, terminal.width)
            kept = [kept[place] for place in places]
            cells = [tuple(row[place] for place in places) for row in cells]
        else:
            terminal = console(width=max(terminal.width, _total(widths)))
    grid = Table(*kept, title=title, box=SIMPLE_HEAD, show_edge=False, title_justify="left", title_style="bold")
    for row in cells:
        grid.add_row(*row)
    for column, shown in zip(grid.columns, zip(*cells, strict=True), strict=False):
        longest = max(cell_len(line) for cell in shown for line in cell.split("\n"))
        if column.overflow == "fold" and longest > _NAME_WIDTH:
            column.no_wrap, column.min_width = False, _NAME_WIDTH if column.no_wrap else None
    terminal.print(grid if grid.row_count else f"{title}: none", "", sep="\n")


def _fitting(headings: Sequence[str], widths: Sequence[int], expendable: Iterable[str], room: int) -> list[int]:
    """Return the places of the columns that are kept in so much room."""
    kept = dict(zip(headings, widths, strict=True))
    for heading in expendable:
        if _total(kept.values()) > room:
            del kept[heading]
    return [place for place, heading in enumerate(headings) if heading in kept]


def _width(column: Column, cells: Iterable[str]) -> int:
    lines = [line for cell in (str(column.header), *cells) for line in cell.split("\n")]
    longest = max(map(cell_len, lines))
    return min(longest, _NAME_WIDTH) if column.overflow == "fold" else longest


def _total(widths: Iterable[int]) -> int:
    """Return how wide a table with columns of these *widths* is: each has a blank on both sides, and a line between."""
    return sum(width + 3 for width in widths) - 1


def facts(about: Mapping[str, Any]) -> None:
    """Print what is known about one thing, a line a fact, as long as it may be."""
    width = max(map(len, about))
    for name, value in about.items():
        line(f"{name:{width}}  {_cell(value)}")
    line("")


def shortened(name: str, width: int) -> str:
    """Return *name*, without its middle if it is wider than *width*: ids that were made together begin alike."""
    if cell_len(name) <= width:
        return name
    width = max(width, 1)
    tail_width = (width - 1) // 2
    head, tail = name[: width - 1 - tail_width], name[-tail_width:] if tail_width else ""
    while cell_len(head) > width - 1 - tail_width:
        head = head[:-1]
    while cell_len(tail) > tail_width:
        tail = tail[1:]
    return f"{head}…{tail}"


def span(length: timedelta) -> str:
    """Return a length of time in its two largest units."""
    seconds = max(int(length.total_seconds()), 0)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if not minutes:
        return f"{seconds}s"
    if not hours:
        return f"{minutes}m{seconds % 60:02}s"
    return f"{hours}h{minutes % 60:02}m" if not days else f"{days}d{hours % 24:02}h"


def brief(value: Any) -> str:
    """Return the beginning of a value's JSON, enough to recognise it by."""
    shown = _compact(value)
    return shown if len(shown) <= _BRIEF else shown[:_BRIEF] + "…"


def _compact(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case str():
            return visible(value)
        case tuple():
            return "\n".join(map(_cell, value))
        case _:
            return visible(_compact(value))


def visible(text: str) -> str:
    """Return *text* with escapes for what would move the cursor, or can't be printed at all."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _plain(value: Any) -> Any:
    match value:
        case Record():
            return {column: _plain(value[column]) for column in value.keys()}  # noqa: SIM118 (a row, not a dict)
        case CorruptDataError() | UnlistedValue() | ForeignTime() | KeptRows() | TableFault():
            return _plain(vars(value))
        case datetime():
            return value.isoformat()
        case float() if not math.isfinite(value):
            return None
        case bytes():
            return value.hex()
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
