"""An optax wrapper that takes gradients of a scaled loss, and skips the steps whose gradients are not finite."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ..dtypes import dtype_name
from ..errors import UnsupportedCast
from .finite import all_finite, select_tree
from .loss_scale import LossScale


class LossScaleState(NamedTuple):
    """State of `with_loss_scale`.

    loss_scale       the scale of the next loss: `state.loss_scale.scale(loss)`
    last_finite      () bool, whether the last gradients were finite, so that the step was applied
    total_notfinite  () int32, number of steps skipped so far
    inner_state      state of the wrapped transformation
    """

    loss_scale: Any
    last_finite: jax.Array
    total_notfinite: jax.Array
    inner_state: Any


def with_loss_scale(
    inner: optax.GradientTransformation, loss_scale: LossScale
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` for gradients of a scaled loss.

    The gradients are divided by the scale, in float32. If any is NaN or infinite, the step is skipped: parameters that
    `optax.apply_updates` returns and the state of `inner` keep their bits, and a dynamic scale shrinks. Subnormal
    parameters become zero where XLA does not compute with them, as on CPUs, in this sum as in any other.

    It is the outermost transformation, around `chain` and around `with_policy`: a transformation around it would see
    updates of a skipped step as zero gradients. `optax.tree.get(opt_state, "loss_scale")` finds the scale in any state.

    >>> from perparam.training import DynamicLossScale
    >>> tx = with_loss_scale(optax.sgd(0.5), DynamicLossScale(4.0))
    >>> state = tx.init(jnp.ones(2))
    >>> gradient = jax.grad(lambda w: state.loss_scale.scale(w.sum()))(jnp.ones(2))
    >>> updates, state = tx.update(gradient, state)
    >>> gradient.tolist(), updates.tolist(), bool(state.last_finite)
    ([4.0, 4.0], [-0.5, -0.5], True)

    Raises:
      UnsupportedCast: from `update`, if `inner` returns a state of other dtypes than it had.
    """
    extended = optax.with_extra_args_support(inner)

    def init(params: Any) -> LossScaleState:
        own = jax.tree.map(jnp.array, loss_scale)  # a copy, which can be donated
        return LossScaleState(own, jnp.asarray(True), jnp.zeros((), jnp.int32), extended.init(params))

    def update(updates: Any, state: LossScaleState, params: Any = None, **extra: Any) -> tuple[Any, LossScaleState]:
        gradients = state.loss_scale.unscale(updates)
        finite = all_finite(gradients)
        updates, inner_state = extended.update(gradients, state.inner_state, params, **extra)
        _check_dtypes(inner_state, state.inner_state)
        return jax.tree.map(lambda x: _unless_skipped(finite, x), updates, is_leaf=_adds_itself), LossScaleState(
            state.loss_scale.adjust(finite),
            finite,
            state.total_notfinite + (~finite).astype(jnp.int32),
            select_tree(finite, inner_state, state.inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Skippable:
    """An update that returns the new parameter from `parameter + update`, and can be skipped."""

    update: Any
    applied: jax.Array

    __array_ufunc__ = None  # numpy arrays leave `+` to this class

    def __radd__(self, parameter: Any) -> Any:
        parameter = jnp.asarray(parameter)
        return select_tree(self.applied, parameter + self.update, parameter)


def _unless_skipped(finite: jax.Array, update: Any) -> Any:
    if _adds_itself(update):
        return _Skippable(update, finite)
    # The sum of a parameter and -0.0 is the parameter; the sum of -0.0 and 0.0 would be 0.0.
    return select_tree(finite, update, jnp.full_like(update, -0.0))


def _adds_itself(update: Any) -> bool:
    """Returns whether an update is not an array, and adds itself to a parameter, as those of `with_policy` do."""
    others = jax.Array, np.ndarray, np.generic, int, float, nnx.Variable
    return hasattr(type(update), "__radd__") and not isinstance(update, others)


def _check_dtypes(new: Any, old: Any) -> None:
    """Raises UnsupportedCast if the two states differ in a dtype."""
    before = dict(jax.tree_util.tree_leaves_with_path(old))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(new):
        dtypes: list[Any] = [getattr(x, "dtype", None) for x in (before.get(keys), leaf)]
        if None not in dtypes and dtypes[0] != dtypes[1]:
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            names = [dtype_name(dtype) for dtype in dtypes]
            raise UnsupportedCast(
                f"{path} (optimizer state) changes from {names[0]} to {names[1]}: unscaled gradients are float32, and "
                "the parameters are not. Wrap the transformation in perparam.training.with_policy first, which keeps "
                "the dtypes of its state."
            )
