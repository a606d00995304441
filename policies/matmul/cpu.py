"""The product on a CPU: the kernel is widened a slab of rows at a time, small enough to stay in the cache.

XLA's CPU backend widens whole arrays: it writes a float copy four times the size of a float8 kernel before it reads the
first row, and schedules the copies of many layers together.  A slab is decoded from its bytes, multiplied with its
scales and used while it is in the cache.  `benchmarks/README.md` has the figures.
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
from ..formats import ScaledArray
from ..scales import decode_scales
from . import oracle
from .calls import Call, Implementation, Operands, one_by_one

SLAB = 2**20
"""Elements of a kernel that are widened at a time: 4 MiB of float32."""

MANY_ROWS = 128
"""Rows from which on products in bfloat16 are faster than in float32, on processors that have them."""


def slab_height(out_features: int, in_features: int) -> int:
    """Rows of a kernel that make a slab: a power of two, so that most kernels divide into slabs; at least two slabs.

    XLA takes a loop of one step apart, and its schedule then widens what all layers need at once.
    """
    height = 2 ** int(math.log2(max(SLAB // max(in_features, 1), 1)))
    rows: int = max(1, min(max(16, height), math.ceil(out_features / 2)))
    return rows


def _slab_dtype(call: Call) -> np.dtype:
    """The dtype in which a slab meets x: bfloat16 for many rows of calls that round the weight to it, else float32."""
    rounded = call.weight == jnp.bfloat16 and not _few_rows(call) and multiplies_bfloat16()
    return np.dtype(jnp.bfloat16 if rounded else np.float32)


def _few_rows(call: Call) -> bool:
    return call.rows is not None and call.rows < MANY_ROWS


def product(call: Call, operands: Operands) -> jax.Array:
    """(rows, out), slab by slab."""
    dtype = _slab_dtype(call)
    x = oracle.wide_rows(operands.x)
    x = (x if call.weight is None else x.astype(call.weight)).astype(dtype)

    def write(start: jax.Array, _: jax.Array, y: jax.Array) -> jax.Array:
        part = _dot(x, _slab(operands, call, start, dtype))
        return jax.lax.dynamic_update_slice_in_dim(y, part.astype(y.dtype), start, axis=1)

    return _over_slabs(call, write, _zeros(x, _values(operands))).astype(call.result)


def gradient_of_x(call: Call, gradient: jax.Array, operands: Operands) -> jax.Array:
    """gradient (rows, out) @ weight (out, in), float32, slab by slab."""

    def add(start: jax.Array, new: jax.Array, dx: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(gradient, start, new.shape[0], axis=1).astype(jnp.float32)
        weight = _slab(operands, call, start, np.dtype(np.float32))
        return dx + oracle.dot(jnp.where(new, columns, 0), weight.T)

    return _over_slabs(call, add, _zeros(gradient, _values(operands).T))


def _over_slabs(
    call: Call, step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], carry: jax.Array
) -> jax.Array:
    """`carry` after `step(start, new, carry)` for all slabs of the kernel.

    The last one ends with the kernel, and so may begin within the one before: `new` (height,) says which rows are new.
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
    """A slab of the weight from row `start` on, rounded as the call says, in `dtype`."""
    height = slab_height(call.out_features, call.in_features)
    # Sliced as bits, and tied to the loop's index: XLA converts a narrow array that a loop slices as a whole, before
    # the loop, and copies one that it can reinterpret there.
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
    """The kernel, scales apart."""
    return operands.kernel.values if isinstance(operands.kernel, ScaledArray) else operands.kernel


_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _decoded(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """The values of `bits` as float32, exactly: of those types that matter in a way that CPUs do many at a time."""
    if dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    if dtype == jnp.float8_e5m2:  # the upper half of a float16
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16) << 8, jnp.float16).astype(jnp.float32)
    if dtype == jnp.float8_e4m3fn:
        # As a float16 its value is 2**-8 of what it was, subnormals included.  Not through bfloat16 or float32 bits:
        # the backend flushes their subnormals; its conversion from float16 is exact.
        magnitude = (bits & 0x7F).astype(jnp.uint16)
        half = jnp.where(magnitude == 0x7F, jnp.uint16(0x7E00), magnitude << 7) | (bits & 0x80).astype(jnp.uint16) << 8
        result: jax.Array = jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * jnp.float32(256)
        return result
    return jax.lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`oracle.dot`; one row of bfloat16 goes as two, since XLA has no fast product of one."""
    if x.dtype == jnp.bfloat16 and x.shape[0] == 1:
        two = jax.lax.optimization_barrier(jnp.pad(x, ((0, 1), (0, 0))))  # or XLA takes the padding away again
        return oracle.dot(two, weight)[:1]
    return oracle.dot(x, weight)


def _zeros(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Float32 zeros (rows of x, rows of kernel), which inside `shard_map` vary over the mesh as their product does."""
    zeros = oracle.dot(x[:, :0].astype(jnp.float32), kernel[:, :0].astype(jnp.float32))
    if x.shape[1] == 0:
        return zeros
    # Made of x in a way that XLA does not see through: of loops that begin with a constant it schedules the beginnings
    # together, however far apart they are, and of a prefill with 28 layers holds all results at once.
    bits = jax.lax.bitcast_convert_type(x[:, :1].astype(jnp.float32), jnp.int32)
    return zeros + jnp.clip(bits, 0, 0).astype(jnp.float32)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's processor has instructions for products of bfloat16; where it says nothing, no."""
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
        return "there are no slabs of float64"
    if kernel != call.weight and (call.weight == np.float32 or _few_rows(call)):
        return None
    if kernel == call.weight == jnp.float16:
        return None  # XLA widens these to float32 itself, all at once
    if kernel == call.weight == jnp.bfloat16 and call.rows == 1 and not multiplies_bfloat16():
        return None
    return "the kernel has the dtype of the product"


def _refuses_two_rows(call: Call) -> str | None:
    if call.rows != 1 or call.kernel.values != jnp.bfloat16 or call.weight != jnp.bfloat16 or call.block is not None:
        return "this is not one row and a bfloat16 kernel"
    return None if multiplies_bfloat16() else "this processor has no instructions for bfloat16"


def _two_rows(call: Call, operands: Operands) -> jax.Array:
    return _dot(oracle.wide_rows(operands.x).astype(jnp.bfloat16), _values(operands)).astype(call.result)


SLABS = Implementation("slabs", "widen the kernel a cache-sized slab at a time", _refuses, one_by_one(product))
TWO_ROWS = Implementation(
    "two rows", "a row of zeros added, for XLA's product of several", _refuses_two_rows, one_by_one(_two_rows)
)
