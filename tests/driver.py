"""What reaches the driver: statements, counted where SQLAlchemy's events don't see them."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event


class Statements(list[str]):
    """The statements that were sent, in order; one that is sent for many rows counts once."""


def _connection_class(sent: Statements) -> type[sqlite3.Connection]:
    class Cursor(sqlite3.Cursor):
        def execute(self, sql: str, /, *parameters: Any) -> Any:
            sent.append(sql)
            return super().execute(sql, *parameters)

        def executemany(self, sql: str, parameters: Any, /) -> Any:
            sent.append(sql)
            return super().executemany(sql, parameters)

    class Connection(sqlite3.Connection):
        def cursor(self, factory: Any = Cursor) -> Any:
            return super().cursor(factory)

        def execute(self, sql: str, /, *parameters: Any) -> Any:
            return self.cursor().execute(sql, *parameters)

        def executemany(self, sql: str, parameters: Any, /) -> Any:
            return self.cursor().executemany(sql, parameters)

        def commit(self) -> None:
            if self.in_transaction:  # It sends nothing where there is nothing to end.
                sent.append("COMMIT")
            super().commit()

        def rollback(self) -> None:
            if self.in_transaction:
                sent.append("ROLLBACK")
            super().rollback()

    return Connection


@contextmanager
def counting() -> Iterator[Statements]:
    """Note every statement of the connections that are opened inside."""
    sent = Statements()
    factory = _connection_class(sent)

    def connect(dialect: object, record: object, arguments: list[Any], parameters: dict[str, Any]) -> None:
        parameters["factory"] = factory

    event.listen(Engine, "do_connect", connect)
    try:
        yield sent
    finally:
        event.remove(Engine, "do_connect", connect)
