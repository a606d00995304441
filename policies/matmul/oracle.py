"""The definition of the product in plain jnp, which every other implementation is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..formats import ScaledArray
from .calls import Call, Implementation, Operands, one_by_one

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def dot(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    """x @ weight.T in float32."""
    # float32 means float32 on every device, where some default to fewer bits.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, axes, precision=precision, preferred_element_type=jnp.float32)


def wide_rows(x: jax.Array | ScaledArray) -> jax.Array:
    """The activations (rows, in): narrow ones times their scales in float32, others as they are."""
    return x.dequantize() if isinstance(x, ScaledArray) else x


def wide_weight(kernel: jax.Array | ScaledArray, dtype: np.dtype) -> jax.Array:
    """The weight (out, in): the kernel times its scales in float32, then `dtype`, saturating."""
    if isinstance(kernel, ScaledArray):
        return kernel.dequantize(dtype)
    return dtypes.saturating_cast(kernel, dtype)


def product(call: Call, operands: Operands) -> jax.Array:
    """(rows, out): all in float32 unless the call says to what the weight is rounded."""
    dtype = call.weight or np.dtype(np.float32)
    return dot(wide_rows(operands.x).astype(dtype), wide_weight(operands.kernel, dtype)).astype(call.result)


ORACLE = Implementation("oracle", "widen the whole kernel, then one dot", lambda call: None, one_by_one(product))
