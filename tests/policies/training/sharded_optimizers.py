"""Prints, for each optimizer on 8 devices, what its state is divided over and how it differs from one device."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from perparam import Policy
from perparam.policies.training.optimizer import with_policy
from perparam.policies.training.state_formats import STATE_FORMATS, encode_state

jax.config.update("jax_numpy_dtype_promotion", "strict")

WIDE = {"kernel": jax.random.normal(jax.random.key(0), (128, 96)), "bias": jnp.ones(128)}
GRADIENT = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), WIDE)
POLICY = Policy(
    {"kernel": "f8_e4m3fn", "default": "bf16"},
    opt_state={"mu": "bf16", "nu": "dynamic8", "default": "f32"},
    master="f32",
    block=(16, 16),
)
CASES = {
    "adam": (optax.adam(1e-2), POLICY),
    "float32": (optax.adam(1e-2), Policy()),
    "stochastic": (optax.sgd(1e-2, 0.9), POLICY.replace(master=None, opt_state="bf16")),
}


def divided(mesh, tree):
    """Arrays of the parameters' shapes divided by their first axis, others on every device."""

    def place(x):
        axes = ("x",) if x.ndim and x.shape[0] == 128 else ()
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(place, tree)


def steps(tx, params, gradient, count=3):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = first = tx.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return first, params, state


def named(tree):
    return {jax.tree_util.keystr(keys): x for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
for name, (tx, policy) in CASES.items():
    tx = with_policy(tx, policy, rounding="stochastic" if name == "stochastic" else "nearest")
    stored = policy.store(WIDE)
    one = steps(tx, stored, GRADIENT)
    many = steps(tx, divided(mesh, stored), divided(mesh, GRADIENT))
    shaped = ((128, 96), (128,))
    first, last = ({key: x for key, x in named(tree).items() if x.shape in shaped} for tree in (many[0], many[1:]))
    same = {
        key: np.asarray(x).tobytes() == np.asarray(named(one[1:])[key]).tobytes() for key, x in named(many[1:]).items()
    }
    print(
        json.dumps(
            {
                "name": name,
                "first": {key: x.addressable_shards[0].data.shape[0] for key, x in first.items()},
                "last": {key: x.addressable_shards[0].data.shape[0] for key, x in last.items()},
                "same": same,
            }
        )
    )

# State in 8 bits of a parameter that is divided by columns.
columns = NamedSharding(mesh, PartitionSpec(None, "x"))
kernel = jax.device_put(jax.random.normal(jax.random.key(2), (64, 8 * 256)), columns)
for name in STATE_FORMATS:
    program = jax.jit(lambda x, name=name: encode_state(x, STATE_FORMATS[name])).lower(kernel).compile()
    found = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", program.as_text())
    gathered = max((math.prod(map(int, dims.split(","))) for dims in found), default=0)
    print(json.dumps({"name": name, "gathered": gathered, "size": kernel.size}))
