"""Real shapes: every distinct linear layer of the dense Qwen3 models, which tests and benchmarks share."""

from __future__ import annotations

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
