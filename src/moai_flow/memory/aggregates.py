"""Totals, percentiles and time buckets in SQL that give the same numbers, to the last digit, on every database.

A database's own sum() of whole numbers may overflow, and its sum of floats depends on the order of the rows. Here the
database adds up whole numbers that are small enough, which is exact in any order, and Python joins the sums and rounds
once. For percentiles, the database finds the values at the two ranks around each, and Python interpolates between them.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Dialect,
    Double,
    Select,
    String,
    and_,
    case,
    cast,
    extract,
    false,
    func,
    literal,
    literal_column,
    or_,
    select,
)

from moai_flow.memory.types import Real, Whole, is_postgresql

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)
_YEARS_BEFORE_1970 = 1970 * 366 * 86_400


def whole_number(number: int) -> ColumnElement[int]:
    """Return a constant."""
    # In the text, since a bind is as wide as its value on PostgreSQL, and an expression over it another one each time.
    return literal_column(str(number), BigInteger)


def how_many(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """Return the number of rows of a group of which *condition* is true."""
    return func.sum(case((condition, whole_number(1)), else_=whole_number(0)))


# Values that a column can't hold


def is_misplaced(columns: Iterable[Column[Any]], dialect: Dialect) -> ColumnElement[bool]:
    """Return whether a row holds, in one of *columns*, what can't be counted: SQLite takes anything anywhere.

    So it is text in a column of numbers, a float that is not finite, or a NULL where the schema allows none.
    """
    found: list[ColumnElement[bool]] = []
    for column in columns:
        kind = column.type
        if not is_postgresql(dialect):
            word = "'integer'" if isinstance(kind, Whole) else "'real'" if isinstance(kind, Real) else "'text'"
            is_other = func.typeof(column, type_=String) != literal_column(word)
            found.append(and_(is_other, column.is_not(None)) if column.nullable else is_other)
        if isinstance(kind, Real):
            found.append(~_is_finite(column))
    return or_(false(), *found)


def _is_finite(value: ColumnElement[float]) -> ColumnElement[bool]:
    # PostgreSQL takes NaN for larger than any number, and SQLite stores it as NULL.
    return func.abs(value) <= literal(sys.float_info.max, Double)


# Totals of whole numbers

_HALF = 32


def whole_parts(value: ColumnElement[int]) -> list[ColumnElement[Any]]:
    """Return the sums of the upper and the lower halves of whole numbers of 64 bits, for `whole_total`."""
    upper = value.bitwise_rshift(whole_number(_HALF))  # Arithmetic: it keeps the sign.
    lower = value.bitwise_and(whole_number((1 << _HALF) - 1))
    return [func.sum(upper), func.sum(lower)]


def whole_total(upper: Any, lower: Any) -> int:
    """Return the exact total of which SQL gave the parts; 0 of no rows."""
    return (int(upper or 0) << _HALF) + int(lower or 0)


# Totals of floats

_STEP, _CUT = 32, 26


def scale_of(value: ColumnElement[float]) -> ColumnElement[float]:
    """Return a power of two for each magnitude of floats, so that a value divided by it is below 2**32.

    Rows of the same scale can be added up by `float_parts`. It is NULL for what is not finite.
    """
    size = func.abs(value)
    lowest, highest = sys.float_info.min_exp - sys.float_info.mant_dig, sys.float_info.max_exp
    return case(
        (and_(size >= _exact(0), size < _exact(_STEP)), _exact(0)),  # Most are of these, or 0.
        (size == literal(0.0, Double), _exact(0)),
        *(
            (size < _exact(exponent + _STEP), _exact(max(lowest, exponent)))
            for exponent in range(lowest // _STEP * _STEP, highest - _STEP, _STEP)
        ),
        (_is_finite(value), _exact(highest - _STEP)),
    )


def float_parts(value: ColumnElement[float], scale: ColumnElement[float]) -> list[ColumnElement[Any]]:
    """Return three sums of whole numbers, which add up to the exact sum of floats of one *scale*: see `float_total`."""
    scaled: ColumnElement[float] = value.op("/", return_type=Double())(scale)
    first = cast(scaled, BigInteger)  # One database cuts off here, the other rounds: what is left makes up for it.
    rest = (scaled - first) * _exact(_CUT)
    second = cast(rest, BigInteger)
    third = cast((rest - second) * _exact(_CUT), BigInteger)
    return [func.sum(first), func.sum(second), func.sum(third)]


def float_total(scale: float, first: Any, second: Any, third: Any) -> Fraction:
    """Return the exact total of which SQL gave the parts."""
    shifted = (int(first) << 2 * _CUT) + (int(second) << _CUT) + int(third)
    return Fraction(scale) * Fraction(shifted, 1 << 2 * _CUT)


def _exact(exponent: int) -> ColumnElement[float]:
    # A bind, since SQLite may read decimals a little off.
    return literal(math.ldexp(1.0, exponent), Double)


# Percentiles


def ranked(rows: Select[Any], keys: Sequence[str], percents: Iterable[int]) -> Select[Any]:
    """Return the values next to percentiles, of each group of rows with the same keys.

    Args:
        rows: The rows: columns named as *keys* say, and ``value``, which is NULL nowhere.
        keys: What makes a group. None make all rows one group.
        percents: Which percentiles.

    Returns:
        Rows of the keys, ``upto``, ``size``, ``times``, ``value``: among the *size* values of its group, *value* stands
        at the ranks from *upto* - *times* on, before *upto*. `Ranks` takes them.
    """
    source = rows.subquery()
    if keys:
        counted = select(*source.c, whole_number(1).label("times")).subquery()
    else:  # Of a single group, what is equal is counted before it is put in order: that takes half the time.
        counted = select(source.c.value, func.count().label("times")).group_by(source.c.value).subquery()
    group = [counted.c[key] for key in keys]
    times, value = counted.c.times, counted.c.value
    upto = func.sum(times).over(partition_by=group or None, order_by=value, rows=(None, 0))
    size = func.sum(times).over(partition_by=group or None, order_by=value, rows=(None, None))  # One order for both.
    columns = [cast(upto, BigInteger).label("upto"), cast(size, BigInteger).label("size"), times, value]
    placed = select(*group, *columns).subquery()
    last = placed.c.size - whole_number(1)
    ranks = [
        (last * whole_number(percent) + whole_number(rounding)) // whole_number(100)
        for percent in percents
        for rounding in (0, 99)
    ]
    wanted = or_(*(and_(placed.c.upto > rank, placed.c.upto - placed.c.times <= rank) for rank in ranks))
    return select(placed).where(wanted)


class Ranks:
    """The values next to percentiles of one group, as `ranked` gave them."""

    def __init__(self) -> None:
        self.size = 0
        self._spans: list[tuple[int, int, Any]] = []

    def add(self, upto: Any, size: Any, times: Any, value: Any) -> None:
        """Take one row of `ranked`."""
        self.size = int(size)
        self._spans.append((int(upto) - int(times), int(upto), value))

    def at(self, percent: int) -> float:
        """Return a percentile, computed exactly and rounded once, of at least one value.

        It is SQL's percentile_cont: linear between the values around rank (size - 1) * percent / 100, counted from 0.
        """
        rank, part = divmod((self.size - 1) * percent, 100)
        lower = self._value(rank)
        upper = self._value(rank + 1) if part else lower
        if isinstance(lower, int):
            return float((lower * (100 - part) + upper * part) / 100)
        return float(Fraction(lower) + (Fraction(upper) - Fraction(lower)) * Fraction(part, 100))

    def _value(self, rank: int) -> Any:
        return next(value for first, end, value in self._spans if first <= rank < end)


# Time


def epoch_seconds(moment: Column[datetime], dialect: Dialect) -> ColumnElement[int]:
    """Return the whole seconds of a stored time since the Unix epoch, rounded down; NULL where it is no time."""
    if is_postgresql(dialect):
        seconds = cast(func.floor(extract("epoch", moment)), BigInteger)
        holds = moment.between(datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))  # As no infinity.
        return case((holds, seconds))
    # Without the fraction, which newer versions round.
    text, day = (func.substr(moment, whole_number(1), whole_number(size), type_=String) for size in (19, 10))
    # SQLite reads some texts as another time, and only shows it once there is something to add.
    is_date = func.date(text, literal_column("'+0 days'"), type_=String) == day
    return case((is_date, cast(func.strftime(literal_column("'%s'"), text), BigInteger)))


def bucket_start(
    seconds: ColumnElement[int], size: ColumnElement[int], shift: ColumnElement[int]
) -> ColumnElement[int]:
    """Return where the bucket of *size* seconds begins that *seconds* since the epoch fall into, before it as well."""
    return (seconds + shift) // size * size - shift


def shift_for(size: int) -> int:
    """Return how far times are moved for `bucket_start`, so that all are positive: SQL divides towards zero."""
    return -(-_YEARS_BEFORE_1970 // size) * size


def seconds_since_epoch(moment: datetime) -> int:
    """Return the whole seconds of *moment* since the Unix epoch, rounded down."""
    return (moment - EPOCH) // _SECOND


def starts_between(first: int, last: int, size: int) -> range:
    """Return the starts of the buckets of *size* seconds from that of second *first* to that of second *last*."""
    return range(first - first % size, last + 1, size)
