"""Adapters in peft's files: read and written as peft does, with the same logits, and refused by field or by tensor."""

import contextlib
import functools
import json
import os
import subprocess
import sys

import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import GOLDEN, relative_error
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import perparam
from perparam.loaders import read_config
from perparam.loaders.fields import Fields
from perparam.loaders.peft_config import read_config as read_settings
from perparam.models import Qwen3, Qwen3Moe
from perparam.models.adapters import Adapter
from perparam.models.lora_layers import linear_layers
from perparam.policies.errors import (
    InvalidAdapter,
    InvalidCheckpoint,
    MissingFile,
    SaveFailed,
    UnsupportedConfig,
    UnsupportedExport,
)
from perparam.training import add_lora, load_lora, save_lora

CASES = {
    "patterns": "bf16_plain",
    "rslora": "llama_plain_tied",
    "experts": "qwen3_moe_plain_every_second",
    "one_kernel_of_experts": "qwen3_moe_plain_every_second",
}
REST = ("patterns", "rslora", "one_kernel_of_experts")
PEFT = GOLDEN / "peft"

FLOAT32_ERROR = 2e-5
"""As test_golden.py derives it, 1e-5, and as much again for the sums of adapters, which are random and large here."""

LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@functools.cache
def base(name):
    return perparam.load_model(GOLDEN / name, "f32")


@functools.cache
def small(family="qwen3"):
    config = read_config(checkpoints.fields(**checkpoints.FAMILIES[family] | {"quantization_config": None}))
    return {"qwen3": Qwen3, "qwen3_moe": Qwen3Moe}[family](config, policy="fp8_weight_only", rngs=nnx.Rngs(0))


def randomised(model, seed=0):
    """The model with random `lora_b`."""
    rng = np.random.default_rng(seed)
    for layer in linear_layers(model).values():
        if layer.adapter is not None:
            drawn = rng.normal(size=layer.lora_b.shape, scale=0.3)
            layer.lora_b.set_value(jax.numpy.asarray(drawn, layer.lora_b.dtype))
    return model


def adapters(model):
    return {
        path: (layer.adapter, np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...]))
        for path, layer in linear_layers(model).items()
        if layer.adapter is not None
    }


def assert_same_adapters(found, expected):
    assert found.keys() == expected.keys()
    for path, (adapter, *arrays) in found.items():
        assert adapter == expected[path][0], path
        for array, other in zip(arrays, expected[path][1:], strict=True):
            assert array.dtype == other.dtype
            assert array.tobytes() == other.tobytes(), path


@pytest.mark.parametrize("case", ["experts", *(pytest.param(case, marks=pytest.mark.thorough) for case in REST)])
def test_the_logits_with_an_adapter_of_peft_are_those_of_peft(case):
    model = load_lora(base(CASES[case]), PEFT / case)
    expected = np.load(PEFT / case / "expected.npz")
    ids = expected["input_ids"]
    without = relative_error(checkpoints.logits(base(CASES[case]), ids), expected["logits"])
    assert relative_error(checkpoints.logits(model, ids), expected["logits"]) <= FLOAT32_ERROR < 1e-2 < without


@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_of_peft_has_the_tensors_of_peft(case, tmp_path):
    save_lora(load_lora(base(CASES[case]), PEFT / case), tmp_path / "saved")
    theirs, ours = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (PEFT / case, tmp_path / "saved")
    )
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        assert array.tobytes() == ours[name].tobytes(), name
    settings = [read_settings(_fields(folder)) for folder in (PEFT / case, tmp_path / "saved")]
    for name in theirs:
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if "experts" not in module:  # named by their parameter
            assert settings[0].adapter(module) == settings[1].adapter(module), name


def _fields(folder):
    return Fields("adapter_config.json", json.loads((folder / "adapter_config.json").read_text()))


def test_settings_are_found_by_the_first_pattern_that_matches_the_end_of_a_name():
    config = read_settings(_fields(PEFT / "patterns"))
    assert config.adapter("model.layers.0.self_attn.v_proj") == Adapter(2, 8.0)
    assert config.adapter("model.layers.0.self_attn.q_proj") == Adapter(3, 3.0)
    assert config.adapter("model.layers.1.self_attn.q_proj") == Adapter(3, 8.0)
    assert config.adapter("model.layers.1.mlp.down_proj") == Adapter(5, 8.0)


@settings(max_examples=2, deadline=None)
@given(alpha=st.floats(0.25, 64), rslora=st.booleans())
def test_saved_adapters_are_loaded_bit_for_bit(alpha, rslora, tmp_path_factory):
    model = small()
    for rank, targets in ((1, ["q_proj", "lm_head"]), (2, "**/mlp/up_proj"), (5, "o_proj")):
        model = add_lora(model, rank, alpha, targets, rngs=nnx.Rngs(1), rslora=rslora)
    folder = save_lora(randomised(model), tmp_path_factory.mktemp("lora") / "saved")
    assert_same_adapters(adapters(load_lora(small(), folder)), adapters(model))


@pytest.mark.parametrize("targets", ["**/experts/**", "**/experts/gate_proj", "**/experts/{gate,down}_proj", "**/gate"])
def test_adapters_of_experts_are_loaded_with_the_same_product(targets, tmp_path):
    model = randomised(add_lora(small("qwen3_moe"), 3, 8, targets, rngs=nnx.Rngs(1)))
    again = load_lora(small("qwen3_moe"), save_lora(model, tmp_path / "saved"))
    expected = adapters(model)
    for path, (adapter, lora_a, lora_b) in adapters(again).items():
        product = adapter.scaling * lora_b @ lora_a
        if path in expected:
            np.testing.assert_array_equal(product, expected[path][0].scaling * expected[path][2] @ expected[path][1])
        else:  # the other half of `gate_up_proj`
            assert not product.any()


def test_adapters_of_each_expert_of_its_own_are_stacked(tmp_path):
    """As peft wrote them when experts were linear layers."""
    rng, model, tensors = np.random.default_rng(0), small("qwen3_moe"), {}
    for name, out, features in (("gate_proj", 40, 56), ("up_proj", 40, 56), ("down_proj", 56, 40)):
        for expert in range(5):
            module = f"base_model.model.model.layers.1.mlp.experts.{expert}.{name}"
            tensors[f"{module}.lora_A.weight"] = rng.normal(size=(2, features)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.normal(size=(out, 2)).astype(np.float32)
    folder = write(tmp_path, {"r": 2, "lora_alpha": 6}, tensors)
    found = adapters(load_lora(model, folder))
    assert [*found] == [f"layers/1/mlp/experts/{name}_proj" for name in ("down", "gate", "up")]
    adapter, _, lora_b = found["layers/1/mlp/experts/up_proj"]
    assert adapter.scaling == 3
    name = "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight"
    np.testing.assert_array_equal(lora_b[3], tensors[name])
    del tensors[name], tensors[name.replace("lora_B", "lora_A")]
    with pytest.raises(InvalidCheckpoint, match="experts/up_proj: adapters of 4 of 5 experts; expected those of all"):
        load_lora(model, write(tmp_path / "one missing", {"r": 2}, tensors))


def write(folder, fields, tensors=None):
    """An adapter in peft's layout, without perparam."""
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    if tensors is None:
        lora_b = LORA_A.replace("lora_A", "lora_B")
        tensors = {LORA_A: np.ones((2, 56), np.float32), lora_b: np.ones((72, 2), np.float32)}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_are_stored_as_the_policy_says_or_in_the_dtype_of_the_file(tmp_path):
    tensors = {
        LORA_A: np.ones((2, 56), ml_dtypes.bfloat16),
        LORA_A.replace("lora_A", "lora_B"): np.ones((72, 2), ml_dtypes.bfloat16),
    }
    folder = write(tmp_path, {}, tensors)
    assert adapters(load_lora(small(), folder))["layers/0/self_attn/q_proj"][1].dtype == ml_dtypes.bfloat16
    policy = {"params": {"kernel": None, "scale_inv": None, "lora_a?": "f16", "default": None}}
    found = adapters(load_lora(small().with_policy(policy), folder))["layers/0/self_attn/q_proj"]
    assert [array.dtype for array in found[1:]] == [np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True), ("bias", "all"), ("lora_bias", True), ("modules_to_save", ["score"]),
        ("fan_in_fan_out", True), ("init_lora_weights", "pissa"), ("peft_type", "IA3"), ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]), ("use_qalora", True), ("a_field_of_tomorrow", 1), ("init_lora_weights", 1),
    ],
)  # fmt: skip
def test_settings_that_are_not_implemented_are_refused_by_their_field(field, value, tmp_path):
    with pytest.raises(UnsupportedConfig, match=rf"adapter_config\.json: {field}: .* is not supported.*Merge the"):
        load_lora(small(), write(tmp_path, {field: value}))


@pytest.mark.parametrize("key", ["(a+)+b", "a*b*", ".*.*.*.*x", "[q]_proj", "x" * 501])
def test_patterns_that_can_take_long_are_refused(key, tmp_path):
    with pytest.raises(UnsupportedConfig, match=r"rank_pattern: .* is not supported as a pattern\. Write names"):
        load_lora(small(), write(tmp_path, {"rank_pattern": {key: 1}}))


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"r": 0}, "r: expected a positive"), ({"lora_alpha": -1}, "lora_alpha: expected a positive"),
     ({"alpha_pattern": {"q_proj": "1"}}, "q_proj: expected float"), ({"use_rslora": 1}, "use_rslora: expected bool")],
)  # fmt: skip
def test_invalid_settings_are_refused(fields, text, tmp_path):
    with pytest.raises(InvalidCheckpoint, match=text):
        load_lora(small(), write(tmp_path, fields))


def test_a_file_without_a_type_of_adapter_is_refused(tmp_path):
    with pytest.raises(UnsupportedConfig, match="peft_type is missing"):
        load_lora(small(), write(tmp_path, {"peft_type": None}))


def test_tensors_that_do_not_fit_are_reported_together(tmp_path):
    ones = functools.partial(np.ones, dtype=np.float32)
    tensors = {
        LORA_A: ones((3, 56)),
        LORA_A.replace("lora_A", "lora_B"): ones((72, 2)),
        LORA_A.replace("q_proj", "k_proj"): ones((2, 56)),
        LORA_A.replace("self_attn.q_proj", "mlp.experts"): ones((2, 56)),
        LORA_A.replace("self_attn.q_proj.lora_A", "mlp.experts.lora_B"): ones((2, 56)),
        LORA_A.replace("q_proj.lora_A", "v_proj.lora_magnitude_vector"): ones((36,)),
        LORA_A.replace("q_proj", "v_proj"): ones((2,)),
        LORA_A.replace("q_proj", "o_proj"): np.ones((2, 72), np.int32),
    }
    with pytest.raises(InvalidCheckpoint) as error:
        load_lora(small(), write(tmp_path, {}, tensors))
    for text in (
        r"6 problems with its tensors",
        r"q_proj.lora_A.weight: expected the shape (2, 56), found (3, 56)",
        r"missing: base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight",
        r"unexpected: base_model.model.model.layers.0.mlp.experts, of which the model has no linear layer",
        r"unexpected: base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector.weight",
        r"v_proj.lora_A.weight: expected a matrix, found the shape (2,)",
        r"o_proj.lora_A.weight: expected f32, bf16 or f16, found i32",
        r"Load the adapter into the model that it was trained on.",
    ):
        assert text in str(error.value)


def test_a_folder_without_the_files_of_an_adapter_is_an_error(tmp_path):
    with pytest.raises(MissingFile, match=r"adapter_config\.json"):
        load_lora(small(), tmp_path)
    (write(tmp_path, {}) / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"adapter_model\.safetensors"):
        load_lora(small(), tmp_path)


def test_a_layer_with_an_adapter_gets_no_second_one(tmp_path):
    model = load_lora(small(), write(tmp_path, {}))
    with pytest.raises(InvalidAdapter, match=r"layers/0/self_attn/q_proj: the layer has an adapter of rank 2\."):
        load_lora(model, tmp_path)


def test_what_peft_cannot_have_is_not_saved(tmp_path):
    with pytest.raises(InvalidAdapter, match=r"has no adapters\. Add them with add_lora, or use save_model"):
        save_lora(small(), tmp_path / "saved")
    with pytest.raises(UnsupportedExport, match=r"expected a model of perparam.*found Linear"):
        save_lora(perparam.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "saved")
    both = add_lora(add_lora(small(), 2, 4, "q_proj", rngs=nnx.Rngs(0)), 2, 4, "k_proj", rngs=nnx.Rngs(0), rslora=True)
    with pytest.raises(UnsupportedExport, match="one field use_rslora for all adapters, and these have both"):
        save_lora(both, tmp_path / "saved")
    dense = add_lora(small("qwen3_moe"), 2, 4, "layers/0/mlp/*", rngs=nnx.Rngs(0))
    with pytest.raises(UnsupportedExport, match="layers/0/mlp/gate_proj: peft takes an adapter of gate_proj"):
        save_lora(dense, tmp_path / "saved")
    unequal = add_lora(small("qwen3_moe"), 2, 4, "**/experts/gate_proj", rngs=nnx.Rngs(0))
    unequal = add_lora(unequal, 2, 6, "**/experts/up_proj", rngs=nnx.Rngs(0))
    with pytest.raises(UnsupportedExport, match=r"layers/1/mlp/experts: .*with one scaling, and theirs are 2 and 3"):
        save_lora(unequal, tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_only_an_adapter_is_replaced_by_saving(tmp_path):
    model = add_lora(small(), 2, 4, "q_proj", rngs=nnx.Rngs(0))
    save_lora(model, save_lora(model, tmp_path / "saved"))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(SaveFailed, match=r"contains notes\.txt, which saving would delete"):
        save_lora(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_loaded(data, tmp_path_factory):
    """With an error of perparam, whatever the bytes are."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = bytearray((PEFT / "experts" / name).read_bytes())
        # The header of the tensors, of which most bytes decide.
        for place in data.draw(st.lists(st.integers(0, min(len(content), 3000) - 1), max_size=3)):
            content[place] = data.draw(st.sampled_from(b'"{}[],:0129.truefalsnl\\_AB\xff\x00') | st.integers(0, 255))
        (folder / name).write_bytes(content)
    with contextlib.suppress(perparam.PerparamError):
        load_lora(base("qwen3_moe_plain_every_second"), folder)


# peft itself.

TARGETS = {
    "patterns": ("**/self_attn/{q,k,o}_proj", "**/mlp/{up,down}_proj", "lm_head"),
    "rslora": ("**/self_attn/*", "**/mlp/*"),
    "experts": ("**/self_attn/*", "**/experts/*", "**/gate"),
    "one_kernel_of_experts": ("**/experts/down_proj",),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case: (our adapter's model, peft's logits with it, the folder that peft saved it in)}; both directions."""
    top, jobs, models = tmp_path_factory.mktemp("peft"), [], {}
    ids = np.random.default_rng(3).integers(150, size=(2, 11))
    for i, (case, targets) in enumerate(TARGETS.items()):
        model = base(CASES[case])
        for rank, target in enumerate(targets, 2):
            model = add_lora(model, rank, 4 + rank, target, rngs=nnx.Rngs(i), rslora=case == "rslora")
        models[case] = randomised(model, i)
        job = {"base": str(GOLDEN / CASES[case]), "adapter": str(save_lora(models[case], top / f"{case} saved"))}
        job |= {"ids": ids.tolist(), "result": str(top / f"{case}.npz"), "again": str(top / f"{case} again")}
        jobs.append(job)
    python = os.environ.get("PERPARAM_TORCH_PYTHON", sys.executable)
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [python, GOLDEN / "make_peft.py", "--jobs"], input="".join(f"{json.dumps(job)}\n" for job in jobs),
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    return ids, {
        case: (models[case], np.load(job["result"])["logits"], job["again"])
        for case, job in zip(TARGETS, jobs, strict=True)
    }


@pytest.mark.torch
@pytest.mark.parametrize("case", TARGETS)
def test_the_logits_that_peft_computes_with_our_adapter_are_ours(results, case):
    ids, found = results
    model, theirs, _ = found[case]
    error = relative_error(checkpoints.logits(model, ids), theirs)
    without = relative_error(checkpoints.logits(base(CASES[case]), ids), theirs)
    print(f"{case:24}{error:.2e}, without the adapter {without:.2e}")
    assert error <= FLOAT32_ERROR < 1e-2 < without


@pytest.mark.torch
@pytest.mark.parametrize("case", TARGETS)
def test_what_peft_saves_of_our_adapter_is_loaded_with_the_same_logits(results, case):
    ids, found = results
    _, theirs, again = found[case]
    assert relative_error(checkpoints.logits(load_lora(base(CASES[case]), again), ids), theirs) <= FLOAT32_ERROR
