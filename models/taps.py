"""Capture and replacement of intermediate values in one call of a model, by path.

Modules store nothing for this, and a model that is traced without taps is the same program as before.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from ..policies.errors import UnmatchedRule, UnsupportedCast
from ..policies.patterns import Pattern


class Taps:
    """The values to capture and to replace in one call of a model.

    capture    patterns of paths, such as "layers/3/mlp"
    intervene  {pattern: function}: the function takes a value and returns its replacement
    captured   {path: value}, filled during the call
    """

    def __init__(self, capture: Any = (), intervene: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None):
        self._capture = {text: Pattern.of(text) for text in ([capture] if isinstance(capture, str) else capture)}
        self._intervene = [(text, Pattern.of(text), change) for text, change in (intervene or {}).items()]
        self._matched: set[str] = set()
        self._paths: list[str] = []
        self.captured: dict[str, jax.Array] = {}

    def visit(self, path: str, value: jax.Array | Callable[[], jax.Array]) -> jax.Array | None:
        """`value` or its replacement, captured if a pattern matches; a function is called only then, and gives None."""
        self._paths.append(path)
        if not callable(value):
            for text, pattern, change in self._intervene:
                if pattern.matches(path):
                    self._matched.add(text)
                    value = _changed(path, text, change, value)
        for text, pattern in self._capture.items():
            if pattern.matches(path):
                self._matched.add(text)
                self.captured[path] = value() if callable(value) else value
        return None if callable(value) else value

    def check(self) -> None:
        """Raises UnmatchedRule for a pattern that matched nothing."""
        for text in (*self._capture, *(text for text, _, _ in self._intervene)):
            if text not in self._matched:
                examples = ", ".join(dict.fromkeys([*self._paths[:4], *self._paths[-1:]]))
                raise UnmatchedRule(
                    f"{text!r} (capture) matches no value of this model. Its values include {examples}."
                )


def _changed(path: str, text: str, change: Callable[[jax.Array], jax.Array], value: jax.Array) -> jax.Array:
    """`change(value)`.

    Raises:
      UnsupportedCast: not an array of the same shape, such as the None of a function that only prints.
    """
    changed = change(value)
    if getattr(changed, "shape", None) != value.shape:
        found = getattr(changed, "shape", type(changed).__name__)
        raise UnsupportedCast(
            f"{path}: the function of {text!r} (intervene) returned {found}, expected an array of shape {value.shape}. "
            "Return the value itself to leave it unchanged."
        )
    return changed


_active: contextvars.ContextVar[tuple[Taps, tuple[str, ...]] | None] = contextvars.ContextVar("taps", default=None)


@contextlib.contextmanager
def using(taps: Taps) -> Iterator[None]:
    """A context in which models use `taps`."""
    token = _active.set((taps, ()))
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def within(*names: str | int) -> Iterator[None]:
    """A context in which paths begin with `names`."""
    if (active := _active.get()) is None:
        yield
        return
    token = _active.set((active[0], (*active[1], *map(str, names))))
    try:
        yield
    finally:
        _active.reset(token)


def active() -> bool:
    """Whether this is a context of `using`."""
    return _active.get() is not None


def tap(name: str, value: jax.Array) -> jax.Array:
    """`value`, or its replacement."""
    if (active := _active.get()) is None:
        return value
    changed = active[0].visit("/".join((*active[1], name)), value)
    assert changed is not None
    return changed


def offer(name: str, value: Callable[[], jax.Array]) -> None:
    """Offers a value that is computed only if it is captured; it cannot be replaced."""
    if (active := _active.get()) is not None:
        active[0].visit("/".join((*active[1], name)), value)
