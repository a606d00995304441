"""Chooses the implementation of a grouped call at trace time, and runs it on the platform of the lowering."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..checks import Check, check
from ..formats import Format
from ..targets import Target
from . import dispatch, grouped_loop, grouped_native, hopper_grouped
from .dispatch import Choice, describe, override
from .grouped_calls import GroupedCall, GroupedImplementation, Kernel
from .grouped_loop import LOOP, tile_height
from .portable import unless_portable

_TARGETS: dict[tuple[str, tuple[int, int] | None], tuple[GroupedImplementation, ...]] = {
    ("cpu", None): (grouped_native.NATIVE,),
    ("cuda", (9, 0)): (hopper_grouped.GROUPED,),
}
"""Implementations in order of preference, by platform and compute capability (None: any); after them, and for others,
the loop."""

LOOP_OF = "loop of "
"""How names in plans begin where the loop computes a product."""


def candidates(target: Target) -> tuple[GroupedImplementation, ...]:
    """Returns the implementations for `target` in order of preference."""
    return *_TARGETS.get((target.platform, target.capability), _TARGETS.get((target.platform, None), ())), LOOP


def choose(call: GroupedCall, target: Target, *, run_checks: bool = True) -> tuple[GroupedImplementation, Choice]:
    """Returns the first implementation for `target` that accepts the call, and its description as a Choice.

    A kernel that differs from the reference on this device does not accept the call.  An implementation of
    `matmul_override` that is none of these computes the products of the loop.

    run_checks  False: only results of earlier checks count
    """
    named, refused, checks = override(), dict[str, str](), list[Check]()
    for one in candidates(target):
        if one is not LOOP and named not in (None, one.name):
            continue
        why = one.refuses(call)
        if why is None and one.trial is not None:
            checks.append(check(one.trial(call), target, run=run_checks))
            why = "its check failed" if checks[-1].state == "refused" else None
        if why is None:
            return one, Choice(one.name, one.gist, tuple(refused.items()), tuple(checks))
        refused[one.name] = why
    raise AssertionError(f"the loop does not accept {call}")


def grouped_plan(
    rows: int,
    kernel_shape: tuple[int, int, int],
    *,
    x: np.dtype,
    kernel: Format,
    compute: Format | None,
    target: Target,
) -> Choice:
    """Returns the implementation that `grouped_matmul` chooses, and the reason, as `matmul_plan` does.

    rows          rows of x, of all groups together
    kernel_shape  (groups, out, in)
    x             dtype of x
    kernel        format of the kernels, complete
    compute       format of `grouped_matmul`'s argument `compute`

    The name of the loop is that of the implementation of its products after `LOOP_OF`.
    """
    groups, *shape = kernel_shape
    one = describe(rows, tuple(shape), x, kernel, compute)
    call = GroupedCall(groups, (one,), (kernel,), x, compute, target)
    chosen, choice = choose(call, target, run_checks=False)
    if chosen is not LOOP:
        return choice
    tile = describe(tile_height(rows, groups), tuple(shape), x, kernel, compute)
    product = dispatch.choose(tile, target, x, run_checks=False)[1]
    reasons = tuple((dict(product.refused) | dict(choice.refused)).items())
    return Choice(f"{LOOP_OF}{product.implementation}", LOOP.gist, reasons, (*choice.checks, *product.checks))


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
) -> tuple[jax.Array, tuple[Kernel | None, ...]]:
    """Returns the gradients of x and of the kernels, None for one that is frozen, given those of the products."""
    if call.backward is not None or any(map(grouped_loop.is_trained, kernels)):
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
        chosen, _ = choose(call, target)
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
