"""`scaled_matmul` and `scaled_matmuls`, the matmul of every linear layer, with their batching and differentiation."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .. import dtypes
from ..blocks import DEFAULT_BLOCK, Block, as_block, check_grid, grid_shape
from ..errors import UnsupportedCast
from ..formats import Format, as_format, stored_format
from ..scaled_array import ScaledArray, quantize, scaled_array
from ..scales import F32
from ..targets import Target, here
from ..trainable import TrainableValues
from . import oracle
from .backward import (
    check_backward,
    columns,
    cotangent,
    frozen,
    gradient_of_kernel,
    transposed,
    with_empty_proxy,
)
from .calls import BY_XLA, Call, Implementation, Operands, Quantizer
from .dispatch import choose, describe, portable
from .gradients import gradient_of_x
from .portable import unless_portable
from .shards import vary_alike

Kernel = jax.Array | ScaledArray
Pair = ScaledArray | tuple[ArrayLike, ArrayLike | None]


def scaled_matmul(
    x: ArrayLike,
    kernel: ArrayLike | ScaledArray,
    scale_inv: ArrayLike | None = None,
    *,
    block: Block = DEFAULT_BLOCK,
    compute: Any = None,
    result: DTypeLike | None = None,
    backward: Any = None,
) -> jax.Array:
    """Returns `x @ (kernel * scale_inv).T` in x's dtype, accumulated in float32.

    x          (..., in)   f32, bf16 or f16
    kernel     (out, in)   any float, or int8 with scales, in the layout of checkpoints; or a ScaledArray, which has
                           its scales and block
    scale_inv  (ceil(out/block[0]), ceil(in/block[1]))  multipliers of the blocks; None means 1
    result     dtype of the product (..., out); None: x's dtype. float32 leaves the sums unrounded
    backward   format of the products that give the gradients; None: those of x in x's dtype, those of the kernel in
               that and float32. A float8 type: both operands narrow (W8A8), see `narrow_backward`

    `compute` is the format of the operands in the product:

    None                  a narrow kernel as stored, scaled in the product, and x in its own dtype (W8A16); a kernel
                          that is not narrow in x's dtype
    a float8 type         both narrow (W8A8): each row of x is quantised as the kernel's format specifies, by default in
                          blocks of 128 columns; a kernel that is not narrow is quantised in blocks of `block`
    a format or its name  likewise, with each row of x quantised as this format specifies
    f32, bf16, f16        the weight and x cast to this dtype

    The implementation depends on the device and the shapes: see `matmul_plan`.

    >>> kernel, scale_inv = quantize(jnp.eye(3) * 2, "f8_e4m3fn", (2, 2))
    >>> scaled_matmul(jnp.ones((1, 3)), kernel, scale_inv, block=(2, 2)).tolist()
    [[2.0, 2.0, 2.0]]

    Raises:
      InvalidScale: if the shape of the scales does not fit the kernel.
      UnsupportedCast: if shapes do not match or a dtype is not supported.
    """
    if not isinstance(kernel, ScaledArray):
        pairs = [(kernel, scale_inv)]
        return scaled_matmuls(x, pairs, block=block, compute=compute, result=result, backward=backward)[0]
    if scale_inv is not None or as_block(block) not in (DEFAULT_BLOCK, kernel.format.block):
        raise UnsupportedCast("a ScaledArray includes its scales and its block. Pass neither beside it.")
    return scaled_matmuls(x, [kernel], compute=compute, result=result, backward=backward)[0]


def scaled_matmuls(
    x: ArrayLike,
    pairs: Sequence[Pair | Any],
    *,
    block: Block = DEFAULT_BLOCK,
    compute: Any = None,
    result: DTypeLike | None = None,
    backward: Any = None,
) -> tuple[jax.Array, ...]:
    """Returns the `scaled_matmul` of one x with each of several kernels, which some devices compute in one launch.

    pairs  for each kernel a ScaledArray or (kernel, scale_inv), as for `scaled_matmul`; out may differ

    >>> [y.shape for y in scaled_matmuls(jnp.ones((2, 4)), [(jnp.ones((3, 4)), None), (jnp.ones((5, 4)), None)])]
    [(2, 3), (2, 5)]
    """
    x, block = jnp.asarray(x), as_block(block)
    format = None if compute is None else as_format(compute)
    _check_compute(format)
    of_gradients = None if backward is None else as_format(backward)
    check_backward(of_gradients)
    kernels = tuple(_kernel(x, pair, block) for pair in pairs)
    dtype = np.dtype(x.dtype) if result is None else dtypes.as_dtype(result)
    if not dtypes.is_activation(dtype):
        raise UnsupportedCast(f"result: expected f32, bf16 or f16, found {dtypes.dtype_name(dtype)}.")
    return _matmuls(x, kernels, block, format, dtype, here(), of_gradients) if kernels else ()


def _kernel(x: jax.Array, pair: Pair | Any, block: Block) -> Kernel:
    """Returns one kernel as an array or ScaledArray, after checking that it fits x."""
    if isinstance(pair, ScaledArray):
        _check(x, pair.values, pair.scale_inv, pair.block)
        return pair
    kernel, scale_inv = pair
    if isinstance(kernel, TrainableValues):
        scale_inv = jnp.ones(grid_shape(kernel.shape, block), jnp.float32) if scale_inv is None else scale_inv
        _check(x, kernel.values, scale_inv, block)
        return scaled_array(kernel, scale_inv, block)
    array = jnp.asarray(kernel)
    _check(x, array, scale_inv, block)
    return array if scale_inv is None else scaled_array(array, scale_inv, block)


@functools.partial(jax.jit, static_argnames=("block", "compute", "result", "target", "backward"))
def _matmuls(
    x: jax.Array,
    kernels: tuple[Kernel, ...],
    block: Block,
    compute: Format | None,
    result: np.dtype,
    target: Target,
    backward: Format | None = None,
) -> tuple[jax.Array, ...]:
    """Returns the products for checked operands; compiled, so that calls with equal shapes are traced once."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    calls, arrays = [], list[Kernel]()
    for i, kernel in enumerate(kernels):
        if isinstance(kernel, ScaledArray) and not kernel.format.narrow:
            kernel = kernel.dequantize()
        elif not isinstance(kernel, ScaledArray) and dtypes.is_narrow(kernel.dtype):
            ones = jnp.ones(grid_shape(kernel.shape, block), jnp.float32)
            kernel = ScaledArray(kernel, ones, stored_format(kernel.dtype, block, F32))
        format = kernel.format if isinstance(kernel, ScaledArray) else Format(kernel.dtype, block)
        beside = tuple(other.shape[0] for j, other in enumerate(kernels) if j != i)
        calls.append(describe(_static(rows.shape[0]), kernel.shape, x.dtype, format, compute, result, beside))
        arrays.append(kernel)
    group = _Group(tuple(calls), target, backward)
    if backward is None and all(call.weight is not None and not call.kernel.narrow for call in calls):
        results = _plain(group, rows, tuple(arrays))
    else:
        results = _scaled(group, *vary_alike((rows, tuple(arrays))))
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in results)


def _static(rows: Any) -> int | None:
    """Returns a number of rows, or None for a symbolic dimension."""
    return rows if isinstance(rows, int) else None


@dataclasses.dataclass(frozen=True)
class _Group:
    """Calls that share x, the target for which they are traced, and the format of the products in their gradients."""

    calls: tuple[Call, ...]
    target: Target
    backward: Format | None = None

    def run(self, x: jax.Array, kernels: tuple[Kernel, ...]) -> list[jax.Array]:
        """Returns the products, computed by the implementations for the platform of the lowering.

        `vmap` over x alone adds the batch to the rows of x; other batches become a loop.
        """

        @jax.custom_batching.custom_vmap
        def products(x: jax.Array, kernels: tuple[Kernel, ...]) -> list[jax.Array]:
            gpu = self.target if self.target.platform == "cuda" else Target("cuda")
            results: list[jax.Array] = jax.lax.platform_dependent(
                x,
                kernels,
                cpu=self._on(Target("cpu"), x.dtype),
                cuda=self._on(gpu, x.dtype),
                default=self._on(Target("tpu"), x.dtype),
            )
            return results

        @products.def_vmap
        def batched(size: int, batched: Any, x: jax.Array, kernels: tuple[Kernel, ...]) -> Any:
            if not any(jax.tree.leaves(batched[1:])):
                calls = tuple(dataclasses.replace(call, rows=_static(size * x.shape[1])) for call in self.calls)
                rows = x.reshape(size * x.shape[1], x.shape[2])
                results = _Group(calls, self.target).run(rows, kernels)
                return [y.reshape(size, x.shape[1], y.shape[-1]) for y in results], [True] * len(results)
            leaves, tree = jax.tree.flatten((x, kernels))
            mapped = [leaf for leaf, is_mapped in zip(leaves, jax.tree.leaves(batched), strict=True) if is_mapped]

            def one(slices: Any) -> Any:
                rest = iter(slices)
                flags = zip(leaves, jax.tree.leaves(batched), strict=True)
                return products(*jax.tree.unflatten(tree, [next(rest) if m else leaf for leaf, m in flags]))

            results = jax.lax.map(one, mapped)
            return results, [True] * len(results)

        results: list[jax.Array] = products(x, kernels)
        return results

    def gradient_product(self, gradient: jax.Array, kernel: ScaledArray) -> jax.Array:
        """Returns gradient @ kernel.T in float32, with the gradient quantised to the format of `backward`."""
        results: tuple[jax.Array, ...] = _matmuls(gradient, (kernel,), DEFAULT_BLOCK, self.backward, F32, self.target)
        return results[0]

    def _on(self, target: Target, x: np.dtype) -> Callable[..., list[jax.Array]]:
        """Returns a function that computes the products of activations of dtype `x` as is best for `target`."""
        implementations = [choose(call, target, x)[0] for call in self.calls]
        products = functools.partial(self._products, implementations)
        if not any(implementation.opaque for implementation in implementations):
            return products
        others = [portable(call, target.platform) for call in self.calls]
        exportable = all(implementation.exportable for implementation in implementations)
        return unless_portable(products, functools.partial(self._products, others), exportable)

    def _products(
        self, implementations: list[Implementation], x: jax.Array, kernels: tuple[Kernel, ...]
    ) -> list[jax.Array]:
        """Returns the products; adjacent calls with the same implementation are computed in one run."""
        if not all(implementation.opaque for implementation in implementations):
            # Without the barrier XLA may widen a kernel once before a decoding loop, and keep the wide copy in memory.
            x, kernels = jax.lax.optimization_barrier((x, kernels))
        results: list[jax.Array] = []
        pairs = zip(implementations, self.calls, strict=True)
        operands = self.operands(x, kernels, [implementation.quantizer(call) for implementation, call in pairs])
        triples = zip(implementations, self.calls, operands, strict=True)
        for implementation, group in itertools.groupby(triples, key=lambda triple: triple[0]):
            _, calls, arrays = zip(*group, strict=True)
            results += implementation.run(calls, arrays)
        return results

    def operands(
        self,
        x: jax.Array,
        kernels: tuple[Kernel, ...],
        quantizers: Sequence[Quantizer] | None = None,
    ) -> tuple[Operands, ...]:
        """Returns the operands of each call, quantised to its formats; equal activations are quantised once.

        quantizers  for each call what quantises its activations; None: `quantize_rows`
        """
        quantizers = quantizers or [BY_XLA] * len(self.calls)
        keys = [(call.x, quantizer) for call, quantizer in zip(self.calls, quantizers, strict=True)]
        rows: dict[Any, Kernel] = {}
        for format, quantizer in keys:
            if (format, quantizer) not in rows:
                rows[format, quantizer] = quantizer.run(x, format) if format.narrow else x
        quantised = [
            quantize(kernel, call.kernel) if call.weight is None and not isinstance(kernel, ScaledArray) else kernel
            for kernel, call in zip(kernels, self.calls, strict=True)
        ]
        return tuple(Operands(rows[key], kernel) for key, kernel in zip(keys, quantised, strict=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _plain(group: _Group, x: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns products with kernels that are not narrow."""
    return tuple(group.run(x, kernels))


@_plain.defjvp
def _plain_jvp(group: _Group, primals: Any, tangents: Any) -> Any:
    x, kernels = primals
    dx, dkernels = tangents
    results = []
    for call, kernel, dkernel in zip(group.calls, kernels, dkernels, strict=True):
        assert call.weight is not None
        cast = functools.partial(dtypes.saturating_cast, dtype=call.weight)
        weight, dweight = jax.jvp(cast, (kernel,), (dkernel,))
        dtype = call.weight
        tangent = oracle.dot(dx.astype(dtype), weight) + oracle.dot(x.astype(dtype), dweight)
        results.append(tangent.astype(call.result))
    return _plain(group, x, kernels), tuple(results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled(group: _Group, x: jax.Array, kernels: tuple[Kernel, ...]) -> tuple[jax.Array, ...]:
    """Returns products with narrow kernels, with kernels and activations that the calls quantise, or with narrow
    products in the gradients."""
    return tuple(group.run(x, tuple(map(frozen, kernels))))


def _scaled_forward(group: _Group, x: jax.Array, kernels: tuple[Kernel, ...]) -> Any:
    # The gradient of a frozen kernel is not computed: of x only the dtype is needed. So it is of a proxy.
    is_frozen = all(isinstance(kernel, ScaledArray) and kernel.proxy is None for kernel in kernels)
    return _scaled(group, x, kernels), (x[:, :0] if is_frozen else x, tuple(map(with_empty_proxy, kernels)))


def _scaled_backward(group: _Group, residuals: Any, gradients: Any) -> Any:
    """Returns the gradients of x and of the kernels: dx = gradient @ weight, dw = gradient.T @ x as it was multiplied.

    A narrow kernel has a gradient at its proxy, and None without one.

    The derivative of rounding, which is zero almost everywhere, is replaced by 1 (straight-through estimator).
    """
    x, kernels = residuals
    rows = gradients[0].shape[0]
    like = jnp.zeros((rows, group.calls[0].in_features), x.dtype) if x.shape[1] == 0 else x
    dx = jnp.zeros(like.shape, jnp.float32)
    dkernels: list[Kernel | None] = []
    for call, gradient, kernel, operands in zip(
        group.calls, gradients, kernels, group.operands(like, tuple(map(frozen, kernels))), strict=True
    ):
        if group.backward is None:
            # Of a float32 result of 16-bit activations too: dx is rounded to their dtype in any case.
            dx = dx + gradient_of_x(call, gradient.astype(x.dtype), operands)
        else:
            dx = dx + group.gradient_product(gradient, transposed(operands.kernel, group.backward))
        kernel_proxy = kernel.proxy if isinstance(kernel, ScaledArray) else None
        if isinstance(kernel, ScaledArray) and kernel_proxy is None:
            dkernels.append(None)
            continue
        if group.backward is None:
            dkernel = gradient_of_kernel(call, gradient, operands)
        else:
            dkernel = group.gradient_product(gradient.T, columns(like, group.backward))
        wide = kernel if kernel_proxy is None else kernel_proxy
        dkernels.append(cotangent(kernel, dkernel.astype(wide.dtype)))
    return dx.astype(x.dtype), tuple(dkernels)


_scaled.defvjp(_scaled_forward, _scaled_backward)


def _check(x: jax.Array, kernel: jax.Array, scale_inv: ArrayLike | None, block: Block) -> None:
    if not dtypes.is_activation(x.dtype):
        raise UnsupportedCast(f"activations are f32, bf16 or f16, found {x.dtype}. Cast x first.")
    if x.ndim < 1 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[1]:
        raise UnsupportedCast(
            f"x of shape {x.shape} and a kernel of shape {kernel.shape} do not match: "
            "expected (..., in) and (out, in). Transpose a kernel that is stored as (in, out)."
        )
    if not dtypes.is_floating(kernel.dtype) and (scale_inv is None or not dtypes.is_narrow(kernel.dtype)):
        raise UnsupportedCast(
            f"a kernel is a float, or int8 with scales, found {kernel.dtype}. Cast it, or pass its scales."
        )
    if scale_inv is not None:
        check_grid(kernel.shape, jnp.shape(scale_inv), block)


def _check_compute(compute: Format | None) -> None:
    if compute is None or dtypes.is_activation(compute.values):
        return
    if compute.narrow and compute.name is None and (compute.block is not None or compute.scale is not None):
        raise UnsupportedCast("compute is a dtype or a named format. Write it without block and scale.")
    if compute.values.kind == "i" or not compute.narrow:
        raise UnsupportedCast(
            f"compute is None, f32, bf16, f16 or a float8 type, found {dtypes.dtype_name(compute.values)}. "
            "Write one of these."
        )
