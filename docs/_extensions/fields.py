"""Shows in the reference what `Field(...)` says of a table's columns, and ``#:`` comments of enum members."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe


class Fields(griffe.Extension):
    """Adds a table to the docstring of each class that has such fields or members."""

    def on_class(self, *, cls: griffe.Class, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Append the class's table."""
        attributes = [member for member in cls.members.values() if isinstance(member, griffe.Attribute)]
        if columns := [row for attribute in attributes for row in _column(attribute)]:
            _append(cls, "Attribute", "Type", "Meaning", "Default", rows=columns)
        elif words := [row for attribute in attributes for row in _member(attribute)]:
            _append(cls, "Member", "Value", "Meaning", rows=words)

    def on_attribute(self, *, attr: griffe.Attribute, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Take the ``#:`` comment above a module's attribute as its docstring; of an enum's alias, say what it is."""
        file = attr.filepath
        if attr.name.endswith("Like"):
            enum = attr.name.removesuffix("Like")
            attr.docstring = griffe.Docstring(
                f"A member of [`{enum}`][moai_flow.memory.{enum}], or its word.", parent=attr
            )
            return
        if attr.docstring is None and attr.lineno and attr.parent and attr.parent.is_module and isinstance(file, Path):
            above = attr.lines_collection[file][attr.lineno - 2]
            if above.startswith("#: "):
                attr.docstring = griffe.Docstring(above.removeprefix("#: "), parent=attr)


def _append(cls: griffe.Class, *header: str, rows: list[tuple[str, ...]]) -> None:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    if cls.docstring is not None:
        cls.docstring.value += "\n\n" + "\n".join(lines)


def _member(attribute: griffe.Attribute) -> Iterator[tuple[str, ...]]:
    meaning = attribute.source.partition("#: ")[2]
    if meaning:
        yield f"`{attribute.name}`", f"`{attribute.value}`", meaning


def _column(attribute: griffe.Attribute) -> Iterator[tuple[str, ...]]:
    field = attribute.value
    if not isinstance(field, griffe.ExprCall) or field.canonical_path != "sqlmodel.Field":
        return
    given = {argument.name: argument.value for argument in field.arguments if isinstance(argument, griffe.ExprKeyword)}
    meaning = ast.literal_eval(str(given["description"]))
    if "alias" in given:
        meaning += f" Its column is `{ast.literal_eval(str(given['alias']))}`."
    if "primary_key" in given:
        meaning += " Primary key."
    yield f"`{attribute.name}`", _type(attribute.annotation), meaning, _default(given)


def _type(annotation: str | griffe.Expr | None) -> str:
    shown = f"`{annotation}`"
    own = isinstance(annotation, griffe.Expr) and annotation.canonical_path.startswith("moai_flow.")
    return f"[{shown}][{annotation.canonical_path}]" if own and isinstance(annotation, griffe.Expr) else shown


def _default(given: dict[str, str | griffe.Expr]) -> str:
    if "default" in given:
        return f"`{given['default']}`"
    if "default_factory" not in given:
        return "*required*"
    factory = str(given["default_factory"])
    return f"`{factory.removeprefix('lambda: ')}`" if factory.startswith("lambda: ") else f"`{factory}()`"
