"""Looking into a model while it runs, and changing what is seen: values by the path of what made them.

Nothing is stored in modules, and nothing is computed that nobody asked for: taps are looked up when a model is traced.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from ..policies.errors import UnmatchedRule
from ..policies.patterns import Pattern


class Taps:
    """What is to be captured and changed in one call of a model.

    capture    patterns of paths, such as "layers/3/mlp"
    intervene  {pattern: function of the value, which returns what takes its place}
    captured   {path: value} of what came by
    """

    def __init__(self, capture: Any = (), intervene: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None):
        self._capture = {text: Pattern.of(text) for text in ([capture] if isinstance(capture, str) else capture)}
        self._intervene = [(text, Pattern.of(text), change) for text, change in (intervene or {}).items()]
        self._met: set[str] = set()
        self._seen: list[str] = []
        self.captured: dict[str, jax.Array] = {}

    def pass_by(self, path: str, value: jax.Array | Callable[[], jax.Array]) -> jax.Array | None:
        """`value` as it goes on; what is only computed if asked for goes nowhere, and cannot be changed."""
        self._seen.append(path)
        if not callable(value):
            for text, pattern, change in self._intervene:
                if pattern.matches(path):
                    self._met.add(text)
                    value = change(value)
        for text, pattern in self._capture.items():
            if pattern.matches(path):
                self._met.add(text)
                self.captured[path] = value() if callable(value) else value
        return None if callable(value) else value

    def check(self) -> None:
        """Raises UnmatchedRule for a pattern that nothing came by of."""
        for text in (*self._capture, *(text for text, _, _ in self._intervene)):
            if text not in self._met:
                some = ", ".join(dict.fromkeys([*self._seen[:4], *self._seen[-1:]]))
                raise UnmatchedRule(
                    f"{text!r} (capture) matches nothing in this model. There are {some}, among others."
                )


_active: contextvars.ContextVar[tuple[Taps, tuple[str, ...]] | None] = contextvars.ContextVar("taps", default=None)


@contextlib.contextmanager
def tapped(taps: Taps) -> Iterator[None]:
    """A context in which a model's values pass by `taps`."""
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


def tap(name: str, value: jax.Array) -> jax.Array:
    """`value`, or what takes its place."""
    if (active := _active.get()) is None:
        return value
    changed = active[0].pass_by("/".join((*active[1], name)), value)
    assert changed is not None
    return changed


def offer(name: str, value: Callable[[], jax.Array]) -> None:
    """Offers what is only computed where it is captured."""
    if (active := _active.get()) is not None:
        active[0].pass_by("/".join((*active[1], name)), value)
