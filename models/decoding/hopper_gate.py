"""Hopper kernel for silu(gate) * up of few rows, from the sums of both products to the operand of the next one."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...policies.matmul.hopper_quantize import COLUMNS
from ...policies.matmul.shards import vary
from . import tiles
from .reference import Operand

TOGETHER = 8
"""Parts of the sums that are read at once, of either product: all there are, but for very narrow products."""


def gate(sums: jax.Array, *, dtype: np.dtype, narrow: bool, interpret: Any = None) -> Operand:
    """silu(gate) * up as the operand of `down_proj`, in `dtype` or quantised: `reference.gate` in one launch.

    sums  (parts, rows, 2 * intermediate)  float32, or one part in `dtype`; rows a multiple of 4, intermediate of 128

    A thread block has 128 columns of four rows.  Parts are added in their order.  The logistic function is that of
    Mosaic, with approximate exponential function and reciprocal, an ulp or two of float32 off each; quotients of the
    quantisation are those of `hopper_quantize`.
    """
    rows, intermediate = sums.shape[1], sums.shape[2] // 2
    blocks = intermediate // COLUMNS

    def body(sums_gmem: Any, *operand_gmem: Any) -> None:
        block, row = lax.axis_index("column_block"), lax.axis_index("row_tile") * tiles.WARPS
        place = tiles.tall_place(row, block)
        terms = [tiles.terms(sums_gmem, tiles.tall_place(row, first + block), TOGETHER) for first in (0, blocks)]
        tiles.pad_scales(operand_gmem, place)
        gate, up = (tiles.product(each, dtype) for each in terms)
        silu = tiles.rounded(gate * jax.nn.sigmoid(gate), dtype)
        tiles.store_operand(operand_gmem, [place], [tiles.rounded(silu * up, dtype)])

    settings = {} if interpret is None else {"interpret": interpret}
    run = plgpu.kernel(
        body,
        out_type=tuple(tiles.operand_types(rows, intermediate, dtype, narrow=narrow)),
        grid=(blocks, rows // tiles.WARPS),
        grid_names=("column_block", "row_tile"),
        compiler_params=tiles.PARAMETERS,
        **settings,
    )
    values, *scales = vary(run(tiles.blocked(sums)), sums)
    return values.reshape(rows, intermediate), scales[0] if scales else None
