"""Which calls the kernels for compute capability 9.0 take, and how operands are laid out for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .. import dtypes
from ..blocks import Block
from ..formats import ROW_BLOCK, Format, ScaledArray
from ..scales import E4M3, F32, decode_scales
from .calls import Call, Implementation, Operands

SIDE = 128
"""What both dimensions of a kernel, and both sides of its blocks, are multiples of."""

FEW_ROWS = 64
"""Rows of x up to which tiles of them would be mostly empty, and operands are swapped."""


ROWS_FORMAT = Format(E4M3, ROW_BLOCK, F32)
"""Activations as the kernels take them."""


def _refuses_both(call: Call) -> str | None:
    """Why neither kernel takes the call."""
    if call.mode == "plain":
        return "no operand is narrow in the product"
    if call.kernel.values not in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        return f"there is no kernel for {dtypes.dtype_name(call.kernel.values)}"
    if call.mode == "W8A8" and not call.x.values == call.kernel.values == E4M3:
        return "both operands have to be f8_e4m3fn"
    if call.mode == "W8A8" and call.x != ROWS_FORMAT:
        return f"activations are quantised as {call.x}, not with a float32 scale for {SIDE} columns"
    if call.mode == "W8A16" and call.x.values == jnp.float32:
        return "float32 activations would lose bits"
    if call.out_features % SIDE or call.in_features % SIDE or not call.in_features or not call.out_features:
        return f"{call.out_features}×{call.in_features} is no multiple of {SIDE}×{SIDE}"
    if call.block is None or any(side % SIDE for side in _block(call)):
        return f"sides of the block {call.block} are no multiples of {SIDE}"
    if call.rows is None:
        return "the number of rows is not known"
    return None if call.rows else "there are no rows"


def _block(call: Call) -> Block:
    """The block of a call, cut to its kernel."""
    assert call.block is not None
    return min(call.block[0], call.out_features), min(call.block[1], call.in_features)


def _many_rows(call: Call) -> bool:
    return call.rows is not None and call.rows > FEW_ROWS


def _refuses_rows(call: Call) -> str | None:
    if why := _refuses_both(call):
        return why
    if call.mode == "W8A16":
        return "a narrow kernel is widened in registers, as the left operand"
    return None if _many_rows(call) else f"{call.rows} rows leave its tiles mostly empty"


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def _quantize(x: jax.Array, format: Format) -> ScaledArray:
    from . import hopper_quantize

    values, scales = hopper_quantize.quantize(_pad(x, hopper_quantize.ROWS))
    return ScaledArray(values[: x.shape[0]], scales.T[: x.shape[0]], format)


def _scales(kernel: jax.Array | ScaledArray) -> jax.Array:
    """The scales of a kernel, float32."""
    assert isinstance(kernel, ScaledArray)
    return decode_scales(kernel.scale_inv)


def _values(array: jax.Array | ScaledArray) -> jax.Array:
    """The values of an operand, scales apart."""
    return array.values if isinstance(array, ScaledArray) else array


def _rows(calls: tuple[Call, ...], operands: tuple[Operands, ...]) -> tuple[jax.Array, ...]:
    from . import hopper_rows  # Pallas is imported only where it is used

    results = []
    for call, one in zip(calls, operands, strict=True):
        assert isinstance(one.x, ScaledArray)
        x, x_scales = _pad(one.x.values, hopper_rows.TILE), _pad(one.x.scale_inv, hopper_rows.TILE).T
        y = hopper_rows.product(
            x, x_scales, _values(one.kernel), _scales(one.kernel), block=_block(call), result=call.result
        )
        results.append(y[: one.x.shape[0]])
    return tuple(results)


def _columns(calls: tuple[Call, ...], operands: tuple[Operands, ...]) -> tuple[jax.Array, ...]:
    from . import hopper_columns

    if len(calls) > 1 and _many_rows(calls[0]):
        # A launch costs little beside many rows, and results that share one are taken apart by copies.
        return tuple(y for pair in zip(calls, operands, strict=True) for y in _columns(pair[:1], pair[1:]))
    x, rows = operands[0].x, operands[0].x.shape[0]
    tile = hopper_columns.row_tile(rows)
    x_scales = _pad(x.scale_inv, max(tile, hopper_columns.SCALES)).T if isinstance(x, ScaledArray) else None
    results = hopper_columns.products(
        _pad(_values(x), tile),
        x_scales,
        tuple(_values(one.kernel) for one in operands),
        tuple(_scales(one.kernel) for one in operands),
        blocks=tuple(map(_block, calls)),
        result=calls[0].result,
    )
    return tuple(y[:rows] for y in results)


ROWS = Implementation(
    "hopper rows",
    "tiles of x by tiles of the kernel, float8 tensor cores",
    _refuses_rows,
    _rows,
    _quantize,
    opaque=True,
)
COLUMNS = Implementation(
    "hopper columns", "the kernel by tiles of x, its columns split among blocks", _refuses_both, _columns, opaque=True
)
