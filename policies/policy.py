"""The policy: which dtype each parameter has in storage and in compute, and which dtype the model returns."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import DTypeLike

from . import dtypes
from .errors import InvalidPolicy, UnknownDtype
from .patterns import Pattern

if TYPE_CHECKING:
    from .plan import Plan

SlotLike = DTypeLike | Mapping[str, Any] | None
Block = tuple[int, int]

DEFAULT_BLOCK: Block = (128, 128)
"""The block of what perparam quantises where the policy names none: that of the published checkpoints."""


def is_scale(path: str) -> bool:
    """Whether `path` is that of the scales of a narrow parameter."""
    name = path.rpartition("/")[2]
    return name == "scale_inv" or name.endswith("_scale_inv")


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

    def reaches(self, path: str) -> bool:
        """Whether the rule's pattern matches `path`; scales are reached only by a pattern that names them."""
        pattern = Pattern.of(self.pattern)
        return (not is_scale(path) or names_scales(pattern)) and pattern.matches(path)


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one field of a policy says: rules in the order written, then the default.

    A slot that is one dtype is a default without rules; one that is null has neither.
    """

    rules: tuple[Rule, ...] = ()
    default: np.dtype | None = None
    default_source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def rule(self, path: str) -> Rule | None:
        """The first rule that reaches `path`."""
        return next((rule for rule in self.rules if rule.reaches(path)), None)

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


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What a policy resolved to for one parameter of a module.

    storage  dtype as stored; None: as it comes
    scale    dtype of its scales, where the parameter is narrow
    compute  dtype it enters arithmetic in; None: narrow ones as stored, plain ones in the activations' dtype
    block    the block of its scales, where the parameter is narrow
    """

    storage: np.dtype | None = None
    scale: np.dtype | None = None
    compute: np.dtype | None = None
    block: Block | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Policy:
    """How each parameter is stored (`params`) and computed (`compute`), and what the model returns (`output`).

    params   None, one dtype, or a map from names and path patterns to dtypes; the first rule that matches wins
    compute  likewise
    output   None or one dtype
    block    the block in which perparam quantises, (rows, columns) as stored; None means (128, 128) where something
             is quantised, and that a narrow kernel which is found keeps its own

    A policy is an immutable value: equal policies compare and hash equal, so one can be a static argument of `jax.jit`.

    >>> Policy(params={"kernel": "f8_e4m3fn", "default": "f32"}, compute="bf16", output="f32")
    Policy(params={'kernel': 'f8_e4m3fn', 'default': 'f32'}, compute='bf16', output='f32')

    Raises:
      UnknownDtype: for a dtype that is unknown or cannot stand where it was written.
      InvalidPolicy: for a pattern, key or block that cannot be read.
    """

    params: Slot = Slot()
    compute: Slot = Slot()
    output: np.dtype | None = None
    block: Block | None = None

    def __init__(
        self, params: SlotLike | Slot = None, compute: SlotLike | Slot = None, output: Any = None, *, block: Any = None
    ):
        slots = {"params": make_slot("params", params), "compute": make_slot("compute", compute)}
        for name, value in {
            **slots,
            "output": _output(output),
            "block": None if block is None else as_block(block),
        }.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        fields = {"params": self.params.plain(), "compute": self.compute.plain()}
        fields["output"] = None if self.output is None else dtypes.dtype_name(self.output)
        fields["block"] = self.block
        return f"Policy({', '.join(f'{name}={value!r}' for name, value in fields.items() if value is not None)})"

    # Ways in and out: text.

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Policy:
        """The policy that a YAML file writes.

        Raises:
          MissingFile: where there is no such file.
          InvalidPolicy, UnknownDtype: with file and line.
        """
        from . import text

        return text.load(path)

    @staticmethod
    def loads(yaml: str, name: str = "<text>") -> Policy:
        """The policy that YAML text writes; `name` is what errors and plans call the text."""
        from . import text

        return text.loads(yaml, name)

    @staticmethod
    def parse(line: str) -> Policy:
        """The uniform policy of one line, jmp's form: `params=f32,compute=bf16,output=f32`, or `p=f32,c=bf16,o=f32`.

        >>> Policy.parse("p=f32,c=bf16,o=f32") == Policy("f32", "bf16", "f32")
        True
        """
        from . import text

        return text.parse(line)

    def dumps(self) -> str:
        """YAML that `loads` reads back as an equal policy."""
        from . import text

        return text.dumps(self)

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Writes `dumps()` to a file."""
        from . import text

        text.dump(self, path)

    # Reading the map.

    @property
    def activations(self) -> np.dtype | None:
        """The activations' dtype `d`: the compute default; None where the policy names none."""
        return self.compute.default

    def at(self, *names: str | int) -> Scope:
        """The policy as the module at that path sees it; without names, the root."""
        return Scope(self, self.activations).at(*names)

    # Applying it to trees.

    def explain(self, tree: Any) -> Plan:
        """The plan: what every parameter of `tree` resolves to.

        tree: arrays, `jax.ShapeDtypeStruct`s, Linen variables, an NNX model or state, or `checkpoint_tree(folder)`.

        Raises:
          UnmatchedRule, ShadowedRule: a rule that decides nothing, with its file and line.
          UnpairedScale, InvalidScale: a narrow kernel without scales that fit it.
        """
        from .plan import explain

        return explain(self, tree)

    def store(self, tree: Any) -> Any:
        """`tree` as the policy stores it: kernels quantised get a `scale_inv` beside them, dissolved pairs lose it.

        tree: nested mappings of arrays, Linen variables, or an NNX state; what is already as asked is kept bit for bit.
        """
        from .storage import store

        return store(self, tree)

    def cast(self, tree: Any, slot: str, *, path: str | None = None) -> Any:
        """`tree` with each floating-point leaf cast as `slot` ("params" or "compute") says of its path; saturating.

        The structure never changes: scaled pairs are left whole, integers, booleans and keys untouched.  With `path`,
        `tree` is the one array that stands there.

        >>> policy = Policy(compute={"bias": None, "default": "bf16"})
        >>> cast = policy.cast({"dense": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}, "compute")
        >>> cast["dense"]["kernel"].dtype.name, cast["dense"]["bias"].dtype.name
        ('bfloat16', 'float64')

        Raises:
          UnsupportedCast: for a plain leaf that the slot wants narrow: it needs a scale, see `store`.
          UnmatchedRule, ShadowedRule: unless `path` is given.
        """
        from .casting import cast

        return cast(self, tree, slot, path)

    def cast_output(self, x: Any) -> Any:
        """`x`, or each floating-point array in it, cast plainly to the output dtype, so that overflow stays visible."""
        from .casting import cast_floats

        return x if self.output is None else cast_floats(x, self.output)


@dataclasses.dataclass(frozen=True)
class Scope:
    """A policy as one module sees it: `scope.at("self_attn").spec("kernel")`.

    Modules take `policy=`, which is a Policy or a Scope, turn it into a Scope with `policy.at()`, hand `scope.at(name)`
    to their submodules and keep the `ParamSpec`s of their own parameters.

    policy       the whole policy
    activations  the dtype `d` of activations; None: that of the inputs
    prefix       the module's path
    stored       how parameters are stored already, by path; None: as the policy asks, for parameters yet to be drawn
    """

    policy: Policy
    activations: np.dtype | None
    prefix: tuple[str, ...] = ()
    stored: Mapping[str, ParamSpec] | None = dataclasses.field(default=None, hash=False)

    def at(self, *names: str | int) -> Scope:
        """The scope of a submodule."""
        return dataclasses.replace(self, prefix=(*self.prefix, *map(str, names)))

    def spec(self, name: str) -> ParamSpec:
        """What the policy says of the module's own parameter `name`."""
        path = "/".join((*self.prefix, name))
        compute = self.policy.compute.dtype(path)
        if self.stored is not None:
            if path not in self.stored:
                raise InvalidPolicy(
                    f"{path}: the module asks for a parameter that is not among the {len(self.stored)} stored ones. "
                    "Give the variables of the same module."
                )
            return dataclasses.replace(self.stored[path], compute=compute)
        storage = self.policy.params.dtype(path)
        if storage is None or not dtypes.is_narrow(storage):
            return ParamSpec(storage, compute=compute)
        scale = self.policy.params.dtype(scale_path(path)) or np.dtype(np.float32)
        return ParamSpec(storage, scale, compute, self.policy.block or DEFAULT_BLOCK)


# The constructors of slots.


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


def _output(dtype: Any) -> np.dtype | None:
    if isinstance(dtype, Mapping):
        if set(dtype) - {"default"}:
            raise InvalidPolicy(
                f"output: what a model returns has one dtype, found the map {dict(dtype)}. Write f32, say."
            )
        dtype = dtype.get("default")
    return _slot_dtype("output", "default", dtype)


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
