"""Path patterns, such as `layers/*/self_attn/**/kernel`.

A pattern without `/`, `*` and `{` is a bare name and matches every path whose last component it is.  Any other pattern
is anchored at the root: `*` matches one component or a part of one, `**` any number of components including none,
`{a,b}` alternatives within a component, and `{0..5}` the numbers from 0 to 5.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re

from .errors import InvalidPolicy, shown

_SPECIAL = re.compile(r"[?\[\]!()^$|\\,]")
_BRACES = re.compile(r"\{([^{}/]*)\}")
_RANGE = re.compile(r"(0|[1-9][0-9]{0,8})\.\.(0|[1-9][0-9]{0,8})")
_MAX_CHARACTERS = 500
_MAX_STARS = 16  # in a component
_MAX_ALTERNATIVES = 512  # of all components of a pattern, and paths that a pattern spells out
_MAX_GLOBS = 64  # alternatives with `*`

GLOBS = "Patterns are globs, not regular expressions: write '*' for part of a component, '**' for any number of them."


@dataclasses.dataclass(frozen=True)
class Component:
    """One component of a pattern: `q_proj`, `layer_*`, `{q,k}_proj` or `{0..5}`, but not `**`.

    names  the components that match
    globs  the alternatives with `*`, each of which can match others
    """

    names: frozenset[str]
    globs: tuple[str, ...] = ()

    def matches(self, component: str) -> bool:
        """Returns whether `component`, of a path, matches."""
        return component in self.names or any(_glob_matches(glob, component) for glob in self.globs)

    def __iter__(self) -> itertools.chain[str]:
        return itertools.chain(self.names, self.globs)

    def __len__(self) -> int:
        return len(self.names) + len(self.globs)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The compiled form of a pattern: its components, in which None is `**`.

    >>> Pattern.of("layers/{0..7}/{q,k}_proj/kernel").matches("layers/3/k_proj/kernel")
    True
    """

    components: tuple[Component | None, ...]
    bare: bool

    @staticmethod
    @functools.lru_cache(4096)
    def of(text: str) -> Pattern:
        """Returns the pattern for `text`.

        Raises:
          InvalidPolicy: for an empty component, for any glob character other than `*`, `**`, `{a,b}` and `{0..5}`, and
            for a pattern with too many characters, `*` or alternatives.
        """
        if len(text) > _MAX_CHARACTERS:
            raise InvalidPolicy(
                f"the pattern {shown(text)} has {len(text)} characters, expected at most {_MAX_CHARACTERS}. "
                "Write several rules, or use '*'."
            )
        bare = not any(character in text for character in "/*{}")
        parts = text.split("/")
        # Adjacent `**` are merged into one.
        parts = [part for i, part in enumerate(parts) if i == 0 or not part == "**" == parts[i - 1]]
        components = tuple(None if part == "**" else _component(part, text) for part in parts)
        pattern = Pattern(components, bare)
        if pattern.alternatives > _MAX_ALTERNATIVES:
            raise _too_many(text)
        if pattern.globs > _MAX_GLOBS:
            raise InvalidPolicy(f"{text!r} has more than {_MAX_GLOBS} alternatives with '*'. Write several rules.")
        return pattern

    @functools.cached_property
    def exact(self) -> frozenset[str] | None:
        """The paths that match, for a pattern without `*` that is not a bare name and has few of them; else None."""
        parts = [component.names for component in self.components if component and not component.globs]
        few = len(parts) == len(self.components) and math.prod(map(len, parts)) <= _MAX_ALTERNATIVES
        return frozenset(map("/".join, itertools.product(*parts))) if few and not self.bare else None

    @functools.cached_property
    def alternatives(self) -> int:
        """The number of alternatives of all components."""
        return sum(len(component) for component in self.components if component)

    @functools.cached_property
    def globs(self) -> int:
        """The number of alternatives with `*`, a component with one of them not counted."""
        return 1 + sum(max(len(component.globs) - 1, 0) for component in self.components if component)

    def matches(self, path: str) -> bool:
        """Returns whether the pattern matches `path`."""
        if self.exact is not None:
            return path in self.exact
        components = path.split("/")
        return _matches(self.components, components[-1:] if self.bare else components)

    @property
    def names(self) -> tuple[str, ...]:
        """The alternatives of the last component, which matches the name of a parameter."""
        last = self.components[-1]
        return ("**",) if last is None else tuple(last)

    @property
    def anchored(self) -> bool:
        """Whether the pattern matches only at the root: it is neither a bare name nor begins with `**`."""
        return not self.bare and self.components[0] is not None


def _component(part: str, text: str) -> Component:
    """Returns the compiled form of one component of the pattern `text`."""
    alternatives = dict.fromkeys(_expand(part, text))
    for alternative in alternatives:
        if special := _SPECIAL.search(alternative):
            raise InvalidPolicy(
                f"{text!r}: {special.group()!r} has no meaning in a pattern. Write '*' (part of a component), "
                "'**' (any number of components), '{a,b}' (alternatives), '{0..5}' (numbers)."
                + (f" {GLOBS}" if special.group() in r"[]()^$|\\" else "")
            )
        if not alternative:
            raise InvalidPolicy(
                f"{text!r} has an empty component. Paths look like layers/0/dense/kernel, "
                "without a leading, trailing or double '/'."
            )
        if alternative.count("*") > _MAX_STARS:
            raise InvalidPolicy(f"{text!r}: {alternative!r} has more than {_MAX_STARS} '*'. Write fewer.")
        if "**" in alternative:
            raise InvalidPolicy(
                f"{text!r}: '**' must be a whole component. Write 'a/**/b', or 'a*' for part of a component."
            )
    globs = tuple(alternative for alternative in alternatives if "*" in alternative)
    return Component(frozenset(alternatives).difference(globs), globs)


def _expand(part: str, text: str) -> list[str]:
    """Returns the alternatives of a component: every combination of the words in its braces."""
    pieces = _BRACES.split(part)  # text and the contents of braces by turns
    if any("{" in piece or "}" in piece for piece in pieces[::2]):
        raise InvalidPolicy(f"{text!r}: braces do not match. Write alternatives as '{{a,b}}', without nesting.")
    words = [[piece] if i % 2 == 0 else _words(piece, text) for i, piece in enumerate(pieces)]
    if math.prod(map(len, words)) > _MAX_ALTERNATIVES:
        raise _too_many(text)
    return list(map("".join, itertools.product(*words)))


def _words(braces: str, text: str) -> list[str]:
    """Returns the alternatives in one pair of braces, with ranges of numbers spelled out."""
    words: list[str] = []
    for word in braces.split(","):
        if ".." not in word:
            words.append(word)
            continue
        ends = _RANGE.fullmatch(word)
        first, last = map(int, ends.groups()) if ends else (0, -1)
        if last < first:
            raise InvalidPolicy(
                f"{text!r}: {shown(word)} is not a range of numbers. Write the smaller number first, without zeros "
                "in front, as in '{0..5}', which includes 0 and 5."
            )
        if last - first >= _MAX_ALTERNATIVES:
            raise _too_many(text)
        words += map(str, range(first, last + 1))
    return words


def _too_many(text: str) -> InvalidPolicy:
    return InvalidPolicy(f"{text!r} has more than {_MAX_ALTERNATIVES} alternatives. Write several rules, or use '*'.")


def _glob_matches(glob: str, component: str) -> bool:
    """Returns whether `component` matches `glob`, in which `*` is any text.

    Each part between stars is matched at its first occurrence, so that the time is linear.
    """
    first, *middle, last = glob.split("*")
    if not component.startswith(first) or not component.endswith(last) or len(component) < len(first) + len(last):
        return False
    position, end = len(first), len(component) - len(last)
    for part in middle:
        position = component.find(part, position, end)
        if position < 0:
            return False
        position += len(part)
    return True


def _matches(pattern: tuple[Component | None, ...], components: list[str]) -> bool:
    """Returns whether the components of a path match those of a pattern.

    Reads the path once and tracks the set of reachable pattern positions, so that many `**` do not cost exponential
    time.
    """
    if len(pattern) - pattern.count(None) > len(components):
        return False
    for part, component in ((pattern[0], components[0]), (pattern[-1], components[-1])):
        if part is not None and not part.matches(component):
            return False

    def skip(positions: set[int]) -> set[int]:
        reached = set(positions)
        for position in sorted(positions):
            while position < len(pattern) and pattern[position] is None:
                position += 1
                reached.add(position)
        return reached

    positions = skip({0})
    for component in components:
        following = set()
        for position in positions:
            if position == len(pattern):
                continue
            part = pattern[position]
            if part is None:
                following.add(position)
            elif part.matches(component):
                following.add(position + 1)
        positions = skip(following)
    return len(pattern) in positions
