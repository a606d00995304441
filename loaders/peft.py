"""`save_lora` and `load_lora`: adapters in the files that peft reads and writes, without their base model."""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from ..models.lora import with_adapters
from ..models.lora_layers import linear_layers
from ..policies.dtypes import dtype_name, is_activation
from ..policies.errors import InvalidAdapter, InvalidCheckpoint, UnsupportedExport, count, named
from ..policies.hosts import on_host, spans_processes
from .fields import Fields
from .json_file import read_json
from .peft_config import PeftConfig, config_to_json, read_config
from .peft_names import PREFIX, AdapterArrays, gate_and_up, modules, placed, stacked
from .safetensors.reader import Tensor, read_header
from .safetensors.writer import ALL_NAMES
from .together import writing

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MOST_PROBLEMS = 20  # that an error lists

M = TypeVar("M", bound=Decoder)


def save_lora(model: Decoder, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Saves the adapters of `model`, bit for bit, in the layout of peft, without the base model; returns the folder.

    folder  replaced as a whole, after all files are written; a folder with other files is an error

    `adapter_config.json` and `adapter_model.safetensors` are as peft 0.21 writes them for transformers 5, so that
    `PeftModel.from_pretrained(base, folder)` reads them, and `load_lora` does. The adapters of `gate_proj` and
    `up_proj` of experts become one of their stacked kernel, with the sum of their ranks.

    Raises:
      InvalidAdapter: a model without adapters.
      UnsupportedExport: adapters that peft cannot have: of a mixture's dense layers; of `gate_proj` and `up_proj` of
        experts with different scalings; with rslora and without. `model` is no model of perparam.
      SaveFailed: the disk is full, or another error of the file system; the folder is then unchanged.
    """
    config = _config(model, "save_lora")
    layers = {path: layer for path, layer in linear_layers(model).items() if layer.adapter is not None}
    if not layers:
        raise InvalidAdapter("save_lora: the model has no adapters. Add them with add_lora, or use save_model.")
    together = any(spans_processes(layer.lora_a[...]) for layer in layers.values())
    arrays = {
        path: AdapterArrays(layer.adapter, on_host(layer.lora_a[...]), on_host(layer.lora_b[...]))
        for path, layer in layers.items()
        if layer.adapter is not None
    }
    found = list(placed(config, arrays))
    fields = config_to_json(
        config,
        {each.name: each.arrays.adapter for each in found if not each.parameter},
        {each.name: each.arrays.adapter for each in found if each.parameter},
    )
    tensors = {
        f"{PREFIX}{each.tensors}.{name}.weight": array
        for each in found
        for name, array in (("lora_A", each.arrays.lora_a), ("lora_B", each.arrays.lora_b))
    }
    for name, array in tensors.items():
        if array.dtype not in ALL_NAMES:
            raise UnsupportedExport(f"{name}: safetensors files have no dtype {dtype_name(array.dtype)}.")
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}
    with writing(folder, (CONFIG, WEIGHTS).__contains__, {WEIGHTS: shapes}, together=together) as (work, writer):
        if work is not None:
            (work / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            for name, array in tensors.items():
                writer.write(name, 0, array)
    return pathlib.Path(folder)


def load_lora(model: M, folder: str | os.PathLike[str]) -> M:
    """Returns the model with the adapters in a folder that peft or `save_lora` wrote; `model` is not changed.

    The adapters are stored as the model's policy says (rules for `lora_a` and `lora_b`), or in the dtype of the file;
    they can be trained on. Dropout is not applied: `lora_dropout` is for training.

    >>> import tempfile
    >>> from perparam.models import Qwen3, Qwen3Config
    >>> from perparam.training import add_lora
    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, head_dim=4)
    >>> config = Qwen3Config(**sizes, num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True)
    >>> base = Qwen3(config, rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as work:
    ...     folder = save_lora(add_lora(base, 2, 4, "q_proj", rngs=nnx.Rngs(1)), work + "/adapter")
    ...     load_lora(base, folder).layers[0].self_attn.q_proj.lora_a.shape
    (2, 4)

    Raises:
      MissingFile: no such folder, or not these files.
      UnsupportedConfig: another kind of adapter, or a setting that is not implemented, such as DoRA, by its field.
      InvalidCheckpoint: damaged files; tensors that the model has no layer for, that are missing or misshapen, all of
        them together.
      InvalidAdapter: a layer that has an adapter already.
    """
    config, folder = _config(model, "load_lora"), pathlib.Path(folder)
    settings = read_config(Fields(str(folder / CONFIG), read_json(folder / CONFIG)))
    arrays = _Reader(model, config, settings, folder / WEIGHTS).arrays()

    def draw(path: str, shape: tuple[int, ...]) -> Any:
        layer, _, name = path.rpartition("/")
        return jnp.asarray(getattr(arrays[layer], name))

    return with_adapters(model, {path: each.adapter for path, each in arrays.items()}, draw)


def _config(model: nnx.Module, function: str) -> DecoderConfig:
    config = getattr(model, "config", None)
    if not isinstance(model, nnx.Module) or not isinstance(config, DecoderConfig):
        raise UnsupportedExport(
            f"{function}: expected a model of perparam, such as load_model returns, found {type(model).__name__}. Its "
            "layers have no names in peft."
        )
    return config


class _Reader:
    """Reads the adapters in a file; problems with its tensors are collected, and raised together."""

    def __init__(self, model: Decoder, config: DecoderConfig, settings: PeftConfig, file: pathlib.Path):
        self.file, self.settings, self.problems = file, settings, list[str]()
        self.modules = modules(config, all_prefixes=True)
        self.shapes = {path: tuple(layer.kernel.shape) for path, layer in linear_layers(model).items()}

    def arrays(self) -> dict[str, AdapterArrays]:
        """{path of a layer: its adapter}.

        Raises:
          InvalidCheckpoint: tensors that do not fit the model.
        """
        found: dict[str, AdapterArrays] = {}
        experts: dict[str, dict[int, AdapterArrays]] = collections.defaultdict(dict)
        for name, (lora_a, lora_b) in self._pairs().items():
            module = self.modules.get(name)
            if module is None:
                found |= self._of_parameter(name, lora_a, lora_b)
            elif (one := self._read(name, lora_a, lora_b, self.shapes[module.path][-2:])) is None:
                continue
            elif module.expert is None:
                found[module.path] = one
            else:
                experts[module.path][module.expert] = one
        found |= {path: each for path, ones in experts.items() if (each := self._stack(path, ones)) is not None}
        if self.problems:
            more = len(self.problems) - _MOST_PROBLEMS
            listed = [*self.problems[:_MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
            raise InvalidCheckpoint(
                f"{self.file}: {count(len(self.problems), 'problem')} with its tensors for this model:\n"
                + "".join(f"  {line}\n" for line in listed)
                + "Load the adapter into the model that it was trained on."
            )
        return {path: found[path] for path in self.shapes if path in found}

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{module's name: its two tensors}."""
        halves: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
        for name, tensor in read_header(self.file).items():
            module, _, half = name.removesuffix(".weight").rpartition(".")
            if not name.startswith(PREFIX) or not name.endswith(".weight") or half not in ("lora_A", "lora_B"):
                self.problems.append(f"unexpected: {named(name)}")
            elif not is_activation(tensor.dtype):
                self.problems.append(f"{named(name)}: expected f32, bf16 or f16, found {dtype_name(tensor.dtype)}")
            elif len(tensor.shape) != 2 or 0 in tensor.shape:
                self.problems.append(f"{named(name)}: expected a matrix, found the shape {tensor.shape}")
            else:
                halves[module.removeprefix(PREFIX)][half] = tensor
        for name, pair in halves.items():
            if len(pair) < 2:
                self.problems.append(
                    f"missing: {PREFIX}{named(name)}.{'lora_B' if 'lora_A' in pair else 'lora_A'}.weight"
                )
        return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items() if len(pair) == 2}

    def _read(
        self, name: str, lora_a: Tensor, lora_b: Tensor, shape: tuple[int, ...], experts: int = 1, key: str = ""
    ) -> AdapterArrays | None:
        """The adapter of a kernel (out, in); None if it is misshapen.

        shape    of the kernel
        experts  the number of experts that a flat adapter has
        key      name by which the settings name it; by default `name`
        """
        # The kernel of a router is a parameter in transformers 5, and a module's in files from before.
        adapter = self.settings.adapter(key or name, *([] if key else [f"{name}.weight"]))
        expected = (adapter.rank * experts, shape[1]), (shape[0], adapter.rank * experts)
        for tensor, each in zip((lora_a, lora_b), expected, strict=True):
            if tensor.shape != each:
                self.problems.append(f"{named(tensor.name)}: expected the shape {each}, found {tensor.shape}")
        if (lora_a.shape, lora_b.shape) != expected:
            return None
        return AdapterArrays(adapter, lora_a.read(), lora_b.read())

    def _of_parameter(self, name: str, lora_a: Tensor, lora_b: Tensor) -> Mapping[str, AdapterArrays]:
        """{path: adapter} of the stacked kernels of experts, with the name that `peft_names` explains."""
        base = name.removesuffix(".base_layer")
        of_experts = {leaf: self.modules.get(f"{base}.0.{leaf}") for leaf in ("gate_proj", "up_proj", "down_proj")}
        paths = {leaf: module.path for leaf, module in of_experts.items() if module is not None}
        if len(paths) < 3:
            self.problems.append(f"unexpected: {PREFIX}{named(name)}, of which the model has no linear layer")
            return {}
        experts, width, hidden = self.shapes[paths["gate_proj"]]
        if (lora_b.shape[0] == 2 * width and name != base) or (lora_b.shape[0], lora_a.shape[1]) == (2 * width, hidden):
            one = self._read(name, lora_a, lora_b, (2 * width, hidden), experts, f"{base}.gate_up_proj")
            if one is None:
                return {}
            gate, up = gate_and_up(stacked(one, experts))
            return {paths["gate_proj"]: gate, paths["up_proj"]: up}
        one = self._read(name, lora_a, lora_b, (hidden, width), experts, f"{base}.down_proj")
        return {} if one is None else {paths["down_proj"]: stacked(one, experts)}

    def _stack(self, path: str, ones: Mapping[int, AdapterArrays]) -> AdapterArrays | None:
        """The stacked adapters of experts that have tensors of their own; None if they cannot be stacked."""
        experts, first = self.shapes[path][0], next(iter(ones.values()))
        alike = all(
            (each.adapter, each.lora_a.dtype, each.lora_b.dtype)
            == (first.adapter, first.lora_a.dtype, first.lora_b.dtype)
            for each in ones.values()
        )
        if len(ones) < experts or not alike:
            what = f"{len(ones)} of {experts} experts" if alike else "experts with different ranks, alphas or dtypes"
            self.problems.append(f"{path}: adapters of {what}; expected those of all experts, with the same settings")
            return None
        ordered = [ones[i] for i in range(experts)]
        return AdapterArrays(
            first.adapter, np.stack([each.lora_a for each in ordered]), np.stack([each.lora_b for each in ordered])
        )
