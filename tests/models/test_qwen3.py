"""The whole model: one layer against numpy, positions from masks, windows, injected layers, and what is refused."""

import dataclasses
import functools
from typing import ClassVar

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import F8, fields, relative_error, tensors, write
from flax import nnx

import perparam
from perparam import Policy
from perparam.loaders.families import read_config
from perparam.models import Linear, Qwen3
from perparam.policies.errors import InvalidTokens, ShadowedRule, UnmatchedRule

FLOAT32_ERROR = 1e-5
"""Sums of up to 76 products in another order differ by about sqrt(76) * 2**-24 = 5e-7, and a layer has a dozen."""

ROW = np.array([[3, 14, 15, 9, 26, 5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small"), fields(), tensors(fields()))


@pytest.fixture(scope="module")
def model(folder):
    """FP8 in storage, float32 in compute."""
    return perparam.load_model(folder, Policy(compute="f32"))


@pytest.fixture(scope="module")
def row(model):
    """The logits of ROW alone."""
    return checkpoints.logits(model, ROW)


# Against numpy.


def reference(config, weights, ids):
    """Logits of one unpadded row in float64, kv heads repeated, one head at a time; weights by the published names."""
    eps, head = config["rms_norm_eps"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"]

    def project(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def rotate(x):
        angles = np.arange(len(ids))[:, None] * config["rope_theta"] ** -(np.arange(0, head, 2) / head)
        pairs = (x[:, : head // 2] + 1j * x[:, head // 2 :]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], -1)

    def split(x, count):
        return [x[:, i * head : (i + 1) * head] for i in range(count)]

    x = weights["model.embed_tokens.weight"][ids]
    distance = np.arange(len(ids))[:, None] - np.arange(len(ids))
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        slides = config["use_sliding_window"] and i >= config["max_window_layers"]
        seen = (distance >= 0) & (distance < (config["sliding_window"] if slides else len(ids)))
        y = norm(x, f"{name}.input_layernorm")
        queries = split(project(y, f"{name}.self_attn.q_proj"), heads)
        keys = split(project(y, f"{name}.self_attn.k_proj"), kv_heads)
        values = split(project(y, f"{name}.self_attn.v_proj"), kv_heads)
        mixed = []
        for h, q in enumerate(queries):
            shared = h * kv_heads // heads
            q = rotate(norm(q, f"{name}.self_attn.q_norm"))
            k = rotate(norm(keys[shared], f"{name}.self_attn.k_norm"))
            scores = np.where(seen, q @ k.T / np.sqrt(head), -np.inf)
            likely = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(likely / likely.sum(-1, keepdims=True) @ values[shared])
        x = x + project(np.concatenate(mixed, -1), f"{name}.self_attn.o_proj")
        y = norm(x, f"{name}.post_attention_layernorm")
        gate = project(y, f"{name}.mlp.gate_proj")
        x = x + project(gate / (1 + np.exp(-gate)) * project(y, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
    head_name = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return norm(x, "model.norm") @ weights[f"{head_name}.weight"].T


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.1,
         "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {"num_hidden_layers": 1, "num_key_value_heads": 1},
        {"num_hidden_layers": 1, "num_key_value_heads": 4},
    ],
    ids=["one layer", "bias, tied, one of two layers slides", "one kv head", "as many kv heads"],
)  # fmt: skip
def test_it_is_the_model_numpy_computes(tmp_path, changes):
    config = fields(**changes, quantization_config=None, torch_dtype="float32")
    stored = tensors(config, plain_dtype=np.float32)
    found = checkpoints.logits(perparam.load_model(write(tmp_path, config, stored)), ROW)
    exact = reference(config, {name: array.astype(np.float64) for name, array in stored.items()}, ROW[0])
    assert relative_error(found[0], exact) <= FLOAT32_ERROR


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_queries_and_keys_are_normalised(tmp_path, model, row, folder, name):
    kernel = f"model.layers.0.self_attn.{name[0]}_proj.weight_scale_inv"
    scale = f"model.layers.0.self_attn.{name}.weight"
    stored = checkpoints.read(folder)

    def changed(tensor, factor):
        arrays = stored | {tensor: (stored[tensor].astype(np.float32) * factor).astype(stored[tensor].dtype)}
        edited = perparam.load_model(write(tmp_path / tensor, fields(), arrays), Policy(compute="f32"))
        return relative_error(checkpoints.logits(edited, ROW), row)

    assert changed(kernel, 4.0) <= FLOAT32_ERROR  # epsilon apart, 1e-6 beside squares of about one
    assert changed(scale, 4.0) > 1e-2


# Positions come from masks.

PADDED = np.array([[60, 60, *ROW[0]], [*ROW[0], 60, 60], [3, 14, 60, 15, 9, 60, 26, 5], [7, 1, 2, 8, 3, 4, 5, 6]])
MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 1, 1], [1] * 8])


@pytest.fixture(scope="module")
def padded(model):
    return checkpoints.logits(model, PADDED, MASK)


@pytest.mark.parametrize("side", [0, 1, 2], ids=["left", "right", "within"])
def test_a_padded_row_has_the_logits_of_the_row_alone(padded, row, side):
    assert relative_error(padded[side][MASK[side] == 1], row[0]) <= FLOAT32_ERROR


def test_what_stands_in_the_padding_changes_nothing(model, padded):
    other = checkpoints.logits(model, np.where(MASK == 1, PADDED, 0), MASK)
    np.testing.assert_array_equal(other[MASK == 1], padded[MASK == 1])


def test_padding_outside_the_vocabulary_changes_nothing(model, padded):
    for outside in (-1000, 1000):
        other = checkpoints.logits(model, np.where(MASK == 1, PADDED, outside), MASK)
        np.testing.assert_array_equal(other[MASK == 1], padded[MASK == 1])


def test_a_mask_of_ones_is_no_mask(model, row):
    assert relative_error(checkpoints.logits(model, ROW, np.ones_like(ROW)), row) <= FLOAT32_ERROR


def test_later_tokens_change_no_earlier_logits(model, row):
    changed = checkpoints.logits(model, np.where(np.arange(6) == 5, 44, ROW))
    assert relative_error(changed[:, :5], row[:, :5]) <= FLOAT32_ERROR
    assert relative_error(changed[:, 5], row[:, 5]) > 1e-2


def test_an_id_outside_the_vocabulary_that_is_traced_gives_nan(model):
    assert np.isnan(checkpoints.logits(model, np.where(np.arange(6) == 3, 61, ROW))[0, 3:]).all()


# Sliding windows.


def test_a_sliding_window_is_full_attention_as_far_as_it_reaches(tmp_path, row):
    config = fields(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    sliding = perparam.load_model(write(tmp_path, config, tensors(config)), Policy(compute="f32"))
    found = checkpoints.logits(sliding, ROW)
    assert relative_error(found[:, :4], row[:, :4]) <= FLOAT32_ERROR
    assert all(relative_error(found[:, i], row[:, i]) > 1e-3 for i in (4, 5))


# Structure.


def test_equal_layers_have_equal_graphs(model):
    first, second = (nnx.split(layer)[0] for layer in model.layers)
    assert first == second
    assert hash(first) == hash(second)


def test_layers_stored_alike_can_be_stacked(model):
    graphdef, _ = nnx.split(model.layers[0])
    stacked = jax.tree.map(lambda *x: np.stack(x), *(nnx.split(layer)[1] for layer in model.layers))
    again, second = nnx.merge(graphdef, jax.tree.map(lambda x: x[1], stacked)), model.layers[1]
    assert again.mlp.up_proj.kernel[...].tobytes() == np.asarray(second.mlp.up_proj.kernel[...]).tobytes()


def test_layers_that_differ_in_policy_or_window_differ_in_graph(folder, tmp_path):
    policy = Policy({"layers/0/mlp/up_proj/kernel": "f32"}, "f32")
    first, second = (nnx.split(layer)[0] for layer in perparam.load_model(folder, policy).layers)
    assert first != second
    config = fields(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    first, second = (
        nnx.split(layer)[0] for layer in perparam.load_model(write(tmp_path, config, tensors(config))).layers
    )
    assert first != second


def test_modules_and_parameters_have_the_names_of_the_checkpoint(model, folder):
    stored = checkpoints.read(folder)
    assert {checkpoints.checkpoint_name(path) for path in checkpoints.arrays(model)} == stored.keys()


class Doubled(Linear):
    """A projection of one's own: twice the plain one, with a variable of its own, and a list of its calls."""

    calls: ClassVar[list] = []

    def __init__(self, in_features, out_features, *, use_bias, policy, rngs):
        super().__init__(in_features, out_features, use_bias=use_bias, policy=policy, rngs=rngs)
        self.gain = nnx.Variable(jnp.float32(2))

    def __call__(self, x):
        self.calls.append(x.shape)
        return super().__call__(x) * self.gain[...].astype(x.dtype)


CONFIG = read_config(fields(quantization_config=None))
ONE_LAYER = dataclasses.replace(CONFIG, num_hidden_layers=1)


def shape_of_logits(model):
    graphdef, state = nnx.split(model)
    return jax.eval_shape(lambda state: nnx.merge(graphdef, state)(ROW), state)


def test_an_injected_linear_stands_in_all_projections_and_the_head(monkeypatch):
    monkeypatch.setattr(Doubled, "calls", [])
    model = nnx.eval_shape(lambda: Qwen3(CONFIG, linear=Doubled, rngs=nnx.Rngs(0)))
    linears = {
        "/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)
    }
    projections = {f"self_attn/{name}_proj" for name in "qkvo"} | {
        f"mlp/{name}_proj" for name in ("gate", "up", "down")
    }
    assert linears.keys() == {f"layers/{i}/{name}" for i in range(2) for name in projections} | {"lm_head"}
    assert {type(module) for module in linears.values()} == {Doubled}
    assert shape_of_logits(model).shape == (1, 6, 61)
    assert len(Doubled.calls) == 15


def test_a_tied_head_is_no_linear():
    tied = dataclasses.replace(ONE_LAYER, tie_word_embeddings=True)
    assert nnx.eval_shape(lambda: Qwen3(tied, linear=Doubled, rngs=nnx.Rngs(0))).lm_head is None


def test_an_injected_linear_survives_another_policy():
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Qwen3(ONE_LAYER, policy="f32", linear=Doubled, rngs=nnx.Rngs(0)))
    )
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 2, x.dtype)), state))
    again = model.with_policy("bf16")
    assert type(again.layers[0].mlp.up_proj) is type(again.lm_head) is Doubled
    assert again.lm_head.gain[...] == 2
    assert again.lm_head.kernel[...].dtype == checkpoints.BF16


# Built rather than loaded.


def test_a_model_is_drawn_in_float32_and_stored_as_the_policy_says():
    policy = Policy({"lm_head/kernel": "bf16", "kernel": "f8_e4m3fn", "default": "f32"}, "bf16", block=(16, 24))
    drawn = checkpoints.arrays(nnx.jit(lambda: Qwen3(ONE_LAYER, policy=policy, rngs=nnx.Rngs(0)))())
    for path, array in drawn.items():
        wanted = F8 if path.endswith("_proj/kernel") else checkpoints.BF16 if path == "lm_head/kernel" else np.float32
        assert array.dtype == wanted, path
        assert np.isfinite(np.asarray(array).astype(np.float32)).all()
    # lecun_normal: a variance of one over the inputs, 56, in 76 * 56 draws.
    weight = perparam.dequantize(
        drawn["layers/0/mlp/up_proj/kernel"], drawn["layers/0/mlp/up_proj/scale_inv"], (16, 24)
    )
    assert float(jnp.std(weight)) == pytest.approx(56**-0.5, rel=0.05)


def test_without_a_policy_parameters_are_float32_and_compute_is_the_configs():
    model = nnx.eval_shape(lambda: Qwen3(CONFIG, rngs=nnx.Rngs(0)))
    assert {array.dtype for array in checkpoints.arrays(model).values()} == {np.dtype(np.float32)}
    assert model.activations == checkpoints.BF16
    assert shape_of_logits(model).dtype == checkpoints.BF16


def test_init_and_apply_take_the_model():
    module = functools.partial(Qwen3, ONE_LAYER)
    policy = Policy({"lm_head/kernel": "bf16", "kernel": "f8_e4m3fn", "default": "f32"}, output="f32")
    variables = jax.eval_shape(lambda: perparam.init(module, policy, jax.random.key(0)))
    assert variables["layers"][0]["mlp"]["up_proj"]["kernel"].get_value().dtype == F8
    logits = jax.eval_shape(lambda variables: perparam.apply(module, policy, variables, ROW), variables)
    assert (logits.shape, logits.dtype) == ((1, 6, 61), np.float32)


@pytest.mark.parametrize("slot", ["params", "compute"])
def test_a_rule_that_matches_nothing_is_refused(slot):
    with pytest.raises(UnmatchedRule, match=rf"'layers/\*/mlp/gate/kernel' \({slot}\) matches none"):
        nnx.eval_shape(lambda: Qwen3(CONFIG, policy={slot: {"layers/*/mlp/gate/kernel": "f32"}}, rngs=nnx.Rngs(0)))


def test_a_rule_that_is_shadowed_is_refused():
    policy = {"params": {"kernel": "bf16", "lm_head/kernel": None}}
    with pytest.raises(ShadowedRule, match=r"'lm_head/kernel' \(params\) decides nothing"):
        nnx.eval_shape(lambda: Qwen3(CONFIG, policy=policy, rngs=nnx.Rngs(0)))


# Tokens that are refused.


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        (ROW[0], None, r"input_ids: expected integers of shape \(batch, length\), found int\d+ \(6,\)"),
        (ROW[None], None, "input_ids: expected integers"),
        (ROW.astype(np.float32), None, "input_ids: expected integers .* found float32"),
        (ROW, np.ones((1, 5)), r"attention_mask: expected the shape of input_ids, \(1, 6\), found \(1, 5\)"),
        (ROW, np.ones(6), "attention_mask: expected the shape of input_ids"),
        ([[1, 2], [3]], None, "input_ids: found rows of different length. Pad them"),
        ([[1, 61]], None, r"input_ids\[0, 1\] is 61, outside the vocabulary of 61"),
        ([[1, 2], [-1, 0]], None, r"input_ids\[1, 0\] is -1, outside the vocabulary of 61"),
    ],
    ids=["one row", "three axes", "floats", "short mask", "mask of one row", "ragged", "beyond", "negative"],
)
def test_tokens_that_make_no_sense_are_refused(model, ids, mask, match):
    with pytest.raises(InvalidTokens, match=match):
        model(ids, mask)
