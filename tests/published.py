"""The config.json of published FP8 checkpoints, without fields that change nothing here.

Shapes are those of Hugging Face's repositories of these names. So are the totals, `safetensors.total` of the hub's API:
`PARAMETERS` for the checkpoint in bfloat16, and `VALUES` for the FP8 one, where each scale counts as well.
"""

_QWEN3 = {
    "vocab_size": 151936, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16",
    "max_position_embeddings": 40960,
}  # fmt: skip
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _mixture(layers, **shape):
    routers = [f"model.layers.{i}.mlp.gate" for i in range(layers)]
    return {
        **_QWEN3, **shape,
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": layers,
        "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "quantization_config": {**_FP8, "modules_to_not_convert": ["lm_head", *routers]},
    }  # fmt: skip


CONFIGS = {
    "Qwen3-8B-FP8": {
        **_QWEN3, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "quantization_config": _FP8,
    },
    "Qwen3-30B-A3B-FP8": _mixture(
        48, hidden_size=2048, intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4, num_experts=128,
        moe_intermediate_size=768,
    ),
    "Qwen3-235B-A22B-FP8": _mixture(
        94, hidden_size=4096, intermediate_size=12288, num_attention_heads=64, num_key_value_heads=4, num_experts=128,
        moe_intermediate_size=1536,
    ),
    "Qwen3-Coder-480B-A35B-Instruct-FP8": _mixture(
        62, hidden_size=6144, intermediate_size=8192, num_attention_heads=96, num_key_value_heads=8, num_experts=160,
        moe_intermediate_size=2560, max_position_embeddings=262144,
    ),
}  # fmt: skip

PARAMETERS = {
    "Qwen3-8B-FP8": 8_190_735_360,
    "Qwen3-30B-A3B-FP8": 30_532_122_624,
    "Qwen3-235B-A22B-FP8": 235_093_634_560,
    "Qwen3-Coder-480B-A35B-Instruct-FP8": 480_154_875_392,
}
VALUES = {
    "Qwen3-30B-A3B-FP8": 30_533_947_392,
    "Qwen3-235B-A22B-FP8": 235_107_904_512,
    "Qwen3-Coder-480B-A35B-Instruct-FP8": 480_184_064_000,
}
