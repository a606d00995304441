"""Makes small FP8 Qwen3 checkpoints in Hugging Face layout, with random weights; needs no torch and no transformers.

    python -m perparam.examples.make_checkpoint FOLDER [demo | tiny]

`demo` has blocks of different magnitudes, BF16 scales and two shards; transformers and vLLM can load it.
`tiny` has a hidden size of 32 and blocks of 128, so that each kernel has one scale, and all scales are 1. Beside the
causal language model, it can be an embedding model or a classifier.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from .make_tokenizer import write_tokenizer

_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}
_COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_cache": True,
    "use_sliding_window": False,
}
DEMO = _COMMON | {
    "head_dim": 64,
    "hidden_size": 384,
    "intermediate_size": 640,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 2048,
}
TINY = _COMMON | {
    "head_dim": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "float8_e4m3fn",
    "use_qk_norm": True,
    "vocab_size": 1024,
}


def quantized(weight: np.ndarray, block: int, scale_dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """`(kernel, scale_inv)` of a float32 weight: float8_e4m3fn, and a multiplier per block in `scale_dtype`."""
    rows, columns = (math.ceil(dim / block) for dim in weight.shape)
    scale = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            part = weight[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scale[i, j] = np.abs(part).max() / 448 or 1
    scale = scale.astype(scale_dtype)
    each = scale.astype(np.float32).repeat(block, 0).repeat(block, 1)[: weight.shape[0], : weight.shape[1]]
    return np.clip(weight / each, -448, 448).astype(ml_dtypes.float8_e4m3fn), scale


def tensors(config: Mapping[str, Any], seed: int, ones: bool) -> dict[str, np.ndarray]:
    """{name in the checkpoint: random tensor} for a model of `config`; with `ones`, all scales are 1.0 in float32."""
    rng = np.random.default_rng(seed)
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    result: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        weight = (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(np.float32)
        if ones:
            kernel, scale = weight.astype(ml_dtypes.float8_e4m3fn), np.ones((1, 1), np.float32)
        else:
            # Bands of rows differ in magnitude, so that a wrong scale is noticed.
            weight *= np.exp2(rng.integers(-3, 3, math.ceil(rows / 128))).repeat(128)[:rows, None]
            kernel, scale = quantized(weight, 128, ml_dtypes.bfloat16)
        result[f"{name}.weight"], result[f"{name}.weight_scale_inv"] = kernel, scale

    def plain(name: str, *shape: int) -> None:
        values = 1 + 0.1 * rng.standard_normal(shape) if len(shape) == 1 else rng.standard_normal(shape)
        result[f"{name}.weight"] = values.astype(ml_dtypes.bfloat16)

    plain("model.embed_tokens", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        plain(f"{layer}.input_layernorm", hidden)
        matrix(f"{layer}.self_attn.q_proj", queries, hidden)
        matrix(f"{layer}.self_attn.k_proj", keys, hidden)
        matrix(f"{layer}.self_attn.v_proj", keys, hidden)
        matrix(f"{layer}.self_attn.o_proj", hidden, queries)
        plain(f"{layer}.self_attn.q_norm", head)
        plain(f"{layer}.self_attn.k_norm", head)
        plain(f"{layer}.post_attention_layernorm", hidden)
        matrix(f"{layer}.mlp.gate_proj", wide, hidden)
        matrix(f"{layer}.mlp.up_proj", wide, hidden)
        matrix(f"{layer}.mlp.down_proj", hidden, wide)
    plain("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        plain("lm_head", config["vocab_size"], hidden)
        result["lm_head.weight"] = (result["lm_head.weight"] / math.sqrt(hidden)).astype(ml_dtypes.bfloat16)
    return result


def write_safetensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `arrays` as one safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end := end + array.nbytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.tobytes())


def make_checkpoint(
    folder: str | pathlib.Path,
    kind: str = "demo",
    seed: int = 0,
    *,
    architecture: str = "Qwen3ForCausalLM",
    labels: Sequence[str] = (),
    words: Sequence[str] = (),
) -> pathlib.Path:
    """Makes the checkpoint `kind` ("demo" or "tiny") in `folder` and returns the folder.

    architecture  of a tiny one: "Qwen3Model", "Qwen3ForSequenceClassification" and the like
    labels        names of a classifier's classes
    words         further tokens of the tokenizer
    """
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: the folder is not empty. Choose a new one.")
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = dict({"demo": DEMO, "tiny": TINY}[kind])
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    config |= {"architectures": [architecture], "id2label": {str(i): label for i, label in enumerate(labels)} or None}
    config |= {"bos_token_id": None, "eos_token_id": config["vocab_size"] - 1, "pad_token_id": config["vocab_size"] - 2}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(folder, end=config["eos_token_id"], pad=config["pad_token_id"], words=words)
    arrays = tensors(config, seed, ones=kind == "tiny")
    if kind == "tiny":
        if architecture.endswith("Model"):  # has no head, and names without the beginning that tells it from one
            arrays = {name.removeprefix("model."): array for name, array in arrays.items()}
        if labels:
            score = np.random.default_rng(seed).standard_normal((len(labels), config["hidden_size"]))
            arrays["score.weight"] = score.astype(ml_dtypes.bfloat16)
            if architecture.endswith("ForTokenClassification"):
                arrays["score.bias"] = np.zeros(len(labels), ml_dtypes.bfloat16)
        write_safetensors(folder / "model.safetensors", arrays)
        return folder
    names = list(arrays)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        write_safetensors(folder / file, {name: arrays[name] for name in shard})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["demo"], ["tiny"]):
        sys.exit(__doc__)
    print(make_checkpoint(sys.argv[1], sys.argv[2] if sys.argv[2:] else "demo"))
