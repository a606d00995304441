"""Path patterns, such as `layers/*/self_attn/**/kernel`.

A pattern without `/`, `*` and `{` is a bare name and matches every path whose last component it is.  Any other pattern
is anchored at the root: `*` matches one component or a part of one, `**` any number of components including none, and
`{a,b}` alternatives within a component.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from .errors import InvalidPolicy, shown

_SPECIAL = re.compile(r"[?\[\]!()^$|\\,]")
_BRACES = re.compile(r"\{([^{}/]*)\}")
_MAX_CHARACTERS = 500
_MAX_STARS = 16  # in a component
_MAX_ALTERNATIVES = 64  # bounds the expansion of braces, whose number of alternatives is exponential


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
        """Returns the pattern for `text`.

        Raises:
          InvalidPolicy: for an empty component, for any glob character other than `*`, `**` and `{a,b}`, and for a
            pattern with too many characters, `*` or alternatives.
        """
        if len(text) > _MAX_CHARACTERS:
            raise InvalidPolicy(
                f"the pattern {shown(text)} has {len(text)} characters, expected at most {_MAX_CHARACTERS}. "
                "Write several rules, or use '*'."
            )
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
                if component.count("*") > _MAX_STARS:
                    raise InvalidPolicy(f"{text!r}: {component!r} has more than {_MAX_STARS} '*'. Write fewer.")
                if "**" in component and component != "**":
                    raise InvalidPolicy(
                        f"{text!r}: '**' must be a whole component. Write 'a/**/b', or 'a*' for part of a component."
                    )
        return Pattern(tuple(map(_components, alternatives)), bare)

    @functools.cached_property
    def exact(self) -> frozenset[str] | None:
        """The paths that match, for a pattern without `*` that is not a bare name; else None."""
        paths = frozenset("/".join(alternative) for alternative in self.alternatives)
        return None if self.bare or any("*" in path for path in paths) else paths

    def matches(self, path: str) -> bool:
        """Returns whether the pattern matches `path`."""
        components = path.split("/")
        if self.bare:
            return components[-1] == self.alternatives[0][0]
        if self.exact is not None:
            return path in self.exact
        return any(_matches(alternative, components) for alternative in self.alternatives)

    @property
    def names(self) -> tuple[str, ...]:
        """The last component of each alternative, which matches the name of a parameter."""
        return tuple(alternative[-1] for alternative in self.alternatives)


def _components(alternative: str) -> tuple[str, ...]:
    """Returns the components of a pattern, with adjacent `**` merged into one."""
    parts = alternative.split("/")
    return tuple(part for i, part in enumerate(parts) if not part == "**" == parts[i - 1] or i == 0)


def _expand(text: str) -> list[str]:
    """Returns the patterns that result from replacing every `{a,b}` by each of its alternatives."""
    results, queue = [], [text]
    while queue:
        head = queue.pop(0)
        braces = _BRACES.search(head)
        if braces is None or "{" in head[: braces.start()]:
            if "{" in head or "}" in head:
                raise InvalidPolicy(f"{text!r}: braces do not match. Write alternatives as '{{a,b}}', without nesting.")
            results.append(head)
            continue
        words = braces.group(1).split(",")
        if len(words) + len(queue) + len(results) > _MAX_ALTERNATIVES:
            raise InvalidPolicy(
                f"{text!r} has more than {_MAX_ALTERNATIVES} alternatives. Write several rules, or use '*'."
            )
        queue[:0] = [head[: braces.start()] + word + head[braces.end() :] for word in words]
    return results


def _component_matches(pattern: str, component: str) -> bool:
    """Returns whether `component` matches `pattern`, in which `*` is any text.

    Each part between stars is matched at its first occurrence, so that the time is linear.
    """
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
    """Returns whether the components of a path match those of a pattern.

    Reads the path once and tracks the set of reachable pattern positions, so that many `**` do not cost exponential
    time.
    """
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
        following = set()
        for position in positions:
            if position == len(pattern):
                continue
            if pattern[position] == "**":
                following.add(position)
            elif _component_matches(pattern[position], component):
                following.add(position + 1)
        positions = skip(following)
    return len(pattern) in positions
