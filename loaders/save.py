"""`save_model` and `convert_checkpoint`: write Hugging Face checkpoints in slabs of rows."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping

import jax
from flax import nnx

from ..models.config import DecoderConfig
from ..models.decoder import CausalLM
from ..policies.errors import InvalidCheckpoint, InvalidPolicy, SaveFailed, UnsupportedExport
from ..policies.hosts import spans_processes
from ..policies.policy import Policy
from ..policies.presets import PolicyLike, get_policy
from ..policies.resolved import Resolved, ResolvedParam, resolve
from ..policies.trees import ArrayInfo, parameters
from .checkpoint import Checkpoint, generation_ids, open_checkpoint
from .export import export
from .families import config_to_json
from .families.config_json import unused_fields
from .infer import describe
from .json_file import read_json
from .layout import CONFIG, GENERATION, INDEX, POLICY, TOKENIZER
from .libraries import Library, check_library
from .load import in_file_order
from .progress import Progress
from .rows import ArrayRows
from .safetensors.writer import in_shards, size_in_bytes, tensor_bytes
from .slabs import Source
from .together import writing
from .write import write_params


def save_model(
    model: CausalLM,
    folder: str | os.PathLike[str],
    policy: PolicyLike = None,
    *,
    for_library: Library | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> pathlib.Path:
    """Saves `model` as a checkpoint in Hugging Face layout, which `load_model` reads; returns the folder.

    folder          replaced as a whole, after all files are written; a folder with files that are not a checkpoint's
                    is an error
    policy          anything `get_policy` accepts; its storage formats are applied to the files. None: the formats of
                    the model, bit for bit
    for_library     "transformers" or "vllm": refuse what that library cannot load; see `loaders/libraries.py`. None:
                    warn if blocks do not divide the sides of kernels, which these two cannot load
    max_shard_size  bytes of a file, or text such as "5GB"
    progress        whether to show a progress bar on stderr; None: only if that is a terminal

    The folder contains safetensors files with their index, config.json with the `quantization_config` of narrow
    kernels, and policy.yaml, which describes the formats and is not read by `load_model`. The tokenizer and
    generation_config.json are copied from the folder that the model was loaded from, if it still exists.

    A model that several processes share (`jax.distributed`) is saved by all of them: each calls this with the same
    folder, on a file system that they share, and writes the parts that it holds.

    Raises:
      UnsupportedExport: the layout cannot describe the parameters: it has narrow kernels in e4m3 with one block size,
        and no other narrow parameters; or `for_library` cannot load them; or `model` is no model of perparam.
        Nothing is written then.
      SaveFailed: the disk is full, or another error of the file system, or another process failed; the folder is then
        unchanged.
      UnmatchedRule, ShadowedRule: a rule of the policy that decides nothing.
      InvalidSize: a `max_shard_size` that is not a size.
    """
    if not isinstance(model, nnx.Module) or not isinstance(getattr(model, "config", None), DecoderConfig):
        raise UnsupportedExport(
            f"save_model: expected a model of perparam, such as load_model returns, found {type(model).__name__}. Save "
            "other parameters, such as Flax variables, with perparam.save_params(tree, folder)."
        )
    policy = get_policy(policy)
    resolved = resolve(policy, model)
    sources = {path: ArrayRows(path, array) for path, array in parameters(model).items()}
    dtype, saved_policy = model.activations, get_policy(model.policy)
    if policy != Policy():
        dtype, saved_policy = policy.activations or model.config.dtype or dtype, policy
    config = dataclasses.replace(model.config, dtype=dtype)
    params = list(resolved.params.values())
    return _write(folder, config, params, sources, saved_policy, size_in_bytes(max_shard_size), progress, for_library)


def convert_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    policy: PolicyLike = None,
    *,
    revision: str | None = None,
    for_library: Library | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> pathlib.Path:
    """Saves the checkpoint `source` in a new folder with the storage formats of `policy`; returns the new folder.

    source    a folder or the name of a repository on the hub, as for `load_model`
    revision  branch, tag or commit of the repository

    The result is that of `load_model` and `save_model`, but only a few slabs of rows are in memory at a time.
    Other arguments and errors are those of these two functions. Of several processes (`jax.distributed`), process 0
    converts, and others raise SaveFailed.
    """
    if jax.process_index() > 0:
        raise SaveFailed(
            f"convert_checkpoint: this is process {jax.process_index()} of {jax.process_count()}, and one process "
            "converts a checkpoint. Call it under `if jax.process_index() == 0:`, or run `perparam convert` before."
        )
    policy, checkpoint = get_policy(policy), open_checkpoint(source, revision=revision, progress=progress)
    if os.path.realpath(source) == os.path.realpath(folder):
        raise InvalidCheckpoint(f"{folder}: a checkpoint cannot be converted into its own folder. Choose another one.")
    resolved = resolve(policy, checkpoint.tree)
    config = dataclasses.replace(checkpoint.config, dtype=policy.activations or checkpoint.config.dtype)
    params, sources = in_file_order(checkpoint, resolved), checkpoint.tensors
    return _write(folder, config, params, sources, policy, size_in_bytes(max_shard_size), progress, for_library)


def shard_sizes(
    checkpoint: Checkpoint, resolved: Resolved, max_shard_size: int | str, for_library: Library | None = None
) -> dict[str, int]:
    """{file name: bytes of data} of the safetensors files that `convert_checkpoint` would write.

    Raises:
      UnsupportedExport: the layout cannot describe the parameters; see `save_model`.
    """
    contents = export(checkpoint.config, resolved.stored)
    check_library(contents, resolved.stored, for_library)
    shards = in_shards(contents.groups, size_in_bytes(max_shard_size))
    return {file: sum(map(tensor_bytes, tensors.values())) for file, tensors in shards.items()}


def _write(
    folder: str | os.PathLike[str],
    config: DecoderConfig,
    params: list[ResolvedParam],
    sources: Mapping[str, Source],
    policy: Policy,
    limit: int,
    progress: bool | None,
    for_library: Library | None,
) -> pathlib.Path:
    """Writes a checkpoint with `params` in their order, from `sources` by path; returns the folder."""
    stored = {path: info for param in params for path, info in param.stored.items()}
    contents = export(config, stored)
    check_library(contents, stored, for_library)
    config = contents.config
    policy = policy if _still_applies(policy, stored) else describe(stored, config)
    together = any(spans_processes(source.array) for source in sources.values() if isinstance(source, ArrayRows))
    shards = in_shards(contents.groups, limit)
    with writing(folder, _is_checkpoint_file, shards, together=together) as (work, writer):
        if work is not None:
            _copy_tokenizer(config, work)
            fields = {**unused_fields(config.source), **config_to_json(config)}
            (work / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            policy.dump(work / POLICY)
        size = sum(param.current.bytes for param in params)
        with Progress(f"saving {pathlib.Path(folder).name}", size, progress) as bar:
            write_params(writer, params, sources, contents.names, bar, together=together)
    return pathlib.Path(folder)


def _still_applies(policy: Policy, stored: Mapping[str, ArrayInfo]) -> bool:
    """Whether `policy` has rules, and none of them names parameters that no longer exist, such as removed scales."""
    try:
        resolve(policy, dict(stored))
    except InvalidPolicy:
        return False
    return policy != Policy()


def _copy_tokenizer(config: DecoderConfig, folder: pathlib.Path) -> None:
    """Copies tokenizer and generation_config.json from the folder the model was loaded from, with the model's ids."""
    if config.source is None:
        return
    for name in (GENERATION, *TOKENIZER):
        path = config.source.parent / name
        if path.is_file():
            shutil.copyfile(path, folder / name)
    if (folder / GENERATION).is_file() and generation_ids(folder, config) != config:
        # The ids were changed after the model was loaded; the other settings are those of the file.
        fields = {**read_json(folder / GENERATION), "eos_token_id": list(config.eos_token_id)}
        text = json.dumps({**fields, "pad_token_id": config.pad_token_id}, indent=2)
        (folder / GENERATION).write_text(text + "\n", encoding="utf-8")


def _is_checkpoint_file(name: str) -> bool:
    """Whether saving writes files of this name."""
    return name in (CONFIG, GENERATION, INDEX, POLICY, *TOKENIZER) or bool(
        re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name)
    )
