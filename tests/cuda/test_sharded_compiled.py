"""Models over four H200s, compiled without one: what they send to each other, and which kernels each runs."""

import json
import pathlib
import re

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from perparam.loaders.from_config import open_config
from perparam.models import Qwen3, Qwen3Moe, expert_parallel, fsdp, tensor_parallel
from perparam.models.decoder import assemble
from perparam.models.sharding.arrays import shardings
from perparam.policies import get_policy, matmul_override
from perparam.policies.resolved import resolve

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]

H200 = pathlib.Path(__file__).parents[2] / "benchmarks" / "h200.txtpb"
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
LAYERS, SEQUENCES, TOKENS = 2, 4, 8


@pytest.fixture(scope="module")
def mesh():
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200.read_text(), topology="1x1x4")
    return Mesh(np.array(topology.devices).reshape(1, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def program(folder, family, layout, **changes):
    """The text of a compiled prompt of a model without weights."""
    folder.mkdir()
    config = {**checkpoints.FAMILIES[family], "quantization_config": QUANTIZATION, **changes}
    (folder / "config.json").write_text(json.dumps(checkpoints.fields(**config)))
    opened = open_config(folder / "config.json")
    resolved = resolve(get_policy(None), opened.tree)
    where = shardings(layout, opened.config, resolved.stored)
    shapes = {
        path: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=where[path])
        for path, info in resolved.stored.items()
    }
    models = {"qwen3": Qwen3, "qwen3_moe": Qwen3Moe}
    model = assemble(models[family], opened.config, resolved, shapes, sharding=layout)
    graphdef, state = nnx.split(model)
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    ids = jax.ShapeDtypeStruct((SEQUENCES, TOKENS), jnp.int32, sharding=replicated)
    with matmul_override(target="cuda:9.0"):
        traced = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids)).trace(state, ids)
        return traced.lower(lowering_platforms=("cuda",)).compile().as_text()


def count(text, kind):
    return len(re.findall(rf" {kind}(?:-start)?\(", text))


DENSE = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 512,
}  # fmt: skip


def test_tensor_parallel_models_add_up_twice_in_a_layer_and_use_the_kernels_for_hopper(mesh, tmp_path):
    text = program(tmp_path / "model", "qwen3", tensor_parallel(mesh), **DENSE)
    assert count(text, "all-reduce") == 2 * LAYERS + 1
    assert count(text, "all-gather") == 0
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 4 * LAYERS


def test_fsdp_gathers_bytes(mesh, tmp_path):
    text = program(tmp_path / "model", "qwen3", fsdp(mesh), **DENSE)
    assert "u8[1024,1024]" in text
    gathered = re.findall(r"= \(*([^=]*?)\)? all-gather(?:-start)?\(", re.sub(r"/\*.*?\*/", "", text))
    assert gathered
    assert not re.search(r"\bf8|\bf16", "".join(gathered))


def test_tokens_travel_in_ragged_exchanges(mesh, tmp_path):
    text = program(
        tmp_path / "model", "qwen3_moe", expert_parallel(mesh), num_experts=8, moe_intermediate_size=128,
        hidden_size=256, decoder_sparse_step=1, mlp_only_layers=[1], num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    assert count(text, "ragged-all-to-all") == 2  # there and back, in the one layer with experts
    assert count(text, "all-gather") == 0
