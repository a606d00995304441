"""`init` and `apply` for NNX modules: those that know nothing of perparam, and those that take `policy=`."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import bits, dtype, reference_dequantize, reference_quantize

from perparam import Policy, apply, get_policy, init, scaled_matmul
from perparam.models import Linear
from perparam.policies import InvalidPolicy, Narrow, Scope, UnmatchedRule, UnpairedScale, UnsupportedCast

TWO_LINES = {"params": {"kernel": "f8_e4m3fn"}, "output": "f32"}

QUANTISATION = 3 * 2.0**-5
"""Relative error of an output after three layers of e4m3 kernels.  Rounding to three bits is off by at most 2**-4 of a
weight, and by half of that in the root mean square; errors of layers add up at worst."""

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float32)


class Net(nnx.Module):
    """What people build: dense, batch norm, attention, dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 24, rngs=rngs)
        self.norm = nnx.BatchNorm(24, rngs=rngs, use_running_average=True)
        self.attention = nnx.MultiHeadAttention(2, 24, decode=False, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.down = nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.norm(self.up(x), use_running_average=not train)
        return self.down(self.drop(self.attention(x), deterministic=not train))

    def doubled(self, x):
        return 2.0 * self(x)


class Small(nnx.Module):
    """Where the module does not matter: compiling is what takes the time."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs, use_running_average=True)

    def __call__(self, x):
        return self.norm(self.up(x))


class Probe(nnx.Module):
    """Returns the dtypes in which its parameters arrive."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jnp.ones((8, 5)))
        self.bias = nnx.Param(jnp.ones(5))
        self.scale = nnx.Param(jnp.ones(8))
        self.mean = nnx.BatchStat(jnp.ones(8))
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return {"x": x.dtype.name} | {
            name: getattr(self, name).dtype.name for name in ("kernel", "bias", "scale", "mean", "count")
        }


def dequantised(state, block=(128, 128), kind=Net):
    """A plain model with the weights of `state`, made plain by numpy."""
    graphdef, abstract = nnx.split(kind(nnx.Rngs(0)))
    found = dict(nnx.to_flat_state(state))
    leaves = []
    for keys, leaf in nnx.to_flat_state(abstract):
        value = found[keys][...]
        if scales := found.get((*keys[:-1], "scale_inv") if keys[-1] == "kernel" else ()):
            value = jnp.asarray(reference_dequantize(value, scales[...], block, np.float32))
        leaves.append((keys, leaf.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


class TestInit:
    def test_it_stores_what_the_module_draws_in_f32(self):
        drawn, stored = Net(nnx.Rngs(KEY)), init(Net, TWO_LINES, KEY)
        kernel, scale_inv = reference_quantize(drawn.up.kernel[...], "float8_e4m3fn", (128, 128))
        assert bits(stored["up"]["kernel"][...]) == bits(kernel)
        assert bits(stored["up"]["scale_inv"][...]) == bits(scale_inv)
        assert bits(stored["up"]["bias"][...]) == bits(drawn.up.bias[...])

    def test_pairs_are_no_params(self):
        stored = init(Net, TWO_LINES | {"block": (4, 8)}, KEY)
        query = stored["attention"]["query"]
        assert {name: type(leaf) for name, leaf in query.items()} == {
            "kernel": Narrow,
            "scale_inv": Narrow,
            "bias": nnx.Param,
        }
        assert query["kernel"].get_metadata()["block"] == (4, 8)
        assert query["scale_inv"].shape == (24, 1, 2)

    @pytest.mark.parametrize("module", [Net, functools.partial(Net), lambda rngs: Net(rngs)])
    def test_a_class_a_partial_and_a_lambda_are_modules(self, module):
        chex.assert_trees_all_equal(init(module, None, 3)["up"], nnx.state(Net(nnx.Rngs(3)))["up"])

    def test_keys_by_stream_reach_the_module(self):
        state = init(Net, None, {"params": 1, "dropout": 2})
        chex.assert_trees_all_equal(state["up"], nnx.state(Net(nnx.Rngs(params=1, dropout=2)))["up"])

    def test_every_parameter_has_its_own_dtype(self):
        policy = {"params": {"up/kernel": "f16", "**/query/*": None, "kernel": "bf16", "bias": "f16", "default": "f32"}}
        state = init(Net, policy, KEY)
        assert state["up"]["kernel"].dtype == state["down"]["bias"].dtype == jnp.float16
        assert state["down"]["kernel"].dtype == state["attention"]["key"]["kernel"].dtype == jnp.bfloat16
        assert state["attention"]["query"]["kernel"].dtype == state["norm"]["scale"].dtype == jnp.float32

    @pytest.mark.parametrize("params", ["bf16", {"default": "bf16"}])
    def test_a_default_and_a_uniform_dtype_reach_params_and_nothing_else(self, params):
        leaves = dict(nnx.to_flat_state(init(Net, {"params": params}, KEY)))
        assert {leaf.dtype.name for leaf in leaves.values() if isinstance(leaf, nnx.Param)} == {"bfloat16"}
        assert {leaf.dtype.name for leaf in leaves.values() if isinstance(leaf, nnx.BatchStat)} == {"float32"}


class TestForward:
    @pytest.mark.parametrize("block", [None, (4, 8)])
    def test_a_two_line_policy_runs_the_module_on_the_dequantised_weights(self, block):
        policy = TWO_LINES | {"block": block}
        state = init(Net, policy, KEY)
        chex.assert_trees_all_equal(apply(Net, policy, state, X), dequantised(state, block or (128, 128))(X))

    def test_a_block_is_kept_by_the_variables(self):
        state = init(Net, TWO_LINES | {"block": (4, 8)}, KEY)
        chex.assert_trees_all_equal(apply(Net, {"output": "f32"}, state, X), dequantised(state, (4, 8))(X))

    def test_it_stays_within_quantisation_error_of_the_f32_module(self):
        y, exact = apply(Net, TWO_LINES, init(Net, TWO_LINES, KEY), X), Net(nnx.Rngs(KEY))(X)
        error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
        assert 0 < error < QUANTISATION

    @pytest.mark.parametrize("output", ["f32", "bf16"])
    @pytest.mark.parametrize("compute", [None, "bf16"])
    def test_the_output_has_exactly_the_policys_dtype(self, output, compute):
        policy = {"params": {"kernel": "f8_e4m3fn"}, "compute": compute, "output": output}
        with jax.numpy_dtype_promotion("standard"):
            assert apply(Small, policy, init(Small, policy, KEY), X).dtype == get_policy(policy).output

    def test_every_parameter_arrives_in_its_compute_dtype(self):
        policy = {"params": {"kernel": "f8_e4m3fn"}, "compute": {"kernel": "f16", "bias": None, "default": "bf16"}}
        assert apply(Probe, policy, init(Probe, policy, KEY), X) == {
            "x": "bfloat16",
            "kernel": "float16",
            "bias": "float32",
            "scale": "bfloat16",
            "mean": "float32",
            "count": "int32",
        }

    @pytest.mark.parametrize("wide", ["float32", "bfloat16", "float16"])
    def test_without_a_compute_default_kernels_are_dequantised_to_the_inputs_dtype(self, wide):
        seen = apply(Probe, TWO_LINES, init(Probe, TWO_LINES, KEY), X.astype(dtype(wide)))
        assert (seen["x"], seen["kernel"], seen["bias"]) == (wide, wide, "float32")

    @pytest.mark.parametrize("name", ["bf16", pytest.param("f32", marks=pytest.mark.slow)])
    def test_uniform_policies_are_plain_flax_with_casts(self, name):
        wide = dtype({"f32": "float32", "bf16": "bfloat16"}[name])
        model = Net(nnx.Rngs(KEY))
        nnx.update(model, jax.tree.map(lambda x: x.astype(wide), nnx.state(model, nnx.Param)))
        with jax.numpy_dtype_promotion("standard"):
            y, expected = apply(Net, name, init(Net, name, KEY), X), model(X.astype(wide)).astype(wide)
        assert bits(y) == bits(expected)

    def test_parameters_in_f32_computed_in_bf16(self):
        policy = Policy.parse("p=f32,c=bf16,o=f32")
        model = Net(nnx.Rngs(KEY))
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
        with jax.numpy_dtype_promotion("standard"):
            expected = model(X.astype(ml_dtypes.bfloat16)).astype(jnp.float32)
            assert bits(apply(Net, policy, init(Net, policy, KEY), X)) == bits(expected)

    def test_a_method_by_name_and_as_a_function(self):
        state = init(Net, TWO_LINES, KEY)
        twice = 2.0 * apply(Net, TWO_LINES, state, X)
        for method in ("doubled", Net.doubled):
            chex.assert_trees_all_equal(apply(Net, TWO_LINES, state, X, method=method), twice)

    def test_applying_changes_no_variable_it_was_given(self):
        state = init(Net, TWO_LINES, KEY)
        before = [bits(leaf) for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Not(nnx.RngState)))]
        apply(Net, TWO_LINES, state, X, train=True, mutable=True)
        assert [bits(leaf) for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Not(nnx.RngState)))] == before


class TestDropout:
    def run(self, state, module=Net, **rngs):
        return apply(module, TWO_LINES, state, X, train=True, rngs=rngs or None)

    @pytest.mark.parametrize("keys", [0, {"params": 0, "dropout": 1}])
    def test_it_follows_the_key_of_its_stream(self, keys):
        state = init(Net, TWO_LINES, keys)
        first, again, other = (self.run(state, dropout=jax.random.key(seed)) for seed in (1, 1, 2))
        chex.assert_trees_all_equal(first, again)
        assert (first != other).any()

    def test_it_follows_the_default_stream(self):
        state = init(Net, TWO_LINES, KEY)
        first, again, other = (self.run(state, default=jax.random.key(seed)) for seed in (1, 1, 2))
        chex.assert_trees_all_equal(first, again)
        assert (first != other).any()

    def test_a_stream_the_module_does_not_have_is_refused(self):
        state = init(Net, TWO_LINES, {"params": 0, "dropout": 1})
        with pytest.raises(UnsupportedCast, match=r"rngs: the module has no stream 'noise', only dropout"):
            self.run(state, noise=jax.random.key(0))

    def test_without_keys_it_goes_on_with_what_init_stored(self):
        first, other = (self.run(init(Net, TWO_LINES, {"params": 0, "dropout": seed})) for seed in (1, 2))
        assert (first != other).any()


class TestMutable:
    policy = Policy(params={"kernel": "f8_e4m3fn", "default": "bf16"}, compute="f32")

    def test_updates_are_flaxs(self):
        state = init(Net, self.policy, KEY)
        y, updates = apply(Net, self.policy, state, X, train=True, mutable=nnx.BatchStat)
        model = dequantised(state)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model, nnx.Param)))
        chex.assert_trees_all_equal(y, model(X, train=True))
        assert [keys for keys, _ in nnx.to_flat_state(updates)] == [("norm", "mean"), ("norm", "var")]
        chex.assert_trees_all_equal(updates, nnx.state(model, nnx.BatchStat))
        assert (np.asarray(updates["norm"]["mean"][...]) != 0).any()

    def test_all_updates_hold_no_parameter(self):
        _, updates = apply(Net, self.policy, init(Net, self.policy, KEY), X, train=True, mutable=True)
        kinds = {type(leaf) for _, leaf in nnx.to_flat_state(updates)}
        assert nnx.BatchStat in kinds
        assert not any(issubclass(kind, (nnx.Param, Narrow)) for kind in kinds)

    def test_updates_merge_into_the_variables(self):
        state = init(Net, self.policy, KEY)
        _, updates = apply(Net, self.policy, state, X, train=True, mutable=nnx.BatchStat)
        merged = nnx.merge_state(state, updates)
        chex.assert_trees_all_equal_structs(merged, state)
        assert (apply(Net, self.policy, merged, X) != apply(Net, self.policy, state, X)).any()


class TestTransformations(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_with_and_without_jit(self):
        state = init(Net, TWO_LINES, KEY)
        y = self.variant(lambda state, x: apply(Net, TWO_LINES, state, x))(state, X)
        # One program or many: sums may be taken in another order.
        chex.assert_trees_all_close(y, dequantised(state)(X), rtol=1e-5, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_gradient_of_params_passes_pairs_by(self):
        state = init(Small, TWO_LINES, KEY)
        params, rest = nnx.split_state(state, nnx.Param, ...)

        def loss(params):
            return jnp.sum(apply(Small, TWO_LINES, nnx.merge_state(params, rest), X) ** 2)

        gradient = self.variant(jax.grad(loss))(params)
        plain = nnx.grad(lambda model: jnp.sum(model(X) ** 2))(dequantised(state, kind=Small))
        assert set(gradient["up"]) == {"bias"}
        # Sums in another order.
        chex.assert_trees_all_close(gradient["up"]["bias"][...], plain["up"]["bias"][...], rtol=1e-4, atol=1e-5)
        assert np.abs(gradient["up"]["bias"][...]).max() > 0


class Reading(nnx.Module):
    """A module that takes the policy, as a Policy or a Scope, and hands it down."""

    def __init__(self, *, policy, rngs: nnx.Rngs):
        self.inner = Linear(8, 5, use_bias=True, policy=policy.at("inner"), rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


class TestModulesThatTakeThePolicy:
    policy = Policy(
        params={"kernel": "f8_e4m3fn"}, compute={"kernel": "f8_e4m3fn", "default": "bf16"}, output="f32", block=(4, 4)
    )

    @pytest.mark.parametrize(
        "module", [functools.partial(Linear, 8, 5), lambda policy, rngs: Linear(8, 5, policy=policy, rngs=rngs)]
    )
    def test_they_get_it_and_keep_their_kernels_narrow(self, module):
        state = init(module, self.policy, KEY)
        kernel, scale_inv = state["kernel"], state["scale_inv"]
        assert (type(kernel), kernel.dtype, kernel.get_metadata()["block"]) == (Narrow, jnp.float8_e4m3fn, (4, 4))
        x = X.astype(ml_dtypes.bfloat16)
        expected = scaled_matmul(x, kernel[...], scale_inv[...], block=(4, 4), compute="f8_e4m3fn").astype(jnp.float32)
        assert bits(apply(module, self.policy, state, X)) == bits(expected)

    def test_updates_hold_no_pair(self):
        module = functools.partial(Linear, 8, 5)
        _, updates = apply(module, self.policy, init(module, self.policy, KEY), X, mutable=True)
        assert jax.tree.leaves(updates) == []

    def test_they_hand_it_down(self):
        policy = Policy(params={"inner/kernel": "f8_e4m3fn", "inner/bias": "bf16"}, compute={"inner/kernel": "f32"})
        state = init(Reading, policy, KEY)
        assert state["inner"]["kernel"].dtype == jnp.float8_e4m3fn
        assert state["inner"]["bias"].dtype == jnp.bfloat16
        weight = reference_dequantize(
            state["inner"]["kernel"][...], state["inner"]["scale_inv"][...], (128, 128), np.float32
        )
        # Sums of eight products in float32, in another order.
        np.testing.assert_allclose(apply(Reading, policy, state, X), X @ weight.T, rtol=1e-5, atol=1e-6)

    def test_variables_stored_otherwise_are_computed_as_the_policy_says(self):
        """`apply` never re-stores: kernels kept plain run under a policy that would store them narrow."""
        module = functools.partial(Linear, 8, 5)
        state = init(module, {"params": "f32"}, KEY)
        y = apply(module, {"params": {"kernel": "f8_e4m3fn"}, "compute": "f32"}, state, X)
        assert bits(y) == bits(scaled_matmul(X, state["kernel"][...], compute="f32"))

    def test_every_rule_is_held_to_meet_a_parameter(self):
        module = functools.partial(Linear, 8, 5)
        with pytest.raises(UnmatchedRule, match=r"'kernal' \(params\)"):
            init(module, {"params": {"kernal": "bf16"}}, KEY)
        with pytest.raises(UnmatchedRule, match=r"'kernal' \(compute\)"):
            init(module, {"compute": {"kernal": "bf16"}}, KEY)
        with pytest.raises(UnmatchedRule, match=r"'kernal' \(compute\)"):
            apply(module, {"compute": {"kernal": "bf16"}}, init(module, None, KEY), X)

    def test_a_narrow_bias_is_refused(self):
        with pytest.raises(InvalidPolicy, match=r"'bias' \(params\) asks f8_e4m3fn of 'bias', whose shape is \(5,\)"):
            init(functools.partial(Linear, 8, 5, use_bias=True), {"params": {"bias": "f8_e4m3fn"}}, KEY)

    def test_they_are_given_a_policy_or_a_scope(self):
        given = []

        def module(policy, rngs):
            given.append(type(policy))
            return Linear(8, 5, policy=policy, rngs=rngs)

        apply(module, self.policy, init(module, self.policy, KEY), X)
        assert set(given) == {Policy, Scope}  # init gives the policy, apply also how things are stored


class TestErrors:
    def test_a_narrow_compute_dtype_is_refused_with_the_remedy(self):
        conv = functools.partial(nnx.Conv, 8, 5, (3,))
        with pytest.raises(
            UnsupportedCast,
            match=r"^kernel: computing in f8_e4m3fn .*quantises its activations, and Conv .*Write bf16 or null",
        ):
            apply(conv, {"compute": {"kernel": "f8_e4m3fn", "default": "bf16"}}, init(conv, None, KEY), X)

    def test_variables_of_another_module_are_refused(self):
        state = init(Net, None, KEY)
        del state["up"]["bias"]
        with pytest.raises(
            UnsupportedCast,
            match=r"not those of the module: missing \['up/bias'\], unexpected \[\]. Pass the variables that init",
        ):
            apply(Net, None, state, X)

    def test_variables_that_lost_a_scale_are_refused(self):
        state = init(Net, TWO_LINES, KEY)
        del state["up"]["scale_inv"]
        with pytest.raises(UnpairedScale, match="up/kernel: f8_e4m3fn"):
            apply(Net, TWO_LINES, state, X)
