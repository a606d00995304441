"""The memory of training in a plan: what init allocates, to the byte, before it does."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from perparam import Policy
from perparam.policies import UnmatchedRule
from perparam.policies.training.optimizer import with_policy
from perparam.policies.training.partition import partition

SHAPES = {
    "layers": {
        str(i): {
            "kernel": jax.ShapeDtypeStruct((70, 66), "float32"),
            "bias": jax.ShapeDtypeStruct((66,), "float32"),
        }
        for i in range(2)
    },
    "embed": {"embedding": jax.ShapeDtypeStruct((64, 65), "float32")},
    "count": jax.ShapeDtypeStruct((), "int32"),
}
YAML = """\
params: {kernel: f8_e4m3fn, default: bf16}
grads: bf16
opt_state:
  'mu/**/embedding?': f32
  'mu?': bf16
  default: dynamic8
master: {kernel: f32}
block: [16, 16]
"""
POLICY = Policy.loads(YAML, "p.yaml")
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, 0.9),
    "adam": lambda: optax.adam(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=32),
    "muon": lambda: optax.contrib.muon(1e-3),
    "accumulation": lambda: optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
}


def ones(shapes):
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def allocated(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("scales", ["fresh", "delayed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_are_those_of_the_arrays_that_init_returns(name, scales):
    tx = with_policy(OPTIMIZERS[name](), POLICY, scales=scales)
    plan = POLICY.explain(SHAPES, optimizer=tx)  # of shapes: nothing is allocated
    state = tx.init(POLICY.store(ones(SHAPES)))
    memory = plan.training
    assert memory.optimizer_bytes == allocated(state)
    assert memory.master_bytes == allocated(state.master) == 2 * 70 * 66 * 4
    assert memory.amax_bytes == allocated(state.amax) == (2 * 5 * 5 * 4 if scales == "delayed" else 0)
    assert sum(memory.state_bytes.values()) + memory.other_bytes == allocated((state.inner, state.step))
    assert memory.gradient_bytes == 2 * (2 * (70 * 66 + 66) + 64 * 65)
    assert plan.total_bytes == allocated(POLICY.store(ones(SHAPES)))


def test_fields_and_rows_have_their_bytes_and_formats():
    plan = POLICY.explain(SHAPES, optimizer=with_policy(optax.adam(1e-3), POLICY))
    (adam, _) = with_policy(optax.adam(1e-3), POLICY).init(POLICY.store(ones(SHAPES))).inner
    assert plan.training.state_bytes == {"mu": allocated(adam.mu), "nu": allocated(adam.nu)}
    rows = {row.path: row.training for row in plan}
    kernel, bias, embedding = (rows[path] for path in ("layers/1/kernel", "layers/0/bias", "embed/embedding"))
    assert str(kernel) == "bf16 | mu:bf16, nu:dynamic8 | f32"
    assert kernel.state_bytes == {"mu": 70 * 66 * 2, "nu": 70 * 66 + 4 * -(-70 * 66 // 256)}
    assert (kernel.gradient_bytes, kernel.master_bytes) == (70 * 66 * 2, 70 * 66 * 4)
    assert kernel.rules == {
        "grads": "p.yaml:2: 'default'", "master": "p.yaml:7: 'kernel'",
        "mu": "p.yaml:5: 'mu?'", "nu": "p.yaml:6: 'default'",
    }  # fmt: skip
    assert str(bias) == "bf16 | mu:bf16, nu:f32 | –"
    assert bias.wide == {"nu": "fewer than 4096 values"}
    assert (str(embedding), embedding.wide) == ("bf16 | mu:f32, nu:f32 | –", {"nu": "an embedding"})
    assert rows["count"] is rows["layers/0/scale_inv"] is None
    assert (
        sum(row.bytes for row in rows.values() if row)
        == plan.training.optimizer_bytes - 2 * 4 + plan.training.gradient_bytes
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_stored_already_has_the_same_memory(scaled):
    tx = with_policy(optax.adam(1e-3), POLICY)
    stored = POLICY.store(ones(SHAPES), scaled=scaled)
    assert POLICY.explain(stored, optimizer=tx).training == POLICY.explain(SHAPES, optimizer=tx).training


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 66, rngs=rngs, param_dtype=jnp.bfloat16)
        self.norm = nnx.BatchNorm(66, rngs=rngs)


def test_a_module_of_nnx():
    policy = Policy(master={"kernel": "f32"}, opt_state={"mu": "dynamic8", "nu": "bf16"})
    tx, model = with_policy(optax.adam(1e-3), policy), Model(nnx.Rngs(0))
    memory = policy.explain(model, optimizer=tx).training
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert memory.optimizer_bytes == allocated(nnx.as_pure(optimizer.opt_state))
    assert memory.params.keys() == {"first/bias", "first/kernel", "norm/bias", "norm/scale"}
    # Narrow parameters of a state, and a state without the statistics of the norm.
    policy = policy.replace(params={"kernel": "f8_e4m3fn"}, block=(16, 16))
    tx = with_policy(optax.adam(1e-3), policy)
    state = nnx.state(model, nnx.Param)
    assert policy.explain(state, optimizer=tx).training.optimizer_bytes == allocated(tx.init(policy.store(state)))


class TestTrainable:
    tx = with_policy(optax.adam(1e-3), POLICY.replace(master=None))

    def test_only_what_is_trained_counts(self):
        policy = POLICY.replace(master=None)
        plan = policy.explain(SHAPES, optimizer=self.tx, trainable="**/bias")
        params = policy.store(ones(SHAPES))
        trainable, _ = partition(params, "**/bias")
        assert plan.training.optimizer_bytes == allocated(self.tx.init(trainable))
        assert plan.training.params.keys() == {"layers/0/bias", "layers/1/bias"}
        half = policy.replace(params=None).explain(trainable, optimizer=self.tx)
        assert half.training == plan.training
        by_function = policy.explain(SHAPES, optimizer=self.tx, trainable=lambda path: path.endswith("bias"))
        assert by_function.training == plan.training

    def test_a_scaled_pair_is_one_parameter(self):
        plan = POLICY.explain(
            SHAPES, optimizer=with_policy(optax.sgd(1.0), POLICY.replace(opt_state=None)), trainable="**/kernel"
        )
        assert plan.training.params.keys() == {"layers/0/kernel", "layers/1/kernel"}
        assert plan.training.optimizer_bytes == 2 * 70 * 66 * 4 + 4

    def test_a_pattern_that_matches_nothing(self):
        with pytest.raises(UnmatchedRule, match=r"'lora' \(trainable\) matches none of 5 trainable parameters"):
            POLICY.explain(SHAPES, optimizer=self.tx, trainable="lora")

    def test_rules_of_state_are_checked(self):
        policy = Policy.loads("opt_state:\n  mv: bf16\n", "p.yaml")
        with pytest.raises(UnmatchedRule, match=r"p.yaml:2: 'mv' \(opt_state\) matches none of 12 state arrays"):
            policy.explain(SHAPES, optimizer=with_policy(optax.adam(1e-3), policy))


class TestAnyOptimizer:
    def test_without_a_policy(self):
        tx = optax.adam(1e-3)
        plan = POLICY.replace(params="bf16").explain(SHAPES, optimizer=tx)
        params = Policy("bf16").store(ones(SHAPES))
        # Integers have moments in optax, and none here.
        floats, _ = partition(params)
        assert plan.training.optimizer_bytes == allocated(tx.init(floats))
        assert plan.training.gradient_bytes == allocated(floats)
        assert plan.training.unused == (
            "grads, opt_state, master: without effect on this optimizer. Pass "
            "perparam.training.with_policy(optimizer, policy).",
        )
        assert plan.training.unused[0] in plan.summary()
        assert "stays f32" not in plan.summary()

    def test_inside_of_another(self):
        tx = optax.MultiSteps(with_policy(optax.sgd(0.1, 0.9), Policy(master="f32")), 2)
        params = Policy("bf16").store(ones(SHAPES["layers"]))
        memory = Policy(master="f32").explain(params, optimizer=tx).training
        assert memory.optimizer_bytes == allocated(tx.init(params))
        assert memory.state_bytes.keys() == {"trace", "acc_grads"}
        assert memory.master_bytes == allocated(params) * 2


class TestText:
    plan = POLICY.explain(SHAPES, optimizer=with_policy(optax.adam(1e-3), POLICY))

    def test_totals(self):
        assert self.plan.summary().splitlines()[3:] == [
            "training 5 parameters: gradients 26.4 KiB (bf16), state 60.5 KiB (mu 34.6 KiB, nu 25.9 KiB), masters 36.1 "
            "KiB, "
            "8 B of counters and constants",
            "parameters, gradients, state and masters: 140.6 KiB",
            "nu stays f32 for embed/embedding: an embedding",
            "nu stays f32 for layers/0/bias and 1 more: fewer than 4096 values",
        ]

    def test_eighty_columns_are_enough(self):
        lines = self.plan.to_text(80).splitlines()
        assert max(map(len, lines)) <= 80
        header = lines[0].split()
        assert header[0] == "path"
        assert header[-1] == "training"
        for words in ("dynamic8", "mu:bf16", "kernel ×2", "left out for lack of width: shape, current"):
            assert words in self.plan.to_text(80)

    def test_json(self):
        data = json.loads(self.plan.to_json())
        assert data["training"] == {
            "parameters": 5,
            "gradient_bytes": 2 * (2 * (70 * 66 + 66) + 64 * 65),
            "state_bytes": self.plan.training.state_bytes,
            "master_bytes": 2 * 70 * 66 * 4,
            "amax_bytes": 0,
            "other_bytes": 8,
            "optimizer_bytes": self.plan.training.optimizer_bytes,
        }
        rows = {row["path"]: row for row in data["rows"]}
        assert rows["layers/0/kernel"]["training"]["state"] == {"mu": "bf16", "nu": "dynamic8"}
        assert "training" not in rows["count"]

    def test_a_plan_without_an_optimizer_is_as_before(self):
        plan, before = (policy.explain(SHAPES) for policy in (POLICY, Policy(POLICY.params, block=POLICY.block)))
        assert plan == before
        assert plan.to_json() == before.to_json()
        assert "training" not in plan.to_json()
        assert plan.to_text() == before.to_text()
