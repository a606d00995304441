"""Records of parameters and optimizer state: rules apply to the parameters, and not to the moments named like them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from perparam import Policy

POLICY = Policy({"kernel": "f8_e4m3fn", "default": "bf16"}, "bf16")
PARAMS = {"kernel": np.ones((5, 3), np.float32), "bias": np.ones(3, np.float32)}


class Record(NamedTuple):
    params: Any
    average: Any
    opt_state: Any


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class OwnInit:
    params: Any
    opt_state: Any

    def __init__(self, weights):
        object.__setattr__(self, "params", weights)
        object.__setattr__(self, "opt_state", optax.adam(1e-3).init(weights))

    def tree_flatten(self):
        return (self.params, self.opt_state), None

    @classmethod
    def tree_unflatten(cls, _, children):
        raise AssertionError("a plan rebuilds nothing")


def flax_state(params):
    return TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))


STATES = {
    "TrainState": lambda: flax_state(PARAMS),
    "TrainState of variables": lambda: flax_state({"params": PARAMS}),
    "a named tuple": lambda: Record(PARAMS, {"kernel": 0}, optax.adam(1e-3).init(PARAMS)),
    "a class with its own __init__": lambda: OwnInit(PARAMS),
    "a dict": lambda: {"params": PARAMS, "opt_state": optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(PARAMS)},
}


@pytest.mark.parametrize("name", STATES)
def test_only_the_parameters_are_planned_stored_and_cast(name):
    state = STATES[name]()
    assert {row.path for row in POLICY.explain(state)} == {"kernel", "scale_inv", "bias"}
    get = dict.__getitem__ if isinstance(state, dict) else getattr
    for result, kernel in (
        (POLICY.store(state), "float8_e4m3fn"),
        (POLICY.to_compute(POLICY.store(state)), "bfloat16"),
        (POLICY.cast(state, "compute"), "bfloat16"),
    ):
        assert type(result) is type(state)
        params = get(result, "params")
        params = params.get("params", params)
        assert (params["kernel"].dtype, params["bias"].dtype) == (kernel, "bfloat16")
        moments = zip(*(jax.tree.leaves(get(each, "opt_state")) for each in (state, result)), strict=True)
        assert all(before is after for before, after in moments)


def test_a_state_of_optax_has_no_parameters_wherever_it_is():
    pair = (PARAMS, optax.adam(1e-3).init(PARAMS))
    assert {row.path for row in POLICY.explain(pair)} == {"0/kernel", "0/scale_inv", "0/bias"}
    assert POLICY.store(pair)[1][0] is pair[1][0]
