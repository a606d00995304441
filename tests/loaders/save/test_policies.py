"""`save_model` and `convert_checkpoint` with policies: what they write, and the policy that they write beside it."""

import re

import checkpoints
import pytest
from checkpoints import BF16, BLOCK, F8
from helpers import bits
from saving import BLOCK64, FROM_BF16, PARTIAL, assert_same_tensors, config_of, held

import perparam
from perparam import Policy, load_model, save_model
from perparam.loaders import convert_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # small models


@pytest.mark.parametrize(
    ("source", "policy"),
    [
        ("fp8", "f32"), ("fp8", BLOCK64), ("fp8", PARTIAL), ("fp8", "fp8_dynamic"),
        ("fp8", {"params": {"scale_inv": "f32"}, "compute": "bf16"}),
        ("bf16", "fp8_weight_only"), ("bf16", FROM_BF16), ("bf16", None),
    ],
    ids=str,
)  # fmt: skip
def test_save_model_applies_the_policy_it_is_given(request, source, policy, tmp_path):
    source = request.getfixturevalue(source)
    model, policy = load_model(source), perparam.get_policy(policy)
    target = save_model(model, tmp_path / "saved", policy)
    stored, wanted = checkpoints.read(target), model.with_policy(policy)
    assert_same_tensors(stored, held(wanted))

    written = config_of(target)
    kernels = {name: stored[name].dtype for name in stored if name.endswith("_proj.weight") or name == "lm_head.weight"}
    plain = {name.removesuffix(".weight") for name, dtype in kernels.items() if dtype != F8}
    if len(plain) == len(kernels):
        assert "quantization_config" not in written
    else:
        quantization = written["quantization_config"]
        block = policy.block or (BLOCK if source == request.getfixturevalue("fp8") else (128, 128))
        assert quantization["weight_block_size"] == list(block)
        # A tied head too: transformers would make one that takes scales.
        assert sorted(quantization["modules_to_not_convert"]) == sorted(plain | {"lm_head"})
        assert {key: quantization[key] for key in ("quant_method", "fmt", "activation_scheme")} == {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        }  # fmt: skip
    dtype = policy.activations or BF16
    assert written["torch_dtype"] == dtype.name

    if policy != Policy():
        assert Policy.load(target / "policy.yaml") == policy
    again = load_model(target, target / "policy.yaml")
    assert_same_tensors(held(again), stored)
    assert (again.activations, again.output) == (wanted.activations, wanted.output)


def test_quantised_kernels_are_what_quantize_makes(bf16, tmp_path):
    before = checkpoints.read(bf16)
    after = checkpoints.read(save_model(load_model(bf16), tmp_path / "saved", FROM_BF16))
    for name, kernel in before.items():
        if re.search(r"(up|down)_proj", name):
            narrow, scales = perparam.quantize(kernel, "f8_e4m3fn", (8, 40))
            assert bits(after[name]) == bits(narrow)
            assert bits(after[f"{name}_scale_inv"]) == bits(scales)
        elif name != "model.norm.weight":
            assert bits(after[name]) == bits(kernel)


def test_dequantised_kernels_are_what_dequantize_makes(fp8, tmp_path):
    before = checkpoints.read(fp8)
    after = checkpoints.read(convert_checkpoint(fp8, tmp_path / "saved", "f32"))
    for name in [name for name in before if f"{name}_scale_inv" in before]:
        assert bits(after[name]) == bits(perparam.dequantize(before[name], before[f"{name}_scale_inv"], BLOCK))


CONVERSIONS = [
    ("fp8", None), ("fp8", "f32"), ("fp8", BLOCK64), ("fp8", PARTIAL), ("fp8", "fp8_weight_only"),
    ("bf16", "fp8_weight_only"), ("bf16", FROM_BF16), ("bf16", "f16"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "policy"), CONVERSIONS, ids=str)
def test_convert_checkpoint_writes_what_loading_and_saving_would(request, source, policy, tmp_path):
    source = request.getfixturevalue(source)
    loaded = save_model(load_model(source, policy), tmp_path / "loaded", max_shard_size="9KB")
    assert convert_checkpoint(source, tmp_path / "converted", policy, max_shard_size="9KB") == tmp_path / "converted"
    assert_same_tensors(checkpoints.read(tmp_path / "converted"), checkpoints.read(loaded))
    configs = [config_of(folder) for folder in (tmp_path / "converted", loaded)]
    for config in configs:  # in the order of the files, and in the model's
        config.get("quantization_config", {}).get("modules_to_not_convert", []).sort()
    assert configs[0] == configs[1]
    if policy is not None:
        assert (tmp_path / "converted" / "policy.yaml").read_bytes() == (loaded / "policy.yaml").read_bytes()


def test_the_policy_of_a_model_is_saved_with_it(fp8, tmp_path):
    save_model(load_model(fp8, PARTIAL), tmp_path / "saved")
    assert Policy.load(tmp_path / "saved" / "policy.yaml") == PARTIAL


@pytest.mark.parametrize(
    "rules",
    [
        {"kernel": "bf16", "scale_inv": "f32"},
        {"**/mlp/*/kernel": "f32", "**/mlp/*/scale_inv": "f32", "**/self_attn/*/scale_inv": "f32"},
    ],
    ids=["all", "some"],
)
def test_a_policy_that_names_scales_it_dequantised_loads_its_own_result(fp8, rules, tmp_path):
    policy = Policy(rules, "bf16")
    model = load_model(fp8, policy)
    saved = [
        save_model(model, tmp_path / "model"),
        save_model(load_model(fp8), tmp_path / "way", policy),
        convert_checkpoint(fp8, tmp_path / "converted", policy),
    ]
    for folder in saved:
        again = load_model(folder, folder / "policy.yaml")
        assert_same_tensors(held(again), held(model))
        assert again.activations == BF16


def test_the_policy_written_without_a_policy_keeps_every_tensor(fp8, tmp_path):
    folder = save_model(load_model(fp8), tmp_path / "saved")
    plan = Policy.load(folder / "policy.yaml").explain(perparam.checkpoint_tree(folder))
    assert {row.change for row in plan.rows} == {"kept"}


def test_a_policy_beside_the_tensors_is_not_read_unless_it_is_named(model, tmp_path):
    folder = save_model(model, tmp_path / "saved")
    (folder / "policy.yaml").write_bytes(b"\xff{{{ nothing: of the kind")
    assert_same_tensors(held(load_model(folder)), held(model))
    convert_checkpoint(folder, tmp_path / "again")
    with pytest.raises(perparam.PerparamError, match=r"policy\.yaml"):
        load_model(folder, folder / "policy.yaml")
