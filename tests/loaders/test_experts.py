"""Experts, which a checkpoint stores one by one, are stacked while they are read and unstacked when they are saved."""

import warnings

import checkpoints
import numpy as np
import pytest
from checkpoints import BF16, FAMILIES, fields, tensors, write
from saving import assert_same_tensors, config_of, held

import perparam
from perparam.loaders import convert_checkpoint, open_checkpoint, slabs
from perparam.loaders.stack import Stack
from perparam.policies import ArrayInfo, Format, resolve
from perparam.policies.errors import InvalidCheckpoint
from perparam.policies.formats import stored_format
from perparam.policies.store import stored_arrays

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # small models

FIELDS = fields(**FAMILIES["qwen3_moe"])
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
STACK = "layers/1/mlp/experts/up_proj/kernel"


@pytest.fixture(scope="module")
def stored():
    return tensors(FIELDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stored):
    return write(tmp_path_factory.mktemp("experts") / "checkpoint", FIELDS, stored, shards=3)


def test_a_stack_reads_each_tensor_into_its_place(folder, stored):
    stack = open_checkpoint(folder).tensors[STACK]
    assert isinstance(stack, Stack)
    names = [EXPERT.replace(".3.", f".{i}.") for i in range(5)]
    want = np.stack([stored[name] for name in names])
    assert (stack.shape, stack.dtype, stack.bytes, stack.name) == (want.shape, want.dtype, want.nbytes, names[0])
    assert stack.read().tobytes() == want.tobytes()
    assert stack.read(1, 3).tobytes() == want[1:3].tobytes()
    into = np.zeros_like(want)
    assert stack.read(2, 4, into[2:4]) is not None
    assert into[2:4].tobytes() == want[2:4].tobytes()
    assert not into[:2].any()
    assert not into[4:].any()


POLICIES = {
    "kept": None,
    "scales cast": {"params": {"scale_inv": "f32"}},
    "dequantised": "bf16",
    "other blocks": {"params": {"layers/*/mlp/experts/**/kernel": {"dtype": "f8_e4m3fn", "block": [24, 10]}}},
    "int8 by row": {"params": {"kernel": {"dtype": "int8", "block": [1, -1]}}},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "int8 by row" else ()) for name in POLICIES]
)
def test_experts_come_in_slabs_that_give_what_the_whole_gives(folder, name, monkeypatch):
    monkeypatch.setattr(slabs, "CONVERT_ELEMENTS", 2 * 40 * 56)
    monkeypatch.setattr(slabs, "COPY_BYTES", 2 * 40 * 56)
    read = []
    whole_read = Stack.read

    def reads(self, start=0, stop=None, into=None, within=None):
        read.append(len(self.tensors[start:stop]))
        return whole_read(self, start, stop, into, within)

    kept = perparam.load_params(folder)
    monkeypatch.setattr(Stack, "read", reads)
    policy = perparam.get_policy(POLICIES[name])
    found = perparam.load_params(folder, policy)
    scales = 3
    assert sorted(read) == [1] * scales + [2] * 2 * scales + [5] * scales
    there = {path: ArrayInfo(array.shape, Format(np.dtype(array.dtype))) for path, array in kept.items()}
    for path in [path for path in there if path.replace("kernel", "scale_inv") in there and path.endswith("kernel")]:
        format = stored_format(there[path].dtype, checkpoints.BLOCK, np.dtype(BF16))
        there[path] = ArrayInfo(there[path].shape, format)
    want = stored_arrays(resolve(policy, there), kept)
    assert found.keys() == want.keys()
    for path, array in want.items():
        assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape), path
        assert np.asarray(found[path]).tobytes() == np.asarray(array).tobytes(), path


def test_a_stack_that_is_kept_becomes_the_array_without_a_copy(folder, monkeypatch):
    from perparam.loaders.placement import Placement

    def no_write(self, start, rows, within=None):
        assert len(self.shape) < 3 or self.shape[1:] in ((3, 3), (4, 2)), self.shape  # a grid of scales is copied

    monkeypatch.setattr(Placement, "write", no_write)
    assert perparam.load_params(folder)[STACK].shape == (5, 40, 56)


@pytest.mark.parametrize("limit", ["5GB", 4000])
def test_saving_and_converting_unstack_them_byte_for_byte(folder, stored, limit, tmp_path):
    perparam.save_model(perparam.load_model(folder), tmp_path / "saved", max_shard_size=limit)
    convert_checkpoint(folder, tmp_path / "converted", max_shard_size=limit)
    for name in ("saved", "converted"):
        assert_same_tensors(checkpoints.read(tmp_path / name), stored)
        assert config_of(tmp_path / name)["quantization_config"] == {
            **FIELDS["quantization_config"],
            "modules_to_not_convert": ["model.layers.1.mlp.gate", "lm_head"],
        }


def test_wide_experts_are_listed_one_by_one_and_load_without_a_warning(folder, tmp_path):
    policy = perparam.Policy({"layers/*/mlp/experts/*/kernel": "bf16"})
    saved = convert_checkpoint(folder, tmp_path / "saved", policy)
    listed = config_of(saved)["quantization_config"]["modules_to_not_convert"]
    assert sum(".experts." in name for name in listed) == 15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = perparam.load_model(saved)
    assert_same_tensors(checkpoints.read(saved), held(again))
    assert checkpoints.arrays(again)[STACK].dtype == BF16


@pytest.mark.parametrize("block", [(1, -1), (-1, -1)], ids=["channel", "tensor"])
def test_experts_with_a_scale_for_each_row_or_for_each_expert_are_saved_and_loaded(block, folder, tmp_path):
    policy = {
        "params": {"layers/**/{gate,up,down}_proj/kernel": {"dtype": "f8_e4m3fn", "block": block}, "default": "bf16"}
    }
    saved = convert_checkpoint(folder, tmp_path / "saved", policy)
    scales = checkpoints.read(saved)[EXPERT.replace("weight", "weight_scale")]
    assert scales.shape == ((40, 1) if block == (1, -1) else (1,))
    found, want = perparam.load_params(saved), perparam.load_params(folder, policy)
    assert found.keys() == want.keys()
    assert all(np.asarray(found[path]).tobytes() == np.asarray(want[path]).tobytes() for path in want)


def refusal(tmp_path, arrays):
    with pytest.raises(InvalidCheckpoint) as caught:
        open_checkpoint(write(tmp_path / "wrong", FIELDS, arrays))
    lines = str(caught.value).splitlines()
    return lines[1:-1]


def test_experts_that_cannot_be_stacked_are_named(stored, tmp_path):
    scales = f"{EXPERT}_scale_inv"
    without = {name: array for name, array in stored.items() if not name.startswith(EXPERT)}
    like = EXPERT.replace(".3.", ".0.")
    for arrays, problems in (
        (without, [f"missing: {EXPERT} (40, 56)"]),
        (
            {**stored, EXPERT: stored[EXPERT][:39]},
            [
                f"misshapen: {EXPERT} is (39, 56), expected (40, 56)",
                f"unequal experts: {EXPERT} is f8_e4m3fn (39, 56), expected f8_e4m3fn (40, 56) as {like}",
            ],
        ),
        (
            {**without, EXPERT: np.ones((40, 56), BF16)},
            [f"unequal experts: {EXPERT} is bf16 (40, 56), expected f8_e4m3fn (40, 56) as {like}"],
        ),
        ({**without, EXPERT: stored[EXPERT]}, [f"missing: {scales}, which other experts have"]),
        (
            {**stored, scales: stored[scales].astype(np.float32)},
            [f"unequal experts: {scales} is f32 (3, 3), expected bf16 (3, 3) as {like}_scale_inv"],
        ),
        (
            {**stored, scales: stored[scales][:2]},
            [f"unequal experts: {scales} is bf16 (2, 3), expected bf16 (3, 3) as {like}_scale_inv"],
        ),
        (
            {**stored, EXPERT.replace(".3.", ".5."): stored[EXPERT]},
            [f"unused: {EXPERT.replace('.3.', '.5.')} (40, 56)"],
        ),
    ):
        assert [line.strip() for line in refusal(tmp_path, arrays)] == problems
