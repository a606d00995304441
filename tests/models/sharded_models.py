"""A program for eight devices: models loaded over several meshes, one line of JSON for each. Run by test_sharding.py.

A line is `{"name", "shards", "devices", "same", "error", "kernels", "tokens"}`: the shape of a shard of each parameter
of the first layer, the most devices that share one, whether all arrays are those of the whole model bit for bit, the
relative error of the logits, how many Hopper kernels there are in the program lowered for CUDA, and which part of
generated tokens are those of the whole model; or `{"name", "raised"}`.
"""

import json
import pathlib
import sys
import traceback

import checkpoints
import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import perparam
from perparam.policies import matmul_override

CONFIG = checkpoints.fields(
    hidden_size=256, intermediate_size=768, num_attention_heads=12, num_key_value_heads=4, head_dim=64, vocab_size=512,
    quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
)  # fmt: skip
"""768 rows on four devices are 192 each: a block and a half."""

IDS = np.arange(16).reshape(2, 8)
MASK = IDS != 0


def mesh(*shape):
    names = ("data", "tensor")[-len(shape) :]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


FAMILIES = {f"{family} over four": family for family in checkpoints.FAMILIES if family != "qwen3"}
"""Names of layouts in which a model of another family is cut over four devices."""


def layouts():
    """`(name, sharding, policy)`."""
    for name in FAMILIES:
        yield name, mesh(4), None
    yield "one mesh axis of four", mesh(4), None
    yield "one mesh axis of eight", mesh(8), None
    yield "an Explicit axis, as jax.make_mesh makes it", jax.make_mesh((4,), ("tensor",)), None
    rows = NamedSharding(jax.make_mesh((4,), ("tensor",)), P("tensor"))
    yield "an Explicit axis in a pattern", {"**/mlp/{gate,up}_proj/kernel": rows}, None
    yield "two axes", mesh(2, 4), None
    yield "in float32", mesh(4), {"compute": "f32"}
    yield "dequantised", mesh(4), "bf16"
    yield "requantised to blocks of 64", mesh(4), {"params": {"kernel": "f8_e4m3fn"}, "block": (64, 64)}
    yield "copied to all", NamedSharding(mesh(8), P()), None
    rules = {"**/mlp/{gate,up}_proj/kernel": NamedSharding(mesh(2, 4), P("data", "tensor"))}
    yield "by pattern, both axes cut", rules, None
    yield "on the last device", jax.sharding.SingleDeviceSharding(jax.devices()[-1]), None


def report(folder, name, sharding, policy):
    """Prints the line of a layout."""
    try:
        whole = perparam.load_model(folder, policy)
        model = perparam.load_model(folder, policy, sharding=sharding)
        arrays, wanted = checkpoints.arrays(model), checkpoints.arrays(whole)
        first = {path: array for path, array in arrays.items() if not path.startswith("layers/1")}
        logits = checkpoints.logits(whole, IDS).astype(np.float64)
        graphdef, state = nnx.split(model)
        run = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))
        found = np.asarray(run(state, IDS)).astype(np.float64)
        with matmul_override(target="cuda:9.0"):
            lowered = run.trace(state, IDS).lower(lowering_platforms=("cuda",)).as_text()
        tokens = [np.asarray(perparam.generate(each, IDS, MASK, 12, eos_token_id=())) for each in (whole, model)]
        line = {
            "shards": {path: array.addressable_shards[0].data.shape for path, array in first.items()},
            "devices": max(len(array.sharding.device_set) for array in arrays.values()),
            "same": all(np.asarray(arrays[path]).tobytes() == np.asarray(wanted[path]).tobytes() for path in wanted),
            "error": float(np.linalg.norm(found - logits) / np.linalg.norm(logits)),
            "kernels": lowered.count("custom_call @mosaic_gpu"),
            "tokens": float((tokens[0] == tokens[1]).mean()),
        }
    except Exception as problem:  # the others still run
        traceback.print_exc(file=sys.stderr)
        line = {"raised": f"{type(problem).__name__}: {problem}"}
    print(json.dumps({"name": name, **line}))


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    for layout in layouts():
        if layout[0] in sys.argv[2:]:
            family = FAMILIES.get(layout[0], "qwen3")
            config = {key: x for key, x in {**CONFIG, **checkpoints.FAMILIES[family]}.items() if x is not None}
            folder = pathlib.Path(sys.argv[1]) / family
            if not folder.is_dir():
                checkpoints.write(folder, config, checkpoints.tensors(config))
            report(folder, *layout)
