"""Strict resolution: which rule decides each parameter, and no rule that decides nothing."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable

import numpy as np

from .errors import ShadowedRule, UnmatchedRule
from .patterns import Pattern
from .slots import Rule, Slot, is_scale


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a slot says of one parameter.

    dtype   None leaves it alone
    rule    the key that decided, "default", or None where nothing did
    source  file and line of that key
    """

    dtype: np.dtype | None = None
    rule: str | None = None
    source: str | None = None

    @property
    def where(self) -> str:
        """What an error about the key begins with."""
        return f"{self.source}: " if self.source else ""


def resolve(name: str, slot: Slot, paths: Iterable[str]) -> dict[str, Answer]:
    """The answer of the slot called `name` for each of `paths`.

    Raises:
      UnmatchedRule: a rule reaches no path; forgiven are `?` and `scale_inv: null`.
      ShadowedRule: earlier rules take every path that a rule reaches.
    """
    paths = list(paths)
    takers: dict[Rule, set[str]] = {rule: set() for rule in slot.rules}  # the rules that are first on what it reaches
    deciding, answers = set(), {}
    for path in paths:
        reaching = slot.reaching(path)
        for rule in reaching:
            takers[rule].add(reaching[0].key)
        if reaching:
            deciding.add(reaching[0])
            answers[path] = Answer(reaching[0].dtype, reaching[0].key, reaching[0].source)
        elif slot.default is not None and not is_scale(path):
            answers[path] = Answer(slot.default, "default", slot.default_source)
        else:
            answers[path] = Answer()
    for rule in slot.rules:
        if rule in deciding:
            continue
        where = f"{rule.source}: " if rule.source else ""
        if takers[rule]:
            raise ShadowedRule(
                f"{where}{rule.key!r} ({name}) decides nothing: every parameter it matches is taken before it by "
                f"{', '.join(map(repr, sorted(takers[rule])))}.\n"
                "  The first rule that matches wins. Write the narrower rule first, or remove this one."
            )
        if not (rule.optional or (rule.pattern == "scale_inv" and rule.dtype is None)):
            raise UnmatchedRule(
                f"{where}{rule.key!r} ({name}) matches none of {len(paths)} parameters.\n"
                f"{_nearest(rule, paths)}"
                "  Correct the pattern, remove the rule, or end it with '?' if it may match nothing."
            )
    return answers


def _nearest(rule: Rule, paths: list[str]) -> str:
    """The line that shows the nearest path."""
    pattern = Pattern.of(rule.pattern)
    if pattern.bare:
        names = {path.rpartition("/")[2]: path for path in reversed(paths)}
        near = [names[name] for name in difflib.get_close_matches(rule.pattern, names, n=1, cutoff=0.0)]
    else:
        near = difflib.get_close_matches(rule.pattern.replace("*", "0"), dict.fromkeys(paths), n=1, cutoff=0.0)
    unanchored = pattern.bare or pattern.alternatives[0][0] == "**"
    anchor = "" if unanchored else "  Patterns are anchored at the root; '**/…' reaches any depth.\n"
    return (f"  nearest: {near[0]}\n" if near else "") + anchor
