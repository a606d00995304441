"""Matmuls for tests: operands of given shapes and dtypes, and the product in float64."""

import dataclasses

import interpreter
import numpy as np
import pytest
from helpers import dtype, largest, reference_dequantize

from perparam.policies.blocks import grid_shape
from perparam.policies.formats import Format, stored_format
from perparam.policies.matmul.calls import Call
from perparam.policies.matmul.dispatch import IMPLEMENTATIONS, describe
from perparam.policies.native import library

FP8 = "float8_e4m3fn"

ON_CPU = "native" if library.unavailable() is None else "slabs"
"""The implementation of narrow kernels on a CPU: other tests pass where the native library was not compiled too."""

W8A16_ERROR = 2e-3
"""The result is rounded once, to eight bits: an error uniform within 2**-8 of a binade, of 2**-8 / sqrt(3) rms, over
numbers of rms sqrt(7/3) in it: 1.5e-3, for some samples 1.7e-3.  All before that is float32."""

W8A8_ERROR = 3e-2
"""Activations are rounded to four bits: 2**-4 / sqrt(3) / sqrt(7/3) = 2.4e-2, and as most of a group lie where numbers
below a power of two are next, up to 2.7e-2.  The kernel is narrow from the outset; the result's 1.5e-3 vanishes."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The operands of `scaled_matmul`, by long names of dtypes; `block` None is the whole kernel."""

    rows: int
    shape: tuple[int, int] = (256, 384)
    x: str = "bfloat16"
    kernel: str = FP8
    block: tuple[int, int] | None = (128, 128)
    compute: str | None = None

    def __str__(self) -> str:
        out, features = self.shape
        mode = f"{self.x} x {self.kernel}" + f" in {self.compute}" * bool(self.compute)
        return f"{self.rows} x {out}x{features}: {mode}, " + ("whole" if self.block is None else str(self.block))

    @property
    def sides(self) -> tuple[int, int]:
        return self.block or self.shape

    @property
    def is_narrow(self) -> bool:
        return dtype(self.kernel).itemsize == 1

    @property
    def call(self) -> Call:
        compute = None if self.compute is None else Format(dtype(self.compute))
        kernel = stored_format(dtype(self.kernel), self.sides, dtype("float32"))
        return describe(self.rows, self.shape, dtype(self.x), kernel, compute)

    @property
    def settings(self) -> dict:
        """The keywords of `scaled_matmul`."""
        return {"block": self.sides, "compute": self.compute}

    def operands(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """`(x, kernel, scale_inv)`: normal numbers, narrow ones over their whole range, and scales around 1."""
        random = np.random.default_rng(seed)
        x, kernel = random.normal(size=(self.rows, self.shape[1])), random.normal(size=self.shape)
        of = dtype(self.kernel)
        if self.is_narrow:
            kernel = np.clip(kernel * min(largest(of) / 4, 2.0**10), -largest(of), largest(of))
            kernel = np.rint(kernel) if of.kind == "i" else kernel
        scale_inv = random.uniform(0.5, 2, grid_shape(self.shape, self.sides)).astype(np.float32)
        return x.astype(dtype(self.x)), kernel.astype(of), scale_inv if self.is_narrow else None


def widened(kernel, scale_inv, block) -> np.ndarray:
    """The weight in float64, exactly."""
    kernel = np.asarray(kernel)
    return kernel.astype(np.float64) if scale_inv is None else reference_dequantize(kernel, scale_inv, block)


def exact(x, kernel, scale_inv, block) -> np.ndarray:
    """`x @ weight.T` in float64, of operands as they are."""
    return np.asarray(x).astype(np.float64) @ widened(kernel, scale_inv, block).T


def relative_error(found, want) -> float:
    """The difference of two arrays over the latter, in the Frobenius norm."""
    want = np.asarray(want).astype(np.float64)
    return float(np.linalg.norm(np.asarray(found).astype(np.float64) - want) / np.linalg.norm(want))


def marks(name: str, case: Case | None = None, *, quick_kernels: bool = False) -> list:
    """The marks of a test of an implementation.

    Kernels for GPUs need the interpreter, in which they take seconds: in the quick run they have tests of their own,
    and those that ask for it, of one tile of x.  70 rows are for what takes no fewer: others have them in `.ci/full`.
    """
    checked = IMPLEMENTATIONS[name].needs_check
    when = [pytest.mark.slow]
    if case is not None and case.rows == 70 and name != "hopper rows":
        when = [pytest.mark.thorough]
    elif case is None or not checked or (quick_kernels and case.rows in (2, 5, 8, 70)):
        when = []
    return [interpreter.required] * checked + when


def takers(*cases: Case, quick_kernels: bool = False):
    """Each implementation with each of the cases that it takes; kernels in the quick run if `quick_kernels`."""
    return pytest.mark.parametrize(
        ("name", "case"),
        [
            pytest.param(name, case, id=f"{name}: {case}", marks=marks(name, case, quick_kernels=quick_kernels))
            for name, one in IMPLEMENTATIONS.items()
            for case in cases
            if one.refuses(case.call) is None
        ],
    )


ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""The unit roundoff of each dtype of results: half the distance of 1 from its neighbour."""


def assert_product(y, x, weight, *, roundings: int = 2) -> None:
    """y is `x @ weight.T` of float64 operands, up to the order of summation and the rounding of the result.

    In float32 each product and each partial sum is rounded once, in whichever order: `in` times 2**-24 relative to the
    sum of magnitudes.  `roundings` are those of a product beside that: by the scales of either operand.
    """
    want, magnitude = x @ weight.T, np.abs(x) @ np.abs(weight).T
    error = np.abs(np.asarray(y).astype(np.float64) - want)
    bound = (x.shape[-1] + roundings) * ROUNDING["float32"] * magnitude + ROUNDING[y.dtype.name] * np.abs(want)
    assert y.shape == want.shape
    assert (error <= bound * (1 + 2.0**-7)).all(), f"{(error / np.maximum(bound, 1e-300)).max()} times the bound"
