"""`init` and `apply` for Linen modules that know nothing of perparam."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import bits, dtype, reference_dequantize, reference_quantize

from perparam import Policy, apply, get_policy, init
from perparam.policies import ShadowedRule, UnmatchedRule, UnpairedScale, UnsupportedCast
from perparam.training import combine, partition

TWO_LINES = {"params": {"kernel": "f8_e4m3fn"}, "output": "f32"}

QUANTISATION = 3 * 2.0**-5
"""Relative error of an output after three layers of e4m3 kernels.  Rounding to three bits is off by at most 2**-4 of a
weight, and by half of that in the root mean square; errors of layers add up at worst."""

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float32)


class Net(nn.Module):
    """What people build: dense, batch norm, attention, dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(24, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(5, name="down")(x)

    def doubled(self, x):
        return 2.0 * self(x)


class Small(nn.Module):
    """Where the module does not matter: compiling is what takes the time."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(5, name="up")(x))


class Probe(nn.Module):
    """Returns the dtypes in which its parameters arrive."""

    @nn.compact
    def __call__(self, x):
        shapes = {"kernel": (8, 5), "bias": (5,), "scale": (8,)}
        seen = {name: self.param(name, nn.initializers.ones, shape).dtype.name for name, shape in shapes.items()}
        return seen | {"x": x.dtype.name}


@functools.cache
def f32_variables():
    return Net().init(KEY, X)


def dequantised(variables, block=(128, 128)):
    """The variables with every pair made plain, by numpy."""

    def visit(node):
        if not isinstance(node, dict):
            return node
        node = {name: visit(child) for name, child in node.items()}
        if "scale_inv" in node:
            node["kernel"] = reference_dequantize(node["kernel"], node.pop("scale_inv"), block, np.float32)
        return node

    return visit(variables)


def dtypes(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.dtype.name
        for path, x in jax.tree.leaves_with_path(tree)
    }


class TestInit:
    def test_it_stores_what_the_module_draws_in_f32(self):
        drawn, stored = f32_variables()["params"], init(Net(), TWO_LINES, KEY, X)["params"]
        for layer in ("up", "down"):
            kernel, scale_inv = reference_quantize(drawn[layer]["kernel"], "float8_e4m3fn", (128, 128))
            assert bits(stored[layer]["kernel"]) == bits(kernel)
            assert bits(stored[layer]["scale_inv"]) == bits(scale_inv)
            assert bits(stored[layer]["bias"]) == bits(drawn[layer]["bias"])

    def test_kernels_of_any_rank_have_blocks_over_their_last_two_axes(self):
        stored = init(Net(), TWO_LINES | {"block": (4, 8)}, KEY, X)["params"]["attention"]["query"]
        assert (stored["kernel"].shape, stored["kernel"].dtype) == ((24, 2, 12), jnp.float8_e4m3fn)
        assert stored["scale_inv"].shape == (24, 1, 2)
        assert (stored["bias"].shape, stored["bias"].dtype) == ((2, 12), np.float32)

    def test_every_parameter_has_its_own_dtype(self):
        policy = {"params": {"up/kernel": "f16", "**/query/*": None, "kernel": "bf16", "bias": "f16", "default": "f32"}}
        found = dtypes(init(Net(), policy, KEY, X))
        assert found["params/up/kernel"] == "float16"
        assert found["params/down/kernel"] == "bfloat16"
        assert found["params/down/bias"] == "float16"
        assert found["params/attention/query/kernel"] == "float32"
        assert found["params/attention/key/kernel"] == "bfloat16"
        assert found["params/norm/scale"] == "float32"

    @pytest.mark.parametrize("params", ["bf16", {"default": "bf16"}])
    def test_a_default_and_a_uniform_dtype_reach_every_parameter_and_nothing_else(self, params):
        found = dtypes(init(Net(), {"params": params}, KEY, X))
        assert {name for path, name in found.items() if path.startswith("params/")} == {"bfloat16"}
        assert {name for path, name in found.items() if path.startswith("batch_stats/")} == {"float32"}

    def test_no_policy_is_the_module_itself(self):
        chex.assert_trees_all_equal(init(Net(), None, KEY, X), f32_variables())

    def test_keys_by_stream_and_keywords_reach_the_module(self):
        keys = {"params": KEY, "dropout": jax.random.key(1)}
        chex.assert_trees_all_equal(init(Net(), None, keys, X, train=True), Net().init(keys, X, train=True))

    def test_under_jit(self):
        stored = jax.jit(lambda key: init(Small(), TWO_LINES, key, X))(KEY)
        assert bits(stored["params"]["up"]["kernel"]) == bits(
            init(Small(), TWO_LINES, KEY, X)["params"]["up"]["kernel"]
        )


class TestForward:
    @pytest.mark.parametrize("block", [None, (4, 8)])
    def test_a_two_line_policy_runs_the_module_on_the_dequantised_weights(self, block):
        policy = TWO_LINES | {"block": block}
        variables = init(Net(), policy, KEY, X)
        y = apply(Net(), policy, variables, X)
        chex.assert_trees_all_equal(y, Net().apply(dequantised(variables, block or (128, 128)), X))

    @pytest.mark.parametrize("narrow", ["f8_e4m3fn", "int8"])
    def test_it_stays_within_quantisation_error_of_the_f32_module(self, narrow):
        policy = {"params": {"kernel": narrow}}
        y, exact = apply(Net(), policy, init(Net(), policy, KEY, X), X), Net().apply(f32_variables(), X)
        error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
        assert 0 < error < QUANTISATION

    @pytest.mark.parametrize("output", ["f32", "bf16", "f16"])
    @pytest.mark.parametrize("compute", [None, "bf16"])
    def test_the_output_has_exactly_the_policys_dtype(self, output, compute):
        policy = {"params": {"kernel": "f8_e4m3fn"}, "compute": compute, "output": output}
        with jax.numpy_dtype_promotion("standard"):
            assert apply(Small(), policy, init(Small(), policy, KEY, X), X).dtype == get_policy(policy).output

    @pytest.mark.parametrize("wide", ["float32", "bfloat16", "float16"])
    def test_without_a_compute_default_kernels_are_dequantised_to_the_inputs_dtype(self, wide):
        seen = apply(Probe(), TWO_LINES, init(Probe(), TWO_LINES, KEY, X), X.astype(dtype(wide)))
        assert seen == {"kernel": wide, "bias": "float32", "scale": "float32", "x": wide}

    def test_every_parameter_arrives_in_its_compute_dtype(self):
        policy = {"params": {"kernel": "f8_e4m3fn"}, "compute": {"kernel": "f16", "bias": None, "default": "bf16"}}
        seen = apply(Probe(), policy, init(Probe(), policy, KEY, X), X)
        assert seen == {"kernel": "float16", "bias": "float32", "scale": "bfloat16", "x": "bfloat16"}

    def test_null_for_a_narrow_kernel_means_the_compute_default(self):
        policy = get_policy("fp8_weight_only")
        seen = apply(Probe(), policy, init(Probe(), policy, KEY, X), X)
        assert seen == {"kernel": "bfloat16", "bias": "bfloat16", "scale": "bfloat16", "x": "bfloat16"}

    @pytest.mark.parametrize("name", ["bf16", pytest.param("f32", marks=pytest.mark.slow)])
    def test_uniform_policies_are_plain_flax_with_casts(self, name):
        wide = dtype({"f32": "float32", "bf16": "bfloat16"}[name])
        variables = init(Net(), name, KEY, X)
        by_hand = f32_variables()
        by_hand = by_hand | {"params": jax.tree.map(lambda x: x.astype(wide), by_hand["params"])}
        chex.assert_trees_all_equal(variables, by_hand)
        with jax.numpy_dtype_promotion("standard"):
            y, expected = apply(Net(), name, variables, X), Net().apply(by_hand, X.astype(wide)).astype(wide)
        assert bits(y) == bits(expected)

    def test_parameters_in_f32_computed_in_bf16(self):
        policy = Policy.parse("p=f32,c=bf16,o=f32")
        variables = init(Net(), policy, KEY, X)
        chex.assert_trees_all_equal(variables, f32_variables())
        by_hand = variables | {"params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])}
        with jax.numpy_dtype_promotion("standard"):
            expected = Net().apply(by_hand, X.astype(ml_dtypes.bfloat16)).astype(jnp.float32)
            assert bits(apply(Net(), policy, variables, X)) == bits(expected)

    def test_integer_inputs_stay_integers(self):
        module, ids = nn.Embed(7, 4), np.array([[0, 6, 3]])
        policy = {"params": {"embedding": "f8_e4m3fn"}, "compute": "bf16", "output": "f32", "block": (2, 2)}
        variables = init(module, policy, KEY, ids)
        table = variables["params"]
        assert {name: x.dtype.name for name, x in table.items()} == {
            "embedding": "float8_e4m3fn",
            "embedding_scale_inv": "float32",
        }
        wide = reference_dequantize(table["embedding"], table["embedding_scale_inv"], (2, 2), np.float32)
        expected = wide.astype(ml_dtypes.bfloat16).astype(np.float32)[ids]
        assert bits(apply(module, policy, variables, ids)) == bits(expected)

    def test_a_method_by_name_and_as_a_function(self):
        variables = init(Net(), TWO_LINES, KEY, X)
        twice = 2.0 * apply(Net(), TWO_LINES, variables, X)
        for method in ("doubled", Net.doubled):
            chex.assert_trees_all_equal(apply(Net(), TWO_LINES, variables, X, method=method), twice)

    def test_dropout_follows_its_key(self):
        variables = init(Net(), TWO_LINES, KEY, X)
        rngs = [{"dropout": jax.random.key(seed)} for seed in (1, 1, 2)]
        ys = [apply(Net(), TWO_LINES, variables, X, rngs=r, train=True, mutable=["batch_stats"])[0] for r in rngs]
        expected, _ = Net().apply(dequantised(variables), X, train=True, rngs=rngs[0], mutable=["batch_stats"])
        chex.assert_trees_all_equal(ys[0], ys[1], expected)
        assert (ys[0] != ys[2]).any()

    def test_an_overflowing_output_stays_visible(self):
        policy = {"output": "f16"}
        y = apply(
            nn.Dense(1),
            policy,
            {"params": {"kernel": jnp.full((1, 1), 1e6), "bias": jnp.zeros(1)}},
            np.ones((1, 1), "f4"),
        )
        assert np.isinf(y).all()


class TestMutable:
    policy = Policy(params={"kernel": "f8_e4m3fn", "default": "bf16"}, compute="f32")

    @pytest.mark.parametrize("mutable", [["batch_stats"], "batch_stats", True, ["params", "batch_stats"]])
    def test_updates_are_flaxs_and_params_stay_as_stored(self, mutable):
        variables = init(Net(), self.policy, KEY, X)
        rngs = {"dropout": jax.random.key(1)}
        y, updates = apply(Net(), self.policy, variables, X, train=True, rngs=rngs, mutable=mutable)
        plain = dequantised(variables)
        plain = plain | {"params": jax.tree.map(lambda x: np.asarray(x).astype(np.float32), plain["params"])}
        expected_y, expected = Net().apply(plain, X, train=True, rngs=rngs, mutable=["batch_stats"])
        chex.assert_trees_all_equal(y, expected_y)
        chex.assert_trees_all_equal(updates["batch_stats"], expected["batch_stats"])
        assert (np.asarray(updates["batch_stats"]["norm"]["mean"]) != 0).any()
        if "params" in updates:
            chex.assert_trees_all_equal_structs(updates["params"], variables["params"])
            same = jax.tree.map(lambda new, old: new is old, updates["params"], variables["params"])
            assert all(jax.tree.leaves(same))

    def test_not_mutable_returns_the_result_alone(self):
        assert isinstance(apply(Net(), None, f32_variables(), X), jax.Array)

    def test_a_module_without_parameters_keeps_its_state_uncast(self):
        module = nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False)
        variables = init(module, "bf16", KEY, X)
        assert dtypes(variables) == {"batch_stats/mean": "float32", "batch_stats/var": "float32"}
        with jax.numpy_dtype_promotion("standard"):
            assert apply(module, "bf16", variables, X).dtype == jnp.bfloat16

    def test_other_collections_are_carried_uncast(self):
        seen = {}

        class Counter(nn.Module):
            @nn.compact
            def __call__(self, x):
                mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(3))
                count = self.variable("state", "count", lambda: jnp.zeros((), jnp.int32))
                seen.update(mean=mean.value.dtype.name, count=count.value.dtype.name)
                count.value += 1
                return x * self.param("scale", nn.initializers.ones, (3,))

        policy, x = get_policy("bf16"), np.ones((1, 3), np.float32)
        variables = init(Counter(), policy, KEY, x)
        assert dtypes(variables) == {"batch_stats/mean": "float32", "params/scale": "bfloat16", "state/count": "int32"}
        y, updates = apply(Counter(), policy, variables, x, mutable=["state"])
        assert seen == {"mean": "float32", "count": "int32"}
        assert updates["state"]["count"] == variables["state"]["count"] + 1
        assert y.dtype == jnp.bfloat16


class TestTransformations(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_with_and_without_jit(self):
        variables = init(Net(), TWO_LINES, KEY, X)
        y = self.variant(lambda variables, x: apply(Net(), TWO_LINES, variables, x))(variables, X)
        # One program or many: sums may be taken in another order.
        chex.assert_trees_all_close(y, Net().apply(dequantised(variables), X), rtol=1e-5, atol=1e-5)

    def test_the_policy_may_be_a_static_argument(self):
        variables = init(Small(), TWO_LINES, KEY, X)
        run = jax.jit(lambda policy, variables, x: apply(Small(), policy, variables, x), static_argnums=0)
        assert run(get_policy(TWO_LINES), variables, X).dtype == np.float32

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_gradient_of_what_is_trainable(self):
        variables = init(Small(), TWO_LINES, KEY, X)
        trainable, frozen = partition(variables)

        def loss(trainable, run):
            return jnp.sum(run(combine(trainable, frozen)) ** 2)

        gradient = self.variant(jax.grad(lambda t: loss(t, lambda v: apply(Small(), TWO_LINES, v, X))))(trainable)
        expected = jax.grad(lambda t: loss(t, lambda v: Small().apply(dequantised(v), X)))(trainable)
        chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-5)  # sums in another order
        assert gradient["params"]["up"]["kernel"] is None
        assert np.abs(gradient["params"]["up"]["bias"]).max() > 0

    def test_the_gradient_through_a_compute_cast_is_in_the_stored_dtype(self):
        policy = Policy.parse("p=f32,c=bf16,o=f32")
        module, x = nn.Dense(2), np.ones((1, 3), np.float32)
        gradient = jax.grad(lambda v: apply(module, policy, v, x).sum())(init(module, policy, KEY, x))
        assert dtypes(gradient) == {"params/bias": "float32", "params/kernel": "float32"}
        assert gradient["params"]["kernel"].tolist() == [[1.0, 1.0]] * 3


class TestErrors:
    @pytest.mark.parametrize("stored", [None, {"kernel": "f8_e4m3fn"}])
    def test_a_narrow_compute_dtype_is_refused_with_the_remedy(self, stored):
        policy = {"params": stored, "compute": {"kernel": "f8_e4m3fn", "default": "bf16"}}
        module = nn.Sequential([nn.Conv(2, (3,)), nn.Dense(2)])
        with pytest.raises(UnsupportedCast) as caught:
            apply(module, policy, init(module, {"params": stored}, KEY, X), X)
        message = str(caught.value)
        assert "layers_0/kernel: computing in f8_e4m3fn needs a layer that quantises its activations, and " in message
        assert "and Conv multiplies wide arrays. nnx.Linear, nnx.LinearGeneral, nn.Dense and nn.DenseGeneral" in message
        assert "do so by policy. Write bf16 or null in compute, or use perparam.models.Linear or perparam.sc" in message

    def test_a_rule_that_decides_nothing_is_refused_by_both(self):
        with pytest.raises(UnmatchedRule, match="'up/kernal'"):
            init(Net(), {"params": {"up/kernal": "bf16"}}, KEY, X)
        with pytest.raises(ShadowedRule, match="'up/kernel'"):
            init(Net(), {"params": {"kernel": "bf16", "up/kernel": "f32"}}, KEY, X)
        with pytest.raises(ShadowedRule, match="'up/kernel'"):
            apply(Net(), {"compute": {"kernel": "bf16", "up/kernel": "f32"}}, f32_variables(), X)

    def test_variables_that_lost_a_scale_are_refused(self):
        variables = init(Net(), TWO_LINES, KEY, X)
        del variables["params"]["up"]["scale_inv"]
        with pytest.raises(UnpairedScale, match=r"up/kernel: f8_e4m3fn \(8, 24\) without its scales 'up/scale_inv'"):
            apply(Net(), TWO_LINES, variables, X)
