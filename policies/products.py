"""Products of Flax's own linear layers with kernels that a policy computes in a narrow format (W8A8).

Flax stores such kernels as (in, out); `scaled_matmul` reads (out, in).  The scales of a block belong to a rectangle of
weights, so that the transposed pair has the transposed scales and blocks, and no weight is quantised again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from .blocks import Block, block_sides, grid_shape
from .errors import UnsupportedCast
from .formats import Format
from .matmul import scaled_matmul
from .scaled_array import ScaledArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["compute", "path", "backward"])
@dataclasses.dataclass(frozen=True, eq=False)
class NarrowKernel:
    """A kernel that its layer multiplies in the narrow format `compute`; `scaled_dot_general` accepts it.

    array     the kernel as it is stored: (in, out), or (*in, *out) with several axes
    compute   the format of both operands of the product
    path      of the kernel, for errors
    backward  the format of the products that give gradients; None: not narrow

    It is no array, since its weight in a wide dtype is what the policy excludes: any other use is an error.
    """

    array: jax.Array | ScaledArray
    compute: Format
    path: str
    backward: Format | None = None

    def __getitem__(self, index: Any) -> NarrowKernel:
        """Returns the kernel for the index `...`, with which Flax's layers read a variable."""
        return self if index is ... else self.refuse()

    def refuse(self, *_: Any) -> NoReturn:
        """Raises UnsupportedCast for a use other than as the kernel of a linear layer."""
        raise UnsupportedCast(
            f"{self.path or 'kernel'}: the policy computes this {tuple(self.array.shape)} kernel in {self.compute}, so "
            "that only its linear layer can multiply with it, and it was read as an array. Write bf16 or null in "
            "compute, or use perparam.scaled_matmul."
        )

    __jax_array__ = __array__ = refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = __truediv__ = refuse
    T = property(refuse)
    astype = reshape = transpose = sum = dot = refuse

    def matrix(self, contracted: int) -> jax.Array | ScaledArray:
        """Returns the kernel as scaled_matmul reads it, (out, in): its first `contracted` axes are those of in."""
        shape = self.array.shape
        rows, columns = math.prod(shape[:contracted]), math.prod(shape[contracted:])
        if not isinstance(self.array, ScaledArray):
            return self.array.reshape(rows, columns).T
        values, scale_inv = self.array
        # The block of a matrix is not resolved to its shape, since kernels for a device ask for equal blocks.
        block = self.array.format.block if len(shape) == 2 else flat_block(self.array.block, shape, contracted)
        if block is None:
            raise UnsupportedCast(
                f"{self.path or 'kernel'}: the blocks {self.array.block} of a kernel of shape {shape} are not blocks "
                f"of its {rows}×{columns} matrix, so that it cannot be computed in {self.compute}. Choose a block "
                "whose sides divide the last two axes or cover them, such as (-1, -1), or write bf16 in compute."
            )
        format = dataclasses.replace(self.array.format, block=block[::-1])
        grid = grid_shape((rows, columns), block)
        proxy = None if self.array.proxy is None else self.array.proxy.reshape(rows, columns).T
        return ScaledArray(values.reshape(rows, columns).T, scale_inv.reshape(grid).T, format, proxy)


def flat_block(block: Block, shape: tuple[int, ...], contracted: int) -> Block | None:
    """Returns the block of the matrix to which an array is reshaped, or None if its blocks are not rectangles of it.

    block       the block of the array, over its last two axes
    contracted  the number of axes that become the rows of the matrix; the others become its columns

    >>> flat_block((128, 128), (4, 64, 300), 2), flat_block((128, 128), (300, 4, 64), 1)
    ((64, 128), (1, 256))
    >>> flat_block((48, 128), (4, 64, 300), 2) is None
    True
    """
    height, width = (min(side, dim) for side, dim in zip(block_sides(block, shape), shape[-2:], strict=True))
    if contracted == len(shape) - 1:  # the last axis is the columns, and all others are rows
        return (height, width) if contracted == 1 or shape[-2] % height == 0 else None
    outside = shape[contracted:-2]  # of the columns, the axes before the last two, which are columns as well
    if contracted > len(shape) - 2:
        return None
    whole = width == shape[-1] and (not outside or shape[-2] % height == 0)
    if whole:
        return 1, height * width
    return (1, width) if height == 1 and shape[-1] % width == 0 else None


def scaled_dot_general(
    x: jax.Array,
    kernel: Any,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """Returns `jax.lax.dot_general` of x and a kernel, for a `NarrowKernel` the `scaled_matmul` in its format.

    x                  f32, bf16 or f16; the result has its dtype, or `preferred_element_type`
    dimension_numbers  the kernel's contracted axes are its first ones, and there are no batch axes, for a NarrowKernel

    Raises:
      UnsupportedCast: for other dimension numbers, an `out_sharding`, and blocks that do not fit the product.
    """
    if not isinstance(kernel, NarrowKernel):
        return jax.lax.dot_general(
            x, kernel, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
        )
    (of_x, of_kernel), (batch, _) = dimension_numbers
    contracted = len(of_kernel)
    if batch or tuple(of_kernel) != tuple(range(contracted)) or out_sharding is not None:
        raise UnsupportedCast(
            f"{kernel.path or 'kernel'}: a product in {kernel.compute} has neither batch axes nor an out_sharding, "
            f"found {dimension_numbers} and {out_sharding}. Write bf16 in compute."
        )
    rows = jnp.moveaxis(x, of_x, range(-contracted, 0))
    rows = rows.reshape(*rows.shape[: rows.ndim - contracted], math.prod(rows.shape[rows.ndim - contracted :]))
    weight = kernel.matrix(contracted)
    result = None if preferred_element_type is None else np.dtype(preferred_element_type)
    y = scaled_matmul(rows, weight, compute=kernel.compute, result=result, backward=kernel.backward)
    return y.reshape(*y.shape[:-1], *kernel.array.shape[contracted:])


@dataclasses.dataclass(frozen=True)
class PromoteOthers:
    """A layer's `promote_dtype` for all arrays but a `NarrowKernel`, which has no dtype to promote.

    A value, so that equal layers stay equal.
    """

    promote: Callable[..., Any]

    def __call__(self, *arrays: Any, dtype: Any = None, **options: Any) -> Any:
        """Returns the arrays in their common dtype; they are arguments in Linen, and one tuple in NNX."""
        in_tuple = len(arrays) == 1 and isinstance(arrays[0], tuple)
        found: Sequence[Any] = arrays[0] if in_tuple else arrays
        others = tuple(None if isinstance(array, NarrowKernel) else array for array in found)
        promoted = self.promote(*((others,) if in_tuple else others), dtype=dtype, **options)
        return tuple(
            array if isinstance(array, NarrowKernel) else other for array, other in zip(found, promoted, strict=True)
        )
