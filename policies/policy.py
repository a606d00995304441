"""`Policy`: the rules of every slot, with methods that read and write text and that apply the rules to trees."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import optax

from . import cast, compute, dtypes, yaml
from .errors import InvalidPolicy, UnknownDtype
from .matmul import Target
from .plan import Plan, Shardings, ToShardings, plan
from .resolved import resolve
from .rules import PolicyRules, SlotLike, SlotRules, read_slot
from .scope import Scope
from .slots import SLOTS
from .store import store
from .training.memory import training_memory
from .training.partition import Trainable


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Policy(PolicyRules):
    """A mixed-precision policy: the storage and compute format of each parameter, and the dtype of the model's result.

    params      storage: None, one dtype, or a map from names and path patterns to formats; the first rule that matches
                wins
    compute     the format for arithmetic, in the same form
    output      the dtype of the model's result, or None
    kv_cache    the dtype of keys and values that perparam's models cache: f32, bf16, f16, or f8_e4m3fn or int8 with one
                scale for each head and token; None: the activations' dtype
    grads       the dtype in which the optimizer receives gradients: f32, bf16 or f16; None: as they are
    opt_state   the format in which `perparam.training.with_policy` stores the optimizer's state: f32, bf16, f16,
                dynamic8 or f8_e4m3fn. A key without a slash is a field of the state (`mu`), others begin with one
                (`mu/**/embedding`); None: as the optimizer makes it from float32 parameters
    master      the dtype of the values that training adds up, where storage has fewer bits: f32, bf16 or f16; None:
                the stored values
    block       (rows, columns) for rules without a block, -1 for a whole axis; None means (128, 128) for quantisation,
                and no change of the block of a stored pair

    A format is a dtype, the name of a registered format, or a mapping of `dtype`, `block` and `scale`.
    A policy is an immutable value: equal policies have equal hashes, so a policy can be a static argument of `jax.jit`.

    >>> Policy(params={"kernel": "f8_e4m3fn", "default": "f32"}, compute="bf16", output="f32")
    Policy(params={'kernel': 'f8_e4m3fn', 'default': 'f32'}, compute='bf16', output='f32')

    Raises:
      UnknownDtype: for a dtype that is unknown or that the slot does not accept.
      InvalidPolicy: for an invalid pattern, key, slot or block.
    """

    def __init__(
        self,
        params: SlotLike | SlotRules = None,
        compute: SlotLike | SlotRules = None,
        output: Any = None,
        *,
        kv_cache: Any = None,
        grads: SlotLike | SlotRules = None,
        opt_state: SlotLike | SlotRules = None,
        master: SlotLike | SlotRules = None,
        block: Any = None,
        **others: Any,
    ):
        slots = {"params": params, "compute": compute, "output": output, "kv_cache": kv_cache}
        super().__init__({**slots, "grads": grads, "opt_state": opt_state, "master": master, **others}, block)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Policy:
        """Returns the policy in a YAML file.

        Raises:
          MissingFile: if the file does not exist, or one that it includes.
          InvalidPolicy, UnknownDtype: if the file is not a valid policy; the message has file and line.
        """
        return Policy(**yaml.load(path))

    @staticmethod
    def loads(text: str, name: str = "<text>") -> Policy:
        """Returns the policy in YAML text; errors and plans refer to the text as `name`."""
        return Policy(**yaml.loads(text, name))

    @staticmethod
    def parse(line: str) -> Policy:
        """Returns the policy in jmp's one-line form: `params=f32,compute=bf16,output=f32` or `p=f32,c=bf16,o=f32`.

        >>> Policy.parse("p=f32,c=bf16,o=f32") == Policy("f32", "bf16", "f32")
        True
        """
        return Policy(**yaml.parse(line))

    def replace(self, **slots: Any) -> Policy:
        """Returns the policy with other values for some slots or for `block`, each replaced as a whole.

        >>> Policy(params={"kernel": "bf16"}, compute="f32").replace(compute="bf16", output="f32")
        Policy(params={'kernel': 'bf16'}, compute='bf16', output='f32')
        """
        return Policy(**{**dict(self.slots), "block": self.block, **slots})

    def merge(self, other: Policy | Mapping[str, Any]) -> Policy:
        """Returns the policy with the rules of `other` before its own, so that these win.

        other  a Policy, or a mapping of slots as for `Policy(**other)`

        In each slot a map of rules goes before the rules of this policy, whose rules for the same keys are left out and
        whose default applies if `other` has none.  `block` is replaced if `other` has one.

        In a mapping, a slot that is one dtype or None replaces the slot.  A Policy never removes rules: as
        `Policy("bf16")` and `Policy({"default": "bf16"})` are equal, both replace only the default.  A default of None
        is no default in a Policy; in a map it removes the default.

        >>> policy = Policy(params={"kernel": "f8_e4m3fn", "default": "f32"}, compute="bf16")
        >>> policy.merge({"params": {"head/kernel": "bf16"}, "compute": "f32"})
        Policy(params={'head/kernel': 'bf16', 'kernel': 'f8_e4m3fn', 'default': 'f32'}, compute='f32')
        >>> policy.merge(Policy("bf16"))
        Policy(params={'kernel': 'f8_e4m3fn', 'default': 'bf16'}, compute='bf16')
        """
        if isinstance(other, Policy):
            other = {**dict(other.slots), **({} if other.block is None else {"block": other.block})}
        if not isinstance(other, Mapping):
            raise InvalidPolicy(f"merge: expected a Policy or a mapping of slots, found {other!r}. Use get_policy.")
        merged = {
            name: read_slot(SLOTS[name], value, base=self.slot(name)) if name in SLOTS else value
            for name, value in other.items()
        }
        return self.replace(**merged)

    def dumps(self) -> str:
        """Returns YAML from which `loads` makes an equal policy."""
        return yaml.dumps(self)

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Writes `dumps()` to a file."""
        pathlib.Path(path).write_text(self.dumps(), encoding="utf-8")

    def at(self, *names: str | int) -> Scope:
        """Returns the scope of the module at the path of `names`, relative to the root of the model."""
        return Scope(self, self.activations).at(*names)

    def explain(
        self,
        tree: Any,
        target: str | Target | None = None,
        sharding: Shardings | ToShardings | None = None,
        *,
        optimizer: optax.GradientTransformation | None = None,
        trainable: Trainable = "**",
    ) -> Plan:
        """Returns the plan: current format, requested format and rules of every parameter of `tree`.

        tree    arrays, `jax.ShapeDtypeStruct`s, Linen variables, an NNX model or state, or `checkpoint_tree(folder)`;
                of a train state its field `params`, and nothing of optax's states
        target  "here", "cpu", "cuda", "cuda:9.0", …: adds the implementations of the matmul on that target for kernels
                of perparam's models; None omits them, so that the plan does not depend on the machine or start its GPU
        sharding  {path: sharding} of every parameter and all scales after storage, or a function that returns it for
                {path: shape and format}: adds the bytes on each device.  `perparam.models.shardings` is one, given a
                layout and the model's config; the mesh may be a `jax.sharding.AbstractMesh`, without devices
        optimizer  `perparam.training.with_policy(tx, policy)`, or any optax transformation: adds the bytes of
                gradients, of the optimizer's state and of masters, which are those of the arrays of `optimizer.init`
        trainable  which parameters the optimizer trains: patterns of paths, or a function of the path

        >>> import jax, optax, perparam
        >>> policy = Policy("bf16", master="f32", opt_state={"mu": "bf16", "nu": "f32"})
        >>> optimizer = perparam.training.with_policy(optax.adam(1e-3), policy)
        >>> shapes = {"kernel": jax.ShapeDtypeStruct((512, 512), "float32")}
        >>> training = policy.explain(shapes, optimizer=optimizer).training
        >>> training.gradient_bytes, training.state_bytes, training.master_bytes
        (524288, {'mu': 524288, 'nu': 1048576}, 1048576)

        Raises:
          UnmatchedRule, ShadowedRule: for a rule without effect, with its file and line.
          InvalidSharding: for an array without a sharding.
          UnpairedScale, InvalidScale: for a narrow kernel without scales that fit it.
        """
        resolved = resolve(self, tree, slots=SLOTS)
        training = None if optimizer is None else training_memory(resolved, tree, optimizer, trainable)
        return plan(resolved, target, sharding, training)

    def store(self, tree: Any, *, scaled: bool = False) -> Any:
        """Returns `tree` with its parameters in their storage format; parameters already in it do not change a bit.

        tree    any pytree of arrays: nested mappings, Linen variables, an NNX state, Equinox modules, dataclasses; of a
                train state its field `params` is stored
        scaled  whether narrow kernels in mappings also become `ScaledArray`s, which include their block

        In mappings and NNX states a kernel that is quantised gets a `scale_inv` beside it, which is removed again when
        the kernel is dequantised.  Containers with fixed fields hold a `ScaledArray` in place of the kernel.

        A mapping does not store the block of its scales: read it under a policy with the same block.  Under another one
        `explain`, `store`, `to_compute` and `apply` raise InvalidScale if the shape of the scales shows it.  Where both
        blocks give the same shape, as 128 and 150 do for 200 columns, nothing shows it, and the weights are wrong by
        several percent.  `scaled=True` excludes that.

        Raises:
          UnmatchedRule, ShadowedRule, UnpairedScale, InvalidScale: see `explain`.
          UnsupportedCast: if scales must be removed that are a field of their container.
        """
        return store(resolve(self, tree, slots=("params",)), tree, scaled=scaled)

    def to_compute(self, tree: Any, activations: Any = "f32") -> Any:
        """Returns `tree` with each parameter in its compute dtype, and each scaled pair dequantised to one array.

        This is what `perparam.apply` gives to Flax modules, for functions, Haiku, Equinox and other code with plain
        arrays.  Call it inside the function that `jax.jit` compiles: then the arguments of the program are the stored
        arrays, and wide ones exist only while it runs.

        activations  f32, bf16 or f16: the dtype of a narrow kernel for which `compute` has neither a rule nor a default

        >>> import jax.numpy as jnp
        >>> policy = Policy({"kernel": "f8_e4m3fn"}, "bf16")
        >>> stored = policy.store({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
        >>> {name: x.dtype.name for name, x in policy.to_compute(stored).items()}
        {'kernel': 'bfloat16', 'bias': 'bfloat16'}

        Raises:
          UnsupportedCast: for a narrow compute format, which needs `perparam.models.Linear` or `scaled_matmul`; if the
            scales are a field of their container.
          UnknownDtype: for another dtype of activations.
          UnmatchedRule, ShadowedRule, UnpairedScale, InvalidScale: see `explain`.
        """
        dtype = dtypes.as_dtype(activations)
        if not dtypes.is_activation(dtype):
            raise UnknownDtype(f"activations cannot be {dtypes.dtype_name(dtype)}. Write f32, bf16 or f16.")
        return compute.to_compute(self, tree, dtype)

    def cast(self, tree: Any, slot: str, *, path: str | None = None) -> Any:
        """Returns `tree` with each floating-point leaf cast to its dtype in `slot`, "params" or "compute"; saturating.

        The structure does not change.  Scaled pairs, integers, booleans and PRNG keys are not cast; `to_compute`
        dequantises pairs.  With `path`, `tree` is the single array at that path.

        >>> import numpy as np
        >>> policy = Policy(compute={"bias": None, "default": "bf16"})
        >>> cast = policy.cast({"dense": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}, "compute")
        >>> cast["dense"]["kernel"].dtype.name, cast["dense"]["bias"].dtype.name
        ('bfloat16', 'float64')

        Raises:
          UnsupportedCast: for a leaf without scales that has a narrow dtype in the slot; use `store`.
          UnmatchedRule, ShadowedRule: for a rule without effect; not with `path`.
        """
        return cast.cast(self, tree, slot, path)

    def cast_output(self, x: Any) -> Any:
        """Returns `x` with each floating-point array cast to the output dtype; overflow becomes infinity."""
        return x if self.output is None else cast.cast_floats(x, self.output)
