"""Calls and implementations: the static description of one matmul, its operands, and a way to compute it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from .. import dtypes
from ..blocks import Block
from ..formats import Format
from ..scaled_array import ScaledArray, quantize_rows


@dataclasses.dataclass(frozen=True)
class Call:
    """Static description of one product of activations with one kernel.

    rows          product of the leading axes of x; None for a symbolic number, in an exported program
    out_features  rows of the kernel
    in_features   columns of the kernel
    x             format of the activations in the product: f32, bf16, f16, or a float8 type with scales per row
    kernel        format of the kernel, its block without -1
    weight        dtype to which the weight is rounded before the product; None: a narrow kernel, scaled in the product
    result        dtype of the result; sums are float32
    beside        out_features of other kernels with which the same x is multiplied, perhaps in the same launch
    """

    rows: int | None
    out_features: int
    in_features: int
    x: Format
    kernel: Format
    weight: np.dtype | None
    result: np.dtype
    beside: tuple[int, ...] = ()

    @property
    def block(self) -> Block | None:
        """The block of the kernel's scales; None for a kernel without scales."""
        return self.kernel.block

    @property
    def mode(self) -> str:
        """W8A8: both operands are narrow; W8A16: only the kernel; plain: neither, or a kernel that is widened first."""
        if self.weight is not None:
            return "plain"
        return "W8A8" if dtypes.is_narrow(self.x.values) else "W8A16"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a call.

    x       (rows, in)  an array, or a ScaledArray for narrow activations
    kernel  (out, in)   an array, or a ScaledArray for a narrow kernel
    """

    x: jax.Array | ScaledArray
    kernel: jax.Array | ScaledArray


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """One way to quantise activations.

    name    its name in plans
    run     returns activations (rows, in) in a narrow format
    opaque  whether it is a kernel that XLA cannot see into, which is checked before its first use on a device
    """

    name: str
    run: Callable[[jax.Array, Format], ScaledArray]
    opaque: bool = False


BY_XLA = Quantizer("quantize_rows", quantize_rows)


def by_xla(call: Call) -> Quantizer:
    """Returns the function that XLA compiles, for any call."""
    return BY_XLA


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute calls.

    name        its name in plans and errors
    gist        its method in one line
    refuses     returns the reason why it does not accept a call: it cannot compute it, or would be slower than the next
                implementation; None if it accepts the call
    run         returns the products (rows, out), in their result dtypes, of calls that share x
    slower      returns the reason why the next implementation that accepts the call is preferred, or None; for calls
                that this one accepts, too; it does not matter to `matmul_override`
    quantizer   returns what quantises the activations of a W8A8 call
    opaque      whether it is a kernel that XLA can neither see into nor divide over several devices
    checked     whether an opaque kernel is compared with the oracle before its first use on a device
    exportable  whether `jax.export` accepts its kernel
    """

    name: str
    gist: str
    refuses: Callable[[Call], str | None]
    run: Callable[[tuple[Call, ...], tuple[Operands, ...]], tuple[jax.Array, ...]]
    slower: Callable[[Call], str | None] = lambda call: None
    quantizer: Callable[[Call], Quantizer] = by_xla
    opaque: bool = False
    checked: bool = True
    exportable: bool = True

    @property
    def needs_check(self) -> bool:
        """Whether it is compared with the oracle before its first use on a device."""
        return self.opaque and self.checked


def one_by_one(
    product: Callable[[Call, Operands], jax.Array],
) -> Callable[[tuple[Call, ...], tuple[Operands, ...]], tuple[jax.Array, ...]]:
    """Returns a function for `Implementation.run` that computes each call on its own."""
    return lambda calls, operands: tuple(map(product, calls, operands))
