"""Anchored path patterns: `layers/*/self_attn/**/kernel`.

A pattern without `/`, `*` and `{` is a bare name and matches the last component of a path, whatever stands before it.
Any other is anchored at the root: `*` is one component or part of one, `**` any number of components (none included),
`{a,b}` alternatives within a component.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from .errors import InvalidPolicy, shown

_SPECIAL = re.compile(r"[?\[\]!()^$|\\,]")
_BRACES = re.compile(r"\{([^{}/]*)\}")
_LONGEST = 500  # characters
_MOST_STARS = 16  # in a component
_LIMIT = 64  # alternatives a pattern may have: a line of braces must not become a million patterns


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The compiled form of a pattern: its alternatives, each a tuple of components.

    >>> Pattern.of("layers/*/{q,k}_proj/kernel").matches("layers/3/k_proj/kernel")
    True
    """

    alternatives: tuple[tuple[str, ...], ...]
    bare: bool

    @staticmethod
    @functools.lru_cache(4096)
    def of(text: str) -> Pattern:
        """The pattern that `text` writes.

        Raises:
          InvalidPolicy: for an empty component and for any glob character other than `*`, `**` and `{a,b}`.
        """
        if len(text) > _LONGEST:
            raise InvalidPolicy(f"a pattern of {len(text)} characters, {shown(text)}. Write several rules, or use '*'.")
        bare = not any(character in text for character in "/*{}")
        alternatives = _expand(text)
        for alternative in alternatives:
            if special := _SPECIAL.search(alternative):
                raise InvalidPolicy(
                    f"{text!r}: {special.group()!r} has no meaning in a pattern. "
                    "Write '*' (part of a component), '**' (any number of components), '{a,b}' (alternatives)."
                )
            for component in alternative.split("/"):
                if not component:
                    raise InvalidPolicy(
                        f"{text!r} has an empty component. Paths look like layers/0/dense/kernel, "
                        "without a leading, trailing or double '/'."
                    )
                if component.count("*") > _MOST_STARS:
                    raise InvalidPolicy(f"{text!r}: {component!r} has more than {_MOST_STARS} '*'.")
                if "**" in component and component != "**":
                    raise InvalidPolicy(
                        f"{text!r}: '**' is a component of its own. Write 'a/**/b', or 'a*' for a part."
                    )
        return Pattern(tuple(map(_components, alternatives)), bare)

    @functools.cached_property
    def exact(self) -> frozenset[str] | None:
        """The paths that are meant, where the pattern names each in full."""
        paths = frozenset("/".join(alternative) for alternative in self.alternatives)
        return None if self.bare or any("*" in path for path in paths) else paths

    def matches(self, path: str) -> bool:
        """Whether the parameter at `path` is meant."""
        components = path.split("/")
        if self.bare:
            return components[-1] == self.alternatives[0][0]
        if self.exact is not None:
            return path in self.exact
        return any(_matches(alternative, components) for alternative in self.alternatives)

    @property
    def names(self) -> tuple[str, ...]:
        """The last component of each alternative: what the pattern says of a parameter's name."""
        return tuple(alternative[-1] for alternative in self.alternatives)


def _components(alternative: str) -> tuple[str, ...]:
    """The components of a pattern; `**` beside `**` says no more than one does."""
    parts = alternative.split("/")
    return tuple(part for i, part in enumerate(parts) if not part == "**" == parts[i - 1] or i == 0)


def _expand(text: str) -> list[str]:
    """The alternatives of `{a,b}`, written out."""
    done, waiting = [], [text]
    while waiting:
        head = waiting.pop(0)
        braces = _BRACES.search(head)
        if braces is None or "{" in head[: braces.start()]:
            if "{" in head or "}" in head:
                raise InvalidPolicy(f"{text!r}: braces do not match. Alternatives are written '{{a,b}}', not nested.")
            done.append(head)
            continue
        words = braces.group(1).split(",")
        if len(words) + len(waiting) + len(done) > _LIMIT:
            raise InvalidPolicy(f"{text!r} has more than {_LIMIT} alternatives. Write several rules, or use '*'.")
        waiting[:0] = [head[: braces.start()] + word + head[braces.end() :] for word in words]
    return done


def _component_matches(pattern: str, component: str) -> bool:
    """Whether `component` is `pattern`, each `*` standing for any text; taken greedily, so that it is linear."""
    first, *middle = pattern.split("*")
    if not middle:
        return component == pattern
    *middle, last = middle
    if not component.startswith(first) or not component.endswith(last) or len(component) < len(first) + len(last):
        return False
    position, end = len(first), len(component) - len(last)
    for part in middle:
        position = component.find(part, position, end)
        if position < 0:
            return False
        position += len(part)
    return True


def _matches(pattern: tuple[str, ...], components: list[str]) -> bool:
    """Walks the path once and keeps the set of pattern positions reached, so that many `**` cost no more than one."""
    if len(pattern) - pattern.count("**") > len(components):
        return False
    for part, component in ((pattern[0], components[0]), (pattern[-1], components[-1])):
        if part != "**" and not _component_matches(part, component):
            return False

    def skip(positions: set[int]) -> set[int]:
        reached = set(positions)
        for position in sorted(positions):
            while position < len(pattern) and pattern[position] == "**":
                position += 1
                reached.add(position)
        return reached

    positions = skip({0})
    for component in components:
        after = set()
        for position in positions:
            if position == len(pattern):
                continue
            if pattern[position] == "**":
                after.add(position)
            elif _component_matches(pattern[position], component):
                after.add(position + 1)
        positions = skip(after)
    return len(pattern) in positions
