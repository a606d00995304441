"""What a matmul is to those who carry it out: its shapes and dtypes, known when it is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from .. import dtypes
from ..slots import Block
from .activations import quantize_rows


@dataclasses.dataclass(frozen=True)
class Call:
    """One product of `rows` of activations with one kernel.

    rows          all leading axes of x together; None: any number, in a program exported for symbolic shapes
    out_features  rows of the kernel
    in_features   columns of the kernel
    x             dtype in which activations meet the kernel: f32, bf16, f16, or a float8 type with a scale a row and
                  128 columns
    kernel        dtype of the kernel as stored
    block         over which one of its scales holds; None: a plain kernel, without scales
    weight        dtype to which the weight is rounded before the product; None: a narrow kernel, scaled inside it
    result        dtype of the result; sums are float32
    """

    rows: int | None
    out_features: int
    in_features: int
    x: np.dtype
    kernel: np.dtype
    block: Block | None
    weight: np.dtype | None
    result: np.dtype

    @property
    def mode(self) -> str:
        """W8A8: both operands narrow; W8A16: the kernel alone; plain: neither, or a weight widened first."""
        if self.weight is not None:
            return "plain"
        return "W8A8" if dtypes.is_narrow(self.x) else "W8A16"


@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a call.

    x          (rows, in)
    x_scales   (rows, ceil(in/128)) float32 where x is narrow, else None
    kernel     (out, in)
    scale_inv  (ceil(out/block[0]), ceil(in/block[1])), None for a plain kernel
    """

    x: jax.Array
    x_scales: jax.Array | None
    kernel: jax.Array
    scale_inv: jax.Array | None


jax.tree_util.register_dataclass(Operands)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to carry out calls.

    name      what plans and errors call it
    gist      how it does it, in a line
    refuses   why it cannot take a call, or would be slower than the next; None where it takes it
    run       the products (rows, out) of calls that share x, in their result dtype
    quantize  activations (rows, in) to values and their scales (rows, ceil(in/128)), for calls that want both narrow
    opaque    whether XLA sees nothing of it but operands and results
    """

    name: str
    gist: str
    refuses: Callable[[Call], str | None]
    run: Callable[[tuple[Call, ...], tuple[Operands, ...]], tuple[jax.Array, ...]]
    quantize: Callable[[jax.Array, np.dtype], tuple[jax.Array, jax.Array]] = quantize_rows
    opaque: bool = False


def one_by_one(
    product: Callable[[Call, Operands], jax.Array],
) -> Callable[[tuple[Call, ...], tuple[Operands, ...]], tuple[jax.Array, ...]]:
    """The `run` of an implementation that has nothing to gain from calls that share x."""
    return lambda calls, operands: tuple(map(product, calls, operands))
