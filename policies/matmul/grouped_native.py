"""Products of groups of rows on a CPU by the native library, which reads the kernels of groups with rows, in place.

Each panel of a kernel is decoded once for the rows of its group, up to 512 at a time.  The products of a group have the
bits of its `scaled_matmul`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..scaled_array import quantize_rows
from . import native
from .calls import Operands
from .grouped_calls import GroupedCall, GroupedImplementation, Kernel


def refuses(call: GroupedCall) -> str | None:
    """Returns the reason why it does not accept a call, or None."""
    for one, format in zip(call.calls, call.formats, strict=True):
        if why := native.refuses(one):
            return why
        if not format.narrow and (one.kernel.narrow or format.block is not None):
            return "it neither quantises kernels nor scales those that are not narrow"
    return None


def products(
    call: GroupedCall, x: jax.Array, kernels: Sequence[Kernel], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the products (rows, out) of each group's rows with its kernel of each stack."""
    formats = dict.fromkeys(one.x for one in call.calls)
    rows: dict[object, Kernel] = {format: quantize_rows(x, format) if format.narrow else x for format in formats}
    operands = tuple(Operands(rows[one.x], kernel) for one, kernel in zip(call.calls, kernels, strict=True))
    return native.products(call.calls, operands, group_sizes)


def gradient_of_x(
    call: GroupedCall,
    x: jax.Array,
    kernels: Sequence[Kernel],
    group_sizes: jax.Array,
    gradients: Sequence[jax.Array],
) -> jax.Array:
    """Returns the gradient of x (rows, in), in its dtype: the sum over stacks of gradient (rows, out) @ weight."""
    dx = jnp.zeros(x.shape, jnp.float32)
    for one, kernel, gradient in zip(call.calls, kernels, gradients, strict=True):
        dx = dx + native.gradient_of_x(one, gradient.astype(x.dtype), Operands(x, kernel), group_sizes)
    return dx.astype(x.dtype)


NATIVE = GroupedImplementation(
    "native", "decodes the kernels of groups with rows in registers, in place", refuses, products,
    gradient_of_x=gradient_of_x, opaque=True, exportable=False,
)  # fmt: skip
