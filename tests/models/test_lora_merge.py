"""The merge of adapters into kernels: exact in float32, requantised in FP8, and what the report says of it."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import relative_error
from flax import nnx
from helpers import reference_quantize

import perparam
from perparam.models.moe import ExpertLinear
from perparam.policies.errors import InvalidAdapter, UnmatchedRule
from perparam.training import add_lora, merge_lora

ULP = 2.0**-23
"""Of float32: norms and products are sums in another order than NumPy's, a few of these."""


def layer(policy, block=None, scale_inv=None, seed=0, size=0.05, kind=None):
    """A Linear of (36, 44), or experts, with random adapters of rank 3, scaled by 2."""
    slots = perparam.get_policy(
        {"params": {"kernel": policy, "scale_inv?": scale_inv}} | ({"block": block} if block else {})
    )
    if kind is ExpertLinear:
        base = ExpertLinear(4, 44, 36, policy=slots.at(), rngs=nnx.Rngs(seed))
    else:
        base = perparam.Linear(44, 36, policy=slots, rngs=nnx.Rngs(seed))
    new = add_lora(nnx.Dict(up_proj=base), 3, 6, "up_proj", rngs=nnx.Rngs(seed))
    drawn = np.random.default_rng(seed).normal(size=new.up_proj.lora_b.shape, scale=size)
    new.up_proj.lora_b.set_value(np.asarray(drawn, np.float32))
    return new


def weight(linear):
    """The kernel in float64."""
    if linear.scale_inv is None:
        return np.asarray(linear.kernel[...], np.float64)
    array = perparam.models.layers.pair(linear.kernel, linear.scale_inv)
    return np.asarray(array.dequantize(), np.float64)


def delta(linear):
    lora_a, lora_b = (np.asarray(each[...], np.float64) for each in (linear.lora_a, linear.lora_b))
    return 2 * lora_b @ lora_a


FORMATS = {
    "fp8 in blocks": ("f8_e4m3fn", (16, 24), None),
    "bf16 scales": ("f8_e4m3fn", (32, 32), "bf16"),
    "int8 by channel": ("int8", (1, -1), None),
    "mxfp8": ("mxfp8", None, None),
    "bf16": ("bf16", None, None),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_merged_kernel_has_the_format_that_it_had_and_the_report_its_errors(name):
    model = layer(*FORMATS[name])
    merged, report = merge_lora(model)
    before, after = model.up_proj, merged.up_proj
    assert after.adapter is None
    assert not hasattr(after, "lora_a")
    assert (after.kernel.dtype, type(after.kernel)) == (before.kernel.dtype, type(before.kernel))
    if before.scale_inv is not None:
        assert (after.scale_inv.dtype, after.scale_inv.shape) == (before.scale_inv.dtype, before.scale_inv.shape)
        assert after.kernel.block == before.kernel.block
    [row] = report.rows
    base, added, stored = weight(before), delta(before), weight(after)
    norm, exact = np.linalg.norm, base + added
    assert row.path == "up_proj"
    assert row.delta == pytest.approx(norm(added) / norm(base), rel=100 * ULP)
    assert row.error == pytest.approx(norm(stored - exact) / norm(exact), rel=1e-5)  # of differences of 2**-9 or more
    assert row.noise == pytest.approx(norm(stored - exact) / norm(added), rel=1e-5)
    assert row.kept == pytest.approx(((stored - base) * added).sum() / (added**2).sum(), rel=1e-5)
    assert 1e-4 < row.error < 2**-4
    assert 0.5 < row.kept < 1.5


def test_a_merged_fp8_kernel_is_quantised_as_the_reference_does():
    model = layer("f8_e4m3fn", (16, 24))
    exact = (weight(model.up_proj).astype(np.float32) + delta(model.up_proj).astype(np.float32)).astype(np.float32)
    kernel, scale_inv = reference_quantize(exact, "float8_e4m3fn", (16, 24))
    merged = merge_lora(model)[0].up_proj
    np.testing.assert_allclose(np.asarray(merged.scale_inv[...]), scale_inv, rtol=4 * ULP)
    found = np.asarray(merged.kernel[...])
    # The sums of B A may differ in their last bits, and few of 1,584 values are that close to a boundary.
    assert (found.view(np.uint8) != kernel.view(np.uint8)).sum() <= 3
    assert found.dtype == ml_dtypes.float8_e4m3fn


def test_a_float32_kernel_is_merged_exactly():
    model = layer("f32")
    merged, report = merge_lora(model)
    assert relative_error(weight(merged.up_proj), weight(model.up_proj) + delta(model.up_proj)) < ULP
    assert report.rows[0].error == 0.0
    assert report.rows[0].kept == pytest.approx(1, abs=1e-5)


def test_small_adapters_are_lost_in_fp8_and_the_report_says_so():
    """Far below half a step of e4m3, 2**-4 of a value: rounding is larger than what is merged."""
    [row] = merge_lora(layer("f8_e4m3fn", (16, 24), size=1e-4))[1].rows
    assert row.delta < 1e-3
    assert row.noise > 0.5
    [wide] = merge_lora(layer("bf16", size=1e-2))[1].rows
    assert wide.noise < 0.1


def test_adapters_of_experts_are_merged_expert_by_expert():
    model = layer("f8_e4m3fn", (16, 24), kind=ExpertLinear)
    merged, report = merge_lora(model)
    exact = weight(model.up_proj) + delta(model.up_proj)
    assert exact.shape == (4, 36, 44)
    for found, expected in zip(weight(merged.up_proj), exact, strict=True):
        assert relative_error(found, expected) < 2**-4
    assert report.rows[0].path == "up_proj"


def test_an_adapter_of_zeros_leaves_every_bit_of_the_kernel():
    """Quantising again would give others: the largest value of this kernel's block is not the format's largest."""
    model = layer("f8_e4m3fn", (16, 24), size=0.0)
    kernel = np.asarray(model.up_proj.kernel[...].astype(np.float32) / 4).astype(ml_dtypes.float8_e4m3fn)
    model.up_proj.kernel.set_value(kernel)
    merged, report = merge_lora(model)
    assert np.asarray(merged.up_proj.kernel[...]).tobytes() == kernel.tobytes()
    assert (report.rows[0].delta, report.rows[0].error, report.rows[0].kept) == (0, 0, 1)


def test_the_merged_model_is_another_one():
    model = layer("f8_e4m3fn", (16, 24))
    kernel, added = np.asarray(model.up_proj.kernel[...]).tobytes(), delta(model.up_proj)
    merged, _ = merge_lora(model)
    assert np.asarray(model.up_proj.kernel[...]).tobytes() == kernel != np.asarray(merged.up_proj.kernel[...]).tobytes()
    np.testing.assert_array_equal(delta(model.up_proj), added)


def test_the_merged_models_policy_has_no_rules_for_adapters():
    rules = {"**/lora_{a,b}": "f32", "default": "bf16"}
    policy = perparam.Policy(
        rules, {"lora_a": "f16", "default": "bf16"}, master={"lora_b": "f32"},
        opt_state={"mu/**/lora_*": "bf16", "nu": "f32"},
    )  # fmt: skip
    model = layer("f32")
    model.policy = nnx.static(policy)
    policy.explain(model)
    merged, _ = merge_lora(model)
    with pytest.raises(UnmatchedRule, match="matches none of 1 parameter"):
        policy.explain(merged)
    assert merged.policy == perparam.Policy("bf16", "bf16", opt_state={"nu": "f32"})
    assert merged.policy.explain(merged).rows
    assert model.policy == policy


def test_the_report_is_a_table_and_json():
    report = merge_lora(layer("f8_e4m3fn", (16, 24)))[1]
    text = str(report)
    assert text.splitlines()[0].split() == ["layer", "format", "delta", "error", "noise", "kept"]
    assert text.splitlines()[1].split()[:3] == ["up_proj", "f8_e4m3fn", "16×24"]
    assert "1 layer merged; the largest error is" in text
    parsed = json.loads(report.to_json())
    assert parsed["rows"][0]["error"] == parsed["max_error"] == report.rows[0].error


def test_there_must_be_an_adapter_to_merge():
    with pytest.raises(InvalidAdapter, match=r"Linear: has no adapters to merge\. Add them with add_lora or load_lora"):
        merge_lora(perparam.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_adapters_that_are_not_finite_are_not_merged():
    model = layer("f32")
    model.up_proj.lora_b.set_value(np.full((36, 3), np.nan, np.float32))
    with pytest.raises(InvalidAdapter, match="up_proj: its lora_a or lora_b holds NaN or infinity"):
        merge_lora(model)
