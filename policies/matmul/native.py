"""The product on a CPU by the native library, which decodes narrow kernels in registers.

The values of a narrow kernel are exact in bfloat16.  If x is bfloat16, instructions for bfloat16 multiply them, else
those for float32; sums are float32, and are multiplied with the scales.  `policies/native/isa.h` has the order of the
sums.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ..native import library
from ..native.tables import bfloat16_table
from ..scaled_array import ScaledArray
from ..scales import decode_scales
from .calls import Call, Implementation, Operands
from .shards import vary

_TABLE, _E4M3, _E5M2, _BFLOAT16, _FLOAT16, _FLOAT32 = range(6)
_VALUES = {
    np.dtype(ml_dtypes.float8_e4m3fn): _E4M3,
    np.dtype(ml_dtypes.float8_e5m2): _E5M2,
    np.dtype(ml_dtypes.bfloat16): _BFLOAT16,
    np.dtype(np.float16): _FLOAT16,
    np.dtype(np.float32): _FLOAT32,
}
"""The enum `Values` of isa.h by dtype; other dtypes of one byte are decoded by a table."""

_UNROUNDED = 0
_ROUNDING = {np.dtype(np.float32): 1, np.dtype(ml_dtypes.bfloat16): 2, np.dtype(np.float16): 3}
"""The enum `Rounding` of isa.h by the dtype to which weights are rounded."""


def refuses(call: Call) -> str | None:
    """Returns the reason why it does not accept a call, or None."""
    if why := library.unavailable():
        return why
    if call.kernel.values.itemsize > 4:
        return "native kernels do not support float64"
    if call.rows is None:
        return "the number of rows is not known"
    return None


def products(
    calls: tuple[Call, ...], operands: tuple[Operands, ...], group_sizes: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """Returns the products (rows, out) of calls that share x; those that differ only in `out` in one run.

    group_sizes  (groups,) int32, rows of each group of x, whose kernels are stacks (groups, out, in); None: no groups
    """
    keys = [_key(call) for call in calls]
    if len(set(keys)) > 1:
        pairs = zip(calls, operands, strict=True)
        return tuple(_products((call,), (arrays,), group_sizes)[0] for call, arrays in pairs)
    return _products(calls, operands, group_sizes)


def _key(call: Call) -> tuple[object, ...]:
    return call.x, call.kernel, call.weight, call.result


def _products(
    calls: tuple[Call, ...], operands: tuple[Operands, ...], group_sizes: jax.Array | None
) -> tuple[jax.Array, ...]:
    x, x_scales = _activations(calls[0], operands[0].x)
    result = np.dtype(ml_dtypes.bfloat16 if calls[0].result == ml_dtypes.bfloat16 else np.float32)
    shapes = [jax.ShapeDtypeStruct((x.shape[0], call.out_features), result) for call in calls]
    sums = _run(calls[0], x, x_scales, [one.kernel for one in operands], shapes, group_sizes, transposed=False)
    return tuple(y.astype(call.result) for y, call in zip(sums, calls, strict=True))


def gradient_of_x(
    call: Call, gradient: jax.Array, operands: Operands, group_sizes: jax.Array | None = None
) -> jax.Array:
    """Returns gradient (rows, out) @ weight (out, in) in float32; with `group_sizes` as in `products`."""
    gradient = gradient.astype(np.float32) if gradient.dtype == np.float16 else gradient
    shapes = [jax.ShapeDtypeStruct((gradient.shape[0], call.in_features), np.dtype(np.float32))]
    return _run(call, gradient, None, [operands.kernel], shapes, group_sizes, transposed=True)[0]


def _activations(call: Call, x: jax.Array | ScaledArray) -> tuple[jax.Array, jax.Array | None]:
    """Returns x as bfloat16 or float32, and the scales of narrow activations."""
    if isinstance(x, ScaledArray):
        return x.values.astype(jnp.bfloat16), decode_scales(x.scale_inv)
    if call.weight is not None:
        x = x.astype(call.weight)
    return (x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)), None


def _run(
    call: Call,
    x: jax.Array,
    x_scales: jax.Array | None,
    kernels: list[jax.Array | ScaledArray],
    shapes: list[jax.ShapeDtypeStruct],
    group_sizes: jax.Array | None,
    *,
    transposed: bool,
) -> list[jax.Array]:
    """Returns the products of x, as the handlers take it, with kernels of one format."""
    none = jnp.zeros((0, 0), jnp.float32)
    arrays: list[jax.Array] = []
    for kernel in kernels:
        if isinstance(kernel, ScaledArray):
            arrays += [kernel.values, decode_scales(kernel.scale_inv)]
        else:
            arrays += [kernel, none]
    values = call.kernel.values
    exact = call.weight is None or (not call.kernel.narrow and call.weight in (values, np.float32))
    x_group = 0
    if x_scales is not None:
        assert call.x.block is not None
        x_group = call.in_features if call.x.block[1] == -1 else call.x.block[1]
    block = call.block or (1, 1)
    arrays = [x, none if x_scales is None else x_scales, *([] if group_sizes is None else [group_sizes]), *arrays]
    function = jax.ffi.ffi_call("perparam_matmul" if group_sizes is None else "perparam_grouped_matmul", shapes)
    results = function(
        *arrays,
        table=bfloat16_table(values),
        values=np.int32(_VALUES.get(values, _TABLE)),
        rounding=np.int32(_UNROUNDED if exact else _ROUNDING[call.weight]),
        block_height=np.int64(block[0]),
        block_width=np.int64(block[1]),
        x_group=np.int64(x_group),
        transposed=transposed,
    )
    marked: list[jax.Array] = vary(list(results), arrays)
    return marked


NATIVE = Implementation(
    "native", "decodes the kernel in registers, with instructions of this processor", refuses, products,
    opaque=True, checked=False, exportable=False,
)  # fmt: skip
