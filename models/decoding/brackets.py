"""What kernels that compute rows may return: the least and the greatest number for each element.

The kernels round where their reference does, and their other errors are some units in the last place of float32.
Rounding is monotonic: so a result lies between those of the same computation in float64 with values a little smaller
and a little greater.  Where no rounding is nearly a tie, both are the same number.
"""

from __future__ import annotations

import numpy as np

from ...policies import dtypes
from ...policies.scales import E4M3, F32
from .reference import SCALES

Bracket = tuple[np.ndarray, np.ndarray]
"""Least and greatest numbers, in float64."""

ROOT = 2.0**-19
"""Relative error of x / rms(x) before it is rounded, 32 times 2**-24: each of up to 25 additions of squares on the
way of an element counts half, as products before the root do; 2 ulp of the root count 4, the product after it 1."""

SILU = 2.0**-20
"""Relative error of silu(x) before it is rounded: 2 ulp each of the exponential function and the reciprocal, and 2
operations that round, are 10 times 2**-24."""

QUOTIENT = 2.0**-21
"""Relative error of the quotient that is rounded to e4m3: 2 ulp, and that of the bracket's own rounding."""

SCALE = 2.0**-22
"""Relative error of a scale, which XLA rounds to one of two neighbours, beyond that of the largest magnitude."""

FLUSHED = 2.0**-126
"""Smaller magnitudes are subnormal in float32, and may become zero."""

VANISHED = 2.0**-118
"""Smaller magnitudes of silu(x) may become zero, since the logistic function is subnormal."""

LARGEST = float(dtypes.largest(E4M3))


def norm(stream: np.ndarray, scale: np.ndarray, eps: float, dtype: np.dtype) -> Bracket:
    """Returns the bracket of the RMS norm of stream (rows, hidden) by scale (hidden,) in `dtype`."""
    wide, by_column = stream.astype(np.float64), scale.astype(np.float64)
    with np.errstate(all="ignore"):
        normalised = wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + np.float64(np.float32(eps)))
        return _products(_rounded(_wider((normalised, normalised), ROOT, FLUSHED), dtype), by_column, dtype)


def gate(gate: np.ndarray, up: np.ndarray, dtype: np.dtype) -> Bracket:
    """Returns the bracket of silu(gate) * up in `dtype`, for both (rows, intermediate)."""
    wide = gate.astype(np.float64)
    with np.errstate(all="ignore"):
        silu = wide / (1 + np.exp(-wide))
        return _products(_rounded(_wider((silu, silu), SILU, VANISHED), dtype), up.astype(np.float64), dtype)


def operand_difference(values: np.ndarray, scales: np.ndarray | None, expected: Bracket) -> str | None:
    """Returns how an operand of a matrix product differs from its bracket, or None.

    values  (rows, in)                     in the activations' dtype, or float8_e4m3fn with scales
    scales  (in/128, max(rows, SCALES))    float32, those beyond `rows` are ones
    """
    if scales is None:
        return difference("the operand", values, expected)
    rows, columns = expected[0].shape
    if scales.shape != (columns // 128, max(rows, SCALES)):
        return f"the shape of the scales is {scales.shape}"
    if not (scales[:, rows:] == 1).all():
        return "the scales beyond the rows are not ones"
    found, blocks = scales[:, :rows].T, (rows, columns // 128, 128)
    sides = [np.abs(side).reshape(blocks) for side in expected]
    has_zero = ((expected[0] <= 0) & (expected[1] >= 0)).reshape(blocks)
    one = _scales(np.where(has_zero, 0, np.minimum(*sides)).max(axis=2))
    other = _scales(np.maximum(*sides).max(axis=2))
    bounds = _wider((np.minimum(one, other), np.maximum(one, other)), SCALE, 0)
    if why := difference("the scale", found, bounds):
        return why
    by_column = np.repeat(found.astype(np.float64), 128, axis=1)
    with np.errstate(all="ignore"):
        quotients = _wider((expected[0] / by_column, expected[1] / by_column), QUOTIENT, 0)
        clipped = tuple(np.clip(side, -LARGEST, LARGEST) for side in quotients)
        return difference("the quantised value", values, _rounded((clipped[0], clipped[1]), E4M3))


def difference(what: str, found: np.ndarray, expected: Bracket) -> str | None:
    """Returns where `found` is outside of its bracket, or None."""
    least, greatest = expected
    if found.shape != least.shape:
        return f"the shape of {what} is {found.shape} instead of {least.shape}"
    wide = found.astype(np.float64)
    wrong = ~(((wide >= least) & (wide <= greatest)) | (np.isnan(wide) & (np.isnan(least) | np.isnan(greatest))))
    if not wrong.any():
        return None
    place = tuple(int(index) for index in np.argwhere(wrong)[0])
    return (
        f"{what} is {wide[place]:.8g} instead of {least[place]:.8g} to {greatest[place]:.8g} at {place}, and "
        f"{int(wrong.sum())} of {wrong.size} elements are outside of their bounds"
    )


def _scales(largest: np.ndarray) -> np.ndarray:
    """Returns the scales of the rule for largest magnitudes."""
    return np.where(largest == 0, 1.0, np.maximum(largest / LARGEST, float(dtypes.smallest_normal(F32))))


def _wider(bracket: Bracket, relative: float, vanishing: float) -> Bracket:
    """Returns a bracket widened by a relative error, and up to zero below the magnitude `vanishing`."""
    least = bracket[0] * (1 - np.sign(bracket[0]) * relative)
    greatest = bracket[1] * (1 + np.sign(bracket[1]) * relative)
    least = np.where((least > 0) & (least < vanishing), 0, least)
    return least, np.where((greatest < 0) & (greatest > -vanishing), 0, greatest)


def _rounded(bracket: Bracket, dtype: np.dtype) -> Bracket:
    least, greatest = (side.astype(dtype).astype(np.float64) for side in bracket)
    return least, greatest


def _products(bracket: Bracket, factor: np.ndarray, dtype: np.dtype) -> Bracket:
    """Returns the bracket of products with a factor, rounded."""
    one, other = _rounded((bracket[0] * factor, bracket[1] * factor), dtype)
    return _wider((np.minimum(one, other), np.maximum(one, other)), 0, FLUSHED)
