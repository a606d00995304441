"""Chooses the implementation of a grouped call at trace time, and runs it on the platform of the lowering."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from ..formats import ScaledArray
from ..targets import Target
from . import grouped_loop, grouped_native
from .dispatch import override
from .grouped_calls import GroupedCall, GroupedImplementation, Kernel
from .grouped_loop import LOOP
from .portable import unless_portable

_TARGETS: dict[tuple[str, tuple[int, int] | None], tuple[GroupedImplementation, ...]] = {
    ("cpu", None): (grouped_native.NATIVE,),
}
"""Implementations in order of preference, by platform and compute capability (None: any); after them, and for others,
the loop."""


def candidates(target: Target) -> tuple[GroupedImplementation, ...]:
    """Returns the implementations for `target` in order of preference."""
    return *_TARGETS.get((target.platform, target.capability), _TARGETS.get((target.platform, None), ())), LOOP


def choose(call: GroupedCall, target: Target) -> GroupedImplementation:
    """Returns the first implementation for `target` that accepts the call.

    An implementation of `matmul_override` that is none of them computes the products of the loop.
    """
    named = override()
    allowed = (one for one in candidates(target) if one is LOOP or named in (None, one.name))
    return next(one for one in allowed if one.refuses(call) is None)


def products(
    call: GroupedCall, x: jax.Array, kernels: tuple[Kernel, ...], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the products, computed by the implementation for the platform of the lowering."""
    operands = x, kernels, group_sizes
    found: tuple[jax.Array, ...] = _by_platform(call, lambda one: one.run, LOOP.run, operands)
    return found


def gradients(
    call: GroupedCall,
    x: jax.Array,
    kernels: tuple[Kernel, ...],
    group_sizes: jax.Array,
    gradients: tuple[jax.Array, ...],
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    """Returns the gradients of x and of the kernels, None for a ScaledArray, given those of the products."""
    if not all(isinstance(kernel, ScaledArray) for kernel in kernels):
        return grouped_loop.gradients(call, x, kernels, group_sizes, gradients)
    operands = x, kernels, group_sizes, gradients
    dx: jax.Array = _by_platform(call, lambda one: one.gradient_of_x, _gradient_of_x, operands)
    return dx, (None,) * len(kernels)


def _gradient_of_x(call: GroupedCall, *operands: Any) -> jax.Array:
    return grouped_loop.gradients(call, *operands)[0]


def _by_platform(
    call: GroupedCall,
    function_of: Callable[[GroupedImplementation], Callable[..., Any] | None],
    loop: Callable[..., Any],
    operands: tuple[Any, ...],
) -> Any:
    """Returns the results of a function of the implementation for the platform of the lowering, or else of the loop's.

    A batch becomes a loop over its elements.
    """
    gpu = call.target if call.target.platform == "cuda" else Target("cuda")
    branches = {}
    for platform, target in (("cpu", Target("cpu")), ("cuda", gpu)):
        chosen = choose(call, target)
        function = None if chosen is LOOP else function_of(chosen)
        if function is not None:
            branches[platform] = _branch(chosen, functools.partial(function, call), functools.partial(loop, call))

    @jax.custom_batching.custom_vmap
    def run(*operands: Any) -> Any:
        default = functools.partial(loop, call)
        return jax.lax.platform_dependent(*operands, default=default, **branches) if branches else default(*operands)

    @run.def_vmap
    def batched(size: int, batched: Any, *operands: Any) -> Any:
        leaves, tree = jax.tree.flatten(operands)
        flags = jax.tree.leaves(batched)

        def one(slices: Any) -> Any:
            rest = iter(slices)
            arrays = [next(rest) if mapped else leaf for leaf, mapped in zip(leaves, flags, strict=True)]
            return run(*jax.tree.unflatten(tree, arrays))

        results = jax.lax.map(one, [leaf for leaf, mapped in zip(leaves, flags, strict=True) if mapped])
        return results, jax.tree.map(lambda _: True, results)

    return run(*operands)


def _branch(
    implementation: GroupedImplementation, function: Callable[..., Any], loop: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a function of an implementation, or that of the loop in programs that cannot contain its kernel."""
    return unless_portable(function, loop, implementation.exportable) if implementation.opaque else function
