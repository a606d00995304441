"""`load_model` and `load_params`: from a folder to arrays on their devices, a slab of rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

from ..models.decoder import Decoder, assemble
from ..models.sharding import shardings
from ..policies.presets import get_policy
from ..policies.resolved import Resolved, ResolvedParam, resolve
from .checkpoint import Checkpoint, open_checkpoint
from .hub import local_folder
from .placement import Placement
from .progress import Progress
from .safetensors.reader import Tensor
from .slabs import in_turn, run


def load_model(
    path: str | os.PathLike[str],
    policy: Any = None,
    *,
    sharding: Any = None,
    revision: str | None = None,
    progress: bool | None = None,
) -> Decoder:
    """The model in a Hugging Face folder, of its family's class, stored and computed as `policy` says.

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
    checkpoint = open_checkpoint(local_folder(path, revision, progress=progress))
    resolved = resolve(get_policy(policy), checkpoint.tree)
    parameters = _load(checkpoint, resolved, sharding, progress)
    return assemble(checkpoint.family.model, checkpoint.config, resolved, parameters)


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
    return _load(checkpoint, resolve(get_policy(policy), checkpoint.tree), sharding, progress)


def _load(checkpoint: Checkpoint, resolved: Resolved, layout: Any, progress: bool | None) -> dict[str, jax.Array]:
    """All arrays in the order of the checkpoint's tree."""
    stored = resolved.stored
    where = shardings(layout, checkpoint.config, stored)
    loaded: dict[str, jax.Array] = {}

    def work(param: ResolvedParam, report: Callable[[int], None]) -> dict[str, Placement]:
        sinks = {path: Placement(info.shape, info.dtype, where[path]) for path, info in param.stored.items()}
        run(param, checkpoint.tensors, sinks, report)
        return sinks

    params = in_file_order(checkpoint, resolved)
    size = sum(param.current.bytes for param in params)
    with Progress(f"loading {checkpoint.folder.name}", size, progress) as bar:
        for _, sinks in in_turn(params, work, bar):
            loaded |= {path: sink.array() for path, sink in sinks.items()}
    return {path: loaded[path] for path in stored}


def in_file_order(checkpoint: Checkpoint, resolved: Resolved) -> list[ResolvedParam]:
    """The parameters in the order of the files, which are then read from front to back."""

    def place(param: ResolvedParam) -> tuple[Any, int]:
        tensor: Tensor = checkpoint.tensors[param.path]
        return tensor.file, tensor.offset

    return sorted(resolved.params.values(), key=place)
