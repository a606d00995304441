"""`open_checkpoint`: the config and the tensors of a checkpoint folder, read from headers and checked."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ..models.config import DecoderConfig, Quantization
from ..models.heads import Task
from ..policies.dtypes import dtype_name, is_activation, is_narrow
from ..policies.errors import InvalidCheckpoint, named
from ..policies.formats import Format
from ..policies.paths import is_scale, scale_path
from ..policies.policy import Policy
from ..policies.resolved import pair_problems
from ..policies.trees import ArrayInfo
from .families import family_of, read_config
from .families.family import Family
from .families.names import WITHOUT_HEAD, prefixes, reason_left_out
from .families.quantization import SCALE_SUFFIX, list_field, not_converted
from .fields import Fields
from .hub import checkpoint_folder
from .json_file import read_json
from .layout import CONFIG, GENERATION
from .safetensors.reader import Tensor
from .shards import Headers, read_tensors
from .stack import Stack, unequal


class CheckpointWarning(UserWarning):
    """The config and the tensors of a checkpoint disagree; the tensors are used."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its config, and where the data of each parameter is; no weights.

    folder    path of the folder
    config    config of the model; `dtype` is never None, eos ids are those of generation_config.json if there is one
    tensors   {path: tensor} for every parameter of the model and its scales; a Stack of those of experts
    left_out  {tensor name: reason} for tensors that the model has no parameter for, as the config explains
    """

    folder: pathlib.Path
    config: DecoderConfig
    tensors: dict[str, Tensor | Stack]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.config)

    @property
    def infos(self) -> dict[str, ArrayInfo]:
        """{path: shape and format} of every parameter, scales after their kernel."""
        return _infos(self.tensors, self.config)

    @property
    def tree(self) -> CheckpointTree:
        """`infos` as nested mappings, with the config."""
        return CheckpointTree.of(self.infos, self.config)


class CheckpointTree(dict[str, Any]):
    """The parameters of a checkpoint as nested mappings of `ArrayInfo`.

    config  the model's config, from which a plan takes the dtype of activations and the bytes of the cache; None for
            parameters without a model
    """

    def __init__(self, config: DecoderConfig | None):
        super().__init__()
        self.config = config

    @staticmethod
    def of(infos: Mapping[str, ArrayInfo], config: DecoderConfig | None) -> CheckpointTree:
        """The tree of `infos`, by path."""
        tree = CheckpointTree(config)
        for path, info in infos.items():
            *parents, name = path.split("/")
            node: dict[str, Any] = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = info
        return tree


def _flatten(tree: CheckpointTree) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    keys = sorted(tree)  # as JAX flattens every dict
    return [(jax.tree_util.DictKey(key), tree[key]) for key in keys], (tree.config, *keys)


def _unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> CheckpointTree:
    tree = CheckpointTree(aux[0])
    tree.update(zip(aux[1:], children, strict=True))
    return tree


jax.tree_util.register_pytree_with_keys(CheckpointTree, _flatten, _unflatten)


def _infos(tensors: Mapping[str, Tensor | Stack], config: DecoderConfig) -> dict[str, ArrayInfo]:
    block = (config.quantization or Quantization()).block
    return {
        path: ArrayInfo(tensor.shape, Format(tensor.dtype, block if scale_path(path) in tensors else None))
        for path, tensor in tensors.items()
    }


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    progress: bool | None = None,
    weights: bool = True,
) -> Checkpoint:
    """The checkpoint in a folder in Hugging Face layout, or on the hub; reads headers, not weights.

    path, revision, progress  as for `load_model`
    weights                   False: of a repository on the hub only headers are fetched, and its tensors have no data

    Raises:
      MissingFile, InvalidCheckpoint, UnsupportedConfig: one error lists all tensors that are missing, unused, of the
        wrong shape or dtype, or without their scales.
    """
    return checkpoint_in(*checkpoint_folder(path, revision, progress=progress, weights=weights))


def checkpoint_in(folder: pathlib.Path, headers: Headers | None = None) -> Checkpoint:
    """The checkpoint in `folder`; see `open_checkpoint`, and `read_tensors` for `headers`."""
    config, in_files = _config(folder), read_tensors(folder, headers)
    if config.task == "causal_lm" and prefixes(in_files) == WITHOUT_HEAD and "lm_head.weight" not in in_files:
        # A saved `…Model`, such as Qwen3-Embedding, whose config.json names `…ForCausalLM`.
        config = dataclasses.replace(config, task="feature_extraction")
    tensors, left_out, problems = _match(in_files, config)
    problems += map(str, pair_problems(_infos(tensors, config), Policy()))
    if problems:
        lines = [f"  {problem}" for problem in problems[:20]]
        more = [f"  and {len(problems) - 20} more"] if len(problems) > 20 else []
        tensor = "1 tensor is" if len(problems) == 1 else f"{len(problems)} tensors are"
        heading = f"{folder}: {tensor} not what config.json describes."
        raise InvalidCheckpoint("\n".join([heading, *lines, *more, _remedy(problems, in_files, config)]))
    _cross_check(folder, config, tensors)
    if config.dtype is None:
        stored = tensors["embed_tokens/embedding"].dtype
        config = dataclasses.replace(config, dtype=stored if is_activation(stored) else np.dtype(np.float32))
    return Checkpoint(folder, config, tensors, left_out)


def _remedy(problems: list[str], tensors: Mapping[str, Tensor], config: DecoderConfig) -> str:
    """The last line of the error about `tensors` that do not fit config.json."""
    architecture, score = family_of(config).architecture, tensors.get("score.weight")
    if not all(re.match(r"\w+: (\S*lm_head|score)\.", problem) for problem in problems):
        return "  Download the folder again, or correct config.json."
    if score is not None and config.head != "score":
        task: Task = "token_classification" if "score.bias" in tensors else "sequence_classification"
        return (
            f'  score.weight is the head of a classifier: set architectures in config.json to ["{architecture(task)}"].'
        )
    if score is not None and score.shape[:1] != (len(config.id2label),):
        return "  Set id2label or num_labels in config.json to the classes of score.weight, or download the file again."
    if config.head == "lm_head":
        return (
            "  A head that is tied to the embedding has no tensor: set tie_word_embeddings in config.json to true. For "
            f'a model without a head, set architectures to ["{architecture("feature_extraction")}"].'
        )
    return "  Download the folder again, or correct config.json."


def _config(folder: pathlib.Path) -> DecoderConfig:
    return generation_ids(folder, read_config(folder / CONFIG))


def generation_ids(folder: pathlib.Path, config: DecoderConfig) -> DecoderConfig:
    """`config` with the eos and pad ids of generation_config.json, if there is one."""
    if not (folder / GENERATION).is_file():
        return config
    fields = Fields(str(folder / GENERATION), read_json(folder / GENERATION))
    eos, pad = fields.token_ids("eos_token_id"), fields.token_ids("pad_token_id")
    return dataclasses.replace(
        config,
        eos_token_id=eos or config.eos_token_id,
        pad_token_id=pad[0] if pad else config.pad_token_id,
    )


def _match(
    tensors: dict[str, Tensor], config: DecoderConfig
) -> tuple[dict[str, Tensor | Stack], dict[str, str], list[str]]:
    """`({path: tensor}, {name: reason} of tensors left out, problems)`: tensors matched with the model's parameters."""
    found: dict[str, list[Tensor]] = {}
    experts: set[str] = set()
    left_out: dict[str, str] = {}
    problems = []
    quantization = config.quantization or Quantization()
    suffix = SCALE_SUFFIX[quantization.method]
    expected = family_of(config).tensors(config, prefixes(tensors))
    for name, (path, shape, expert) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"missing: {name} {shape}")
            continue
        if tensor.shape != shape:
            problems.append(f"misshapen: {name} is {tensor.shape}, expected {shape}")
        if not (is_activation(tensor.dtype) or (is_narrow(tensor.dtype) and len(shape) == 2)):
            problems.append(
                f"wrong dtype: {name} is {dtype_name(tensor.dtype)}, expected f32, bf16, f16 or a float8 matrix"
            )
        found.setdefault(path, []).append(tensor)
        if expert is not None:
            experts.add(path)
        scales = tensors.get(f"{name}{suffix}")
        if scales is not None and quantization.block == (-1, -1) and scales.shape in ((), (1,)):
            scales = dataclasses.replace(scales, shape=(1, 1))
        if scales is None and tensor.dtype == np.int8:
            problems.append(f"{path}: int8 {shape} without its scales {scale_path(path)!r}, so its magnitude is lost")
        if scales is not None:
            found.setdefault(scale_path(path), []).append(scales)
            if not is_activation(scales.dtype):
                problems.append(f"wrong dtype: {scales.name} is {dtype_name(scales.dtype)}, expected f32, bf16 or f16")
    by_path: dict[str, Tensor | Stack] = {}
    for path in [path for path in found if not is_scale(path)]:
        kernels, of_kernels = found[path], found.get(scale_path(path), [])
        if path not in experts:
            by_path |= {path: kernels[0]} | ({scale_path(path): of_kernels[0]} if of_kernels else {})
        elif wrong := unequal(kernels, of_kernels, suffix):
            problems += wrong
        else:
            by_path |= {path: Stack(tuple(kernels))}
            by_path |= {scale_path(path): Stack(tuple(of_kernels))} if of_kernels else {}
    for name in tensors:
        kernel = name.removesuffix(suffix)
        if kernel not in expected:
            if reason := reason_left_out(kernel, config):
                left_out[name] = reason
            else:
                problems.append(f"unused: {named(name)} {tensors[name].shape}")
    return by_path, left_out, problems


def _cross_check(folder: pathlib.Path, config: DecoderConfig, tensors: dict[str, Tensor | Stack]) -> None:
    """Warns if `quantization_config` contradicts the tensors."""
    narrow = {path for path in tensors if scale_path(path) in tensors and not is_scale(path)}
    if config.quantization is None:
        if narrow:
            _warn(
                folder,
                "config.json has no quantization_config, but these are quantised (blocks of 128×128 are assumed)",
                narrow,
            )
        return
    is_left_out, field = not_converted(config.quantization), list_field(config.quantization)
    if is_left_out is None:
        return
    projections = {path for path in tensors if path.startswith("layers/") and path.endswith("/kernel")}
    if quantised := [path for path in narrow if is_left_out(path)]:
        _warn(folder, f"{field} lists modules that are quantised", quantised)
    if plain := [path for path in projections - narrow if not is_left_out(path)]:
        _warn(folder, f"{field} does not list modules that are not quantised", plain)


def _warn(folder: pathlib.Path, text: str, paths: Iterable[str]) -> None:
    names = sorted(path.rpartition("/")[0] for path in paths)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    warnings.warn(
        f"{folder}: {text}: {', '.join(names[:5])}{more}. The tensors are used.",
        CheckpointWarning,
        stacklevel=2,
    )
