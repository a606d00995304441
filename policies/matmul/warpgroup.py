"""Warpgroup operations of the Hopper kernels: loads, matrix products and layouts, for every supported JAX version.

The tests run the kernels in Pallas' interpreter, which has neither registers nor tensor cores, and replace `load`,
`store`, `full`, `product`, `product_plain`, `product_widened`, `zeros` and `store_transposed`.

A thread may have 168 registers: the 65536 of a multiprocessor among three warpgroups.  `pipeline` moves registers from
the warpgroup that copies to those that compute, which then have 224, but JAX 0.12 compiles with libnvJitLink, as a
relocatable unit, in which ptxas ignores this (C7504).  So all kernels must do without spills with 168.
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


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """Returns a tile of memory in registers.

    Without `optimized`, JAX does not insist on a pattern without bank conflicts, which global memory has not and
    untiled shared memory may have, or on whole sectors of 32 bytes.
    """
    whole: tuple[Any, ...] = () if jax.__version_info__ >= (0, 11) else ((),)
    return plgpu.load(ref, *whole, layout=layout, optimized=optimized)


def store(ref: Any, values: jax.Array) -> None:
    """Writes values in registers to memory, also to less than whole sectors of 32 bytes.

    Mosaic requires that the last axis of the reference is contiguous: it may have a length of 1.
    """
    if hasattr(plgpu, "store"):  # since JAX 0.12, whose assignments to references refuse that
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    """Returns an array of equal numbers, float32 in registers."""
    result: jax.Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
    return result


def widened(ref: Any, dtype: Any) -> jax.Array:
    """Returns a tile of a narrow kernel, (64, k) in shared memory, widened exactly to `dtype`, as a left operand.

    Each thread loads pairs of columns, where the matrix instruction expects them.  Loads of four columns would be half
    as many, but need as many shuffles between threads, and selections beside them.
    """
    # The hardware converts float8 only to float16; bfloat16 needs a second conversion through float32.
    wide = load(ref, plgpu.Layout.WGMMA).astype(jnp.float16)
    if dtype != jnp.float16:
        wide = wide.astype(jnp.float32).astype(dtype)
    result: jax.Array = wide
    return result


def product(a: Any, b: Any) -> jax.Array:
    """Returns a @ b.T in float32 (64, n), for a (64, k) and b (n, k) of one dtype in shared memory.

    The sum starts at zero, not at an accumulator: each block of columns is scaled before it is added to the others, and
    the float8 sums of tensor cores, which have fewer bits than float32, have few terms.
    """

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
        result: jax.Array = accumulator[...]
        return result

    result: jax.Array = pl.run_scoped(multiply, plgpu.ACC((ROWS, b.shape[0]), jnp.float32))
    return result


def product_plain(a: Any, b: Any) -> jax.Array:
    """Returns a @ b in float32 (64, n), for a (64, k) in shared memory or registers and b (k, n) in shared memory.

    Both are of one dtype with 16 bits.
    """

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        result: jax.Array = accumulator[...]
        return result

    result: jax.Array = pl.run_scoped(multiply, plgpu.ACC((ROWS, b.shape[1]), jnp.float32))
    return result


def product_widened(a: Any, b: Any, columns: int, *, synchronise: bool = False) -> jax.Array:
    """Returns `product(a, b)` for a narrow a, of which `columns` columns at a time are widened to the dtype of b.

    A part is loaded after the product of the part before it, so that both are widened in the same registers.

    synchronise  whether each thread knows, on return, that all threads have loaded a: see `pipeline`
    """
    parts = a.shape[1] // columns

    def multiply(accumulator: Any) -> jax.Array:
        for i in range(parts):
            part = pl.ds(i * columns, columns)
            left, right = (a.at[:, part], b.at[:, part]) if parts > 1 else (a, b)
            plgpu.wgmma(accumulator, widened(left, b.dtype), right.transpose((1, 0)))
            if i < parts - 1:
                plgpu.wgmma_wait(0)
        if synchronise:
            plgpu.commit_smem()  # has a barrier of the warpgroup, for which nobody waits while the product is computed
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
    ref.transpose((1, 0))[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)


pipeline: Any = functools.partial(
    plgpu.emit_pipeline_warp_specialized, memory_registers=56, wg_axis="warpgroup", num_compute_wgs=2
)
"""Pallas' pipeline with two warpgroups that compute and a third that copies operands to shared memory.

After a step its operands are released.  In a cluster with shared operands, a single thread of a warpgroup does so: the
others must have loaded their part of the operands before.
"""


def kernel(body: Any, out_type: jax.ShapeDtypeStruct, *, interpret: Any = None, **settings: Any) -> Any:
    """Returns a Pallas kernel with three warpgroups per thread block, for `pipeline`."""
    if interpret is not None:
        settings["interpret"] = interpret
    parameters = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    return plgpu.kernel(
        body, out_type=out_type, num_threads=3, thread_name="warpgroup", compiler_params=parameters, **settings
    )


Updated = tuple[jax.Array, ...]


def kernel_in_place(body: Any, out_type: Any, *, interpret: Any = None, **mesh: Any) -> Any:
    """Returns a Pallas kernel that updates arrays in place: `kernel(operands, updated) -> (results, updated)`.

    body      function of references to the operands, to the updated arrays and to the results
    out_type  shapes and dtypes of the results
    mesh      grid of the kernel and the names of its axes

    XLA copies an updated array that is used later, and one that is an argument of a program and not donated.
    """
    settings = {} if interpret is None else {"interpret": interpret}
    launch = pl.kernel(
        body,
        out_type=out_type,
        mesh=plgpu.Mesh(**mesh),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **settings,
    )

    @jax.jit  # outside of which a reference has no memory space
    def run(operands: Updated, updated: Updated) -> tuple[Any, Updated]:
        references = [jax.new_ref(array, memory_space=plgpu.GMEM) for array in updated]
        results = launch(*operands, *references)
        return results, tuple(jax.freeze(reference) for reference in references)

    return run
