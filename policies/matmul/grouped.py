"""`grouped_matmul` and `grouped_matmuls`: products of groups of rows with a kernel each, as in mixtures of experts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .. import dtypes
from ..errors import UnsupportedCast
from ..formats import Format, as_format
from ..scaled_array import ScaledArray
from ..targets import here
from . import grouped_dispatch
from .backward import check_backward, frozen, with_empty_proxy
from .dispatch import describe
from .grouped_calls import GroupedCall, Kernel
from .shards import vary_alike


def grouped_matmul(
    x: ArrayLike,
    kernel: ArrayLike | ScaledArray,
    group_sizes: ArrayLike,
    *,
    compute: Any = None,
    result: DTypeLike | None = None,
    backward: Any = None,
) -> jax.Array:
    """Returns the `scaled_matmul` (rows, out) of each group of rows of x with the group's own kernel.

    x            (rows, in)           f32, bf16 or f16, sorted by group
    kernel       (groups, out, in)    any float that is not narrow; or a ScaledArray
    group_sizes  (groups,) integers   rows of each group; their sum is `rows`
    compute      as for `scaled_matmul`
    result       likewise
    backward     likewise

    It is `jax.lax.ragged_dot` for kernels with scales, in the layout of checkpoints, and has gradients.

    >>> kernel = jnp.stack([jnp.eye(2), 10 * jnp.eye(2), 100 * jnp.eye(2)])
    >>> grouped_matmul(jnp.array([[1.0, 2.0], [3.0, 4.0]]), kernel, [1, 0, 1]).tolist()
    [[1.0, 2.0], [300.0, 400.0]]

    Raises:
      InvalidScale: if the shape of the scales does not fit the kernel.
      UnsupportedCast: if shapes or sizes do not match, or a dtype is not supported.
    """
    return grouped_matmuls(x, [kernel], group_sizes, compute=compute, result=result, backward=backward)[0]


def grouped_matmuls(
    x: ArrayLike,
    kernels: Sequence[ArrayLike | ScaledArray],
    group_sizes: ArrayLike,
    *,
    compute: Any = None,
    result: DTypeLike | None = None,
    backward: Any = None,
) -> tuple[jax.Array, ...]:
    """Returns the `grouped_matmul` of one x with each of several kernels of the same groups; out may differ."""
    x, sizes = jnp.asarray(x), jnp.asarray(group_sizes)
    arrays = tuple(kernel if isinstance(kernel, ScaledArray) else jnp.asarray(kernel) for kernel in kernels)
    for kernel in arrays:
        _check(x, kernel, sizes)
    if not arrays:
        return ()
    format, dtype = None if compute is None else as_format(compute), None if result is None else dtypes.as_dtype(result)
    of_gradients = None if backward is None else as_format(backward)
    check_backward(of_gradients)
    call = _described(x, arrays, format, dtype, of_gradients)
    results: tuple[jax.Array, ...] = _compiled(call, x, arrays, sizes.astype(jnp.int32))
    return results


def _described(
    x: jax.Array,
    kernels: Sequence[Kernel],
    compute: Format | None,
    result: np.dtype | None,
    backward: Format | None,
) -> GroupedCall:
    """Returns the call of these operands."""
    rows = x.shape[0] if isinstance(x.shape[0], int) else None
    formats = tuple(k.format if isinstance(k, ScaledArray) else Format(np.dtype(k.dtype)) for k in kernels)
    outs = [kernel.shape[1] for kernel in kernels]
    calls = tuple(
        describe(rows, kernel.shape[1:], x.dtype, format, compute, result, (*outs[:i], *outs[i + 1 :]))
        for i, (kernel, format) in enumerate(zip(kernels, formats, strict=True))
    )
    return GroupedCall(kernels[0].shape[0], calls, formats, np.dtype(x.dtype), compute, here(), backward)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(call: GroupedCall, x: jax.Array, kernels: tuple[Kernel, ...], sizes: jax.Array) -> tuple[jax.Array, ...]:
    results: tuple[jax.Array, ...] = _grouped(call, *vary_alike((x, kernels, sizes)))
    return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(call: GroupedCall, x: jax.Array, kernels: tuple[Kernel, ...], sizes: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the products for checked operands."""
    results: tuple[jax.Array, ...] = grouped_dispatch.products(call, x, tuple(map(frozen, kernels)), sizes)
    return results


def _forward(call: GroupedCall, x: jax.Array, kernels: tuple[Kernel, ...], sizes: jax.Array) -> Any:
    return _grouped(call, x, kernels, sizes), (x, tuple(map(with_empty_proxy, kernels)), sizes)


def _backward(call: GroupedCall, residuals: Any, gradients: tuple[jax.Array, ...]) -> Any:
    """Returns the gradients of x and of the kernels: of a ScaledArray at its proxy, and None without one."""
    x, kernels, sizes = residuals
    return *grouped_dispatch.gradients(call, x, kernels, sizes, gradients), None


_grouped.defvjp(_forward, _backward)


def _check(x: jax.Array, kernel: Kernel, sizes: jax.Array) -> None:
    if kernel.ndim != 3 or x.ndim != 2 or x.shape[-1] != kernel.shape[-1]:
        raise UnsupportedCast(
            f"x of shape {x.shape} and a kernel of shape {kernel.shape} do not match: expected (rows, in) and "
            "(groups, out, in)."
        )
    if not isinstance(kernel, ScaledArray) and dtypes.is_narrow(np.dtype(kernel.dtype)):
        raise UnsupportedCast(f"a kernel of {kernel.dtype} needs scales. Pass a ScaledArray.")
    if sizes.shape != kernel.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer) or not sizes.shape[0]:
        raise UnsupportedCast(
            f"group_sizes: expected integers of shape ({kernel.shape[0]},), one for each kernel, found {sizes.dtype} "
            f"{sizes.shape}."
        )
    if not isinstance(sizes, jax.core.Tracer):
        counts = np.asarray(sizes)
        if counts.sum() != x.shape[0] or (counts < 0).any():
            raise UnsupportedCast(
                f"group_sizes: expected sizes of 0 or more whose sum is the {x.shape[0]} rows of x, found "
                f"{counts.tolist()[:8]} with the sum {counts.sum()}."
            )
