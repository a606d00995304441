"""Write the golden checkpoints and the outputs Hugging Face transformers computes from them.

    python tests/golden/make.py [case ...]

needs torch and transformers; a CPU is enough. Every case of `cases.py`, or of those that the arguments name, becomes a
folder beside this file, or in `tasks/`: a checkpoint in the published layout (`config.json` and safetensors) and
`expected.npz`, which holds

    input_ids, attention_mask    int32 [batch, time]
    logits_f32                   float32 [batch, time, vocab], the model run in float32
    logits_bf16                  the same with weights and activations in bfloat16, stored as float32
    greedy                       int32 [batch, GREEDY_TOKENS], the float32 greedy continuation of every row
    greedy_margin                the smallest gap between the two best logits on the greedy path

Cases of another task have `outputs_f32` and `outputs_bf16` instead of logits and tokens: the logits of classes, or the
hidden states after the last norm. Cases with texts have a tokenizer and `texts.json`; see `texts.py`.

Attention is eager, FP8 weights are dequantised in float32, positions count the attended tokens, and logits at padded
positions are set to zero. `VERSIONS.json` names the library versions. With those versions, a second run on the same
machine writes the same bytes; with other versions, all cases are made again.
"""

import json
import math
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors
import torch
import transformers
from cases import CASES, Case, published_config, reference_class
from safetensors.torch import save_file
from texts import results_of_texts
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

GOLDEN = Path(__file__).parent
GREEDY_TOKENS = 8
NOTICEABLE = 1e-2  # as a part of the standard deviation of the logits

Tensors = dict[str, torch.Tensor]

FINITE_CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
CODE_RMS = torch.from_numpy(FINITE_CODES).view(torch.float8_e4m3fn).float().square().mean().sqrt().item()


def model_config(config: dict) -> PreTrainedConfig:
    config = json.loads(json.dumps(config))  # transformers edits what it gets
    config.pop("quantization_config", None)
    return AutoConfig.for_model(**config)


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


def random_fp8_of_one_scale(
    rng: np.random.Generator, shape: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """An FP8 payload using every finite code, and its one scale, which differs from others' by up to 2**2."""
    codes = rng.permutation(np.resize(FINITE_CODES, math.prod(shape))).reshape(shape)
    scale = 2.0 ** rng.uniform(-1, 1, 1) / (CODE_RMS * math.sqrt(shape[1]))
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scale).to(scale_dtype)


def dequantise(payload: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """The weight in float32. Without a block, each row has a scale or the whole weight has one."""
    if block is None:
        return payload.float() * scales.float()
    rows, columns = payload.shape
    scale_of_element = scales.float().repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return payload.float() * scale_of_element[:rows, :columns]


def published(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes by their names in published checkpoints, where each expert has tensors of its own.

    transformers stacks experts, and their gate_proj and up_proj in one `gate_up_proj`.
    """
    found = {}
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".experts.")
        if not module:
            found[name] = shape
            continue
        count, rows, columns = shape
        names, rows = (["gate_proj", "up_proj"], rows // 2) if last == "gate_up_proj" else ([last], rows)
        for expert in range(count):
            found |= {f"{module}.experts.{expert}.{each}.weight": (rows, columns) for each in names}
    return found


def is_scale(name: str) -> bool:
    return name.endswith(("weight_scale", "weight_scale_inv"))


def random_checkpoint(rng: np.random.Generator, case: Case, config: dict) -> Tensors:
    with torch.device("meta"):
        model = getattr(transformers, reference_class(case))(model_config(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = published(shapes)
    if case.tied and case.task == "causal_lm":
        del shapes["lm_head.weight"]
    tensors = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        projection = kind == "weight" and module.endswith("_proj") and module not in case.not_converted
        if projection and case.block:
            tensors[name], tensors[f"{name}_scale_inv"] = random_fp8(rng, shape, case.block, case.scale_dtype)
        elif projection and case.strategy == "channel":
            tensors[name], tensors[f"{name}_scale"] = random_fp8(rng, shape, (1, shape[1]), case.scale_dtype)
        elif projection and case.strategy == "tensor":
            tensors[name], tensors[f"{name}_scale"] = random_fp8_of_one_scale(rng, shape, case.scale_dtype)
        else:
            if module.endswith("norm"):
                values = rng.uniform(0.5, 1.5, shape)
            elif kind == "bias":
                values = rng.normal(size=shape) * 0.3
            else:
                values = rng.normal(size=shape) / math.sqrt(shape[1])
            tensors[name] = torch.from_numpy(values).to(case.plain_dtype)
    if case.tied and case.task == "causal_lm" and case.head_stored:
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


def reference_model(case: Case, config: dict, tensors: Tensors, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a checkpoint, FP8 weights dequantised in float32 and then rounded to `dtype`."""
    block = config.get("quantization_config", {}).get("weight_block_size")
    weights = {}
    for name, tensor in tensors.items():
        scales = [tensors[scale] for scale in (f"{name}_scale", f"{name}_scale_inv") if scale in tensors]
        if scales:
            weights[name] = dequantise(tensor, scales[0], block)
        elif not is_scale(name):
            weights[name] = tensor.float()
    model_class = getattr(transformers, reference_class(case))  # the Auto class wants a folder
    # The default, grouped_mm, needs sides that are multiples of 16 bytes; this one sums experts as it does.
    experts = {"experts_implementation": "batched_mm"} if "num_experts" in config else {}
    model, loading = model_class.from_pretrained(
        None,
        config=model_config(config),
        state_dict=weights,
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
        **experts,
    )
    assert not any(loading.values()), loading
    check_settings(config, model)
    return model.eval()


def is_dense(config: dict, layer: int) -> bool:
    """Whether a layer has no mixture of experts."""
    if config["model_type"] != "qwen3_moe":
        return True
    return layer in config["mlp_only_layers"] or (layer + 1) % config["decoder_sparse_step"] != 0


def rope_settings(config: dict) -> tuple[dict, float]:
    """The settings of the rope type, and theta."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {"rope_type": "default"}
    return rope, rope.get("rope_theta") or config["rope_theta"]


def expected_frequencies(rope: dict, theta: float, head_dim: int) -> torch.Tensor:
    """The rotation of each pair in radians per position, from the definition of the rope type."""
    plain = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    if rope["rope_type"] == "default":
        return plain
    divided = plain / rope["factor"]
    if rope["rope_type"] == "linear":
        return divided
    original = rope["original_max_position_embeddings"]
    turns = original * plain / (2 * math.pi)  # in the original context
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        assert 0 in kept, "no frequency is low"
        assert 1 in kept, "no frequency is high"
        assert ((kept > 0) & (kept < 1)).sum() > 1, "hardly a frequency is between low and high"
    else:
        assert rope["rope_type"] == "yarn"
        fast, slow = (
            head_dim * math.log(original / (2 * math.pi * beta)) / (2 * math.log(theta))
            for beta in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
        )
        if rope.get("truncate", True):
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, head_dim - 1)
        kept = 1 - ((torch.arange(head_dim // 2) - fast) / (slow - fast)).clamp(0, 1)
    return kept * plain + (1 - kept) * divided


def check_settings(config: dict, model: PreTrainedModel) -> None:
    """Assert that transformers took the settings that a silent default could replace."""
    assert model.config.model_type == config["model_type"]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    rope, theta = rope_settings(config)
    body = getattr(model, "model", model)
    rotary = body.rotary_emb
    assert rotary.rope_type == rope["rope_type"]
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.allclose(rotary.inv_freq, expected_frequencies(rope, theta, head_dim), rtol=1e-5, atol=0)
    default_factor = 1 + 0.1 * math.log(rope["factor"]) if rope["rope_type"] == "yarn" else 1
    assert math.isclose(rotary.attention_scaling, rope.get("attention_factor", default_factor))

    qkv_bias = config["model_type"] == "qwen2" or config["attention_bias"]
    biases = dict.fromkeys(("q_proj", "k_proj", "v_proj"), qkv_bias)
    biases["o_proj"] = config.get("attention_bias", False)
    biases |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), config.get("mlp_bias", False))
    first_sliding = config["max_window_layers"] if config.get("use_sliding_window") else config["num_hidden_layers"]
    for number, layer in enumerate(body.layers):
        window = getattr(layer.self_attn, "sliding_window", None)
        assert window == (config["sliding_window"] if number >= first_sliding else None)
        assert layer.self_attn.head_dim == head_dim
        assert hasattr(layer.self_attn, "q_norm") == config["model_type"].startswith("qwen3")
        assert layer.input_layernorm.variance_epsilon == config["rms_norm_eps"]
        projections = {name: module for name, module in layer.named_modules() if name.endswith("_proj")}
        dense = is_dense(config, number)
        assert hasattr(layer.mlp, "experts") == (not dense)
        expected = {name: bias for name, bias in biases.items() if dense or name.startswith(("q_", "k_", "v_", "o_"))}
        assert {name.split(".")[1]: module.bias is not None for name, module in projections.items()} == expected
        if not dense:
            assert layer.mlp.gate.norm_topk_prob == config["norm_topk_prob"]
            assert layer.mlp.gate.top_k == config["num_experts_per_tok"]
            assert layer.mlp.gate.num_experts == config["num_experts"]
    if hasattr(model, "lm_head"):
        assert (model.lm_head.weight is body.embed_tokens.weight) == config["tie_word_embeddings"]
    assert model.config._attn_implementation == "eager"


def misreadings(config: dict, tensors: Tensors) -> Iterator[tuple[str, dict, Tensors]]:
    """What is read wrongly, and the checkpoint that a wrong reader sees."""
    for name, tensor in tensors.items():
        if is_scale(name):
            yield name, config, tensors | {name: 2 * tensor if tensor.numel() == 1 else tensor.flip(0, 1)}
        elif name.endswith(".bias"):
            yield name, config, tensors | {name: torch.zeros_like(tensor)}
    rope, theta = rope_settings(config)
    if rope["rope_type"] != "default":
        for wrong in {"default", "linear"} - {rope["rope_type"]}:
            settings = {"rope_type": wrong, "rope_theta": theta, "factor": rope["factor"]}
            yield f"rope_type, not {wrong}", config | {"rope_parameters": settings, "rope_scaling": None}, tensors
    if "norm_topk_prob" in config:
        yield "norm_topk_prob", config | {"norm_topk_prob": not config["norm_topk_prob"]}, tensors
    if config.get("sliding_window"):
        yield "use_sliding_window", config | {"use_sliding_window": not config["use_sliding_window"]}, tensors


def compute_outputs(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits, or hidden states after the last norm: of every token, or of every row."""
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        results = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
    outputs = (results.logits if "logits" in results else results.last_hidden_state).float()
    return outputs if outputs.ndim == 2 else outputs.masked_fill(attention_mask[:, :, None] == 0, 0.0)


def continue_greedily(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[torch.Tensor, float]:
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
    rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    if case.task == "sequence_classification":  # takes the last token of a row that is not pad_token_id
        assert all(row[-1] != config["pad_token_id"] for row in rows), f"{case.name}: choose another seed"

    model = reference_model(case, config, tensors, torch.float32)
    outputs = compute_outputs(model, input_ids, attention_mask)
    in_bf16 = compute_outputs(reference_model(case, config, tensors, torch.bfloat16), input_ids, attention_mask)
    deviation = (outputs if outputs.ndim == 2 else outputs[attention_mask.bool()]).std().item()
    for name, *misread in misreadings(config, tensors):
        changed = reference_model(case, *misread, torch.float32)
        difference = (compute_outputs(changed, input_ids, attention_mask) - outputs).abs().max()
        assert difference > NOTICEABLE * deviation, f"{case.name}: {name} hardly matters"

    kind, more = "outputs", {}
    if case.task == "causal_lm":
        greedy, margins = zip(*(continue_greedily(model, row) for row in rows), strict=True)
        margin = min(margins)
        assert margin > NOTICEABLE * deviation, f"{case.name}: margin {margin}, choose another seed"
        assert all(len(row.unique()) >= GREEDY_TOKENS // 2 for row in greedy), f"{case.name}: choose another seed"
        kind, more = "logits", {"greedy": torch.stack(greedy).numpy().astype(np.int32), "greedy_margin": margin}

    folder = GOLDEN / ("tasks" if case.task != "causal_lm" or case.texts else "") / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    save_checkpoint(folder, tensors, case.shards)
    if case.texts:
        more |= results_of_texts(case.texts, model, folder)
    np.savez_compressed(
        folder / "expected.npz",
        input_ids=input_ids.numpy().astype(np.int32),
        attention_mask=attention_mask.numpy().astype(np.int32),
        **{f"{kind}_f32": outputs.numpy(), f"{kind}_bf16": in_bf16.numpy()},
        **more,
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    rounding = (in_bf16 - outputs).abs().max().item() / deviation
    margin = f"greedy margin {more['greedy_margin'] / deviation:.4f} std, " if "greedy_margin" in more else ""
    print(
        f"{case.name:32}{size:9,} bytes, {kind} std {deviation:.3f}, {margin}bfloat16 off by up to {rounding:.4f} std"
    )


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    names = sys.argv[1:]
    unknown = set(names) - {case.name for case in CASES}
    assert not unknown, f"no such case: {', '.join(sorted(unknown))}"
    libraries = {module.__name__: module.__version__ for module in (np, safetensors, torch, transformers)}
    versions = {"python": platform.python_version()} | libraries
    print(versions)
    recorded = GOLDEN / "VERSIONS.json"
    if names:
        assert versions == json.loads(recorded.read_text()), "not the versions of VERSIONS.json: make all cases"
    write_json(recorded, versions)
    for case in CASES:
        if not names or case.name in names:
            make_case(case)


if __name__ == "__main__":
    main()
