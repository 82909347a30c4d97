"""Errors in place of statements, and before or after them, where the driver is called."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event


class Injector:
    """Raises an error at one statement of those that are sent while it is armed."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self._error: BaseException | None = None
        self._at = 0
        self._is_after = False

    @property
    def has_raised(self) -> bool:
        """Whether the error was raised."""
        return self._error is None

    def arm(self, at: int, error: BaseException | None, *, is_after: bool = False) -> None:
        """Count statements from 1, and raise *error* at number *at*: before it is run, or after it was."""
        self.sent, self._at, self._error, self._is_after = [], at, error, is_after

    def note(self, statement: str, *, is_after: bool) -> None:
        """Count a statement before it is run, and raise if it is the one."""
        if not is_after:
            self.sent.append(statement)
        if self._error is not None and is_after == self._is_after and len(self.sent) == self._at:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # Else its traceback would keep this frame, and this frame it.


def _sqlite(injector: Injector) -> type[sqlite3.Connection]:
    class Cursor(sqlite3.Cursor):
        def execute(self, sql: str, /, *parameters: Any) -> Any:
            injector.note(sql, is_after=False)
            super().execute(sql, *parameters)
            injector.note(sql, is_after=True)
            return self

        def executemany(self, sql: str, parameters: Any, /) -> Any:
            injector.note(sql, is_after=False)
            super().executemany(sql, parameters)
            injector.note(sql, is_after=True)
            return self

    class Connection(sqlite3.Connection):
        def cursor(self, factory: Any = Cursor) -> Any:
            return super().cursor(factory)

        def execute(self, sql: str, /, *parameters: Any) -> Any:
            return self.cursor().execute(sql, *parameters)

        def commit(self) -> None:
            injector.note("COMMIT", is_after=False)
            super().commit()
            injector.note("COMMIT", is_after=True)

        def rollback(self) -> None:
            injector.note("ROLLBACK", is_after=False)
            super().rollback()
            injector.note("ROLLBACK", is_after=True)

    return Connection


def _psycopg(injector: Injector) -> Any:
    import psycopg

    class Cursor(psycopg.Cursor[Any]):
        def execute(self, query: Any, *parameters: Any, **options: Any) -> Any:
            injector.note(str(query), is_after=False)
            super().execute(query, *parameters, **options)
            injector.note(str(query), is_after=True)
            return self

        def executemany(self, query: Any, *parameters: Any, **options: Any) -> None:
            injector.note(str(query), is_after=False)
            super().executemany(query, *parameters, **options)
            injector.note(str(query), is_after=True)

    class Connection(psycopg.Connection[Any]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.cursor_factory = Cursor

        def commit(self) -> None:
            injector.note("COMMIT", is_after=False)
            super().commit()
            injector.note("COMMIT", is_after=True)

        def rollback(self) -> None:
            injector.note("ROLLBACK", is_after=False)
            super().rollback()
            injector.note("ROLLBACK", is_after=True)

    return Connection


@contextmanager
def injecting() -> Iterator[Injector]:
    """Give what raises errors in the connections that are opened inside."""
    injector = Injector()

    def connect(dialect: Any, record: object, arguments: list[Any], parameters: dict[str, Any]) -> Any:
        if dialect.name == "postgresql":
            return _psycopg(injector).connect(*arguments, **parameters)
        parameters["factory"] = _sqlite(injector)
        return None

    event.listen(Engine, "do_connect", connect)
    try:
        yield injector
    finally:
        event.remove(Engine, "do_connect", connect)
