"""Decisions: which rule of a slot applies to each parameter, and the errors for rules that apply to none."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable

from .errors import InvalidPolicy, ShadowedRule, UnmatchedRule, count
from .paths import is_scale
from .patterns import GLOBS, Pattern
from .rules import Rule, SlotRules


def decide(name: str, slot: SlotRules, paths: Iterable[str], noun: str = "parameter") -> dict[str, Rule | None]:
    """Returns, for each of `paths`, the rule of a slot that applies: the first one that matches, or the default.

    name  the name of the slot, for errors
    noun  what is at the paths, for errors

    Raises:
      UnmatchedRule: for a rule that matches no path, unless its key ends with `?` or it is `scale_inv: null`.
      ShadowedRule: for a rule whose every path an earlier rule matches.
    """
    paths = list(paths)
    winners: dict[Rule, dict[Rule, None]] = {rule: {} for rule in slot.rules}  # the first rules on a rule's paths
    effective: set[Rule] = set()
    decisions: dict[str, Rule | None] = {}
    for path in paths:
        rules = slot.reaching(path)
        for rule in rules:
            winners[rule][rules[0]] = None
        if rules:
            effective.add(rules[0])
            decisions[path] = rules[0]
        else:
            decisions[path] = None if is_scale(path) else slot.default
    for rule in slot.rules:
        if rule in effective:
            continue
        if winners[rule]:
            raise _shadowed(name, rule, winners[rule])
        if not (rule.optional or (rule.pattern == "scale_inv" and rule.format is None)):
            raise UnmatchedRule(
                f"{rule.where}{rule.key!r} ({name}) matches none of {count(len(paths), noun)}.\n"
                f"{_nearest(rule, paths)}"
                "  Correct the pattern, remove the rule, or end it with '?' if it may match nothing."
            )
    return decisions


def _shadowed(name: str, rule: Rule, winners: Iterable[Rule]) -> ShadowedRule:
    """Returns the error for a rule of which `winners` are before it on every path."""
    keys = ", ".join(sorted(repr(winner.key) for winner in winners))
    files = {(each.source or "").rpartition(":")[0] for each in (rule, *winners)}
    included = " To replace a rule of another file or policy, repeat its key." if len(files) > 1 else ""
    return ShadowedRule(
        f"{rule.where}{rule.key!r} ({name}) decides nothing: every parameter that it matches is matched by an "
        f"earlier rule: {keys}.\n"
        f"  The first rule that matches wins. Write the more specific rule first, or remove this rule.{included}"
    )


def _nearest(rule: Rule, paths: list[str]) -> str:
    """Returns the lines of an error that show the path nearest to a rule's pattern, and how patterns are written."""
    pattern = rule.compiled
    if correction := _correction(rule, paths):
        return f"  {correction}\n"
    if rule.by_field and "/" not in rule.pattern:
        fields = {path.partition("/")[0] for path in paths}
        near = difflib.get_close_matches(rule.pattern, sorted(fields), n=1, cutoff=0.0)
    elif pattern.bare:
        names = {path.rpartition("/")[2]: path for path in reversed(paths)}
        near = [names[name] for name in difflib.get_close_matches(rule.pattern, names, n=1, cutoff=0.0)]
    else:
        near = difflib.get_close_matches(rule.pattern.replace("*", "0"), dict.fromkeys(paths), n=1, cutoff=0.0)
    lines = [f"nearest: {near[0]}"] if near else []
    if ".*" in rule.pattern or ".+" in rule.pattern:
        lines.append(GLOBS)
    elif pattern.anchored and "/" in rule.pattern:
        lines.append("Patterns are anchored at the root; '**/…' matches at any depth.")
    return "".join(f"  {line}\n" for line in lines)


def _correction(rule: Rule, paths: list[str]) -> str | None:
    """Returns the line of an error for a rule that names a module, or a path from elsewhere than the root."""
    narrow = rule.format is not None and rule.format.narrow
    because = f"Rules name parameters, and {rule.pattern!r} is a module."
    anchored = "Patterns are anchored at the root."
    if rule.by_field:
        anchored = "Paths of this slot begin with a field of the optimizer's state, and a key without '/' is a field."
    corrections = {f"**/{rule.pattern}": anchored}
    for prefix in ("", "**/"):  # kernels only, where a bias could not have the format
        corrections |= {f"{prefix}{rule.pattern}{suffix}": because for suffix in ("/**/kernel", "/**")[not narrow :]}
    for pattern, reason in corrections.items():
        with contextlib.suppress(InvalidPolicy):  # longer than a pattern may be
            if any(map(Pattern.of(pattern).matches, paths)):
                return f"Did you mean {pattern!r}? {reason}"
    return None
