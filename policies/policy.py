"""`Policy`: the rules of every slot, and what can be done with them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from . import cast, yaml
from .matmul import Target
from .plan import Plan, plan
from .resolved import resolve
from .rules import PolicyRules, SlotLike, SlotRules
from .scope import Scope
from .store import store


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Policy(PolicyRules):
    """How each parameter is stored (`params`) and computed (`compute`), and what the model returns (`output`).

    params    None, one dtype, or a map from names and path patterns to formats; the first rule that matches wins
    compute   likewise
    output    None or one dtype
    kv_cache  the dtype of cached keys and values: f32, bf16, f16, or f8_e4m3fn or int8 with a scale a head and token;
              None: the activations' dtype
    block     the block of rules that name none, (rows, columns) as stored, -1 for a whole axis; None means (128, 128)
              where something is quantised, and that a stored pair keeps its own

    A format is a dtype, the name of a registered format, or a mapping of `dtype`, `block` and `scale`.
    A policy is an immutable value: equal policies compare and hash equal, so one can be a static argument of `jax.jit`.

    >>> Policy(params={"kernel": "f8_e4m3fn", "default": "f32"}, compute="bf16", output="f32")
    Policy(params={'kernel': 'f8_e4m3fn', 'default': 'f32'}, compute='bf16', output='f32')

    Raises:
      UnknownDtype: for a dtype that is unknown or cannot stand where it was written.
      InvalidPolicy: for a pattern, key, slot or block that cannot be read.
    """

    def __init__(
        self,
        params: SlotLike | SlotRules = None,
        compute: SlotLike | SlotRules = None,
        output: Any = None,
        *,
        kv_cache: Any = None,
        block: Any = None,
        **others: Any,
    ):
        super().__init__(
            {"params": params, "compute": compute, "output": output, "kv_cache": kv_cache, **others}, block
        )

    # Ways in and out: text.

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Policy:
        """The policy that a YAML file writes.

        Raises:
          MissingFile: where there is no such file.
          InvalidPolicy, UnknownDtype: with file and line.
        """
        return Policy(**yaml.load(path))

    @staticmethod
    def loads(text: str, name: str = "<text>") -> Policy:
        """The policy that YAML text writes; `name` is what errors and plans call the text."""
        return Policy(**yaml.loads(text, name))

    @staticmethod
    def parse(line: str) -> Policy:
        """The uniform policy of one line, jmp's form: `params=f32,compute=bf16,output=f32`, or `p=f32,c=bf16,o=f32`.

        >>> Policy.parse("p=f32,c=bf16,o=f32") == Policy("f32", "bf16", "f32")
        True
        """
        return Policy(**yaml.parse(line))

    def dumps(self) -> str:
        """YAML that `loads` reads back as an equal policy."""
        return yaml.dumps(self)

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Writes `dumps()` to a file."""
        pathlib.Path(path).write_text(self.dumps(), encoding="utf-8")

    # Reading the map.

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
        return plan(resolve(self, tree), target)

    def store(self, tree: Any, *, scaled: bool = False) -> Any:
        """`tree` as the policy stores it; what is already as requested is kept bit for bit.

        tree    any pytree of arrays: nested mappings, Linen variables, an NNX state, Equinox modules, dataclasses
        scaled  whether narrow kernels in mappings become `ScaledArray`s, which know their block, too

        In mappings and NNX states a kernel that is quantised gets a `scale_inv` beside it, and one that is dequantised
        loses it.  A plain mapping does not know the block of its scales: read it under a policy that names the same
        one.  Containers with fixed fields hold a `ScaledArray` in the kernel's place.

        Raises:
          UnmatchedRule, ShadowedRule, UnpairedScale, InvalidScale: see `explain`.
          UnsupportedCast: where scales have a field of their own and would have to go.
        """
        return store(resolve(self, tree, slots=("params",)), tree, scaled=scaled)

    def cast(self, tree: Any, slot: str, *, path: str | None = None) -> Any:
        """`tree` with each floating-point leaf cast as `slot` ("params" or "compute") says of its path; saturating.

        The structure never changes: scaled pairs are left whole, integers, booleans and keys untouched.  With `path`,
        `tree` is the one array that stands there.

        >>> import numpy as np
        >>> policy = Policy(compute={"bias": None, "default": "bf16"})
        >>> cast = policy.cast({"dense": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}, "compute")
        >>> cast["dense"]["kernel"].dtype.name, cast["dense"]["bias"].dtype.name
        ('bfloat16', 'float64')

        Raises:
          UnsupportedCast: for a plain leaf that the slot wants narrow: it needs a scale, see `store`.
          UnmatchedRule, ShadowedRule: unless `path` is given.
        """
        return cast.cast(self, tree, slot, path)

    def cast_output(self, x: Any) -> Any:
        """`x`, or each floating-point array in it, cast plainly to the output dtype, so that overflow stays visible."""
        return x if self.output is None else cast.cast_floats(x, self.output)
