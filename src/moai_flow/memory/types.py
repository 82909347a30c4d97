"""How values are kept: JSON text, ISO-8601 text, enums by value. PostgreSQL has types of its own for JSON and times.

Each column type encodes what Python passes in and decodes what a row holds. An encoder raises `InvalidInputError`
and a decoder `ValueError`; `statements` turns the latter into a `CorruptDataError` that names table, column and row.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import from_json, to_json
from sqlalchemy import (
    JSON,
    REAL,
    TIMESTAMP,
    BigInteger,
    ColumnElement,
    DateTime,
    Dialect,
    Double,
    Integer,
    Text,
    TypeDecorator,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import TypeEngine

from moai_flow.memory.enums import Vocabulary
from moai_flow.memory.errors import InvalidInputError

PLAIN_JSON = "JSON: None, bool, int, finite float, str, list, and dict with str keys"
_DUMPED = (str, int, bool, type(None), datetime, date, time, timedelta, Decimal, UUID, Enum, Path)


def utc_now() -> datetime:
    """Return the present moment, in UTC."""
    return datetime.now(UTC)


def is_unicode(text: str) -> bool:
    """Whether *text* has no lone surrogates, which no encoding can store."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


# JSON


def encode_json(value: Any, *, field: str) -> str:
    r"""Return *value* as JSON text that decodes to the same value.

    Plain JSON comes back equal. Tuples, dates and times, UUIDs, decimals, paths, enums, dataclasses and pydantic
    models are stored as the JSON they dump to.

    Raises:
        InvalidInputError: If *value* is or holds something that JSON can't say: NaN, an infinity, a set, bytes, a key
            that is no string, ``\u0000``, a lone surrogate, an object of another kind, or more than 200 levels.
    """
    try:
        # By default pydantic turns NaN into null; as a constant it stays visible.
        encoded = to_json(value, inf_nan_mode="constants")
        # Reading it back shows, faster than a walk would, whether anything was changed on the way.
        unchanged = from_json(encoded, allow_inf_nan=False) == value and b"\\u0000" not in encoded
    except ValueError as error:
        with suppress(RecursionError):
            _refuse_oddities(value, field)
        raise InvalidInputError(field, value, f"{PLAIN_JSON} ({error})") from error
    if not unchanged:
        _refuse_oddities(value, field)
        _refuse_oddities(from_json(encoded), field)  # What enums and serializers turned it into.
    return encoded.decode()


def decode_json(text: str) -> Any:
    """Return the value of JSON *text*.

    Raises:
        ValueError: If *text* is not JSON.
    """
    try:
        return from_json(text)
    except TypeError:
        raise ValueError("not UTF-8") from None  # It was read leniently.
    except ValueError:
        # Python's own encoder, which older programs used, writes lone surrogates and deeper nesting.
        try:
            return json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None


def _refuse_oddities(value: Any, field: str, *, typed: bool = False) -> None:
    """Raise for what JSON would change without a word. Inside a model or dataclass, *typed* fields restore sets."""
    match value:
        case str():
            if "\0" in value:
                raise InvalidInputError(field, value, "text without \\u0000")
            if not is_unicode(value):
                raise InvalidInputError(field, value, "text without lone surrogates")
        case float():
            if not math.isfinite(value):
                raise InvalidInputError(field, value, "a finite number")
        case dict():
            if typed and len(from_json(to_json(dict.fromkeys(value)))) < len(value):
                raise InvalidInputError(field, value, "keys that differ as text")
            for key, item in value.items():
                if not isinstance(key, str) and not typed:
                    raise InvalidInputError(f"{field}[{key!r}]", key, "a key that is a string")
                if isinstance(key, str):
                    _refuse_oddities(key, f"{field}[{key!r}]")
                _refuse_oddities(item, f"{field}[{key!r}]", typed=typed)
        case Enum():
            _refuse_oddities(value.value, field, typed=typed)
        case list() | tuple():
            _refuse_in_each(value, field, typed=typed)
        case set() | frozenset() if typed:
            _refuse_in_each(value, field, typed=True)
        case BaseModel():
            for name, item in value:
                _refuse_oddities(item, f"{field}.{name}", typed=True)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for member in dataclasses.fields(value):
                _refuse_oddities(getattr(value, member.name), f"{field}.{member.name}", typed=True)
        case _ if not isinstance(value, _DUMPED) and not typed:
            raise InvalidInputError(field, value, PLAIN_JSON)


def _refuse_in_each(items: Iterable[Any], field: str, *, typed: bool) -> None:
    for index, item in enumerate(items):
        _refuse_oddities(item, f"{field}[{index}]", typed=typed)


# Time


def encode_iso(moment: datetime) -> str:
    """Return fixed-width ISO-8601 in UTC, so that the order of texts is the order of times."""
    return in_utc(moment).isoformat(timespec="microseconds")


def encode_datetime(moment: datetime) -> str:
    """Return UTC as ``CURRENT_TIMESTAMP`` writes it, with a fraction only where it isn't zero."""
    return in_utc(moment).isoformat(" ").removesuffix("+00:00")


def in_utc(moment: datetime) -> datetime:
    """Return *moment* in UTC; a naive one is local time."""
    return moment if moment.tzinfo is UTC else moment.astimezone(UTC)


def decode_time(text: str) -> datetime:
    """Return the UTC moment that a stored *text* means.

    A text with a zone says it itself. Without one, a space means UTC, as ``CURRENT_TIMESTAMP`` writes it, and a ``T``
    means this process's local time, as older programs write it.

    Raises:
        ValueError: If *text* is no date and time.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is UTC:
        return moment
    if moment.tzinfo is None and text[10:11] != "T":
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{text!r} is outside the years 1 to 9999 in UTC") from None


# Columns

# Each type gives SQLAlchemy its processors as plain functions. Made by TypeDecorator out of process_bind_param and
# process_result_value, they would wrap each value in a call that costs more than the work inside.

Encoder: TypeAlias = Callable[[Any], Any]
Decoder: TypeAlias = Callable[[Any], Any]

_TEXT: frozenset[type] = frozenset({str})


def is_postgresql(dialect: Dialect) -> bool:
    """Whether *dialect* is PostgreSQL's; else it is SQLite's."""
    return dialect.name == "postgresql"


T = TypeVar("T")


class Stored(TypeDecorator[T], Generic[T]):
    """A column type that knows what its values are in the driver's hands."""

    impl: Any = Text

    #: The types of stored values, as sqlite3 gives them.
    kinds: ClassVar[frozenset[type]] = _TEXT

    def stored_kinds(self, dialect: Dialect) -> frozenset[type]:
        """Return the types of stored values as the driver gives them."""
        return self.kinds


class Plain(Stored[str]):
    """Text, which has the same order on every database: that of its code points."""

    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return Text(collation="C") if is_postgresql(dialect) else self.impl_instance

    def bind_processor(self, dialect: Dialect) -> Encoder | None:
        return None

    def result_processor(self, dialect: Dialect, coltype: object) -> Decoder | None:
        return None


class _JSON(Stored[Any]):
    """JSON, which PostgreSQL keeps to the letter in its type of that name."""

    reads_null = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return JSON() if is_postgresql(dialect) else self.impl_instance

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return _AsText(column, self)


class _AsText(ColumnElement[Any]):
    """A JSON column as it is stored: a driver would decode it by its own rules, or by those of the engine's owner."""

    inherit_cache = True

    def __init__(self, column: ColumnElement[Any], type_: TypeEngine[Any]) -> None:
        self.column = column
        self.type = type_

    _traverse_internals = [("column", InternalTraversal.dp_clauseelement)]  # noqa: RUF012 (SQLAlchemy's way)


@compiles(_AsText)
def _compile_as_text(element: _AsText, compiler: SQLCompiler, **options: Any) -> str:
    column = compiler.process(element.column, **options)
    return f"{column}::text" if is_postgresql(compiler.dialect) else column


class JSONText(_JSON):
    """A JSON value. NULL reads as None."""

    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Encoder:
        return partial(encode_json, field="value")

    def result_processor(self, dialect: Dialect, coltype: object) -> Decoder:
        return lambda value: None if value is None else decode_json(value)


class JSONObjectText(_JSON):
    """A JSON object. NULL reads as an empty one."""

    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Encoder:
        return lambda value: encode_json({} if value is None else value, field="metadata")

    def result_processor(self, dialect: Dialect, coltype: object) -> Decoder:
        return decode_json_object


def decode_json_object(text: str | None) -> dict[str, Any]:
    """Return the dict of a JSON object's *text*; an empty one for NULL.

    Raises:
        ValueError: If *text* is not JSON, or not an object.
    """
    if text is None:
        return {}
    try:
        decoded = from_json(text)
    except (ValueError, TypeError):
        decoded = decode_json(text)
    if not isinstance(decoded, dict):
        raise ValueError(f"a JSON object was expected, got {type(decoded).__name__}")
    return decoded


V = TypeVar("V", bound=Vocabulary)


class EnumText(Stored[V], Generic[V]):
    """A member of a vocabulary, stored by its value."""

    cache_ok = True

    def __init__(self, vocabulary: type[V]) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return Text(collation="C") if is_postgresql(dialect) else self.impl_instance

    def bind_processor(self, dialect: Dialect) -> Encoder:
        return lambda value: value.value if isinstance(value, Vocabulary) else value

    def result_processor(self, dialect: Dialect, coltype: object) -> Decoder:
        return _Members(self.vocabulary).__getitem__


class _Members(dict[str | None, V | None], Generic[V]):
    """The members of a vocabulary by stored value. A word that it does not list is made a member when it is met."""

    def __init__(self, vocabulary: type[V]) -> None:
        super().__init__({member.value: member for member in vocabulary})
        self[None] = None
        self._vocabulary = vocabulary

    def __missing__(self, value: str) -> V:
        return self._vocabulary.read(value)  # Not kept: other programs may write any number of words.


class _Moment(Stored[datetime]):
    """A moment: text on SQLite, TIMESTAMPTZ on PostgreSQL."""

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return TIMESTAMP(timezone=True) if is_postgresql(dialect) else self.impl_instance

    def bind_processor(self, dialect: Dialect) -> Encoder:
        encode = in_utc if is_postgresql(dialect) else self.encode
        last: tuple[datetime | None, Any] = (None, None)

        def encode_unless_same(moment: datetime | None) -> Any:
            nonlocal last
            known, stored = last
            if moment is not known:  # Most rows of a batch have the very moment that the row before had.
                stored = None if moment is None else encode(moment)
                last = (moment, stored)
            return stored

        return encode_unless_same

    def result_processor(self, dialect: Dialect, coltype: object) -> Decoder:
        return _decode_moment if is_postgresql(dialect) else self.decode

    def stored_kinds(self, dialect: Dialect) -> frozenset[type]:
        return frozenset({datetime}) if is_postgresql(dialect) else self.kinds

    @staticmethod
    def encode(moment: datetime) -> str:
        raise NotImplementedError

    @staticmethod
    def decode(text: str | None) -> datetime | None:
        raise NotImplementedError


def _decode_moment(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.astimezone(UTC)


class ISOText(_Moment):
    """A moment, stored on SQLite as fixed-width ISO-8601 text in UTC."""

    cache_ok = True
    encode = staticmethod(encode_iso)

    @staticmethod
    def decode(text: str | None) -> datetime | None:
        if text is None:
            return None
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo is UTC else decode_time(text)


class UTCDateTime(_Moment):
    """A moment, stored on SQLite in a DATETIME column in UTC, as ``CURRENT_TIMESTAMP`` writes it."""

    impl = DateTime
    cache_ok = True
    encode = staticmethod(encode_datetime)

    @staticmethod
    def decode(text: str | None) -> datetime | None:
        if text is None:
            return None
        if text[10:11] == " ":
            with suppress(ValueError):  # It has a zone of its own, or is no time.
                return datetime.fromisoformat(f"{text}+00:00")  # A seventh of what replace(tzinfo=UTC) costs.
        return decode_time(text)


class AsStored(TypeDecorator[Any]):
    """A time as the database has it, for comparing with what a row held."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return TIMESTAMP(timezone=True) if is_postgresql(dialect) else self.impl_instance

    def bind_processor(self, dialect: Dialect) -> Encoder | None:
        return None


class Real(Stored[float]):
    """A float. RETURNING gives whole ones as int, since that is how SQLite keeps them: zero then has no sign."""

    impl = REAL
    cache_ok = True
    kinds = frozenset({float, int})

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return Double() if is_postgresql(dialect) else self.impl_instance

    def bind_processor(self, dialect: Dialect) -> Encoder | None:
        return None

    def result_processor(self, dialect: Dialect, coltype: object) -> Decoder:
        return lambda value: None if value is None else value + 0.0  # And -0.0, which a server keeps, becomes 0.0.


class EpochSeconds(Real):
    """A moment in seconds since the epoch: a float that a datetime can hold."""

    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Decoder:
        return lambda value: None if value is None else decode_epoch(value)


_YEAR_1, _YEAR_10000 = -62_135_596_800, 253_402_300_800


def decode_epoch(seconds: float) -> float:
    """Return *seconds* since the epoch as a float.

    Raises:
        ValueError: If no datetime holds that moment.
    """
    if not _YEAR_1 <= seconds < _YEAR_10000:
        raise ValueError("it is outside the years 1 to 9999")
    return seconds + 0.0


class Whole(Stored[int]):
    """A whole number of 64 bits."""

    impl = Integer
    cache_ok = True
    kinds = frozenset({int})

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return BigInteger() if is_postgresql(dialect) else self.impl_instance


class Count(Whole):
    """How many of something. NULL, which raw SQL may have left there, reads as none."""

    cache_ok = True
    reads_null = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Decoder:
        return lambda value: 0 if value is None else value
