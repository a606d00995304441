"""Narrow values that are trained: a wide proxy beside them, which no program reads, receives their gradient.

JAX gives a cotangent the dtype of its primal: gradients of float8 values would be float8, where 2000 is NaN, and those
of int8 do not exist.  So nothing is differentiated with respect to narrow values.  The derivative of a weight with
respect to its proxy is defined as 1 instead, wherever the weight is used (straight-through estimator: the derivative
of rounding, zero almost everywhere, is replaced by 1).  Since its value is never used, XLA removes a proxy of zeros
that is made inside a compiled program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainableValues:
    """The narrow values of a scaled pair, in whose place they stand in a tree, and their proxy.

    values  (*batch, rows, columns)  a narrow dtype
    proxy   (*batch, rows, columns)  f32, bf16 or f16; its gradient is that of the weight `values * scale_inv`

    `scaled_matmul`, `grouped_matmul`, `dequantize`, `ScaledArray` and `perparam.apply` take it as the kernel.
    JAX's own functions refuse it, since the gradient would be lost.
    """

    values: jax.Array
    proxy: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return np.dtype(self.values.dtype)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> TrainableValues:
        return TrainableValues(self.values[index], self.proxy[index])


@jax.custom_jvp
def straight_through(value: jax.Array, proxy: jax.Array) -> jax.Array:
    """Returns `value`, whose derivative is that of `proxy`, an array of its shape which is not read."""
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    value, _ = primals
    return value, tangents[1].astype(value.dtype)
