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

import jax
import numpy as np

from ..models.config import DecoderConfig, Quantization
from ..models.decoder import CausalLM
from ..policies.dtypes import dtype_name, is_activation, is_narrow
from ..policies.errors import InvalidCheckpoint, InvalidPolicy, UnsupportedExport
from ..policies.paths import is_scale, scale_path
from ..policies.policy import Policy
from ..policies.presets import get_policy
from ..policies.resolved import Resolved, ResolvedParam, resolve
from ..policies.trees import ArrayInfo, parameters
from .atomic import new_folder
from .checkpoint import Checkpoint, generation_ids, open_checkpoint
from .families import config_to_json, family_of
from .families.config_json import unused_fields
from .infer import describe
from .json_file import read_json
from .layout import CONFIG, GENERATION, INDEX, POLICY, TOKENIZER
from .load import in_file_order
from .placement import box_of
from .progress import Progress
from .safetensors.writer import NAMES, Tensors, Writer, in_shards, size_in_bytes, tensor_bytes
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
    sources = {path: _Rows(path, array) for path, array in parameters(model).items()}
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
    stored = resolved.stored
    names = _names(checkpoint.config, stored)
    _quantization(stored, names)
    shards = in_shards(_groups(names, stored), size_in_bytes(max_shard_size))
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
    names = _names(config, stored)
    config = dataclasses.replace(config, quantization=_quantization(stored, names))
    policy = policy if _holds(policy, stored) else describe(stored, config)
    with new_folder(folder, _ours) as work:
        _carry_over(config, work)
        fields = {**unused_fields(config.source), **config_to_json(config)}
        (work / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        policy.dump(work / POLICY)
        bar = Progress(f"saving {pathlib.Path(folder).name}", sum(param.current.bytes for param in params), progress)
        with Writer(work, in_shards(_groups(names, stored), limit)) as writer, bar:

            def work_on(param: ResolvedParam, report: Callable[[int], None]) -> None:
                run(param, sources, {path: _Sink(writer, names[path]) for path in param.stored}, report)

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


def _names(config: DecoderConfig, stored: Mapping[str, ArrayInfo]) -> dict[str, str]:
    """What a checkpoint calls every parameter, by path.

    Raises:
      UnsupportedExport: for parameters without a name in the family's checkpoints.
    """
    wanted = {path: (name, shape) for name, (path, shape) in family_of(config).tensors(config).items()}
    names = {path: name for path, (name, _) in wanted.items()}
    names |= {scale_path(path): f"{name}_scale_inv" for path, name in names.items()}
    if strange := [path for path in stored if path not in names]:
        raise UnsupportedExport(
            f"a {family_of(config).architecture} checkpoint has no name for {len(strange)} parameters: "
            f"{', '.join(strange[:5])}. Merge added parameters into the model's kernels first."
        )
    for path, (_, shape) in wanted.items():
        if path not in stored or stored[path].shape != shape:
            found = stored[path].shape if path in stored else "none"
            raise UnsupportedExport(
                f"{path}: found {found}, where the model's config says {shape}. Correct the config."
            )
    return names


def _groups(names: Mapping[str, str], stored: Mapping[str, ArrayInfo]) -> list[Tensors]:
    """Every parameter as it is to be written, with the scales that belong to it, in the order of `names`."""
    return [
        {
            names[each]: jax.ShapeDtypeStruct(stored[each].shape, stored[each].dtype)
            for each in (path, scale_path(path))
            if each in stored
        }
        for path in names
        if path in stored and not is_scale(path)
    ]


def _quantization(stored: Mapping[str, ArrayInfo], names: Mapping[str, str]) -> Quantization | None:
    """What config.json has to say of the narrow kernels.

    Raises:
      UnsupportedExport: where it has no way to say it.
    """
    narrow = {path: one for path, one in stored.items() if is_narrow(one.dtype)}
    for path, one in stored.items():
        if one.dtype not in NAMES:
            raise UnsupportedExport(
                f"{path}: {dtype_name(one.dtype)} has no place in this layout, whose dtypes are "
                f"{', '.join(map(dtype_name, NAMES))}. Save under a policy that stores it as one of them."
            )
        if is_scale(path) and not is_activation(one.dtype):
            raise UnsupportedExport(
                f"{path}: {dtype_name(one.dtype)} has no place in this layout, whose scales are f32, bf16 or f16. Save "
                "under a policy with such scales, or use Orbax."
            )
        if path in narrow and not path.endswith("/kernel"):
            raise UnsupportedExport(
                f"{path}: {dtype_name(one.dtype)}, but in this layout only kernels are quantised: others would read it "
                "without its scales. Save under a policy that stores it in bf16."
            )
    if not narrow:
        return None
    blocks = sorted({one.block for one in narrow.values() if one.block is not None})
    if len(blocks) == 1 and -1 in blocks[0]:
        raise UnsupportedExport(
            f"kernels in blocks of {list(blocks[0])}, -1 for a whole axis: config.json has one block of two numbers. "
            "Save under a policy with such a block, or use Orbax."
        )
    if len(blocks) != 1:
        raise UnsupportedExport(
            f"kernels in blocks of {blocks}: config.json names one. Save under a policy with a block."
        )
    plain = [name for path, name in names.items() if path.endswith("/kernel") and path in stored and path not in narrow]
    # A tied head is none of its own, but transformers makes it one that is quantised unless it is listed.
    tied = () if "lm_head/kernel" in names else ("lm_head",)
    return Quantization(blocks[0], (*tied, *(name.removesuffix(".weight") for name in plain)))


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


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of an array, on its devices or on the host."""

    path: str
    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, start: int = 0, stop: int | None = None, into: np.ndarray | None = None) -> np.ndarray:
        if not isinstance(self.array, jax.Array):
            return np.asarray(self.array)[start:stop]
        if not self.array.is_fully_addressable:
            raise UnsupportedExport(f"{self.path}: lies on devices of other processes. Gather it first.")
        shards = {box_of(shard.index, self.shape): shard.data for shard in self.array.addressable_shards}
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        if len(shards) == 1:
            (data,) = shards.values()
            return _on_host(data, start, stop)
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for ((first, last), *rest), data in shards.items():
            low, high = max(start, first), min(stop, last)
            if low < high:
                columns = tuple(slice(*side) for side in rest)
                rows[(slice(low - start, high - start), *columns)] = _on_host(data, low - first, high - first)
        return rows


def _on_host(array: jax.Array, start: int, stop: int) -> np.ndarray:
    """Rows of an array on one device.

    Elsewhere than on a CPU they are cut there, by one program for all slabs: the array itself, asked for its values,
    would keep a copy of all of them on the host.
    """
    if all(device.platform == "cpu" for device in array.devices()):
        return np.asarray(array)[start:stop]
    return np.asarray(jax.lax.dynamic_slice_in_dim(array, start, stop - start))
