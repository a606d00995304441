"""Implementations for one platform, with the derivatives and batches of a function that JAX can handle anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ..policies.matmul.portable import unless_portable


def by_kernel(platform: str, kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`; on this platform its implementation `kernel`, in programs that can contain it."""
    opaque = unless_portable(kernel, plain, exportable=False)

    def dispatched(*operands: Any) -> Any:
        return jax.lax.platform_dependent(*operands, **{platform: opaque}, default=plain)

    return differentiated_as(plain, dispatched)


def differentiated_as(plain: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, an implementation of `plain`; its derivatives and batches are those of `plain`.

    A value that is differentiated has the bits of `function` too, so that a model in training and one that generates
    agree about the probabilities of tokens.  XLA removes what only the value of `plain` needs.
    """
    result = jax.custom_jvp(batched_as(plain, function))

    @result.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        _, tangent = jax.jvp(plain, primals, tangents)
        return result(*primals), tangent

    return result


def batched_as(plain: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, an implementation of `plain`; its batches (`vmap`) are those of `plain`."""
    result = jax.custom_batching.custom_vmap(function)

    @result.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        results = jax.vmap(plain, in_axes=tuple(axes), axis_size=size)(*operands)
        return results, jax.tree.map(lambda _: True, results)

    return result
