"""`flax.serialization` of what perparam adds to trees: a round trip keeps every bit."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.serialization import from_bytes, to_bytes
from helpers import bits

from perparam import Policy, ScaledArray, quantize
from perparam.policies import InvalidCheckpoint
from perparam.policies.training.state_formats import STATE_FORMATS, encode_state
from perparam.training import DynamicLossScale, NoOpLossScale, StaticLossScale, with_loss_scale, with_policy

X = jax.random.normal(jax.random.key(0), (64, 64))
SCALED = {name: quantize(X, name, (16, 32)) for name in ("f8_e4m3fn", "int8")}
TREES = {
    "scaled": SCALED | {"mxfp8": quantize(X, "mxfp8")},
    "trained": ScaledArray(*SCALED["int8"], SCALED["int8"].format, X),
    "state": {name: encode_state(abs(X), format, unsigned=name != "int8") for name, format in STATE_FORMATS.items()},
    "dynamic": DynamicLossScale(8.0, counter=3, period=7, factor=4.0, min_loss_scale=0.5),
    "constant": [StaticLossScale(4.0), NoOpLossScale()],
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_round_trip_keeps_bits_and_structure(tree):
    target = jax.tree.map(jnp.zeros_like, tree)
    restored = from_bytes(target, to_bytes(tree))
    chex.assert_trees_all_equal_structs(restored, tree)
    assert list(map(bits, jax.tree.leaves(restored))) == list(map(bits, jax.tree.leaves(tree)))


def test_the_state_of_an_optimizer_is_restored():
    policy = Policy({"kernel": "f8_e4m3fn", "bias": "bf16"}, opt_state="dynamic8", master="f32")
    params = policy.store({"kernel": X, "bias": X[0]})
    tx = with_loss_scale(with_policy(optax.adam(0.1), policy), DynamicLossScale())
    state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tx.init(params))
    restored = from_bytes(tx.init(params), to_bytes(state))
    chex.assert_trees_all_equal_structs(restored, state)
    assert list(map(bits, jax.tree.leaves(restored))) == list(map(bits, jax.tree.leaves(state)))


def test_arrays_of_another_format_or_container_are_errors():
    other = to_bytes({"mu": encode_state(X, STATE_FORMATS["int8"])})
    target = {"mu": encode_state(X, STATE_FORMATS["dynamic8"])}
    with pytest.raises(InvalidCheckpoint, match=r"^mu/codes: found int8 \(64, 64\), expected u8 \(64, 64\). Restore"):
        from_bytes(target, other)
    with pytest.raises(
        InvalidCheckpoint, match=r"^mu: found ndarray, expected \['codes', 'scales'\], the arrays of a St"
    ):
        from_bytes(target, to_bytes({"mu": X}))
