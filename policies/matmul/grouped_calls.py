"""Grouped calls and implementations: the static description of products of groups of rows, and how to compute them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ..checks import Trial
from ..formats import Format
from ..scaled_array import ScaledArray
from ..targets import Target
from .calls import Call

Kernel = jax.Array | ScaledArray
"""The kernels of all groups, (groups, out, in)."""


@dataclasses.dataclass(frozen=True)
class GroupedCall:
    """Static description of the products of groups of rows with kernels of their groups.

    groups    number of groups, which is that of the kernels in each stack
    calls     for each stack the product of all rows with one of its kernels; its `rows` are those of all groups
    formats   format of each stack as it is passed, before the call widens or quantises it
    x         dtype of the activations before any quantisation
    compute   format of `grouped_matmuls`' argument `compute`
    target    target for which the program is traced
    backward  format of `grouped_matmuls`' argument `backward`
    """

    groups: int
    calls: tuple[Call, ...]
    formats: tuple[Format, ...]
    x: np.dtype
    compute: Format | None
    target: Target
    backward: Format | None = None


@dataclasses.dataclass(frozen=True)
class GroupedImplementation:
    """One way to compute grouped calls.

    name           its name in plans
    gist           its method in one line
    refuses        returns the reason why it does not accept a call, or None if it accepts the call
    run            returns the products (rows, out), in their result dtypes, of x (rows, in), whose rows are sorted by
                   group, with each stack of kernels; group_sizes (groups,) int32 are the rows of each group
    gradient_of_x  returns the gradient of x for frozen kernels, given that of each product; None: the loop's serves
    trial          returns the comparison with the reference that a kernel has to pass before its first use on a device;
                   None: it is not checked
    opaque         whether it is a kernel that XLA can neither see into nor divide over several devices
    exportable     whether `jax.export` accepts its kernel

    In a traced program the sizes may be any integers.  `run` takes a negative size as 0 and ends groups with the rows
    of x; the products of rows after the last group are zeros.
    """

    name: str
    gist: str
    refuses: Callable[[GroupedCall], str | None]
    run: Callable[[GroupedCall, jax.Array, Sequence[Kernel], jax.Array], tuple[jax.Array, ...]]
    gradient_of_x: Callable[..., jax.Array] | None = None
    trial: Callable[[GroupedCall], Trial] | None = None
    opaque: bool = False
    exportable: bool = True
