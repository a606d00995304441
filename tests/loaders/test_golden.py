"""Logits and greedy tokens of small checkpoints, beside what Hugging Face transformers computes from the same files."""

import functools
import json
import math

import checkpoints
import numpy as np
import pytest
from checkpoints import CASES, GOLDEN, relative_error

import perparam

FLOAT32_ERROR = 1e-5
"""Sums of up to 456 products in another order differ by about sqrt(456) * 2**-24 = 1.3e-6; 40 such sums, by 8e-6."""

BF16_ROUNDING = 2**-9
"""The rms relative error of rounding to bfloat16: uniform within 2**-8 of the exponent, 0.42 * 2**-8 on average."""

ROUNDINGS_PER_LAYER = 34
"""Attention: its norm 2, three projections, q and k norms 4, rotations 6, softmax, mix, o_proj, sum: 19. MLP: its norm
2, gate, up, silu, product, down, sum: 8. And the seven weights, rounded once each."""

ROUNDINGS_OUTSIDE = 4
"""The last norm 2, the head's weight, the logits."""

MORE_THAN_THE_REFERENCE = 1.5
"""Our bfloat16 error over transformers' own: two draws of one distribution, differently rounded (seen: 1.31)."""

WRONG = 100 * FLOAT32_ERROR

KEPT = perparam.Policy(compute="f32")
EXACT_POLICIES = {"kept": KEPT, "dequantised": "f32"}
BF16_POLICIES = {"kept": None, "dequantised": "bf16"}

# Once dequantised, an FP8 checkpoint is a plain one: held in full all the same, but not in the quick run.
POLICIES = ("kept", pytest.param("dequantised", marks=pytest.mark.slow))


@functools.cache
def expected(case):
    with np.load(GOLDEN / case / "expected.npz") as file:
        return dict(file)


@functools.cache
def loaded(case, policy):
    return perparam.load_model(GOLDEN / case, policy)


def logits(case, policy):
    return checkpoints.logits(loaded(case, policy), expected(case)["input_ids"], expected(case)["attention_mask"])


# Left out of the quick run. Those of the first line differ from other cases only in their files, of which the first
# three are compared in `tests/loaders/save`; the layers of the others are those of a quick case, or their parts are.
SLOW = (
    *("fp8_shards", "fp8_untied_f32_scales", "fp8_tied_bf16_scales", "fp8_tied_with_lm_head", "bf16_yarn_new_form"),
    *("fp8_bias", "fp8_right_padding", "llama_fp8_biases"),
    *("llama_fp8_channel", "llama_fp8_tensor", "llama_linear_rope", "llama_plain_tied", "qwen2_sliding_window"),
)


def cases_and_policies():
    for case in CASES:
        yield pytest.param(case, "kept", marks=pytest.mark.slow if case in SLOW else ())
        # Once dequantised, an FP8 checkpoint is a plain one: compared in full all the same, but rarely.
        yield pytest.param(case, "dequantised", marks=pytest.mark.thorough if case in SLOW else pytest.mark.slow)


@pytest.mark.parametrize(("case", "policy"), list(cases_and_policies()))
def test_float32_logits_are_those_of_transformers(case, policy):
    found, exact = logits(case, EXACT_POLICIES[policy]), expected(case)
    assert found.dtype == np.float32
    assert relative_error(found, exact["logits_f32"], exact["attention_mask"]) <= FLOAT32_ERROR


QUICK = ("bf16_plain", "fp8_left_padding", "fp8_ragged_block128_f16_scales", "fp8_yarn")


# Logits decide about tokens: what generation adds to them is padding, and positions.
QUICK_TOKENS = ("fp8_left_padding",)


def rarely(case):
    """The mark of what the quick run leaves out; CI too, of cases whose layers and positions are those of others."""
    return pytest.mark.thorough if case in SLOW and case != "fp8_right_padding" else pytest.mark.slow


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK_TOKENS else rarely(case)) for case in CASES]
)
def test_greedy_tokens_are_those_of_transformers(case):
    exact = expected(case)
    tokens = perparam.generate(
        loaded(case, KEPT),
        exact["input_ids"],
        exact["attention_mask"],
        max_new_tokens=exact["greedy"].shape[1],
        eos_token_id=(),
    )
    np.testing.assert_array_equal(tokens, exact["greedy"])


# A dequantised checkpoint is a plain one, whose float32 logits CI compares: those in bfloat16 are for `.ci/full`.
@pytest.mark.parametrize(
    ("case", "policy"),
    [
        *(pytest.param(case, "kept", marks=() if case in QUICK else rarely(case)) for case in CASES),
        *(pytest.param(case, "dequantised", marks=pytest.mark.thorough) for case in CASES),
    ],
)
def test_bfloat16_logits_are_within_rounding_of_transformers(case, policy):
    found, exact = logits(case, BF16_POLICIES[policy]), expected(case)
    mask = exact["attention_mask"]
    layers = loaded(case, BF16_POLICIES[policy]).config.num_hidden_layers
    roundings = layers * ROUNDINGS_PER_LAYER + ROUNDINGS_OUTSIDE
    assert found.dtype == checkpoints.BF16
    # Both sides round: twice as many independent errors.
    assert relative_error(found, exact["logits_bf16"], mask) <= math.sqrt(2 * roundings) * BF16_ROUNDING
    reference_error = relative_error(exact["logits_bf16"], exact["logits_f32"], mask)
    assert relative_error(found, exact["logits_f32"], mask) <= MORE_THAN_THE_REFERENCE * reference_error


MISTAKES = {"transposed": np.transpose, "ignored": np.ones_like, "divided": np.reciprocal}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices_scales_that_are(mistake, policy, tmp_path):
    case = "fp8_ragged_block128_f16_scales"
    tensors = checkpoints.read(GOLDEN / case)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    assert tensors[name].shape == (3, 3)
    # float32 scales: a reciprocal may be too large for float16.
    changed = {other: array.astype(np.float32) for other, array in tensors.items() if other.endswith("_scale_inv")}
    changed[name] = MISTAKES[mistake](changed[name])
    exact = expected(case)
    config = json.loads((GOLDEN / case / "config.json").read_text())
    for arrays, noticed in ((tensors, False), (tensors | changed, True)):
        model = perparam.load_model(checkpoints.write(tmp_path / str(noticed), config, arrays), EXACT_POLICIES[policy])
        found = checkpoints.logits(model, exact["input_ids"], exact["attention_mask"])
        assert (relative_error(found, exact["logits_f32"], exact["attention_mask"]) > WRONG) == noticed
