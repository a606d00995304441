"""`export`: parameters that no checkpoint can hold are refused before anything is written."""

import dataclasses

import checkpoints
import jax.numpy as jnp
import pytest
from checkpoints import BF16, fields, tensors, write
from flax import nnx

import perparam
from perparam import Policy, load_model, save_model
from perparam.loaders import convert_checkpoint
from perparam.policies.errors import UnsupportedExport


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fp8") / "checkpoint", fields(), tensors(fields()))


def broken(fp8, name):
    """A model that no checkpoint can hold."""
    model = load_model(fp8)
    if name == "e5m2":
        return load_model(fp8, {"params": {"layers/*/mlp/*/kernel": "f8_e5m2", "kernel": None}})
    if name == "int8":
        return load_model(fp8, {"params": {"layers/*/mlp/*/kernel": "int8", "kernel": None}})
    if name == "e8m0 scales":
        return load_model(fp8, {"params": {"**/mlp/*/kernel": "mxfp8", "kernel": None}})
    if name == "whole axes":
        return load_model(fp8, {"params": {"kernel": {"dtype": "f8_e4m3fn", "block": [16, -1]}}})
    if name == "embedding":
        return load_model(fp8, {"params": {"embedding": "f8_e4m3fn"}})
    if name == "blocks":
        return load_model(fp8, Policy({"lm_head/kernel": "f8_e4m3fn"}, block=(32, 32)))
    if name == "larger":
        embedding = model.embed_tokens.embedding
        embedding.set_value(jnp.concatenate([embedding[...], embedding[...]]))
    if name == "missing":
        del model.layers[1].mlp.up_proj.kernel
        del model.layers[1].mlp.up_proj.scale_inv
    if name == "more":
        model.layers[0].mlp.up_proj.lora_a = nnx.Param(jnp.zeros((3, 4)))
    return model


REFUSALS = {
    "e5m2": r"layers/0/mlp/.*: f8_e5m2 is not supported in this layout",
    "int8": r"layers/0/mlp/.*: (int8|i8) is not supported in this layout",
    "e8m0 scales": r"layers/0/mlp/.*/scale_inv: f8_e8m0fnu is not supported in this layout",
    "whole axes": r"kernels in blocks of \[16, -1\], -1 for a whole axis: no quantization_config can describe that",
    "embedding": r"embed_tokens/embedding: f8_e4m3fn, but in this layout only kernels are quantised",
    "blocks": r"kernels in blocks of \[\(16, 24\), \(32, 32\)\]: config.json can have only one",
    "more": r"no name for 1 parameter: layers/0/mlp/up_proj/lora_a",
    "larger": r"embed_tokens/embedding",
    "missing": r"layers/1/mlp/up_proj/kernel",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_parameters_that_the_layout_cannot_express_are_refused_and_nothing_is_written(fp8, name, tmp_path):
    with pytest.raises(UnsupportedExport, match=REFUSALS[name]):
        save_model(broken(fp8, name), tmp_path / "above" / "saved")
    assert not list(tmp_path.iterdir())


def test_a_policy_can_make_such_parameters_fit_the_layout(fp8, tmp_path):
    for name in ("e5m2", "embedding", "blocks"):
        save_model(broken(fp8, name), tmp_path / name, "bf16")
        assert {array.dtype for array in checkpoints.read(tmp_path / name).values()} == {BF16}


@pytest.mark.parametrize(
    "policy",
    [{"params": {"embedding": "f8_e4m3fn"}}, {"params": {"**/mlp/*/kernel": "f8_e5m2"}}],
    ids=["embedding", "e5m2"],
)
def test_convert_checkpoint_refuses_such_parameters_too(fp8, policy, tmp_path):
    with pytest.raises(UnsupportedExport, match=r"is not supported in this layout|only kernels are quantised"):
        convert_checkpoint(fp8, tmp_path / "saved", policy)
    assert not list(tmp_path.iterdir())


def test_a_linear_with_more_parameters_is_refused(fp8, tmp_path):
    class Lora(perparam.models.layers.Linear):
        def __init__(self, in_features, out_features, *, rngs, **more):
            super().__init__(in_features, out_features, rngs=rngs, **more)
            self.lora_a = nnx.Param(jnp.zeros((in_features, 2)))

    config = dataclasses.replace(load_model(fp8).config, num_hidden_layers=1)
    with pytest.raises(UnsupportedExport, match=r"no name for 8 parameters: .*lora_a"):
        save_model(perparam.models.Qwen3(config, linear=Lora, rngs=nnx.Rngs(0)), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")
def test_windows_that_differ_are_refused_and_nothing_is_written(fp8, tmp_path):
    model = load_model(fp8)
    model.config = dataclasses.replace(model.config, windows=(3, 5))
    with pytest.raises(UnsupportedExport, match=r"sliding windows of \[3, 5\] tokens"):
        save_model(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
