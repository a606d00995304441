"""Qwen3's `config.json`: every field implemented, known to change nothing, or refused by name."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..policies.dtypes import as_dtype, is_activation, is_narrow
from ..policies.errors import InvalidCheckpoint, UnknownDtype, UnsupportedConfig, UnsupportedExport, named, shown
from .config import Quantization, Qwen3Config, Yarn
from .json_file import read_json

# Accepted and unused: what training, transformers itself or a tokenizer reads.
_CHANGES_NOTHING = frozenset(
    """
    architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward id2label initializer_range
    is_encoder_decoder label2id max_length name_or_path _name_or_path output_attentions output_hidden_states
    problem_type return_dict transformers_version use_cache
    """.split()
)
_HANDLED = frozenset(
    """
    attention_bias dtype eos_token_id head_dim hidden_act hidden_size intermediate_size layer_types
    max_position_embeddings max_window_layers model_type num_attention_heads num_hidden_layers num_key_value_heads
    pad_token_id quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    tie_word_embeddings torch_dtype use_qk_norm use_sliding_window vocab_size
    """.split()
)
_YARN = frozenset(
    """
    attention_factor beta_fast beta_slow factor mscale mscale_all_dim original_max_position_embeddings truncate
    """.split()
)


_MOST_LAYERS = 1000  # far above any model; a damaged config must not cost minutes
_LARGEST_BASE = 1e12  # of RoPE, published ones are up to 1e7; what comes out stays a float32


def config_from_json(source: str | os.PathLike[str] | Mapping[str, Any]) -> Qwen3Config:
    """See `Qwen3Config.from_json`."""
    if isinstance(source, Mapping):
        return _Reader("config.json", source).config()
    config = _Reader(os.fspath(source), read_json(source)).config()
    return dataclasses.replace(config, source=pathlib.Path(source).absolute())


def config_to_json(config: Qwen3Config) -> dict[str, Any]:
    """See `Qwen3Config.to_json`."""
    windows = sorted({window for window in config.windows if window is not None})
    if len(windows) > 1:
        raise UnsupportedExport(
            f"sliding windows of {windows} tokens: a config.json names one. Give all layers the same."
        )
    kinds = [
        "full_attention" if config.window(i) is None else "sliding_attention" for i in range(config.num_hidden_layers)
    ]
    fields = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.yarn and _yarn_to_json(config.yarn),
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        "layer_types": kinds,
        "torch_dtype": config.dtype and config.dtype.name,
        "eos_token_id": list(config.eos_token_id) if len(config.eos_token_id) != 1 else config.eos_token_id[0],
        "pad_token_id": config.pad_token_id,
        "quantization_config": config.quantization and quantization_to_json(config.quantization),
    }
    return {name: value for name, value in fields.items() if value is not None and value != []}


def unused_fields(source: pathlib.Path | None) -> dict[str, Any]:
    """The fields of a config.json that change nothing here, but may tell others something; {} where it is gone."""
    if source is None or not source.is_file():
        return {}
    return {name: value for name, value in read_json(source).items() if name in _CHANGES_NOTHING}


def quantization_to_json(quantization: Quantization) -> dict[str, Any]:
    """The `quantization_config` of block-scaled e4m3 kernels."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(quantization.block),
        "modules_to_not_convert": list(quantization.not_converted),
    }


def _yarn_to_json(yarn: Yarn) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "attention_factor": yarn.attention_factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
    }


def token_ids(name: str, key: str, ids: Any) -> tuple[int, ...]:
    """The ids in a field of the file `name` that may be null, one id or a list."""
    listed = () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
    if any(type(i) is not int or not 0 <= i < 2**31 for i in listed):
        raise InvalidCheckpoint(f"{name}: {key}: expected token ids, found {shown(ids)}.")
    return listed


class _Reader:
    """Reads fields with their types checked, and names the file in every error."""

    def __init__(self, name: str, fields: Mapping[str, Any]):
        self.name, self.fields = name, fields

    def unsupported(self, text: str) -> UnsupportedConfig:
        return UnsupportedConfig(f"{self.name}: {text}")

    def get(self, key: str, kind: type, default: Any = None, fields: Mapping[str, Any] | None = None) -> Any:
        """The field `key`, of type `kind`; null counts as absent."""
        value = (self.fields if fields is None else fields).get(key)
        if value is None:
            return default
        accepted: Any = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise InvalidCheckpoint(f"{self.name}: {key}: expected {kind.__name__}, found {shown(value)}.")
        if kind is not float:
            return value
        if not abs(value) < 1e30:  # NaN, infinity, and integers that no float holds
            raise InvalidCheckpoint(f"{self.name}: {key}: expected a finite number, found {shown(value)}.")
        return float(value)

    def size(self, key: str, default: int | None = None, fields: Mapping[str, Any] | None = None) -> int:
        """A positive integer that an int32 holds."""
        value = self.get(key, int, default, fields)
        if value is None:
            raise InvalidCheckpoint(f"{self.name}: {key} is missing. A Qwen3 config names it.")
        if not 1 <= value < 2**31:
            raise InvalidCheckpoint(f"{self.name}: {key}: expected a positive integer below 2**31, found {value}.")
        return value

    def positive(self, key: str, default: float, fields: Mapping[str, Any] | None = None) -> float:
        """A positive number."""
        value = self.get(key, float, default, fields)
        if value <= 0:
            raise InvalidCheckpoint(f"{self.name}: {key}: expected a positive number, found {value}.")
        return value

    def config(self) -> Qwen3Config:
        model_type = self.get("model_type", str)
        if model_type != "qwen3":
            raise self.unsupported(f"model_type {shown(model_type)} is not implemented. Dense Qwen3 is 'qwen3'.")
        if unknown := sorted(
            k for k, v in self.fields.items() if k not in _HANDLED | _CHANGES_NOTHING and v is not None
        ):
            listed = ", ".join(f"{named(key)} = {shown(self.fields[key])}" for key in unknown[:5])
            raise self.unsupported(f"fields that are not implemented: {listed}. Remove them if they change nothing.")
        if (act := self.get("hidden_act", str, "silu")) != "silu":
            raise self.unsupported(f"hidden_act {shown(act)} is not implemented. Qwen3 uses 'silu'.")
        if not self.get("use_qk_norm", bool, True):
            raise self.unsupported("use_qk_norm false is not implemented. Qwen3 normalises queries and keys.")
        heads, layers = self.size("num_attention_heads"), self.size("num_hidden_layers")
        kv_heads, head_dim = self.size("num_key_value_heads", heads), self.size("head_dim", 128)
        if layers > _MOST_LAYERS:
            raise InvalidCheckpoint(f"{self.name}: num_hidden_layers: expected at most {_MOST_LAYERS}, found {layers}.")
        if heads % kv_heads:
            raise InvalidCheckpoint(
                f"{self.name}: {heads} attention heads do not divide among {kv_heads} key-value heads."
            )
        if head_dim % 2:
            raise InvalidCheckpoint(f"{self.name}: head_dim {head_dim} is odd, and RoPE rotates pairs.")
        theta, yarn = self.rope()
        return Qwen3Config(
            vocab_size=self.size("vocab_size"),
            hidden_size=self.size("hidden_size"),
            intermediate_size=self.size("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=self.size("max_position_embeddings", 32768),
            rms_norm_eps=self.positive("rms_norm_eps", 1e-6),
            rope_theta=theta,
            yarn=yarn,
            attention_bias=self.get("attention_bias", bool, False),
            tie_word_embeddings=self.get("tie_word_embeddings", bool, False),
            windows=self.windows(layers),
            dtype=self.dtype(),
            quantization=self.quantization(),
            eos_token_id=token_ids(self.name, "eos_token_id", self.fields.get("eos_token_id")),
            pad_token_id=next(iter(token_ids(self.name, "pad_token_id", self.fields.get("pad_token_id"))), None),
        )

    def dtype(self) -> np.dtype | None:
        """None where it is narrow: then the embedding's dtype is meant."""
        name = self.get("dtype", str) or self.get("torch_dtype", str)
        if name is None:
            return None
        try:
            dtype = as_dtype(name.removeprefix("torch."))
        except UnknownDtype as error:
            raise self.unsupported(f"torch_dtype: {error}") from error
        if is_narrow(dtype):
            return None
        if not is_activation(dtype):
            raise self.unsupported(f"torch_dtype {shown(name)}: a model runs in float32, bfloat16 or float16.")
        return dtype

    def windows(self, layers: int) -> tuple[int | None, ...]:
        # Absent means 4096, as in transformers; null means none.
        window = None
        if self.get("use_sliding_window", bool, False) and self.fields.get("sliding_window", 4096) is not None:
            window = self.size("sliding_window", 4096)
        kinds = self.get("layer_types", list)
        if kinds is None:
            first = self.get("max_window_layers", int, 28)
            kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
        if len(kinds) != layers:
            raise InvalidCheckpoint(
                f"{self.name}: layer_types names {len(kinds)} layers, num_hidden_layers is {layers}."
            )
        if unknown := sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}):
            raise self.unsupported(f"layer_types: {shown(unknown[0])} is not implemented.")
        sliding = "sliding_attention" in kinds
        if window is None and sliding:
            raise InvalidCheckpoint(
                f"{self.name}: layer_types has sliding layers, but there is no sliding_window in use."
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds) if sliding else ()

    def rope(self) -> tuple[float, Yarn | None]:
        scaling = self.get("rope_scaling", dict) or {}
        parameters = {**(self.get("rope_parameters", dict) or {}), **scaling}
        # Where transformers wrote both, the one inside is what it read.
        theta = self.positive("rope_theta", self.positive("rope_theta", 10000.0), parameters)
        if theta > _LARGEST_BASE:
            raise InvalidCheckpoint(f"{self.name}: rope_theta: expected at most {_LARGEST_BASE:g}, found {theta}.")
        kind = self.get("rope_type", str, self.get("type", str, "default", parameters), parameters)
        known = {"rope_type", "type", "rope_theta"} | (_YARN if kind == "yarn" else set())
        if kind not in ("default", "yarn"):
            raise self.unsupported(f"rope type {shown(kind)} is not implemented. Known are 'default' and 'yarn'.")
        if unknown := sorted(key for key, value in parameters.items() if key not in known and value is not None):
            raise self.unsupported(f"rope settings that are not implemented: {', '.join(map(named, unknown))}.")
        return theta, self.yarn(parameters, theta) if kind == "yarn" else None

    def yarn(self, parameters: Mapping[str, Any], theta: float) -> Yarn:
        longest = self.size("max_position_embeddings", 32768)
        original = self.size("original_max_position_embeddings", longest, parameters)
        factor = self.positive("factor", longest / original, parameters)
        if not 1 <= factor <= _LARGEST_BASE or theta <= 1:
            raise InvalidCheckpoint(
                f"{self.name}: yarn: expected a factor of at least 1 and a rope_theta above 1, "
                f"found {factor} and {theta}."
            )
        mscale, mscale_all = (
            self.get("mscale", float, 0.0, parameters),
            self.get("mscale_all_dim", float, 0.0, parameters),
        )

        if mscale < 0 or mscale_all < 0:
            raise InvalidCheckpoint(f"{self.name}: yarn: expected positive mscale, found {mscale} and {mscale_all}.")

        def magnitude(weight: float) -> float:
            return 0.1 * weight * float(np.log(factor)) + 1.0 if factor > 1 else 1.0

        stated = {key: value for key, value in parameters.items() if value != 0}  # transformers reads 0 as absent
        inferred = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
        return Yarn(
            factor,
            original,
            self.positive("attention_factor", inferred, parameters),
            self.positive("beta_fast", 32.0, stated),
            self.positive("beta_slow", 1.0, stated),
            self.get("truncate", bool, True, parameters),
        )

    def quantization(self) -> Quantization | None:
        fields = self.get("quantization_config", dict)
        if fields is None:
            return None
        method = self.get("quant_method", str, None, fields)
        if method != "fp8":
            raise self.unsupported(
                f"quant_method {shown(method)} is not implemented. Known is 'fp8', block-scaled float8."
            )
        known = {
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "dequantize": False,
            "scale_fmt": "float",
            "modules_to_convert": None,
        }
        for key, value in fields.items():
            if key in ("quant_method", "weight_block_size", "modules_to_not_convert") or value is None:
                continue
            if key not in known or value != known[key]:
                raise self.unsupported(f"quantization_config: {named(key)} = {shown(value)} is not implemented.")
        block = self.get("weight_block_size", list, [128, 128], fields)
        if len(block) != 2 or any(type(side) is not int or not 1 <= side < 2**31 for side in block):
            raise InvalidCheckpoint(
                f"{self.name}: weight_block_size: expected two positive integers, found {shown(block)}."
            )
        listed = self.get("modules_to_not_convert", list, [], fields)
        if any(not isinstance(module, str) for module in listed):
            raise InvalidCheckpoint(
                f"{self.name}: modules_to_not_convert: expected names of modules, found {shown(listed)}."
            )
        return Quantization((block[0], block[1]), tuple(listed))
