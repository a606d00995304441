"""Measures the error of bfloat16 logits on random small models, compared with transformers on the same weights.

    python benchmarks/bf16_error.py [--models 156] [--prompts 32] [--seed 0] [--jobs 2] [--out FOLDER]

needs torch and transformers beside perparam; a CPU is enough. The models are Llama, Qwen2 and Qwen3 in turn, of random
shapes, half of them plain bfloat16 checkpoints and half of them FP8 with blocks that mostly do not divide. The error of
logits is |logits - exact| / |exact| (Frobenius), where `exact` is computed by transformers in float32 from the weights
of the checkpoint. Compared are

    perparam      without a policy: activations in bfloat16, FP8 kernels as stored
    eager, sdpa   transformers in bfloat16, with FP8 weights dequantised in float32 and rounded to bfloat16

Ratios of errors on one prompt of 16 tokens differ by chance between equally good implementations; on all prompts of a
model they differ less. The table has both, and the geometric mean of the ratio with its standard error over models.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import importlib.metadata
import json
import math
import multiprocessing
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors.torch
import torch
import transformers
from flax import nnx

import perparam

LENGTH = 16
"""Tokens of a prompt."""

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
BLOCKS = ((16, 16), (16, 24), (32, 64), (128, 128))
QUANTILES = {"min": 0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1}


def draw_config(rng: np.random.Generator, family: str) -> dict[str, Any]:
    """Returns a config.json with random sizes."""
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    head_dim = int(rng.choice([16, 24, 32, 64] if family == "qwen2" else [2, 4, 8, 16, 24, 32, 64]))
    hidden = heads * (head_dim if family == "qwen2" else math.ceil(rng.integers(16, 321) / heads))
    config = {
        "model_type": family, "vocab_size": int(rng.integers(64, 513)), "hidden_size": hidden,
        "intermediate_size": int(rng.integers(16, 513)), "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 64,
        "rope_theta": float(rng.choice([1e2, 1e4, 1e6])), "tie_word_embeddings": bool(rng.integers(2)),
        "hidden_act": "silu", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    if family != "qwen2":
        config |= {"head_dim": head_dim, "attention_bias": bool(rng.integers(2))}
    return config


def draw_weights(rng: np.random.Generator, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns bfloat16 weights that keep the size of activations: x @ weight.T is about as large as x."""
    with torch.device("meta"):
        shapes = {name: tuple(each.shape) for name, each in reference(config).state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.normal(size=shape) * (0.3 if name.endswith("bias") else 1 / math.sqrt(shape[-1]))
        weights[name] = torch.from_numpy(values).to(torch.bfloat16)
    return weights


def reference(config: dict[str, Any], attention: str = "eager") -> Any:
    """Returns a model of transformers with that config.json, with its own random weights."""
    made = transformers.AutoConfig.for_model(**config)
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention)


def quantised(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weight in float8_e4m3fn and the bfloat16 scale of each block."""
    largest = torch.nn.functional.max_pool2d(weight.abs().float()[None], block, stride=block, ceil_mode=True)[0]
    scales = (largest / 448).to(torch.bfloat16)
    return (weight.float() / expanded(scales, block, weight.shape)).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def expanded(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Returns the scale of each element of a weight in float32."""
    each = scales.float().repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return each[: shape[0], : shape[1]]


def dequantised(tensors: dict[str, torch.Tensor], block: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """Returns the weights of a checkpoint in float32."""
    weights = {}
    for name, tensor in tensors.items():
        if (scales := tensors.get(f"{name}_scale_inv")) is not None:
            assert block is not None
            weights[name] = tensor.float() * expanded(scales, block, tensor.shape)
        elif not name.endswith("_scale_inv"):
            weights[name] = tensor.float()
    return weights


def their_logits(
    config: dict[str, Any], weights: dict[str, torch.Tensor], dtype: torch.dtype, attention: str, ids: np.ndarray
) -> np.ndarray:
    """Returns the logits of transformers, computed in `dtype`, as float32."""
    model = reference(config, attention).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    rotary = model.model.rotary_emb.inv_freq.clone()
    model = model.to(dtype)
    model.model.rotary_emb.inv_freq = rotary  # as `from_pretrained` leaves it: only parameters are cast
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.from_numpy(ids)).logits.float())


@nnx.jit
def our_logits(model: nnx.Module, ids: np.ndarray) -> jax.Array:
    """Returns the logits of perparam."""
    return model(ids)


def error(found: Any, exact: np.ndarray) -> tuple[float, float]:
    """Returns the relative errors on the first prompt and on all."""
    difference = np.asarray(found).astype(np.float64) - exact
    first, every = (
        float(np.linalg.norm(difference[:count]) / np.linalg.norm(exact[:count])) for count in (1, len(exact))
    )
    return first, every


def measure(seed: int, prompts: int, number: int) -> dict[str, Any]:
    """Returns the config of a random model and the errors of all contenders."""
    torch.set_num_threads(1)
    # Saves time of compilation. The errors of 12 models were the same with all optimisations.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
    rng = np.random.default_rng((seed, number))
    config, fp8 = draw_config(rng, tuple(ARCHITECTURES)[number % 3]), number // 3 % 2 == 1
    tensors = draw_weights(rng, config)
    ids = rng.integers(config["vocab_size"], size=(prompts, LENGTH))
    block = tuple(map(int, rng.choice(BLOCKS))) if fp8 else None
    written = config | {"architectures": [ARCHITECTURES[config["model_type"]]], "torch_dtype": "bfloat16"}
    if block is not None:
        written["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block),
        }  # fmt: skip
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name], block)
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(written))
        safetensors.torch.save_file(tensors, pathlib.Path(folder) / "model.safetensors")
        found = {"perparam": our_logits(perparam.load_model(folder), ids)}
    weights = dequantised(tensors, block)
    exact = their_logits(config, weights, torch.float32, "eager", ids).astype(np.float64)
    found |= {name: their_logits(config, weights, torch.bfloat16, name, ids) for name in ("eager", "sdpa")}
    errors = {name: dict(zip(("first", "every"), error(logits, exact), strict=True)) for name, logits in found.items()}
    return {"number": number, "kind": "fp8" if fp8 else "bf16", "block": block, "config": config, "errors": errors}


def row(label: str, values: np.ndarray) -> str:
    """Returns a line of the table."""
    quantiles = " | ".join(f"{np.quantile(values, q):.2f}" for q in QUANTILES.values())
    logs = np.log(values)
    mean = math.exp(logs.mean())
    standard_error = mean * logs.std(ddof=1) / math.sqrt(len(logs))
    return f"| {label} | {len(values)} | {quantiles} | {mean:.3f} ± {standard_error:.3f} |"


def table(models: Sequence[dict[str, Any]]) -> str:
    """Returns the distributions of the ratios in Markdown."""
    lines = [
        "| error of / error of | prompts | models | " + " | ".join(QUANTILES) + " | mean |",
        "|---" * (len(QUANTILES) + 4) + "|",
    ]
    for kind in ("bf16", "fp8"):
        of_kind = [model["errors"] for model in models if model["kind"] == kind]
        for ours, theirs in (("perparam", "eager"), ("perparam", "sdpa"), ("sdpa", "eager")):
            for prompts in ("first", "every"):
                values = np.array([errors[ours][prompts] / errors[theirs][prompts] for errors in of_kind])
                lines.append(row(f"{kind}: {ours} / {theirs} | {prompts}", values))
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, default=156)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("perparam", "jax", "torch", "transformers")}
    header = {"date": datetime.date.today().isoformat(), "versions": versions, "seed": options.seed}
    models: list[dict[str, Any]] = []
    one = functools.partial(measure, options.seed, options.prompts)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for model in pool.map(one, range(options.models)):
            models.append(model)
            print(json.dumps(model), flush=True)
            lines = ",\n".join(map(json.dumps, models))  # after each model, so that an interruption loses nothing
            text = f'{json.dumps(header)[:-1]}, "models": [\n{lines}\n]}}\n'
            (options.out / "bf16-error.json").write_text(text)
    print(table(models))


if __name__ == "__main__":
    main()
