"""The definition of the product in plain jnp, which every other implementation is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..blocks import dequantize
from .activations import widen_rows
from .calls import Call, Implementation, Operands, one_by_one


def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (rows, in) @ weight (out, in).T, float32."""
    # float32 means float32 on every device, where some default to fewer bits.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, axes, precision=precision, preferred_element_type=jnp.float32)


def wide_rows(operands: Operands) -> jax.Array:
    """The activations (rows, in): narrow ones times their scales in float32, others as they are."""
    return operands.x if operands.x_scales is None else widen_rows(operands.x, operands.x_scales)


def wide_weight(operands: Operands, block: tuple[int, int] | None, dtype: np.dtype) -> jax.Array:
    """The weight (out, in): the kernel times its scales in float32, then `dtype`, saturating."""
    if operands.scale_inv is None or block is None:
        return dtypes.saturating_cast(operands.kernel, dtype)
    return dequantize(operands.kernel, operands.scale_inv, block, dtype)


def product(call: Call, operands: Operands) -> jax.Array:
    """(rows, out): all in float32 unless the call says to what the weight is rounded."""
    dtype = call.weight or np.dtype(np.float32)
    return dot(wide_rows(operands).astype(dtype), wide_weight(operands, call.block, dtype)).astype(call.result)


ORACLE = Implementation("oracle", "widen the whole kernel, then one dot", lambda call: None, one_by_one(product))
