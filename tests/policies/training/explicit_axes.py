"""Prints, for optimizers on a mesh of 8 devices with explicit axes, the shardings and whether bits are as on one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from perparam import Policy
from perparam.policies.training.optimizer import with_policy

jax.config.update("jax_numpy_dtype_promotion", "strict")

WIDE = {"kernel": jax.random.normal(jax.random.key(0), (128, 96)), "bias": jnp.ones(128)}
GRADIENT = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), WIDE)
POLICY = Policy(
    {"kernel": "f8_e4m3fn", "default": "bf16"},
    opt_state={"mu": "bf16", "nu": "dynamic8", "default": "f32"},
    block=(16, 16),
)
CASES = {
    "delayed": (POLICY.replace(master="f32"), {"scales": "delayed"}),
    "stochastic": (POLICY.replace(block=(128, 128)), {"rounding": "stochastic"}),
}


def steps(params, gradient, policy, options):
    params, tx = policy.store(params), with_policy(optax.adam(1e-2), policy, **options)
    state = tx.init(params)
    stored = params
    for _ in range(2):
        updates, state = jax.jit(tx.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return {"stored": stored, "params": params, "state": state}


def named(tree):
    return {jax.tree_util.keystr(keys): x for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


mesh = jax.make_mesh((8,), ("x",))
assert mesh.axis_types == (AxisType.Explicit,)
placed = [jax.device_put(tree, NamedSharding(mesh, PartitionSpec("x"))) for tree in (WIDE, GRADIENT)]
for name, (policy, options) in CASES.items():
    one, many = named(steps(WIDE, GRADIENT, policy, options)), named(steps(*placed, policy, options))
    same = {key: np.asarray(many[key]).tobytes() == np.asarray(one[key]).tobytes() for key in one}
    specs = {key: list(x.sharding.spec) for key, x in many.items() if isinstance(x.sharding, NamedSharding)}
    print(json.dumps({"name": name, "same": same, "specs": specs}))
