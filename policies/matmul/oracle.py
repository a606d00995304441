"""The oracle: the definition of the product in jnp, against which every other implementation is tested."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..scaled_array import ScaledArray
from .calls import Call, Implementation, Operands, one_by_one

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def dot(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    """Returns x @ weight.T in float32."""
    # By default some devices multiply float32 in fewer bits, such as TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, axes, precision=precision, preferred_element_type=jnp.float32)


def wide_rows(x: jax.Array | ScaledArray) -> jax.Array:
    """Returns the activations (rows, in): a ScaledArray dequantised to float32, any other array unchanged."""
    return x.dequantize() if isinstance(x, ScaledArray) else x


def wide_weight(kernel: jax.Array | ScaledArray, dtype: np.dtype) -> jax.Array:
    """Returns the weight (out, in): the kernel times any scales in float32, then cast to `dtype`, saturating."""
    if isinstance(kernel, ScaledArray):
        return kernel.dequantize(dtype)
    return dtypes.saturating_cast(kernel, dtype)


def product(call: Call, operands: Operands) -> jax.Array:
    """Returns the product (rows, out), computed in float32, or in `call.weight` if the call rounds the weight."""
    dtype = call.weight or np.dtype(np.float32)
    return dot(wide_rows(operands.x).astype(dtype), wide_weight(operands.kernel, dtype)).astype(call.result)


ORACLE = Implementation("oracle", "widens the whole kernel, then one dot", lambda call: None, one_by_one(product))
