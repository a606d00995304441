"""The logical axes of a decoder's parameters: names for what each dimension counts, the same in all layers."""

from __future__ import annotations

from collections.abc import Mapping

LogicalAxes = Mapping[str, tuple[str | None, ...]]
"""{pattern: the logical axis of each dimension}; scales have the axes of their kernel."""

DENSE: LogicalAxes = {
    "embed_tokens/embedding": ("vocab", "embed"),
    "lm_head/kernel": ("vocab", "embed"),
    "**/q_proj/kernel": ("heads", "embed"),
    "**/q_proj/bias": ("heads",),
    "**/{k,v}_proj/kernel": ("kv_heads", "embed"),
    "**/{k,v}_proj/bias": ("kv_heads",),
    "**/o_proj/kernel": ("embed", "heads"),
    "**/mlp/{gate,up}_proj/kernel": ("mlp", "embed"),
    "**/mlp/{gate,up}_proj/bias": ("mlp",),
    "**/mlp/down_proj/kernel": ("embed", "mlp"),
}
"""Parameters that match no pattern, such as norms, have no logical axes, and are replicated."""

MIXTURE: LogicalAxes = {
    "**/experts/{gate,up}_proj/kernel": ("experts", "expert_mlp", "embed"),
    "**/experts/down_proj/kernel": ("experts", "embed", "expert_mlp"),
}
"""The axes of mixtures of experts, beside those of DENSE. Routers have none, since all devices route alike."""
