"""What `swarmdb export` writes: the rows of a table, for programs that know nothing of SwarmDB."""

import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from moai_flow.memory import InvalidInputError, StorageError, SwarmDB
from moai_flow.memory.cli import show
from moai_flow.memory.engine import path_of_file
from moai_flow.memory.files import belong_together, put_in_place
from moai_flow.memory.models import Record, columns
from moai_flow.memory.reading import StoredTable, count
from moai_flow.memory.statements import Row
from moai_flow.memory.types import (
    Count,
    EnumText,
    ISOText,
    JSONObjectText,
    JSONText,
    Plain,
    Real,
    UTCDateTime,
    encode_iso,
)

#: Turns a column's values, which are as `StoredTable` gives them, into what is written.
Column = Callable[[Sequence[Any]], Sequence[Any]]


class Format(StrEnum):
    """How rows are written."""

    JSONL = "jsonl"  #: A JSON object a line.
    CSV = "csv"  #: RFC 4180, with a row of names first.


class Lines:
    """Rows as lines of JSON: by column name, in the schema's order, JSON inside as JSON."""

    head = b""

    def __init__(self, model: type[Record]) -> None:
        self._columns = [_json_column(column.type) for column in columns(model)]
        self._line = "{%s}\n" % ",".join(f'"{column.name}":%s' for column in columns(model))  # noqa: UP031

    def encode(self, rows: Sequence[Row]) -> bytes:
        """Return the lines of *rows*."""
        return "".join(map(self._line.__mod__, _by_row(self._columns, rows))).encode()


class Cells:
    """Rows as CSV. What a row does not say is an empty cell."""

    def __init__(self, model: type[Record], *, escape_formulas: bool) -> None:
        self.head = _cells([[column.name for column in columns(model)]])
        self._columns = [_csv_column(column.type, escape_formulas=escape_formulas) for column in columns(model)]

    def encode(self, rows: Sequence[Row]) -> bytes:
        """Return the lines of *rows*."""
        return _cells(_by_row(self._columns, rows))


def _cells(rows: Iterator[Sequence[Any]] | Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _by_row(encoders: Sequence[Column], rows: Sequence[Row]) -> Iterator[tuple[Any, ...]]:
    by_column = zip(encoders, zip(*rows, strict=True), strict=True)
    return zip(*(encode(values) for encode, values in by_column), strict=True)


# JSON says no more than it says, so each kind of value is written by its own rule, without a dict of the row.


def _each(encode: Callable[[Any], Any]) -> Column:
    return lambda values: list(map(encode, values))


_quoted = json.JSONEncoder(ensure_ascii=False).encode


def _json_column(kind: Any) -> Column:
    match kind:
        case JSONObjectText():
            return _each(lambda text: "{}" if text is None else _strict(text))
        case JSONText():
            return _each(lambda text: "null" if text is None else _strict(text))
        case ISOText() | UTCDateTime():
            return _each(lambda moment: f'"{encode_iso(moment)}"')
        case Plain() | EnumText():
            return _each(_quoted)
        case Real():
            return _each(lambda value: repr(value + 0.0) if value is not None and math.isfinite(value) else "null")
        case Count():
            return _each(lambda value: value or 0)
        case _:
            return _each(lambda value: "null" if value is None else value)


def _csv_column(kind: Any, *, escape_formulas: bool) -> Column:
    match kind:
        case JSONObjectText():
            return _each(lambda text: "{}" if text is None else _strict(text))
        case JSONText():
            return _each(lambda text: None if text is None else _strict(text))
        case ISOText() | UTCDateTime():
            return _each(encode_iso)
        case Plain() | EnumText() if escape_formulas:
            return _each(lambda text: f"'{text}" if text.startswith(_FORMULA) else text)
        case Real():
            return _each(lambda value: None if value is None else value + 0.0)
        case Count():
            return _each(lambda value: value or 0)
        case _:
            return lambda values: values


#: How a cell begins that a spreadsheet runs: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_STRING = r'"(?:[^"\\]++|\\.)*+"'
_AS_WANTED = re.compile(rf'(?:{_STRING}|[^"\sNI]++)*+')
_PIECE = re.compile(rf'{_STRING}|[^"\s]++')
_NO_NUMBER = re.compile(rf"({_STRING})|-?Infinity|NaN")


def _strict(text: str) -> str:
    """Return stored JSON to the letter, but for spaces between values, and null for numbers that JSON doesn't have."""
    if _AS_WANTED.fullmatch(text):
        return text
    if "NaN" in text or "Infinity" in text:
        text = _NO_NUMBER.sub(lambda found: found[1] or "null", text)
    return "".join(_PIECE.findall(text))


# Where it goes


@contextmanager
def standard_output() -> Iterator[BinaryIO]:
    """Give standard output, which takes UTF-8 whatever the terminal would."""
    if sys.stdout is None:  # The shell has closed it.
        with Path(os.devnull).open("wb") as nowhere:
            yield nowhere
    else:
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()


def target_of(given: str, own: Path | None, *, overwrite: bool) -> Path:
    """Return the file to write, links followed; *own* is the database's.

    Raises:
        InvalidInputError: If it is a folder, something else that is no file, or the database, with the files beside it
            that hold what was committed last.
        StorageError: If it exists and is not to be replaced, or if the system can't look there.
    """
    target = path_of_file(given, field="--output").resolve()
    exists = target.exists()
    if exists and not target.is_file():
        raise InvalidInputError("--output", given, "the path of a file")
    if own is not None and belong_together(target, own):
        raise InvalidInputError("--output", given, "a file that is not the database itself")
    if exists and not overwrite:
        raise _exists(given)
    return target


def _exists(path: object) -> StorageError:
    return StorageError(f"{path} exists; --overwrite replaces it")


@contextmanager
def whole_file(target: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Give a file that takes the place of *target* when the block ends, and is gone if it raises.

    Raises:
        StorageError: If it can't be written, or if somebody else has made *target* meanwhile.
    """
    unfinished = target.with_name(f"{target.name}.{uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(unfinished, target, overwrite=overwrite)
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        raise StorageError(f"{target}: it can't be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def write(
    db: SwarmDB,
    model: type[Record],
    form: Lines | Cells,
    target: BinaryIO,
    bounds: Mapping[str, datetime],
) -> int:
    """Write the rows of a table, as they are at this moment, and return how many those are.

    Raises:
        CorruptDataError: If a row can't be decoded. Those before it were written.
        StorageError: If the database can't be read.
    """
    written = 0
    console = show.console(stderr=True)
    # On one terminal the bar and the rows would write over each other.
    is_seen = console.is_interactive and not target.isatty()
    with db._block(readonly=True) as block, show.progress(console, is_seen=is_seen) as progress:
        total = db._tuples(count(model, frozenset(bounds)), bounds)[0][0] if is_seen else None
        table = StoredTable(db, model, block.held.connection.dialect)
        bar = progress.add_task(f"export {table.name}", total=total)
        target.write(form.head)
        with closing(table.chunks(block.held.raw, bounds)) as chunks:
            for rows in chunks:
                target.write(form.encode(rows))
                written += len(rows)
                progress.update(bar, completed=written)
    return written
