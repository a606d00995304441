"""Values of chat templates, and the methods of strings, lists and mappings that templates may call.

Nothing else of a Python object can be reached: a name is looked up in the tables below and among the keys of a
mapping. Each method uses up its `Budget` before it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jinja2 import Undefined
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.utils import Cycler
from markupsafe import Markup

from .template_budget import VIEWS, Budget


class Unavailable(SecurityError):
    """A template uses a part of Jinja that published templates do not use."""


def unavailable(kind: str, name: Any) -> Unavailable:
    """Return the error for a statement, operator, filter or test that templates cannot use."""
    return Unavailable(f"the {kind} {str(name)[:100]!r} is not available to templates")


class Namespace:
    """A mutable object of a template, made by `namespace(…)`; its attributes are set by `{% set ns.name = … %}`."""

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def drop(self, name: str) -> int:
        """Remove an attribute; return how long its text was, or 0 if something else still holds that text."""
        old, holders = _removed(self.values, name)
        return len(old) if isinstance(old, str) and holders <= _HOLDERS else 0

    def __repr__(self) -> str:
        raise unavailable("text of", "namespace")


def _removed(values: dict[str, Any], name: str) -> tuple[Any, int]:
    """Return an entry that is removed from `values`, and the number of references to it."""
    old = values.pop(name, None)
    return old, sys.getrefcount(old)


_HOLDERS = _removed({"a": "".join(["one", "two"])}, "a")[1]  # of a text that nothing else holds


class Function:
    """Something that a template can call: a function, a method, or a macro.

    attributes  those that it has
    absent      names of those that jinja2's has, too
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        attributes: Mapping[str, Any] | None = None,
        absent: Collection[str] = (),
    ):
        self.name, self.call, self.attributes, self.absent = name, call, attributes or {}, absent

    def __repr__(self) -> str:
        raise unavailable("text of", self.name)


def scalar(value: Any) -> bool:
    """Return whether a value is a string, a number, None or undefined."""
    return value is None or isinstance(value, (str, int, float, Undefined))


def hashed(key: Any) -> Any:
    """Return the key of a mapping, which is a scalar: hashing a deeply nested tuple would end the process."""
    if not scalar(key):
        raise TypeError(f"unhashable type: {type(key).__name__!r}")
    return key


def elements(budget: Budget, value: Any) -> list[Any]:
    """Return the elements of a sequence, or the keys of a mapping."""
    if not isinstance(value, (str, list, tuple, dict, range, Undefined, *VIEWS)):
        raise TypeError(f"{type(value).__name__!r} object is not iterable")
    parts: Any = value
    budget.step(len(parts))
    return list(parts)


def growth(*texts: Any) -> int:
    """Return by how much texts can grow where they are joined: markup escapes other text, such as '"' as '&#34;'."""
    return 5 if any(isinstance(text, Markup) for text in texts) else 1


def attribute(budget: Budget, value: Any, name: str) -> Any:
    """Return `value.name` of a template: a method, else the entry of a mapping, else an undefined value."""
    if isinstance(value, Undefined):
        return value[name]  # raises UndefinedError, or SecurityError
    if (found := _attribute(budget, value, name)) is not None:
        return found[0]
    return value[name] if isinstance(value, dict) and name in value else Undefined(obj=value, name=name)


def item(budget: Budget, value: Any, key: Any) -> Any:
    """Return `value[key]` of a template: an entry, else a method, else an undefined value."""
    if isinstance(value, Undefined):
        return value[key]  # raises UndefinedError, or SecurityError
    if isinstance(key, slice) and isinstance(value, (str, list, tuple, range)):
        part = value[key]
        (budget.write if isinstance(part, str) else budget.step)(len(part))
        return part
    if isinstance(key, slice):
        raise TypeError(f"{type(value).__name__!r} object has no slices")
    if isinstance(value, dict) and scalar(key) and key in value:
        return value[key]
    if isinstance(key, int) and isinstance(value, (str, list, tuple, range)) and -len(value) <= key < len(value):
        return value[key]
    if isinstance(key, str) and (found := _attribute(budget, value, key)) is not None:
        return found[0]
    return Undefined(obj=value, name=key) if scalar(key) else Undefined(f"a {type(value).__name__} has no such element")


_OBJECTS: dict[type, tuple[str, str]] = {
    LoopContext: ("index index0 revindex revindex0 first last length previtem nextitem depth depth0", "cycle changed"),
    Cycler: ("current", "next reset"),
}
"""Attributes of jinja2's own objects, and their methods."""


def _attribute(budget: Budget, value: Any, name: str) -> tuple[Any] | None:
    """Return the attribute or method `name` of `value`, or None if jinja2 finds none.

    Raises:
      Unavailable: if jinja2 finds one that templates cannot use here.
    """
    own: Mapping[str, Any] = {}
    kind = str if isinstance(value, str) else type(value)
    if isinstance(value, Namespace):
        own, has = value.values, name in value.values
    elif isinstance(value, Function):
        own, has = value.attributes, name in value.attributes or name in value.absent
    else:
        has = hasattr(type(value), name) or name in getattr(value, "__dict__", ())
    if name.startswith("__") or (has and name.startswith("_")):
        what = f"{kind.__name__}.{name} is not available to templates"
        return (Undefined(what, exc=SecurityError),)
    if not has or name in own:
        return (own[name],) if has else None
    properties, methods = _OBJECTS.get(type(value), ("", ""))
    if name in properties.split():
        return (getattr(value, name),)
    if name in methods.split():
        return (Function(name, lambda *given: (budget.value(given), getattr(value, name)(*given))[1]),)
    if call := _METHODS.get(kind, {}).get(name):
        return (Function(name, lambda *given, **named: call(budget, value, *given, **named)),)
    raise unavailable("attribute", f"{kind.__name__}.{name}")


# Methods.


def _reading(name: str) -> Callable[..., Any]:
    """Return a method of strings that reads its text once, and returns at most three characters for one."""

    def call(budget: Budget, text: str, /, *given: Any) -> Any:
        arguments = sum(len(one) for one in given if isinstance(one, str))
        # `strip` searches its argument for each character.
        budget.write((3 + arguments // 64) * len(text) + arguments + 1)
        return getattr(type(text), name)(text, *given)

    return call


def _splitting(name: str) -> Callable[..., Any]:
    """Return `split` or `rsplit`, of no more pieces than the budget allows."""

    def call(budget: Budget, text: str, /, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        budget.write(2 * len(text) + 1)
        most = budget.steps if maxsplit < 0 else min(maxsplit, budget.steps)
        pieces: list[str] = getattr(type(text), name)(text, sep, most)
        budget.step(len(pieces))
        return pieces

    return call


def _lines(budget: Budget, text: str, /, keepends: bool = False) -> list[str]:
    budget.write(2 * len(text))
    budget.step(len(text) // 8 + 1)
    lines = text.splitlines(keepends)
    budget.step(len(lines))
    return lines


def replace(budget: Budget, text: str, old: str, new: str, count: int = -1, /) -> str:
    """Return `text.replace(old, new, count)`."""
    budget.write(2 * len(text) + 1)
    found = text.count(old) if count < 0 else min(text.count(old), count)
    budget.write(found * len(new) * growth(text))
    return text.replace(old, new, count)


def join(budget: Budget, separator: str, values: Any, /) -> str:
    """Return `separator.join(values)`."""
    texts = elements(budget, values)
    length = sum(len(text) for text in texts if isinstance(text, str))
    budget.write((length + len(separator) * len(texts)) * growth(separator))
    return separator.join(texts)


def _comparing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `index` or `count` of a sequence, which compares each element with the argument."""

    def call(budget: Budget, value: Any, wanted: Any, /) -> Any:
        budget.value(value)
        return method(value, wanted)

    return call


_METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: {
        name: _reading(name)
        for name in (
            "strip lstrip rstrip startswith endswith removeprefix removesuffix upper lower title capitalize "
            "find rfind index count isdigit isalpha isalnum isspace isupper islower isnumeric"
        ).split()
    }
    | {"split": _splitting("split"), "rsplit": _splitting("rsplit"), "splitlines": _lines}
    | {"replace": replace, "join": join},
    dict: {
        "get": lambda _, value, key, default=None: value.get(hashed(key), default),
        "items": lambda _, value: value.items(),
        "keys": lambda _, value: value.keys(),
        "values": lambda _, value: value.values(),
    },
    list: {"index": _comparing(list.index), "count": _comparing(list.count)},
    tuple: {"index": _comparing(tuple.index), "count": _comparing(tuple.count)},
}
