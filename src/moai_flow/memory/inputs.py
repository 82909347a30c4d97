"""What callers pass in, checked once at the door: inside, everything is typed."""

import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NotRequired, TypedDict, TypeVar

from moai_flow.memory.enums import (
    AgentMetricTypeLike,
    EventTypeLike,
    SwarmMetricTypeLike,
    TaskResultLike,
    Vocabulary,
)
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


class TaskMetricData(TypedDict):
    """One of what `SwarmDB.store_task_metrics` takes: a finished task before it is stored."""

    task_id: str
    agent_id: str
    duration_ms: NotRequired[int | None]
    result: TaskResultLike
    tokens_used: NotRequired[int]
    files_changed: NotRequired[int]
    timestamp: NotRequired[datetime | str | None]


class AgentMetricData(TypedDict):
    """One of what `SwarmDB.store_agent_metrics` takes: a figure about an agent before it is stored."""

    agent_id: str
    metric_type: AgentMetricTypeLike
    value: float
    metadata: NotRequired[dict[str, Any] | None]
    timestamp: NotRequired[datetime | str | None]


class SwarmMetricData(TypedDict):
    """One of what `SwarmDB.store_swarm_metrics` takes: a figure about a whole swarm before it is stored."""

    swarm_id: str
    metric_type: SwarmMetricTypeLike
    value: float
    metadata: NotRequired[dict[str, Any] | None]
    timestamp: NotRequired[datetime | str | None]


def entries(given: dict[str, Any], shape: type[Any]) -> dict[str, Any]:
    """Return *given* if its keys are those of *shape*, a TypedDict. Their values are not looked at.

    Raises:
        InvalidInputError: If a key is missing or unknown.
    """
    required: frozenset[str] = shape.__required_keys__
    known = shape.__annotations__.keys()
    if not given.keys() <= known:
        raise InvalidInputError(min(given.keys() - known, key=str), given, f"only the keys {_listed(known)}")
    if not required <= given.keys():
        raise InvalidInputError(min(required - given.keys()), given, f"a dict with {_listed(required)}")
    return given


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def parse(vocabulary: type[V], value: str, *, field: str) -> V:
    """Return the listed member for *value*.

    Raises:
        InvalidInputError: If the vocabulary does not list *value*.
    """
    try:
        member = vocabulary._value2member_map_[value]  # A third of what calling the class costs.
    except (KeyError, TypeError):
        member = None
    if not isinstance(member, vocabulary):
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


def checked_clock(clock: Callable[[], datetime]) -> Callable[[], datetime]:
    """Return a clock that tells what *clock* does, and raises `InvalidInputError` where no age can be counted from it.

    A day before or after the moment is a moment, too, in every zone.
    """

    def now() -> datetime:
        present = clock()
        if not isinstance(present, datetime) or present.tzinfo is None or not 1 < present.year < 9999:
            raise InvalidInputError("clock", present, "a moment in the years 2 to 9998, aware of its zone")
        return present

    return now


def span(value: timedelta, *, field: str) -> timedelta:
    """Return *value* if it is a length of time greater than zero.

    Raises:
        InvalidInputError: If it isn't.
    """
    if not isinstance(value, timedelta) or value <= timedelta(0):
        raise InvalidInputError(field, value, "a timedelta greater than zero")
    return value


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


def flag(value: bool, *, field: str) -> bool:  # noqa: FBT001 (it is the value that is checked)
    """Return *value* if it is True or False.

    Raises:
        InvalidInputError: If it isn't.
    """
    if not isinstance(value, bool):
        raise InvalidInputError(field, value, "True or False")
    return value


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


# Many values at once. These take nothing that the functions above would not, but may refuse what those turn into
# another value, so a refusal says no more than that each value is to be looked at.


def texts(values: list[Any], *, field: str) -> list[str]:
    """Return *values* if each is plain text that `text` takes.

    Raises:
        InvalidInputError: If one may not be.
    """
    if not set(map(type, values)) <= {str} or not all(values):
        raise InvalidInputError(field, values, "text that is not empty")
    _storable("".join(values), field)
    return values


def wholes(values: list[Any], *, field: str) -> list[int]:
    """Return *values* if each is a number that `whole` takes.

    Raises:
        InvalidInputError: If one is not.
    """
    if not set(map(type, values)) <= {int} or (values and not 0 <= min(values) <= max(values) <= LARGEST):
        raise InvalidInputError(field, values, f"whole numbers from 0 to {LARGEST}")
    return values


def wholes_or_none(values: list[Any], *, field: str) -> list[int | None]:
    """Return *values* if each is None, or a number that `whole` takes.

    Raises:
        InvalidInputError: If one is not.
    """
    wholes([value for value in values if value is not None], field=field)
    return values


def members(vocabulary: type[V], values: list[Any], *, field: str) -> list[V]:
    """Return the listed members for *values*.

    Raises:
        InvalidInputError: If the vocabulary does not list one.
    """
    try:
        words = {word: parse(vocabulary, word, field=field) for word in set(values)}
    except TypeError:  # One can't be hashed.
        raise InvalidInputError(field, values, "words") from None
    return [words[word] for word in values]


def moments(values: list[Any], now: datetime, *, field: str) -> list[datetime]:
    """Return the moments in UTC, *now* where there is None.

    Raises:
        InvalidInputError: As `moment`.
    """
    return [now if value is None else moment(value, field=field) for value in values]
