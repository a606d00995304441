"""The recipe for Flax's `TrainState` with parameters in storage formats, batch statistics and dropout."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax.training import train_state
from helpers import bits

from perparam import Policy, apply, init
from perparam.policies import parameters
from perparam.training import combine, partition, value_and_grad, with_policy

POLICY = Policy({"kernel": "f8_e4m3fn"}, "bf16", "f32")
X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))


class State(train_state.TrainState):
    batch_stats: Any
    key: Any


def loss(params, state):
    y, updates = apply(
        Net(),
        POLICY,
        {"params": params, "batch_stats": state.batch_stats},
        X,
        train=True,
        rngs={"dropout": jax.random.fold_in(state.key, state.step)},
        mutable=["batch_stats"],
    )
    return ((y - 1.0) ** 2).mean(), updates["batch_stats"]


def run(step, state):
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # Flax's BatchNorm and optax promote
        for _ in range(8):
            state, value = step(state)
            losses.append(float(value))
    return state, losses


def state_of(variables, params, tx):
    with jax.numpy_dtype_promotion("standard"):
        return State.create(
            apply_fn=None, params=params, tx=tx, batch_stats=variables["batch_stats"], key=jax.random.key(1)
        )


@pytest.mark.slow
def test_narrow_pairs_are_trained_by_apply_gradients():
    variables = init(Net(), POLICY, jax.random.key(0), X)
    state = state_of(variables, variables["params"], with_policy(optax.adam(1e-2), POLICY))

    @jax.jit
    def step(state):
        (value, batch_stats), gradient = value_and_grad(loss, has_aux=True)(state.params, state)
        return state.apply_gradients(grads=gradient, batch_stats=batch_stats), value

    trained, losses = run(step, state)
    assert losses[-1] < losses[0]
    assert {path: x.dtype for path, x in parameters(trained.params).items()} == {
        path: x.dtype for path, x in parameters(state.params).items()
    }
    assert bits(trained.params["Dense_0"]["kernel"]) != bits(state.params["Dense_0"]["kernel"])
    assert (trained.batch_stats["BatchNorm_0"]["mean"] != 0).any()
    assert int(trained.step) == 8


@pytest.mark.slow
def test_with_plain_optax_the_trainable_half_is_the_state():
    variables = init(Net(), POLICY, jax.random.key(0), X)
    trainable, frozen = partition(variables["params"])
    state = state_of(variables, trainable, optax.adam(1e-2))

    @jax.jit
    def step(state):
        (value, batch_stats), gradient = jax.value_and_grad(
            lambda params: loss(combine(params, frozen), state), has_aux=True
        )(state.params)
        return state.apply_gradients(grads=gradient, batch_stats=batch_stats), value

    trained, losses = run(step, state)
    assert losses[-1] < losses[0]
    full = combine(trained.params, frozen)
    for path, x in parameters(variables["params"]).items():
        is_frozen = path.endswith(("kernel", "scale_inv"))
        assert (bits(parameters(full)[path]) == bits(x)) is is_frozen, path
