"""Calls: the static description of one matmul, its operands, and the implementations that can carry it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from .. import dtypes
from ..blocks import Block
from ..formats import Format, ScaledArray, quantize_rows


@dataclasses.dataclass(frozen=True)
class Call:
    """The static description of one product of activations with one kernel.

    rows          all leading axes of x together; None: any number, in a program exported for symbolic shapes
    out_features  rows of the kernel
    in_features   columns of the kernel
    x             format in which activations meet the kernel: f32, bf16, f16, or a float8 type with scales a row
    kernel        format of the kernel, its block in numbers
    weight        dtype to which the weight is rounded before the product; None: a narrow kernel, scaled inside it
    result        dtype of the result; sums are float32
    """

    rows: int | None
    out_features: int
    in_features: int
    x: Format
    kernel: Format
    weight: np.dtype | None
    result: np.dtype

    @property
    def block(self) -> Block | None:
        """The block of the kernel's scales; None: a plain kernel."""
        return self.kernel.block

    @property
    def mode(self) -> str:
        """W8A8: both operands narrow; W8A16: the kernel alone; plain: neither, or a weight widened first."""
        if self.weight is not None:
            return "plain"
        return "W8A8" if dtypes.is_narrow(self.x.values) else "W8A16"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a call.

    x       (rows, in)  an array, or a ScaledArray where the activations are narrow
    kernel  (out, in)   likewise
    """

    x: jax.Array | ScaledArray
    kernel: jax.Array | ScaledArray


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to carry out calls.

    name      what plans and errors call it
    gist      how it does it, in a line
    refuses   why it cannot take a call, or would be slower than the next; None where it takes it
    run       the products (rows, out) of calls that share x, in their result dtype
    quantize  activations (rows, in) in a narrow format, for calls that want both narrow
    opaque    whether XLA sees nothing of it but operands and results
    """

    name: str
    gist: str
    refuses: Callable[[Call], str | None]
    run: Callable[[tuple[Call, ...], tuple[Operands, ...]], tuple[jax.Array, ...]]
    quantize: Callable[[jax.Array, Format], ScaledArray] = quantize_rows
    opaque: bool = False


def one_by_one(
    product: Callable[[Call, Operands], jax.Array],
) -> Callable[[tuple[Call, ...], tuple[Operands, ...]], tuple[jax.Array, ...]]:
    """The `run` of an implementation that has nothing to gain from calls that share x."""
    return lambda calls, operands: tuple(map(product, calls, operands))
