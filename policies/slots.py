"""Rules and slots: what one field of a policy says of each path, and how such a field is written."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from . import dtypes
from .errors import InvalidPolicy, UnknownDtype
from .patterns import Pattern

SlotLike = DTypeLike | Mapping[str, Any] | None
Block = tuple[int, int]

_MOST_PATTERNS = 256  # a hostile policy should not cost seconds
DEFAULT_BLOCK: Block = (128, 128)
"""The block of what perparam quantises where the policy names none: that of the published checkpoints."""


def is_scale(path: str) -> bool:
    """Whether `path` is that of the scales of a narrow parameter."""
    name = path.rpartition("/")[2]
    return name == "scale_inv" or name.endswith("_scale_inv")


@functools.lru_cache(4096)
def names_scales(pattern: Pattern) -> bool:
    """Whether a pattern speaks of scales: `scale_inv`, `**/*scale_inv`, `embed_tokens/embedding_scale_inv`."""
    return any(name.endswith("scale_inv") for name in pattern.names)


def scale_path(path: str) -> str:
    """Where the scales of the parameter at `path` stand: beside it.

    >>> scale_path("layers/0/mlp/up_proj/kernel"), scale_path("embed_tokens/embedding")
    ('layers/0/mlp/up_proj/scale_inv', 'embed_tokens/embedding_scale_inv')
    """
    parent, slash, name = path.rpartition("/")
    return parent + slash + ("scale_inv" if name == "kernel" else f"{name}_scale_inv")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One `pattern: dtype` line of a slot.

    pattern   a bare name or an anchored path pattern, without the `?`
    dtype     None leaves the parameter alone
    optional  whether the pattern may match nothing (written as a trailing `?`)
    source    file and line, such as "policy.yaml:4"; no part of the rule's identity
    """

    pattern: str
    dtype: np.dtype | None
    optional: bool = False
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """The pattern as it is written in the map."""
        return self.pattern + "?" * self.optional

    @functools.cached_property
    def compiled(self) -> Pattern:
        """The pattern, ready to match."""
        return Pattern.of(self.pattern)

    def reaches(self, path: str) -> bool:
        """Whether the rule's pattern matches `path`; scales are reached only by a pattern that names them."""
        return (not is_scale(path) or names_scales(self.compiled)) and self.compiled.matches(path)


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one field of a policy says: rules in the order written, then the default.

    A slot that is one dtype is a default without rules; one that is null has neither.
    """

    rules: tuple[Rule, ...] = ()
    default: np.dtype | None = None
    default_source: str | None = dataclasses.field(default=None, compare=False, repr=False)

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

    def reaching(self, path: str) -> list[Rule]:
        """The rules that reach `path`, in their order."""
        exact, others = self._places
        places = [*exact.get(path, ()), *(i for i in others if self.rules[i].reaches(path))]
        return [self.rules[i] for i in sorted(places)]

    def rule(self, path: str) -> Rule | None:
        """The first rule that reaches `path`."""
        return next(iter(self.reaching(path)), None)

    def dtype(self, path: str) -> np.dtype | None:
        """What the slot says of the parameter at `path`; None leaves it alone."""
        rule = self.rule(path)
        if rule is not None:
            return rule.dtype
        return None if is_scale(path) else self.default

    def plain(self) -> Any:
        """The slot as constructors, `repr` and YAML write it: None, a dtype's name, or a map."""
        default = None if self.default is None else dtypes.dtype_name(self.default)
        if not self.rules:
            return default
        named = {rule.key: None if rule.dtype is None else dtypes.dtype_name(rule.dtype) for rule in self.rules}
        return named if default is None else named | {"default": default}


def make_slot(
    name: str, value: Any, sources: Mapping[str, str] | None = None, default_source: str | None = None
) -> Slot:
    """The slot `name` that `value` writes; `sources` says of a map's keys where they stand."""
    if isinstance(value, Slot):
        return value
    if not isinstance(value, Mapping):
        return Slot(default=_slot_dtype(name, "default", value), default_source=default_source)
    sources, rules, default = sources or {}, [], None
    for key, dtype in value.items():
        with located(sources.get(key) if isinstance(key, str) else None):
            if not isinstance(key, str) or not key.rstrip("?"):
                raise InvalidPolicy(f"{key!r} is no name of a parameter in {name}. Keys are text, such as 'kernel'.")
            pattern, optional = key.removesuffix("?"), key.endswith("?")
            if pattern == "default" and optional:
                raise InvalidPolicy(f"{name}: default is no rule that could match nothing. Write it without '?'.")
            if key == "default":
                default, default_source = _slot_dtype(name, key, dtype), sources.get(key)
                continue
            found = _rule_dtype(name, key, Pattern.of(pattern), dtype)
            rules.append(Rule(pattern, found, optional, sources.get(key)))
    if sum(len(rule.compiled.alternatives) for rule in rules if rule.compiled.exact is None) > _MOST_PATTERNS:
        raise InvalidPolicy(f"{name}: more than {_MOST_PATTERNS} patterns, alternatives counted. Name paths in full.")
    return Slot(tuple(rules), default, default_source)


@contextlib.contextmanager
def located(source: str | None) -> Iterator[None]:
    """A context that puts `source` (file and line) in front of the message of a policy's error."""
    try:
        yield
    except (InvalidPolicy, UnknownDtype) as error:
        if source is None:
            raise
        raise type(error)(f"{source}: {error}") from error


def _readable(slot: str, key: str, dtype: Any) -> np.dtype | None:
    """The dtype or None; refuses what no parameter can be."""
    if dtype is None:
        return None
    if isinstance(dtype, str) and dtype in ("None", "none", "Null", "NULL", "~"):
        raise InvalidPolicy(f"{slot}: {key}: {dtype!r} is text here. To leave a parameter alone write null.")
    try:
        found = dtypes.as_dtype(dtype)
    except UnknownDtype as error:
        raise UnknownDtype(f"{slot}: {key}: {error}") from error
    if not dtypes.can_store(found):
        raise UnknownDtype(
            f"{slot}: {key}: a parameter cannot be {dtypes.dtype_name(found)}. "
            "Write a float (f32, bf16, f16), a narrow type with scales (f8_e4m3fn, f8_e5m2, …, int8), or null."
        )
    return found


def _slot_dtype(slot: str, key: str, dtype: Any) -> np.dtype | None:
    """The dtype of everything in a slot: narrow ones need a rule that says which parameters are meant."""
    found = _readable(slot, key, dtype)
    if found is not None and dtypes.is_narrow(found):
        raise UnknownDtype(
            f"{slot}: {dtypes.dtype_name(found)} needs scales, which only parameters of two or more dimensions have, "
            f"so it cannot be the {key} of a slot. Name the parameters: {{kernel: {dtypes.dtype_name(found)}}}."
        )
    if slot == "compute" and found is not None and not dtypes.is_activation(found):
        raise UnknownDtype(
            f"compute: {key}: activations are f32, bf16 or f16, not {dtypes.dtype_name(found)}. Write one of these."
        )
    return found


def _rule_dtype(slot: str, key: str, pattern: Pattern, dtype: Any) -> np.dtype | None:
    found = _readable(slot, key, dtype)
    if found is None:
        return None
    if names_scales(pattern):
        if slot == "compute":
            raise InvalidPolicy(f"compute: {key}: scales are always applied in f32. Write null, or leave the rule out.")
        if not dtypes.is_activation(found):
            raise UnknownDtype(
                f"{slot}: {key}: scales are f32, bf16 or f16, not {dtypes.dtype_name(found)}. "
                "Write one of these, or null to keep them as found."
            )
    elif slot == "compute" and not dtypes.is_activation(found) and (found.kind == "i" or not dtypes.is_narrow(found)):
        raise UnknownDtype(
            f"compute: {key}: {dtypes.dtype_name(found)} is no dtype to compute in. "
            "Write f32, bf16, f16, or a float8 type for matmuls with both operands narrow."
        )
    return found


def make_output(dtype: Any) -> np.dtype | None:
    """The dtype of a model's result that `dtype` writes."""
    if isinstance(dtype, Mapping):
        if set(dtype) - {"default"}:
            raise InvalidPolicy(
                f"output: what a model returns has one dtype, found the map {dict(dtype)}. Write f32, say."
            )
        dtype = dtype.get("default")
    return _slot_dtype("output", "default", dtype)


def make_kv_cache(dtype: Any) -> np.dtype | None:
    """The dtype of the cache of keys and values that `dtype` writes."""
    found = _readable("kv_cache", "default", dtype)
    if found is None or dtypes.is_activation(found) or found in (np.dtype(ml_dtypes.float8_e4m3fn), np.int8):
        return found
    raise UnknownDtype(
        f"kv_cache: {dtypes.dtype_name(found)} is no dtype for keys and values. "
        "Write f32, bf16, f16, f8_e4m3fn or int8."
    )


def as_block(block: Any) -> Block:
    """The block `block` as two Python integers.

    Raises:
      InvalidPolicy: unless it is two positive integers.
    """
    try:
        rows, columns = (operator.index(side) for side in block)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1 or any(isinstance(side, bool) for side in block):
        raise InvalidPolicy(f"block: expected two positive integers such as [128, 128], found {block!r}.")
    return rows, columns
