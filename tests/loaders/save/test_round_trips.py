"""`save_model`: the tensors that are written are those that the model holds, bit for bit."""

import dataclasses
import json
import os

import checkpoints
import numpy as np
import pytest
from checkpoints import CASES, GOLDEN
from flax import nnx
from helpers import bits
from saving import as_stored, assert_same_tensors, everything, held, python

import perparam
from perparam import Policy, load_model, save_model

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # small models


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_is_loaded_and_saved_is_the_same_bit_for_bit(case, tmp_path):
    model = load_model(GOLDEN / case)
    again = load_model(save_model(model, tmp_path / "saved", max_shard_size=9000))
    assert_same_tensors(checkpoints.read(tmp_path / "saved"), as_stored(case))
    ours, theirs = (dataclasses.asdict(each.config) for each in (again, model))
    for found in (ours, theirs):
        found.pop("source")
        if found["quantization"]:
            # Those that are not converted are said anew, in the order of the model.
            found["quantization"].pop("not_converted")
    assert ours == theirs
    assert (again.activations, again.output) == (model.activations, model.output)


# A model is its config, its dtypes and its tensors, and those are compared for all: one is enough for the quick run.
@pytest.mark.parametrize(
    "case", [case if case == "bf16_yarn_new_form" else pytest.param(case, marks=pytest.mark.thorough) for case in CASES]
)
def test_a_saved_model_gives_the_same_logits_bit_for_bit(case, tmp_path):
    model = load_model(GOLDEN / case)
    again = load_model(save_model(model, tmp_path / "saved", max_shard_size=9000))
    ids = np.load(GOLDEN / case / "expected.npz")["input_ids"][:1]
    assert bits(checkpoints.logits(again, ids)) == bits(checkpoints.logits(model, ids))


def test_tensors_begin_at_multiples_of_their_size(model, tmp_path):
    save_model(model, tmp_path / "saved", {"params": {"scale": "f32", "embedding": "f16"}})
    data = (tmp_path / "saved" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == set(sizes)
    for name, entry in header.items():
        assert name == "__metadata__" or (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0


def test_parameters_copied_in_several_slabs_are_whole(fp8, bf16, tmp_path, monkeypatch):
    monkeypatch.setattr("perparam.loaders.slabs.COPY_BYTES", 300)
    monkeypatch.setattr("perparam.loaders.slabs.CONVERT_ELEMENTS", 600)
    save_model(load_model(fp8), tmp_path / "kept")
    assert_same_tensors(checkpoints.read(tmp_path / "kept"), checkpoints.read(fp8))
    model = load_model(bf16)
    policy = Policy({"**/{gate,up}_proj/kernel": "f8_e4m3fn", "**/down_proj/kernel": "f32"}, block=(12, 10))
    save_model(model, tmp_path / "changed", policy)
    assert_same_tensors(checkpoints.read(tmp_path / "changed"), held(model.with_policy(policy)))


def test_a_model_made_of_numpy_arrays_is_saved(fp8, tmp_path):
    model = load_model(fp8)
    model.norm.scale.set_value(np.asarray(model.norm.scale[...]))
    save_model(model, tmp_path / "saved")
    assert_same_tensors(checkpoints.read(tmp_path / "saved"), checkpoints.read(fp8))


def test_a_model_that_was_never_in_a_file_is_saved(model, tmp_path):
    fresh = perparam.models.Qwen3(
        dataclasses.replace(model.config, num_hidden_layers=1, source=None, quantization=None), rngs=nnx.Rngs(0)
    )
    save_model(fresh, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ["config.json", "model.safetensors", "policy.yaml"]
    again = load_model(tmp_path / "saved", tmp_path / "saved" / "policy.yaml")
    assert_same_tensors(held(again), held(fresh))
    assert (again.config, again.activations) == (fresh.config, fresh.activations)


# Several devices.

OVER_DEVICES = """
import pathlib, sys
import checkpoints, jax, numpy as np
import perparam
from perparam.loaders import slabs

slabs.COPY_BYTES, slabs.CONVERT_ELEMENTS = 2048, 4096  # several slabs, cut otherwise than the devices' slices
folder = pathlib.Path(sys.argv[1])
config = checkpoints.fields(
    hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=8, head_dim=16, vocab_size=64,
    quantization_config={"quant_method": "fp8", "weight_block_size": [4, 16]},
)
checkpoints.write(folder / "source", config, checkpoints.tensors(config))
axes = (jax.sharding.AxisType.Auto,)
requantised = perparam.Policy({"lm_head/kernel": None, "kernel": "f8_e4m3fn"}, block=(24, 24))
whole = perparam.load_model(folder / "source")
model = perparam.load_model(folder / "source", sharding=jax.make_mesh((8,), ("x",), axis_types=axes))
assert len(model.layers[0].mlp.up_proj.kernel[...].devices()) == 8
for name, policy in {"kept": None, "requantised": requantised}.items():
    perparam.save_model(whole, folder / f"{name} whole", policy, max_shard_size="20KB")
    perparam.save_model(model, folder / f"{name} cut", policy, max_shard_size="20KB")
"""


@pytest.mark.slow
def test_a_model_over_several_devices_is_saved_as_one_on_one_device(tmp_path):
    python(OVER_DEVICES, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert_same_tensors(checkpoints.read(tmp_path / "kept cut"), checkpoints.read(tmp_path / "source"))
    for name in ("kept", "requantised"):
        assert everything(tmp_path / f"{name} cut") == everything(tmp_path / f"{name} whole")


# Progress.


def test_saving_shows_its_progress_where_it_is_asked_to(model, tmp_path, capsys):
    save_model(model, tmp_path / "silent")
    assert capsys.readouterr().err == ""
    save_model(model, tmp_path / "told", progress=True)
    assert "saving told: 100%" in capsys.readouterr().err
