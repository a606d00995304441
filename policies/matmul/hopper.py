"""The Hopper kernels as implementations: which calls they accept, and how their operands are padded and arranged.

Hopper is compute capability 9.0: H100 and H200.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .. import dtypes
from ..blocks import Block
from ..errors import count
from ..formats import ROW_BLOCK, Format, stored_format
from ..scaled_array import ScaledArray
from ..scales import E4M3, F32, decode_scales
from ..targets import multiprocessors
from . import hopper_costs
from .calls import BY_XLA, Call, Implementation, Operands, Quantizer

SIDE = 128
"""Both dimensions of a kernel, and both sides of its blocks, must be multiples of this."""

FEW_ROWS = 64
"""Rows of x up to which 128-row tiles would be mostly empty; then only the kernel with swapped operands runs."""

ROW_MULTIPLE = 8
"""Rows of x and of the result are multiples of this, the rows of a swizzled tile; the last tile may reach beyond."""

ROWS_FORMAT = Format(E4M3, ROW_BLOCK, F32)
"""The only format of narrow activations that the kernels accept."""


def refuses_both(call: Call) -> str | None:
    """Returns the reason why no kernel accepts the call; None where `hopper columns` accepts it."""
    if call.mode == "plain":
        return "no operand is narrow in the product"
    if call.kernel.values not in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        return f"there is no kernel for {dtypes.dtype_name(call.kernel.values)}"
    if call.mode == "W8A8" and not call.x.values == call.kernel.values == E4M3:
        return "both operands have to be f8_e4m3fn"
    if call.mode == "W8A8" and call.x != ROWS_FORMAT:
        return f"activations are quantised as {_label(call.x)}, not with a float32 scale for {SIDE} columns"
    if call.mode == "W8A16" and call.x.values == jnp.float32:
        return "float32 activations would lose bits"
    if call.out_features % SIDE or call.in_features % SIDE or not call.in_features or not call.out_features:
        return f"{call.out_features}×{call.in_features} is no multiple of {SIDE}×{SIDE}"
    if call.block is None or any(side % SIDE for side in _block(call)):
        return f"sides of the block {call.block} are no multiples of {SIDE}"
    if call.rows is None:
        return "the number of rows is not known"
    return None if call.rows else "there are no rows"


def _label(activations: Format) -> str:
    """Returns the registered name of a format of activations if it has one, else its parts.

    A registered format also says how activations are quantised, which the format of activations itself does not: the
    two are not equal, but have the same values, block, scales and scale rule.
    """
    assert activations.block is not None
    assert activations.scale is not None
    registered = stored_format(activations.values, activations.block, activations.scale)
    return str(registered if registered.rule is activations.rule else activations)


def _block(call: Call) -> Block:
    """Returns the block of the call's scales in rows and columns, at most the size of the kernel."""
    assert call.block is not None
    return min(call.block[0], call.out_features), min(call.block[1], call.in_features)


def _many_rows(call: Call) -> bool:
    return call.rows is not None and call.rows > FEW_ROWS


def _refuses_rows(call: Call) -> str | None:
    if why := refuses_both(call):
        return why
    if call.mode == "W8A16":
        return "a narrow kernel is widened in registers, as the left operand"
    return None if _many_rows(call) else f"its tiles would be mostly empty with {count(call.rows or 0, 'row')}"


def _rows_slower(call: Call) -> str | None:
    """Returns why `hopper columns` is preferred to `hopper rows` for a call and those beside it, or None."""
    assert call.rows is not None
    outs, processors = (call.out_features, *call.beside), multiprocessors()
    shape = call.rows, outs, call.in_features, processors
    rows = hopper_costs.rows_cost(*shape)
    columns = min(hopper_costs.shared_cost(*shape, call.result.itemsize), hopper_costs.apart_cost(*shape))
    if columns >= hopper_costs.MARGIN * rows:
        return None
    tiles = count(hopper_costs.tiles_of(call.rows, outs), "tile")
    return (
        f"{tiles} on {processors} multiprocessors would take it an estimated {rows:.0f} steps of {SIDE} columns, and "
        f"hopper columns {columns:.0f}"
    )


def _refuses_widened(call: Call) -> str | None:
    if why := refuses_both(call):
        return why
    assert call.rows is not None
    if call.mode == "W8A8":
        return "both operands are narrow"
    if call.rows <= SIDE:
        return f"{count(call.rows, 'row')} {'is' if call.rows == 1 else 'are'} one tile, which no thread blocks share"
    if call.out_features % (2 * SIDE):
        return f"{call.out_features} is no multiple of {2 * SIDE}, the rows of the kernel for a pair of thread blocks"
    tiles, processors = -(-call.rows // SIDE) * call.out_features // SIDE, multiprocessors()
    return f"its {tiles} tiles leave some of {processors} multiprocessors idle" if tiles < processors else None


def pad(x: jax.Array, tile: int) -> jax.Array:
    """Returns x (rows, …) with zeros below: up to `tile` rows, or to a multiple of `ROW_MULTIPLE` if it has more."""
    rows = x.shape[0]
    missing = tile - rows if rows < tile else -rows % ROW_MULTIPLE
    return jnp.pad(x, ((0, missing), (0, 0))) if missing else x


def _run_quantisation(x: jax.Array, format: Format) -> ScaledArray:
    """Returns x (rows, in) in `format`, which is `ROWS_FORMAT`."""
    from . import hopper_quantize  # Pallas is imported only where a kernel is used

    values, scales = hopper_quantize.quantize(pad(x, hopper_quantize.ROWS))
    return ScaledArray(values[: x.shape[0]], scales.T[: x.shape[0]], format)


QUANTISATION = Quantizer("hopper quantisation", _run_quantisation, opaque=True)


def _quantizer(call: Call) -> Quantizer:
    """Returns the kernel for many rows; XLA quantises few rows in one fusion, which costs no more than a launch."""
    return QUANTISATION if _many_rows(call) else BY_XLA


def _scales(kernel: jax.Array | ScaledArray) -> jax.Array:
    """Returns the scales of a narrow kernel in float32."""
    assert isinstance(kernel, ScaledArray)
    return decode_scales(kernel.scale_inv)


def _values(array: jax.Array | ScaledArray) -> jax.Array:
    """Returns the values of an operand without their scales."""
    return array.values if isinstance(array, ScaledArray) else array


def _rows(calls: tuple[Call, ...], operands: tuple[Operands, ...]) -> tuple[jax.Array, ...]:
    from . import hopper_rows

    results = []
    for call, pair in zip(calls, operands, strict=True):
        assert isinstance(pair.x, ScaledArray)
        x, x_scales = pad(pair.x.values, hopper_rows.TILE), pad(pair.x.scale_inv, hopper_rows.TILE).T
        y = hopper_rows.product(
            x,
            x_scales,
            _values(pair.kernel),
            _scales(pair.kernel),
            block=_block(call),
            result=call.result,
            processors=multiprocessors(),
        )
        results.append(y[: pair.x.shape[0]])
    return tuple(results)


def _widened(calls: tuple[Call, ...], operands: tuple[Operands, ...]) -> tuple[jax.Array, ...]:
    from . import hopper_widened

    results = []
    for call, pair in zip(calls, operands, strict=True):
        x = _values(pair.x)
        y = hopper_widened.product(
            pad(x, hopper_widened.TILE),
            _values(pair.kernel),
            _scales(pair.kernel),
            block=_block(call),
            result=call.result,
            processors=multiprocessors(),
        )
        results.append(y[: x.shape[0]])
    return tuple(results)


def _columns(calls: tuple[Call, ...], operands: tuple[Operands, ...]) -> tuple[jax.Array, ...]:
    from . import hopper_columns

    x, rows, processors = operands[0].x, operands[0].x.shape[0], multiprocessors()
    shape = rows, [call.out_features for call in calls], calls[0].in_features, processors
    if hopper_costs.apart_cost(*shape) < hopper_costs.shared_cost(*shape, calls[0].result.itemsize):
        # With thousands of rows, a launch costs less than the copies that separate the results of a shared one.
        return tuple(y for call, pair in zip(calls, operands, strict=True) for y in _columns((call,), (pair,)))
    tile = hopper_costs.row_tile(rows)
    x_scales = pad(x.scale_inv, max(tile, hopper_columns.SCALES)).T if isinstance(x, ScaledArray) else None
    kernels = tuple(pair.kernel for pair in operands)
    results = hopper_columns.products(
        pad(_values(x), tile), x_scales, **kernel_arguments(calls, kernels), processors=processors
    )
    return tuple(y[:rows] for y in results)


def sums(
    calls: tuple[Call, ...], x: jax.Array, x_scales: jax.Array | None, kernels: tuple[ScaledArray, ...]
) -> jax.Array:
    """Returns `hopper_columns.sums` of calls that share x, which is padded as the kernel requires."""
    from . import hopper_columns

    return hopper_columns.sums(x, x_scales, **kernel_arguments(calls, kernels), processors=multiprocessors())


def kernel_arguments(calls: tuple[Call, ...], kernels: tuple[jax.Array | ScaledArray, ...]) -> dict[str, Any]:
    """Returns the arguments of `hopper_columns` that describe the kernels."""
    return {
        "kernels": tuple(map(_values, kernels)),
        "scales": tuple(map(_scales, kernels)),
        "blocks": tuple(map(_block, calls)),
        "result": calls[0].result,
    }


ROWS = Implementation(
    "hopper rows",
    "128-row tiles of x by tiles of the kernel on float8 tensor cores",
    _refuses_rows,
    _rows,
    _rows_slower,
    _quantizer,
    opaque=True,
)
WIDENED = Implementation(
    "hopper widened",
    "operands swapped, the kernel widened in registers, x shared by pairs of thread blocks",
    _refuses_widened,
    _widened,
    opaque=True,
)
COLUMNS = Implementation(
    "hopper columns",
    "operands swapped, the kernel's columns split among thread blocks",
    refuses_both,
    _columns,
    quantizer=_quantizer,
    opaque=True,
)
