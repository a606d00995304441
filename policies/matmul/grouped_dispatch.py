"""Chooses the implementation of a grouped call at trace time, by target, shapes and formats."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax

from ..targets import Target
from .dispatch import override
from .grouped_calls import GroupedCall, GroupedImplementation, Kernel
from .grouped_loop import LOOP
from .portable import unless_portable

_TARGETS: dict[tuple[str, tuple[int, int] | None], tuple[GroupedImplementation, ...]] = {}
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
    gpu = call.target if call.target.platform == "cuda" else Target("cuda")
    chosen = {platform: choose(call, target) for platform, target in (("cpu", Target("cpu")), ("cuda", gpu))}
    loop = functools.partial(LOOP.run, call)
    branches = {platform: _branch(call, one, loop) for platform, one in chosen.items() if one is not LOOP}
    if not branches:
        return loop(x, kernels, group_sizes)
    results: tuple[jax.Array, ...] = jax.lax.platform_dependent(x, kernels, group_sizes, default=loop, **branches)
    return results


def _branch(
    call: GroupedCall,
    implementation: GroupedImplementation,
    loop: Callable[[jax.Array, Sequence[Kernel], jax.Array], tuple[jax.Array, ...]],
) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a function that runs an implementation, or the loop in programs that cannot contain its kernel."""
    run = functools.partial(implementation.run, call)
    return unless_portable(run, loop, implementation.exportable) if implementation.opaque else run
