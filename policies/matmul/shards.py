"""Over which axes of a mesh arrays vary inside `shard_map`, where nobody else says so."""

from __future__ import annotations

from typing import Any

import jax


def vary_alike(operands: Any) -> Any:
    """The arrays of a tree, each varying over every axis over which any of them does.

    A gradient varies as the result does; back through this it is summed over the axes over which its operand does not.
    """
    return vary(operands, operands)


def vary(results: Any, operands: Any) -> Any:
    """The results of a kernel, varying over the axes over which any operand does: Pallas does not say so itself."""
    leaves = jax.tree.leaves(operands)
    axes = frozenset[str]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))

    def mark(array: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(array).manual_axis_type.varying
        return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(mark, results)
