"""The policy: which dtype each parameter has in storage and in compute, and which dtype the model returns."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import dtypes
from .errors import InvalidPolicy
from .slots import DEFAULT_BLOCK, Block, Slot, SlotLike, as_block, make_kv_cache, make_output, make_slot, scale_path

if TYPE_CHECKING:
    from .matmul import Target
    from .plan import Plan


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


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Policy:
    """How each parameter is stored (`params`) and computed (`compute`), and what the model returns (`output`).

    params   None, one dtype, or a map from names and path patterns to dtypes; the first rule that matches wins
    compute  likewise
    output   None or one dtype
    kv_cache what attention keeps of past tokens: f32, bf16, f16, or f8_e4m3fn or int8 with a scale a head and token;
             None: the activations' dtype
    block    the block in which perparam quantises, (rows, columns) as stored; None means (128, 128) where something
             is quantised, and that a narrow kernel which is found keeps its own

    A policy is an immutable value: equal policies compare and hash equal, so one can be a static argument of `jax.jit`.

    >>> Policy(params={"kernel": "f8_e4m3fn", "default": "f32"}, compute="bf16", output="f32")
    Policy(params={'kernel': 'f8_e4m3fn', 'default': 'f32'}, compute='bf16', output='f32')

    Raises:
      UnknownDtype: for a dtype that is unknown or cannot stand where it was written.
      InvalidPolicy: for a pattern, key or block that cannot be read.
    """

    params: Slot
    compute: Slot
    output: np.dtype | None
    kv_cache: np.dtype | None
    block: Block | None

    def __init__(
        self,
        params: SlotLike | Slot = None,
        compute: SlotLike | Slot = None,
        output: Any = None,
        *,
        kv_cache: Any = None,
        block: Any = None,
    ):
        slots = {"params": make_slot("params", params), "compute": make_slot("compute", compute)}
        for name, value in {
            **slots,
            "output": make_output(output),
            "kv_cache": make_kv_cache(kv_cache),
            "block": None if block is None else as_block(block),
        }.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        fields = {"params": self.params.plain(), "compute": self.compute.plain()}
        fields["output"] = None if self.output is None else dtypes.dtype_name(self.output)
        fields["kv_cache"] = None if self.kv_cache is None else dtypes.dtype_name(self.kv_cache)
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

    def explain(self, tree: Any, target: str | Target | None = None) -> Plan:
        """The plan: what every parameter of `tree` resolves to.

        tree    arrays, `jax.ShapeDtypeStruct`s, Linen variables, an NNX model or state, or `checkpoint_tree(folder)`
        target  "here", "cpu", "cuda", "cuda:9.0", …: adds what multiplies with each kernel of perparam's models there;
                None leaves it out, since a plan should neither depend on the machine nor start its GPU

        Raises:
          UnmatchedRule, ShadowedRule: a rule that decides nothing, with its file and line.
          UnpairedScale, InvalidScale: a narrow kernel without scales that fit it.
        """
        from .plan import explain

        return explain(self, tree, target=target)

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
