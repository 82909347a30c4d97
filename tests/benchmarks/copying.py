"""Moving a whole database: `copy_database` beside the driver's own COPY, which neither resumes nor verifies."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

from moai_flow.memory import SwarmDB
from moai_flow.memory.models import TABLES, columns, new_id
from moai_flow.memory.transfer import copy_database
from moai_flow.memory.types import ISOText, UTCDateTime

from .dataset import build
from .measuring import Measurement, compare, timed
from .raw import connect
from .server import plain_url, test_server

#: Rows of each table. The figure is for one row, so it counts that there are many, not how many.
ROWS = 20_000

#: Those that hold rows to copy: the last is about the database itself.
_MODELS = TABLES[:-1]


def measurements(folder: Path, only: str, *, rounds: int) -> Iterator[Measurement]:
    """Yield both directions, if *only* is in their names, on a server of their own."""
    names = ("copy, file to PostgreSQL", "copy, PostgreSQL to file")
    if not any(only in name for name in names):
        return
    file = folder / "copied.db"
    build(file, ROWS, new_id)
    with test_server().running() as server:
        filled = server.create_database()
        SwarmDB(url=filled).close()
        by_copy(file, filled)

        @contextmanager
        def databases() -> Iterator[str]:
            url = server.create_database()
            SwarmDB(url=url).close()
            yield url
            server.drop_database(url)

        @contextmanager
        def files() -> Iterator[Path]:
            path = folder / f"target-{next(numbers)}.db"
            SwarmDB(path).close()
            yield path
            for left in folder.glob(f"{path.name}*"):
                left.unlink()

        numbers = count()
        sides: list[tuple[Callable[[], float], Callable[[], float]]] = [
            (lambda: _into(databases(), file, by_swarmdb), lambda: _into(databases(), file, by_copy)),
            (lambda: _into(files(), filled, by_swarmdb), lambda: _into(files(), filled, by_copy_back)),
        ]
        for name, (ours, theirs) in zip(names, sides, strict=True):
            if only in name:
                calls = ROWS * len(_MODELS)
                yield compare(
                    f"{name}, a row",
                    ours,
                    theirs,
                    rounds=max(3, rounds // 3),
                    calls=calls,
                    against="COPY of psycopg",
                    rows=ROWS,
                )


def _into(target: Any, source: Any, copy: Callable[[Any, Any], None]) -> float:
    """Return how long a copy into a new, empty target takes."""
    with target as place:
        return timed(lambda: copy(source, place))


def by_swarmdb(source: str | Path, target: str | Path) -> None:
    """Copy with SwarmDB, which verifies what it copied."""
    with ExitStack() as stack:
        original, made = (stack.enter_context(_opened(place)) for place in (source, target))
        copy_database(original, made)


def _opened(place: str | Path) -> SwarmDB:
    return SwarmDB(place) if isinstance(place, Path) else SwarmDB(url=place)


def by_copy(source: Path, target: str) -> None:
    """Copy from a file to a server with nothing but the drivers."""
    with (
        closing(sqlite3.connect(source)) as rows,
        psycopg.connect(plain_url(target), options="-c TimeZone=UTC") as server,
    ):
        for model in _MODELS:
            names = ", ".join(column.name for column in columns(model))
            table = str(model.__tablename__)
            with server.cursor() as cursor, cursor.copy(f"COPY {table} ({names}) FROM STDIN".encode()) as copy:
                for row in rows.execute(f"SELECT {names} FROM {table}"):
                    copy.write_row(row)


def by_copy_back(source: str, target: Path) -> None:
    """Copy from a server to a file with nothing but the drivers."""
    with psycopg.connect(plain_url(source), options="-c TimeZone=UTC") as server, closing(connect(target)) as file:
        file.execute("BEGIN")
        for model in _MODELS:
            table, names = str(model.__tablename__), [column.name for column in columns(model)]
            texts = ", ".join(_as_text(column) for column in columns(model))
            marks = ", ".join("?" * len(names))
            insertion = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})"
            query = f"COPY (SELECT {texts} FROM {table} ORDER BY 1) TO STDOUT"
            with server.cursor() as cursor, cursor.copy(query.encode()) as copy:
                file.executemany(insertion, copy.rows())
        file.execute("COMMIT")


def _as_text(column: Any) -> str:
    """Return a column as SQLite is to hold it."""
    if isinstance(column.type, ISOText):
        return f"""to_char({column.name}, 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')"""
    if isinstance(column.type, UTCDateTime):
        return f"to_char({column.name}, 'YYYY-MM-DD HH24:MI:SS')"
    return str(column.name)
