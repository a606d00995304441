"""Trials of the kernels for groups of rows: small grouped calls that stand for all calls of a kind.

A kind is a kernel, the formats of the call and the number of rows in a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..checks import Trial
from ..scaled_array import ScaledArray, quantize_rows
from . import trials
from .calls import Call, Operands
from .grouped_calls import GroupedCall, Kernel

LAUNCHES = (((256, 384), (128, 384)), ((4096, 384),), ((128, 1664),))
"""The kernels of each launch in a trial: two in one launch; one with more tiles than a GPU has multiprocessors, so that
thread blocks have several; and one whose 13 steps are more than there are slots in shared memory."""

Products = Callable[[GroupedCall, jax.Array, Sequence[Kernel], jax.Array], tuple[jax.Array, ...]]


def of_products(name: str, products: Products, call: GroupedCall, height: int) -> Trial:
    """Returns the trial of the kernel `name` for grouped calls like `call`; bounds are those of `trials.of_product`.

    products  runs the kernel, and quantises activations without another one
    height    rows of a tile
    """
    first = call.calls[0]
    kernels = dict.fromkeys(str(one.kernel) for one in call.calls)
    kinds = [f"x {first.x}", f"kernel {' and '.join(kernels)}", f"result {dtypes.dtype_name(first.result)}"]
    kind = ", ".join([first.mode, *kinds, f"tiles of {height} rows"])
    return Trial(name, kind, functools.partial(_compare, products, call, height))


def sizes_of(height: int) -> tuple[int, ...]:
    """Returns the rows of 8 groups for which tiles have `height` rows.

    Three groups are empty, one or two have several tiles, and most begin at no multiple of 8 rows.

    >>> sizes_of(8), sizes_of(128)
    ((1, 0, 9, 2, 0, 3, 1, 0), (1, 0, 129, 2, 0, 63, 301, 0))
    """
    return 1, 0, height + 1, 2, 0, height // 2 - 1, 5 * height // 2 - 19, 0


def _compare(products: Products, call: GroupedCall, height: int) -> str | None:
    """Returns how the products of groups of rows in each launch differ from the oracle's."""
    sizes = sizes_of(height)
    kinds = list(dict.fromkeys(dataclasses.replace(one, out_features=0, beside=()) for one in call.calls))
    launches = [
        tuple(_small(kinds[i % len(kinds)], sum(sizes), shape) for i, shape in enumerate(shapes)) for shapes in LAUNCHES
    ]

    def compute(operands: list[tuple[jax.Array, tuple[ScaledArray, ...]]]) -> Any:
        results = []
        for calls, (x, kernels) in zip(launches, operands, strict=True):
            formats = tuple(kernel.format for kernel in kernels)
            one = dataclasses.replace(call, groups=len(sizes), calls=calls, formats=formats)
            found = products(one, x, kernels, jnp.asarray(sizes, jnp.int32))
            expected = [_expected(each, x, kernel, sizes) for each, kernel in zip(calls, kernels, strict=True)]
            results.append((found, expected))
        return results

    random = np.random.default_rng(0)
    operands = [
        (_activations(calls[0], random), tuple(_stack(one, len(sizes), random) for one in calls)) for calls in launches
    ]
    results = jax.device_get(jax.jit(compute)(operands))
    for calls, (found, expected) in zip(launches, results, strict=True):
        for one, y, (product, magnitude) in zip(calls, found, expected, strict=True):
            if why := trials.product_difference(one, y, product, magnitude):
                return why
    return None


def _small(call: Call, rows: int, shape: tuple[int, int]) -> Call:
    """Returns the call of a trial that stands for `call`, with the rows of all groups."""
    assert call.block is not None
    kernel = dataclasses.replace(call.kernel, block=(min(call.block[0], 128), min(call.block[1], 128)))
    return dataclasses.replace(call, rows=rows, out_features=shape[0], in_features=shape[1], kernel=kernel, beside=())


def _activations(call: Call, random: np.random.Generator) -> jax.Array:
    """Returns activations (rows, in) before any quantisation: normal, or some that are exact in e4m3.

    These are the integers from -4 to 4 of the other trials, times 64, with a 7 in each block of 128 columns, times a
    power of two for each row: their scales are powers of two, and sums of 128 products have 13 bits there, too.
    """
    shape = call.rows or 0, call.in_features
    if not call.x.narrow:
        return jnp.asarray(random.standard_normal(shape, np.float32).astype(call.x.values))
    integers = random.integers(-4, 5, shape)
    integers[:, ::128] = 7
    return jnp.asarray((integers * 64 * 2.0 ** np.resize((-6, 0, 2, 4), shape[0])[:, None]).astype(np.float32))


def _stack(call: Call, groups: int, random: np.random.Generator) -> ScaledArray:
    """Returns the kernels (groups, out, in) of a trial."""
    kernels = [trials.random_kernel(call, random) for _ in range(groups)]
    values, scales = (jnp.stack([getattr(one, name) for one in kernels]) for name in ("values", "scale_inv"))
    return ScaledArray(values, scales, kernels[0].format)


def _expected(call: Call, x: jax.Array, kernels: ScaledArray, sizes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the oracle's products of all rows in float32, and the products of magnitudes."""
    pairs, end = [], 0
    for group, size in enumerate(sizes):
        rows, end = x[end : end + size], end + size
        kernel = ScaledArray(kernels.values[group], kernels.scale_inv[group], kernels.format)
        if size:
            operands = Operands(quantize_rows(rows, call.x) if call.x.narrow else rows, kernel)
            pairs.append(trials.reference(dataclasses.replace(call, rows=size), operands))
    products, magnitudes = zip(*pairs, strict=True)
    return jnp.concatenate(products), jnp.concatenate(magnitudes)
