"""The tables with which native kernels decode dtypes of one byte."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np


@functools.cache
def bfloat16_table(dtype: np.dtype) -> np.ndarray:
    """Returns the bits of the 256 values of a dtype as bfloat16, in which they are exact: (256,) uint16.

    Dtypes of several bytes need no table: zeros, which are not read.
    """
    if dtype.itemsize != 1:
        return np.zeros(256, np.uint16)
    values = np.arange(256, dtype=np.uint8).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = values.astype(np.float32)
        rounded = wide.astype(ml_dtypes.bfloat16)
        assert np.array_equal(rounded.astype(np.float32), wide, equal_nan=True), dtype
    bits: np.ndarray = rounded.view(np.uint16)
    return bits
