"""What callers pass in, checked once at the door: inside, everything is typed."""

import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, NotRequired, TypedDict, TypeVar

from moai_flow.memory.enums import EventTypeLike, Vocabulary
from moai_flow.memory.errors import InvalidInputError
from moai_flow.memory.types import is_unicode

V = TypeVar("V", bound=Vocabulary)

#: The largest number that an INTEGER column holds.
LARGEST = 2**63 - 1


class EventData(TypedDict):
    """What `SwarmDB.insert_event` takes: an event before it is stored."""

    event_type: EventTypeLike
    agent_id: str
    agent_type: str
    timestamp: NotRequired[datetime | str]
    metadata: NotRequired[dict[str, Any] | None]


def parse(vocabulary: type[V], value: str, *, field: str) -> V:
    """Return the listed member for *value*.

    Raises:
        InvalidInputError: If the vocabulary does not list *value*.
    """
    try:
        member = vocabulary(value)
    except ValueError:
        member = None
    if member is None or not member.is_listed:
        raise InvalidInputError(field, value, "one of " + ", ".join(repr(str(word)) for word in vocabulary))
    return member


def recognise(vocabulary: type[V], value: str, *, field: str) -> V:
    """Return the member to look for: a listed one, or an unlisted one that was read from a row.

    Raises:
        InvalidInputError: If *value* is a plain string that the vocabulary does not list.
    """
    if not isinstance(value, vocabulary):
        return parse(vocabulary, value, field=field)
    _storable(value.value, field)
    return value


def recognise_filter(vocabulary: type[V], value: str | None, *, field: str) -> V | None:
    """Return the member to filter by, or None for any.

    Raises:
        InvalidInputError: As `recognise`.
    """
    return None if value is None else recognise(vocabulary, value, field=field)


def recognise_filters(vocabulary: type[V], values: Iterable[str] | str | None, *, field: str) -> list[V] | None:
    """Return the members to filter by, or None for any.

    Raises:
        InvalidInputError: As `recognise`, or if there is none.
    """
    return _each(values, partial(recognise, vocabulary), field)


def text(value: str, *, field: str) -> str:
    """Return *value* if it can name something: text that is not empty.

    Raises:
        InvalidInputError: If it is no text, empty, or holds NUL or a lone surrogate, which not every database keeps.
    """
    if not isinstance(value, str) or not value:
        raise InvalidInputError(field, value, "text that is not empty")
    return _storable(value, field)


def text_filter(value: str | None, *, field: str) -> str | None:
    """Return the text to search for. Empty text is a filter like any other, None is none.

    Raises:
        InvalidInputError: If it is no text, or holds NUL or a lone surrogate.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidInputError(field, value, "text, or None for any")
    return _storable(value, field)


def text_filters(values: Iterable[str] | str | None, *, field: str) -> list[str] | None:
    """Return the texts to search for, or None for any. Empty text is one like any other.

    Raises:
        InvalidInputError: If there is none, or one is no text, or holds NUL or a lone surrogate.
    """
    return _each(values, _searched_text, field)


def _searched_text(value: str, *, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidInputError(field, value, "text")
    return _storable(value, field)


T = TypeVar("T")


def _each(values: Iterable[str] | str | None, check: Callable[..., T], field: str) -> list[T] | None:
    """Return what *check* makes of each of *values*; one by itself is a collection of one."""
    if values is None:
        return None
    if isinstance(values, str):
        return [check(values, field=field)]
    if not isinstance(values, Iterable):
        raise InvalidInputError(field, values, "one, a collection of them, or None for any")
    found = [check(value, field=f"{field}[{index}]") for index, value in enumerate(values)]
    if not found:
        raise InvalidInputError(field, values, "at least one, or None for any")
    return found


def _storable(value: str, field: str) -> str:
    if "\0" in value:
        raise InvalidInputError(field, value, "text without \\u0000")
    if not is_unicode(value):
        raise InvalidInputError(field, value, "text without lone surrogates")
    # A subclass, such as a member of the caller's own enum, would reach the driver as it is.
    return value if type(value) is str else str.__str__(value)


def moment(value: datetime | str, *, field: str) -> datetime:
    """Return the moment in UTC. A naive one is local time, as `datetime.astimezone` has it.

    Raises:
        InvalidInputError: If it is neither a datetime nor ISO-8601 text, or outside the years 1 to 9999 in UTC.
    """
    try:
        parsed = datetime.fromisoformat(value) if isinstance(value, str) else value
        return parsed if parsed.tzinfo is UTC else parsed.astimezone(UTC)
    except (ValueError, OverflowError, OSError, AttributeError, TypeError):
        raise InvalidInputError(field, value, "a datetime or ISO-8601 text such as '2025-11-30T10:00:00Z'") from None


def moment_filter(value: datetime | str | None, *, field: str) -> datetime | None:
    """Return the moment to compare with, or None for no bound.

    Raises:
        InvalidInputError: As `moment`.
    """
    return None if value is None else moment(value, field=field)


def whole(value: int, *, field: str, least: int = 0) -> int:
    """Return *value* if it is a whole number of at least *least* that a column holds.

    Raises:
        InvalidInputError: If it isn't.
    """
    if type(value) is not int or not least <= value <= LARGEST:
        raise InvalidInputError(field, value, f"a whole number from {least} to {LARGEST}")
    return value


def whole_or_none(value: int | None, *, field: str, least: int = 0) -> int | None:
    """Return *value* if it is None, or else as `whole`.

    Raises:
        InvalidInputError: As `whole`.
    """
    return None if value is None else whole(value, field=field, least=least)


def number(value: float, *, field: str) -> float:
    """Return *value* as a finite float.

    Raises:
        InvalidInputError: If it is no number, NaN, an infinity, or too large for a float.
    """
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass  # An int beyond the largest float: refused like the rest.
    raise InvalidInputError(field, value, "a finite number")


def json_object(value: dict[str, Any] | None, *, field: str) -> dict[str, Any]:
    """Return *value* if it is a dict; None is an empty one. Its content is checked where it is encoded.

    Raises:
        InvalidInputError: If it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidInputError(field, value, "a dict, which becomes a JSON object")
    return value
