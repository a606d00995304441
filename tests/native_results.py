"""Native products and gradients of fixed operands, for comparisons of processes: threads and instruction sets."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from helpers import dtype
from matmuls import FP8, Case
from native_matmuls import drawn, multiply

from perparam import quantize
from perparam.policies.matmul import grouped_matmuls, matmul_override, scaled_matmul
from perparam.policies.scaled_array import ScaledArray

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
    """For each of `CASES` its product, a gradient, and products of groups of rows."""
    for case in CASES:
        yield multiply(case, *drawn(case))
    case = CASES[1]
    x, kernel, scale_inv = map(jnp.asarray, drawn(case))
    gradient = np.random.default_rng(3).normal(size=(case.rows, case.shape[0])).astype(dtype(case.x))
    with matmul_override("native"):
        product = lambda x: scaled_matmul(x, kernel, scale_inv, **case.settings)  # noqa: E731
        yield np.asarray(jax.jit(lambda x, gradient: jax.vjp(product, x)[1](gradient)[0])(x, gradient))

    for kind in ("float8_e4m3fn", "bfloat16"):
        x, kernels, sizes = groups(kind)
        with matmul_override("native"):
            yield from map(np.asarray, jax.jit(grouped_matmuls)(x, kernels, sizes))


def groups(kind: str) -> tuple[jax.Array, list[jax.Array | ScaledArray], jax.Array]:
    """`(x, kernels, group_sizes)` of `grouped_matmuls`: two stacks of seven kernels with ragged blocks."""
    sizes = (3, 0, 600, 1, 0, 0, 14)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(sum(sizes), 200)), jnp.bfloat16)
    wide = [random.normal(size=(len(sizes), out, 200)).astype(np.float32) for out in (70, 45)]
    kernels = [quantize(one, kind, (48, 72)) if kind != "bfloat16" else jnp.asarray(one, kind) for one in wide]
    return x, kernels, jnp.array(sizes, jnp.int32)


def save(path: str) -> None:
    """Writes the results in float32, which NumPy's files know, unlike bfloat16."""
    np.savez(path, *(y.astype(np.float32) for y in results()))
