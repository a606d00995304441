"""The golden cases, and the `config.json` of each, with the fields that published checkpoints of its family have."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint and its prompts.

    seed           one whose greedy rows vary and are never nearly a draw
    head_dim       None leaves it out of config.json, where it then means hidden over heads
    head_stored    whether a tied checkpoint holds lm_head.weight all the same
    block          of FP8 weights with `weight_scale_inv`
    strategy       "channel" or "tensor": FP8 weights with `weight_scale`, in the layout of compressed-tensors.
                   With neither a block nor a strategy, the whole checkpoint is unquantised
    plain_dtype    of everything that is neither FP8 nor a scale
    not_converted  modules that a checkpoint with a block leaves unquantised
    new_form       of config.json: `dtype` and `rope_parameters`
    settings       fields that config.json adds or gives another value
    lengths        tokens of each prompt; shorter ones are padded
    task           what the model is for; a folder of `tasks/` if that is not a causal language model
    labels         names of the classes of a classifier
    texts          "embed" or "rerank": the folder has a tokenizer as well, and the published code's results for texts
    """

    name: str
    seed: int
    family: str = "qwen3"
    hidden: int
    intermediate: int
    layers: int = 2
    heads: int
    kv_heads: int
    head_dim: int | None = None
    vocab: int
    tied: bool = False
    head_stored: bool = True
    block: tuple[int, int] | None = None
    strategy: str | None = None
    scale_dtype: torch.dtype = torch.bfloat16
    plain_dtype: torch.dtype = torch.bfloat16
    not_converted: tuple[str, ...] = ()
    new_form: bool = False
    settings: dict = field(default_factory=dict)
    lengths: tuple[int, ...] = (11, 11)
    padding_side: str = "left"
    shards: int = 1
    task: str = "causal_lm"
    labels: tuple[str, ...] = ()
    texts: str | None = None


SHARED = {
    "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "max_position_embeddings": 128,
    "use_cache": True,
}  # fmt: skip
OF_FAMILY = {
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-06, "attention_bias": False,
        "use_sliding_window": False, "sliding_window": None,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "rms_norm_eps": 1e-06, "attention_bias": False,
        "use_sliding_window": False, "sliding_window": None, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": True, "num_experts": 5, "num_experts_per_tok": 2, "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    # A window that is not in use: published ones have a length all the same.
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-06, "use_sliding_window": False,
        "sliding_window": 128,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-05, "attention_bias": False, "mlp_bias": False,
        "pretraining_tp": 1,
    },
}  # fmt: skip
OLD_FORM = {"torch_dtype": "bfloat16", "transformers_version": "4.51.0", "rope_theta": 10000}
NEW_FORM = {"dtype": "bfloat16", "transformers_version": "5.0.0"}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NEW_YARN = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 6.0, "original_max_position_embeddings": 24,
    "attention_factor": 1.3, "beta_fast": 2.0, "beta_slow": 0.25, "truncate": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
NEW_LINEAR = {"rope_type": "linear", "rope_theta": 100000.0, "factor": 2.0}
SMOLLM2 = {
    "rope_theta": 100000, "is_llama_config": True, "rope_interleaved": False, "initializer_range": 0.041666666666666664,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}  # fmt: skip

CASES = (
    Case(name="fp8_tied_bf16_scales", seed=216, tied=True, head_stored=False, block=(16, 16),
         hidden=60, intermediate=100, heads=6, kv_heads=2, head_dim=20, vocab=173),
    Case(name="fp8_untied_f32_scales", seed=208, block=(16, 24), scale_dtype=torch.float32, plain_dtype=torch.float32,
         hidden=68, intermediate=84, heads=4, kv_heads=2, head_dim=24, vocab=160, settings={"rope_theta": 1000000}),
    Case(name="fp8_ragged_block128_f16_scales", seed=302, block=(128, 128), scale_dtype=torch.float16,
         hidden=320, intermediate=456, heads=6, kv_heads=3, head_dim=56, vocab=160),
    Case(name="fp8_bias", seed=428, block=(24, 16), settings={"attention_bias": True, "rope_theta": 500},
         hidden=56, intermediate=104, heads=6, kv_heads=3, head_dim=18, vocab=167),
    Case(name="fp8_yarn", seed=541, block=(16, 16), lengths=(40,),
         hidden=64, intermediate=92, heads=4, kv_heads=2, head_dim=24, vocab=180,
         settings={"rope_theta": 2000, "rope_scaling": YARN, "max_position_embeddings": 80}),
    Case(name="bf16_yarn_new_form", seed=696, lengths=(40,), new_form=True, settings={"rope_parameters": NEW_YARN},
         hidden=56, intermediate=72, heads=4, kv_heads=2, head_dim=32, vocab=160),
    Case(name="fp8_sliding_window", seed=704, block=(16, 24), layers=3, lengths=(16, 16),
         hidden=60, intermediate=76, heads=6, kv_heads=2, head_dim=20, vocab=161,
         settings={"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    Case(name="fp8_left_padding", seed=833, block=(24, 16), lengths=(7, 12, 4),
         hidden=72, intermediate=88, heads=4, kv_heads=2, head_dim=26, vocab=170),
    Case(name="fp8_right_padding", seed=968, block=(16, 24), lengths=(7, 12, 4), padding_side="right",
         hidden=70, intermediate=90, heads=4, kv_heads=2, head_dim=22, vocab=166),
    Case(name="fp8_shards", seed=1006, block=(16, 16), shards=3,
         hidden=58, intermediate=82, heads=6, kv_heads=3, head_dim=16, vocab=165),
    Case(name="fp8_mixed_unquantised", seed=1166, block=(24, 16),
         not_converted=("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"),
         hidden=66, intermediate=86, heads=4, kv_heads=2, head_dim=28, vocab=168),
    Case(name="bf16_plain", seed=1346, settings={"rope_theta": 1000000},
         hidden=58, intermediate=74, heads=6, kv_heads=2, head_dim=16, vocab=162),
    Case(name="fp8_tied_with_lm_head", seed=1340, tied=True, block=(16, 16),
         hidden=62, intermediate=78, heads=4, kv_heads=2, head_dim=20, vocab=172),
    Case(name="qwen2_fp8_tied", seed=1445, family="qwen2", tied=True, head_stored=False, block=(16, 24),
         lengths=(7, 12, 4), hidden=60, intermediate=92, heads=6, kv_heads=2, vocab=164,
         settings={"rope_theta": 1000000.0, "sliding_window": 4, "max_window_layers": 1}),
    Case(name="qwen2_sliding_window", seed=1505, family="qwen2", layers=3, lengths=(16, 16),
         hidden=56, intermediate=68, heads=4, kv_heads=2, vocab=163,
         settings={"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    Case(name="llama_plain_tied", seed=1601, family="llama", tied=True, head_stored=False,
         hidden=54, intermediate=76, heads=9, kv_heads=3, vocab=169, settings=SMOLLM2),
    Case(name="llama_fp8_untied_llama3_rope", seed=1700, family="llama", block=(24, 16), lengths=(40,),
         hidden=72, intermediate=84, heads=4, kv_heads=2, head_dim=24, vocab=171,
         settings={"rope_theta": 500.0, "rope_scaling": LLAMA3, "max_position_embeddings": 256,
                   "eos_token_id": [166, 168, 169]}),
    Case(name="llama_fp8_biases", seed=1841, family="llama", block=(16, 24), lengths=(7, 12, 4),
         hidden=60, intermediate=82, heads=6, kv_heads=6, vocab=174,
         settings={"attention_bias": True, "mlp_bias": True}),
    Case(name="llama_linear_rope", seed=1907, family="llama", new_form=True, lengths=(7, 12, 4), padding_side="right",
         hidden=56, intermediate=70, heads=4, kv_heads=2, head_dim=14, vocab=175,
         settings={"rope_parameters": NEW_LINEAR}),
    Case(name="llama_fp8_channel", seed=2004, family="llama", strategy="channel",
         hidden=58, intermediate=86, heads=2, kv_heads=1, head_dim=24, vocab=176, settings={"rope_theta": 500000.0}),
    Case(name="llama_fp8_tensor", seed=2100, family="llama", strategy="tensor", scale_dtype=torch.float32,
         new_form=True, hidden=66, intermediate=80, heads=6, kv_heads=3, head_dim=16, vocab=177,
         settings={"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    Case(name="qwen3_moe_fp8_dense_first", seed=3014, family="qwen3_moe", block=(16, 24), layers=3, lengths=(7, 12, 4),
         not_converted=("model.layers.1.mlp.gate", "model.layers.2.mlp.gate"),
         hidden=60, intermediate=76, heads=4, kv_heads=2, head_dim=18, vocab=165,
         settings={"moe_intermediate_size": 40, "mlp_only_layers": [0]}),
    Case(name="qwen3_moe_plain_every_second", seed=3120, family="qwen3_moe", layers=4, tied=True, head_stored=False,
         hidden=52, intermediate=68, heads=4, kv_heads=2, head_dim=16, vocab=163,
         settings={"moe_intermediate_size": 36, "decoder_sparse_step": 2, "norm_topk_prob": False, "num_experts": 5,
                   "num_experts_per_tok": 3}),
    Case(name="embedding_fp8", seed=2207, block=(16, 24), lengths=(7, 12, 4), task="feature_extraction", texts="embed",
         hidden=48, intermediate=60, heads=4, kv_heads=2, head_dim=14, vocab=500,
         settings={"rope_theta": 1000000, "max_position_embeddings": 512}),
    Case(name="qwen2_model", seed=2311, family="qwen2", tied=True, lengths=(7, 12, 4), padding_side="right",
         task="feature_extraction", hidden=40, intermediate=44, heads=4, kv_heads=2, vocab=61,
         settings={"architectures": ["Qwen2Model"], "sliding_window": 4, "max_window_layers": 1}),
    Case(name="reranker_fp8", seed=2400, tied=True, head_stored=False, block=(24, 16), texts="rerank",
         hidden=40, intermediate=52, heads=4, kv_heads=2, head_dim=14, vocab=500,
         settings={"rope_theta": 1000000, "max_position_embeddings": 512}),
    Case(name="qwen3_sequence_fp8", seed=2506, tied=True, block=(16, 16), lengths=(7, 12, 4), padding_side="right",
         task="sequence_classification", labels=("good", "bad", "neither"),
         hidden=40, intermediate=44, heads=4, kv_heads=2, head_dim=14, vocab=61),
    Case(name="llama_sequence", seed=2601, family="llama", lengths=(7, 12, 4), task="sequence_classification",
         labels=("LABEL_0", "LABEL_1"), hidden=40, intermediate=44, heads=4, kv_heads=2, vocab=61),
    Case(name="qwen2_token_fp8", seed=2709, family="qwen2", block=(16, 24), lengths=(7, 12, 4),
         task="token_classification", labels=("O", "B-PER", "I-PER"),
         hidden=40, intermediate=52, heads=4, kv_heads=2, vocab=61,
         settings={"sliding_window": 4, "max_window_layers": 1}),
)  # fmt: skip

SUFFIXES = {
    "causal_lm": "ForCausalLM", "feature_extraction": "Model", "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
}  # fmt: skip


def reference_class(case: Case) -> str:
    """The name of transformers' class; config.json of Qwen3-Embedding names another one, `Qwen3ForCausalLM`."""
    return f"{case.family.title().replace('_', '')}{SUFFIXES[case.task]}"


def published_config(case: Case) -> dict:
    config = SHARED | OF_FAMILY[case.family] | (NEW_FORM if case.new_form else OLD_FORM)
    config |= {
        "model_type": case.family, "hidden_size": case.hidden, "intermediate_size": case.intermediate,
        "vocab_size": case.vocab, "num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads,
        "num_hidden_layers": case.layers, "tie_word_embeddings": case.tied,
        "bos_token_id": case.vocab - 3, "eos_token_id": case.vocab - 2, "pad_token_id": case.vocab - 1,
    }  # fmt: skip
    if case.head_dim:
        config["head_dim"] = case.head_dim
    if case.family != "llama":
        config["max_window_layers"] = case.layers
    if case.family != "qwen2" and not case.new_form:
        config["rope_scaling"] = None
    if case.labels:
        config["architectures"] = [reference_class(case)]
        config["id2label"] = {str(number): label for number, label in enumerate(case.labels)}
        config["label2id"] = {label: number for number, label in enumerate(case.labels)}
    config |= case.settings
    if case.block:
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        config["quantization_config"] = quantization | {"weight_block_size": list(case.block)}
    if case.not_converted:
        config["quantization_config"]["modules_to_not_convert"] = ["lm_head", *case.not_converted]
    if case.strategy:
        config["quantization_config"] = compressed_tensors(case)
    return config


def compressed_tensors(case: Case) -> dict:
    """`quantization_config` as compressed-tensors writes it: with the fields of 0.6, or in the new form of 0.20."""
    number = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    group = {
        "targets": ["Linear"],
        "weights": number | {"strategy": case.strategy, "dynamic": False},
        "input_activations": number | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    config = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "kv_cache_scheme": None, "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip
    if case.new_form:
        group["format"] = "float-quantized"
        return config | {
            "global_compression_ratio": None, "moe_sparsity_config": None, "sparsity_config": {},
            "transform_config": {}, "version": "0.20.0",
        }  # fmt: skip
    unused = {"block_structure": None, "actorder": None, "observer_kwargs": {}}
    group["weights"] |= unused | {"observer": "minmax"}
    group["input_activations"] |= unused | {"observer": "memoryless"}
    return config | {"global_compression_ratio": 1.239290831149584}
