"""`save_model` and `convert_checkpoint`: how tensors are divided into files of at most `max_shard_size`."""

import contextlib
import json

import checkpoints
import pytest
import safetensors
from checkpoints import GOLDEN
from saving import BLOCK64, INDEX, as_stored, assert_same_tensors

import perparam
from perparam import load_model, save_model
from perparam.loaders import convert_checkpoint, open_checkpoint
from perparam.loaders.safetensors.writer import size_in_bytes
from perparam.loaders.save import shard_sizes
from perparam.policies.errors import InvalidSize
from perparam.policies.resolved import resolve

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # small models

SHARDED = ("bf16_yarn_new_form", "fp8_mixed_unquantised", "fp8_tied_with_lm_head")


@pytest.mark.parametrize("limit", ["5GB", 6000, 1])
@pytest.mark.parametrize("case", SHARDED)
def test_one_file_or_many_hold_the_same_bit_for_bit(case, limit, tmp_path):
    target = tmp_path / "saved"
    assert save_model(load_model(GOLDEN / case), target, max_shard_size=limit) == target
    wanted = as_stored(case)
    assert_same_tensors(checkpoints.read(target), wanted)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    if limit == "5GB":
        assert files == ["model.safetensors"]
        assert not (target / INDEX).exists()
        return
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in wanted.values())
    assert index["weight_map"].keys() == wanted.keys()
    for file in files:
        with safetensors.safe_open(target / file, framework="np") as opened:
            names = set(opened.keys())
            assert opened.metadata() == {"format": "pt"}
        assert names == {name for name, where in index["weight_map"].items() if where == file}
        groups = {name.removesuffix("_scale_inv") for name in names}
        assert all(f"{name}_scale_inv" in names for name in groups if f"{name}_scale_inv" in wanted)
        assert sum(wanted[name].nbytes for name in names) <= limit or len(groups) == 1
    if limit == 1:
        assert len(files) == sum(not name.endswith("_scale_inv") for name in wanted)


def test_the_sizes_of_shards_are_known_before_they_are_written(fp8, tmp_path):
    for policy in (None, BLOCK64):
        checkpoint = open_checkpoint(fp8)
        sizes = shard_sizes(checkpoint, resolve(perparam.get_policy(policy), checkpoint.tree), "12KB")
        convert_checkpoint(fp8, tmp_path / "saved", policy, max_shard_size="12KB")
        for file, size in sizes.items():
            data = (tmp_path / "saved" / file).read_bytes()
            assert len(data) - 8 - int.from_bytes(data[:8], "little") == size
        assert len(sizes) == len(list((tmp_path / "saved").glob("*.safetensors")))


# Sizes as users write them.


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("5GB", 5 * 10**9), ("512MiB", 512 * 2**20), ("1.5KB", 1500), ("2 tib", 2 * 2**40), ("123", 123), (123, 123),
        (10**18 + 1, 10**18 + 1),
    ],
)  # fmt: skip
def test_shard_sizes_are_read_with_and_without_units(size, expected):
    assert size_in_bytes(size) == expected


@pytest.mark.parametrize(
    "size",
    ["", "5XB", "GB", "-1GB", "0", "0.0001KB", "5GB5", "nan", "infGB", "1e9", "٣GB", 0, -1, True, 1.5, None, b"5GB"],
    ids=repr,
)
def test_an_invalid_shard_size_is_refused_before_anything_is_written(model, tmp_path, size):
    with pytest.raises(InvalidSize, match="expected a number of bytes or text such as '5GB'"):
        save_model(model, tmp_path / "saved", max_shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["9" * 400, "9" * 400 + "GB", "9" * 5000, 10**400, 10**5000], ids=lambda _: "huge")
def test_a_shard_size_beyond_all_floats_is_read_or_refused(size):
    with contextlib.suppress(InvalidSize):
        assert size_in_bytes(size) >= 10**300
