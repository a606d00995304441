"""Shapes of published Qwen3 models, for tests and benchmarks: each linear layer, whole models, a mixture of experts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from perparam import Policy, get_policy
from perparam.models import Qwen3, Qwen3Config
from perparam.models.moe import SparseMLP

ROWS = (1, 8, 64, 512, 4096)
"""A token, small batches of them, and prompts."""

_MODELS = {  # hidden, intermediate, query heads, key and value heads; heads are 128 wide
    "0.6B": (1024, 3072, 16, 8),
    "1.7B": (2048, 6144, 16, 8),
    "4B": (2560, 9728, 32, 8),
    "8B": (4096, 12288, 32, 8),
    "14B": (5120, 17408, 40, 8),
    "32B": (5120, 25600, 64, 8),
}


def linears(model: str) -> dict[str, tuple[int, int]]:
    """The `(out, in)` of each linear of a layer.

    >>> linears("8B")["down_proj"]
    (4096, 12288)
    """
    hidden, wide, heads, kv_heads = _MODELS[model]
    return {
        "q_proj": (128 * heads, hidden),
        "k_proj": (128 * kv_heads, hidden),
        "v_proj": (128 * kv_heads, hidden),
        "o_proj": (hidden, 128 * heads),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
    }


SHAPES = tuple(sorted({shape for model in _MODELS for shape in linears(model).values()}))
"""`(out, in)` of them all, each once."""

TINY = "tiny"
"""A model of one layer, to test the scripts."""

_TINY = (256, 512, 4, 2)

LAYERS = {"0.6B": 28, "1.7B": 28, "4B": 36, "8B": 36, "14B": 40, "32B": 64}
TIED = ("0.6B", "1.7B", "4B")
VOCABULARY = 151936
MODES = {"W8A16": "fp8_weight_only", "W8A8": "fp8_dynamic"}
"""The preset of each mode of computation."""


def abstract_model(size: str, mode: str = "W8A16", *, layers: int | None = None, vocabulary: int = VOCABULARY) -> Qwen3:
    """A Qwen3 of shapes, stored as its FP8 checkpoint is: FP8 kernels, other parameters in bfloat16.

    layers  None: as many as the published model has
    """
    hidden, intermediate, heads, kv_heads = _TINY if size == TINY else _MODELS[size]
    config = Qwen3Config(
        vocab_size=511 if size == TINY else vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or (1 if size == TINY else LAYERS[size]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        tie_word_embeddings=size in TIED,
        dtype=np.dtype(jnp.bfloat16),
        pad_token_id=0,
    )
    return Qwen3(config, policy=_policy(mode, "lm_head/kernel?"), rngs=None)


EXPERTS, PER_TOKEN, HIDDEN, WIDTH = 128, 8, 2048, 768
"""Of a layer of Qwen3-30B-A3B: experts, those of each token, and columns of x and of the hidden layer of an expert."""


def abstract_experts(mode: str = "W8A16") -> SparseMLP:
    """A mixture of experts of shapes, that of a layer of Qwen3-30B-A3B, stored as its FP8 checkpoint is."""
    return nnx.eval_shape(
        lambda: SparseMLP(
            experts=EXPERTS,
            per_token=PER_TOKEN,
            hidden=HIDDEN,
            width=WIDTH,
            norm_topk_prob=True,
            policy=_policy(mode, "gate/kernel").at(),
            rngs=nnx.Rngs(0),
        )
    )


def _policy(mode: str, wide: str) -> Policy:
    """The policy of FP8 checkpoints, with the kernels of the pattern `wide` in bfloat16."""
    stored = {wide: "bf16", "kernel": "f8_e4m3fn", "default": "bf16"}
    return Policy(stored, get_policy(MODES[mode]).compute, "bf16")
