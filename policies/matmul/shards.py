"""Marks the mesh axes over which arrays vary inside `shard_map`, where JAX does not infer them."""

from __future__ import annotations

from typing import Any

import jax


def vary_alike(operands: Any) -> Any:
    """Returns the arrays of a tree, each marked as varying over every axis over which one of them varies.

    The transpose sums the gradient of an array over the axes over which the array itself does not vary.
    """
    return vary(operands, operands)


def vary(results: Any, operands: Any) -> Any:
    """Returns `results` marked as varying over every axis over which an operand varies.

    Pallas and the FFI do not do so.
    """
    leaves = jax.tree.leaves(operands)
    axes = frozenset[str]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))

    def mark(array: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(array).manual_axis_type.varying
        return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(mark, results)
