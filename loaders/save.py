"""`save_model` and `convert_checkpoint`: Hugging Face folders, written a slab of rows at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..models.config import DecoderConfig
from ..models.decoder import CausalLM
from ..policies.errors import InvalidCheckpoint, InvalidPolicy
from ..policies.policy import Policy
from ..policies.presets import get_policy
from ..policies.resolved import Resolved, ResolvedParam, resolve
from ..policies.trees import ArrayInfo, parameters
from .atomic import new_folder
from .checkpoint import Checkpoint, generation_ids, open_checkpoint
from .export import export
from .families import config_to_json
from .families.config_json import unused_fields
from .infer import describe
from .json_file import read_json
from .layout import CONFIG, GENERATION, INDEX, POLICY, TOKENIZER
from .load import in_file_order
from .progress import Progress
from .rows import ArrayRows
from .safetensors.writer import Writer, in_shards, size_in_bytes, tensor_bytes
from .slabs import Source, in_turn, run


def save_model(
    model: CausalLM,
    folder: str | os.PathLike[str],
    policy: Any = None,
    *,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> pathlib.Path:
    """The folder in which `model` was saved: what transformers, vLLM and `load_model` read.

    folder          is replaced as a whole, and only once all is written; one that holds anything but a checkpoint is
                    refused
    policy          anything `get_policy` takes: its storage is applied on the way.  None: as the model stores it, bit
                    for bit
    max_shard_size  bytes a file, or text such as "5GB"
    progress        a bar on stderr; None: where that is a terminal

    Written are safetensors, their index, config.json with the `quantization_config` of the narrow kernels, and
    policy.yaml, which is there to be read: loading does not ask it unless told to.  The tokenizer and
    generation_config.json come from the folder that the model was loaded from, where that is still there.

    Raises:
      UnsupportedExport: parameters that this layout cannot say: narrow ones that are not kernels in e4m3, in blocks of
        one size.  Nothing is written then.
      SaveFailed: the disk is full, or the file system refuses; the folder is then as it was.
      UnmatchedRule, ShadowedRule, InvalidSize
    """
    policy = get_policy(policy)
    resolved = resolve(policy, model)
    sources = {path: ArrayRows(path, array) for path, array in parameters(model).items()}
    dtype, kept = model.activations, get_policy(model.policy)
    if policy != Policy():
        dtype, kept = policy.activations or model.config.dtype or dtype, policy
    config = dataclasses.replace(model.config, dtype=dtype)
    params = list(resolved.params.values())
    return _write(folder, config, params, sources, kept, size_in_bytes(max_shard_size), progress)


def convert_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    policy: Any = None,
    *,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> pathlib.Path:
    """The folder in which the checkpoint in `source` was saved, its parameters stored as `policy` says.

    It is `save_model` of what `load_model` loads, without a model: a few slabs of rows are in memory at a time.
    Arguments and errors are theirs.
    """
    policy, checkpoint = get_policy(policy), open_checkpoint(source)
    if os.path.realpath(source) == os.path.realpath(folder):
        raise InvalidCheckpoint(f"{folder}: a checkpoint cannot be converted into its own folder. Name another one.")
    resolved = resolve(policy, checkpoint.tree)
    config = dataclasses.replace(checkpoint.config, dtype=policy.activations or checkpoint.config.dtype)
    params, sources = in_file_order(checkpoint, resolved), checkpoint.tensors
    return _write(folder, config, params, sources, policy, size_in_bytes(max_shard_size), progress)


def shard_sizes(checkpoint: Checkpoint, resolved: Resolved, max_shard_size: int | str) -> dict[str, int]:
    """Bytes of data of every file that `convert_checkpoint` would write, by its name.

    Raises:
      UnsupportedExport: where it would write none.
    """
    groups = export(checkpoint.config, resolved.stored).groups
    shards = in_shards(groups, size_in_bytes(max_shard_size))
    return {file: sum(map(tensor_bytes, tensors.values())) for file, tensors in shards.items()}


def _write(
    folder: str | os.PathLike[str],
    config: DecoderConfig,
    params: list[ResolvedParam],
    sources: Mapping[str, Source],
    policy: Policy,
    limit: int,
    progress: bool | None,
) -> pathlib.Path:
    """Writes `params` in their order, read from `sources`."""
    stored = {path: info for param in params for path, info in param.stored.items()}
    written = export(config, stored)
    config = written.config
    policy = policy if _holds(policy, stored) else describe(stored, config)
    with new_folder(folder, _ours) as work:
        _carry_over(config, work)
        fields = {**unused_fields(config.source), **config_to_json(config)}
        (work / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        policy.dump(work / POLICY)
        bar = Progress(f"saving {pathlib.Path(folder).name}", sum(param.current.bytes for param in params), progress)
        with Writer(work, in_shards(written.groups, limit)) as writer, bar:

            def work_on(param: ResolvedParam, report: Callable[[int], None]) -> None:
                run(param, sources, {path: _Sink(writer, written.names[path]) for path in param.stored}, report)

            for _ in in_turn(params, work_on, bar):
                pass
    return pathlib.Path(folder)


def _holds(policy: Policy, stored: Mapping[str, ArrayInfo]) -> bool:
    """Whether a policy says something, and nothing of what is gone once things are stored: scales that it dissolves."""
    try:
        resolve(policy, dict(stored))
    except InvalidPolicy:
        return False
    return policy != Policy()


def _carry_over(config: DecoderConfig, folder: pathlib.Path) -> None:
    """Copies what belongs to a model beside its parameters from where it was read."""
    if config.source is None:
        return
    for name in (GENERATION, *TOKENIZER):
        path = config.source.parent / name
        if path.is_file():
            shutil.copyfile(path, folder / name)
    if (folder / GENERATION).is_file() and generation_ids(folder, config) != config:
        # The model's own were changed after it was loaded; the other settings are still the file's.
        fields = {**read_json(folder / GENERATION), "eos_token_id": list(config.eos_token_id)}
        text = json.dumps({**fields, "pad_token_id": config.pad_token_id}, indent=2)
        (folder / GENERATION).write_text(text + "\n", encoding="utf-8")


def _ours(name: str) -> bool:
    """Whether a file of this name is one that saving writes."""
    return name in (CONFIG, GENERATION, INDEX, POLICY, *TOKENIZER) or bool(
        re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name)
    )


@dataclasses.dataclass(frozen=True)
class _Sink:
    """Rows of one tensor, written to its place in a file."""

    writer: Writer
    name: str

    def needs(self, start: int, stop: int) -> bool:
        return True

    def buffer(self, start: int, stop: int) -> None:
        return None

    def write(self, start: int, rows: np.ndarray) -> None:
        self.writer.write(self.name, start * (rows.nbytes // len(rows) if rows.ndim and len(rows) else 0), rows)
