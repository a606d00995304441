"""The rules of a policy by slot, as immutable values with equality, a hash and a `repr`.

This file depends on no tree, file or plan.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from .blocks import Block, as_block
from .dtypes import dtype_name
from .errors import InvalidPolicy, MissingFile, UnknownDtype
from .formats import Format
from .paths import is_scale, scale_path
from .patterns import Pattern
from .slots import SLOTS, Slot

SlotLike = DTypeLike | Format | Mapping[str, Any] | None

_MAX_CACHED = 1 << 16  # paths
_MAX_PATTERNS = 256  # with `*`: bounds the time that a hostile policy can take
_MAX_ALTERNATIVES = 1 << 14  # in braces: bounds the memory


@functools.lru_cache(4096)
def names_scales(pattern: Pattern) -> bool:
    """Returns whether a pattern is for scales: `scale_inv`, `**/*scale_inv`, `embed/embedding_scale_inv`."""
    return any(name.endswith("scale_inv") for name in pattern.names)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One `pattern: format` entry of a slot.

    pattern   a parameter's name or an anchored path pattern, without the `?`; "default" for the default
    format    the format of the parameters that match; None leaves them unchanged
    optional  whether the pattern may match nothing (a trailing `?` in the key)
    source    file and line, such as "policy.yaml:4"; ignored by equality and hash
    by_field  whether paths begin with the field of an optimizer's state, so that a pattern without a slash is a field
    """

    pattern: str
    format: Format | None
    optional: bool = False
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)
    by_field: bool = dataclasses.field(default=False, repr=False)

    @property
    def key(self) -> str:
        """The key in the map: the pattern, with `?` if it is optional."""
        return self.pattern + "?" * self.optional

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of the format's values; None where the format is None."""
        return None if self.format is None else self.format.values

    @property
    def where(self) -> str:
        """The prefix of an error about the rule: "file:line: ", or the empty string without a source."""
        return f"{self.source}: " if self.source else ""

    @functools.cached_property
    def compiled(self) -> Pattern:
        """The compiled pattern; `mu` is `mu/**` where paths begin with a field."""
        return Pattern.of(f"{self.pattern}/**" if self.by_field and "/" not in self.pattern else self.pattern)

    def reaches(self, path: str) -> bool:
        """Returns whether the rule applies to `path`: a path of scales needs a pattern for scales."""
        return (not is_scale(path) or names_scales(self.compiled)) and self.compiled.matches(path)


@dataclasses.dataclass(frozen=True)
class SlotRules:
    """The rules of one slot in their order, and the default.

    A slot that is one dtype has a default and no rules; a slot that is null has neither.
    """

    rules: tuple[Rule, ...] = ()
    default: Rule | None = None

    @functools.cached_property
    def _places(self) -> tuple[dict[str, list[int]], list[int]]:
        """Indices into `rules`: by path for the rules that spell out their paths, and a list for the others."""
        exact: dict[str, list[int]] = collections.defaultdict(list)
        others = []
        for i, rule in enumerate(self.rules):
            if rule.compiled.exact is None:
                others.append(i)
            for path in rule.compiled.exact or ():
                exact[path].append(i)
        return dict(exact), others

    @functools.cached_property
    def _cache(self) -> dict[str, tuple[Rule, ...]]:
        """Results of `reaching`, since resolving a policy asks for each path several times."""
        return {}

    def reaching(self, path: str) -> tuple[Rule, ...]:
        """Returns all rules that apply to `path`, in their order."""
        rules = self._cache.get(path)
        if rules is None:
            exact, others = self._places
            places = [*exact.get(path, ()), *(i for i in others if self.rules[i].reaches(path))]
            rules = tuple(self.rules[i] for i in sorted(places))
            if len(self._cache) < _MAX_CACHED:
                self._cache[path] = rules
        return rules

    def rule(self, path: str) -> Rule | None:
        """Returns the rule for the parameter at `path`: the first one that applies to it, or the default."""
        first = next(iter(self.reaching(path)), None)
        return self.default if first is None and not is_scale(path) else first

    def format(self, path: str) -> Format | None:
        """Returns the format that the slot has for the parameter at `path`; None leaves the parameter unchanged."""
        rule = self.rule(path)
        return None if rule is None else rule.format

    def dtype(self, path: str) -> np.dtype | None:
        """Returns the dtype of the values of `format(path)`."""
        format = self.format(path)
        return None if format is None else format.values

    def plain(self) -> Any:
        """Returns the value of the slot in constructors, `repr` and YAML: None, a format or a map."""
        default = None if self.default is None or self.default.format is None else self.default.format.plain()
        if not self.rules:
            return default
        entries = {rule.key: None if rule.format is None else rule.format.plain() for rule in self.rules}
        return entries if default is None else entries | {"default": default}


def read_slot(
    slot: Slot,
    value: Any,
    sources: Mapping[str, str] | None = None,
    default_source: str | None = None,
    base: SlotRules = SlotRules(),
) -> SlotRules:
    """Returns the rules for the value of a slot.

    value           None, a format, a map from patterns to formats, or rules that are read already
    sources         file and line by key of a map
    default_source  file and line of a slot that is not a map
    base            rules that follow those of a map, or rules that are read already: its rules for the same patterns
                    are left out, and its default applies if `value` has none

    Raises:
      UnknownDtype, InvalidPolicy: for a key or a format that the slot does not accept, with file and line if known.
    """
    if isinstance(value, SlotRules):
        return _followed(slot, value.rules, value.default or base.default, base)
    if not slot.by_parameter:
        with located(default_source):
            return SlotRules(default=_default(slot.read_one(value), default_source))
    if not isinstance(value, Mapping):
        with located(default_source):
            return SlotRules(default=_default(slot.read(None, value, "default"), default_source))
    sources, rules, default = sources or {}, [], None
    for key, format in value.items():
        source = sources.get(key) if isinstance(key, str) else None
        with located(source):
            if not isinstance(key, str) or not key.rstrip("?"):
                raise InvalidPolicy(
                    f"{slot.name}: {key!r} is not the name or path of a parameter. Write text such as 'kernel'."
                )
            pattern, optional = key.removesuffix("?"), key.endswith("?")
            if pattern == "default" and optional:
                raise InvalidPolicy(f"{slot.name}: default always applies. Write it without '?'.")
            if key == "default":
                default = _default(slot.read(key, format, "default"), source)
                continue
            kind = "scales" if names_scales(Pattern.of(pattern)) else "rule"
            rules.append(Rule(pattern, slot.read(key, format, kind), optional, source, slot.by_field))
            if len(rules) % 64 == 0:
                check_size(slot.name, rules)
    return _followed(slot, tuple(rules), default if "default" in value else base.default, base)


def _followed(slot: Slot, rules: tuple[Rule, ...], default: Rule | None, base: SlotRules) -> SlotRules:
    """Returns `rules`, then those of `base` for other patterns, and `default`."""
    patterns = {rule.pattern for rule in rules}
    rules = (*rules, *(rule for rule in base.rules if rule.pattern not in patterns))
    check_size(slot.name, rules)
    return SlotRules(rules, default)


def check_size(slot: str, rules: Sequence[Rule]) -> None:
    """Raises InvalidPolicy if matching the patterns of a slot could take long, or much memory."""
    patterns = [rule.compiled for rule in rules]
    if sum(pattern.alternatives - 1 for pattern in patterns) > _MAX_ALTERNATIVES:
        raise InvalidPolicy(f"{slot}: more than {_MAX_ALTERNATIVES} alternatives in braces. Write '*' instead.")
    if sum(pattern.globs for pattern in patterns if pattern.exact is None) > _MAX_PATTERNS:
        raise InvalidPolicy(
            f"{slot}: more than {_MAX_PATTERNS} patterns with '*', counting the alternatives in braces. "
            "Write the paths without '*'."
        )


def _default(format: Format | None, source: str | None) -> Rule | None:
    return None if format is None else Rule("default", format, source=source)


@contextlib.contextmanager
def located(source: str | None) -> Iterator[None]:
    """A context that prefixes `source`, "file:line", to the message of the errors of a policy."""
    try:
        yield
    except (InvalidPolicy, UnknownDtype, MissingFile) as error:
        if source is None or str(error).startswith(f"{source.rpartition(':')[0]}:"):  # has the prefix already
            raise
        raise type(error)(f"{source}: {error}") from error


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class PolicyRules:
    """The rules of every slot, and the default block: an immutable, hashable value and the base class of `Policy`.

    slots  (name, rules) of every slot that is not empty, in the order of `SLOTS`
    block  (rows, columns) for rules without a block; None means (128, 128) for quantisation, and no change of the block
           of a stored pair
    """

    slots: tuple[tuple[str, SlotRules], ...]
    block: Block | None

    def __init__(self, slots: Mapping[str, Any], block: Any = None):
        if unknown := [name for name in slots if name not in SLOTS]:
            raise unknown_slot(unknown[0])
        by_name = {name: read_slot(slot, slots[name]) for name, slot in SLOTS.items() if name in slots}
        not_empty = tuple((name, rules) for name, rules in by_name.items() if rules != SlotRules())
        object.__setattr__(self, "slots", not_empty)
        object.__setattr__(self, "block", None if block is None else as_block(block))

    def slot(self, name: str) -> SlotRules:
        """Returns the rules of the slot `name`, which may be empty."""
        return dict(self.slots).get(name, SlotRules())

    @property
    def params(self) -> SlotRules:
        """The rules for the storage of parameters."""
        return self.slot("params")

    @property
    def compute(self) -> SlotRules:
        """The rules for the arithmetic on parameters."""
        return self.slot("compute")

    @property
    def grads(self) -> SlotRules:
        """The rules for the gradients that the optimizer receives."""
        return self.slot("grads")

    @property
    def opt_state(self) -> SlotRules:
        """The rules for the state of the optimizer, by field and path: `mu/layers/0/kernel`."""
        return self.slot("opt_state")

    @property
    def master(self) -> SlotRules:
        """The rules for master copies: the values that training adds up, where storage has fewer bits."""
        return self.slot("master")

    def _one(self, name: str) -> np.dtype | None:
        default = self.slot(name).default
        return None if default is None else default.dtype

    @property
    def output(self) -> np.dtype | None:
        """The dtype of a model's result; None: the activations' dtype."""
        return self._one("output")

    @property
    def kv_cache(self) -> np.dtype | None:
        """The dtype of cached keys and values; None: the activations' dtype."""
        return self._one("kv_cache")

    @property
    def activations(self) -> np.dtype | None:
        """The dtype of activations, which is the default of `compute`; None if the policy has none."""
        return self._one("compute")

    def plain(self) -> dict[str, Any]:
        """Returns the arguments of the constructor that give an equal policy, without those that are None."""
        arguments = {name: rules.plain() for name, rules in self.slots}
        return arguments if self.block is None else arguments | {"block": self.block}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.plain().items())})"

    def storage(self, path: str) -> Format | None:
        """Returns the complete format in which a new parameter at `path` is stored; None: in its own dtype.

        Raises:
          InvalidPolicy: if the kernel's format and a rule for its scales have different scale dtypes.
        """
        format = self.params.format(path)
        return None if format is None else format.completed(self.block, self.scale(path))

    def scale(self, path: str) -> np.dtype | None:
        """Returns the dtype that the policy requests for the scales of the parameter at `path`; None: unspecified.

        Raises:
          InvalidPolicy: if the kernel's format and a rule for its scales have different scale dtypes.
        """
        kernel_rule, scale_rule = self.params.rule(path), self.params.rule(scale_path(path))
        by_format = None if kernel_rule is None or kernel_rule.format is None else kernel_rule.format.scale
        by_rule = None if scale_rule is None else scale_rule.dtype
        if by_format is not None and by_rule is not None and by_rule != by_format:
            assert kernel_rule is not None
            assert scale_rule is not None
            raise InvalidPolicy(
                f"{scale_rule.where}{scale_rule.key!r} (params) requests {dtype_name(by_rule)} scales for {path!r}, "
                f"whose format ({kernel_rule.key!r}) has {dtype_name(by_format)} scales. Write null for the scales, or "
                "remove the scale from the format."
            )
        return by_format or by_rule


def unknown_slot(key: str, *others: str) -> InvalidPolicy:
    """Returns the error for a name that is neither the name of a slot nor one of `others`, with the nearest name."""
    names = [*SLOTS, "block", *others]
    near = difflib.get_close_matches(key, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InvalidPolicy(f"unknown slot {key!r}. A policy has {', '.join(names)}.{hint}")
