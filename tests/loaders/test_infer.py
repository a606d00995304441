"""`infer_policy`: a policy that, applied to the checkpoint it came from, changes nothing."""

import checkpoints
import numpy as np
import pytest
from checkpoints import BF16, CASES, GOLDEN, fields, tensors, write

import perparam
from perparam import Policy, quantize


@pytest.mark.parametrize("case", CASES)
def test_everything_is_kept(case):
    plan = perparam.infer_policy(GOLDEN / case).explain(perparam.checkpoint_tree(GOLDEN / case))
    assert {row.change for row in plan.rows} == {"kept"}
    assert plan.total_bytes == plan.total_bytes_before


@pytest.mark.parametrize("case", CASES)
def test_a_rule_decides_every_parameter(case):
    plan = perparam.infer_policy(GOLDEN / case).explain(perparam.checkpoint_tree(GOLDEN / case))
    assert all(row.storage_rule is not None for row in plan.rows)


@pytest.mark.parametrize("case", CASES)
def test_loading_with_it_is_loading_without_a_policy_bit_for_bit(case):
    plain = perparam.load_model(GOLDEN / case)
    inferred = perparam.load_model(GOLDEN / case, perparam.infer_policy(GOLDEN / case))
    arrays, same = checkpoints.arrays(plain), checkpoints.arrays(inferred)
    assert arrays.keys() == same.keys()
    assert all(np.asarray(arrays[path]).tobytes() == np.asarray(same[path]).tobytes() for path in arrays)
    assert (inferred.activations, inferred.output) == (plain.activations, plain.output)


@pytest.mark.slow
def test_computing_with_it_is_computing_without_a_policy_bit_for_bit():
    folder = GOLDEN / "fp8_mixed_unquantised"
    ids = np.array([[3, 14, 15, 92, 65]])
    logits = checkpoints.logits(perparam.load_model(folder), ids)
    again = checkpoints.logits(perparam.load_model(folder, perparam.infer_policy(folder)), ids)
    assert (logits.dtype, logits.tobytes()) == (again.dtype, again.tobytes())


F32, F16 = np.ones(3, np.float32), np.ones(3, np.float16)
NARROW, ROWS = (
    quantize(np.ones((64, 64), np.float32), {"dtype": "f8_e4m3fn", "block": b}) for b in ([32, 32], [1, -1])
)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"weight": NARROW}, "b": {"weight": NARROW}},
        {"a": {"weight": NARROW, "bias": F32}, "b": {"weight": ROWS}, "norm": {"weight": F32}},
        {"layers": {"0": {"weight": F16}, "1": {"weight": F16}, "norm": {"weight": F32}, "up": {"weight": NARROW}}},
        {"a": F16, "x": {"a": NARROW}, "y": {"a": F32, "b": F32}},
        {"a": F32.astype(np.float64), "b": F32},
    ],
    ids=["all narrow", "blocks that differ", "names beside numbers", "a name at the root", "64-bit"],
)
def test_everything_is_kept_by_the_names_in_the_files(tmp_path, tree):
    folder = perparam.save_params(tree, tmp_path / "saved")
    plan = perparam.infer_policy(folder).explain(perparam.checkpoint_tree(folder))
    assert {row.change for row in plan} == {"kept"}


def test_the_names_of_a_quantised_model_have_rules_of_their_own(tmp_path):
    folder = write(tmp_path, fields(), tensors(fields()))
    policy = perparam.infer_policy(folder, bare=True)
    assert (policy.params.plain()["weight"], "default" in policy.params.plain()) == ("f8_e4m3fn", False)
    assert {row.change for row in policy.explain(perparam.checkpoint_tree(folder, bare=True))} == {"kept"}


def test_a_published_layout_gives_a_short_policy(tmp_path):
    config = fields()
    policy = perparam.infer_policy(write(tmp_path, config, tensors(config)))
    assert policy.params.plain() == {
        "lm_head/kernel": "bf16",
        "kernel": "f8_e4m3fn",
        "scale_inv": "bf16",
        "embedding": "bf16",
        "default": "bf16",
    }
    assert policy.compute.plain() == {"kernel": None, "default": "bf16"}
    assert (policy.output, policy.block) == (BF16, (16, 24))


def test_exceptions_are_named_by_path_and_shared_by_all_layers_that_agree(tmp_path):
    everywhere = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    config = fields(
        quantization_config={
            **checkpoints.FIELDS["quantization_config"],
            "modules_to_not_convert": ["lm_head", *everywhere, "model.layers.0.self_attn.q_proj"],
        }
    )
    stored = tensors(config, plain=[*everywhere, "model.layers.0.self_attn.q_proj"])
    stored["model.norm.weight"] = stored["model.norm.weight"].astype(np.float32)
    policy = perparam.infer_policy(write(tmp_path, config, stored))
    exceptions = {
        "layers/*/mlp/down_proj/kernel": "bf16",
        "layers/0/self_attn/q_proj/kernel": "bf16",
        "lm_head/kernel": "bf16",
        "norm/scale": "f32",
    }
    assert exceptions.items() <= policy.params.plain().items()
    plan = policy.explain(perparam.checkpoint_tree(tmp_path))
    assert {row.change for row in plan.rows} == {"kept"}


def test_it_survives_yaml(tmp_path):
    policy = perparam.infer_policy(GOLDEN / "fp8_mixed_unquantised")
    policy.dump(tmp_path / "policy.yaml")
    assert Policy.load(tmp_path / "policy.yaml") == policy


def test_activations_run_in_the_dtype_of_the_config(tmp_path):
    config = fields(torch_dtype="float16")
    policy = perparam.infer_policy(write(tmp_path, config, tensors(config)))
    assert (policy.activations, policy.output) == (np.float16, np.float16)
    assert policy.params.dtype("norm/scale") == BF16
