"""Adapters of models over several devices: logits, gradients and merges are those of one device."""

import json

import pytest
from devices import run_on_devices

FLOAT32_ERROR = 2e-6
"""As in test_sharding.py, 1e-6 for sums in another order, and as much for the sums of adapters."""

FIRST = ("experts by number",)
MORE = (*FIRST, "tensor parallel", "both", "experts by width", "experts gathered", "tokens travel")


def printed(folder, *arguments):
    text = run_on_devices(8, "models/sharded_lora.py", folder / "checkpoint", *arguments, timeout=900)
    return {line["name"]: line for line in map(json.loads, text.splitlines())}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("sharded"), "some", *FIRST)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("sharded"), "all", *MORE)


def assert_the_same(line):
    assert "raised" not in line, line["raised"]
    assert line["placed"]
    assert line["kept"]
    assert line["logits"] <= FLOAT32_ERROR
    assert line["gradient"] <= 4 * FLOAT32_ERROR  # back through all layers


@pytest.mark.thorough
@pytest.mark.parametrize("name", FIRST)
def test_adapters_over_a_mesh_compute_and_train_as_on_one_device(lines, name):
    assert_the_same(lines[name])


@pytest.mark.thorough
@pytest.mark.parametrize("name", MORE)
def test_so_it_is_for_other_layouts_policies_and_merged_models(more, name):
    line = more[name]
    assert_the_same(line)
    assert line["start"]
    assert line["policy"] <= FLOAT32_ERROR
    # Kernels whose sums differ in the last bit are quantised to the next value now and then.
    assert line["merged"] <= 1e-2


@pytest.mark.slow
def test_adapters_are_divided_as_their_kernels_but_for_their_rank(lines):
    shards = lines["experts by number"]["shards"]
    assert shards["self_attn/q_proj/lora_a"] == [4, 128]
    assert shards["self_attn/q_proj/lora_b"] == [32, 4]
    assert shards["self_attn/o_proj/lora_a"] == [4, 32]
    assert shards["self_attn/o_proj/lora_b"] == [128, 4]
    assert shards["mlp/experts/up_proj/lora_a"] == [2, 4, 128]
    assert shards["mlp/experts/up_proj/lora_b"] == [2, 96, 4]
