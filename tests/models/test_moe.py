"""A mixture of experts: routing, the sum over a token's experts, and the policies of its parameters."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FAMILIES, fields, relative_error
from flax import nnx

import perparam
from perparam.loaders import read_config
from perparam.models import Qwen3Moe, moe
from perparam.models.experts import weighted_sum
from perparam.models.moe import SparseMLP
from perparam.policies.errors import InvalidCheckpoint, UnsupportedConfig
from perparam.policies.matmul import grouped_loop, matmul_override
from perparam.policies.native import library
from perparam.policies.trees import parameters

HIDDEN, WIDTH, EXPERTS = 40, 24, 6
EXPERT = "layers/1/mlp/experts/up_proj"

SUMS_ERROR = 1e-6
"""Sums of up to 40 float32 products in another order, three products deep: sqrt(3 * 40) * 2**-24 = 7e-7."""


def config(**changes):
    return read_config(fields(**FAMILIES["qwen3_moe"] | {"quantization_config": None} | changes))


@functools.cache
def model(policy="f32"):
    return Qwen3Moe(config(), policy=policy, rngs=nnx.Rngs(0))


def mixture(norm_topk_prob=True, per_token=2, policy=None):
    settings = {"per_token": per_token, "norm_topk_prob": norm_topk_prob}
    scope = perparam.get_policy(policy).at()
    return SparseMLP(experts=EXPERTS, hidden=HIDDEN, width=WIDTH, policy=scope, rngs=nnx.Rngs(0), **settings)


def tokens(*leading, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*leading, HIDDEN)), jnp.float32)


def reference(layer, x):
    """The mixture in float64, token by token."""
    kernels = {path: np.asarray(array, np.float64) for path, array in parameters(layer).items()}
    gate, up, down = (kernels[f"experts/{name}_proj/kernel"] for name in ("gate", "up", "down"))
    results = []
    for token in np.asarray(x, np.float64).reshape(-1, HIDDEN):
        logits = kernels["gate/kernel"] @ token
        probabilities = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-probabilities)[: layer.per_token]
        weights = probabilities[best] / (probabilities[best].sum() if layer.norm_topk_prob else 1)
        total = np.zeros(HIDDEN)
        for expert, weight in zip(best, weights, strict=True):
            gated = gate[expert] @ token
            total += weight * (down[expert] @ (gated / (1 + np.exp(-gated)) * (up[expert] @ token)))
        results.append(total)
    return np.reshape(results, x.shape)


@pytest.mark.parametrize(
    ("shape", "norm_topk_prob", "per_token"), [((2, 7), True, 2), ((1, 1), False, 3), ((1, 64), True, EXPERTS)], ids=str
)
def test_a_token_is_the_weighted_sum_of_its_experts(shape, norm_topk_prob, per_token):
    layer, x = mixture(norm_topk_prob, per_token), tokens(*shape)
    found = layer(x)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert relative_error(found, reference(layer, x)) <= SUMS_ERROR


def test_weights_are_computed_in_float32_and_rounded_once():
    layer = mixture(policy="bf16")
    x = jnp.asarray(tokens(64), jnp.bfloat16)
    logits = layer.gate(x)
    weights, experts = layer.route(x)
    assert weights.dtype == logits.dtype == jnp.bfloat16
    wide = np.exp(np.asarray(logits, np.float32))
    best = np.argsort(-wide, axis=-1, kind="stable")[:, :2]
    np.testing.assert_array_equal(experts, best)
    chosen = np.take_along_axis(wide, best, axis=-1)
    exact = chosen / chosen.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(weights, np.float32), exact, rtol=2**-8)


@pytest.mark.slow
def test_decoding_a_token_reads_the_kernels_of_its_experts_alone(monkeypatch):
    products = []
    product = grouped_loop.scaled_matmuls

    def count(x, kernels, **settings):
        jax.debug.callback(lambda: products.append((x.shape[0], len(kernels))))
        return product(x, kernels, **settings)

    monkeypatch.setattr(grouped_loop, "scaled_matmuls", count)
    jax.clear_caches()
    layer = mixture()
    with matmul_override("oracle"):  # in the loop; test_grouped_native.py has the native library
        layer(tokens(1, 1)).block_until_ready()
    jax.effects_barrier()
    # gate_proj and up_proj together, then down_proj
    assert sorted(products) == [(1, 1)] * 2 + [(1, 2)] * 2
    jax.clear_caches()


def test_the_weighted_sum_has_the_bits_and_gradients_of_a_gather_and_a_sum():
    random = np.random.default_rng(0)
    order = jnp.asarray(random.permutation(15), jnp.int32)
    weights = jnp.asarray(random.uniform(size=(5, 3)), jnp.float32)
    results, along = (jnp.asarray(random.normal(size=(rows, 8)), jnp.float32) for rows in (15, 5))

    def plainly(results, weights):
        return (results[jnp.argsort(order)].reshape(5, 3, 8) * weights[..., None]).sum(axis=1)

    found, back = jax.vjp(lambda *operands: weighted_sum(operands[0], order, operands[1]), results, weights)
    want, back_plainly = jax.vjp(plainly, results, weights)
    np.testing.assert_array_equal(found, want)
    for gradient, other in zip(back(along), back_plainly(along), strict=True):
        np.testing.assert_allclose(gradient, other, rtol=0, atol=SUMS_ERROR)


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences_and_reach_the_experts_in_use():
    layer, x = mixture(), tokens(1, 3)
    graph, state = nnx.split(layer)
    along = jax.tree.map(lambda array: jnp.asarray(np.random.default_rng(1).normal(size=array.shape), "f4"), state)

    @jax.jit
    def loss(state):
        return (nnx.merge(graph, state)(x) * tokens(1, 3, seed=2)).sum()

    step = 2.0**-10
    forward, back = (loss(jax.tree.map(lambda a, b, by=by: a + by * b, state, along)) for by in (step, -step))
    gradients = jax.grad(loss)(state)
    found = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), gradients, along)))
    # The third derivative times step**2 / 6, and rounding of the loss, 2**-22 of it, over the step.
    np.testing.assert_allclose(found, (forward - back) / (2 * step), rtol=2e-3)
    used = np.isin(np.arange(EXPERTS), layer.route(x.reshape(-1, HIDDEN))[1])
    assert 0 < used.sum() < EXPERTS
    of_experts = np.abs(np.asarray(parameters(gradients)["experts/down_proj/kernel"])).max(axis=(1, 2))
    np.testing.assert_array_equal(of_experts > 0, used)


class TestPolicies:
    @pytest.mark.parametrize("target", ["cpu", "cuda:8.0", "tpu"])
    def test_a_plan_has_the_matmul_of_experts(self, target, monkeypatch):
        plan = functools.partial(perparam.get_policy("fp8_weight_only").explain, model(), target=target)

        def experts():
            rows = [row for row in plan() if row.path == f"{EXPERT}/kernel"]
            return [(row.matmul, row.matmul_refused) for row in rows]

        if target == "cpu":
            if library.unavailable() is None:
                assert experts() == [("native", None)]
            monkeypatch.setattr(library, "unavailable", lambda: "it is not here")
            assert experts() == [("loop of slabs", "not native: it is not here")]
        else:
            one = {"cuda:8.0": "fused reduction | widen, then dot", "tpu": "fused reduction | widen, then dot"}[target]
            want = " | ".join(f"loop of {name}" for name in one.split(" | "))
            assert experts() == [(want, f"no implementation is made for {target}")]

    def test_a_pattern_addresses_experts_and_presets_leave_the_router(self):
        stored = perparam.policies.describe(model("fp8_weight_only"))
        dtypes = {path: info.dtype.name for path, info in stored.items()}
        assert dtypes[f"{EXPERT}/kernel"] == "float8_e4m3fn"
        assert dtypes["layers/1/mlp/gate/kernel"] == "float32"
        assert dtypes["layers/0/mlp/up_proj/kernel"] == "float8_e4m3fn"
        assert stored[f"{EXPERT}/scale_inv"].shape == (5, 1, 1)
        policy = perparam.Policy({"layers/*/mlp/experts/**/kernel": {"dtype": "int8", "block": [1, -1]}})
        changed = perparam.policies.describe(model().with_policy(policy))
        narrow = {path for path, info in changed.items() if info.dtype == np.int8}
        assert narrow == {f"layers/1/mlp/experts/{name}_proj/kernel" for name in ("gate", "up", "down")}

    def test_a_rule_can_name_the_router(self):
        named = model().with_policy({"params": {"**/gate/kernel": "f8_e4m3fn"}})
        assert parameters(named)["layers/1/mlp/gate/kernel"].dtype == jnp.float8_e4m3fn

    @pytest.mark.slow
    @pytest.mark.parametrize("preset", ["fp8_weight_only", "fp8_dynamic"])
    def test_quantised_experts_compute_what_their_weights_do(self, preset):
        ids = np.arange(12)[None]
        narrow = model().with_policy(perparam.Policy({**_params(preset), "default": "f32"}, _compute(preset), "f32"))
        wide = narrow.with_policy("f32")
        bound = {"fp8_weight_only": 2e-6, "fp8_dynamic": 0.1}[preset]  # activations are rounded to four bits
        assert relative_error(narrow(ids), wide(ids)) <= bound

    def test_the_plan_has_a_line_for_each_kernel_of_all_experts(self):
        text = perparam.get_policy("fp8_weight_only").explain(model()).to_text()
        lines = [line for line in text.splitlines() if "/experts/" in line and "kernel" in line]
        assert len(lines) == 3
        assert "5×40×56" in next(line for line in lines if line.startswith(f"{EXPERT}/kernel"))
        assert "5 experts of 40 in 1 layer" in repr(model())


def _params(preset):
    return dict.fromkeys(("layers/*/mlp/experts/**/kernel", "**/mlp/{gate,up,down}_proj/kernel"), "f8_e4m3fn")


def _compute(preset):
    return _params(preset) if preset == "fp8_dynamic" else {"default": "f32"}


def test_layers_are_dense_or_sparse_as_the_config_says():
    def sparse(**changes):
        one = config(num_hidden_layers=6, max_window_layers=6, **changes)
        return [i for i in range(6) if one.experts(i)]

    assert sparse(mlp_only_layers=[]) == [0, 1, 2, 3, 4, 5]
    assert sparse(mlp_only_layers=[0, 4]) == [1, 2, 3, 5]
    assert sparse(mlp_only_layers=[], decoder_sparse_step=2) == [1, 3, 5]
    assert sparse(mlp_only_layers=[3], decoder_sparse_step=2) == [1, 5]
    kinds = [type(layer.mlp) for layer in model().layers]
    assert kinds == [perparam.models.transformer.MLP, moe.SparseMLP]


def test_sizes_that_do_not_fit_are_refused():
    for changes, text in (
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, more than num_experts, 5"),
        ({"num_experts": 0}, "num_experts must be positive, found 0"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be positive"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be positive"),
    ):
        with pytest.raises(UnsupportedConfig, match=f"Qwen3MoeConfig: {text}"):
            dataclasses.replace(config(), **changes)


def test_a_config_is_read_and_refused_by_field(tmp_path):
    def read(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields(**FAMILIES["qwen3_moe"] | changes)))
        return read_config(path)

    assert read(num_experts=None, num_local_experts=7).num_experts == 7  # as transformers 5 writes it
    assert not read(norm_topk_prob=None).norm_topk_prob
    assert read(mlp_only_layers=None).mlp_only_layers == ()
    of_coder = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    assert read(**of_coder) == read()
    for changes, text in (
        ({"num_local_experts": 7}, "num_experts is 5, num_local_experts 7"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than num_experts, 5"),
        ({"num_experts": 2**20}, "num_experts: expected at most 131072 in all layers, found 1048576"),
        ({"mlp_only_layers": ["0"]}, r"mlp_only_layers: expected numbers of layers, found \['0'\]"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not implemented"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8"),
    ):
        with pytest.raises((UnsupportedConfig, InvalidCheckpoint), match=text):
            read(**changes)
