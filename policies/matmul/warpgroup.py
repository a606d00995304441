"""Warpgroup operations of the Hopper kernels: loads, matrix products and layouts, for every supported JAX version.

The tests run the kernels in Pallas' interpreter, which has neither registers nor tensor cores, and replace `load`,
`load_kernel`, `product`, `zeros` and `store_transposed`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64
"""Rows of the left operand of a warpgroup's matrix instruction."""

SWIZZLE = 128
"""Bytes of shared memory within which rows are swizzled."""


def tiled(dtype: Any, columns: int) -> tuple[Any, ...]:
    """Returns the transforms of a tile of `columns` columns in shared memory, for matrix instructions and copies."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(SWIZZLE, columns * itemsize)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def load(ref: Any, layout: Any) -> jax.Array:
    """Returns a tile of shared memory in registers."""
    whole: tuple[Any, ...] = () if jax.__version_info__ >= (0, 11) else ((),)
    return plgpu.load(ref, *whole, layout=layout)


def load_kernel(ref: Any, dtype: Any) -> jax.Array:
    """Returns a (64, 128) tile of a narrow kernel in registers, widened exactly to `dtype`, as a left operand."""
    narrow = load(ref, plgpu.Layout.WGMMA_UPCAST_2X)
    # The hardware converts float8 only to float16; bfloat16 needs a second conversion through float32.
    wide = narrow.astype(jnp.float16)
    if dtype != jnp.float16:
        wide = wide.astype(jnp.float32).astype(dtype)
    result: jax.Array = plgpu.layout_cast(wide, plgpu.Layout.WGMMA)
    return result


def product(a: Any, b: Any) -> jax.Array:
    """Returns a @ b.T in float32 (64, n), for a (64, k) in registers or shared memory and b (n, k) in shared memory.

    The sum starts at zero, not at an accumulator: each block of columns is scaled before it is added to the others, and
    the float8 sums of tensor cores, which have fewer bits than float32, have few terms.
    """

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)))
        result: jax.Array = accumulator[...]
        return result

    result: jax.Array = pl.run_scoped(multiply, plgpu.ACC((ROWS, b.shape[0]), jnp.float32))
    return result


def zeros(columns: int) -> jax.Array:
    """Returns zeros (64, columns), float32 in registers, in the layout of the results of `product`."""
    result: jax.Array = plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)
    return result


def store_transposed(ref: Any, values: jax.Array) -> None:
    """Writes values (64, n) in registers to shared memory (n, 64)."""
    plgpu.transpose_ref(ref, (1, 0))[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)


pipeline: Any = functools.partial(
    plgpu.emit_pipeline_warp_specialized, memory_registers=56, wg_axis="warpgroup", num_compute_wgs=2
)
"""Pallas' pipeline with two warpgroups that compute and a third that copies operands to shared memory."""


def kernel(body: Any, out_type: jax.ShapeDtypeStruct, *, interpret: Any = None, **settings: Any) -> Any:
    """Returns a Pallas kernel with three warpgroups per thread block, for `pipeline`."""
    if interpret is not None:
        settings["interpret"] = interpret
    parameters = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    return plgpu.kernel(
        body, out_type=out_type, num_threads=3, thread_name="warpgroup", compiler_params=parameters, **settings
    )
