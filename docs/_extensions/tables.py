"""Draws the tables of the schema: ``python docs/_extensions/tables.py`` writes ``docs/assets/tables.svg``."""

from html import escape
from pathlib import Path

from sqlalchemy import Table
from sqlalchemy.dialects import sqlite

from moai_flow.memory.models import TABLES, table_of

TARGET = Path(__file__).parents[1] / "assets" / "tables.svg"

_WIDTH, _LINE, _GAP, _COLUMNS = 236, 18, 24, 3


def draw() -> str:
    """Return the picture: a box for each table, with its columns, types and keys."""
    bottoms = [_GAP] * _COLUMNS
    boxes = []
    for model in TABLES:
        table = table_of(model)
        at = bottoms.index(min(bottoms))
        boxes.append(_box(table, _GAP + at * (_WIDTH + _GAP), bottoms[at]))
        bottoms[at] += _height(table) + _GAP
    width, height = _GAP + _COLUMNS * (_WIDTH + _GAP), max(bottoms)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12">'
    ground = f'<rect width="{width}" height="{height}" fill="white"/><g font-family="sans-serif">'
    return "\n".join([head, ground, *boxes, "</g></svg>\n"])


def _height(table: Table) -> int:
    return _LINE * (len(table.columns) + 1) + 14


def _box(table: Table, left: int, top: int) -> str:
    lines = [
        f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_height(table)}" fill="#fafafa" stroke="#3f51b5"/>',
        f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_LINE + 6}" fill="#3f51b5"/>',
        f'<text x="{left + 8}" y="{top + 17}" fill="white" font-weight="bold">{escape(table.name)}</text>',
    ]
    for number, column in enumerate(table.columns, 1):
        base = top + 19 + _LINE * number
        weight = ' font-weight="bold"' if column.primary_key else ""
        kind = column.type.dialect_impl(sqlite.dialect()).compile(dialect=sqlite.dialect())
        lines.append(f'<text x="{left + 8}" y="{base}"{weight}>{escape(column.name)}</text>')
        lines.append(f'<text x="{left + _WIDTH - 8}" y="{base}" text-anchor="end" fill="#616161">{kind}</text>')
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
