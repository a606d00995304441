"""FP8 checkpoints with random weights in Hugging Face layout, for `generate.py`."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_TOKENS: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}

_DENSE = {
    "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "tie_word_embeddings": True, "vocab_size": 151936,
}  # fmt: skip

_MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 384, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "output_router_logits": False,
    "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
    "num_hidden_layers": 6, "num_key_value_heads": 2, "tie_word_embeddings": False, "vocab_size": 10240,
}  # fmt: skip
"""Half of Qwen3-30B-A3B's width, an eighth of its layers and a fifteenth of its vocabulary: 0.98 GB, of which a token
takes about the same part of experts, attention and head."""

MODELS = {"0.6B": _DENSE, "30B-A3B scaled down": _MIXTURE}


def write(folder: pathlib.Path, model: str) -> None:
    """Writes a checkpoint of one of `MODELS`: kernels in FP8 with scales of 128×128 blocks, the others in bfloat16."""
    from perparam.examples import make_checkpoint as maker

    config = maker._COMMON | MODELS[model] | _TOKENS | {"torch_dtype": "bfloat16", "quantization_config": _FP8}
    (folder / "config.json").write_text(json.dumps(config))
    arrays = maker.tensors(config, seed=0, ones=False) if model == "0.6B" else _mixture(config)
    maker.write_safetensors(folder / "model.safetensors", arrays)


def _mixture(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the tensors of a mixture of experts by name. Kernels are random codes, which takes no quantisation."""
    import ml_dtypes

    random = np.random.default_rng(0)
    hidden, head, vocabulary = config["hidden_size"], config["head_dim"], config["vocab_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    result: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        codes = random.integers(0, 256, (rows, columns), np.uint8) & 0xBF  # of numbers below 2, about 0.5 in size
        result[f"{name}.weight"] = codes.view(ml_dtypes.float8_e4m3fn)
        grid = -(-rows // 128), -(-columns // 128)
        result[f"{name}.weight_scale_inv"] = np.full(grid, 2 / columns**0.5, ml_dtypes.bfloat16)

    def plain(name: str, *shape: int) -> None:
        values = np.ones(shape) if len(shape) == 1 else random.standard_normal(shape, np.float32) / shape[-1] ** 0.5
        result[f"{name}.weight"] = values.astype(ml_dtypes.bfloat16)

    plain("model.embed_tokens", vocabulary, hidden)
    plain("lm_head", vocabulary, hidden)
    plain("model.norm", hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, size in (("input_layernorm", hidden), ("post_attention_layernorm", hidden)):
            plain(f"{layer}.{name}", size)
        for name, rows, columns in (
            ("q_proj", queries, hidden), ("k_proj", keys, hidden), ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ):  # fmt: skip
            matrix(f"{layer}.self_attn.{name}", rows, columns)
        plain(f"{layer}.self_attn.q_norm", head)
        plain(f"{layer}.self_attn.k_norm", head)
        plain(f"{layer}.mlp.gate", config["num_experts"], hidden)
        width = config["moe_intermediate_size"]
        for expert in range(config["num_experts"]):
            for name, rows, columns in (
                ("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width),
            ):  # fmt: skip
                matrix(f"{layer}.mlp.experts.{expert}.{name}", rows, columns)
    return result
