"""Native products and gradients of fixed operands, for comparisons of processes: threads and instruction sets."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from helpers import dtype
from matmuls import FP8, Case
from native_matmuls import drawn, multiply

from perparam.policies.matmul import matmul_override, scaled_matmul

CASES = (
    Case(1, (300, 500)),
    Case(7, (300, 500), block=(100, 50)),
    Case(70, (300, 500), x="float32"),
    Case(600, (130, 200), x="float16"),
    Case(5, (300, 500), compute=FP8),
    Case(33, (300, 500), kernel="int8", compute="bfloat16"),
    Case(1, (300, 500), kernel="bfloat16"),
    Case(9, (300, 500), x="float32", kernel="float16"),
)


def results() -> Iterator[np.ndarray]:
    """For each of `CASES` its product."""
    for case in CASES:
        yield multiply(case, *drawn(case))
    case = CASES[1]
    x, kernel, scale_inv = map(jnp.asarray, drawn(case))
    gradient = np.random.default_rng(3).normal(size=(case.rows, case.shape[0])).astype(dtype(case.x))
    with matmul_override("native"):
        product = lambda x: scaled_matmul(x, kernel, scale_inv, **case.settings)  # noqa: E731
        yield np.asarray(jax.jit(lambda x, gradient: jax.vjp(product, x)[1](gradient)[0])(x, gradient))


def save(path: str) -> None:
    """Writes the results in float32, which NumPy's files know, unlike bfloat16."""
    np.savez(path, *(y.astype(np.float32) for y in results()))
