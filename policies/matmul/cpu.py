"""The product on a CPU: widens the kernel in slabs, chunks of rows that fit in the cache.

XLA's CPU backend widens whole arrays: it writes a float32 copy four times the size of a float8 kernel before the
product starts, and schedules the copies of many layers together.  A slab is decoded from its bytes, multiplied with its
scales and used while it is in the cache.  `benchmarks/README.md` has measurements.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..blocks import expand
from ..scaled_array import ScaledArray
from ..scales import decode_scales
from . import oracle
from .calls import Call, Implementation, Operands, one_by_one

SLAB = 2**20
"""Elements of a kernel in a slab: 4 MiB of float32."""

MANY_ROWS = 128
"""From this number of rows on, products in bfloat16 are faster than in float32 on processors with bfloat16
instructions."""


def slab_height(out_features: int, in_features: int) -> int:
    """Returns the number of rows in a slab: a power of two, which divides most kernels evenly.

    A kernel has at least two slabs: XLA unrolls a loop of one step, and would then widen the kernels of all layers at
    the same time.
    """
    height = 2 ** int(math.log2(max(SLAB // max(in_features, 1), 1)))
    rows: int = max(1, min(max(16, height), math.ceil(out_features / 2)))
    return rows


def _slab_dtype(call: Call) -> np.dtype:
    """Returns the dtype of the product: bfloat16 for many rows if the call rounds the weight to it, else float32."""
    rounded = call.weight == jnp.bfloat16 and not _few_rows(call) and multiplies_bfloat16()
    return np.dtype(jnp.bfloat16 if rounded else np.float32)


def _few_rows(call: Call) -> bool:
    return call.rows is not None and call.rows < MANY_ROWS


def product(call: Call, operands: Operands) -> jax.Array:
    """Returns the product (rows, out), computed slab by slab."""
    dtype = _slab_dtype(call)
    x = oracle.wide_rows(operands.x)
    x = (x if call.weight is None else x.astype(call.weight)).astype(dtype)

    def write(start: jax.Array, _: jax.Array, y: jax.Array) -> jax.Array:
        part = _dot(x, _slab(operands, call, start, dtype))
        return jax.lax.dynamic_update_slice_in_dim(y, part.astype(y.dtype), start, axis=1)

    return _over_slabs(call, write, _zeros(x, _values(operands))).astype(call.result)


def gradient_of_x(call: Call, gradient: jax.Array, operands: Operands) -> jax.Array:
    """Returns gradient (rows, out) @ weight (out, in) in float32, computed slab by slab."""

    def add(start: jax.Array, new: jax.Array, dx: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(gradient, start, new.shape[0], axis=1).astype(jnp.float32)
        weight = _slab(operands, call, start, np.dtype(np.float32))
        return dx + oracle.dot(jnp.where(new, columns, 0), weight.T)

    return _over_slabs(call, add, _zeros(gradient, _values(operands).T))


def _over_slabs(
    call: Call, step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], carry: jax.Array
) -> jax.Array:
    """Returns `carry` after `step(start, new, carry)` for all slabs of the kernel.

    start  the first row of the slab
    new    (height,) bool, whether a row is not in the slab before: the last slab ends with the kernel and may overlap
    """
    if call.out_features == 0:
        return carry
    height = slab_height(call.out_features, call.in_features)

    def body(i: jax.Array, carry: jax.Array) -> jax.Array:
        start = jnp.minimum(i * height, call.out_features - height)
        return step(start, start + jnp.arange(height) >= i * height, carry)

    result: jax.Array = jax.lax.fori_loop(0, math.ceil(call.out_features / height), body, carry)
    return result


def _slab(operands: Operands, call: Call, start: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns the slab of the weight that begins at row `start`, rounded to `call.weight`, in `dtype`."""
    height = slab_height(call.out_features, call.in_features)
    # XLA would convert the whole narrow array before the loop if the loop sliced floats, and would copy it if the
    # reinterpretation as integers could move out of the loop: the barrier makes it depend on the loop's index.
    kernel, start = jax.lax.optimization_barrier((_values(operands), start))
    bits = jax.lax.bitcast_convert_type(kernel, _BITS[kernel.dtype.itemsize])
    values = _decoded(jax.lax.dynamic_slice_in_dim(bits, start, height), kernel.dtype)
    if isinstance(operands.kernel, ScaledArray):
        block = operands.kernel.block
        rows = (start + jnp.arange(height)) // block[0]
        scales = jnp.take(decode_scales(operands.kernel.scale_inv), rows, axis=0, mode="clip")
        values = values * expand(scales, values.shape, (1, block[1]))
    if call.weight is not None and dtype != call.weight:
        info = jnp.finfo(call.weight)
        bound = dtypes.largest(call.weight)
        values = jnp.where(jnp.isfinite(values), jnp.clip(values, -bound, bound), values)
        return jax.lax.reduce_precision(values, info.nexp, info.nmant)
    return dtypes.saturating_cast(values, dtype)


def _values(operands: Operands) -> jax.Array:
    """Returns the values of the kernel without their scales."""
    return operands.kernel.values if isinstance(operands.kernel, ScaledArray) else operands.kernel


_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _decoded(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns the values with these bits in float32, exactly; for the common dtypes with operations that vectorise."""
    if dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    if dtype == jnp.float8_e5m2:  # the upper half of a float16
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16) << 8, jnp.float16).astype(jnp.float32)
    if dtype == jnp.float8_e4m3fn:
        # Its bits, shifted, are a float16 of 2**-8 times the value, subnormals included.  The backend converts
        # float16 exactly, but would flush the subnormals of bfloat16 and float32.
        magnitude = (bits & 0x7F).astype(jnp.uint16)
        half = jnp.where(magnitude == 0x7F, jnp.uint16(0x7E00), magnitude << 7) | (bits & 0x80).astype(jnp.uint16) << 8
        result: jax.Array = jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * jnp.float32(256)
        return result
    return jax.lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `oracle.dot`; pads one row of bfloat16 to two, since XLA's product of one row is slow."""
    if x.dtype == jnp.bfloat16 and x.shape[0] == 1:
        two = jax.lax.optimization_barrier(jnp.pad(x, ((0, 1), (0, 0))))  # without it XLA removes the padding
        return oracle.dot(two, weight)[:1]
    return oracle.dot(x, weight)


def _zeros(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns float32 zeros (rows of x, rows of kernel), marked in a `shard_map` as varying like the product."""
    zeros = oracle.dot(x[:, :0].astype(jnp.float32), kernel[:, :0].astype(jnp.float32))
    if x.shape[1] == 0:
        return zeros
    # The zeros depend on x in a way that XLA cannot simplify.  XLA would allocate the constant initial values of all
    # loops at the same time: in a prefill with 28 layers, the results of all of them.
    bits = jax.lax.bitcast_convert_type(x[:, :1].astype(jnp.float32), jnp.int32)
    return zeros + jnp.clip(bits, 0, 0).astype(jnp.float32)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Returns whether the processor has instructions for products of bfloat16; False if /proc/cpuinfo is missing."""
    try:
        words = pathlib.Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def _refuses(call: Call) -> str | None:
    if call.kernel.narrow:
        return None
    kernel = call.kernel.values
    if kernel.itemsize > 4:
        return "slabs do not support float64"
    if kernel != call.weight and (call.weight == np.float32 or _few_rows(call)):
        return None
    if kernel == call.weight == jnp.float16:
        return None  # XLA's own product would widen the whole kernel to float32
    if kernel == call.weight == jnp.bfloat16 and call.rows == 1 and not multiplies_bfloat16():
        return None
    return "the kernel already has the dtype of the product"


def _refuses_two_rows(call: Call) -> str | None:
    if call.rows != 1 or call.kernel.values != jnp.bfloat16 or call.weight != jnp.bfloat16 or call.block is not None:
        return "it is only for one row and a bfloat16 kernel"
    return None if multiplies_bfloat16() else "this processor has no instructions for bfloat16"


def _two_rows(call: Call, operands: Operands) -> jax.Array:
    return _dot(oracle.wide_rows(operands.x).astype(jnp.bfloat16), _values(operands)).astype(call.result)


SLABS = Implementation("slabs", "widens the kernel in cache-sized slabs", _refuses, one_by_one(product))
TWO_ROWS = Implementation(
    "two rows",
    "pads x with a row of zeros, since XLA's product of one row is slow",
    _refuses_two_rows,
    one_by_one(_two_rows),
)
