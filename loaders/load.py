"""`load_model` and `load_params`: from a folder to arrays on their devices, a slab of rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ..models.qwen3 import Qwen3, assemble
from ..models.sharding import shardings
from ..policies.blocks import grid_shape
from ..policies.plan import explain
from ..policies.policy import ParamSpec, Policy
from ..policies.presets import get_policy
from ..policies.slots import scale_path
from ..policies.storage import Step, plan_storage
from ..policies.trees import Found
from .checkpoint import Checkpoint, open_checkpoint
from .hub import local_folder
from .placement import Placement
from .progress import Progress
from .safetensors_file import Tensor
from .slabs import Job, in_turn, run


def load_model(
    path: str | os.PathLike[str],
    policy: Any = None,
    *,
    sharding: Any = None,
    revision: str | None = None,
    progress: bool | None = None,
) -> Qwen3:
    """The Qwen3 in a Hugging Face folder, stored and computed as `policy` says.

    path      a folder, or the name of a repository on the Hugging Face hub ("Qwen/Qwen3-8B-FP8"), which is downloaded
              into the hub's cache
    policy    anything `get_policy` takes.  None keeps every tensor bit for bit as the files have it, computes narrow
              kernels weight-only in the config's dtype and returns that dtype; "bf16" and "f32" dequantise on load
    sharding  None: JAX's default device.  A `jax.sharding.Mesh`: tensor-parallel over its last axis (see
              `tensor_parallel`).  A `Sharding`: all parameters so.  A mapping from patterns to `NamedSharding`s: the
              first that matches, "default" for the others
    revision  a branch, tag or commit of the repository
    progress  a bar on stderr with bytes and rate; None: where that is a terminal

    A device receives its slice of every parameter and nothing else; on a CPU what was read becomes the array without a
    copy.  Beyond the model, loading takes the memory of at most two parameters on a GPU, and of a few slabs on a CPU.

    Raises:
      MissingFile, InvalidCheckpoint, UnsupportedConfig: files that are not there, damaged, or not what they promise.
      UnmatchedRule, ShadowedRule: a rule of the policy that decides nothing, or a pattern of `sharding`.
      InvalidSharding: an axis that does not divide among its devices.
      InvalidScale: scales that are not positive finite numbers.
    """
    policy, checkpoint = get_policy(policy), open_checkpoint(local_folder(path, revision, progress=progress))
    steps = _steps(checkpoint, policy)
    specs = {where: ParamSpec(step.storage, step.scale, block=step.block) for where, step in steps.items()}
    return assemble(checkpoint.config, policy, specs, _load(checkpoint, steps, sharding, progress))


def load_params(
    path: str | os.PathLike[str],
    policy: Any = None,
    *,
    sharding: Any = None,
    revision: str | None = None,
    progress: bool | None = None,
) -> dict[str, jax.Array]:
    """The parameters of a checkpoint by path, `{"layers/0/mlp/up_proj/kernel": …}`, without a model.

    Arguments and errors are those of `load_model`; a pair has its kernel and, beside it, its `scale_inv`.
    """
    checkpoint = open_checkpoint(local_folder(path, revision, progress=progress))
    return _load(checkpoint, _steps(checkpoint, get_policy(policy)), sharding, progress)


def _steps(checkpoint: Checkpoint, policy: Policy) -> dict[str, Step]:
    """What storage does with every parameter."""
    explain(policy, checkpoint.tree, checkpoint.config.dtype)  # strict in all slots
    return plan_storage(policy, checkpoint.found)[0]


def _load(
    checkpoint: Checkpoint, steps: Mapping[str, Step], layout: Any, progress: bool | None
) -> dict[str, jax.Array]:
    """All arrays in the order of the checkpoint's tree."""
    stored = stored_parameters(checkpoint.found, steps)
    where = shardings(layout, checkpoint.config, stored)
    loaded: dict[str, jax.Array] = {}

    def work(job: Job, report: Callable[[int], None]) -> dict[str, Placement]:
        placements = {
            path: Placement(stored[path].shape, stored[path].dtype, where[path])
            for path in (job.path, scale_path(job.path))
            if path in stored
        }
        run(job, placements[job.path], placements.get(scale_path(job.path)), report)
        return placements

    jobs = jobs_of(checkpoint, steps)
    with Progress(f"loading {checkpoint.folder.name}", sum(job.bytes for job in jobs), progress) as bar:
        for _, placements in in_turn(jobs, work, bar):
            loaded |= {path: placement.array() for path, placement in placements.items()}
    return {path: loaded[path] for path in stored}


def jobs_of(checkpoint: Checkpoint, steps: Mapping[str, Step]) -> list[Job]:
    """A job for every parameter of a checkpoint, in the order of the files: read from front to back."""
    tensors = checkpoint.tensors

    def place(path: str) -> tuple[Any, int]:
        tensor: Tensor = tensors[path]
        return tensor.file, tensor.offset

    return [Job(path, steps[path], tensors[path], tensors.get(scale_path(path))) for path in sorted(steps, key=place)]


def stored_parameters(found: Mapping[str, Found], steps: Mapping[str, Step]) -> dict[str, Found]:
    """Shape, dtype and block of every parameter and of all scales once storage is done with them, by path."""
    stored = {}
    for path, step in steps.items():
        shape = found[path].shape
        stored[path] = Found(shape, step.storage, step.block)
        if step.scale is not None:
            assert step.block is not None
            stored[scale_path(path)] = Found(grid_shape(shape, step.block), step.scale)
    return stored
