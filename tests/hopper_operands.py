"""Random operands of the Hopper kernels, as the kernels take them, and the products in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from helpers import dtype
from matmuls import FP8, assert_product, widened

from perparam.policies.matmul import hopper_columns, hopper_grouped_kernel, hopper_rows, hopper_widened
from perparam.policies.matmul.hopper_grouped_tiles import RowTiles

BLOCK = (128, 128)


@dataclasses.dataclass(frozen=True)
class Product:
    """The product y (rows, out) of x (rows, in) with a weight (out, in), both in float64."""

    y: jax.Array
    x: np.ndarray
    weight: np.ndarray


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


def rows_product(rows, out, features, result="float32", block=BLOCK, processors=132) -> Product:
    """What `hopper_rows.product` makes of random operands."""
    x, x_scales = narrow_rows(rows, features)
    kernel, scale_inv, sides = kernel_of(out, features, block)
    settings = {"block": sides, "result": dtype(result), "processors": processors}
    y = hopper_rows.product(x, x_scales, kernel, scale_inv, **settings)
    return Product(y, widened(x, np.asarray(x_scales).T, (1, 128)), widened(kernel, scale_inv, sides))


def widened_product(
    rows, out, features, x="bfloat16", result="float32", of=FP8, block=BLOCK, processors=132
) -> Product:
    """What `hopper_widened.product` makes of random operands."""
    values = wide_rows(rows, features, x)
    kernel, scale_inv, sides = kernel_of(out, features, block, of)
    settings = {"block": sides, "result": dtype(result), "processors": processors}
    y = hopper_widened.product(values, kernel, scale_inv, **settings)
    return Product(y, np.asarray(values).astype(np.float64), widened(kernel, scale_inv, sides))


def columns_products(
    rows, outs, features, x="bfloat16", result="float32", of=FP8, block=BLOCK, processors=132
) -> list[Product]:
    """What `hopper_columns.products` makes of random operands, in one launch; W8A8 if x is `FP8`."""
    if x == FP8:
        values, x_scales = narrow_rows(rows, features)
        wide = widened(values, np.asarray(x_scales).T, (1, 128))
        # What a copy to shared memory takes beyond the rows is never read.
        missing = max(hopper_columns.SCALES - rows, 0)
        x_scales = jnp.pad(x_scales, ((0, 0), (0, missing)), constant_values=jnp.nan)
    else:
        values, x_scales = wide_rows(rows, features, x), None
        wide = np.asarray(values).astype(np.float64)
    operands = [kernel_of(out, features, block, of, seed) for seed, out in enumerate(outs)]
    kernels, scales, blocks = zip(*operands, strict=True)
    settings = {"blocks": blocks, "result": dtype(result), "processors": processors}
    results = hopper_columns.products(values, x_scales, kernels, scales, **settings)
    return [Product(y, wide, widened(*pair)) for y, pair in zip(results, operands, strict=True)]


def grouped_operands(sizes, outs, features, x="bfloat16", of=FP8, block=BLOCK):
    """`(tiles, x, x_scales, kernels, scales, blocks, wide)`: random operands of groups of rows, and x in float64."""
    rows, tiles = sum(sizes), RowTiles.of(sum(sizes), jnp.asarray(sizes, jnp.int32))
    taken = max(-(-rows // 8) * 8, tiles.height)
    if x == FP8:
        values, x_scales = narrow_rows(rows, features)
        wide = widened(values, np.asarray(x_scales).T, (1, 128))
        # What copies to shared memory take beyond the rows is never read.
        missing = hopper_grouped_kernel.scales_of(taken, tiles.height) - rows
        x_scales = jnp.pad(x_scales, ((0, 0), (0, missing)), constant_values=jnp.nan)
    else:
        values, x_scales = wide_rows(rows, features, x), None
        wide = np.asarray(values).astype(np.float64)
    values = jnp.pad(values, ((0, taken - rows), (0, 0)))
    groups = range(len(sizes))
    stacks = [[kernel_of(out, features, block, of, 100 * j + i) for i in groups] for j, out in enumerate(outs)]
    kernels, scales = (tuple(jnp.stack([pair[i] for pair in stack]) for stack in stacks) for i in range(2))
    return tiles, values, x_scales, kernels, scales, tuple(stack[0][2] for stack in stacks), wide


def grouped_products(
    sizes, outs, features, x="bfloat16", result="float32", of=FP8, block=BLOCK, processors=132
) -> list[Product]:
    """What `hopper_grouped_kernel.products` makes of random operands, for each group with rows and each kernel."""
    tiles, values, x_scales, kernels, scales, blocks, wide = grouped_operands(sizes, outs, features, x, of, block)
    settings = {"blocks": blocks, "result": dtype(result), "processors": processors}
    y = hopper_grouped_kernel.products(values, x_scales, tiles, kernels, scales, **settings)
    y = y.reshape(-1, sum(outs))[tiles.places]
    ends, columns = np.cumsum(sizes), np.cumsum(outs)
    return [
        Product(
            y[end - size : end, column - out : column],
            wide[end - size : end],
            widened(kernels[j][i], scales[j][i], blocks[j]),
        )
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
        for j, (out, column) in enumerate(zip(outs, columns, strict=True))
        if size
    ]


def assert_products(products, result="float32") -> None:
    """Asserts that products have this dtype, and are those in float64."""
    for one in products:
        assert one.y.dtype == dtype(result)
        assert_product(one.y, one.x, one.weight, roundings=4)
