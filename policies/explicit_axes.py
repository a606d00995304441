"""Meshes with explicit axes, on which JAX asks for the sharding of every result that it cannot derive.

The arithmetic of blocks reshapes arrays so that a divided axis may be split anywhere.  Here the compiler decides how it
is divided, and results have the sharding of the array that was passed in, as far as it fits them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def on_auto_axes(function: Callable[..., Any], *arrays: jax.Array | None) -> Any:
    """Returns `function(*arrays)`, traced with automatic axes if the first array is on a mesh with explicit ones.

    A result is then divided along an axis as the first array is along the same one, where the number of devices divides
    it, and is replicated along others.
    """
    sharding = jax.typeof(arrays[0]).sharding
    mesh = sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not explicit:
        return function(*arrays)

    def spec(result: Any) -> PartitionSpec:
        axes = zip(result.shape, sharding.spec, strict=False)  # the scales of a flattened array have one axis
        return PartitionSpec(*(names if _divides(mesh, names, size) else None for size, names in axes))

    plain = [x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    results = jax.eval_shape(function, *plain)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, axes=explicit, out_sharding=jax.tree.map(spec, results))(*arrays)


def _divides(mesh: Any, names: Any, size: int) -> bool:
    """Returns whether an axis of `size` can be divided over these axes of a mesh."""
    names = (names,) if isinstance(names, str) else names or ()
    devices: int = math.prod(mesh.shape[name] for name in names)
    return size % devices == 0
