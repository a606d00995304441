"""Loss scales, which keep gradients in float16 from underflow: constant, or adjusted while training.

The interface is that of jmp (`scale`, `unscale`, `adjust`).  A scale is float32 always, and so are scaled losses and
unscaled gradients: in float16 a scale of 2**16 would be infinite, and an unscaled gradient would underflow again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ..errors import InvalidLossScale, shown
from ..scales import F32
from .finite import boolean_scalar


class LossScale(Protocol):
    """The protocol of loss scales, which are pytrees: they are state of a training step, and can be donated."""

    def scale(self, tree: Any) -> Any:
        """Returns the tree multiplied by the scale, in float32: for the loss, before its gradient is computed."""
        ...

    def unscale(self, tree: Any) -> Any:
        """Returns the tree divided by the scale, in float32: for gradients."""
        ...

    def adjust(self, grads_finite: ArrayLike) -> Self:
        """Returns the scale of the next step; `grads_finite`, () bool, is whether this step's gradients were finite."""
        ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoOpLossScale:
    """A loss scale that changes nothing, not even dtypes; a tree without leaves."""

    @property
    def loss_scale(self) -> float:
        """The scale, 1."""
        return 1.0

    def scale(self, tree: Any) -> Any:
        """Returns `tree`."""
        return tree

    def unscale(self, tree: Any) -> Any:
        """Returns `tree`."""
        return tree

    def adjust(self, grads_finite: ArrayLike) -> Self:
        """Returns the same loss scale."""
        return self


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticLossScale:
    """A constant loss scale; a tree without leaves.

    >>> StaticLossScale(1024.0).unscale(jnp.float16(0.5)).dtype.name
    'float32'

    Raises:
      InvalidLossScale: a scale that is not a positive finite number in float32.
    """

    loss_scale: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_scale", _positive("loss_scale", self.loss_scale))

    def scale(self, tree: Any) -> Any:
        """Returns the tree multiplied by the scale, in float32; leaves that are not floating-point are unchanged."""
        return _multiplied(tree, jnp.float32(self.loss_scale))

    def unscale(self, tree: Any) -> Any:
        """Returns the tree divided by the scale, in float32; leaves that are not floating-point are unchanged."""
        return _divided(tree, jnp.float32(self.loss_scale))

    def adjust(self, grads_finite: ArrayLike) -> Self:
        """Returns the same loss scale."""
        return self


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A loss scale that grows while gradients are finite, and shrinks when they are not; a tree of two arrays.

    loss_scale      () float32  a number or array of another dtype is converted
    counter         () int32    consecutive steps with finite gradients since the scale last changed
    period          steps with finite gradients after which the scale is multiplied by `factor`
    factor          by which the scale is multiplied, or divided after a step whose gradients are not finite
    min_loss_scale  the smallest scale

    A product that is not finite in float32 leaves the scale unchanged. The defaults are those of jmp; 2**15 is the
    largest power of two in float16, so that a loss whose last operations are in float16 can have a finite gradient.

    >>> scale = DynamicLossScale(1024.0, period=2)
    >>> [float(scale.adjust(finite).loss_scale) for finite in (True, False)]
    [1024.0, 512.0]
    >>> float(scale.adjust(True).adjust(True).loss_scale)
    2048.0

    Raises:
      InvalidLossScale: a scale or minimum that is not positive and finite, a minimum above the scale, a period below 1,
        a factor of 1 or less.
    """

    loss_scale: Any = 2.0**15
    counter: Any = 0
    period: int = 2000
    factor: float = 2.0
    min_loss_scale: float = 1.0

    def __post_init__(self) -> None:
        scale, counter = self.loss_scale, self.counter
        least = _positive("min_loss_scale", self.min_loss_scale)
        if not isinstance(scale, jax.core.Tracer) and _positive("loss_scale", scale) < least:
            raise InvalidLossScale(f"loss_scale is {float(scale)}, less than min_loss_scale, {least}. Lower that.")
        if not (isinstance(self.period, (int, float, np.integer)) and self.period >= 1 and self.period % 1 == 0):
            raise InvalidLossScale(f"period: expected a number of steps, found {shown(self.period)}. Write 1 or more.")
        if not 1 < self.factor < math.inf:
            raise InvalidLossScale(f"factor: expected a number above 1, found {shown(self.factor)}. Write 2, say.")
        # An own copy, so that a caller's array is not donated, or donated twice.
        object.__setattr__(self, "loss_scale", jnp.array(scale, jnp.float32))
        object.__setattr__(self, "counter", jnp.array(counter, jnp.int32))
        object.__setattr__(self, "period", int(self.period))
        object.__setattr__(self, "factor", float(self.factor))
        object.__setattr__(self, "min_loss_scale", least)

    def scale(self, tree: Any) -> Any:
        """Returns the tree multiplied by the scale, in float32; leaves that are not floating-point are unchanged."""
        return _multiplied(tree, self.loss_scale)

    def unscale(self, tree: Any) -> Any:
        """Returns the tree divided by the scale, in float32; leaves that are not floating-point are unchanged."""
        return _divided(tree, self.loss_scale)

    def adjust(self, grads_finite: ArrayLike) -> Self:
        """Returns the scale of the next step; `grads_finite`, () bool, is whether this step's gradients were finite.

        Raises:
          UnsupportedCast: a value that is not a boolean scalar.
        """
        finite = boolean_scalar("adjust: grads_finite", grads_finite)
        is_due = self.counter >= self.period - 1
        factor = jnp.float32(self.factor)
        grown = self.loss_scale * factor
        grown = jnp.where(is_due & jnp.isfinite(grown), grown, self.loss_scale)
        shrunk = jnp.maximum(self.loss_scale / factor, jnp.float32(self.min_loss_scale))
        counter = jnp.where(finite & ~is_due, self.counter + 1, 0)
        return self._replaced(jnp.where(finite, grown, shrunk), counter)

    def _replaced(self, loss_scale: Any, counter: Any) -> Self:
        return self.tree_unflatten((self.period, self.factor, self.min_loss_scale), (loss_scale, counter))

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[int, float, float]]:
        """Returns the arrays and the static fields."""
        return (self.loss_scale, self.counter), (self.period, self.factor, self.min_loss_scale)

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[int, float, float]]:
        """Returns the arrays with their keys, and the static fields.

        The keys are those of a mapping: `optax.tree.get(state, "loss_scale")` is then this object, not its scale too.
        """
        children, static = self.tree_flatten()
        return tuple(zip(map(jax.tree_util.DictKey, ("value", "counter")), children, strict=True)), static

    @classmethod
    def tree_unflatten(cls, static: tuple[int, float, float], children: Any) -> Self:
        """Returns the object of these arrays, which may be anything that a pytree may have as leaves."""
        result = object.__new__(cls)
        names = (field.name for field in dataclasses.fields(cls))
        for name, value in zip(names, (*children, *static), strict=True):
            object.__setattr__(result, name, value)
        return result


def _multiplied(tree: Any, scale: jax.Array) -> Any:
    return jax.tree.map(lambda x: _wide(x) * scale.astype(_wide(x).dtype) if _is_floating(x) else x, tree)


def _divided(tree: Any, scale: jax.Array) -> Any:
    # The inverse of a scale above 2**126 is subnormal, and so 0 for XLA, which without the barrier would multiply with
    # the inverse of a constant.
    scale = jax.lax.optimization_barrier(scale)
    return jax.tree.map(lambda x: _wide(x) / scale.astype(_wide(x).dtype) if _is_floating(x) else x, tree)


def _is_floating(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float) if dtype is None else bool(jnp.issubdtype(dtype, jnp.floating))


def _wide(leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


def _positive(name: str, value: Any) -> float:
    """Returns the number in float32.

    Raises:
      InvalidLossScale: unless it is positive and finite.
    """
    try:
        with np.errstate(over="ignore", under="ignore"):
            number = float(F32.type(float(value)))
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise InvalidLossScale(
            f"{name}: expected a positive number that is finite in float32, found {shown(value)}. Write 2.0**15, for "
            "example."
        )
    return number
