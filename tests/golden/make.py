"""Write the golden checkpoints and the outputs Hugging Face transformers computes from them.

    python tests/golden/make.py

needs torch and transformers; a CPU is enough. Every case becomes a folder beside this file: a Qwen3 checkpoint in the
published layout (`config.json` and safetensors) and `expected.npz`, which holds

    input_ids, attention_mask    int32 [batch, time]
    logits_f32                   float32 [batch, time, vocab], the model run in float32
    logits_bf16                  the same with weights and activations in bfloat16, stored as float32
    greedy                       int32 [batch, GREEDY_TOKENS], the float32 greedy continuation of every row
    greedy_margin                the smallest gap between the two best logits on the greedy path

Attention is eager, FP8 weights are dequantised in float32, positions count the attended tokens, and logits at padded
positions are set to zero. `VERSIONS.json` names the library versions. With those versions, a second run on the same
machine writes the same bytes.
"""

import json
import math
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

GOLDEN = Path(__file__).parent
GREEDY_TOKENS = 8
NOTICEABLE = 1e-2  # as a part of the standard deviation of the logits

Tensors = dict[str, torch.Tensor]

FINITE_CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
CODE_RMS = torch.from_numpy(FINITE_CODES).view(torch.float8_e4m3fn).float().square().mean().sqrt().item()


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    seed: int  # one whose greedy rows vary and are never nearly a draw
    hidden: int
    intermediate: int
    layers: int = 2
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    head_stored: bool = True
    block: tuple[int, int] | None = None  # None leaves the whole checkpoint unquantised
    scale_dtype: torch.dtype = torch.bfloat16
    plain_dtype: torch.dtype = torch.bfloat16  # of everything that is neither FP8 nor a scale
    not_converted: tuple[str, ...] = ()
    new_form: bool = False  # of config.json: `dtype` and `rope_parameters`
    settings: dict = field(default_factory=dict)  # what config.json adds or says differently
    lengths: tuple[int, ...] = (11, 11)
    padding_side: str = "left"
    shards: int = 1


PUBLISHED = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False,
    "attention_dropout": 0.0, "initializer_range": 0.02, "max_position_embeddings": 128, "rms_norm_eps": 1e-06,
    "use_cache": True, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip
OLD_FORM = {"torch_dtype": "bfloat16", "transformers_version": "4.51.0", "rope_theta": 10000, "rope_scaling": None}
NEW_FORM = {"dtype": "bfloat16", "transformers_version": "5.0.0"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NEW_YARN = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 6.0, "original_max_position_embeddings": 24,
    "attention_factor": 1.3, "beta_fast": 2.0, "beta_slow": 0.25, "truncate": False,
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
)  # fmt: skip


def published_config(case: Case) -> dict:
    sizes = {
        "hidden_size": case.hidden, "intermediate_size": case.intermediate, "vocab_size": case.vocab,
        "num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "head_dim": case.head_dim,
        "num_hidden_layers": case.layers, "max_window_layers": case.layers, "tie_word_embeddings": case.tied,
        "bos_token_id": case.vocab - 3, "eos_token_id": case.vocab - 2, "pad_token_id": case.vocab - 1,
    }  # fmt: skip
    config = PUBLISHED | (NEW_FORM if case.new_form else OLD_FORM) | sizes | case.settings
    if case.block:
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        config["quantization_config"] = quantization | {"weight_block_size": list(case.block)}
    if case.not_converted:
        config["quantization_config"]["modules_to_not_convert"] = ["lm_head", *case.not_converted]
    return config


def model_config(config: dict) -> Qwen3Config:
    config = json.loads(json.dumps(config))  # transformers edits what it gets
    config.pop("quantization_config", None)
    return Qwen3Config(**config)


def random_fp8(
    rng: np.random.Generator, shape: tuple[int, int], block: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """An FP8 payload using every finite code, with one block of zeros, and block scales that differ by up to 2**6."""
    grid = np.ceil(np.divide(shape, block)).astype(int)
    codes = rng.permutation(np.resize(FINITE_CODES, math.prod(shape))).reshape(shape)
    row, column = rng.integers(grid) * block
    codes[row : row + block[0], column : column + block[1]] = 0
    gains = 2.0 ** rng.permutation(np.linspace(-3, 3, grid.prod())).reshape(grid)
    scales = gains / np.sqrt(np.mean(gains**2)) / (CODE_RMS * math.sqrt(shape[1]))
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales).to(scale_dtype)


def dequantise(payload: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows, columns = payload.shape
    scale_of_element = scale_inv.float().repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return payload.float() * scale_of_element[:rows, :columns]


def random_checkpoint(rng: np.random.Generator, case: Case, config: dict) -> Tensors:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(model_config(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if case.tied:
        del shapes["lm_head.weight"]
    tensors = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if case.block and kind == "weight" and module.endswith("_proj") and module not in case.not_converted:
            tensors[name], tensors[f"{name}_scale_inv"] = random_fp8(rng, shape, case.block, case.scale_dtype)
            continue
        if module.endswith("norm"):
            values = rng.uniform(0.5, 1.5, shape)
        elif kind == "bias":
            values = rng.normal(size=shape) * 0.3
        else:
            values = rng.normal(size=shape) / math.sqrt(shape[1])
        tensors[name] = torch.from_numpy(values).to(case.plain_dtype)
    if case.tied and case.head_stored:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return tensors


def random_prompts(rng: np.random.Generator, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The input ids and the attention mask, 1 on the tokens of a row and 0 on its padding."""
    attended = np.arange(max(case.lengths)) < np.array(case.lengths)[:, None]
    if case.padding_side == "left":
        attended = attended[:, ::-1]
    input_ids = np.where(attended, rng.integers(case.vocab, size=attended.shape), case.vocab - 1)
    return torch.from_numpy(input_ids), torch.from_numpy(attended.astype(np.int64))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def save_checkpoint(folder: Path, tensors: Tensors, shards: int) -> None:
    files = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    if shards == 1:
        files = ["model.safetensors"]
    # Dealt out in the order of their names, a weight and its scale never share a shard.
    weight_map = {name: files[index % shards] for index, name in enumerate(sorted(tensors))}
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    if shards > 1:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def reference_model(config: dict, tensors: Tensors, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """The transformers model of a checkpoint, FP8 weights dequantised in float32 and then rounded to `dtype`."""
    block = config.get("quantization_config", {}).get("weight_block_size")
    weights = {}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in tensors:
            weights[name] = dequantise(tensor, tensors[f"{name}_scale_inv"], block)
        elif not name.endswith("_scale_inv"):
            weights[name] = tensor.float()
    model, loading = Qwen3ForCausalLM.from_pretrained(
        None,
        config=model_config(config),
        state_dict=weights,
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    check_settings(config, model)
    return model.eval()


def check_settings(config: dict, model: Qwen3ForCausalLM) -> None:
    """Assert that transformers took the settings that a silent default could replace."""
    rope = config.get("rope_parameters") or config["rope_scaling"] or {}
    theta = rope.get("rope_theta") or config["rope_theta"]
    plain_frequencies = theta ** -(torch.arange(0, config["head_dim"], 2) / config["head_dim"])
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.allclose(rotary.inv_freq, plain_frequencies) == (not rope)
    attention_factor = rope.get("attention_factor", 1 + 0.1 * math.log(rope.get("factor", 1)))
    assert math.isclose(rotary.attention_scaling, attention_factor)
    first_sliding = config["max_window_layers"] if config["use_sliding_window"] else config["num_hidden_layers"]
    for number, layer in enumerate(model.model.layers):
        assert layer.self_attn.sliding_window == (config["sliding_window"] if number >= first_sliding else None)
        assert (layer.self_attn.q_proj.bias is not None) == config["attention_bias"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config["tie_word_embeddings"]
    assert model.config._attn_implementation == "eager"


def compute_logits(model: Qwen3ForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    return logits.float().masked_fill(attention_mask[:, :, None] == 0, 0.0)


def continue_greedily(model: Qwen3ForCausalLM, prompt: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The greedy tokens after an unpadded row, and the smallest gap between the two best logits on the way."""
    model.generation_config = GenerationConfig(
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    generated = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]))
    best = torch.cat(generated.logits).topk(2).values
    return generated.sequences[0, len(prompt) :], (best[:, 0] - best[:, 1]).min().item()


def make_case(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    config = published_config(case)
    tensors = random_checkpoint(rng, case, config)
    input_ids, attention_mask = random_prompts(rng, case)

    model = reference_model(config, tensors, torch.float32)
    logits = compute_logits(model, input_ids, attention_mask)
    logits_bf16 = compute_logits(reference_model(config, tensors, torch.bfloat16), input_ids, attention_mask)
    rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    greedy, margins = zip(*(continue_greedily(model, row) for row in rows), strict=True)

    margin = min(margins)
    deviation = logits[attention_mask.bool()].std().item()
    assert margin > NOTICEABLE * deviation, f"{case.name}: margin {margin}, choose another seed"
    assert all(len(row.unique()) >= GREEDY_TOKENS // 2 for row in greedy), f"{case.name}: choose another seed"
    for name in (name for name in tensors if name.endswith("_scale_inv")):
        changed = reference_model(config, tensors | {name: tensors[name].flip(0, 1)}, torch.float32)
        difference = (compute_logits(changed, input_ids, attention_mask) - logits).abs().max()
        assert difference > NOTICEABLE * deviation, f"{case.name}: {name} hardly matters"

    folder = GOLDEN / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_json(folder / "config.json", config)
    save_checkpoint(folder, tensors, case.shards)
    np.savez_compressed(
        folder / "expected.npz",
        input_ids=input_ids.numpy().astype(np.int32),
        attention_mask=attention_mask.numpy().astype(np.int32),
        logits_f32=logits.numpy(),
        logits_bf16=logits_bf16.numpy(),
        greedy=torch.stack(greedy).numpy().astype(np.int32),
        greedy_margin=margin,
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    rounding = (logits_bf16 - logits).abs().max().item() / deviation
    print(
        f"{case.name:32}{size:9,} bytes, logits std {deviation:.3f}, greedy margin {margin / deviation:.4f} std, "
        f"bfloat16 off by up to {rounding:.4f} std"
    )


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    libraries = {module.__name__: module.__version__ for module in (np, safetensors, torch, transformers)}
    versions = {"python": platform.python_version()} | libraries
    print(versions)
    write_json(GOLDEN / "VERSIONS.json", versions)
    for case in CASES:
        make_case(case)


if __name__ == "__main__":
    main()
