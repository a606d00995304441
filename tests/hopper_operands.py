"""Random operands of the Hopper kernels, as the kernels take them, and the products in float64."""

import jax.numpy as jnp
import numpy as np
from helpers import dtype
from matmuls import FP8, assert_product, widened

from perparam.policies.matmul import hopper_columns, hopper_rows

BLOCK = (128, 128)


def kernel_of(out: int, features: int, block=BLOCK, of: str = FP8, seed: int = 0):
    """`(kernel, scale_inv, block)`, the scales of every block another."""
    random = np.random.default_rng([seed, out, features])
    sides = min(block[0], out), min(block[1], features)
    kernel = random.normal(size=(out, features)).astype(dtype(of))
    grid = -(-out // sides[0]), -(-features // sides[1])
    return jnp.asarray(kernel), jnp.asarray(random.uniform(0.5, 2, grid), jnp.float32), sides


def narrow_rows(rows: int, features: int):
    """`(values, scales)` as the kernels take them, the scales of a block of columns side by side."""
    random = np.random.default_rng([rows, features])
    values = random.normal(size=(rows, features)).astype(dtype(FP8))
    return jnp.asarray(values), jnp.asarray(random.uniform(0.5, 2, (features // 128, rows)), jnp.float32)


def wide_rows(rows: int, features: int, of: str):
    return jnp.asarray(np.random.default_rng([rows, features]).normal(size=(rows, features)).astype(dtype(of)))


def rows_product(rows, out, features, result="float32", block=BLOCK, check=assert_product, processors=132) -> None:
    """Runs `hopper_rows.product`, and checks it."""
    x, x_scales = narrow_rows(rows, features)
    kernel, scale_inv, sides = kernel_of(out, features, block)
    settings = {"block": sides, "result": dtype(result), "processors": processors}
    y = hopper_rows.product(x, x_scales, kernel, scale_inv, **settings)
    if check is not None:
        wide = widened(x, np.asarray(x_scales).T, (1, 128))
        check(y, wide, widened(kernel, scale_inv, sides), roundings=4)


def columns_products(rows, outs, features, x="bfloat16", result="float32", of=FP8, check=assert_product) -> None:
    """Runs `hopper_columns.products`, and checks them; W8A8 if x is `FP8`."""
    if x == FP8:
        values, x_scales = narrow_rows(rows, features)
        wide = widened(values, np.asarray(x_scales).T, (1, 128))
        missing = max(hopper_columns.SCALES - rows, 0)
        x_scales = jnp.pad(x_scales, ((0, 0), (0, missing)), constant_values=jnp.nan)
    else:
        values, x_scales = wide_rows(rows, features, x), None
        wide = np.asarray(values).astype(np.float64)
    kernels, scales, blocks = zip(*(kernel_of(out, features, of=of, seed=i) for i, out in enumerate(outs)), strict=True)
    results = hopper_columns.products(
        values, x_scales, kernels, scales, blocks=blocks, result=dtype(result), processors=132
    )
    for y, kernel, scale_inv, sides in zip(results, kernels, scales, blocks, strict=True):
        if check is not None:
            check(y, wide, widened(kernel, scale_inv, sides), roundings=4)
