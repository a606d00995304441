"""`scaled_matmul`: the one place through which every linear layer goes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .. import dtypes
from ..blocks import check_grid, dequantize, grid_shape, quantize
from ..errors import UnsupportedCast
from ..slots import DEFAULT_BLOCK, Block, as_block
from . import cpu, oracle
from .activations import quantize_rows, widen_rows
from .calls import Call, Implementation, Operands
from .dispatch import Target, choose, describe, here
from .portable import unless_portable
from .shards import vary_alike

Pair = tuple[ArrayLike, ArrayLike | None]


def scaled_matmul(
    x: ArrayLike,
    kernel: ArrayLike,
    scale_inv: ArrayLike | None = None,
    *,
    block: Block = DEFAULT_BLOCK,
    compute: DTypeLike | None = None,
) -> jax.Array:
    """`x @ (kernel * scale_inv).T` in x's dtype, accumulated in float32.

    x          (..., in)   f32, bf16 or f16
    kernel     (out, in)   any float, or int8 with scales; (out, in) as checkpoints store it
    scale_inv  (ceil(out/block[0]), ceil(in/block[1]))  what each block is multiplied by; None is the identity
    result     (..., out)  x's dtype

    compute says which dtypes meet in the matmul:

    None             a narrow kernel as stored, scaled inside the product, with activations as they are (W8A16); a plain
                     kernel in x's dtype
    a float8 type    both narrow (W8A8): each row of x quantised per 128 columns as it comes, a plain kernel by `block`
    f32, bf16, f16   the weight and x cast to it

    What carries it out depends on the device and the shapes: see `matmul_plan`.

    >>> kernel, scale_inv = quantize(jnp.eye(3) * 2, "f8_e4m3fn", (2, 2))
    >>> scaled_matmul(jnp.ones((1, 3)), kernel, scale_inv, block=(2, 2)).tolist()
    [[2.0, 2.0, 2.0]]

    Raises:
      InvalidScale: where the grid of scales does not fit the kernel.
      UnsupportedCast: where shapes or dtypes cannot be multiplied.
    """
    return scaled_matmuls(x, [(kernel, scale_inv)], block=block, compute=compute)[0]


def scaled_matmuls(
    x: ArrayLike, pairs: Sequence[Pair], *, block: Block = DEFAULT_BLOCK, compute: DTypeLike | None = None
) -> tuple[jax.Array, ...]:
    """`scaled_matmul` of one x with several kernels, which on some devices are launched as one.

    pairs  (kernel, scale_inv) each, as for `scaled_matmul`; their numbers of rows may differ

    >>> [y.shape for y in scaled_matmuls(jnp.ones((2, 4)), [(jnp.ones((3, 4)), None), (jnp.ones((5, 4)), None)])]
    [(2, 3), (2, 5)]
    """
    x = jnp.asarray(x)
    arrays = tuple((jnp.asarray(kernel), None if scale is None else jnp.asarray(scale)) for kernel, scale in pairs)
    compute, block = None if compute is None else dtypes.as_dtype(compute), as_block(block)
    for kernel, scale_inv in arrays:
        _check(x, kernel, scale_inv, block, compute)
    if not arrays:
        return ()
    return _matmuls(x, arrays, block, compute, here())


@functools.partial(jax.jit, static_argnames=("block", "compute", "target"))
def _matmuls(
    x: jax.Array,
    pairs: tuple[tuple[jax.Array, jax.Array | None], ...],
    block: Block,
    compute: np.dtype | None,
    target: Target,
) -> tuple[jax.Array, ...]:
    """`scaled_matmuls` of operands that fit; compiled, so that a shape is traced once wherever it is called from."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    calls, kernels, scales = [], [], []
    for kernel, scale_inv in pairs:
        if scale_inv is not None and not dtypes.is_narrow(kernel.dtype):
            kernel, scale_inv = dequantize(kernel, scale_inv, block), None
        elif scale_inv is None and dtypes.is_narrow(kernel.dtype):
            scale_inv = jnp.ones(grid_shape(kernel.shape, block), jnp.float32)
        calls.append(describe(_known(rows.shape[0]), kernel.shape, x.dtype, kernel.dtype, block, compute))
        kernels.append(kernel)
        scales.append(scale_inv)
    group = _Group(tuple(calls), target)
    if all(call.weight is not None and not dtypes.is_narrow(call.kernel) for call in calls):
        results = _plain(group, rows, tuple(kernels))
    else:
        results = _scaled(group, *vary_alike((rows, tuple(kernels), tuple(scales))))
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in results)


def _known(rows: int) -> int | None:
    """A number of rows, None for a symbol."""
    return rows if isinstance(rows, int) else None


@dataclasses.dataclass(frozen=True)
class _Group:
    """Calls that share x, and what they are compiled for."""

    calls: tuple[Call, ...]
    target: Target

    def run(self, x: jax.Array, kernels: tuple[jax.Array, ...], scales: tuple[jax.Array | None, ...]):
        """The products, by whatever the platform of the lowering calls for; a batch of x becomes rows of it."""

        @jax.custom_batching.custom_vmap
        def products(x, kernels, scales):
            gpu = self.target if self.target.platform == "cuda" else Target("cuda")
            return jax.lax.platform_dependent(
                x, kernels, scales,
                cpu=self._on(Target("cpu")), cuda=self._on(gpu), default=self._on(Target("tpu")),
            )  # fmt: skip

        @products.def_vmap
        def batched(size, batched, x, kernels, scales):
            if not any(jax.tree.leaves(batched[1:])):
                calls = tuple(dataclasses.replace(call, rows=_known(size * x.shape[1])) for call in self.calls)
                rows = x.reshape(size * x.shape[1], x.shape[2])
                results = _Group(calls, self.target).run(rows, kernels, scales)
                return [y.reshape(size, x.shape[1], y.shape[-1]) for y in results], [True] * len(results)
            leaves, tree = jax.tree.flatten((x, kernels, scales))
            mapped = [leaf for leaf, is_mapped in zip(leaves, jax.tree.leaves(batched), strict=True) if is_mapped]

            def one(slices):
                rest = iter(slices)
                flags = zip(leaves, jax.tree.leaves(batched), strict=True)
                return products(*jax.tree.unflatten(tree, [next(rest) if m else leaf for leaf, m in flags]))

            results = jax.lax.map(one, mapped)
            return results, [True] * len(results)

        return products(x, kernels, scales)

    def _on(self, target: Target):
        """The products as `target` carries them out."""
        chosen = [choose(call, target)[0] for call in self.calls]
        products = functools.partial(self._products, chosen)
        if not any(one.opaque for one in chosen):
            return products
        anywhere = [choose(call, Target(target.platform))[0] for call in self.calls]
        return unless_portable(products, functools.partial(self._products, anywhere))

    def _products(self, chosen: list[Implementation], x, kernels, scales) -> list[jax.Array]:
        """The products, each by the implementation chosen for it; neighbours that share one in a single run."""
        if not all(one.opaque for one in chosen):
            # Tied to x, a kernel is nothing that XLA could cast once, outside a decoding loop, and carry along.
            x, kernels, scales = jax.lax.optimization_barrier((x, kernels, scales))
        results: list[jax.Array] = []
        operands = self.operands(x, kernels, scales, chosen[0].quantize)
        for one, group in itertools.groupby(zip(chosen, self.calls, operands, strict=True), key=lambda each: each[0]):
            _, calls, arrays = zip(*group, strict=True)
            results += one.run(calls, arrays)
        return results

    def operands(self, x, kernels, scales, quantize_x=quantize_rows) -> tuple[Operands, ...]:
        """The operands of each call, quantised where the calls say so."""
        call = self.calls[0]
        values, x_scales = quantize_x(x, call.x) if dtypes.is_narrow(call.x) else (x, None)
        pairs = []
        for kernel, scale_inv, call in zip(kernels, scales, self.calls, strict=True):
            if call.weight is None and not dtypes.is_narrow(kernel.dtype):
                assert call.block is not None
                kernel, scale_inv = quantize(kernel, call.kernel, call.block)
            pairs.append((kernel, scale_inv))
        return tuple(Operands(values, x_scales, *pair) for pair in pairs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _plain(group: _Group, x: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Products with plain kernels."""
    return tuple(group.run(x, kernels, (None,) * len(kernels)))


@_plain.defjvp
def _plain_jvp(group, primals, tangents):
    x, kernels = primals
    dx, dkernels = tangents
    results = []
    for call, kernel, dkernel in zip(group.calls, kernels, dkernels, strict=True):
        cast = functools.partial(dtypes.saturating_cast, dtype=call.weight)
        weight, dweight = jax.jvp(cast, (kernel,), (dkernel,))
        dtype = call.weight
        tangent = oracle.dot(dx.astype(dtype), weight) + oracle.dot(x.astype(dtype), dweight)
        results.append(tangent.astype(call.result))
    return _plain(group, x, kernels), tuple(results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled(
    group: _Group, x: jax.Array, kernels: tuple[jax.Array, ...], scales: tuple[jax.Array | None, ...]
) -> tuple[jax.Array, ...]:
    """Products with narrow kernels, or with kernels and activations that are made narrow on the way."""
    return tuple(group.run(x, kernels, scales))


def _scaled_forward(group, x, kernels, scales):
    # A frozen kernel needs nothing of x but its dtype.
    frozen = all(dtypes.is_narrow(kernel.dtype) for kernel in kernels)
    return _scaled(group, x, kernels, scales), (x[:, :0] if frozen else x, kernels, scales)


def _scaled_backward(group, residuals, gradients):
    """dx = gradient @ weight.  Narrow kernels are frozen; rounding, which has no slope, is passed straight through."""
    x, kernels, scales = residuals
    rows = gradients[0].shape[0]
    like = jnp.zeros((rows, group.calls[0].in_features), x.dtype) if x.shape[1] == 0 else x
    dx = jnp.zeros(like.shape, jnp.float32)
    dkernels: list[jax.Array | None] = []
    for call, gradient, kernel, operands in zip(
        group.calls, gradients, kernels, group.operands(like, kernels, scales), strict=True
    ):
        dx = dx + _gradient_of_x(call, gradient, operands)
        if dtypes.is_narrow(kernel.dtype):
            dkernels.append(None)
            continue
        rounded = widen_rows(operands.x, operands.x_scales)
        dkernels.append(oracle.dot(gradient.astype(jnp.float32).T, rounded.T).astype(kernel.dtype))
    return dx.astype(x.dtype), tuple(dkernels), None


_scaled.defvjp(_scaled_forward, _scaled_backward)


def _gradient_of_x(call: Call, gradient: jax.Array, operands: Operands) -> jax.Array:
    """gradient (rows, out) @ weight (out, in) in float32: on a CPU slab by slab, elsewhere with the weight widened."""

    def widened(gradient: jax.Array, operands: Operands) -> jax.Array:
        # Of 16-bit gradients the product with a 16-bit weight is as exact as they are.
        dtype = call.weight or np.dtype(jnp.bfloat16 if gradient.dtype == jnp.bfloat16 else np.float32)
        return oracle.dot(gradient.astype(dtype), oracle.wide_weight(operands, call.block, dtype).T)

    return jax.lax.platform_dependent(
        gradient, operands, cpu=functools.partial(cpu.gradient_of_x, call), default=widened
    )


def _check(
    x: jax.Array, kernel: jax.Array, scale_inv: ArrayLike | None, block: Block, compute: np.dtype | None
) -> None:
    if not dtypes.is_activation(x.dtype):
        raise UnsupportedCast(f"activations are f32, bf16 or f16, found {x.dtype}. Cast x first.")
    if x.ndim < 1 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[1]:
        raise UnsupportedCast(
            f"x of shape {x.shape} and a kernel of shape {kernel.shape} do not meet: "
            "expected (..., in) and (out, in), the kernel as checkpoints store it."
        )
    if not dtypes.is_floating(kernel.dtype) and (scale_inv is None or not dtypes.is_narrow(kernel.dtype)):
        raise UnsupportedCast(f"a kernel is a float, or int8 with scales, found {kernel.dtype}.")
    if (
        compute is not None
        and not dtypes.is_activation(compute)
        and (compute.kind == "i" or not dtypes.is_narrow(compute))
    ):
        raise UnsupportedCast(f"compute is None, f32, bf16, f16 or a float8 type, found {dtypes.dtype_name(compute)}.")
    if scale_inv is not None:
        check_grid(kernel.shape, jnp.shape(scale_inv), block)
