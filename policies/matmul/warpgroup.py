"""What the Hopper kernels ask of a warpgroup beyond plain jnp, in the words of every supported JAX version.

These three are all that an interpreter of the kernels has to replace: it has neither registers nor tensor cores.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64
"""Rows that one warpgroup's matrix instruction takes."""

SWIZZLE = 128
"""Bytes of shared memory within which rows are swizzled."""


def tiled(dtype: Any, columns: int) -> tuple[Any, ...]:
    """How a tile of `columns` columns lies in shared memory for matrix instructions and bulk copies."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(SWIZZLE, columns * itemsize)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def load(ref: Any, layout: Any) -> jax.Array:
    """A tile of shared memory in registers."""
    whole: tuple[Any, ...] = () if jax.__version_info__ >= (0, 11) else ((),)
    return plgpu.load(ref, *whole, layout=layout)


def load_kernel(ref: Any, dtype: Any) -> jax.Array:
    """A (64, 128) tile of a narrow kernel in registers, widened without loss to `dtype`, as a left operand."""
    narrow = load(ref, plgpu.Layout.WGMMA_UPCAST_2X)
    # The hardware converts float8 to float16 alone, from which bfloat16 is reached through float32.
    wide = narrow.astype(jnp.float16)
    if dtype != jnp.float16:
        wide = wide.astype(jnp.float32).astype(dtype)
    result: jax.Array = plgpu.layout_cast(wide, plgpu.Layout.WGMMA)
    return result


def product(a: Any, b: Any) -> jax.Array:
    """a (64, k), in registers or shared memory, times b (n, k) in shared memory, transposed: float32 (64, n).

    The sum begins at zero: a block of columns is scaled before it is added to others, and the tensor core's float8
    sums, which keep fewer bits than float32, stay short.
    """

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)))
        result: jax.Array = accumulator[...]
        return result

    result: jax.Array = pl.run_scoped(multiply, plgpu.ACC((ROWS, b.shape[0]), jnp.float32))
    return result


def zeros(columns: int) -> jax.Array:
    """(64, columns) float32 in registers, where `product` leaves its results."""
    result: jax.Array = plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)
    return result


def store_transposed(ref: Any, values: jax.Array) -> None:
    """Registers (64, n) to shared memory (n, 64)."""
    plgpu.transpose_ref(ref, (1, 0))[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)


pipeline: Any = functools.partial(
    plgpu.emit_pipeline_warp_specialized, memory_registers=56, wg_axis="warpgroup", num_compute_wgs=2
)
"""Two warpgroups compute what a third has copied to shared memory."""


def kernel(body: Any, out_type: jax.ShapeDtypeStruct, *, interpret: Any = None, **settings: Any) -> Any:
    """A kernel of three warpgroups a block, for `pipeline`."""
    if interpret is not None:
        settings["interpret"] = interpret
    parameters = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    return plgpu.kernel(
        body, out_type=out_type, num_threads=3, thread_name="warpgroup", compiler_params=parameters, **settings
    )
