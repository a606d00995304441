"""A program for eight devices: adapters over several meshes, one line of JSON for each. Run by test_sharded_lora.py.

    python models/sharded_lora.py FOLDER {some,all} NAME …

A line is `{"name", "start", "logits", "gradient", "placed", "policy", "merged", "shards"}`: whether new adapters change
no bit of the logits; the relative errors against one device of the logits with adapters, of the worst of their
gradients, of the logits under another policy and of those of the merged model; whether each gradient has the sharding
of its adapter; and the shape of a shard of each array of adapters in the first layer; or `{"name", "raised"}`. With
"some" there is no "start", "policy" and "merged".
"""

import json
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from models.sharded_models import F32, IDS, experts_by_number, folder_of, mesh

import perparam
from perparam.models import expert_parallel, fsdp_tensor_parallel, tensor_parallel
from perparam.models.lora_layers import linear_layers
from perparam.training import add_lora, merge_lora


def layouts():
    """`(name, family, sharding)`."""
    yield "tensor parallel", "qwen3", tensor_parallel(mesh(2, 4))
    yield "both", "qwen3", fsdp_tensor_parallel(mesh(2, 4))
    yield "experts by number", "qwen3_moe", experts_by_number()
    yield "experts by width", "qwen3_moe", tensor_parallel(mesh(2, 4))
    yield "experts gathered", "qwen3_moe", fsdp_tensor_parallel(mesh(2, 4))
    yield "tokens travel", "qwen3_moe", expert_parallel(mesh(2, 4))


@nnx.jit
def logits(model):
    return model(IDS).astype(jnp.float32)


@nnx.jit
def gradients(model):
    def loss(model):
        found = jax.nn.log_softmax(model(IDS)[:, :-1].astype(jnp.float32))
        return -jnp.take_along_axis(found, IDS[:, 1:, None], axis=-1).mean()

    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)


def randomised(model):
    """The model with random `lora_b`, which keep their sharding."""
    rng = np.random.default_rng(0)
    for layer in linear_layers(model).values():
        if layer.adapter is not None:
            drawn = rng.normal(size=layer.lora_b.shape, scale=0.1).astype(np.float32)
            layer.lora_b.set_value(jax.device_put(drawn, layer.lora_b[...].sharding))
    return model


def error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def report(name, family, sharding, everything):
    whole, model = (perparam.load_model(folder_of(family), F32, sharding=each) for each in (None, sharding))
    before = logits(model) if everything else None
    whole, model = (add_lora(each, 4, 8, "layers/**", rngs=nnx.Rngs(1)) for each in (whole, model))
    line = {}
    if everything:
        line["start"] = np.asarray(logits(model)).tobytes() == np.asarray(before).tobytes()
    whole, model = map(randomised, (whole, model))
    found, expected = (nnx.to_flat_state(gradients(each)) for each in (model, whole))
    pairs = list(zip(found, expected, strict=True))
    adapters = dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    merged = [merge_lora(each)[0] for each in (model, whole)]
    if everything:
        line["policy"] = error(*(logits(each.with_policy("f32")) for each in (model, whole)))
        line["merged"] = error(*map(logits, merged))
    line |= {
        "logits": error(logits(model), logits(whole)),
        "gradient": max(error(one[...], other[...]) for (_, one), (_, other) in pairs),
        "placed": all(
            one[...].sharding.is_equivalent_to(adapters[keys][...].sharding, one.ndim) for (keys, one), _ in pairs
        ),
        "kept": merged[0]
        .layers[0]
        .self_attn.q_proj.kernel[...]
        .sharding.is_equivalent_to(model.layers[0].self_attn.q_proj.kernel[...].sharding, 2),
        "shards": {
            "/".join(map(str, keys[2:])): leaf[...].addressable_shards[0].data.shape
            for keys, leaf in adapters.items()
            if keys[1] == 0
        },
    }
    print(json.dumps({"name": name, **line}))


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    for layout in layouts():
        if layout[0] in sys.argv[3:]:
            try:
                report(*layout, everything=sys.argv[2] == "all")
            except Exception as problem:  # the others still run
                traceback.print_exc(file=sys.stderr)
                print(json.dumps({"name": layout[0], "raised": f"{type(problem).__name__}: {problem}"}))
