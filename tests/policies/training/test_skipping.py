"""`with_loss_scale`: plain optax for finite gradients, and for others a step that changes no bit."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perparam import Policy, quantize
from perparam.policies import UnsupportedCast
from perparam.training import DynamicLossScale, NoOpLossScale, StaticLossScale, with_loss_scale, with_policy


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats and integers
        yield


PARAMS = {"w": jnp.array([1.5, -0.0, 0.0, -3.25, 1e-30]), "b": [jnp.array([-0.0, 2.0])]}
GRADS = {"w": jnp.array([0.1, -2.0, 3.0, 0.5, 1.0]), "b": [jnp.array([1.0, -1.0])]}
BAD = [
    {"w": GRADS["w"].at[2].set(jnp.nan), "b": GRADS["b"]},
    {"w": GRADS["w"], "b": [jnp.array([-jnp.inf, 1.0])]},
]
CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 10)))


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}"), tree)


def step(tx, jit=jax.jit):
    @jit
    def run(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return run


@pytest.mark.parametrize(
    "scale",
    [
        DynamicLossScale(1024.0, period=2),
        pytest.param(NoOpLossScale(), marks=pytest.mark.thorough),
        pytest.param(StaticLossScale(1024.0), marks=pytest.mark.thorough),
    ],
)
def test_finite_steps_are_those_of_plain_optax(scale):
    tx = with_loss_scale(CHAIN, scale)
    params, state = PARAMS, tx.init(PARAMS)
    plain, plain_state = PARAMS, CHAIN.init(PARAMS)
    for _ in range(3):  # not compiled: XLA contracts products and sums of one program in other ways than of another
        params, state = step(tx, lambda f: f)(params, state, state.loss_scale.scale(GRADS))
        plain, plain_state = step(CHAIN, lambda f: f)(plain, plain_state, GRADS)
    chex.assert_trees_all_equal(bits(params), bits(plain))
    chex.assert_trees_all_equal(bits(state.inner_state), bits(plain_state))
    assert state.last_finite
    assert state.total_notfinite == 0


@pytest.mark.parametrize("gradients", BAD, ids=["nan", "infinity"])
def test_a_step_that_is_not_finite_changes_no_bit_of_parameters_and_inner_state(gradients):
    tx = with_loss_scale(CHAIN, DynamicLossScale(64.0))
    params, before = step(tx)(PARAMS, tx.init(PARAMS), GRADS)
    params = {"w": PARAMS["w"], "b": params["b"]}  # -0.0 included
    after, state = step(tx)(params, before, gradients)
    chex.assert_trees_all_equal(bits(after), bits(params))
    chex.assert_trees_all_equal(bits(state.inner_state), bits(before.inner_state))
    assert (state.loss_scale.loss_scale, state.last_finite, state.total_notfinite) == (32, False, 1)
    _, state = step(tx)(after, state, GRADS)
    assert (state.loss_scale.counter, state.last_finite, state.total_notfinite) == (1, True, 1)


def test_an_overflow_of_float16_gradients_shrinks_the_scale_until_it_fits():
    def loss(w, scale):
        return scale.scale((w.astype(jnp.float16) * jnp.float16(8)).astype(jnp.float32).sum())

    tx = with_loss_scale(optax.sgd(0.125), DynamicLossScale(2.0**17))
    w, state, applied = jnp.zeros(2), tx.init(jnp.zeros(2)), []
    for _ in range(6):
        w, state = step(tx)(w, state, jax.grad(loss)(w, state.loss_scale))
        applied.append(bool(state.last_finite))
    # 8 * 2**13 is 2**16, one more than float16 has.
    assert applied == [False] * 5 + [True]
    assert w.tolist() == [-1, -1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rounded:
    """An update that no delta can say, as `with_policy` returns for narrow parameters."""

    step: Any

    def __radd__(self, parameter):
        return (parameter.astype(jnp.float32) + self.step).astype(parameter.dtype)


def test_updates_that_return_the_new_parameter_are_applied_or_skipped():
    inner = optax.stateless(lambda updates, params: jax.tree.map(lambda g: Rounded(-g), updates))
    tx = with_loss_scale(inner, DynamicLossScale(2.0))
    params = {"k": jnp.array([1.0, -0.0, 448, jnp.nan], jnp.float8_e4m3fn)}
    good = {"k": jnp.array([2.0, 0, -2, 0])}
    after, state = step(tx)(params, tx.init(params), good)
    assert after["k"].dtype == params["k"].dtype
    assert after["k"].astype(jnp.float32)[:3].tolist() == [0, 0, 448]
    after, _ = step(tx)(params, state, {"k": good["k"].at[0].set(jnp.nan)})
    chex.assert_trees_all_equal(bits(after), bits(params))


@pytest.mark.parametrize("rounding", ["nearest", pytest.param("stochastic", marks=pytest.mark.thorough)])
def test_a_skipped_step_keeps_every_bit_of_scaled_pairs_masters_and_the_step_count(rounding):
    kernel = quantize(jnp.arange(-8.0, 8).reshape(2, 8) / 3, "f8_e4m3fn", (2, 4))
    params = {
        "dense": {"kernel": kernel.values, "scale_inv": kernel.scale_inv, "bias": jnp.array([-0.0, 1], "bfloat16")}
    }
    policy = Policy(
        {"kernel": "f8_e4m3fn", "default": "bf16"},
        master="f32",
        opt_state={"mu": "bf16", "default": "f32"},
        block=(2, 4),
    )
    tx = with_loss_scale(with_policy(optax.adamw(0.1), policy, rounding=rounding), DynamicLossScale(64.0))
    gradients = {"dense": {"kernel": jnp.full((2, 8), 64.0), "scale_inv": None, "bias": jnp.array([-64.0, 64])}}
    params, before = step(tx)(params, tx.init(params), gradients)
    bad = {"dense": gradients["dense"] | {"kernel": gradients["dense"]["kernel"].at[1, 3].set(jnp.inf)}}
    after, state = step(tx)(params, before, bad)
    chex.assert_trees_all_equal(bits(after), bits(params))
    chex.assert_trees_all_equal(bits(state.inner_state), bits(before.inner_state))
    assert (state.loss_scale.loss_scale, state.last_finite, state.total_notfinite) == (32, False, 1)
    moved, state = step(tx)(after, state, gradients)
    for changed in (
        moved["dense"]["kernel"] != after["dense"]["kernel"],
        moved["dense"]["bias"] != after["dense"]["bias"],
    ):
        assert changed.any()
    counts = [int(optax.tree_utils.tree_get(each.inner_state, "step")) for each in (before, state)]
    assert counts == [1, 2]


def test_updates_are_added_to_arrays_of_numpy():
    inner = optax.stateless(lambda updates, params: jax.tree.map(lambda g: Rounded(-g), updates))
    tx = with_loss_scale(inner, DynamicLossScale(2.0))
    params = {"k": np.ones(2, "float32")}
    updates, _ = tx.update({"k": jnp.full(2, 0.5)}, tx.init(params), params)
    assert optax.apply_updates(params, updates)["k"].tolist() == [0.75, 0.75]


def test_the_state_is_the_same_tree_after_every_step_and_can_be_donated():
    tx = with_loss_scale(CHAIN, DynamicLossScale(8.0))
    update = jax.jit(tx.update, donate_argnums=1)
    for _ in range(2):  # each `init` has arrays of its own
        state = tx.init(PARAMS)
        shapes = jax.eval_shape(tx.init, PARAMS)
        for gradients in (GRADS, BAD[0], GRADS):
            _, state = update(gradients, state, PARAMS)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)


def test_it_is_a_carry_of_scan():
    tx = with_loss_scale(optax.sgd(1.0), DynamicLossScale(4.0))

    def body(carry, gradient):
        w, state = carry
        updates, state = tx.update(gradient, state, w)
        return (optax.apply_updates(w, updates), state), state.loss_scale.loss_scale

    gradients = jnp.array([4.0, jnp.nan, 4.0])
    (w, state), scales = jax.jit(lambda w: jax.lax.scan(body, (w, tx.init(w)), gradients))(jnp.float32(0))
    assert (w, state.total_notfinite, scales.tolist()) == (-3, 1, [4, 2, 2])


def test_optax_finds_the_scale_in_the_state():
    state = with_loss_scale(CHAIN, DynamicLossScale(8.0)).init(PARAMS)
    assert optax.tree_utils.tree_get(state, "loss_scale").loss_scale == 8


def test_arguments_of_the_inner_update_are_passed_on():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: g * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = with_loss_scale(inner, StaticLossScale(2.0))
    assert tx.update(jnp.float32(4), tx.init(jnp.float32(0)), value=3)[0] == 6


def test_an_inner_state_that_would_change_its_dtype_is_an_error():
    tx = with_loss_scale(optax.adam(0.1), StaticLossScale(2.0))
    params = {"h": jnp.ones(2, jnp.bfloat16)}
    with pytest.raises(
        UnsupportedCast, match=r"mu/h \(optimizer state\) changes from bf16 to f32: .*with_policy first"
    ):
        tx.update(params, tx.init(params), params)
