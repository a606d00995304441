"""Trials of the kernels: small calls that stand for all calls of a kind, their operands and the bound of the error.

A kind is a kernel, the formats of the call and a class of its number of rows: 1 to 8, 9 to 16, up to 32, 64 and 128,
and more, for which the kernels have tiles of different sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..blocks import grid_shape
from ..checks import Trial
from ..formats import Format
from ..scaled_array import ScaledArray, quantize_rows
from . import oracle
from .calls import Call, Implementation, Operands, Quantizer

MANY_ROWS = 600
"""Rows that stand for all numbers above 128: 5 tiles of 128 rows, the last not full and without a partner in its
cluster, and with the last kernel below more tiles than a GPU has multiprocessors."""

LAUNCHES = (((256, 1792),), ((1280, 1792),), ((256, 1664), (4096, 1664)))
"""The kernels of each launch in a trial.  On GPUs with 78 to 132 multiprocessors, `hopper columns` splits the columns
of the first among 14 thread blocks of one step each, and with `MANY_ROWS` among 7 of 2 steps; those of the second, with
up to 128 rows, among 7 of 2 steps.  It multiplies with the last two in one launch, without splitting them: their 13
steps are more than there are slots in shared memory."""

QUANTISED = (200, 512)
"""Rows and columns of the activations that are quantised in a trial; the last tile of 64 rows is not full."""

SUM = 2.0**-22
"""The error of each addition of float32 numbers relative to the sum of magnitudes: 2**-24 in the oracle, which rounds,
and up to 2**-23 in the kernel, since tensor cores truncate."""

ROUNDINGS = 4
"""Multiplications by scales in a product, which round once each in the oracle and in the kernel."""

UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Half the distance of 1 from its neighbour, for each dtype of results."""


def of_product(implementation: Implementation, call: Call) -> Trial:
    """Returns the trial of an implementation's kernel for calls like `call`.

    The bound of each element is `(in + ROUNDINGS) * SUM * (|x| @ |weight|.T) + u * |x @ weight.T|`, where u is the unit
    roundoff of the result's dtype.  It holds for float8 tensor cores too, although their sums have about 14 bits: the
    values are small integers times a power of two for each row, so that sums of 128 products have 13 bits.
    """
    launches = tuple(tuple(_small(call, shape) for shape in shapes) for shapes in LAUNCHES)
    first = launches[0][0]
    kinds = [f"x {first.x}", f"kernel {first.kernel}", f"result {dtypes.dtype_name(first.result)}"]
    kind = ", ".join([call.mode, *kinds, f"{first.rows} rows"])
    return Trial(implementation.name, kind, functools.partial(_compare_products, implementation, launches))


def of_quantisation(quantizer: Quantizer, format: Format, x: np.dtype) -> Trial:
    """Returns the trial of a kernel that quantises activations of dtype `x` to `format`.

    Bounds: for a scale 2**-22 relative to that of `quantize_rows`, since one of them may be an ulp off; for a value the
    error of rounding to e4m3 with this scale, `max(|x| * 2**-4, scale * 2**-10)`, with a margin of 2**-20
    for inexact quotients.
    """
    kind = f"x {dtypes.dtype_name(x)} as {format}"
    return Trial(quantizer.name, kind, functools.partial(_compare_rows, quantizer, format, x))


def _small(call: Call, shape: tuple[int, int]) -> Call:
    """Returns the call of a trial that stands for `call`."""
    assert call.rows is not None
    assert call.block is not None
    # Three rows less than a full tile, so that what the kernel adds to the operands or cuts off is part of the trial.
    rows = MANY_ROWS if call.rows > 128 else max(8, 2 ** (call.rows - 1).bit_length()) - 3
    block = min(call.block[0], 128), min(call.block[1], 128)
    kernel = dataclasses.replace(call.kernel, block=block)
    return dataclasses.replace(call, rows=rows, out_features=shape[0], in_features=shape[1], kernel=kernel, beside=())


def _compare_products(implementation: Implementation, launches: tuple[tuple[Call, ...], ...]) -> str | None:
    """Returns how the products of the calls in each launch differ from the oracle's."""

    def compute(launches_operands: list[tuple[Operands, ...]]) -> Any:
        pairs = list(zip(launches, launches_operands, strict=True))
        expected = [[reference(*one) for one in zip(calls, operands, strict=True)] for calls, operands in pairs]
        return [implementation.run(calls, operands) for calls, operands in pairs], expected

    random = np.random.default_rng(0)
    arrays = []
    for calls in launches:
        x = _activations(calls[0], random)
        arrays.append(tuple(Operands(x, random_kernel(call, random)) for call in calls))
    results, expected = jax.device_get(jax.jit(compute)(arrays))
    for each in zip(launches, results, expected, strict=True):
        for call, y, (product, magnitude) in zip(*each, strict=True):
            if why := product_difference(call, y, product, magnitude):
                return why
    return None


def product_difference(call: Call, y: np.ndarray, product: np.ndarray, magnitude: np.ndarray) -> str | None:
    """Returns how a product differs from the `reference` by more than the bound of `of_product`, or None."""
    least = float(jnp.finfo(call.result).smallest_subnormal)
    bound = (call.in_features + ROUNDINGS) * SUM * magnitude + UNIT_ROUNDOFF[call.result.name] * np.abs(product)
    return difference("the product", y, product, bound + least)


def reference(call: Call, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns the oracle's product in float32, and the product of magnitudes."""
    x, weight = oracle.wide_rows(operands.x), oracle.wide_weight(operands.kernel, np.dtype(np.float32))
    magnitude = oracle.dot(jnp.abs(x.astype(jnp.float32)), jnp.abs(weight))
    return oracle.product(dataclasses.replace(call, result=np.dtype(np.float32)), operands), magnitude


def _activations(call: Call, random: np.random.Generator) -> jax.Array | ScaledArray:
    """Returns activations (rows, in): normal, or for W8A8 integers from -4 to 4 times a power of two for each row."""
    shape = (call.rows or 0, call.in_features)
    if not call.x.narrow:
        return jnp.asarray(random.standard_normal(shape, np.float32).astype(call.x.values))
    return _scaled(random.integers(-4, 5, shape) * _powers(shape[0], -6, 0, 2, 4), call.x, random)


def random_kernel(call: Call, random: np.random.Generator) -> ScaledArray:
    """Returns a kernel (out, in): for W8A8 integers from -15 to 15 times a power of two for each row.

    Otherwise every finite code of the dtype occurs, each row having those of a quarter of the exponents: so the bound
    of a row with subnormal numbers is as small as they are.
    """
    shape = call.out_features, call.in_features
    if call.mode == "W8A8":
        return _scaled(random.integers(-15, 16, shape) * _powers(shape[0], -9, -4, 0, 4), call.kernel, random, 2.0**-8)
    largest = np.asarray(dtypes.largest(call.kernel.values)).astype(call.kernel.values).view(np.uint8)
    quarter = 32 * (np.arange(shape[0], dtype=np.uint8) % 4)[:, None]
    codes = np.minimum(quarter + random.integers(0, 32, shape, np.uint8), largest)
    codes |= random.integers(0, 2, shape, np.uint8) << 7
    return _scaled(codes.view(call.kernel.values), call.kernel, random, 2.0**-8)


def _powers(rows: int, *exponents: int) -> np.ndarray:
    """Returns a column (rows, 1) of powers of two, the exponents in turn."""
    return 2.0 ** np.resize(exponents, rows)[:, None]


def _scaled(values: np.ndarray, format: Format, random: np.random.Generator, size: float = 1.0) -> ScaledArray:
    """Returns values with scales of about `size`: between half and twice that, powers of two in narrow scale dtypes."""
    assert format.block is not None
    assert format.scale is not None
    exponents = random.uniform(-1, 1, grid_shape(values.shape, format.block))
    scales = size * 2.0 ** (exponents if dtypes.is_activation(format.scale) else np.rint(exponents))
    return ScaledArray(jnp.asarray(values.astype(format.values)), jnp.asarray(scales.astype(format.scale)), format)


def _compare_rows(quantizer: Quantizer, format: Format, x: np.dtype) -> str | None:
    """Returns how the activations that the kernel quantises differ from what the definition allows."""
    random = np.random.default_rng(1)
    rows = random.standard_normal(QUANTISED) * _powers(QUANTISED[0], -9, 0, 4, 7)
    rows[3, :128] = 0  # a block of zeros has the scale 1
    array = rows.astype(x)
    both = jax.jit(lambda array: (quantizer.run(array, format), quantize_rows(array, format).scale_inv))
    found, scales = jax.device_get(both(jnp.asarray(array)))
    want = scales.astype(np.float64)
    if why := difference("the scale", found.scale_inv, want, want * 2.0**-22):
        return why
    wide, by_column = array.astype(np.float64), np.repeat(found.scale_inv.astype(np.float64), _side(format), axis=1)
    values = found.values.astype(np.float64) * by_column
    bound = np.maximum(np.abs(wide) * 2.0**-4, by_column * 2.0**-10) * (1 + 2.0**-20)
    return difference("the quantised value", values, wide, bound)


def _side(format: Format) -> int:
    """Returns the number of columns of a row that share a scale."""
    assert format.block is not None
    return QUANTISED[1] if format.block[1] == -1 else format.block[1]


def difference(what: str, found: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> str | None:
    """Returns where and by how much `found` differs from `expected` by more than `bound`, or None."""
    if found.shape != expected.shape:
        return f"the shape of {what} is {found.shape} instead of {expected.shape}"
    error = np.abs(found.astype(np.float64) - expected)
    wrong = ~(error <= bound)  # NaN is wrong
    if not wrong.any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # a bound may be 0
        excess = np.where(np.isnan(error), np.inf, error / bound)
    worst = np.unravel_index(np.argmax(np.where(wrong, excess, 0)), error.shape)
    place = tuple(int(index) for index in worst)
    return (
        f"{what} is {float(found[worst]):.6g} instead of {expected[worst]:.6g} ± {bound[worst]:.2g} at {place}, and "
        f"{int(wrong.sum())} of {wrong.size} elements differ by more than the bound"
    )
