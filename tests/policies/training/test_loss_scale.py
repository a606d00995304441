"""Loss scales: the facts that jmp's own tests have, and that a scale is float32, finite and positive for ever."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perparam.policies import UnsupportedCast
from perparam.policies.errors import InvalidLossScale
from perparam.training import DynamicLossScale, NoOpLossScale, StaticLossScale, all_finite

BY_INVERSE = 141 * 2.0**-23
"""XLA may divide by a constant as a product with its rounded inverse: an ulp for each of up to 140 divisions."""

LARGEST = float(np.finfo(np.float32).max)

# jmp's facts.


def test_no_scale_changes_nothing():
    tree = {"a": jnp.ones([], jnp.float16)}
    assert NoOpLossScale().scale(tree) is tree
    assert NoOpLossScale().unscale(tree) is tree
    assert NoOpLossScale().adjust(jnp.bool_(False)) == NoOpLossScale()
    assert NoOpLossScale().loss_scale == 1


@pytest.mark.parametrize("kind", [StaticLossScale, DynamicLossScale])
@pytest.mark.parametrize("scale", [2, 3, 4.0])
def test_a_tree_is_multiplied_and_divided(kind, scale):
    tree = {"a": jnp.array(1.0), "b": [jnp.array(0.25)]}
    scaled = kind(scale).scale(tree)
    chex.assert_trees_all_equal(scaled, {"a": jnp.array(1.0 * scale), "b": [jnp.array(0.25 * scale)]})
    chex.assert_trees_all_equal(kind(scale).unscale(scaled), tree)


@pytest.mark.parametrize("scale", [NoOpLossScale(), StaticLossScale(3)])
def test_constant_scales_have_no_leaves(scale):
    assert jax.tree.leaves(scale) == []
    assert jax.tree.map(lambda x: x, scale) == scale


def test_a_dynamic_scale_is_a_tree_of_scale_and_counter():
    scale = DynamicLossScale(jnp.ones([]), jnp.zeros([], jnp.int32), 2000, 2)
    assert jax.tree.leaves(scale) == [1, 0]
    assert jax.tree.map(lambda x: x, scale) == scale


@pytest.mark.parametrize(("period", "factor"), [(20, 2), (30, 3)])
def test_it_grows_after_a_period_of_finite_gradients(period, factor):
    scale = DynamicLossScale(10.0, period=period, factor=factor)
    adjust = jax.jit(lambda scale: scale.adjust(True))
    for i in range(1, period):
        scale = adjust(scale)
        assert (scale.loss_scale, scale.counter, scale.period, scale.factor) == (10, i, period, factor)
    scale = adjust(scale)
    assert (scale.loss_scale, scale.counter) == (10 * factor, 0)


@pytest.mark.parametrize(("period", "factor", "least"), [(20, 2, 1), (30, 3, 0.37), (5, 2, 2.0**-126)])
def test_it_shrinks_to_the_minimum(period, factor, least):
    scale = DynamicLossScale(10.0, 3, period, factor, least)
    expected = np.float32(10)
    adjust = jax.jit(lambda scale: scale.adjust(jnp.bool_(False)))
    for _ in range(140):
        scale, expected = adjust(scale), max(expected / np.float32(factor), np.float32(least))
        np.testing.assert_allclose(scale.loss_scale, expected, rtol=BY_INVERSE)
        assert scale.counter == 0
    assert scale.loss_scale == np.float32(least)


# What jmp#47 asks for.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32, np.float64])
def test_the_scale_is_float32_whatever_it_is_made_of(dtype):
    scale = DynamicLossScale(np.asarray(2**15, dtype), period=1).adjust(True).adjust(True)
    assert scale.loss_scale.dtype == np.float32
    assert scale.loss_scale == 2**17  # infinite in float16


def test_growth_stops_before_infinity():
    scale = DynamicLossScale(2.0**126, period=1)
    scales = [scale := scale.adjust(True) for _ in range(4)]
    assert [float(each.loss_scale) for each in scales] == [2.0**127] * 4
    assert [int(each.counter) for each in scales] == [0] * 4


def test_an_unscaled_gradient_that_float16_cannot_hold_is_not_zero():
    gradient = jnp.array([2.0**-24], jnp.float16)  # its smallest positive number
    unscaled = DynamicLossScale(2.0**20).unscale({"w": gradient})["w"]
    assert unscaled.dtype == np.float32
    assert unscaled == 2.0**-44


def test_a_gradient_is_divided_by_the_largest_scale_though_its_inverse_is_subnormal():
    assert jax.jit(StaticLossScale(2.0**127).unscale)(jnp.array([2.0**127])) == 1


def test_leaves_that_are_not_floats_are_unchanged():
    tree = {"i": jnp.arange(3), "key": jax.random.key(0), "none": None, "b": True}
    for change in (StaticLossScale(4).scale, DynamicLossScale(4.0).unscale):
        assert jax.tree.map(lambda x, y: x is y, change(tree), tree) == {
            "i": True,
            "key": True,
            "none": None,
            "b": True,
        }


def test_gradients_of_a_float16_loss_survive_that_would_underflow():
    def loss(w, scale):
        return scale.scale((w * jnp.float16(2.0**-20)).astype(jnp.float32).sum() * 2.0**-10)

    scale = DynamicLossScale(2.0**15)
    w = jnp.ones(2, jnp.float16)
    assert not jax.grad(loss)(w, NoOpLossScale()).any()
    assert (scale.unscale(jax.grad(loss)(w, scale)) == 2.0**-30).all()


# As state of a training step.


def test_it_is_a_carry_of_scan_and_can_be_donated():
    finite = jnp.array([True, False, True, True, True])

    @jax.jit
    def run(scale):
        return jax.lax.scan(lambda scale, ok: (scale.adjust(ok), scale.loss_scale), scale, finite)

    scale, before = run(DynamicLossScale(8.0, period=2))
    assert before.tolist() == [8, 8, 4, 4, 8]
    assert (scale.loss_scale, scale.counter) == (8, 1)
    adjust = jax.jit(lambda scale, ok: scale.adjust(ok), donate_argnums=0)
    mine = jnp.float32(4)
    for _ in range(3):
        scale = adjust(DynamicLossScale(mine), all_finite(mine))  # an array of the caller is not donated
    assert (scale.loss_scale, mine) == (4, 4)


def test_it_can_be_mapped_and_pickled():
    scale = DynamicLossScale(8.0, period=7)
    both = jax.vmap(lambda ok: scale.adjust(ok))(jnp.array([True, False]))
    assert both.loss_scale.tolist() == [8, 4]
    again = pickle.loads(pickle.dumps(scale))
    assert (again.loss_scale, again.counter, again.period) == (8, 0, 7)


# Errors.


@pytest.mark.parametrize("value", [jnp.ones(1, bool), jnp.ones([]), 1])
def test_adjust_takes_a_boolean_scalar(value):
    with pytest.raises(UnsupportedCast, match=r"grads_finite: expected a boolean scalar, found .*jnp.all"):
        DynamicLossScale().adjust(value)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), 1e39, 1e-50, "x", None, np.ones(2)])
@pytest.mark.parametrize("kind", [StaticLossScale, DynamicLossScale])
def test_a_scale_that_is_not_positive_and_finite_is_an_error(kind, scale):
    with pytest.raises(InvalidLossScale, match=r"loss_scale: expected a positive number .*, found .* Write 2.0\*\*15"):
        kind(scale)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"period": 0}, "period: expected a number of steps, found 0. Write 1 or more"),
        ({"period": 2.5}, "period: expected a number of steps, found 2.5"),
        ({"factor": 1}, "factor: expected a number above 1, found 1. Write 2"),
        ({"factor": float("inf")}, "factor: expected a number above 1, found inf"),
        ({"min_loss_scale": 0}, "min_loss_scale: expected a positive number .*, found 0"),
        ({"loss_scale": 2.0, "min_loss_scale": 4.0}, "loss_scale is 2.0, less than min_loss_scale, 4.0. Lower"),
    ],
)
def test_fields_out_of_range_are_errors(fields, message):
    with pytest.raises(InvalidLossScale, match=message):
        DynamicLossScale(**fields)


def test_the_largest_float32_is_a_scale():
    assert float(StaticLossScale(LARGEST).scale(jnp.float32(1))) == LARGEST
