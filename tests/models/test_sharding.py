"""Models over several devices: each has its slice, scales are cut where that is right, and logits are the same."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import ClassVar

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from perparam.models import ModelSharding, fsdp_tensor_parallel
from perparam.models.sharding.arrays import scales_sharding, shardings
from perparam.policies import ArrayInfo, Format
from perparam.policies.errors import InvalidSharding, UnmatchedRule

TESTS = pathlib.Path(__file__).parent.parent

BFLOAT16_ERROR = 2.0**-8
"""Partial sums of the cut columns are rounded to bfloat16 before they are added up, or after."""


LAYOUTS = (
    "one mesh axis of four", "requantised to blocks of 64", "by pattern, both axes cut", "on the last device",
    "in float32",
)  # fmt: skip
MORE = (
    "one mesh axis of eight", "two axes", "dequantised", "copied to all", "llama over four", "qwen2 over four",
    "an Explicit axis, as jax.make_mesh makes it", "an Explicit axis in a pattern",
)  # fmt: skip


def printed(folder, names):
    """What the program printed, by name."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A program over several devices has no native kernels: the whole model is compared without them too.
    environment = os.environ | {"PERPARAM_CPU": "off", "JAX_PLATFORMS": "cpu"}
    environment |= {"XLA_FLAGS": flags.strip(), "PYTHONPATH": path}
    command = [sys.executable, "-W", "error", TESTS / "models" / "sharded_models.py", folder / "checkpoint", *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("sharded"), LAYOUTS)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("sharded"), MORE)


def assert_the_same(line):
    assert "raised" not in line, line["raised"]
    assert line["same"]
    assert line["error"] <= BFLOAT16_ERROR


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_array_is_the_whole_models_and_so_are_the_logits(lines, name):
    assert_the_same(lines[name])


@pytest.mark.slow
def test_it_generates_what_the_whole_model_does(lines):
    assert lines["in float32"]["tokens"] == 1
    assert all(line["tokens"] > 0.5 for line in lines.values())  # in bfloat16 rows may part ways


@pytest.mark.thorough
@pytest.mark.parametrize("name", MORE)
def test_so_it_is_for_other_layouts(more, name):
    assert_the_same(more[name])
    assert more[name]["kernels"] == 0


@pytest.mark.slow
def test_each_device_has_its_slice(lines):
    shards = lines["one mesh axis of four"]["shards"]
    assert shards["layers/0/mlp/up_proj/kernel"] == [192, 256]
    assert shards["layers/0/mlp/down_proj/kernel"] == [256, 192]
    assert shards["layers/0/self_attn/k_proj/kernel"] == [64, 256]
    assert shards["embed_tokens/embedding"] == shards["lm_head/kernel"] == [128, 256]
    assert shards["norm/scale"] == [256]
    assert lines["by pattern, both axes cut"]["shards"]["layers/0/mlp/up_proj/kernel"] == [384, 64]
    assert lines["by pattern, both axes cut"]["shards"]["layers/0/mlp/down_proj/kernel"] == [256, 768]
    assert lines["on the last device"]["devices"] == 1


@pytest.mark.slow
def test_scales_are_cut_with_whole_blocks_and_copied_where_a_cut_falls_within_one(lines):
    assert lines["one mesh axis of four"]["shards"]["layers/0/mlp/up_proj/scale_inv"] == [6, 2]
    # 768 rows in blocks of 64 are 12, three for each of four devices.
    assert lines["requantised to blocks of 64"]["shards"]["layers/0/mlp/up_proj/scale_inv"] == [3, 4]
    assert lines["requantised to blocks of 64"]["shards"]["layers/0/mlp/down_proj/scale_inv"] == [4, 3]
    # By rows 384, which is three blocks; by columns 64, which is half of one.
    assert lines["by pattern, both axes cut"]["shards"]["layers/0/mlp/up_proj/scale_inv"] == [3, 2]


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_are_cut_with_the_rows_of_their_kernel(more, family):
    shards = more[f"{family} over four"]["shards"]
    assert shards["layers/0/self_attn/q_proj/bias"] == [768 // 4]
    assert shards["layers/0/self_attn/k_proj/bias"] == [256 // 4]
    if family == "llama":
        assert shards["layers/0/mlp/up_proj/bias"] == [768 // 4]
        assert shards["layers/0/mlp/down_proj/bias"] == [256]  # of a kernel that is cut by columns


@pytest.mark.thorough
def test_heads_that_do_not_divide_are_copied(more):
    shards = more["one mesh axis of eight"]["shards"]
    assert shards["layers/0/self_attn/q_proj/kernel"] == [768, 256]
    assert shards["layers/0/self_attn/v_proj/kernel"] == [256, 256]
    assert shards["layers/0/mlp/gate_proj/kernel"] == [96, 256]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_xla_is_given_no_kernel_to_partition(lines, name):
    """It cannot, and jax refuses; on one device the kernels are there."""
    assert (lines[name]["kernels"] > 0) == (name == "on the last device" and lines[name]["devices"] == 1)


def one_device_mesh(*names):
    return jax.make_mesh((1,) * len(names), names, axis_types=(AxisType.Auto,) * len(names))


class TestRefusal:
    config: ClassVar = None
    stored: ClassVar = {
        "a/kernel": ArrayInfo((6, 8), Format(np.dtype(np.float32))),
        "norm/scale": ArrayInfo((8,), Format(np.dtype(np.float32))),
    }

    @pytest.mark.parametrize("layout", ["tensor", 4, {}, {"a/kernel": P("t")}, [None]], ids=repr)
    def test_what_is_no_layout(self, layout):
        with pytest.raises(InvalidSharding, match=r"sharding: expected a jax\.sharding\.Mesh, a ModelSharding"):
            shardings(layout, self.config, self.stored)

    def test_a_pattern_that_matches_nothing(self):
        layout = {"**/kernal": NamedSharding(one_device_mesh("t"), P())}
        with pytest.raises(UnmatchedRule, match=r"'\*\*/kernal' \(sharding\) matches none of the model's parameters"):
            shardings(layout, self.config, self.stored)
        assert shardings({"**/kernal?": layout["**/kernal"]}, self.config, self.stored).keys() == self.stored.keys()

    def test_an_axis_that_the_parameter_has_not(self):
        layout = {"norm/scale": NamedSharding(one_device_mesh("t"), P(None, "t"))}
        with pytest.raises(InvalidSharding, match=r"norm/scale: the shape \[8\] cannot be split as NamedSharding"):
            shardings(layout, self.config, self.stored)

    def test_single_devices_and_no_default(self):
        layout = {"a/kernel": jax.sharding.SingleDeviceSharding(jax.devices()[0])}
        with pytest.raises(InvalidSharding, match='no "default", and no NamedSharding with a mesh'):
            shardings(layout, self.config, self.stored)


def abstract(sizes, names):
    return jax.sharding.AbstractMesh(sizes, names)


@pytest.mark.parametrize(
    ("shape", "block", "spec", "expected"),
    [
        ((768, 256), (128, 128), P("t"), P(None, None)),
        ((768, 256), (64, 128), P("t"), P("t", None)),
        ((1024, 256), (128, 128), P("t"), P("t", None)),
        ((1000, 256), (128, 128), P(None, "t"), P(None, None)),
        ((1000, 512), (128, 128), P(None, "t"), P(None, "t")),
        ((2048, 2048), (128, 128), P("d", "t"), P("d", "t")),
        ((2048, 2048), (128, 128), P(("d", "t")), P(("d", "t"), None)),
        ((1536, 2048), (128, 128), P(("d", "t")), P(None, None)),
        ((4, 256, 256), (128, 128), P("t"), P("t", None, None)),
        ((40, 256), (128, 128), P(None), P(None)),
    ],
    ids=str,
)
def test_scales_follow_their_kernel(shape, block, spec, expected):
    found = scales_sharding(NamedSharding(abstract((2, 4), ("d", "t")), spec), shape, block)
    assert found.spec == expected


KERNELS = {
    "layers/0/self_attn/q_proj/kernel": (4096, 4096),
    "layers/0/self_attn/k_proj/kernel": (1024, 4096),
    "layers/0/mlp/down_proj/kernel": (4096, 12288),
    "embed_tokens/embedding": (151936, 4096),
    "layers/0/input_layernorm/scale": (4096,),
}


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (8, [P("t", "d"), P("t", "d"), P("d", "t"), P("t", "d"), P()]),
        (16, [P("t", "d"), P(None, "d"), P("d", "t"), P("t", "d"), P()]),  # 8 kv heads among 16 devices
        (256, [P(None, "d"), P(None, "d"), P("d", "t"), P(None, "d"), P()]),  # 12288 % 256 = 0, 151936 % 256 = 128
    ],
)
def test_parameters_are_sharded_by_their_logical_axes(config_of_8b, model, wanted):
    layout = fsdp_tensor_parallel(abstract((2, model), ("d", "t")))
    stored = {path: ArrayInfo(shape, Format(np.dtype(np.float32))) for path, shape in KERNELS.items()}
    assert [each.spec for each in shardings(layout, config_of_8b, stored).values()] == wanted
    layout = dataclasses.replace(layout, patterns={"**/mlp/down_proj/*": P(), "lm_head/kernel?": P("t")})
    assert shardings(layout, config_of_8b, stored)["layers/0/mlp/down_proj/kernel"].spec == P()


def test_axes_that_do_not_exist(config_of_8b):
    with pytest.raises(InvalidSharding, match=r"no logical axis 'head'\. Write some of these: batch, vocab, .*heads"):
        ModelSharding(abstract((2,), ("d",)), {"head": "d"})
    with pytest.raises(InvalidSharding, match=r"the mesh has no axis 'model' \(heads\)\. It has d\."):
        ModelSharding(abstract((2,), ("d",)), {"heads": "model"})
    twice = ModelSharding(abstract((2,), ("d",)), {"heads": "d", "embed": "d"})
    stored = {path: ArrayInfo(shape, Format(np.dtype(np.float32))) for path, shape in KERNELS.items()}
    with pytest.raises(InvalidSharding, match="q_proj/kernel: two of its logical axes, heads, embed, have one"):
        shardings(twice, config_of_8b, stored)


@pytest.fixture
def config_of_8b():
    from perparam.models import Qwen3Config

    return Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
