"""Small checkpoints written with numpy, ml_dtypes and json alone, and read back through the safetensors package.

Nothing here goes through perparam's loaders, so that what they read can be held against it.
"""

import functools
import json
import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors
from flax import nnx

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").is_file())
"""Folders that Hugging Face transformers computed the expected outputs of, see `golden/make.py`."""

BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = (16, 24)

FIELDS = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "hidden_size": 56,
    "intermediate_size": 76, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 18,
    "vocab_size": 61, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "rope_scaling": None,
    "attention_bias": False, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
    "max_window_layers": 2, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "eos_token_id": 59,
    "pad_token_id": 60,
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK),
    },
}  # fmt: skip
"""config.json of a small FP8 Qwen3: three blocks or more an axis, ragged edges, heads * head_dim != hidden."""

FAMILIES = {
    "qwen3": {},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "mlp_bias": True}
    | dict.fromkeys(("use_sliding_window", "sliding_window", "max_window_layers")),
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "quantization_config": {**FIELDS["quantization_config"], "modules_to_not_convert": ["model.layers.1.mlp.gate"]},
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_bias": None},
}
"""What the config.json of each family says otherwise than FIELDS; None: nothing."""

_BIASES = {"qwen2": ("q_proj", "k_proj", "v_proj")}

_CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)  # all but the two NaN
_FILE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
_PACKAGE_NAMES = {short: np.dtype(getattr(ml_dtypes, name, name)) for name, short in _FILE_NAMES.items()}


def fields(**changes) -> dict:
    """FIELDS with changes; None removes a field."""
    return {key: value for key, value in {**FIELDS, **changes}.items() if value is not None}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint with that config.json, by the published name, scales apart."""
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    biased = _BIASES.get(config["model_type"], ())
    biased += ("q_proj", "k_proj", "v_proj", "o_proj") if config.get("attention_bias") else ()
    biased += ("gate_proj", "up_proj", "down_proj") if config.get("mlp_bias") else ()
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        projections = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        for name, shape in projections.items():
            found[f"{layer}.self_attn.{name}_proj.weight"] = shape
            if f"{name}_proj" in biased:
                found[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
        experts = 0 if i in config.get("mlp_only_layers", [i]) else config["num_experts"]
        if experts:
            found[f"{layer}.mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            of_expert = f"{layer}.mlp.experts.{expert}"
            width = config["moe_intermediate_size"]
            for name, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
                found[f"{of_expert}.{name}_proj.weight"] = shape
        dense = {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)} if not experts else {}
        for name, shape in dense.items():
            found[f"{layer}.mlp.{name}_proj.weight"] = shape
            if f"{name}_proj" in biased:
                found[f"{layer}.mlp.{name}_proj.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (hidden,)
        for name in ("q_norm", "k_norm") if config["model_type"] in ("qwen3", "qwen3_moe") else ():
            found[f"{layer}.self_attn.{name}.weight"] = (head,)
    return found


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def narrow_pair(rng, shape, block=BLOCK, scale_dtype=BF16, kernel_dtype=F8) -> tuple[np.ndarray, np.ndarray]:
    """A random payload, and scales that differ by up to 2**6 between blocks; x @ weight.T is about as large as x."""
    kernel = rng.choice(_CODES, shape).view(F8).astype(np.float32).astype(kernel_dtype)
    gains = 2.0 ** rng.uniform(-3, 3, grid(shape, block))
    size = np.sqrt(np.mean(kernel.astype(np.float32) ** 2) * np.mean(gains**2) * shape[1])
    return kernel, (gains / size).astype(scale_dtype)


def tensors(config: dict, seed=0, scale_dtype=BF16, plain_dtype=BF16, plain=()) -> dict[str, np.ndarray]:
    """Random tensors for a config.json; with a quantization_config projections are FP8, but for those in `plain`."""
    rng = np.random.default_rng(seed)
    quantization = config.get("quantization_config")
    made = {}
    for name, shape in shapes(config).items():
        module = name.rpartition(".")[0]
        if quantization and name.endswith("_proj.weight") and module not in plain:
            block = tuple(quantization["weight_block_size"])
            made[name], made[f"{name}_scale_inv"] = narrow_pair(rng, shape, block, scale_dtype)
        elif module.endswith("norm"):
            made[name] = rng.uniform(0.5, 1.5, shape).astype(plain_dtype)
        elif name.endswith("bias"):
            made[name] = (0.3 * rng.normal(size=shape)).astype(plain_dtype)
        else:
            made[name] = (rng.normal(size=shape) / math.sqrt(shape[1])).astype(plain_dtype)
    return made


# Files.


def safetensors_bytes(arrays: dict[str, np.ndarray], **metadata: str) -> bytes:
    header: dict = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": _FILE_NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    return file_bytes(json.dumps(header), data)


def file_bytes(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header, good or bad, and any length claimed for it."""
    header = header.encode() if isinstance(header, str) else header
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def write(folder: Path, config: dict, arrays: dict[str, np.ndarray], shards: int = 1, **other_json: dict) -> Path:
    """A checkpoint's folder; `generation_config={...}` and the like add JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config": config, **other_json}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(arrays, format="pt"))
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    # Dealt out in turn, a weight and its scales never share a shard.
    placed = {name: files[i % shards] for i, name in enumerate(arrays)}
    for file in files:
        (folder / file).write_bytes(safetensors_bytes({name: arrays[name] for name in arrays if placed[name] == file}))
    write_index(folder, placed)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, as the safetensors package finds it."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            array = np.frombuffer(bytes(entry["data"]), _PACKAGE_NAMES[entry["dtype"]])
            found[name] = array.reshape(entry["shape"])
    return found


# Models.


def checkpoint_name(path: str, config: dict | None = None) -> str:
    """The name of the parameter at `path` in a checkpoint with that config.json."""
    module, _, leaf = path.rpartition("/")
    compressed = ((config or {}).get("quantization_config") or {}).get("quant_method") == "compressed-tensors"
    scales = "weight_scale" if compressed else "weight_scale_inv"
    kind = {"bias": "bias", "scale_inv": scales, "embedding_scale_inv": scales}.get(leaf, "weight")
    return f"{'' if module == 'lm_head' else 'model.'}{module.replace('/', '.')}.{kind}"


def places(path: str, shape: tuple[int, ...], config: dict | None = None) -> dict[str, tuple[int, ...]]:
    """{name in a checkpoint: index into the parameter at `path`}: the whole, or the slices of a stack of experts."""
    name = checkpoint_name(path, config)
    if ".experts." not in name:
        return {name: ()}
    return {name.replace(".experts.", f".experts.{i}."): (i,) for i in range(shape[0])}


def arrays(model: nnx.Module) -> dict[str, jax.Array]:
    """The arrays of a model by path."""
    return {"/".join(map(str, keys)): leaf.get_value() for keys, leaf in nnx.to_flat_state(nnx.state(model))}


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, ids, mask):
    return nnx.merge(graphdef, state)(ids, mask)


def logits(model: nnx.Module, ids, mask=None) -> np.ndarray:
    """The model's logits, compiled once for models of the same shapes and policy."""
    return np.asarray(_logits(*nnx.split(model), np.asarray(ids, np.int32), None if mask is None else np.asarray(mask)))


def relative_error(found, exact, mask=None) -> float:
    """|found - exact| / |exact| (Frobenius), over the tokens that `mask` marks as real."""
    found, exact = np.asarray(found).astype(np.float64), np.asarray(exact).astype(np.float64)
    if mask is not None:
        found, exact = found[np.asarray(mask) != 0], exact[np.asarray(mask) != 0]
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
