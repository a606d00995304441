"""Filters, tests and functions of chat templates: those that published templates use, each within its budget.

They are those of jinja2, except for `tojson`, which is that of Hugging Face transformers: it does not escape HTML.
"""

from __future__ import annotations

import datetime
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Undefined, filters
from jinja2.exceptions import TemplateError
from jinja2.tests import TESTS as _JINJA_TESTS
from jinja2.utils import Cycler
from markupsafe import Markup, escape

from .template_budget import VIEWS, Budget, TooExpensive
from .template_values import Function, Namespace, elements, growth, hashed, item, replace, unavailable

LONGEST_RANGE = 100_000  # that of jinja2's sandbox
_WIDEST_INDENT = 32
_LONGEST_DATE = 100

Filter = Callable[..., Any]


# Text.


def _text_filter(function: Callable[..., str]) -> Filter:
    """Return a filter that reads its text once, and returns at most three characters for one."""

    def call(budget: Budget, value: Any, /, *given: Any) -> str:
        text = budget.text(value)
        arguments = sum(len(one) for one in given if isinstance(one, str))
        budget.write((3 + arguments // 64) * len(text) + arguments + 1)
        return function(text, *given)

    return call


def _trim(budget: Budget, value: Any, chars: str | None = None) -> str:
    return _stripped(budget, value, *(() if chars is None else (chars,)))


_stripped = _text_filter(filters.do_trim)


def _escape(budget: Budget, value: Any) -> Markup:
    text = budget.text(value)
    budget.write(6 * len(text))
    return escape(text)


_SPECIFIER = re.compile(r"%(?:%|(?:\(\w{1,50}\))?[-+ #0]{0,5}\d{0,2}(?:\.\d{1,2})?[sdifgxX])")
_WIDEST_NUMBER = 500  # of `%99.99f`


def formatted(budget: Budget, text: str, values: Any) -> str:
    """Return `text % values`, for `%s`, `%d`, `%f` and the like, of widths below 100."""
    specifiers = _SPECIFIER.findall(text)
    if text.count("%") != sum(one.count("%") for one in specifiers):
        raise unavailable("format", text)
    given = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
    longest = max((len(budget.text(one)) for one in [*given, values]), default=0)
    budget.step(len(specifiers))
    budget.write(len(text) + len(specifiers) * (longest + _WIDEST_NUMBER) * growth(text))
    return text % values


def _format(budget: Budget, value: Any, *given: Any, **named: Any) -> str:
    if given and named:
        raise TypeError("can't handle positional and keyword arguments at the same time")
    return formatted(budget, budget.text(value), named or given)


def _title(budget: Budget, value: Any) -> str:
    text = budget.text(value)
    budget.write(3 * len(text) + 1)
    budget.step(len(text) // 4 + 1)  # its words
    return filters.do_title(text)


def _replace(budget: Budget, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, before, after = (str(budget.text(one)) for one in (value, old, new))
    return replace(budget, text, before, after, -1 if count is None else count)


def _indent(budget: Budget, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = budget.text(value)
    added = len(width) if isinstance(width, str) else width
    budget.write(4 * len(text) + 1)
    budget.step(len(text) // 8 + 1)
    lines = len(text.splitlines()) + 1
    budget.step(lines)
    budget.write(lines * max(added, 0) * growth(text))
    return filters.do_indent(text, width, first, blank)


def _join(budget: Budget, values: Any, d: Any = "", attribute: Any = None) -> str:
    parts = elements(budget, values)
    if attribute is not None:
        parts = [_at(budget, part, attribute) for part in parts]
    texts, separator = [budget.text(part) for part in parts], budget.text(d)
    budget.write(sum(map(len, texts)) + len(separator) * len(texts))
    return str(separator).join(map(str, texts))


def _to_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    wide = len(indent) if isinstance(indent, str) else int(indent or 0)
    if wide > _WIDEST_INDENT or any(len(one) > _WIDEST_INDENT for one in separators or ()):
        raise TooExpensive(f"tojson indents and separates by more than {_WIDEST_INDENT} characters")
    before = budget.steps
    depth = budget.value(value)
    if indent is not None:
        budget.write((before - budget.steps) * depth * max(wide, 0))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget.write(len(text))
    return text


# Numbers.


def _int(budget: Budget, value: Any, default: Any = 0, base: int = 10) -> Any:
    return budget.integer(filters.do_int(_short(value), default, base))


def _float(budget: Budget, value: Any, default: Any = 0.0) -> Any:
    return filters.do_float(_short(value), default)


def _round(budget: Budget, value: Any, precision: int = 0, method: Any = "common") -> Any:
    if not -30 < precision < 30:
        raise ValueError(f"round: expected a precision below 30, found {precision}")
    return filters.do_round(value, precision, method)


def _short(value: Any) -> Any:
    """Return `value` if it is not too long for a number."""
    return "" if isinstance(value, str) and len(value) > 1000 else value


# Lists and mappings.


def _at(budget: Budget, value: Any, path: Any) -> Any:
    """Return the attribute of a value that a filter names, such as "function.name"."""
    for part in path.split(".") if isinstance(path, str) else [path]:
        value = item(budget, value, int(part) if isinstance(part, str) and part.isdecimal() else part)
    return value


def _first(budget: Budget, value: Any) -> Any:
    return next(iter(elements(budget, value)), Undefined("No first item, sequence was empty."))


def _last(budget: Budget, value: Any) -> Any:
    return next(reversed(elements(budget, value)), Undefined("No last item, sequence was empty."))


def _reverse(budget: Budget, value: Any) -> Any:
    budget.step()
    if isinstance(value, str):
        budget.write(len(value))
        return value[::-1]
    return elements(budget, value)[::-1]


def _items(budget: Budget, value: Any) -> Any:
    if not isinstance(value, (dict, Undefined)):
        raise TypeError("Can only get item pairs from a mapping.")
    return [(key, value[key]) for key in elements(budget, value)]


def _sorting(budget: Budget, value: Any) -> None:
    """Use up what sorting a list or mapping takes: each element is compared about log2(n) times."""
    for _ in range(max(len(value), 1).bit_length()):
        budget.value(value)


def _dictsort(budget: Budget, value: Any, case_sensitive: bool = False, by: Any = "key", reverse: bool = False) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"dictsort: expected a mapping, found {type(value).__name__}")
    _sorting(budget, list(value.values() if by == "value" else value))
    return filters.do_dictsort(value, case_sensitive, by, reverse)


def _sort(
    budget: Budget, value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None
) -> Any:
    parts = elements(budget, value)
    keys = [part if attribute is None else _at(budget, part, attribute) for part in parts]
    _sorting(budget, keys)
    if not case_sensitive:
        keys = [key.lower() if isinstance(key, str) else key for key in keys]
    order = sorted(range(len(parts)), key=keys.__getitem__, reverse=reverse)
    return [parts[index] for index in order]


def _keys(budget: Budget, parts: list[Any], case_sensitive: bool, attribute: Any) -> list[Any]:
    """Return what to compare of each element: its attribute, and a text in lower case."""
    keys = [part if attribute is None else _at(budget, part, attribute) for part in parts]
    budget.value(keys)
    return [key.lower() if isinstance(key, str) and not case_sensitive else key for key in keys]


def _unique(budget: Budget, value: Any, case_sensitive: bool = False, attribute: Any = None) -> list[Any]:
    parts, seen = elements(budget, value), dict[Any, Any]()
    for key, part in zip(_keys(budget, parts, case_sensitive, attribute), parts, strict=True):
        seen.setdefault(hashed(key), part)
    return list(seen.values())


def _extreme(choose: Callable[..., int]) -> Filter:
    """Return `min` or `max`."""

    def call(budget: Budget, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        parts = elements(budget, value)
        keys = _keys(budget, parts, case_sensitive, attribute)
        _sorting(budget, keys[:1] * len(keys))  # the first can be the one that each is compared with
        if not parts:
            return Undefined("No aggregated item, sequence was empty.")
        return parts[choose(range(len(parts)), key=keys.__getitem__)]

    return call


def _sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    for part in elements(budget, value):
        one = part if attribute is None else _at(budget, part, attribute)
        if not isinstance(one, (int, float)) or not isinstance(start, (int, float)):
            raise TypeError(f"sum: expected numbers, found {type(one).__name__}")
        start = budget.integer(start + one)
    return start


def _map(budget: Budget, values: Any, /, *given: Any, **named: Any) -> Any:
    parts = elements(budget, values)
    if given or "attribute" not in named:
        if not given:
            raise TypeError("map requires a filter argument")
        return [called_filter(budget, given[0], part, *given[1:], **named) for part in parts]
    if extra := set(named) - {"attribute", "default"}:
        raise TypeError(f"map: unexpected keyword argument {sorted(extra)[0]!r}")
    attribute, default = named["attribute"], named.get("default")
    found = [_at(budget, part, attribute) for part in parts]
    return [default if isinstance(one, Undefined) and default is not None else one for one in found]


def _selecting(wanted: bool, by_attribute: bool) -> Filter:
    """Return `select`, `reject`, `selectattr` or `rejectattr`."""

    def call(budget: Budget, values: Any, /, *given: Any) -> list[Any]:
        path = given[0] if by_attribute else None
        name, *arguments = given[1:] if by_attribute else given or (None,)
        kept = []
        for part in elements(budget, values):
            value = _at(budget, part, path) if by_attribute else part
            if bool(value if name is None else tested(budget, name, value, *arguments)) == wanted:
                kept.append(part)
        return kept

    def padded(budget: Budget, values: Any, /, *given: Any) -> list[Any]:
        return call(budget, values, *given, *((None,) if len(given) == by_attribute else ()))

    return padded


def _default(_: Budget, value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


_FILTERS: dict[str, Filter] = {
    "abs": lambda _, value: abs(value),
    "capitalize": _text_filter(filters.do_capitalize),
    "count": lambda _, value: len(value),
    "d": _default,
    "default": _default,
    "dictsort": _dictsort,
    "e": _escape,
    "escape": _escape,
    "first": _first,
    "float": _float,
    "format": _format,
    "indent": _indent,
    "int": _int,
    "items": _items,
    "join": _join,
    "last": _last,
    "length": lambda _, value: len(value),
    "list": elements,
    "lower": _text_filter(filters.do_lower),
    "map": _map,
    "max": _extreme(max),
    "min": _extreme(min),
    "reject": _selecting(False, False),
    "rejectattr": _selecting(False, True),
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "safe": lambda budget, value: Markup(budget.text(value)),
    "select": _selecting(True, False),
    "selectattr": _selecting(True, True),
    "sort": _sort,
    "string": lambda budget, value: budget.text(value),
    "sum": _sum,
    "title": _title,
    "tojson": _to_json,
    "trim": _trim,
    "unique": _unique,
    "upper": _text_filter(filters.do_upper),
}


def called_filter(budget: Budget, name: Any, value: Any, *given: Any, **named: Any) -> Any:
    """Return `value|name(…)`."""
    if not isinstance(name, str) or name not in _FILTERS:
        raise unavailable("filter", name)
    budget.step()
    call = _FILTERS[name]
    try:
        return call(budget, value, *given, **named)
    except TypeError:
        try:
            inspect.signature(call).bind(budget, value, *given, **named)
        except TypeError as error:
            raise unavailable("filter", f"{name} ({error})") from error
        raise


# Tests.

_TESTS = (
    "boolean callable defined divisibleby even false float integer iterable lower mapping none number odd sameas "
    "sequence string true undefined upper"
).split()
_COMPARISONS = {
    "==": "eq", "eq": "eq", "equalto": "eq", "!=": "ne", "ne": "ne", ">": "gt", "gt": "gt", "greaterthan": "gt",
    ">=": "gteq", "ge": "gteq", "<": "lt", "lt": "lt", "lessthan": "lt", "<=": "lteq", "le": "lteq", "in": "in",
}  # fmt: skip


def tested(budget: Budget, name: Any, value: Any, *given: Any, **named: Any) -> bool:
    """Return `value is name(…)`."""
    if named:
        raise unavailable("test", f"{name} ({', '.join(named)}=…)")
    if isinstance(name, str) and name in _COMPARISONS:
        (other,) = given
        return compared(budget, _COMPARISONS[name], value, other)
    if not isinstance(name, str) or name not in _TESTS:
        raise unavailable("test", name)
    if name == "callable":
        return isinstance(value, Function)
    if isinstance(value, str):
        budget.write(len(value))
    test: Any = _JINJA_TESTS[name]
    return bool(test(value, *given))


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda left, right: left == right,
    "ne": lambda left, right: left != right,
    "gt": lambda left, right: left > right,
    "gteq": lambda left, right: left >= right,
    "lt": lambda left, right: left < right,
    "lteq": lambda left, right: left <= right,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


def compared(budget: Budget, operator: str, left: Any, right: Any) -> bool:
    """Return whether `left operator right`."""
    if operator in ("in", "notin"):
        if isinstance(right, (dict, VIEWS[0])):
            return (hashed(left) in right) == (operator == "in")
        budget.value(left)
        if isinstance(right, (str, list, tuple, *VIEWS)):
            budget.value(right)
            right = list(right) if isinstance(right, VIEWS) else right
        elif not isinstance(right, (range, Undefined)):
            raise TypeError(f"argument of type {type(right).__name__!r} is not iterable")
        elif not isinstance(left, int):
            return operator != "in"
    elif not (isinstance(left, str) and isinstance(right, str)):
        budget.value(left)
        budget.value(right)
    else:
        budget.write(min(len(left), len(right)))
    return bool(_OPERATORS[operator](left, right))


# Functions.


def functions(budget: Budget) -> dict[str, Function]:
    """Return the functions that every template can call."""

    def make_range(*bounds: int) -> range:
        made = range(*map(budget.integer, bounds))
        if len(made) > LONGEST_RANGE:
            raise TooExpensive(f"range has more than {LONGEST_RANGE} elements")
        return made

    def make_dict(*given: Any, **named: Any) -> dict[str, Any]:
        if not all(isinstance(one, dict) for one in given):
            raise TypeError("dict and namespace: expected names with values")
        budget.step(sum(map(len, given)) + len(named))
        return dict(*given, **named)

    def make_namespace(*given: Any, **named: Any) -> Namespace:
        return Namespace(make_dict(*given, **named))

    def raise_exception(message: Any) -> None:
        raise TemplateError(budget.text(message))

    def make_joiner(sep: Any = ", ") -> Function:
        unused = [""]
        return Function("joiner", lambda: unused.pop() if unused else sep, absent=("sep", "used"))

    def now(form: str) -> str:
        if len(form) > _LONGEST_DATE:
            raise TooExpensive(f"strftime_now: expected a format of at most {_LONGEST_DATE} characters")
        return datetime.datetime.now().strftime(form)

    made: dict[str, Callable[..., Any]] = {
        "range": make_range, "dict": make_dict, "namespace": make_namespace,
        "joiner": make_joiner, "cycler": Cycler, "raise_exception": raise_exception, "strftime_now": now,
    }  # fmt: skip
    absent = {"range": dir(range), "dict": dir(dict), "cycler": dir(Cycler)}
    return {name: Function(name, call, absent=absent.get(name, ())) for name, call in made.items()}
