"""The parameters of a model by its config.json alone: for plans of checkpoints whose weights are not here."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections import Counter

import ml_dtypes
import numpy as np

from ..models.config import DecoderConfig
from ..policies.blocks import grid_shape
from ..policies.errors import InvalidCheckpoint
from ..policies.formats import Format
from ..policies.paths import scale_path
from ..policies.trees import ArrayInfo
from .checkpoint import CheckpointTree
from .families import family_of, read_config
from .families.quantization import list_field, not_converted
from .layout import CONFIG, INDEX, WHOLE

_F8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class ConfigOnly:
    """A model without weights: its config, and the shapes and formats that this implies.

    file    path of the config.json
    config  the model's config
    infos   {path: shape and format} of every parameter, scales after their kernel
    """

    file: pathlib.Path
    config: DecoderConfig
    infos: dict[str, ArrayInfo]

    @property
    def tree(self) -> CheckpointTree:
        """`infos` as nested mappings, with the config."""
        return CheckpointTree.of(self.infos, self.config)


def config_file(path: str | os.PathLike[str]) -> pathlib.Path | None:
    """The config.json that `path` names: the file itself, or that of a folder without weights; None otherwise."""
    place = pathlib.Path(path)
    if place.suffix == ".json" and place.is_file():
        return place
    if not (place / CONFIG).is_file() or any((place / name).exists() for name in (WHOLE, INDEX)):
        return None
    return None if any(place.glob("*.safetensors")) else place / CONFIG


def open_config(file: str | os.PathLike[str]) -> ConfigOnly:
    """The parameters of the model that a config.json describes.

    Kernels that `quantization_config` converts are float8_e4m3fn, with scales in the config's dtype, as Qwen publishes
    them; all other parameters are in the config's dtype. The weights may have other dtypes, or lack the head that
    `architectures` names, as Qwen3-Embedding does; only their headers show that.

    Raises:
      MissingFile, InvalidCheckpoint, UnsupportedConfig: see `read_config`.
      InvalidCheckpoint: a config without a dtype, or one whose list of modules has a regular expression.
    """
    config = read_config(file)
    return ConfigOnly(pathlib.Path(file), config, _infos(os.fspath(file), config))


def _infos(file: str, config: DecoderConfig) -> dict[str, ArrayInfo]:
    if config.dtype is None:
        raise InvalidCheckpoint(
            f"{file}: dtype (torch_dtype) is missing, and without it the bytes of the parameters are unknown. Add it, "
            "or pass the folder with the weights."
        )
    quantization = config.quantization
    is_left_out = None if quantization is None else not_converted(quantization)
    if quantization is not None and is_left_out is None:
        raise InvalidCheckpoint(
            f"{file}: {list_field(quantization)} has a regular expression, which is not evaluated. Pass the folder "
            "with the weights, whose headers show which kernels are quantised."
        )
    tensors = family_of(config).tensors(config)
    counts = Counter(path for path, _, expert in tensors.values() if expert is not None)
    infos: dict[str, ArrayInfo] = {}
    for path, shape, _ in tensors.values():
        if path in infos:  # another expert of the same layer
            continue
        whole = (counts[path], *shape) if path in counts else shape
        is_kernel = path.startswith("layers/") and path.endswith("/kernel")
        if quantization is None or is_left_out is None or not is_kernel or is_left_out(path):
            infos[path] = ArrayInfo(whole, Format(config.dtype))
            continue
        infos[path] = ArrayInfo(whole, Format(_F8, quantization.block))
        infos[scale_path(path)] = ArrayInfo(grid_shape(whole, quantization.block), Format(config.dtype))
    return infos
