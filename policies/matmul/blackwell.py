"""cuDNN's block-scaled product for Blackwell, in which the tensor cores apply the scales of mxfp8 operands.

XLA replaces `jax.nn.scaled_matmul` with a call of cuDNN if the GPU (compute capability 10.x or 12.x) and cuDNN have the
instruction, else with a product of dequantised operands.  It pads rows and kernels to multiples of 128, and swizzles
the scales of both in each call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import count
from ..formats import FORMATS, Format
from ..scaled_array import ScaledArray
from .calls import Call, Implementation, Operands, one_by_one
from .shards import vary
from .xla import FEW_ROWS

SIDE = 128
"""Both dimensions of a kernel must be multiples of this, since XLA would pad it in a copy."""


def _refuses(call: Call) -> str | None:
    if call.mode == "plain":
        return "no operand is narrow in the product"
    if not _is_mxfp8(call.kernel):
        return f"the kernel is {call.kernel}, not mxfp8"
    if call.mode == "W8A16":
        return "only the kernel is narrow, and mxfp8 is multiplied with mxfp8"
    if not _is_mxfp8(call.x):
        return f"activations are quantised as {call.x}, not as mxfp8"
    if call.out_features % SIDE or call.in_features % SIDE or not call.in_features or not call.out_features:
        return f"{call.out_features}×{call.in_features} is no multiple of {SIDE}×{SIDE}"
    if call.rows is None:
        return "the number of rows is not known"
    if call.rows <= FEW_ROWS:
        return f"its tiles of {SIDE} rows would be mostly empty with {count(call.rows, 'row')}"
    return None


def _is_mxfp8(format: Format) -> bool:
    """Returns whether arrays in this format are those of mxfp8, whatever the rule of their scales was."""
    mxfp8 = FORMATS["mxfp8"]
    return (format.values, format.block, format.scale) == (mxfp8.values, mxfp8.block, mxfp8.scale)


def _product(call: Call, operands: Operands) -> jax.Array:
    """Returns the product (rows, out) of operands whose scales are powers of two for every 32 columns."""
    x, kernel = operands.x, operands.kernel
    assert isinstance(x, ScaledArray)
    assert isinstance(kernel, ScaledArray)
    arrays = x.values, kernel.values, x.scale_inv, kernel.scale_inv
    lhs, rhs, lhs_scales, rhs_scales = (array[None] for array in arrays)  # a batch of one
    # Without cuDNN's instruction XLA dequantises in the dtype of the result, and float16 has no range for the scales.
    result = np.dtype(jnp.float32) if call.result == np.float16 else call.result
    y = jax.nn.scaled_matmul(lhs, rhs, lhs_scales, rhs_scales, preferred_element_type=result)[0]
    product: jax.Array = vary(y, arrays).astype(call.result)
    return product


BLOCK_SCALED = Implementation(
    "cudnn block scaled", "cuDNN's product, with the scales applied by the tensor cores", _refuses,
    one_by_one(_product), opaque=True, exportable=False,
)  # fmt: skip
