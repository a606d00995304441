"""The plan as a table: lines for equal layers, columns, and what a narrow terminal keeps."""

import json

import numpy as np
from plans import TREE, YAML

from perparam import Policy, get_policy


def layers(count, **extra):
    layer = {"mlp": {"up_proj": {"kernel": np.ones((8, 4), np.float32)}}}
    return {"layers": [layer] * count, **extra}


def test_equal_layers_share_a_line():
    table = str(Policy(params={"kernel": "f8_e4m3fn"}, compute="bf16", output="f32").explain(layers(28)))
    lines = table.splitlines()
    assert lines[0].split() == [
        "path",
        "shape",
        "current",
        "storage",
        "compute",
        "rule",
        "(params",
        "|",
        "compute)",
        "bytes",
    ]
    assert (
        lines[1].split()
        == "layers/0-27/mlp/up_proj/kernel ×28 8×4 f32 f8_e4m3fn quantised bf16 kernel | default 896 B".split()
    )
    assert lines[2].split() == "layers/0-27/mlp/up_proj/scale_inv ×28 1×1 – f32 made – | – 112 B".split()
    assert lines[4:6] == [
        "made: scales that storage adds; – under rule: no rule",
        "",
    ]
    assert lines[6:] == [
        "28 parameters and 28 grids of scales: 28 made, 28 quantised",
        "stored in 1008 B (f8_e4m3fn 896 B, f32 112 B), now in 3.5 KiB",
        "largest: layers/0/mlp/up_proj/kernel, 32 B",
        "activations bf16, output f32",
    ]


def test_a_layer_that_differs_has_a_line_of_its_own():
    policy = Policy(params={"layers/{3,5}/**/kernel": None, "kernel": "bf16"})
    lines = str(policy.explain(layers(8))).splitlines()
    assert lines[1].startswith("layers/0-2,4,6-7/mlp/up_proj/kernel ×6 ")
    assert lines[2].startswith("layers/3,5/mlp/up_proj/kernel ×2 ")


def test_layers_of_another_shape_have_a_line_of_their_own():
    tree = layers(2)
    tree["layers"][1] = {"mlp": {"up_proj": {"kernel": np.ones((4, 4), np.float32)}}}
    lines = str(Policy().explain(tree)).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [
        ["layers/0/mlp/up_proj/kernel", "8×4"],
        ["layers/1/mlp/up_proj/kernel", "4×4"],
    ]


def test_a_number_within_a_name_is_no_layer():
    lines = str(Policy().explain({"conv1": np.ones(2), "conv2": np.ones(2)})).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["conv1", "conv2"]


def test_on_a_narrow_terminal_the_rule_stays_longer_than_the_current_dtype_and_the_shape():
    layer = {"post_attention_layernorm": {"scale": np.ones(2)}, "up_proj": {"kernel": np.ones((2, 2), np.float32)}}
    plan = get_policy("fp8_weight_only").explain({"layers": [layer] * 4})
    at_80, at_40 = plan.to_text(80), plan.to_text(40)
    assert "kernel:5" in at_80
    assert "left out for lack of width: current\n" in at_80
    assert "– under rule: no rule" in at_80.replace("\n    ", " ")
    assert "under rule" not in at_40
    assert "as stored:" not in at_40
    assert max(map(len, at_40.partition("\n\n")[0].splitlines())) <= 40


def test_rules_have_their_line():
    table = str(Policy.loads(YAML, "p.yaml").explain(TREE))
    assert "kernel:2 | kernel:7" in table
    assert "default:5 | default:8" in table
    assert table.endswith("activations f32, output f16")


def test_a_narrow_kernel_left_alone_is_computed_as_stored():
    line = str(Policy.loads(YAML).explain(TREE)).splitlines()[2]
    assert line.startswith("dense/kernel")
    assert "as stored" in line


def test_integers_have_no_compute_dtype():
    lines = {line.split()[0]: line for line in str(Policy(compute="bf16").explain(TREE)).splitlines() if line}
    assert "bf16" in lines["dense/bias"]
    assert lines["steps"].split()[:4] == ["steps", "3", "i32", "i32"]
    assert "bf16" not in lines["steps"]


def test_a_cache_dtype_without_a_cache_is_said_to_have_no_effect():
    plan = Policy(kv_cache="int8").explain(TREE)
    assert plan.kv_cache is None
    assert str(plan).endswith(
        "\nkv_cache: int8 has no effect on this tree, which is not a model of perparam with a cache."
    )
    assert json.loads(plan.to_json())["unused"] == list(plan.unused)
    assert not Policy().explain(TREE).unused
