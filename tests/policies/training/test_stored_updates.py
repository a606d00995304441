"""`with_policy` on parameters that are stored in other formats than float32: masters, scaled pairs, and what stays."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import perparam
from perparam import Policy
from perparam.policies import (
    InvalidGradients,
    InvalidScale,
    ScaledArray,
    UnpairedScale,
    UnsupportedCast,
    quantize,
)
from perparam.policies.scaled_array import scaled_array
from perparam.policies.training.optimizer import with_policy
from perparam.policies.training.states import NoUpdate, StoredUpdate
from perparam.policies.trees import Narrow
from perparam.training import StaticLossScale, grad, with_loss_scale

BLOCK = (16, 16)
FP8 = Policy({"kernel": "f8_e4m3fn", "default": "bf16"}, block=BLOCK)
WIDE = {
    "dense": {"bias": jnp.ones(40), "kernel": jax.random.normal(jax.random.key(0), (48, 40))},
    "norm": {"scale": jnp.ones(40)},
}
GRADIENT = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), WIDE)


def step(tx, params, state, gradient, **extra):
    updates, state = jax.jit(tx.update)(gradient, state, params, **extra)
    return optax.apply_updates(params, updates), state


def after(tx, params, gradients):
    state = tx.init(params)
    for gradient in gradients:
        params, state = step(tx, params, state, gradient)
    return params, state


def pair(kernel, scale_inv, block=BLOCK):
    return scaled_array(kernel, scale_inv, block)


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), tree)


def assert_same_bits(tree, other):
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, other)
    chex.assert_trees_all_equal(bits(tree), bits(other))


class TestMasters:
    def test_masters_have_the_bits_of_training_in_float32(self):
        policy = FP8.replace(master="f32")
        stored = policy.store(WIDE)
        params, state = after(with_policy(optax.sgd(0.1, 0.9), policy), stored, [GRADIENT] * 3)
        start = jax.tree.map(lambda x: x.astype("float32"), stored)
        start["dense"] = {"bias": start["dense"]["bias"], "kernel": pair(*_pair_of(stored)).dequantize()}
        expected, _ = after(optax.sgd(0.1, 0.9), start, [GRADIENT] * 3)
        masters = dict(state.master["dense"])
        assert masters.pop("scale_inv") is None
        chex.assert_trees_all_equal(masters, expected["dense"])
        np.testing.assert_array_equal(params["dense"]["bias"], masters["bias"].astype("bfloat16"))
        assert_same_bits(pair(*_pair_of(params)), quantize(masters["kernel"], "f8_e4m3fn", BLOCK))

    def test_what_is_stored_in_the_masters_dtype_or_in_float32_has_none(self):
        params = {"a": jnp.ones(4), "b": jnp.ones(4, "bfloat16"), "c": jnp.ones(4, "float16")}
        master = with_policy(optax.sgd(0.1), Policy(master="bf16")).init(params).master
        assert jax.tree.map(lambda x: x.dtype.name, master) == {"a": None, "b": None, "c": "bfloat16"}
        master = with_policy(optax.sgd(0.1), Policy(master={"b": "f32"})).init(params).master
        assert jax.tree.map(lambda x: x.dtype.name, master) == {"a": None, "b": "float32", "c": None}

    def test_a_step_too_small_for_storage_adds_up_in_the_master(self):
        params = {"w": jnp.ones(8, "bfloat16")}
        gradient = {"w": jnp.ones(8, "bfloat16")}
        stalled, _ = after(with_policy(optax.sgd(1e-3), Policy()), params, [gradient] * 6)
        moved, _ = after(with_policy(optax.sgd(1e-3), Policy(master="f32")), params, [gradient] * 6)
        assert_same_bits(stalled, params)
        np.testing.assert_array_equal(moved["w"], jnp.full(8, 1 - 6e-3).astype("bfloat16"))

    @pytest.mark.slow
    def test_a_master_in_bf16_is_rounded_stochastically_and_its_copy_to_nearest(self):
        policy = FP8.replace(master={"kernel": "bf16"})
        params, state = after(
            with_policy(optax.sgd(1e-3), policy, rounding="stochastic"), policy.store(WIDE), [GRADIENT] * 2
        )
        master = state.master["dense"]["kernel"]
        assert master.dtype == jnp.bfloat16
        assert_same_bits(pair(*_pair_of(params)), quantize(master, "f8_e4m3fn", BLOCK))


def _pair_of(params):
    return params["dense"]["kernel"], params["dense"]["scale_inv"]


class TestWithoutMasters:
    @pytest.mark.parametrize(
        "format",
        ["f8_e4m3fn", pytest.param("int8", marks=pytest.mark.slow), pytest.param("mxfp8", marks=pytest.mark.slow)],
    )
    def test_the_value_after_a_step_is_quantised_again(self, format):
        policy = Policy({"kernel": format}, block=None if format == "mxfp8" else BLOCK)
        stored = policy.store(WIDE, scaled=True)
        before = stored["dense"]["kernel"]
        params, state = after(with_policy(optax.sgd(0.1), policy), stored, [GRADIENT])
        expected = quantize(before.dequantize() - 0.1 * GRADIENT["dense"]["kernel"], before.format)
        # The product and the sum may be one instruction in the compiled step, which rounds once: an ulp of float32
        # before quantisation, which may move a value by one step of the format, and only where it is close to a tie.
        found = params["dense"]["kernel"]
        assert found.format == before.format
        moved = np.asarray(found.dequantize()) != np.asarray(expected.dequantize())
        assert moved.mean() < 0.01
        assert jax.tree.leaves(state.master) == []

    def test_narrow_parameters_have_wide_moments(self):
        stored = FP8.store(WIDE)
        (adam, _) = with_policy(optax.adam(0.1), FP8).init(stored).inner
        for moment in (adam.mu, adam.nu):
            assert {x.dtype.name for x in jax.tree.leaves(moment)} == {"float32"}
            assert moment["dense"]["scale_inv"] is None
            assert moment["dense"]["kernel"].shape == (48, 40)

    def test_containers_agree(self):
        tx = with_policy(optax.adam(0.1), FP8.replace(opt_state={"mu": "bf16"}))
        in_mapping, _ = after(tx, FP8.store(WIDE), [GRADIENT])
        with_none = GRADIENT | {"dense": GRADIENT["dense"] | {"scale_inv": None}}
        assert_same_bits(after(tx, FP8.store(WIDE), [with_none])[0], in_mapping)
        scaled, _ = after(tx, FP8.store(WIDE, scaled=True), [GRADIENT])
        assert_same_bits(tuple(scaled["dense"]["kernel"]), _pair_of(in_mapping))
        linen, _ = after(tx, {"params": FP8.store(WIDE)}, [{"params": GRADIENT}])
        assert_same_bits(linen["params"], in_mapping)
        variables = nnx.State(jax.tree.map(nnx.Param, WIDE))
        state, gradient = FP8.store(variables), nnx.State(GRADIENT)
        pure = nnx.as_pure(state)
        moved, _ = step(tx, pure, tx.init(state), gradient)
        assert_same_bits(nnx.to_pure_dict(moved), in_mapping)

    @pytest.mark.slow
    def test_boxes_are_kept(self):
        def boxed(x):
            return nn.Partitioned(x, names=(None,) * x.ndim)

        tx = with_policy(optax.adam(0.1), FP8)
        expected, _ = after(tx, FP8.store(WIDE), [GRADIENT])
        params, state = after(tx, FP8.store(jax.tree.map(boxed, WIDE)), [jax.tree.map(boxed, GRADIENT)])
        assert isinstance(params["dense"]["kernel"], nn.Partitioned)
        assert_same_bits(nn.meta.unbox(params), expected)
        assert isinstance(state.inner[0].mu["dense"]["kernel"], nn.Partitioned)

    def test_arrays_of_numpy(self):
        params = {"w": np.ones(3, jnp.bfloat16)}
        tx = with_policy(optax.sgd(0.5), Policy())
        updates, _ = tx.update({"w": np.ones(3, np.float32)}, tx.init(params), params)
        np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"], np.full(3, 0.5, jnp.bfloat16))


class TestWhatStays:
    def test_what_is_no_parameter_keeps_its_bits(self):
        params = FP8.store(WIDE) | {
            "count": jnp.int32(3), "mask": jnp.array([True]), "frozen": None,
            "masked": optax.MaskedNode(),
        }  # fmt: skip
        gradient = GRADIENT | {"count": np.zeros((), jax.dtypes.float0), "masked": optax.MaskedNode()}
        moved, _ = after(with_policy(optax.adam(0.1), FP8), params, [gradient])
        assert moved["frozen"] is None
        assert moved["masked"] == optax.MaskedNode()
        for name in ("count", "mask"):
            assert moved[name].dtype == params[name].dtype
            assert (moved[name] == params[name]).all()

    @pytest.mark.parametrize("master", [pytest.param(None, marks=pytest.mark.slow), "f32"])
    def test_a_parameter_without_a_gradient_and_its_state_keep_their_bits(self, master):
        tx = with_policy(optax.adamw(0.1), FP8.replace(master=master, opt_state={"*/**/kernel": "dynamic8"}))
        params, state = after(tx, FP8.store(WIDE), [GRADIENT])
        gradient = GRADIENT | {"dense": {"kernel": None, "bias": GRADIENT["dense"]["bias"]}}
        moved, next_state = step(tx, params, state, gradient)
        assert_same_bits(_pair_of(moved), _pair_of(params))
        for before, now in zip(_state_of_kernel(state), _state_of_kernel(next_state), strict=True):
            assert_same_bits(now, before)
        assert not np.array_equal(moved["dense"]["bias"], params["dense"]["bias"])

    @pytest.mark.parametrize("rounding", ["nearest", pytest.param("stochastic", marks=pytest.mark.slow)])
    def test_an_update_of_zero_keeps_the_bits(self, rounding):
        policy = FP8.replace(master={"norm/scale": "f32"})
        tx = optax.multi_transform({"a": optax.sgd(0.1), "b": optax.set_to_zero()}, {"dense": "b", "norm": "a"})
        # One of these scales is not what quantisation would compute.
        params = FP8.store(WIDE)
        params["dense"]["scale_inv"] = params["dense"]["scale_inv"] * 1.5
        moved, _ = after(with_policy(tx, policy, rounding=rounding), params, [GRADIENT])
        assert_same_bits(moved["dense"], params["dense"])
        assert not np.array_equal(moved["norm"]["scale"], params["norm"]["scale"])


def _state_of_kernel(state):
    adam = state.inner[0]
    return adam.mu["dense"]["kernel"], adam.nu["dense"]["kernel"], state.master["dense"]["kernel"]


class TestStochasticRounding:
    def test_steps_below_the_resolution_add_up_on_average(self):
        size, steps = 4096, 4
        params, gradient = {"w": jnp.ones(size, "bfloat16")}, {"w": jnp.full(size, -1.0)}
        rate = 2.0**-10  # an eighth of the distance from 1 to the next number of bf16, 2**-7
        moved, _ = after(with_policy(optax.sgd(rate), Policy(), rounding="stochastic"), params, [gradient] * steps)
        mean = float(moved["w"].astype("float32").mean()) - 1
        # Each step adds 2**-7 with probability 1/8: variance 7/64 * 2**-14 a step and value.
        deviation = (7 / 64 * steps / size) ** 0.5 * 2**-7
        assert abs(mean - steps * rate) < 6 * deviation
        assert len(np.unique(np.asarray(moved["w"], np.float32))) > 1

    @pytest.mark.slow
    def test_random_numbers_depend_on_seed_step_and_parameter_alone(self):
        tx = with_policy(optax.sgd(1e-3), FP8.replace(opt_state=None), rounding="stochastic", seed=3)
        params, state = after(tx, FP8.store(WIDE), [GRADIENT] * 2)
        once, _ = step(tx, params, state, GRADIENT)
        again, _ = step(tx, params, jax.tree.map(jnp.copy, state), GRADIENT)
        assert_same_bits(once, again)
        later, _ = step(tx, params, state._replace(step=state.step + 1), GRADIENT)
        other, _ = step(with_policy(optax.sgd(1e-3), FP8, rounding="stochastic", seed=4), params, state, GRADIENT)
        for different in (later, other):
            assert not np.array_equal(bits(_pair_of(different)[0]), bits(_pair_of(once)[0]))
        twins = {"a": jnp.ones(64, "bfloat16"), "b": jnp.ones(64, "bfloat16")}
        moved, _ = after(tx, twins, [jax.tree.map(jnp.ones_like, twins)])
        assert not np.array_equal(moved["a"], moved["b"])

    def test_state_in_bf16_does_not_stall(self):
        """To nearest, a mean with weight 1/1000 of what is new stays where half a step of bf16 is more than that."""
        params, gradients = {"w": jnp.zeros(4096)}, [{"w": jnp.ones(4096)}, *[{"w": jnp.full(4096, 1.1)}] * 4]
        values = {}
        for rounding in ("nearest", "stochastic"):
            tx = with_policy(optax.ema(0.999, debias=False), Policy(opt_state="bf16"), rounding=rounding)
            state = tx.init(params)
            state = state._replace(inner=state.inner._replace(ema={"w": jnp.ones(4096, "bfloat16")}))
            for gradient in gradients[1:]:
                _, state = tx.update(gradient, state, params)
            values[rounding] = float(state.inner.ema["w"].astype("float32").mean())
        assert values["nearest"] == 1.0
        expected = 1.1 - 0.1 * 0.999**4
        # Steps of 2**-7 with probability about 0.0128: deviation of a value 2**-7 * sqrt(4 * 0.0128).
        assert abs(values["stochastic"] - expected) < 6 * 2**-7 * (4 * 0.0128 / 4096) ** 0.5


def test_random_numbers_depend_on_the_path_of_the_parameter_not_on_others():
    tx, w = with_policy(optax.sgd(0.003), Policy(), rounding="stochastic"), jnp.ones(4096, "bfloat16")
    both, _ = after(tx, {"a": w, "b": w}, [{"a": w, "b": w}])
    alone, _ = after(tx, {"b": w}, [{"b": w}])
    assert_same_bits(both["b"], alone["b"])
    groups = optax.multi_transform({"one": tx, "two": tx}, {"a": "one", "b": "two"})
    divided, _ = after(groups, {"a": w, "b": w}, [{"a": w, "b": w}])
    assert_same_bits(divided, both)
    assert not np.array_equal(bits(divided["a"]), bits(divided["b"]))


class TestDelayedScales:
    policy = Policy({"kernel": "f8_e4m3fn"}, block=(4, 4))

    def test_the_scale_of_a_step_is_that_of_the_magnitudes_before(self):
        tx = with_policy(optax.sgd(1.0), self.policy, scales="delayed")
        params = self.policy.store({"kernel": jnp.full((4, 4), 7.0)})
        state = tx.init(params)
        np.testing.assert_array_equal(state.amax["kernel"], [[7.0]])
        values, scales = [], []
        for value in (14.0, 3.5):  # twice the magnitude, which is clipped, then half of what is stored
            wide = pair(*params.values(), (4, 4)).dequantize()
            params, state = step(tx, params, state, {"kernel": wide - value})
            values.append(float(pair(*params.values(), (4, 4)).dequantize()[0, 0]))
            scales.append(float(params["scale_inv"][0, 0]))
            np.testing.assert_array_equal(state.amax["kernel"], [[value]])
        assert values == [7.0, 3.5]
        assert scales == [7 / 448, 14 / 448]

    def test_a_step_that_moves_nothing_keeps_the_magnitudes_of_a_clipped_array(self):
        tx = with_policy(optax.sgd(1.0), self.policy, scales="delayed")
        params = self.policy.store({"kernel": jnp.ones((4, 4))})
        params, state = after(tx, params, [{"kernel": jnp.full((4, 4), -3.0)}])
        still, state = step(tx, params, state, {"kernel": jnp.zeros((4, 4))})
        assert_same_bits(still, params)
        np.testing.assert_array_equal(state.amax["kernel"], [[4.0]])  # the stored 1.0 is clipped

    def test_a_block_of_zeros_gets_a_fresh_scale(self):
        tx = with_policy(optax.sgd(1.0), self.policy, scales="delayed")
        params = self.policy.store({"kernel": jnp.zeros((4, 4))})
        params, _ = after(tx, params, [{"kernel": jnp.full((4, 4), -1e-4)}])
        np.testing.assert_allclose(pair(*params.values(), (4, 4)).dequantize(), 1e-4, rtol=1e-6)

    def test_fresh_scales_keep_no_magnitudes(self):
        params = self.policy.store({"kernel": jnp.ones((4, 4))})
        assert jax.tree.leaves(with_policy(optax.sgd(1.0), self.policy).init(params).amax) == []


class TestOthersApplyTheUpdates:
    def test_a_train_state_of_flax(self):
        policy = FP8.replace(master="f32")
        tx = with_policy(optax.adam(0.1), policy)
        train = TrainState.create(apply_fn=None, params=policy.store(WIDE), tx=tx)
        gradient = GRADIENT | {"dense": GRADIENT["dense"] | {"scale_inv": None}}
        train = jax.jit(lambda train: train.apply_gradients(grads=gradient))(train)
        assert_same_bits(train.params, after(tx, policy.store(WIDE), [GRADIENT])[0])

    def test_an_optimizer_of_nnx(self):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.first = nnx.Linear(64, 80, rngs=rngs, param_dtype=jnp.bfloat16)
                self.count = nnx.Param(jnp.zeros(3, jnp.int32))

        tx = with_policy(optax.adam(1e-2), Policy(master="f32", opt_state={"mu": "dynamic8", "default": "bf16"}))
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        gradient = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype) if x.dtype != jnp.int32 else None, params)

        @nnx.jit
        def train_step(model, optimizer):
            optimizer.update(model, nnx.State(jax.tree.map(nnx.Param, gradient)))

        for _ in range(2):
            train_step(model, optimizer)
        expected, state = after(tx, params, [gradient] * 2)
        assert_same_bits(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected)
        found = nnx.as_pure(optimizer.opt_state)
        chex.assert_trees_all_equal(jax.tree.leaves(bits(found)), jax.tree.leaves(bits(state)))
        assert found.inner[0].mu["first"]["kernel"].codes.dtype == jnp.uint8

    @pytest.mark.slow
    def test_an_optimizer_of_nnx_with_narrow_variables(self):
        class Dense(nnx.Module):
            def __init__(self):
                values, scale_inv = quantize(WIDE["dense"]["kernel"], "f8_e4m3fn", BLOCK)
                self.kernel, self.scale_inv = Narrow(values, block=BLOCK), Narrow(scale_inv, block=BLOCK)
                self.bias = nnx.Param(jnp.ones(40, jnp.bfloat16))

        model, policy = Dense(), FP8.replace(master={"kernel": "f32"})
        tx = with_policy(optax.adam(0.1), policy)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Any(nnx.Param, Narrow))
        gradient = nnx.State(jax.tree.map(nnx.Param, GRADIENT["dense"]))
        nnx.jit(lambda model, optimizer: optimizer.update(model, gradient) and None)(model, optimizer)
        params = FP8.store(WIDE)["dense"]
        expected, _ = after(tx, params, [GRADIENT["dense"]])
        assert_same_bits(nnx.to_pure_dict(nnx.state(model)), expected)
        assert isinstance(model.kernel, Narrow)

    def test_accumulation_outside_skips_steps_between(self):
        tx = optax.MultiSteps(with_policy(optax.sgd(0.5), Policy(master="f32")), 2)
        params, seen = {"w": jnp.ones(3, "bfloat16")}, []
        state = tx.init(params)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(4):
                params, state = step(tx, params, state, {"w": jnp.full(3, 0.25, "bfloat16")})
                seen.append(float(params["w"][0]))
        assert seen == [1.0, 0.875, 0.875, 0.75]
        assert int(state.inner_opt_state.step) == 2

    @pytest.mark.slow
    def test_accumulation_inside_of_scaled_pairs(self):
        inner = optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation()
        params, state = after(with_policy(inner, FP8), FP8.store(WIDE), [GRADIENT])
        assert_same_bits(params, FP8.store(WIDE))
        twice, _ = step(with_policy(inner, FP8), params, state, GRADIENT)
        assert not np.array_equal(bits(_pair_of(twice)[0]), bits(_pair_of(params)[0]))

    @pytest.mark.slow
    def test_a_step_that_is_not_finite_is_skipped_inside(self):
        policy = FP8.replace(master={"bias": "f32"}, opt_state={"mu": "bf16", "nu": "f32"})
        tx = with_policy(optax.apply_if_finite(optax.adam(0.1), 5), policy)
        params, state = after(tx, policy.store(WIDE), [GRADIENT])
        gradient = GRADIENT | {"norm": {"scale": jnp.full(40, jnp.inf)}}
        moved, skipped = step(tx, params, state, gradient)
        assert_same_bits(moved, params)
        assert_same_bits((skipped.inner.inner_state, skipped.master), (state.inner.inner_state, state.master))
        assert int(skipped.inner.total_notfinite) == 1

    def test_groups_outside(self):
        tx = optax.multi_transform(
            {"a": with_policy(optax.adam(0.5), Policy(master={"w": "f32", "b": "f32"})), "b": optax.set_to_zero()},
            {"w": "a", "b": "b"},
        )
        params = {"w": jnp.ones(3, "bfloat16"), "b": jnp.ones(3, "bfloat16")}
        moved, _ = step(tx, params, tx.init(params), jax.tree.map(jnp.ones_like, params))
        assert jax.tree.map(lambda x: float(x[0]), moved) == {"w": 0.5, "b": 1.0}

    def test_computing_with_the_updates_is_an_error(self):
        params = {"w": jnp.ones(3, "bfloat16")}
        with jax.numpy_dtype_promotion("standard"):
            tx = optax.chain(with_policy(optax.sgd(0.5), Policy()), optax.scale(0.5))
            updates, _ = tx.update({"w": jnp.ones(3)}, tx.init(params), params)
            with pytest.raises(
                InvalidGradients, match=r"became float32\). Put the transformation inside: with_policy\("
            ):
                optax.apply_updates(params, updates)

    def test_the_two_updates_that_are_no_difference(self):
        x = jnp.array([-0.0, 1.0])
        assert_same_bits(x + NoUpdate(), x)
        assert_same_bits(x + StoredUpdate(jnp.zeros(2), jnp.array(False)), x)
        assert_same_bits(x + StoredUpdate(jnp.ones(2), jnp.array(True)), jnp.ones(2))


class TestErrors:
    tx = with_policy(optax.adam(0.1), FP8)
    params = FP8.store(WIDE)

    def fails(self, gradient, error=InvalidGradients, match="", params=None):
        params = self.params if params is None else params
        with pytest.raises(error, match=match):
            self.tx.update(gradient, self.tx.init(params), params)

    def test_gradients_that_do_not_fit(self):
        dense = GRADIENT["dense"]
        without = {name: x for name, x in dense.items() if name != "kernel"}
        self.fails(GRADIENT | {"dense": without}, match=r"^dense/kernel: no gradient. Pass one for every parameter")
        self.fails(
            GRADIENT | {"more": jnp.ones(2)}, match=r"^more: a gradient of shape \(2,\), but the parameters have no"
        )
        self.fails(
            GRADIENT | {"dense": dense | {"bias": jnp.ones(3)}},
            match=r"^dense/bias: a gradient of shape \(3,\) for a parameter of shape \(40,\)",
        )
        for dtype in ("float8_e5m2", "int32"):
            self.fails(
                GRADIENT | {"dense": dense | {"bias": jnp.ones(40, dtype)}},
                match=rf"^dense/bias: a gradient of dtype {dtype}, expected f32, bf16 or f16. Diff",
            )

    def test_parameters_and_state_that_are_missing(self):
        with pytest.raises(InvalidGradients, match=r"needs the parameters. Call update\(gradients, state, params\)"):
            self.tx.update(GRADIENT, self.tx.init(self.params))
        with pytest.raises(InvalidGradients, match="the state is a tuple, expected a PolicyState"):
            self.tx.update(GRADIENT, optax.adam(0.1).init(WIDE), self.params)

    def test_a_state_that_changes_its_structure(self):
        tx = optax.GradientTransformation(lambda p: {"a": jnp.ones(1)}, lambda u, s, p: (u, {"b": jnp.ones(1)}))
        tx = with_policy(tx, Policy())
        with pytest.raises(InvalidGradients, match=r"changed the structure of the optimizer's state, from .*'a'.*'b'"):
            tx.update(WIDE, tx.init(WIDE), WIDE)

    def test_narrow_parameters_without_scales(self):
        with pytest.raises(UnpairedScale, match=r"^kernel: f8_e4m3fn"):
            self.tx.init({"kernel": jnp.ones((4, 4), "float8_e4m3fn")})

    def test_variables_that_are_no_parameters(self):
        state = nnx.State({"mean": nnx.BatchStat(jnp.ones(2))})
        with pytest.raises(UnsupportedCast, match=r"^mean: a variable of type BatchStat is not a parameter. Pass"):
            self.tx.init(state)

    def test_a_block_that_only_a_variable_knows(self):
        kernel, scale_inv = quantize(jnp.ones((48, 40)), "f8_e4m3fn", (8, 8))
        state = nnx.State({"kernel": Narrow(kernel, block=(8, 8)), "scale_inv": Narrow(scale_inv, block=(8, 8))})
        with pytest.raises(
            InvalidScale, match=r"^kernel: scales of blocks of \(8, 8\), and the policy says \(16, 16\)"
        ):
            self.tx.init(state)

    def test_nothing_hides_what_is_not_finite(self):
        gradient = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), GRADIENT)
        moved, _ = after(self.tx, self.params, [gradient])
        assert np.isnan(moved["dense"]["bias"][0])
        dequantized = pair(*_pair_of(moved)).dequantize()
        assert np.isnan(dequantized[:16, :16]).all()
        assert np.isfinite(dequantized[16:]).all()


def test_a_scaled_array_stays_one():
    params, _ = after(with_policy(optax.sgd(0.1), FP8), FP8.store(WIDE, scaled=True), [GRADIENT])
    assert isinstance(params["dense"]["kernel"], ScaledArray)


@pytest.mark.parametrize("storage", ["f32", {"kernel": "f8_e4m3fn", "default": "bf16"}], ids=str)
def test_a_state_of_variables_is_updated_as_its_mapping_is(storage):
    """The state that `perparam.init` returns; `nnx.Optimizer` passes one with arrays."""
    module, x = functools.partial(nnx.Linear, 8, 4), jnp.ones((2, 8))
    policy = Policy(storage, "f32", "f32", master="f32")
    state = perparam.init(module, policy, jax.random.key(0))
    gradients = grad(lambda state: perparam.apply(module, policy, state, x).sum())
    tx = with_loss_scale(with_policy(optax.adam(0.1), policy), StaticLossScale(1.0))

    @jax.jit
    def after(params, gradient):
        return optax.apply_updates(params, tx.update(gradient, tx.init(params), params)[0])

    gradient = gradients(state)
    moved = after(state, gradient)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    chex.assert_trees_all_equal(nnx.to_pure_dict(moved), after(nnx.to_pure_dict(state), nnx.to_pure_dict(gradient)))
    assert (moved["bias"][...] != state["bias"][...]).all()
