"""A model that several processes share (`jax.distributed`): each reads its bytes, and all run and save it together."""

import json
import math
import re

import checkpoints
import pytest
from processes import python, run_together

from perparam.loaders.safetensors.reader import read_header

BLOCK = (32, 32)
DENSE = checkpoints.fields(
    hidden_size=64, intermediate_size=8192, num_attention_heads=8, num_key_value_heads=4, head_dim=32, vocab_size=64,
    num_hidden_layers=1, eos_token_id=63, pad_token_id=62,
    quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
)  # fmt: skip
"""The rows of down_proj are so long that parts of them are read alone."""

EXPERTS = {
    **DENSE, **checkpoints.FAMILIES["qwen3_moe"], "intermediate_size": 128, "num_hidden_layers": 2, "num_experts": 8,
    "moe_intermediate_size": 64,
    "quantization_config": DENSE["quantization_config"] | {"modules_to_not_convert": ["model.layers.1.mlp.gate"]},
}  # fmt: skip

FLOAT32_ERROR = 2.0**-18
"""Sums of at most 8192 products in another order: the square root of their number, times float32's 2**-24, halved."""

LAYER = "model.layers.0"
ROWS = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def make(work):
    for name, config in {"dense": DENSE, "experts": EXPERTS}.items():
        checkpoints.write(work / name, config, checkpoints.tensors(config, seed=2), shards=2)


def lines(work, count, *parts, devices=1):
    """`{name: value}` that each process told."""
    make(work)
    outputs = run_together(python("loaders/several_processes.py", work, *parts), count, devices)
    return [dict(json.loads(line) for line in output.splitlines() if line.startswith('["')) for output in outputs]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """`(folder, what each of two processes told)`."""
    work = tmp_path_factory.mktemp("two")
    return work, lines(work, 2, "tree", "failures", "experts", "dense")


def assert_same_files(one, other):
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def length(ranges):
    return sum(stop - start for start, stop in ranges)


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in read_header(path).items()}


def assert_each_reads_its_rows(folder, told, name, count):
    """Each process reads a part of the rows of a tensor, one after the other."""
    size = tensors_of(folder)[name].bytes
    assert [each[name] for each in told] == [[[i * size // count, (i + 1) * size // count]] for i in range(count)], name


def assert_each_reads_what_its_devices_hold(folder, told):
    """Of tensors that are cut, each process reads its part alone; of the others, all."""
    count, tensors = len(told), tensors_of(folder)
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        if module in ROWS:
            assert_each_reads_its_rows(folder, told, name, count)
        elif module == "down_proj" and name.endswith("weight"):
            rows, width = tensor.shape
            part = width // count
            for i, each in enumerate(told):
                assert each[name] == [[row * width + i * part, row * width + (i + 1) * part] for row in range(rows)]
        else:  # norms, which all have; o_proj, whose rows are shorter than a page; scales of columns
            assert all(each[name] == [[0, tensor.bytes]] for each in told), name


@pytest.mark.slow
def test_each_process_reads_what_its_devices_hold(two):
    work, told = two
    ranges = [each["dense: ranges"] for each in told]
    assert_each_reads_what_its_devices_hold(work / "dense", ranges)
    total = sum(tensor.bytes for tensor in tensors_of(work / "dense").values())
    assert all(sum(map(length, each.values())) < 0.51 * total for each in ranges)


@pytest.mark.slow
def test_a_conversion_reads_whole_blocks_of_rows_alone(two):
    work, told = two
    ranges = [each["dequantised: ranges"] for each in told]
    for module in ("mlp.gate_proj", "self_attn.q_proj"):
        assert_each_reads_its_rows(work / "dense", ranges, f"{LAYER}.{module}.weight", 2)
    size = tensors_of(work / "dense")[f"{LAYER}.mlp.down_proj.weight"].bytes
    assert all(each[f"{LAYER}.mlp.down_proj.weight"] == [[0, size]] for each in ranges)


@pytest.mark.slow
def test_experts_are_read_by_the_process_that_has_them(two):
    _, told = two
    for i, each in enumerate(told):
        read = {name for name, ranges in each["experts: ranges"].items() if ".experts." in name and ranges}
        numbers = {int(re.search(r"experts\.(\d+)", name)[1]) for name in read}
        assert numbers == set(range(4 * i, 4 * i + 4))
        assert len(read) == 4 * 3 * 2  # three projections and their scales


@pytest.mark.slow
def test_logits_and_tokens_are_those_of_one_process(two):
    for each in two[1]:
        error, same = each["dense: error, tokens"]
        assert error < FLOAT32_ERROR
        assert same


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "bf16", "experts", "tree"])
def test_a_model_is_saved_byte_for_byte_as_by_one_process(two, name):
    work, _ = two
    assert_same_files(work / f"saved {name}", work / f"alone {name}")


@pytest.mark.slow
def test_if_one_process_cannot_write_none_saves(two):
    first, last = two[1]
    assert first["a full disk"][0] == last["a full disk"][0] == "SaveFailed"
    assert re.search(r"nothing was saved, since process 1 failed: .*No space left", first["a full disk"][1])
    assert re.search(r"cannot be written: .*No space left.* Nothing was changed", last["a full disk"][1])
    assert first["unchanged"]
    assert first["left"] == []


@pytest.mark.slow
def test_a_folder_that_a_process_does_not_see_is_refused(two):
    first, last = two[1]
    assert re.search(
        r"elsewhere/.*: process 0 made this folder, and process 1 on .* does not see it.* pass the same path to all",
        last["another folder"][1],
    )
    assert "since process 1 failed: SaveFailed" in first["another folder"][1]


@pytest.mark.slow
def test_what_process_0_refuses_all_refuse(two):
    first, last = two[1]
    assert "which saving would delete" in first["foreign"][1]
    assert "since process 0 failed: SaveFailed" in last["foreign"][1]


@pytest.mark.slow
def test_one_process_converts(two):
    first, last = two[1]
    assert first["convert"] is None
    assert re.search(r"process 1 of 2, .* Call it under `if jax.process_index\(\) == 0:`", last["convert"][1])


@pytest.mark.thorough
@pytest.mark.parametrize(("count", "devices"), [(4, 1), (2, 2)])
def test_more_processes_and_devices(tmp_path, count, devices):
    told = lines(tmp_path, count, "dense", "more", devices=devices)
    assert_each_reads_what_its_devices_hold(tmp_path / "dense", [each["dense: ranges"] for each in told])
    for each in told:
        for name in ("dense", "fsdp", "experts", "experts, cut"):
            error, same = each[f"{name}: error, tokens"]
            assert error < FLOAT32_ERROR
            assert same
        whole, shared = each["audit"]
        assert math.isclose(whole, shared, rel_tol=0.1)  # two differences of bfloat16 roundings
        assert shared > 0
    for name in ("dense", "bf16", "other blocks", "experts", "experts, cut"):
        assert_same_files(tmp_path / f"saved {name}", tmp_path / f"alone {name}")
