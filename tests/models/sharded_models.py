"""A program for eight devices: models loaded over several meshes, one line of JSON for each. Run by test_sharding.py.

A line is `{"name", "shards", "devices", "same", "error", "tokens", "collectives", "kernels"}`: the shape of a shard of
each parameter of the first layers, the most devices that share one, whether all arrays are those of the whole model bit
for bit, the relative error of the logits, which part of generated tokens are those of the whole model, the collectives
of a decoding step as `{"f32 all-reduce": 5}`, and its native kernels by name, with how many Hopper kernels there are in
the program lowered for CUDA; or `{"name", "raised"}`.

With "training" in its name it is `{"name", "loss", "gradient", "placed", "audit"}`: the relative errors of a loss and
of the worst of its gradients against one device, whether each gradient has the sharding of its parameter, and the
relative error of the audit's logit error.
"""

import collections
import functools
import json
import pathlib
import re
import sys
import traceback

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import perparam
from perparam.models import ModelSharding, expert_parallel, fsdp, fsdp_tensor_parallel, tensor_parallel
from perparam.policies import matmul_override

DENSE = checkpoints.fields(
    hidden_size=256, intermediate_size=768, num_attention_heads=12, num_key_value_heads=4, head_dim=64, vocab_size=512,
    quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
)  # fmt: skip
"""768 rows on four devices are 192 each: a block and a half."""

MIXTURE = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 512, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
    "decoder_sparse_step": 1, "mlp_only_layers": [1], "num_hidden_layers": 2,
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32],
        "modules_to_not_convert": ["model.layers.0.mlp.gate", "lm_head"],
    },
}  # fmt: skip
"""A mixture and a dense layer; 96 columns on four devices are 24 each, three quarters of a block, and two of
four devices share a head of keys and values."""

IDS = np.arange(64).reshape(8, 8) % 500
MASK = IDS % 7 != 0
F32 = {"compute": "f32"}
NARROW = {"compute": {"kernel": "f8_e4m3fn", "default": "f32"}}


def mesh(*shape):
    names = ("data", "tensor")[-len(shape) :]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


FAMILIES = {f"{family} over four": family for family in ("llama", "qwen2")}


def layouts():
    """`(name, family, sharding, policy)`."""
    for name, family in FAMILIES.items():
        yield name, family, mesh(4), None
    yield "one mesh axis of four", "qwen3", mesh(4), None
    yield "tensor parallel", "qwen3", tensor_parallel(mesh(2, 4)), F32
    yield "FSDP", "qwen3", fsdp(mesh(2, 4)), F32
    yield "both", "qwen3", fsdp_tensor_parallel(mesh(2, 4)), F32
    yield "both, narrow activations", "qwen3", fsdp_tensor_parallel(mesh(2, 4)), "fp8_dynamic"
    yield "one mesh axis of eight", "qwen3", mesh(8), None
    yield "an Explicit axis, as jax.make_mesh makes it", "qwen3", jax.make_mesh((4,), ("tensor",)), None
    rows = NamedSharding(jax.make_mesh((4,), ("tensor",)), P("tensor"))
    yield "an Explicit axis in a pattern", "qwen3", {"**/mlp/{gate,up}_proj/kernel": rows}, None
    yield "dequantised", "qwen3", mesh(2, 4), "bf16"
    blocks = {"params": {"kernel": "f8_e4m3fn"}, "block": (64, 64)}
    yield "requantised to blocks of 64", "qwen3", mesh(4), blocks
    yield "copied to all", "qwen3", NamedSharding(mesh(8), P()), None
    rules = {"**/mlp/{gate,up}_proj/kernel": NamedSharding(mesh(2, 4), P("data", "tensor"))}
    yield "by pattern, both axes cut", "qwen3", rules, None
    yield "on the last device", "qwen3", jax.sharding.SingleDeviceSharding(jax.devices()[-1]), None
    yield "experts by width", "qwen3_moe", tensor_parallel(mesh(2, 4)), F32
    yield "experts by number", "qwen3_moe", experts_by_number(), F32
    yield "tokens travel", "qwen3_moe", expert_parallel(mesh(2, 4)), F32
    yield "tokens travel along two axes", "qwen3_moe", along_two_axes(), F32
    yield "experts by width, narrow activations", "qwen3_moe", tensor_parallel(mesh(2, 4)), NARROW
    yield "heads along an axis of the batch", "qwen3_moe", heads_along_the_batch(), F32
    yield "experts gathered", "qwen3_moe", fsdp_tensor_parallel(mesh(2, 4)), F32


def experts_by_number():
    """Tensor-parallel but for the experts, of which each device has some, for the tokens of all."""
    axes = {**tensor_parallel(mesh(2, 4)).axes, "experts": "tensor", "expert_mlp": None}
    return ModelSharding(mesh(2, 4), axes)


def heads_along_the_batch():
    """Heads along an axis that divides the batch: of one row, repeated for several, the cache has the same heads."""
    axes = {"batch": ("data", "tensor"), **dict.fromkeys(("heads", "kv_heads", "experts"), "tensor")}
    return ModelSharding(mesh(2, 4), axes)


def along_two_axes():
    both = ("data", "tensor")
    return ModelSharding(mesh(2, 4), {"batch": both, "experts": both, "embed": both}, {"**/experts/**": P(both)})


def training():
    """`(name, family, sharding)`."""
    yield "training, both", "qwen3", fsdp_tensor_parallel(mesh(2, 4))
    yield "training, experts by number", "qwen3_moe", experts_by_number()
    yield "training, tokens travel", "qwen3_moe", expert_parallel(mesh(2, 4))


def loss_and_gradients(model):
    """The mean cross-entropy of the next tokens, and its gradients."""
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def run(state):
        logits = nnx.merge(graphdef, state)(IDS)[:, :-1].astype(jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), IDS[:, 1:, None], axis=-1).mean()

    return run(state)


def report_training(name, family, sharding):
    """Prints the line of a layout in training."""
    folder = folder_of(family)
    whole, model = (perparam.load_model(folder, "f32", sharding=each) for each in (None, sharding))
    (wanted, gradients), (loss, found) = map(loss_and_gradients, (whole, model))
    pairs = list(zip(map(np.asarray, jax.tree.leaves(gradients)), jax.tree.leaves(found), strict=True))
    of_parameters = [array.sharding for array in jax.tree.leaves(nnx.state(model))]
    audits = [perparam.audit(each, "fp8_weight_only", IDS).logit_error for each in (whole, model)]
    line = {
        "loss": abs(float(loss) - float(wanted)) / float(wanted),
        "gradient": max(float(np.linalg.norm(a - np.asarray(b)) / np.linalg.norm(a)) for a, b in pairs),
        "placed": all(b.sharding.is_equivalent_to(s, b.ndim) for (_, b), s in zip(pairs, of_parameters, strict=True)),
        "audit": abs(audits[1] - audits[0]) / audits[0],
    }
    print(json.dumps({"name": name, **line}))


def compiled(model, ids, rows):
    """`(logits, text of the decoding step, number of Hopper kernels in a decoding step for CUDA)`."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))
    cache = jax.eval_shape(lambda: model.empty_cache(rows, 16))

    @jax.jit
    def step(state, ids, cache):
        whole = nnx.merge(graphdef, state)
        hidden, cache = whole.hidden(ids, None, cache)
        return whole.logits(hidden), cache

    arguments = state, jnp.zeros((rows, 1), jnp.int32), cache
    text = step.lower(*arguments).compile().as_text()
    with matmul_override(target="cuda:9.0"):
        lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return np.asarray(run(state, ids)).astype(np.float64), text, lowered.count("custom_call @mosaic_gpu")


def collectives(text):
    """{"dtype kind": how many} of a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    text = re.sub(r"/\*.*?\*/", "", text)  # "/*index=5*/" in long tuples
    found = re.findall(rf"= \(?(\w+)\[[^=]*? ({kinds})(?:-start)?\(", text)
    return dict(collections.Counter(f"{dtype} {kind}" for dtype, kind in found))


@functools.cache
def whole_model(family, policy):
    """The model on one device, with its logits and generated tokens."""
    model = perparam.load_model(folder_of(family), json.loads(policy))
    tokens = np.asarray(perparam.generate(model, IDS, MASK, 6, eos_token_id=()))
    return model, checkpoints.logits(model, IDS).astype(np.float64), tokens


@functools.cache
def folder_of(family):
    folder = pathlib.Path(sys.argv[1]) / family
    changes = MIXTURE if family == "qwen3_moe" else DENSE
    config = checkpoints.fields(**{**checkpoints.FAMILIES[family], **changes})
    config = {key: x for key, x in config.items() if x is not None}
    checkpoints.write(folder, config, checkpoints.tensors(config))
    return folder


def report(name, family, sharding, policy):
    """Prints the line of a layout."""
    try:
        whole, logits, tokens = whole_model(family, json.dumps(policy))
        model = perparam.load_model(folder_of(family), policy, sharding=sharding)
        arrays, wanted = checkpoints.arrays(model), checkpoints.arrays(whole)
        found, text, hopper = compiled(model, IDS, len(IDS))
        generated = np.asarray(perparam.generate(model, IDS, MASK, 6, eos_token_id=()))
        alone = np.asarray(perparam.generate(model, IDS[:1], MASK[:1], 6, eos_token_id=()))
        if name == "heads along an axis of the batch":
            several = perparam.generate(model, IDS[:1], MASK[:1], 6, eos_token_id=(), num_return_sequences=8)
            alone = np.where((np.asarray(several) == tokens[:1]).all(), alone, -1)
        line = {
            "shards": {path: array.addressable_shards[0].data.shape for path, array in arrays.items()},
            "devices": max(len(array.sharding.device_set) for array in arrays.values()),
            "same": all(np.asarray(arrays[path]).tobytes() == np.asarray(wanted[path]).tobytes() for path in wanted),
            "error": float(np.linalg.norm(found - logits) / np.linalg.norm(logits)),
            "tokens": float((generated == tokens).mean()),
            "alone": float((alone == tokens[:1]).mean()),
            "collectives": collectives(text),
            "kernels": {**collections.Counter(re.findall(r"perparam_\w+", text)), "hopper": hopper},
        }
    except Exception as problem:  # the others still run
        traceback.print_exc(file=sys.stderr)
        line = {"raised": f"{type(problem).__name__}: {problem}"}
    print(json.dumps({"name": name, **line}))


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    for layout in layouts():
        if layout[0] in sys.argv[2:]:
            report(*layout)
    for layout in training():
        if layout[0] in sys.argv[2:]:
            report_training(*layout)
