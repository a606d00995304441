"""Qwen3-MoE: its config.json and its names."""

from __future__ import annotations

from typing import Any

from ...models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig
from ...policies.errors import shown
from ..fields import Fields
from .config_json import WINDOWS, read_windows, windows_to_json
from .family import Family
from .names import decoder_names, mixture, norm

_FIELDS = """
    attention_bias decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts
    num_experts_per_tok num_local_experts
"""

# Far above any model; a damaged config must not take minutes. Qwen3-235B-A22B has 94 layers of 128 experts.
_MOST_EXPERTS = 2**17


def _read(config: Fields) -> dict[str, Any]:
    # transformers 5 writes `num_local_experts`, published files have `num_experts`. The defaults are transformers'.
    experts = config.size("num_experts", config.size("num_local_experts", 128))
    if config.size("num_local_experts", experts) != experts:
        raise config.invalid(f"num_experts is {experts}, num_local_experts {config.size('num_local_experts')}.")
    if experts * config.size("num_hidden_layers") > _MOST_EXPERTS:
        raise config.invalid(f"num_experts: expected at most {_MOST_EXPERTS} in all layers, found {experts} in each.")
    per_token = config.size("num_experts_per_tok", 8)
    if per_token > experts:
        raise config.invalid(f"num_experts_per_tok is {per_token}, more than num_experts, {experts}.")
    dense = config.get("mlp_only_layers", list, [])
    if any(type(layer) is not int for layer in dense):
        raise config.invalid(f"mlp_only_layers: expected numbers of layers, found {shown(dense)}.")
    return {
        "attention_bias": config.get("attention_bias", bool, False),
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": config.size("moe_intermediate_size", 768),
        "norm_topk_prob": config.get("norm_topk_prob", bool, False),
        "decoder_sparse_step": config.size("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(dense),
        "windows": read_windows(config),
    }


def _write(config: Qwen3MoeConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.attention_bias,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": config.decoder_sparse_step,
        "mlp_only_layers": list(config.mlp_only_layers),
        **windows_to_json(config),
    }


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    name="Qwen3Moe",
    model=Qwen3Moe,
    names=decoder_names(
        norm("model.layers.{i}.self_attn.q_norm", "head"),
        norm("model.layers.{i}.self_attn.k_norm", "head"),
        *mixture("model.layers.{i}.mlp"),
    ),
    fields=WINDOWS | frozenset(_FIELDS.split()),
    read=_read,
    write=_write,
    # In transformers a window is for all layers of this family, whatever max_window_layers says.
    only={"use_qk_norm": True, "use_sliding_window": False, "qkv_bias": False, "shared_expert_intermediate_size": 0},
)
