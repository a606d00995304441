"""The Hopper kernel for groups of rows as an implementation: which calls it accepts, and how it is called.

Rows need no padding between groups: tiles of rows are read where they are, and written to an array of tiles, from which
XLA gathers the rows of the result, in the operation that reads them where it can.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..checks import Trial
from ..targets import multiprocessors
from . import grouped_trials, hopper
from .calls import BY_XLA, Quantizer
from .dispatch import checked_quantizer
from .grouped_calls import GroupedCall, GroupedImplementation, Kernel
from .hopper_grouped_tiles import RowTiles, tile_height


def _refuses(call: GroupedCall) -> str | None:
    """Returns the reason why the kernel does not accept the call, or None."""
    for one, format in zip(call.calls, call.formats, strict=True):
        if one.mode != "plain" and not format.narrow:
            return "the kernels are not narrow, and all of them would be quantised"
        if why := hopper.refuses_both(one):
            return why
    return None if len({one.x for one in call.calls}) == 1 else "the kernels need different activations"


def _run(call: GroupedCall, x: jax.Array, kernels: Sequence[Kernel], group_sizes: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the products (rows, out) of x with each stack of kernels."""
    first = call.calls[0]
    quantizer, _ = checked_quantizer(hopper.COLUMNS.quantizer(first), first, call.target, call.x)
    return _products(quantizer, call, x, kernels, group_sizes)


def _products(
    quantizer: Quantizer, call: GroupedCall, x: jax.Array, kernels: Sequence[Kernel], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the products of one launch; `quantizer` quantises the activations of W8A8."""
    from . import hopper_grouped_kernel  # Pallas is imported only where a kernel is used

    rows, format = x.shape[0], call.calls[0].x
    tiles = RowTiles.of(rows, group_sizes)
    x_scales = None
    if format.narrow:
        quantised = quantizer.run(x, format)
        x = hopper.pad(quantised.values, tiles.height)
        missing = hopper_grouped_kernel.scales_of(x.shape[0], tiles.height) - rows
        x_scales = jnp.pad(quantised.scale_inv, ((0, missing), (0, 0))).T
    else:
        x = hopper.pad(x, tiles.height)
    y = hopper_grouped_kernel.products(
        x,
        x_scales,
        tiles,
        **hopper.kernel_arguments(call.calls, tuple(kernels)),
        processors=multiprocessors(),
    )
    results, start = [], 0
    for one in call.calls:
        columns = y.reshape(-1, y.shape[-1])[:, start : start + one.out_features]
        found = columns.at[tiles.places].get(mode="clip")
        results.append(jnp.where(tiles.inside[:, None], found, jnp.zeros_like(found)))
        start += one.out_features
    return tuple(results)


def _trial(call: GroupedCall) -> Trial:
    """Returns the comparison with the reference that the kernel has to pass for calls like `call`."""
    rows = call.calls[0].rows
    assert rows is not None
    products = functools.partial(_products, BY_XLA)  # a trial does not wait for another one
    return grouped_trials.of_products(GROUPED.name, products, call, tile_height(rows, call.groups))


GROUPED = GroupedImplementation(
    "hopper grouped",
    "operands swapped, tiles of rows with the kernel of their group, groups without rows not read",
    _refuses,
    _run,
    trial=_trial,
    opaque=True,
)
