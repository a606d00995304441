"""`with_policy`: an optax transformation whose state, gradients and masters are stored by the map of a policy.

The wrapped transformation sees float32: the masters or the widened parameters, the gradients and its own state.  Its
updates become new stored values.  If everything is float32 already, parameters and state have the bits that the
transformation gives without a policy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import dtypes
from ..blocks import block_amax
from ..decisions import decide
from ..errors import InvalidGradients, InvalidPolicy
from ..explicit_axes import on_auto_axes
from ..formats import Format
from ..presets import PolicyLike, get_policy
from ..rules import PolicyRules
from ..scales import encode_scales
from .fields import StateLeaf, check_rules, check_structure, narrow, state_leaves, widen
from .rounding import requantize
from .states import NoUpdate, PolicyState, StoredUpdate
from .step_random import StepRandom, key_of, rounded
from .trained import Trained, TrainedParameters, in_variables, placed, pure

Rounding = Literal["nearest", "stochastic"]
Scales = Literal["fresh", "delayed"]


def with_policy(
    tx: optax.GradientTransformation,
    policy: PolicyLike,
    *,
    rounding: Rounding = "nearest",
    scales: Scales = "fresh",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with its state, gradients and masters in the formats of the policy's slots, and float32 arithmetic.

    tx        any optax transformation; extra arguments of `update` are passed on
    policy    any value that `get_policy` accepts; its slots `grads`, `opt_state` and `master` apply, and parameters
              keep the format in which they are stored
    rounding  how new values are rounded to the dtype that keeps them from step to step, which is the master's, or the
              parameter's without a master, and to 16-bit state.  "nearest", or "stochastic": up or down with the
              probability that makes the mean right.  A copy of a master is rounded to nearest.  The random numbers
              depend on the seed, the step and the parameter alone, so that a resumed run repeats them
    scales    the scales of a narrow parameter after an update.  "fresh": from the largest magnitude of each block;
              "delayed": from that of the step before, so that larger values are clipped (a block that was zero then has
              fresh ones)
    seed      of the random numbers

    `init` and `update` take parameters as `perparam.init`, `Policy.store` and NNX have them.  The result of
    `optax.apply_updates(parameters, updates)` has the new stored values, in `TrainState.apply_gradients` and
    `nnx.Optimizer.update` too.  Gradients have a wide array, f32, bf16 or f16, for each parameter, and nothing or None
    for its scales.  A parameter whose gradient is None, and what the transformation moves by exactly zero, keeps its
    bits; so do None, `optax.MaskedNode` and integers in the place of parameters.

    A parameter has a master if the slot `master` has a dtype for it, unless it is stored in that dtype, in float32 or
    in float64.  State has the dtypes that `tx.init` gives to float32 parameters, unless a rule of `opt_state` applies.

    NaN and infinity in gradients reach the parameters, as in optax; `optax.apply_if_finite(tx, 5)` as `tx` skips such
    steps.  Transformations that follow belong inside too: `with_policy(optax.chain(tx, other), policy)`.  With narrow
    pairs, so do `multi_transform`, `masked`, `MultiSteps`, `inject_hyperparams` and `add_decayed_weights`, which expect
    gradients of the structure and dtypes of the parameters.

    >>> import optax, perparam
    >>> policy = perparam.Policy("bf16", master="f32", opt_state={"mu": "bf16"})
    >>> params = policy.store({"kernel": jnp.ones((2, 2))})
    >>> optimizer = with_policy(optax.adam(0.1), policy)
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"kernel": jnp.ones((2, 2))}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> params["kernel"].dtype.name, float(params["kernel"][0, 0]), round(float(state.master["kernel"][0, 0]), 5)
    ('bfloat16', 0.8984375, 0.9)

    Raises:
      UnmatchedRule, ShadowedRule: from `init`, for a rule of `grads`, `opt_state` or `master` without effect.
      InvalidGradients: from `update`, for gradients that do not fit the parameters, by path.
      InvalidPolicy: for another value of `rounding` or `scales`, and for an invalid policy.
    """
    for name, value, allowed in (
        ("rounding", rounding, ("nearest", "stochastic")),
        ("scales", scales, ("fresh", "delayed")),
    ):
        if value not in allowed:
            raise InvalidPolicy(f"{name}: expected {' or '.join(map(repr, allowed))}, found {value!r}.")
    inner = optax.with_extra_args_support(tx)
    optimizer = _Optimizer(inner, get_policy(policy), rounding == "stochastic", scales == "delayed", seed)
    return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)


class _Optimizer:
    """The two functions of `with_policy`."""

    def __init__(
        self,
        inner: optax.GradientTransformationExtraArgs,
        policy: PolicyRules,
        stochastic: bool,
        delayed: bool,
        seed: int,
    ):
        self._inner, self._policy, self._stochastic, self._delayed = inner, policy, stochastic, delayed
        self._seed = seed

    def init(self, params: Any) -> PolicyState:
        """Returns the state for parameters as they are stored."""
        view = TrainedParameters(params, self._policy)
        for name in ("grads", "master"):
            decide(name, self._policy.slot(name), view.paths)
        view = TrainedParameters(pure(params), self._policy)
        wide = {param.path: placed(param.wide(), param.values) for param in view}
        masters = {
            param.path: placed(dtypes.saturating_cast(wide[param.path], dtype), param.values)
            for param in view
            if (dtype := master_dtype(self._policy, param)) is not None
        }
        with jax.numpy_dtype_promotion("standard"):
            inner = self._inner.init(view.tree(wide))
        leaves, structure = state_leaves(inner, view.keys())
        check_rules(self._policy.opt_state, leaves, view.paths)
        stored = narrow(self._policy.opt_state, leaves, lambda x, dtype, *_: dtypes.saturating_cast(x, dtype))
        stored = [_like_parameter(x, leaf, view) for x, leaf in zip(stored, leaves, strict=True)]
        return PolicyState(
            step=jnp.zeros((), jnp.int32),
            inner=jax.tree_util.tree_unflatten(structure, stored),
            master=view.tree(masters),
            amax=view.tree({p.path: _amax(wide[p.path], p.format) for p in view if self._delayed and _scaled(p)}),
        )

    def update(
        self, updates: Any, state: PolicyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PolicyState]:
        """Returns updates that `optax.apply_updates` turns into new stored values, and the next state."""
        if params is None:
            raise InvalidGradients("with_policy needs the parameters. Call update(gradients, state, params).")
        if not isinstance(state, PolicyState):
            raise InvalidGradients(
                f"the state is a {type(state).__name__}, expected a PolicyState. Pass what init of the same "
                "transformation returned."
            )
        view = TrainedParameters(pure(params), self._policy)
        keys = view.keys()
        masters, amax = _by_path(keys, state.master), _by_path(keys, state.amax)
        wide = {p.path: p.wide() if masters[p.path] is None else masters[p.path].astype(p.wide_dtype) for p in view}
        gradients = view.by_path(pure(updates), "gradient")
        still = {path for path, gradient in gradients.items() if gradient is None}
        random = StepRandom(self._seed, state.step) if self._stochastic else None
        moves, inner_state = self._inner_update(view, gradients, wide, state.inner, random, extra_args)
        values: dict[str, Any] = {}
        scales: dict[str, Any] = {}
        for param in view:
            path, move = param.path, moves[param.path]
            if _scaled(param):
                scales[path] = NoUpdate()
            if path in still or move is None:
                values[path] = NoUpdate()
                continue
            move = move.astype(param.wide_dtype)
            if masters[path] is None and param.format.values == param.wide_dtype:
                values[path] = move  # optax's own
                continue
            new = wide[path] + move
            key = key_of(random, path)
            if masters[path] is not None:
                # By element, so that XLA has one loop: a flag for the array would need all of `move` before.
                masters[path] = jnp.where(move != 0, rounded(new, masters[path].dtype, key), masters[path])
                new, key = masters[path].astype(param.wide_dtype), None
            if not _scaled(param):
                value = rounded(new, param.format.values, key)
                if masters[path] is None:  # of a master it is a copy
                    value = jnp.where(move != 0, value, param.values)
                values[path] = StoredUpdate(value, jnp.array(True))
                continue
            given, moved = None, jnp.any(move != 0)
            if amax[path] is not None:
                before = amax[path]
                given, now = _delayed_scales(before, new, param.format)
                amax[path] = jnp.where(moved, now, before)  # the stored values may be clipped, and have smaller ones
            stored = requantize(new, param.format, key=key, scale_inv=given)
            values[path], scales[path] = StoredUpdate(stored.values, moved), StoredUpdate(stored.scale_inv, moved)
        return in_variables(view.updates(values, scales, NoUpdate()), params), PolicyState(
            step=optax.safe_increment(state.step),
            inner=inner_state,
            master=view.tree(masters),
            amax=view.tree(amax),
        )

    def _inner_update(
        self,
        view: TrainedParameters,
        gradients: Mapping[str, Any],
        wide: Mapping[str, jax.Array],
        state: Any,
        random: StepRandom | None,
        extra_args: Mapping[str, Any],
    ) -> tuple[dict[str, Any], Any]:
        """Returns the update of each parameter by the wrapped transformation, and its state as it is stored.

        A parameter without a gradient has one of zeros there; its state does not change.
        """
        slot = self._policy.opt_state
        keys = view.keys()
        before, structure = state_leaves(state, keys)
        widened = widen(slot, before)
        received = {
            path: jnp.zeros_like(wide[path]) if gradient is None else self._received(path, gradient, wide[path].dtype)
            for path, gradient in gradients.items()
        }
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers and floats
            moves, inner_state = self._inner.update(
                view.tree(received), jax.tree_util.tree_unflatten(structure, widened), view.tree(wide), **extra_args
            )
        after, new_structure = state_leaves(inner_state, keys)
        check_structure(structure, new_structure)
        # A transformation may promote its state, as inject_hyperparams does with moments in bf16.
        after = [_with_dtype_of(leaf, x) for leaf, x in zip(after, map(jnp.asarray, widened), strict=True)]
        stored = narrow(slot, after, lambda x, dtype, path, i: rounded(x, dtype, key_of(random, path, i + 1)))
        kept = [
            old.value if old.path is not None and gradients[old.path] is None else x
            for old, x in zip(before, stored, strict=True)
        ]
        return view.by_path(moves, "update"), jax.tree_util.tree_unflatten(structure, kept)

    def _received(self, path: str, gradient: Any, dtype: np.dtype) -> jax.Array:
        """Returns a gradient in the dtype of `grads`, in which it overflows visibly, then in that of the arithmetic."""
        format = self._policy.grads.format(path)
        gradient = jnp.asarray(gradient)
        received: jax.Array = (gradient if format is None else gradient.astype(format.values)).astype(dtype)
        return received


def master_dtype(policy: PolicyRules, param: Trained) -> np.dtype | None:
    """Returns the dtype of the master of a parameter; None without one, as for one stored in f32, f64 or this dtype."""
    dtype = policy.master.dtype(param.path)
    return None if param.format.values in (dtype, np.float32, np.float64) else dtype


def _scaled(param: Trained) -> bool:
    return param.format.scale is not None


def _by_path(keys: Mapping[tuple[Any, ...], str], tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree of the parameters' structure by path; None where it has none."""
    found = {keys[place]: x for place, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
    return {path: found.get(path) for path in keys.values()}


def _with_dtype_of(leaf: StateLeaf, before: Any) -> StateLeaf:
    value = leaf.value
    if hasattr(value, "dtype") and value.dtype != before.dtype:
        return StateLeaf(value.astype(before.dtype), leaf.field, leaf.path, leaf.unsigned)
    return leaf


def _amax(values: jax.Array, format: Format) -> jax.Array:
    assert format.block is not None
    amax: jax.Array = on_auto_axes(functools.partial(block_amax, block=format.block), values)
    return amax


def _delayed_scales(before: jax.Array, values: jax.Array, format: Format) -> tuple[jax.Array, jax.Array]:
    """Returns scales from the magnitudes of the step before, and the magnitudes of this step.

    Source: the delayed scaling of NVIDIA's Transformer Engine, with a history of one step.
    """
    assert format.scale is not None
    now = _amax(values, format)
    scales = format.rule(jnp.where(before == 0, now, before), format.values, format.scale, True)
    return encode_scales(scales, format.scale), now


def _like_parameter(x: Any, leaf: StateLeaf, view: TrainedParameters) -> Any:
    """Returns an array of the state, divided as its parameter if it has its shape, and whole on its devices if not."""
    if leaf.path is None:
        return x
    values = view.trained[leaf.path].values
    return jax.tree.map(lambda part: placed(part, values), x)
