"""Qwen3 models of the published shapes for benchmarks, as abstract arrays without memory."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from perparam import Policy, Qwen3, Qwen3Config, get_policy
from perparam.models import shapes

LAYERS = {"0.6B": 28, "1.7B": 28, "4B": 36, "8B": 36, "14B": 40, "32B": 64}
TIED = ("0.6B", "1.7B", "4B")
VOCABULARY = 151936
MODES = {"W8A16": "fp8_weight_only", "W8A8": "fp8_dynamic"}
"""The preset with the compute rules of each mode."""


def abstract_model(size: str, mode: str = "W8A16") -> Qwen3:
    """Returns an abstract Qwen3 with the dtypes of the published FP8 checkpoints: FP8 kernels, the rest in bfloat16."""
    hidden, wide, heads, kv_heads = shapes._MODELS[size]
    config = Qwen3Config(
        VOCABULARY, hidden, wide, LAYERS[size], heads, kv_heads, 128, tie_word_embeddings=size in TIED,
        dtype=np.dtype(jnp.bfloat16), pad_token_id=0,
    )  # fmt: skip
    stored = {"lm_head/kernel?": "bf16", "kernel": "f8_e4m3fn", "default": "bf16"}
    return Qwen3(config, policy=Policy(stored, get_policy(MODES[mode]).compute, "bf16"), rngs=None)
