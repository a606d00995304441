"""The arrays of a head, slices of its outputs, and how both are divided over a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ..policies import dtypes
from ..policies.formats import Format, stored_format
from ..policies.matmul.sharded import Names, Part, Split, needs_more, product_plan
from ..policies.scaled_array import ScaledArray

Kernel = jax.Array | ScaledArray
Arrays = dict[str, dict[str, jax.Array]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "others", "whole"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Head:
    """The arrays of a head, or of a slice of its outputs.

    kernel  (vocabulary, features)         any float, or a ScaledArray, which may have a proxy
    others  {name: (vocabulary, ...)}      arrays of which a slice needs its own rows, such as a bias
    whole   {name: array}                  arrays that every slice needs
    """

    kernel: Kernel
    others: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    whole: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def divided(self) -> tuple[Arrays, Kernel | None]:
        """Returns the arrays that can have gradients, by "rows" and "whole", and the narrow kernel, which cannot."""
        kernel, rows = self.kernel, dict(self.others)
        if isinstance(kernel, ScaledArray):
            if kernel.proxy is not None:
                rows["proxy"] = kernel.proxy
            return {"rows": rows, "whole": self.whole}, kernel.frozen()
        if dtypes.is_narrow(kernel.dtype):
            return {"rows": rows, "whole": self.whole}, kernel
        return {"rows": {**rows, "kernel": kernel}, "whole": self.whole}, None

    @classmethod
    def combined(cls, arrays: Arrays, stored: Kernel | None) -> Head:
        """Returns the head of what `divided` returned."""
        others = dict(arrays["rows"])
        kernel: Any = others.pop("kernel", stored)
        proxy = others.pop("proxy", None)
        return cls(kernel if proxy is None else dataclasses.replace(kernel, proxy=proxy), others, arrays["whole"])


Logits = Callable[[jax.Array, Head], jax.Array]
"""A function of x (n, features) and a slice of a head that returns logits (n, size). It closes over no arrays."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a head and its tokens are divided over a mesh.

    split    of the kernel
    batch    mesh axes of the first axis of the hidden states
    rows     of the kernel, on one device: they stay divided
    columns  of the kernel: a device gathers those of a slice
    """

    split: Split
    batch: Names
    rows: Part
    columns: Part

    @property
    def names(self) -> Names:
        """The mesh axes over which the tokens or the outputs are divided."""
        return (*self.batch, *self.rows.kept)


def layout_of(
    dtype: np.dtype, kernel: Kernel, split: Split | None, batch_size: int, compute: Format | None
) -> Layout | None:
    """The layout of a head beside hidden states of this dtype and batch size; None where XLA has to divide it.

    So it has where a device would have some columns of the kernel, as where the batch cannot be divided over the axes
    of FSDP, or where rows are divided over axes of the batch, or within blocks that the product needs whole.
    """
    if split is None:
        return None
    batch = split.batch_of(batch_size)
    plan = product_plan(dtype, kernel, split, batch, compute)
    rows, columns = plan.parts
    if plan.rounding or rows.gathered or columns.kept or needs_more(plan.parts, split):
        return None
    if isinstance(kernel, ScaledArray) and kernel.shape[0] // rows.count % kernel.block[0]:
        # A device's part has smaller blocks, for which a Linear cannot know other activations than the default ones.
        format = kernel.format
        other = stored_format(format.values, (1, 1), kernel.scale_inv.dtype)
        if format.of_rows(format.values) != other.of_rows(format.values):
            return None
    return Layout(split, batch, rows, columns)


def rows(kernel: Any, start: ArrayLike, size: int) -> Any:
    """Rows from `start` on of an array (out, ...); those of a narrow kernel begin where a block does."""
    if not isinstance(kernel, ScaledArray):
        return _rows(kernel, start, size)
    values = _rows(kernel.values, start, size)
    if kernel.scale_inv.shape[0] == 1:  # one block for all rows
        return dataclasses.replace(kernel, values=values)
    down = kernel.block[0]
    return ScaledArray(values, _rows(kernel.scale_inv, jnp.asarray(start) // down, -(-size // down)), kernel.format)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _rows(array: jax.Array, start: ArrayLike, size: int) -> jax.Array:
    """Rows of an array, sliced as bits, behind an optimization barrier.

    XLA's CPU backend would widen a whole array of 16 or 8 bits before the loop, and keep the wide copy in memory.
    """
    array, start = jax.lax.optimization_barrier((array, start))
    bits: Any = jax.lax.optimization_barrier(jax.lax.dynamic_slice_in_dim(_bits(array), start, size))
    return _of_bits(bits, array.dtype)


@_rows.defjvp
def _rows_jvp(size: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    array, start = primals
    return _rows(array, start, size), jax.lax.dynamic_slice_in_dim(tangents[0], start, size)


@jax.custom_jvp
def with_rows(array: jax.Array, part: jax.Array, start: ArrayLike) -> jax.Array:
    """The array with the rows `part` from `start` on, written as bits.

    XLA's CPU backend would convert a whole array of 16 bits for it, to float32 and back.
    """
    bits: Any = jax.lax.dynamic_update_slice_in_dim(_bits(array), _bits(part), start, 0)
    return _of_bits(bits, array.dtype)


@with_rows.defjvp
def _with_rows_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    start = primals[2]
    return with_rows(*primals), jax.lax.dynamic_update_slice_in_dim(tangents[0], tangents[1], start, 0)


def _bits(array: jax.Array) -> jax.Array:
    if array.dtype.itemsize > 2:
        return array
    bits: Any = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return bits


def _of_bits(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
