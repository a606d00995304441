"""`ModelSharding`: which mesh axes shard which logical axes, with presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from ...policies.errors import InvalidSharding, shown

MeshAxes = str | tuple[str, ...] | None

LOGICAL_AXES = ("batch", "vocab", "embed", "heads", "kv_heads", "mlp", "experts", "expert_mlp")


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSharding:
    """How a model is sharded over a mesh: its parameters by their logical axes, and its activations by their batch.

    mesh      the devices
    axes      {logical axis: the mesh axes over which it is divided}; logical axes that are left out are not divided
    patterns  {pattern of paths: PartitionSpec} of parameters that differ from that; the first that matches decides,
              and "?" at its end allows it to match nothing

    The logical axes are `batch`, of activations; `vocab`, `embed` (hidden size), `heads`, `kv_heads`, `mlp`, `experts`
    and `expert_mlp`, of parameters; `models/sharding/axes.py` has those of each parameter. One that does not divide
    evenly among its devices, such as 8 kv heads among 16 devices, is not divided.

    A mesh axis that divides both the batch and a kernel is one of FSDP: a device gathers the kernel, in its narrow
    bytes, for the time of its product. A mesh axis that divides a kernel and not the batch is tensor parallel: each
    device multiplies with its part of the kernel. A mesh axis that divides `experts` is expert parallel.

    Raises:
      InvalidSharding: no mesh; a name that is no logical axis, or no axis of the mesh, or that occurs twice; a pattern
        without a PartitionSpec.
    """

    mesh: Mesh
    axes: Mapping[str, MeshAxes]
    patterns: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Normalises the mesh, with axes that are Auto, and the axes, and checks names."""
        mesh_axes(self.mesh)
        object.__setattr__(self, "mesh", auto_mesh(self.mesh))
        for name in self.axes:
            if name not in LOGICAL_AXES:
                raise InvalidSharding(
                    f"sharding: no logical axis {name!r}. Write some of these: {', '.join(LOGICAL_AXES)}."
                )
        axes = {name: self._names(mesh_axes, name) for name, mesh_axes in sorted(self.axes.items())}
        object.__setattr__(self, "axes", axes)
        for pattern, spec in self.patterns.items():
            if not isinstance(spec, PartitionSpec):
                raise InvalidSharding(f"sharding: {pattern!r} needs a PartitionSpec, found {shown(spec)}.")
            self._names(tuple(name for each in spec for name in self._names(each, pattern)), pattern)

    def _names(self, mesh_axes: Any, of: str) -> tuple[str, ...]:
        """The names of mesh axes, after checking them; `of` is what they divide."""
        names = (mesh_axes,) if isinstance(mesh_axes, str) else () if mesh_axes is None else mesh_axes
        if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
            raise InvalidSharding(f"sharding: {of!r} needs names of mesh axes, found {shown(mesh_axes)}.")
        for i, name in enumerate(names):
            if name not in self.mesh.axis_names:
                raise InvalidSharding(
                    f"sharding: the mesh has no axis {name!r} ({of}). It has {', '.join(self.mesh.axis_names)}."
                )
            if name in names[:i]:
                raise InvalidSharding(f"sharding: {of!r} has the mesh axis {name!r} twice.")
        return tuple(names)

    def _key(self) -> tuple[Any, ...]:
        return self.mesh, tuple(self.axes.items()), tuple(self.patterns.items())

    def __eq__(self, other: object) -> bool:
        # The order of patterns counts, since the first that matches decides.
        return isinstance(other, ModelSharding) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def divided(self, sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
        """{logical axis: mesh axes} of the axes that divide evenly; the batch's are always among them.

        sizes  {logical axis: its size}
        """
        found = {name: as_names(mesh_axes) for name, mesh_axes in self.axes.items()}
        return {
            name: names
            for name, names in found.items()
            if names and (name == "batch" or (name in sizes and sizes[name] % self.devices(names) == 0))
        }

    def devices(self, names: tuple[str, ...]) -> int:
        """The number of devices along these mesh axes."""
        count = 1
        for name in names:
            count *= self.mesh.shape[name]
        return count

    @property
    def batch(self) -> tuple[str, ...]:
        """The mesh axes over which the batch is divided."""
        return as_names(self.axes.get("batch"))


def tensor_parallel(mesh: Mesh) -> ModelSharding:
    """Tensor parallelism over the last axis of `mesh` (Megatron-LM, arXiv:1909.08053); the others divide the batch.

    Projections are divided by heads and by the width of the MLP, experts too; the embedding and the head by vocabulary.
    """
    *rest, last = mesh_axes(mesh)
    return ModelSharding(mesh, {"batch": tuple(rest), **_within_layers(last)})


def fsdp(mesh: Mesh) -> ModelSharding:
    """Fully sharded data parallelism over all axes of `mesh` (ZeRO stage 3, arXiv:1910.02054).

    Parameters are divided by hidden size. A kernel is gathered, in its narrow bytes, for the time of its product.
    """
    return ModelSharding(mesh, dict.fromkeys(("batch", "embed"), mesh_axes(mesh)))


def fsdp_tensor_parallel(mesh: Mesh) -> ModelSharding:
    """`fsdp` over all axes of `mesh` but the last, and `tensor_parallel` over that."""
    *rest, last = mesh_axes(mesh)
    return ModelSharding(mesh, {"batch": tuple(rest), "embed": tuple(rest), **_within_layers(last)})


def expert_parallel(mesh: Mesh) -> ModelSharding:
    """Expert parallelism over the last axis of `mesh`, and the batch over all axes (GShard, arXiv:2006.16668).

    Each device has some of the experts, and tokens travel to them; other parameters are replicated.
    """
    return ModelSharding(mesh, {"batch": mesh_axes(mesh), "experts": mesh_axes(mesh)[-1]})


def mesh_axes(mesh: Mesh) -> tuple[str, ...]:
    """The names of the axes of a mesh.

    Raises:
      InvalidSharding: it is no mesh.
    """
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise InvalidSharding(f"sharding: expected a jax.sharding.Mesh, found {shown(mesh)}.")
    return tuple(mesh.axis_names)


def _within_layers(axis: str) -> dict[str, MeshAxes]:
    return dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "expert_mlp"), axis)


def as_names(mesh_axes: MeshAxes) -> tuple[str, ...]:
    """The names of mesh axes, as a tuple."""
    return () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


def auto_mesh(mesh: Mesh) -> Mesh:
    """The mesh with axes that XLA partitions, which models need; `jax.make_mesh` makes Explicit ones by default."""
    auto = (AxisType.Auto,) * len(mesh.axis_names)
    if not isinstance(mesh, Mesh):  # an AbstractMesh, for its shape alone
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=auto)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
