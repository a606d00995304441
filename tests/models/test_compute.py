"""A model under policies: what is computed narrow, what is returned, and how far each mode is from float32."""

import math

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import BF16, F8, fields, relative_error, tensors, write
from flax import nnx

import perparam
from perparam import Policy
from perparam.policies.errors import InvalidPolicy, ShadowedRule, UnmatchedRule

FLOAT32_ERROR = 1e-5
"""As in test_qwen3: the same sums in another order."""

LAYERS = 1
BF16_ERROR = math.sqrt(LAYERS * 34 + 4) * 2**-9
"""Some 34 roundings a layer and four outside, see test_golden, each 2**-9 rms, independent: 1.2e-2."""

E4M3_ROUNDING = 2**-4 * 0.43
"""The rms relative error of rounding to four significant bits."""

MATMULS_ERROR = math.hypot(2 * math.sqrt(4), math.sqrt(3)) * E4M3_ROUNDING
"""One operand of each matmul rounded, activations or weights, independently: four on the way through attention, which
the product of gate and up, being of second degree, doubles; then gate, up and down: 1.2e-1."""

IDS = np.array([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 1, 2]])
HEAD_WIDE = {"lm_head/kernel": None, "kernel": "f8_e4m3fn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = fields(attention_bias=True, num_hidden_layers=LAYERS)
    return write(tmp_path_factory.mktemp("small"), config, tensors(config))


@pytest.fixture(scope="module")
def kept(folder):
    return perparam.load_model(folder)


@pytest.fixture(scope="module")
def exact(folder):
    """Logits of the dequantised model in float32."""
    return checkpoints.logits(perparam.load_model(folder, "f32"), IDS)


def error(model, exact):
    return relative_error(checkpoints.logits(model, IDS), exact)


# Modes.


def test_narrow_kernels_computed_in_float32_are_the_dequantised_model(kept, exact):
    assert error(kept.with_policy(Policy(compute="f32")), exact) <= FLOAT32_ERROR
    assert error(kept.with_policy(Policy(compute={"kernel": "f32", "default": "f32"})), exact) <= FLOAT32_ERROR


def test_weight_only_is_off_by_bfloat16s_rounding(folder, exact):
    model = perparam.load_model(folder, "fp8_weight_only")
    assert model.layers[0].mlp.down_proj.kernel[...].dtype == F8
    assert FLOAT32_ERROR < error(model, exact) <= BF16_ERROR


@pytest.mark.slow
def test_dynamic_is_off_by_the_rounding_of_activations(folder, exact):
    model = perparam.load_model(folder, "fp8_dynamic")
    found = error(model, exact)
    assert BF16_ERROR < found <= math.hypot(MATMULS_ERROR, BF16_ERROR)


def test_dynamic_rounds_activations_in_float32_too(kept, exact):
    found = error(kept.with_policy(Policy(compute=HEAD_WIDE | {"default": "f32"})), exact)
    assert MATMULS_ERROR / 4 < found <= MATMULS_ERROR


def test_a_plain_model_quantised_to_float8_is_off_by_the_rounding_of_weights(tmp_path):
    config = fields(quantization_config=None, num_hidden_layers=LAYERS)
    model = perparam.load_model(write(tmp_path, config, tensors(config)))
    exact = checkpoints.logits(model.with_policy("f32"), IDS)
    narrow = model.with_policy(Policy(HEAD_WIDE, "f32", block=(16, 24)))
    assert MATMULS_ERROR / 4 < error(narrow, exact) <= MATMULS_ERROR


# What is returned.


@pytest.mark.parametrize("output", ["f32", "bf16", "f16"])
def test_logits_have_the_output_dtype(kept, output):
    graphdef, state = nnx.split(kept.with_policy(Policy(compute="bf16", output=output)))
    logits = jax.eval_shape(lambda state: nnx.merge(graphdef, state)(IDS), state)
    assert logits.dtype == perparam.policies.dtypes.as_dtype(output)


@pytest.mark.parametrize(("compute", "dtype"), [(None, BF16), ("f32", np.float32), ({"kernel": "f32"}, BF16)], ids=str)
def test_without_an_output_logits_have_the_activations_dtype(kept, compute, dtype):
    model = kept.with_policy(Policy(compute=compute))
    graphdef, state = nnx.split(model)
    assert jax.eval_shape(lambda state: nnx.merge(graphdef, state)(IDS), state).dtype == model.activations == dtype


# Rules for some parameters.


def test_norms_and_biases_may_compute_wider_than_the_activations(kept, exact):
    model = kept.with_policy(Policy(compute={"scale": "f32", "bias": "f32", "default": "bf16"}))
    logits = checkpoints.logits(model, IDS)
    assert logits.dtype == BF16
    assert FLOAT32_ERROR < relative_error(logits, exact) <= BF16_ERROR
    assert model.layers[0].self_attn.q_proj.bias_compute == model.norm.compute == np.float32


def test_a_rule_by_path_changes_only_what_it_names(kept):
    layer = kept.with_policy(Policy(compute={"layers/0/mlp/**/kernel": "f8_e4m3fn", "default": "f32"})).layers[0]
    assert layer.mlp.up_proj.compute.values == layer.mlp.down_proj.compute.values == F8
    assert layer.self_attn.q_proj.compute.values == layer.input_layernorm.compute == np.float32


def test_a_kernel_computed_in_bfloat16_between_float32_activations_rounds_once_a_matmul(kept, exact):
    model = kept.with_policy(Policy(compute={"kernel": "bf16", "default": "f32"}))
    logits = checkpoints.logits(model, IDS)
    assert logits.dtype == np.float32
    assert FLOAT32_ERROR < relative_error(logits, exact) <= BF16_ERROR


# Another policy for a model that is there.


def test_another_policy_gives_what_loading_under_it_gives(kept, folder):
    for policy in ("f32", Policy({"lm_head/kernel": None, "kernel": "f8_e5m2", "default": "f32"}, "f32")):
        found, loaded = (
            checkpoints.arrays(model) for model in (kept.with_policy(policy), perparam.load_model(folder, policy))
        )
        assert found.keys() == loaded.keys()
        assert all(np.asarray(found[path]).tobytes() == np.asarray(loaded[path]).tobytes() for path in loaded)


def test_what_is_already_as_asked_is_shared_and_the_model_left_alone(kept):
    before = checkpoints.arrays(kept)
    after = checkpoints.arrays(kept.with_policy(Policy({"layers/0/mlp/up_proj/kernel": "f32"}, "f32")))
    changed = {path for path in before if before[path] is not after.get(path)}
    assert changed == {"layers/0/mlp/up_proj/kernel", "layers/0/mlp/up_proj/scale_inv"}
    assert kept.layers[0].mlp.up_proj.kernel[...].dtype == F8
    assert kept.activations == BF16


def test_the_block_is_remembered_through_policies(kept):
    again = kept.with_policy(Policy(compute="f32")).with_policy(None)
    assert again.layers[0].mlp.up_proj.kernel.block == checkpoints.BLOCK


@pytest.mark.parametrize("slot", ["params", "compute"])
def test_another_policy_is_held_to_its_rules(kept, slot):
    with pytest.raises(UnmatchedRule, match=rf"'kernal' \({slot}\) matches none"):
        kept.with_policy({slot: {"kernal": "f32"}})
    with pytest.raises(ShadowedRule, match=rf"'lm_head/kernel' \({slot}\) decides nothing"):
        kept.with_policy({slot: {"kernel": None, "lm_head/kernel": "f32"}})


@pytest.mark.parametrize("slot", ["params", "compute"])
def test_a_norm_cannot_be_narrow(kept, slot):
    with pytest.raises(InvalidPolicy, match=r"'scale'.* asks f8_e4m3fn of '\S+/scale', whose shape is \(\d+,\)"):
        kept.with_policy({slot: {"scale": "f8_e4m3fn"}})
