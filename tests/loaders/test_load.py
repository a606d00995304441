"""`load_model`: what is kept is kept bit for bit, what is cast or dequantised is what numpy makes of the files."""

import json
import re
import warnings

import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import BF16, BLOCK, CASES, F8, GOLDEN, checkpoint_name, fields, tensors, write
from flax import nnx

import perparam
from perparam import Policy
from perparam.loaders.safetensors.reader import Tensor
from perparam.policies.errors import InvalidCheckpoint, InvalidScale, MissingFile, UnmatchedRule

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
GATE = "layers/1/mlp/gate_proj"

E4M3_ERROR, E5M2_ERROR = 2**-4, 2**-3
"""The largest relative error of rounding a normal number: half a unit in the last of 4 and of 3 significant bits."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "checkpoint", fields(), tensors(fields()))


@pytest.fixture(scope="module")
def stored(folder):
    return checkpoints.read(folder)


def weight(stored, path, block=BLOCK) -> np.ndarray:
    """The weight of a kernel in float32: payload times its block's scale, both exact in float64."""
    kernel, scales = stored[checkpoint_name(f"{path}/kernel")], stored[checkpoint_name(f"{path}/scale_inv")]
    spread = np.kron(scales.astype(np.float64), np.ones(block))[: kernel.shape[0], : kernel.shape[1]]
    return (kernel.astype(np.float64) * spread).astype(np.float32)


def bits(array):
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()


def assert_same(model, other):
    found, wanted = checkpoints.arrays(model), checkpoints.arrays(other)
    assert found.keys() == wanted.keys()
    assert all(bits(found[path]) == bits(wanted[path]) for path in wanted)


# Kept.


@pytest.mark.parametrize("case", CASES)
def test_without_a_policy_every_tensor_is_kept_bit_for_bit(case):
    stored = checkpoints.read(GOLDEN / case)
    arrays = checkpoints.arrays(perparam.load_model(GOLDEN / case))
    config = json.loads((GOLDEN / case / "config.json").read_text())
    if config.get("tie_word_embeddings"):
        stored.pop("lm_head.weight", None)
    found = {
        name: np.asarray(array)[index]
        for path, array in arrays.items()
        for name, index in checkpoints.places(path, array.shape, config).items()
    }
    assert found.keys() == stored.keys()
    for name, array in found.items():
        assert bits(array.reshape(stored[name].shape)) == bits(stored[name]), name


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_scales_keep_their_dtype_and_kernels_stay_float8_on_the_device(tmp_path, dtype):
    stored = tensors(fields(), scale_dtype=dtype)
    projection = perparam.load_model(write(tmp_path, fields(), stored)).layers[1].mlp.gate_proj
    kernel, scales = projection.kernel[...], projection.scale_inv[...]
    assert isinstance(kernel, jax.Array)
    assert kernel.dtype == F8
    assert scales.dtype == dtype
    assert projection.kernel.block == BLOCK
    assert bits(kernel) == bits(stored[checkpoint_name(f"{GATE}/kernel")])
    assert bits(scales) == bits(stored[checkpoint_name(f"{GATE}/scale_inv")])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU can adopt a host's buffer")
@pytest.mark.parametrize("policy", [None, "bf16", "params=f32"])
def test_a_cpu_adopts_what_was_read_without_a_copy(folder, monkeypatch, policy):
    from perparam.loaders import placement

    addresses = set()
    aligned_empty = placement.aligned_empty

    def remember(count):
        buffer = aligned_empty(count)
        addresses.add(buffer.ctypes.data)
        return buffer

    monkeypatch.setattr(placement, "aligned_empty", remember)
    arrays = checkpoints.arrays(perparam.load_model(folder, policy))
    assert {array.unsafe_buffer_pointer() for array in arrays.values()} == addresses


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_load_as_one_file_does(folder, tmp_path, shards):
    sharded = write(tmp_path, fields(), tensors(fields()), shards=shards)
    assert_same(perparam.load_model(sharded), perparam.load_model(folder))


def test_narrow_pairs_are_no_parameters_of_an_optimizer(folder):
    model = perparam.load_model(folder)
    trained = {"/".join(map(str, keys)) for keys, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert trained == {path for path, array in checkpoints.arrays(model).items() if "_proj" not in path}


def test_the_seeds_tiny_model_keeps_its_kernels_and_gives_logits(tmp_path):
    config = {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 1024, "torch_dtype": "float8_e4m3fn",
        "use_qk_norm": True, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    }  # fmt: skip
    stored = tensors(config)
    for name in list(stored):
        if name.endswith("_scale_inv"):
            stored[name] = np.ones(stored[name].shape, F32)
            kernel = stored[name.removesuffix("_scale_inv")]
            stored[name.removesuffix("_scale_inv")] = (kernel.astype(F32) / 448 / 8).astype(F8)
    model = perparam.load_model(write(tmp_path, config, stored))
    projection = model.layers[0].self_attn.q_proj
    assert (projection.kernel[...].dtype, projection.scale_inv[...].dtype) == (F8, F32)
    assert projection.scale_inv[...].shape == (1, 1)
    logits = checkpoints.logits(model, np.arange(10)[None])
    assert logits.shape == (1, 10, 1024)
    assert logits.dtype == BF16  # the embedding's, since torch_dtype is narrow
    assert np.isfinite(logits.astype(F32)).all()


# Cast and dequantised.


@pytest.mark.parametrize(("policy", "dtype"), [("bf16", BF16), ("f32", F32), ("f16", F16)])
def test_a_uniform_policy_leaves_no_narrow_array_and_no_scale(folder, stored, policy, dtype):
    arrays = checkpoints.arrays(perparam.load_model(folder, policy))
    assert {array.dtype for array in arrays.values()} == {dtype}
    assert {checkpoint_name(path) for path in arrays} == {name for name in stored if not name.endswith("_scale_inv")}
    assert bits(arrays["norm/scale"]) == bits(stored["model.norm.weight"].astype(dtype))
    assert bits(arrays[f"{GATE}/kernel"]) == bits(weight(stored, GATE).astype(dtype))


def test_a_map_decides_tensor_by_tensor(folder, stored):
    policy = Policy(
        params={
            "layers/0/**/kernel": "f32",
            "layers/1/mlp/{up,down}_proj/kernel": "bf16",
            "lm_head/kernel": None,
            "embedding": "f16",
            "input_layernorm/scale?": "f16",
            "scale": "f32",
        },
        compute="f32",
    )
    arrays = checkpoints.arrays(perparam.load_model(folder, policy))
    assert bits(arrays["layers/0/mlp/up_proj/kernel"]) == bits(weight(stored, "layers/0/mlp/up_proj"))
    assert "layers/0/mlp/up_proj/scale_inv" not in arrays
    assert bits(arrays["layers/1/mlp/down_proj/kernel"]) == bits(weight(stored, "layers/1/mlp/down_proj").astype(BF16))
    assert bits(arrays[f"{GATE}/kernel"]) == bits(stored[checkpoint_name(f"{GATE}/kernel")])
    assert bits(arrays[f"{GATE}/scale_inv"]) == bits(stored[checkpoint_name(f"{GATE}/scale_inv")])
    assert bits(arrays["lm_head/kernel"]) == bits(stored["lm_head.weight"])
    assert bits(arrays["embed_tokens/embedding"]) == bits(stored["model.embed_tokens.weight"].astype(F16))
    assert arrays["layers/1/input_layernorm/scale"].dtype == F32  # the pattern is anchored: only its own rule counts


def test_scales_are_widened_only_by_a_rule_that_names_them(folder, stored):
    arrays = checkpoints.arrays(perparam.load_model(folder, {"params": {"scale_inv": "f32"}, "compute": "f32"}))
    assert bits(arrays[f"{GATE}/scale_inv"]) == bits(stored[checkpoint_name(f"{GATE}/scale_inv")].astype(F32))
    assert bits(arrays[f"{GATE}/kernel"]) == bits(stored[checkpoint_name(f"{GATE}/kernel")])


def test_another_block_requantises(folder, stored):
    model = perparam.load_model(folder, Policy(params={"kernel": "f8_e4m3fn"}, block=(32, 32)))
    projection = model.layers[1].mlp.gate_proj
    assert projection.kernel.block == (32, 32)
    assert projection.scale_inv[...].shape == (3, 2)
    exact, found = (
        weight(stored, GATE),
        perparam.dequantize(projection.kernel[...], projection.scale_inv[...], (32, 32)),
    )
    assert 0 < checkpoints.relative_error(found, exact) <= E4M3_ERROR


def test_another_narrow_dtype_requantises_in_the_block_it_had(folder, stored):
    model = perparam.load_model(folder, {"params": {"layers/*/mlp/*/kernel": "f8_e5m2", "kernel": None}})
    projection = model.layers[1].mlp.gate_proj
    assert (projection.kernel[...].dtype, projection.kernel.block) == (E5M2, BLOCK)
    found = perparam.dequantize(projection.kernel[...], projection.scale_inv[...], BLOCK)
    assert 0 < checkpoints.relative_error(found, weight(stored, GATE)) <= E5M2_ERROR
    assert model.layers[1].self_attn.q_proj.kernel[...].dtype == F8


def test_a_bfloat16_checkpoint_is_quantised_on_load(tmp_path):
    config = fields(quantization_config=None)
    stored = tensors(config)
    model = perparam.load_model(write(tmp_path, config, stored), "fp8_weight_only")
    projection = model.layers[1].mlp.gate_proj
    kernel, scales = perparam.quantize(stored[checkpoint_name(f"{GATE}/kernel")], "f8_e4m3fn", (128, 128))
    assert bits(projection.kernel[...]) == bits(kernel)
    assert bits(projection.scale_inv[...]) == bits(scales)
    assert model.lm_head.kernel[...].dtype == BF16


def test_a_narrow_embedding_is_read_with_its_scales(tmp_path):
    config = fields(tie_word_embeddings=True)
    stored = tensors(config)
    rng = np.random.default_rng(0)
    name = "model.embed_tokens.weight"
    stored[name], stored[f"{name}_scale_inv"] = checkpoints.narrow_pair(rng, (61, 56))
    write(tmp_path, config, stored)
    arrays = checkpoints.arrays(perparam.load_model(tmp_path))
    assert bits(arrays["embed_tokens/embedding"]) == bits(stored[name])
    assert bits(arrays["embed_tokens/embedding_scale_inv"]) == bits(stored[f"{name}_scale_inv"])
    ids = np.array([[0, 60, 17, 33, 5, 16]])
    kept = checkpoints.logits(perparam.load_model(tmp_path, Policy(compute="f32")), ids)
    # Sums of up to 76 products, in another order: float32's 2**-24 a product.
    assert checkpoints.relative_error(kept, checkpoints.logits(perparam.load_model(tmp_path, "f32"), ids)) <= 1e-5


# What the model then is.


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_without_a_policy_the_model_computes_in_the_dtype_of_its_config(tmp_path, name):
    config = fields(torch_dtype=name)
    model = perparam.load_model(write(tmp_path, config, tensors(config, plain_dtype=F32)))
    assert model.activations == np.dtype(getattr(ml_dtypes, name, name))
    assert jax.eval_shape(model, np.zeros((1, 3), np.int32)).dtype == model.activations


POLICIES = [None, "bf16", "fp8_weight_only", "fp8_dynamic", Policy({"kernel": "f8_e5m2", "default": "f32"}, "f32")]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_plan_made_from_headers_is_what_the_loaded_model_holds(folder, policy):
    policy = perparam.get_policy(policy)
    plan = policy.explain(perparam.checkpoint_tree(folder))
    arrays = checkpoints.arrays(perparam.load_model(folder, policy))
    planned = {row.path: (row.shape, row.storage, row.bytes) for row in plan.rows if row.storage is not None}
    assert planned == {path: (array.shape, array.dtype, array.nbytes) for path, array in arrays.items()}


def test_headers_and_the_model_that_keeps_them_have_the_same_plan(folder):
    tree, model = perparam.checkpoint_tree(folder), perparam.load_model(folder)
    for policy in map(perparam.get_policy, POLICIES):
        of_headers = {row.path: row for row in policy.explain(tree).rows}
        assert of_headers == {row.path: row for row in policy.explain(model).rows}


# What is refused.


@pytest.mark.parametrize("value", [np.nan, 0.0, -1.0, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("policy", [None, "f32"], ids=["kept", "dequantised"])
def test_a_scale_that_is_no_positive_finite_number_is_refused(tmp_path, value, policy):
    stored = tensors(fields())
    stored[checkpoint_name(f"{GATE}/scale_inv")][3, 1] = value
    write(tmp_path, fields(), stored)
    expected = (
        rf"{GATE}/scale_inv: scales are positive finite numbers; found {value} at block \(3, 1\), and 1 such of 15"
    )
    with pytest.raises(InvalidScale, match=expected) as caught:
        perparam.load_model(tmp_path, policy)
    assert "fetch or make them again" in str(caught.value)


def test_weights_that_no_scale_can_hold_are_refused(tmp_path):
    config = fields(quantization_config=None)
    stored = tensors(config)
    stored[checkpoint_name(f"{GATE}/kernel")][7, 50] = np.nan
    with pytest.raises(InvalidScale, match=rf"{GATE}/kernel: the weights of a block hold NaN or infinity"):
        perparam.load_model(write(tmp_path, config, stored), "fp8_weight_only")


@pytest.mark.parametrize("slot", ["params", "compute"])
def test_a_rule_that_decides_nothing_is_refused_before_anything_is_read(folder, monkeypatch, slot):
    monkeypatch.setattr(Tensor, "read", lambda tensor, *_: pytest.fail(f"{tensor.name} was read"))
    with pytest.raises(UnmatchedRule, match=rf"'layers/\*/mlp/down/kernal' \({slot}\) matches none of \d+ parameters"):
        perparam.load_model(folder, {slot: {"layers/*/mlp/down/kernal": "f32"}})


def test_a_truncated_file_is_refused(tmp_path):
    file = write(tmp_path, fields(), tensors(fields())) / "model.safetensors"
    content = file.read_bytes()
    for length in np.linspace(0, len(content) - 1, 12, dtype=int):
        file.write_bytes(content[:length])
        with pytest.raises(InvalidCheckpoint, match=re.escape(str(file))):
            perparam.load_model(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(MissingFile, match="neither a folder nor a name on the hub"):
        perparam.load_model(tmp_path / "absent")
    assert issubclass(MissingFile, FileNotFoundError)


def test_a_path_may_be_text(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(perparam.load_model(str(folder)), perparam.load_model(folder))
