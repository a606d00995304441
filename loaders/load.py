"""`load_model` and `load_params`: read a checkpoint in slabs of rows, and place its arrays on their devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..models.decoder import Decoder, assemble
from ..models.sharding.arrays import as_model_sharding, shardings
from ..policies.errors import InvalidSharding, UnknownDtype, named
from ..policies.paths import scale_path
from ..policies.presets import PolicyLike, get_policy
from ..policies.resolved import Resolved, ResolvedParam, resolve
from ..policies.scaled_array import ScaledArray
from .bare import BareCheckpoint, open_parameters, warn_if_guessed
from .checkpoint import Checkpoint, open_checkpoint
from .placement import Placement
from .progress import Progress
from .slabs import in_turn, run


def load_model(
    path: str | os.PathLike[str],
    policy: PolicyLike = None,
    *,
    sharding: Any = None,
    revision: str | None = None,
    progress: bool | None = None,
) -> Decoder:
    """The model of a Hugging Face checkpoint, stored and computed as `policy` says.

    path      a folder, or the name of a repository on the Hugging Face hub, such as "Qwen/Qwen3-8B-FP8", which is
              downloaded into the hub's cache
    policy    anything `get_policy` accepts. None keeps every tensor bit for bit as in the files, computes narrow
              kernels weight-only in the config's dtype, and returns logits in that dtype; "bf16" and "f32" dequantise
              during loading
    sharding  None: JAX's default device. A `jax.sharding.Mesh`: tensor-parallel over its last axis (see
              `tensor_parallel`). A `Sharding`: the sharding of all parameters. A mapping from patterns to
              `NamedSharding`s: the first pattern that matches, "default" for the others
    revision  branch, tag or commit of the repository
    progress  whether to show a progress bar on stderr; None: only if that is a terminal

    The class of the model follows from `model_type` in config.json: `Qwen3`, `Qwen3Moe`, `Qwen2` or `Llama`. A device
    receives only its slice of every parameter. In several processes (`jax.distributed`), each reads only what its own
    devices need, and `sharding` makes one model of all. On a CPU, the memory that a file is read into becomes the
    array, without a copy. Besides the model, loading takes the memory of at most two parameters on a GPU, and of a few
    slabs on a CPU.

    Raises:
      MissingFile, InvalidCheckpoint, UnsupportedConfig: files that are missing, damaged or contradictory, or a model
        that is not implemented.
      UnmatchedRule, ShadowedRule: a rule of the policy, or a pattern of `sharding`, that decides nothing.
      InvalidSharding: an axis that cannot be divided evenly among its devices.
      InvalidScale: scales that are not positive finite numbers.
      UnknownDtype: a parameter would be stored as float64 while `jax_enable_x64` is off.
    """
    checkpoint = open_checkpoint(path, revision=revision, progress=progress)
    resolved = resolve(get_policy(policy), checkpoint.tree)
    parameters = _load(checkpoint, resolved, sharding, progress)
    sharded = as_model_sharding(sharding)
    return assemble(checkpoint.family.model, checkpoint.config, resolved, parameters, sharding=sharded)


def load_params(
    path: str | os.PathLike[str],
    policy: PolicyLike = None,
    *,
    sharding: Any = None,
    revision: str | None = None,
    progress: bool | None = None,
    bare: bool | None = None,
    scaled: bool = False,
) -> dict[str, Any]:
    """The parameters of any safetensors checkpoint as a dict by path, without a model.

    path    a safetensors file, or a folder or a name on the hub as for `load_model`
    bare    which paths the parameters have. False: those of perparam's model, `{"layers/0/mlp/up_proj/kernel": …}`.
            True: the names in the files, with "/" for ".": `{"encoder/layer/0/output/dense/weight": …}`. None: those
            of the model if config.json has a `model_type` that is implemented, and else the names in the files; a
            warning says so if there is a config.json
    scaled  whether a narrow parameter is one `ScaledArray`, which includes its block; else its scales have a path of
            their own, such as "layers/0/mlp/up_proj/scale_inv" or "encoder/layer/0/output/dense/weight_scale_inv"

    Other arguments and errors are those of `load_model`. 64-bit integers are NumPy arrays, unless `jax_enable_x64` is
    on, since JAX would truncate them. `save_params` is the inverse.
    """
    checkpoint = open_parameters(path, revision=revision, progress=progress, bare=bare)
    warn_if_guessed(checkpoint, bare)
    resolved = resolve(get_policy(policy), checkpoint.tree)
    loaded = _load(checkpoint, resolved, sharding, progress)
    if not scaled:
        return loaded
    pairs = {
        path: ScaledArray(loaded[path], loaded.pop(scale_path(path)), format)
        for path, format in resolved.formats.items()
    }
    return {**loaded, **pairs}


def _load(
    checkpoint: Checkpoint | BareCheckpoint, resolved: Resolved, layout: Any, progress: bool | None
) -> dict[str, Any]:
    """{path: array} of all parameters and scales, in the order of the checkpoint's tree."""
    stored = resolved.stored
    doubles = [path for path, info in stored.items() if info.dtype == np.float64]
    if doubles and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        rules = ", ".join(f'"{path}": "f32"' for path in doubles)
        policy = f"Policy({{{rules}}})" if len(doubles) <= 3 else '"f32"'
        raise UnknownDtype(
            f"{', '.join(map(named, doubles[:3]))}: float64 needs jax_enable_x64: without it JAX uses float32. Enable "
            f"it, or load under a policy that stores another dtype, such as {policy}."
        )
    where = shardings(layout, checkpoint.config, stored)
    if any(isinstance(each, NamedSharding) and not isinstance(each.mesh, Mesh) for each in where.values()):
        raise InvalidSharding("sharding: loading needs a mesh of devices, found an AbstractMesh, which has none.")
    loaded: dict[str, Any] = {}

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


def in_file_order(checkpoint: Checkpoint | BareCheckpoint, resolved: Resolved) -> list[ResolvedParam]:
    """The parameters in the order of their data, so that each file is read from beginning to end."""

    def place(param: ResolvedParam) -> tuple[Any, int]:
        tensor = checkpoint.tensors[param.path]
        return tensor.file, tensor.offset

    return sorted(resolved.params.values(), key=place)
