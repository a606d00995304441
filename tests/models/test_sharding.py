"""Models over several devices: each has its slice, scales are cut where that is right, and logits are the same."""

import dataclasses
import json
from itertools import permutations
from typing import ClassVar

import jax
import numpy as np
import pytest
from devices import run_on_devices
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from perparam.models import ModelSharding, fsdp, fsdp_tensor_parallel, tensor_parallel
from perparam.models.sharding.arrays import scales_sharding, shardings
from perparam.models.sharding.heads import heads_split
from perparam.policies import ArrayInfo, Format
from perparam.policies.errors import InvalidSharding, UnmatchedRule
from perparam.policies.matmul.sharded import Split

BFLOAT16_ERROR = 2.0**-8
"""Sums in another order are rounded to bfloat16 differently, and XLA rounds less in some programs than in others."""

FLOAT32_ERROR = 1e-6
"""Sums of up to 768 float32 products in another order, two layers deep."""

DENSE = ("both",)
MIXTURES = ("experts by width", "tokens travel")
TRAINING = ("training, experts by number",)
MORE_TRAINING = ("training, both", "training, tokens travel")
MORE_DENSE = ("tensor parallel", "FSDP", "both, narrow activations")
MORE_MIXTURES = (
    "experts by number", "tokens travel along two axes", "experts gathered", "experts by width, narrow activations",
    "heads along an axis of the batch",
)  # fmt: skip
BY_XLA = ("by pattern, both axes cut", "on the last device", "copied to all", "an Explicit axis in a pattern")
BFLOAT16 = (
    "one mesh axis of four", "requantised to blocks of 64", "one mesh axis of eight", "dequantised", "llama over four",
    "qwen2 over four", "an Explicit axis, as jax.make_mesh makes it", *BY_XLA,
)  # fmt: skip


def printed(folder, names, timeout=600):
    """What the program printed, by name."""
    text = run_on_devices(8, "models/sharded_models.py", folder / "checkpoint", *names, timeout=timeout)
    return {line["name"]: line for line in map(json.loads, text.splitlines())}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("sharded"), (*DENSE, *MIXTURES, *TRAINING))


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    names = (*MORE_DENSE, *MORE_MIXTURES, *BFLOAT16, *MORE_TRAINING)
    return printed(tmp_path_factory.mktemp("sharded"), names, timeout=1800)


def assert_the_same(line, error=FLOAT32_ERROR):
    assert "raised" not in line, line["raised"]
    assert line["same"]
    assert line["error"] <= error
    # One row alone does not divide among the devices; in bfloat16 rows may part ways.
    assert min(line["tokens"], line["alone"]) >= (1 if error == FLOAT32_ERROR else 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_arrays_logits_and_tokens_are_those_of_the_whole_model(lines, name):
    assert_the_same(lines[name])


@pytest.mark.thorough
@pytest.mark.parametrize("name", [*MORE_DENSE, *MORE_MIXTURES, *BFLOAT16])
def test_so_it_is_for_other_layouts(more, name):
    assert_the_same(more[name], FLOAT32_ERROR if name in (*MORE_DENSE, *MORE_MIXTURES) else BFLOAT16_ERROR)


LAYERS = 2
ADDED = 2 * LAYERS + 1  # after o_proj and after the MLP of each layer, and the rows of the embedding


@pytest.mark.slow
def test_a_decoding_step_adds_up_twice_in_a_layer_and_gathers_no_weights(lines):
    assert lines["experts by width"]["collectives"] == {"f32 all-reduce": ADDED}


@pytest.mark.thorough
def test_so_it_is_without_experts(more):
    assert more["tensor parallel"]["collectives"] == {"f32 all-reduce": ADDED}


def assert_trained_and_audited_alike(line):
    assert line["loss"] <= FLOAT32_ERROR
    assert line["gradient"] <= 4 * FLOAT32_ERROR  # sums over 64 tokens too, back through all layers
    assert line["placed"]
    assert line["audit"] <= 2e-2  # of a policy with bfloat16 activations, which XLA rounds less in some programs


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_a_loss_its_gradients_and_an_audit_are_those_of_one_device(lines, name):
    assert_trained_and_audited_alike(lines[name])


@pytest.mark.thorough
@pytest.mark.parametrize("name", MORE_TRAINING)
def test_so_it_is_for_other_layouts_in_training(more, name):
    assert_trained_and_audited_alike(more[name])


@pytest.mark.slow
def test_fsdp_gathers_fp8_as_bytes(lines):
    counts = lines["both"]["collectives"]
    # 14 narrow kernels, their scales and the head; the ids and rows of the embedding; no float8 and no float16.
    assert counts == {
        "u8 all-gather": 14, "f32 all-gather": 15, "s32 all-gather": 1, "f32 all-to-all": 1, "f32 all-reduce": ADDED,
    }  # fmt: skip


@pytest.mark.slow
def test_tokens_travel_to_their_experts_and_back_and_nothing_is_gathered(lines):
    # The rows there and back, and one for their numbers.
    assert lines["tokens travel"]["collectives"] == {"f32 all-to-all": 2, "s32 all-to-all": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_each_device_multiplies_with_its_native_kernels(lines, name):
    kernels = lines[name]["kernels"]
    assert kernels["perparam_attention"] == LAYERS
    # q, k, v together; o; gate and up together; down; and the head. A mixture has a router in place of two of them;
    # with shared heads, the products of k and v are whole, and apart from those of q.
    assert kernels["perparam_matmul"] == {"experts by width": 10, "tokens travel": 8}.get(name, 9)
    assert kernels.get("perparam_grouped_matmul") == (2 if name in MIXTURES else None)


@pytest.mark.thorough
def test_hopper_kernels_are_used_where_xla_does_not_partition(more):
    assert more["one mesh axis of four"]["kernels"]["hopper"] > 0
    assert more["by pattern, both axes cut"]["kernels"]["hopper"] == 0
    assert more["on the last device"]["devices"] == 1


@pytest.mark.slow
def test_each_device_has_its_slice(lines):
    shards = lines["both"]["shards"]
    assert shards["layers/0/mlp/up_proj/kernel"] == [192, 128]
    assert shards["layers/0/mlp/down_proj/kernel"] == [128, 192]
    assert shards["layers/0/self_attn/k_proj/kernel"] == [64, 128]
    assert shards["embed_tokens/embedding"] == shards["lm_head/kernel"] == [128, 128]
    assert shards["norm/scale"] == [256]
    assert lines["tokens travel"]["shards"]["layers/0/mlp/experts/up_proj/kernel"] == [2, 96, 128]
    assert lines["experts by width"]["shards"]["layers/0/mlp/experts/down_proj/kernel"] == [8, 128, 24]


@pytest.mark.slow
def test_scales_are_cut_with_whole_blocks_and_copied_where_a_cut_falls_within_one(lines):
    assert lines["both"]["shards"]["layers/0/mlp/up_proj/scale_inv"] == [6, 1]  # 192 rows, 128 columns
    assert lines["tokens travel"]["shards"]["layers/0/mlp/experts/up_proj/scale_inv"] == [2, 3, 4]
    assert lines["experts by width"]["shards"]["layers/0/mlp/experts/down_proj/scale_inv"] == [8, 4, 3]


@pytest.mark.thorough
def test_blocks_that_divide_are_cut(more):
    # 768 rows in blocks of 64 are 12, three for each of four devices.
    assert more["requantised to blocks of 64"]["shards"]["layers/0/mlp/up_proj/scale_inv"] == [3, 4]
    assert more["requantised to blocks of 64"]["shards"]["layers/0/mlp/down_proj/scale_inv"] == [4, 3]
    # By rows 384, which is three blocks; by columns 64, which is half of one.
    assert more["by pattern, both axes cut"]["shards"]["layers/0/mlp/up_proj/scale_inv"] == [3, 2]


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


@pytest.mark.parametrize(
    ("axes", "patterns", "message"),
    [
        (
            {"head": "d"},
            {},
            r"no logical axis 'head'\. Write some of these: batch, vocab, .*heads",
        ),
        ({"heads": "model"}, {}, r"the mesh has no axis 'model' \(heads\)\. It has d\."),
        ({"batch": ("d", "d")}, {}, "'batch' has the mesh axis 'd' twice"),
        ({"batch": 3}, {}, "'batch' needs names of mesh axes, found 3"),
        ({}, {"norm/scale": P("t")}, r"the mesh has no axis 't' \(norm/scale\)"),
        ({}, {"norm/scale": ("d",)}, "'norm/scale' needs a PartitionSpec"),
        ({}, {"norm/scale": P(P.UNCONSTRAINED)}, "'norm/scale' needs names of mesh axes"),
        ({}, {"embed_tokens/embedding": P("d", "d")}, "'embed_tokens/embedding' has the mesh axis 'd' twice"),
    ],
)
def test_what_is_no_sharding_of_a_model(axes, patterns, message):
    with pytest.raises(InvalidSharding, match=message):
        ModelSharding(abstract((2,), ("d",)), axes, patterns)


@pytest.mark.parametrize("make", [tensor_parallel, fsdp, lambda mesh: ModelSharding(mesh, {})])
def test_what_is_no_mesh(make):
    with pytest.raises(InvalidSharding, match=r"expected a jax\.sharding\.Mesh, found"):
        make(jax.devices())


def test_shardings_with_patterns_in_another_order_differ():
    one, other = (
        ModelSharding(abstract((2,), ("d",)), {}, dict(each)) for each in permutations({"a": P(), "b": P("d")}.items())
    )
    assert one != other
    assert hash(one) != hash(other)
    assert one == dataclasses.replace(one)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [((), (("t",), 2, 4)), (("d",), (("t",), 2, 4)), (("d", "t"), ((), 1, 2))],  # 2 heads of keys on 4 devices
    ids=str,
)
def test_heads_are_divided_alike_for_all_batches(batch, expected):
    mesh = abstract((2, 4), ("d", "t"))
    q, k = (Split(mesh, batch, (names, ())) for names in (("t",), ()))
    for rows in (1, 8):
        split = heads_split([q, k, k], rows, 8, 2)
        assert (split.heads, split.sharing, split.kv_heads) == expected
    assert heads_split([q, k, None], 8, 8, 2) is None
    assert heads_split([q, k, k], 8, 6, 2) is None or batch == ("d", "t")  # 6 heads of queries on 4 devices


def test_logical_axes_that_share_a_mesh_axis(config_of_8b):
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
