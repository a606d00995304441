"""`accumulate`: the mean of microbatches is that of the batch, summed in float32, with less memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perparam.policies import UnsupportedCast
from perparam.training import accumulate

REORDERED = 24 * 2.0**-24
"""Relative: sums of 24 positive terms in another order."""


def loss(w, batch, scale=1.0):
    """The mean over the real rows."""
    losses = ((batch["x"] @ w["a"] + w["b"]) ** 2).sum(axis=-1) * scale
    return (losses * batch["real"]).sum() / jnp.maximum(batch["real"].sum(), 1)


def real(batch, **_):
    return batch["real"].sum()


W = {"a": jnp.linspace(0.1, 1, 6).reshape(3, 2), "b": jnp.array([0.5, 0.25])}
BATCH = {"x": jnp.linspace(0, 2, 36).reshape(12, 3), "real": (jnp.arange(12) % 5 < 2).astype(jnp.float32)}
STEP = jax.value_and_grad(loss)


@pytest.mark.parametrize("steps", [3, pytest.param(1, marks=pytest.mark.thorough)])
def test_weighted_by_real_rows_it_is_the_whole_batch(steps):
    found = jax.jit(accumulate(STEP, steps, weight=real))(W, BATCH)
    chex.assert_trees_all_close(found, STEP(W, BATCH), rtol=REORDERED)


def test_without_weights_it_is_the_mean_of_the_means():
    found, _ = accumulate(STEP, 4)(W, BATCH)
    parts = [loss(W, jax.tree.map(lambda x, i=i: x[i::4], BATCH)) for i in range(4)]
    np.testing.assert_allclose(found, sum(parts) / 4, rtol=REORDERED)
    assert abs(found - loss(W, BATCH)) > 100 * REORDERED


def test_a_batch_of_no_real_rows_is_zero():
    value, gradients = accumulate(STEP, 2, weight=real)(W, BATCH | {"real": jnp.zeros(12)})
    assert value == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_numbers_and_keywords_go_to_every_microbatch():
    def times(w, batch, factor, *, scale):
        return loss(w, batch, scale) * factor

    step = accumulate(jax.value_and_grad(times), 3, weight=lambda batch, factor, scale: real(batch))
    chex.assert_trees_all_close(step(W, BATCH, 2.0, scale=2.0), jax.value_and_grad(loss)(W, BATCH, 4.0), rtol=REORDERED)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_typed_key_is_split_and_keys_of_rows_are_divided(steps):
    def drawn(w, key, keys):
        return w, (jax.random.normal(key), jax.random.key_data(keys))

    key, keys = jax.random.key(0), jax.random.split(jax.random.key(1), 6)
    (_, (noise, divided)), _ = accumulate(jax.value_and_grad(drawn, has_aux=True), steps)(jnp.float32(1), key, keys)
    own = [key] if steps == 1 else jax.random.split(key, steps)
    assert noise.tolist() == [jax.random.normal(each) for each in own]
    assert len(set(noise.tolist())) == steps
    assert divided.tolist() == [jax.random.key_data(keys[i::steps]).tolist() for i in range(steps)]


def test_auxiliary_data_are_stacked_in_the_order_of_microbatches():
    step = jax.value_and_grad(lambda w, x: ((w * x).mean(), {"first": x[0]}), has_aux=True)
    (value, auxiliary), gradient = accumulate(step, 2)(jnp.float32(2), jnp.arange(4.0))
    assert (value, gradient) == (3, 1.5)
    assert auxiliary["first"].tolist() == [0, 1]  # rows 0, 2 and rows 1, 3


def test_sums_are_float32_and_results_have_the_dtypes_of_one_step():
    x = jnp.full(512, 1 + 2.0**-7, jnp.bfloat16)  # a sum in bfloat16 would stop at 256
    value, gradient = jax.jit(accumulate(jax.value_and_grad(lambda w, x: (w * x).sum()), 512))(jnp.bfloat16(1), x)
    assert (value.dtype, gradient.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert value == gradient == x[0]


def test_gradients_of_integers_and_none_remain_what_they_are():
    step = jax.value_and_grad(lambda w, x: (w["a"] * x).sum(), allow_int=True)
    _, gradient = accumulate(step, 2)({"a": jnp.float32(1), "n": jnp.arange(3), "none": None}, jnp.arange(4.0))
    assert gradient["a"] == 3
    assert gradient["n"].dtype == jax.dtypes.float0
    assert gradient["n"].shape == (3,)
    assert gradient["none"] is None


@pytest.mark.slow
def test_a_module_is_differentiated_and_its_state_passes_from_one_microbatch_to_the_next():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
            self.calls = nnx.Variable(jnp.int32(0))

        def __call__(self, x):
            self.calls[...] += 1
            return self.norm(self.linear(x))

    step = nnx.value_and_grad(lambda model, x: (model(x) ** 2 * jnp.arange(1.0, 3)).mean())
    model, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    value, gradients = nnx.jit(accumulate(step, 3))(model, BATCH["x"])
    parts = [step(other, BATCH["x"][i::3]) for i in range(3)]
    assert model.calls[...] == 3
    np.testing.assert_allclose(value, sum(part[0] for part in parts) / 3, rtol=REORDERED)
    mean = jax.tree.map(lambda *each: sum(each) / 3, *(part[1] for part in parts))
    chex.assert_trees_all_close(gradients, mean, rtol=1e-4, atol=1e-6)  # differences of nearly equal numbers
    chex.assert_trees_all_close(nnx.state(model), nnx.state(other), rtol=REORDERED, atol=1e-6)


def test_memory_is_that_of_one_microbatch():
    def deep(w, x):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return x.mean()

    w, x = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((4096, 64), jnp.float32)

    def temporary(step):
        return jax.jit(step).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    step = jax.value_and_grad(deep)
    # The batch in the order of microbatches, and an eighth of the rest.
    assert temporary(accumulate(step, 8)) < x.size * 4 + temporary(step) / 4


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_steps_are_positive(steps):
    with pytest.raises(UnsupportedCast, match=r"accumulate: expected a positive number of steps, found .* Write 1"):
        accumulate(STEP, steps)


def test_a_batch_that_does_not_divide_is_an_error():
    message = r"argument 0/real of shape \(12,\) does not divide into 5 microbatches along its first axis. Pad"
    with pytest.raises(UnsupportedCast, match=message):
        accumulate(STEP, 5)(W, BATCH)
