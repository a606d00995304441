"""Products by the native library for tests: operands in numpy, and the bound of each element's error."""

import dataclasses

import numpy as np
import pytest
from helpers import dtype, largest, spread
from matmuls import ROUNDING, Case

import perparam
from perparam.policies.matmul import matmul_override, quantize_rows, scaled_matmul
from perparam.policies.native import library
from perparam.policies.scaled_array import ScaledArray

required = pytest.mark.skipif(library.unavailable() is not None, reason=f"native kernels: {library.unavailable()}")
"""The mark of tests of the native library, which is missing where no compiler was, or where PERPARAM_CPU is off."""

NARROW = (
    *("float8_e4m3fn", "float8_e5m2", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    "int8",
)
ACTIVATIONS = ("bfloat16", "float16", "float32")

ROUNDING_OF_SUMS = 2.0**-23 if library.instructions() == "neonbf16" else ROUNDING["float32"]
"""The error of each addition relative to its result: BFDOT of Arm rounds to odd, off by up to twice as much."""

TINY = 2.0**-126
"""What is smaller than the smallest normal float32 may be taken or returned as zero: VDPBF16PS does so, and XLA tells
the processor to do so in all other instructions."""

ROUNDINGS = 6
"""Roundings of a product beside those of sums: of the product itself, where an instruction set has no FMA, of the
product of both scales, of that with the sum, and of the weight's with its scale.  Sums round once for each column in a
run and once for each run, together at most once for each column and once more."""

SMALLEST_STEP = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}
"""The distance of the subnormal numbers of each dtype of results."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """What a product multiplies, in float64: values and their scales, all of one shape (rows, in) or (out, in)."""

    x: np.ndarray
    x_scales: np.ndarray
    weight: np.ndarray
    scales: np.ndarray

    @property
    def product(self) -> np.ndarray:
        return (self.x * self.x_scales) @ (self.weight * self.scales).T

    @property
    def magnitude(self) -> np.ndarray:
        return np.abs(self.x * self.x_scales) @ np.abs(self.weight * self.scales).T

    def bound(self, result: str) -> np.ndarray:
        """The largest error of each element of a result, which is rounded to the dtype `result`."""
        columns = self.x.shape[1]
        sums = (columns + ROUNDINGS) * ROUNDING_OF_SUMS * self.magnitude
        # A subnormal factor, twice where the weight is rounded; the product; the sum after it; then each run's total.
        x, weight = np.abs(self.x) + 1, 2 * np.abs(self.weight) + 1
        flushed = TINY * ((self.x_scales * x) @ self.scales.T + self.x_scales @ (self.scales * weight).T + columns + 1)
        rounded = ROUNDING[result] * np.abs(self.product) + SMALLEST_STEP[result] / 2
        return (sums + flushed + rounded) * (1 + 2.0**-7)


def saturated(values: np.ndarray, to: str) -> np.ndarray:
    """Values of float32 in another dtype of activations, clipped to its range and rounded to nearest, ties to even."""
    bound = np.float32(largest(dtype(to)))
    return np.where(np.isfinite(values), np.clip(values, -bound, bound), values).astype(dtype(to))


def drawn(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """`(x, kernel, scale_inv)`: x and scales as `Case` draws them, and of narrow dtypes every finite code alike."""
    x, kernel, scale_inv = case.operands(seed)
    if case.is_narrow:
        codes = np.random.default_rng(seed + 1).integers(0, 256, case.shape, np.uint8).view(kernel.dtype)
        kernel = np.where(np.isfinite(codes.astype(np.float32)), codes, np.zeros((), kernel.dtype))
        # Of a size that keeps float16 results finite.
        scale_inv = (scale_inv * 64 / largest(kernel.dtype)).astype(np.float32)
    return x, kernel, scale_inv


def factors(case: Case, x: np.ndarray, kernel: np.ndarray, scale_inv: np.ndarray | None) -> Factors:
    """The definition of what `scaled_matmul` multiplies, in numpy but for the quantisation of activations."""
    compute = case.compute
    if compute is not None and compute not in ACTIVATIONS:
        if scale_inv is None:
            array = perparam.quantize(kernel, compute, case.sides)
            kernel, scale_inv = np.asarray(array.values), np.asarray(array.scale_inv)
        return _both(quantize_rows(x, dtype(compute)), kernel, spread(scale_inv, case.shape, case.sides))
    if compute is None and scale_inv is not None:
        return _both(x, kernel, spread(scale_inv, case.shape, case.sides))
    wide = kernel.astype(np.float32)
    if scale_inv is not None:
        wide = wide * spread(scale_inv, case.shape, case.sides, np.float32)
    to = compute or case.x
    return _both(x.astype(dtype(to)), saturated(wide, to), np.ones(case.shape))


def of_arrays(x: ScaledArray | np.ndarray, kernel: ScaledArray) -> Factors:
    """The same of a kernel, and perhaps of activations, in a format of their own."""
    scales = np.asarray(kernel.scale_inv).astype(np.float64)
    return _both(x, np.asarray(kernel.values), spread(scales, kernel.values.shape, kernel.block))


def _both(x: ScaledArray | np.ndarray, weight: np.ndarray, scales: np.ndarray) -> Factors:
    if isinstance(x, ScaledArray):
        x_scales = spread(np.asarray(x.scale_inv).astype(np.float64), x.values.shape, x.block)
        return Factors(np.asarray(x.values).astype(np.float64), x_scales, weight.astype(np.float64), scales)
    return Factors(x.astype(np.float64), np.ones(x.shape), weight.astype(np.float64), scales)


def multiply(case: Case, x, kernel, scale_inv) -> np.ndarray:
    """The native product."""
    with matmul_override("native"):
        return np.asarray(scaled_matmul(x, kernel, scale_inv, **case.settings))


def assert_within(y: np.ndarray, expected: Factors) -> None:
    """Each element of y is within the bound of its rounding errors."""
    assert y.shape == expected.product.shape
    error, bound = np.abs(y.astype(np.float64) - expected.product), expected.bound(y.dtype.name)
    assert (error <= bound).all(), (
        f"{np.nanmax(error / bound)} times the bound, of {(~(error <= bound)).sum()} elements"
    )
