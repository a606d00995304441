"""The product in XLA operations, for devices and calls without a kernel: formulations with different memory traffic.

Widening a kernel before a dot writes a copy of it, with two or four bytes per weight.  For one row, a multiplication
and a sum fuse into one program that reads only the narrow bytes.  For a few rows, one dot per block of columns does the
same, with the scales applied to its partial sums, which are written to memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..blocks import expand
from ..scaled_array import ScaledArray
from ..scales import decode_scales
from . import oracle
from .calls import Call, Implementation, Operands, one_by_one

FEW_ROWS = 32
"""Up to this number of rows, writing one partial sum per block of columns costs less than a wide copy of the kernel."""


def _reduction(call: Call, operands: Operands) -> jax.Array:
    """Returns the product (1, out) as a multiplication and a sum, which XLA fuses."""
    weight = oracle.wide_weight(operands.kernel, call.weight or np.dtype(np.float32)).astype(jnp.float32)
    x = oracle.wide_rows(operands.x)
    x = (x if call.weight is None else x.astype(call.weight)).astype(jnp.float32)
    return jnp.sum(x * weight, axis=1, dtype=jnp.float32)[None].astype(call.result)


def _refuses_reduction(call: Call) -> str | None:
    if call.rows == 1:
        return None
    return f"a fused multiplication and sum reads the kernel once for each of {call.rows or 'any number of'} rows"


def _by_block(call: Call, operands: Operands) -> jax.Array:
    """Returns the product (rows, out) as the sum of a dot of unscaled values per block of columns, times its scales."""
    assert isinstance(operands.kernel, ScaledArray)
    height, wide = operands.kernel.block
    width = _width(call)
    # Narrow values are exact in 16 bits, and their products are exact in float32.
    dtype = call.x.values if dtypes.is_activation(call.x.values) else np.dtype(jnp.bfloat16)
    across = call.in_features // width
    values = operands.x.values if isinstance(operands.x, ScaledArray) else operands.x
    x = values.astype(dtype).reshape(values.shape[0], across, width)
    kernel = operands.kernel.values.astype(dtype).reshape(call.out_features, across, width)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    partial = jnp.einsum("rbw,obw->bro", x, kernel, precision=precision, preferred_element_type=jnp.float32)
    scales = expand(decode_scales(operands.kernel.scale_inv), kernel.shape[:2], (height, wide // width))
    partial = partial * scales.T[:, None, :]
    if isinstance(operands.x, ScaledArray):
        by_row = expand(decode_scales(operands.x.scale_inv), (values.shape[0], across), (1, _x_width(call) // width))
        partial = partial * by_row.T[:, :, None]
    return partial.sum(axis=0).astype(call.result)


def _width(call: Call) -> int:
    """Returns the number of columns in a dot, for which both operands have one scale each."""
    assert call.block is not None
    width = min(call.block[1], call.in_features)
    return int(np.gcd(width, _x_width(call))) if call.x.narrow else width


def _x_width(call: Call) -> int:
    """Returns the number of columns of activations that share a scale."""
    assert call.x.block is not None
    return call.in_features if call.x.block[1] == -1 else call.x.block[1]


def _refuses_by_block(call: Call) -> str | None:
    if call.block is None or not call.kernel.narrow:
        return "the kernel has no blocks"
    if call.weight is not None:
        return f"the weight is rounded to {dtypes.dtype_name(call.weight)} before the product"
    if call.rows is None:
        return "the number of rows is not known"
    if call.rows > FEW_ROWS:
        return f"partial sums of {call.rows} rows are larger than a wide kernel"
    if not call.in_features:
        return "there are no columns"
    if call.in_features % _width(call) or _width(call) < 32:
        return f"blocks of {call.block[1]} columns do not divide {call.in_features} columns into 32 or more each"
    return None


def _widened(call: Call, operands: Operands) -> jax.Array:
    """Returns the product (rows, out) as a dot with the widened kernel."""
    dtype = call.weight or np.dtype(np.float32)
    x, weight = oracle.wide_rows(operands.x).astype(dtype), oracle.wide_weight(operands.kernel, dtype)
    if call.weight is not None or call.x.values == jnp.float32 or call.mode == "W8A8":
        return oracle.dot(x, weight).astype(call.result)
    # HIGH is TF32 on NVIDIA GPUs, which represents x in 16 bits exactly.  Rounding the weight to bfloat16 would cost as
    # much accuracy as rounding the result does, and float16 does not have the range of the scales.
    axes, high = (((1,), (1,)), ((), ())), jax.lax.Precision.HIGH
    sums = jax.lax.dot_general(x, weight, axes, precision=high, preferred_element_type=jnp.float32)
    return sums.astype(call.result)


def _dot(call: Call, operands: Operands) -> jax.Array:
    """Returns the product (rows, out) with a kernel that is not narrow."""
    assert call.weight is not None
    x = oracle.wide_rows(operands.x).astype(call.weight)
    weight = oracle.wide_weight(operands.kernel, call.weight)

    def rounded_within(x: jax.Array, weight: jax.Array) -> jax.Array:
        # GPUs sum in float32 and write 16 bits.  With a float32 result, a second kernel would do the rounding.
        axes = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, weight, axes, preferred_element_type=call.result)

    def rounded_after(x: jax.Array, weight: jax.Array) -> jax.Array:
        return oracle.dot(x, weight).astype(call.result)

    if call.result == call.weight and call.result.itemsize == 2:
        rounded: jax.Array = jax.lax.platform_dependent(
            x, weight, cuda=rounded_within, rocm=rounded_within, default=rounded_after
        )
        return rounded
    return rounded_after(x, weight)


REDUCTION = Implementation(
    "fused reduction", "one fused multiplication and sum, which reads only the narrow kernel", _refuses_reduction,
    one_by_one(_reduction),
)  # fmt: skip
BY_BLOCK = Implementation(
    "dot by block",
    "one dot per block of columns, with the scales applied to its sums",
    _refuses_by_block,
    one_by_one(_by_block),
)
WIDENED = Implementation(
    "widen, then dot",
    "widens the whole kernel, to float32 unless `compute` is a 16-bit dtype",
    lambda call: None,
    one_by_one(_widened),
)
DOT = Implementation(
    "dot", "XLA's own product with a kernel that is not narrow",
    lambda call: "the kernel is narrow" if call.kernel.narrow else None, one_by_one(_dot),
)  # fmt: skip
