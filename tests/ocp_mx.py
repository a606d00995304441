"""MXFP8 with E4M3 elements, written from the OCP Microscaling Formats (MX) Specification v1.0 and nothing of perparam.

Section 5.3.1 has the elements, 5.4.1 the scales, 6.3 the conversion of 32 values that share a scale.  All arithmetic is
exact: float32 values times powers of two are float64 values.

The specification leaves open what happens where a scale does not fit: here a block of zeros has scale 1, no scale is
below 2**-126 (2**-127 would be subnormal in float32, which CPUs flush), and a block that holds NaN or infinity has the
scale NaN.
"""

import numpy as np

BLOCK = 32
"""Values along the last axis that share a scale."""

SMALLEST_SCALE, SCALE_OF_ZEROS, SCALE_OF_NAN = 1, 127, 255
"""Codes of E8M0: 2**-126, 2**0 and NaN."""

NAN_CODE = 0x7F
LARGEST_CODE = 0x7E


def _element(code: int) -> float:
    """The value of an E4M3 code without its sign: four bits of exponent, biased by 7, and three of mantissa."""
    exponent, mantissa = code >> 3, code & 7
    if code == NAN_CODE:
        return np.nan
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


MAGNITUDES = np.array([_element(code) for code in range(128)])
ELEMENTS = np.concatenate([MAGNITUDES, -MAGNITUDES])
"""The value of each of the 256 codes."""

LARGEST = MAGNITUDES[LARGEST_CODE]
EMAX = int(np.frexp(LARGEST)[1]) - 1
"""The exponent of the largest element: 8 for 448."""

TIES = (MAGNITUDES[:LARGEST_CODE] + MAGNITUDES[1 : LARGEST_CODE + 1]) / 2
"""What lies halfway between the magnitudes of code i and of code i + 1."""


def encode(values: np.ndarray) -> np.ndarray:
    """The codes of float64 `values` rounded to the nearest element, of a tie to the even code, saturating."""
    magnitudes = np.abs(values)
    codes = np.searchsorted(TIES, magnitudes, side="left")  # the larger neighbour only from above the tie
    tied = magnitudes == TIES[np.minimum(codes, len(TIES) - 1)]
    codes = codes + (tied & (codes % 2 == 1))
    return (codes + 128 * np.signbit(values)).astype(np.uint8)


def quantize(weight) -> tuple[np.ndarray, np.ndarray]:
    """`(element codes (..., n), scale codes (..., ceil(n / 32)))`, both uint8, of floats (..., n)."""
    weight = np.asarray(weight).astype(np.float64)
    elements = np.zeros(weight.shape, np.uint8)
    scales = np.zeros((*weight.shape[:-1], -(-weight.shape[-1] // BLOCK)), np.uint8)
    for j in range(scales.shape[-1]):
        columns = slice(j * BLOCK, (j + 1) * BLOCK)
        block = weight[..., columns]
        amax = np.abs(block).max(axis=-1)
        finite = np.isfinite(amax)
        _, exponent = np.frexp(np.where(finite & (amax > 0), amax, 1.0))  # amax is in [2**(exponent - 1), 2**exponent)
        code = np.maximum(exponent - 1 - EMAX + 127, SMALLEST_SCALE)
        code = np.where(finite, np.where(amax > 0, code, SCALE_OF_ZEROS), SCALE_OF_NAN)
        quotient = np.ldexp(np.where(finite[..., None], block, 0.0), 127 - code[..., None])
        elements[..., columns] = np.where(finite[..., None], encode(quotient), NAN_CODE)
        scales[..., j] = code
    return elements, scales


def scale(codes) -> np.ndarray:
    """The float64 value of E8M0 codes."""
    codes = np.asarray(codes)
    return np.where(codes == SCALE_OF_NAN, np.nan, np.ldexp(1.0, codes.astype(np.int64) - 127))


def dequantize(elements, scales) -> np.ndarray:
    """The float64 weight of codes (..., n) and (..., ceil(n / 32)), exactly."""
    elements = np.asarray(elements)
    return ELEMENTS[elements] * np.repeat(scale(scales), BLOCK, axis=-1)[..., : elements.shape[-1]]


def rounded(weight) -> np.ndarray:
    """The float64 weight that MXFP8 makes of `weight`."""
    return dequantize(*quantize(weight))
