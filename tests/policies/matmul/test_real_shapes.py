"""Every linear layer of the dense Qwen3 models, as a CPU multiplies it; a few by every implementation."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dtype
from matmuls import FP8, ON_CPU, W8A8_ERROR, W8A16_ERROR, Case, relative_error
from shapes import SHAPES

from perparam.policies.matmul import matmul_override, scaled_matmul
from perparam.policies.matmul.dispatch import IMPLEMENTATIONS

pytestmark = pytest.mark.optimised

NAMES = [name for name, one in IMPLEMENTATIONS.items() if not one.needs_check]
BOUNDS = {None: W8A16_ERROR, FP8: W8A8_ERROR}

BAND = 128
"""Rows of a kernel that are float64 at a time: those of a block, which stay in the cache."""


def operands(rows: int, shape: tuple[int, int]):
    """`(x, kernel, scale_inv)`, drawn quickly: codes of the kernel are some of 256 normal numbers'."""
    random = np.random.default_rng([rows, *shape])
    codes = random.normal(size=256).astype(dtype(FP8)).view(np.uint8)
    kernel = codes[random.integers(0, 256, shape, np.uint8)].view(dtype(FP8))
    scales = random.uniform(0.5, 2, (shape[0] // 128, shape[1] // 128)).astype(np.float32)
    return random.normal(size=(rows, shape[1])).astype(dtype("bfloat16")), kernel, scales


def product(x, kernel, scale_inv) -> np.ndarray:
    """In float64, a band of the kernel at a time."""
    x, values = x.astype(np.float64), np.arange(256, dtype=np.uint8).view(dtype(FP8)).astype(np.float64)
    bands = []
    for start in range(0, len(kernel), BAND):
        scales = np.repeat(scale_inv[start // BAND].astype(np.float64), BAND)
        bands.append(x @ (np.take(values, kernel[start : start + BAND].view(np.uint8)) * scales).T)
    return np.concatenate(bands, axis=1)


def errors(name, x, kernel, scale_inv, want) -> dict[str, float]:
    """The error in each mode over what that mode allows, if the implementation takes the product."""
    found = {}
    for compute, bound in BOUNDS.items():
        if IMPLEMENTATIONS[name].refuses(Case(len(x), kernel.shape, compute=compute).call) is None:
            with matmul_override(implementation=name):
                y = scaled_matmul(x, kernel, scale_inv, compute=compute)
            found[f"{name}, {len(x)} rows in {compute}"] = relative_error(y, want) / bound
    return found


@pytest.mark.parametrize(("rows", "shape"), [(1, (1024, 1024)), (8, (1024, 1024)), (64, (1024, 1024))])
def test_a_handful_on_a_cpu(rows, shape):
    arrays = operands(rows, shape)
    found = errors(ON_CPU, *arrays, product(*arrays))
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        *(pytest.param(1, name, marks=() if name == ON_CPU else pytest.mark.slow) for name in NAMES),
        *(pytest.param(rows, name, marks=pytest.mark.thorough) for rows in (8, 64) for name in NAMES),
    ],
)
def test_one_by_every_implementation(rows, name):
    arrays = operands(rows, (1024, 2560))
    found = errors(name, *arrays, product(*arrays))
    assert max(found.values(), default=0) <= 1, found


@pytest.mark.thorough
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_and_eight_of_every_shape(shape):
    x, kernel, scale_inv = operands(8, shape)
    want = product(x, kernel, scale_inv)
    kernel, scale_inv = jnp.asarray(kernel), jnp.asarray(scale_inv)
    found = errors(ON_CPU, x, kernel, scale_inv, want) | errors(ON_CPU, x[:1], kernel, scale_inv, want[:1])
    assert len(found) == 4
    assert max(found.values()) <= 1, found


@pytest.mark.thorough
def test_a_prompt():
    arrays = operands(512, (4096, 4096))
    found = errors(ON_CPU, *arrays, product(*arrays))
    assert max(found.values()) <= 1, found
