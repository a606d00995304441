"""A policy as a pure value: rules by slot, with equality, a hash and a written form.

Nothing here knows a tree, a file or a plan.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from .blocks import Block, as_block
from .dtypes import dtype_name
from .errors import InvalidPolicy, UnknownDtype
from .formats import Format
from .paths import is_scale, scale_path
from .patterns import Pattern
from .slots import SLOTS, Slot

SlotLike = DTypeLike | Format | Mapping[str, Any] | None

_MOST_REMEMBERED = 1 << 16  # paths
_MOST_PATTERNS = 256  # a hostile policy should not cost seconds


@functools.lru_cache(4096)
def names_scales(pattern: Pattern) -> bool:
    """Whether a pattern names scales: `scale_inv`, `**/*scale_inv`, `embed/embedding_scale_inv`."""
    return any(name.endswith("scale_inv") for name in pattern.names)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One `pattern: format` line of a slot.

    pattern   a bare name or an anchored path pattern, without the `?`; "default" for the default
    format    None leaves the parameter alone
    optional  whether the pattern may match nothing (written as a trailing `?`)
    source    file and line, such as "policy.yaml:4"; no part of the rule's identity
    """

    pattern: str
    format: Format | None
    optional: bool = False
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """The pattern as it is written in the map."""
        return self.pattern + "?" * self.optional

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of the format's values."""
        return None if self.format is None else self.format.values

    @property
    def where(self) -> str:
        """What an error about the rule begins with: its file and line, or nothing."""
        return f"{self.source}: " if self.source else ""

    @functools.cached_property
    def compiled(self) -> Pattern:
        """The pattern, ready to match."""
        return Pattern.of(self.pattern)

    def reaches(self, path: str) -> bool:
        """Whether the pattern matches `path`; scales are reached only by a pattern that names them."""
        return (not is_scale(path) or names_scales(self.compiled)) and self.compiled.matches(path)


@dataclasses.dataclass(frozen=True)
class SlotRules:
    """What a policy says in one slot: rules in the order written, then the default.

    A slot that is one dtype is a default without rules; one that is null has neither.
    """

    rules: tuple[Rule, ...] = ()
    default: Rule | None = None

    @functools.cached_property
    def _places(self) -> tuple[dict[str, list[int]], list[int]]:
        """Places in `rules`: of those that name a path in full, by path, and of all others."""
        exact: dict[str, list[int]] = collections.defaultdict(list)
        others = []
        for i, rule in enumerate(self.rules):
            if rule.compiled.exact is None:
                others.append(i)
            for path in rule.compiled.exact or ():
                exact[path].append(i)
        return dict(exact), others

    @functools.cached_property
    def _reached(self) -> dict[str, tuple[Rule, ...]]:
        """What `reaching` found before: a resolution asks of each path several times."""
        return {}

    def reaching(self, path: str) -> tuple[Rule, ...]:
        """The rules that reach `path`, in their order."""
        reached = self._reached.get(path)
        if reached is None:
            exact, others = self._places
            places = [*exact.get(path, ()), *(i for i in others if self.rules[i].reaches(path))]
            reached = tuple(self.rules[i] for i in sorted(places))
            if len(self._reached) < _MOST_REMEMBERED:
                self._reached[path] = reached
        return reached

    def rule(self, path: str) -> Rule | None:
        """What decides for the parameter at `path`: the first rule that reaches it, or the default."""
        first = next(iter(self.reaching(path)), None)
        return self.default if first is None and not is_scale(path) else first

    def format(self, path: str) -> Format | None:
        """The format that the slot gives the parameter at `path`; None leaves it alone."""
        rule = self.rule(path)
        return None if rule is None else rule.format

    def dtype(self, path: str) -> np.dtype | None:
        """The dtype of that format's values."""
        format = self.format(path)
        return None if format is None else format.values

    def plain(self) -> Any:
        """The slot as constructors, `repr` and YAML write it: None, a format, or a map."""
        default = None if self.default is None or self.default.format is None else self.default.format.plain()
        if not self.rules:
            return default
        named = {rule.key: None if rule.format is None else rule.format.plain() for rule in self.rules}
        return named if default is None else named | {"default": default}


def read_slot(
    slot: Slot, value: Any, sources: Mapping[str, str] | None = None, default_source: str | None = None
) -> SlotRules:
    """The rules that `value` writes in `slot`; `sources` gives file and line of a map's keys."""
    if isinstance(value, SlotRules):
        return value
    if not slot.by_parameter:
        return SlotRules(default=_default(slot.read_one(value), default_source))
    if not isinstance(value, Mapping):
        return SlotRules(default=_default(slot.read("default", value, "default"), default_source))
    sources, rules, default = sources or {}, [], None
    for key, written in value.items():
        source = sources.get(key) if isinstance(key, str) else None
        with located(source):
            if not isinstance(key, str) or not key.rstrip("?"):
                raise InvalidPolicy(
                    f"{key!r} is no name of a parameter in {slot.name}. Keys are text, such as 'kernel'."
                )
            pattern, optional = key.removesuffix("?"), key.endswith("?")
            if pattern == "default" and optional:
                raise InvalidPolicy(f"{slot.name}: default always applies. Write it without '?'.")
            if key == "default":
                default = _default(slot.read(key, written, "default"), source)
                continue
            kind = "scales" if names_scales(Pattern.of(pattern)) else "rule"
            rules.append(Rule(pattern, slot.read(key, written, kind), optional, source))
    if sum(len(rule.compiled.alternatives) for rule in rules if rule.compiled.exact is None) > _MOST_PATTERNS:
        raise InvalidPolicy(
            f"{slot.name}: more than {_MOST_PATTERNS} patterns, alternatives counted. Name paths in full."
        )
    return SlotRules(tuple(rules), default)


def _default(format: Format | None, source: str | None) -> Rule | None:
    return None if format is None else Rule("default", format, source=source)


@contextlib.contextmanager
def located(source: str | None) -> Iterator[None]:
    """A context that puts `source` (file and line) in front of the message of a policy's error."""
    try:
        yield
    except (InvalidPolicy, UnknownDtype) as error:
        if source is None or str(error).startswith(f"{source.rpartition(':')[0]}:"):  # located already
            raise
        raise type(error)(f"{source}: {error}") from error


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class PolicyRules:
    """The rules of every slot and the block of rules that name none: an immutable, hashable value.

    slots  (name, rules) of every slot that says something, in the order of the table
    block  (rows, columns); None means (128, 128) where something is quantised, and that a stored pair keeps its own
    """

    slots: tuple[tuple[str, SlotRules], ...]
    block: Block | None

    def __init__(self, slots: Mapping[str, Any], block: Any = None):
        if unknown := [name for name in slots if name not in SLOTS]:
            raise unknown_slot(unknown[0])
        read = {name: read_slot(slot, slots[name]) for name, slot in SLOTS.items() if name in slots}
        said = tuple((name, rules) for name, rules in read.items() if rules != SlotRules())
        object.__setattr__(self, "slots", said)
        object.__setattr__(self, "block", None if block is None else as_block(block))

    def slot(self, name: str) -> SlotRules:
        """The rules of the slot called `name`; empty where the policy says nothing there."""
        return dict(self.slots).get(name, SlotRules())

    @property
    def params(self) -> SlotRules:
        """How parameters are stored."""
        return self.slot("params")

    @property
    def compute(self) -> SlotRules:
        """How parameters enter arithmetic."""
        return self.slot("compute")

    def _one(self, name: str) -> np.dtype | None:
        default = self.slot(name).default
        return None if default is None else default.dtype

    @property
    def output(self) -> np.dtype | None:
        """The dtype that a model returns; None: the activations' dtype."""
        return self._one("output")

    @property
    def kv_cache(self) -> np.dtype | None:
        """The dtype of cached keys and values; None: the activations' dtype."""
        return self._one("kv_cache")

    @property
    def activations(self) -> np.dtype | None:
        """The dtype of activations, the compute default; None where the policy names none."""
        return self._one("compute")

    def plain(self) -> dict[str, Any]:
        """`{slot: what it says}` as constructors and YAML write it, with `block`; null ones left out."""
        written = {name: rules.plain() for name, rules in self.slots}
        return written if self.block is None else written | {"block": self.block}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.plain().items())})"

    def storage(self, path: str) -> Format | None:
        """The complete format in which a new parameter at `path` is stored; None: as it comes.

        Raises:
          InvalidPolicy: where the kernel's format and a rule for its scales name different dtypes.
        """
        format = self.params.format(path)
        return None if format is None else format.completed(self.block, self.scale(path))

    def scale(self, path: str) -> np.dtype | None:
        """The dtype that the policy names for the scales of the parameter at `path`.

        Raises:
          InvalidPolicy: where the kernel's format and a rule for its scales name different ones.
        """
        rule, scales = self.params.rule(path), self.params.rule(scale_path(path))
        named = None if rule is None or rule.format is None else rule.format.scale
        asked = None if scales is None else scales.dtype
        if named is not None and asked is not None and asked != named:
            assert rule is not None
            assert scales is not None
            raise InvalidPolicy(
                f"{scales.where}{scales.key!r} (params) asks {dtype_name(asked)} scales of {path!r}, but its format "
                f"({rule.key!r}) has {dtype_name(named)} ones. Write null for the scales, or leave the scale out of "
                "the format."
            )
        return named or asked


def unknown_slot(key: str) -> InvalidPolicy:
    """The error for a slot that no policy has, with the nearest name."""
    names = [*SLOTS, "block"]
    near = difflib.get_close_matches(key, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InvalidPolicy(f"unknown slot {key!r}. A policy has {', '.join(names)}.{hint}")
