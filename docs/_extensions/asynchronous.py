"""Shows in the reference, for each method of `AsyncSwarmDB`, parameters and docstring of the one it is made of."""

import copy
from collections.abc import Iterator
from typing import Any

import griffe

_MADE_FROM = "SwarmDB."

#: What a maker returns, by the generic type that the method returns.
_RETURNED = {
    "Iterator": "AsyncIterator",
    "TrackedTask": "AbstractAsyncContextManager[TrackedTask]",
    "TrackedAgent": "AbstractAsyncContextManager[AsyncTrackedAgent]",
}
_BLOCKS = {
    "transaction": "AbstractAsyncContextManager[AsyncConnection]",
    "session": "AbstractAsyncContextManager[AsyncSession]",
}


class Asynchronous(griffe.Extension):
    """Puts a method in the place of each attribute that says of which one it is made."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Replace the attributes, once all modules have been read."""
        for cls in _classes(pkg):
            for name, attribute in list(cls.members.items()):
                made_from = _source(attribute)
                method = made_from and _method(pkg, made_from)
                if isinstance(method, griffe.Function):
                    cls.set_member(name, _asynchronous(method, cls))
            constructor = cls.members.get("__init__")
            decorators = constructor.decorators if isinstance(constructor, griffe.Function) else []
            if any(_MADE_FROM in str(decorator.value) for decorator in decorators):
                _construct(constructor, _method(pkg, "__init__"))


def _construct(constructor: griffe.Function, original: griffe.Function) -> None:
    """Give a constructor the parameters of the one that it passes them to, and what that says about them."""
    constructor.parameters, constructor.decorators = original.parameters, []
    if constructor.docstring is not None and original.docstring is not None:
        constructor.docstring.value += f"\n\n{original.docstring.value}"


def _classes(module: griffe.Module) -> Iterator[griffe.Class]:
    for member in module.members.values():
        if isinstance(member, griffe.Module):
            yield from _classes(member)
        elif isinstance(member, griffe.Class):
            yield member


def _source(attribute: Any) -> str | None:
    """Return the name of the method that an attribute is made of, as in ``get_agent = _awaited(SwarmDB.get_agent)``."""
    value = attribute.value if isinstance(attribute, griffe.Attribute) else None
    if not isinstance(value, griffe.ExprCall) or len(value.arguments) != 1:
        return None
    argument = str(value.arguments[0])
    return argument.removeprefix(_MADE_FROM) if argument.startswith(_MADE_FROM) else None


def _method(pkg: griffe.Module, name: str) -> Any:
    """Return a method of `SwarmDB`, which inherits most of them."""
    operations = (
        cls for cls in _classes(pkg) if "operations" in cls.path or cls.name in {"Tracking", "Scope", "SwarmDB"}
    )
    return next((cls.members[name] for cls in operations if name in cls.members), None)


def _asynchronous(method: griffe.Function, cls: griffe.Class) -> griffe.Function:
    made = copy.copy(method)
    made.parent = cls
    made.returns = _returned(method)
    made.overloads = [_asynchronous(overload, cls) for overload in method.overloads] if method.overloads else None
    made.labels = {label for label in method.labels if label != "async"}
    made.decorators = []
    if str(made.returns) == str(method.returns):
        made.labels.add("async")
    return made


def _returned(method: griffe.Function) -> Any:
    returns = str(method.returns)
    if method.name in _BLOCKS:
        return _BLOCKS[method.name]
    for plain, replaced in _RETURNED.items():
        if returns.strip("'\"").startswith(plain):
            return replaced + returns.removeprefix(plain) if plain == "Iterator" else replaced
    return method.returns
