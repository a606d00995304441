"""Slots are a table: one entry, and the code that reads it, are a new slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perparam import Policy
from perparam.models import Qwen3Config
from perparam.policies import (
    FORMATS,
    SLOTS,
    ArrayInfo,
    InvalidPolicy,
    Slot,
    UnknownDtype,
    UnmatchedRule,
    quantize,
    resolve,
)
from perparam.policies.dtypes import is_activation

TREE = {"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "norm": {"scale": jnp.ones(4)}}


def check_updates(where, format, kind):
    if not is_activation(format.values):
        raise UnknownDtype(f"{where}: updates are f32, bf16 or f16.")


@pytest.fixture
def updates(monkeypatch):
    """The table with one more entry."""
    monkeypatch.setitem(SLOTS, "updates", Slot("updates", True, check_updates))


def cast_updates(policy, updates):
    """The consumer: updates in the dtypes of the slot."""
    params = resolve(policy, updates, slots=("updates",)).params

    def cast(keys, leaf):
        rule = params["/".join(key.key for key in keys)].rules["updates"]
        return leaf if rule is None or rule.format is None else leaf.astype(rule.format.values)

    return jax.tree_util.tree_map_with_path(cast, updates)


@pytest.mark.usefixtures("updates")
class TestANewSlot:
    def test_its_consumer_reads_it(self):
        policy = Policy(params="f32", updates={"kernel": "bf16", "norm/*": None, "default": "f16"})
        cast = jax.tree.map(lambda leaf: leaf.dtype.name, cast_updates(policy, TREE))
        assert cast == {"dense": {"kernel": "bfloat16", "bias": "float16"}, "norm": {"scale": "float32"}}

    def test_it_is_written_compared_and_hashed(self):
        policy = Policy(compute="bf16", updates={"kernel": "bf16", "default": "f32"})
        text = "compute: bf16\nupdates:\n  kernel: bf16\n  default: f32\n"
        assert policy.dumps() == text
        assert Policy.loads(text) == policy == eval(repr(policy))
        assert policy != Policy(compute="bf16") != Policy(compute="bf16", updates="f32")
        assert len({policy, Policy.loads(text), Policy(compute="bf16")}) == 2
        assert Policy.parse("c=bf16,updates=f32") == Policy(compute="bf16", updates="f32")

    def test_its_rules_are_as_strict_as_all_others(self):
        policy = Policy.loads("updates:\n  kernal: bf16\n", "p.yaml")
        for ask in (policy.explain, lambda tree: cast_updates(policy, tree)):
            with pytest.raises(
                UnmatchedRule, match=r"p.yaml:2: 'kernal' \(updates\) matches none of 3.*\n.*dense/kernel"
            ):
                ask(TREE)

    def test_its_entry_says_what_it_accepts(self):
        with pytest.raises(UnknownDtype, match=r"^p.yaml:2: updates: kernel: updates are f32, bf16 or f16"):
            Policy.loads("updates:\n  kernel: f8_e4m3fn\n", "p.yaml")

    def test_nothing_else_changes(self):
        policy = Policy({"kernel": "f8_e4m3fn"}, updates="bf16")
        plan, other = (p.explain(TREE) for p in (policy, Policy({"kernel": "f8_e4m3fn"})))
        assert plan == other


def test_without_its_entry_a_slot_is_unknown():
    with pytest.raises(
        InvalidPolicy,
        match=r"slot 'updates'. A policy has params, compute, output, kv_cache, backward, grads, opt_state, m",
    ):
        Policy(updates="bf16")


class TestResolution:
    def test_only_the_slots_that_are_asked_for_are_read(self):
        policy = Policy({"kernel": "f8_e4m3fn", "nothing": "f32"}, {"kernel": "bf16"})
        param = resolve(policy, TREE, slots=("compute",)).params["dense/kernel"]
        assert (param.change, param.compute.values.name) == ("kept", "bfloat16")
        with pytest.raises(UnmatchedRule, match=r"'nothing' \(params\)"):
            resolve(policy, TREE, slots=("params",))

    def test_it_says_what_is_stored_and_which_rule_said_so(self):
        policy = Policy.loads("params:\n  kernel: {dtype: int8, block: [1, -1]}\n  default: bf16\n", "p.yaml")
        resolved = resolve(policy, TREE)
        assert {path: (info.shape, info.dtype.name) for path, info in resolved.stored.items()} == {
            "dense/bias": ((4,), "bfloat16"),
            "dense/kernel": ((4, 4), "int8"),
            "dense/scale_inv": ((4, 1), "float32"),
            "norm/scale": ((4,), "bfloat16"),
        }
        rules = {
            path: (param.rules["params"].key, param.rules["params"].source) for path, param in resolved.params.items()
        }
        assert rules["dense/kernel"] == ("kernel", "p.yaml:2")
        assert rules["norm/scale"] == ("default", "p.yaml:3")

    def test_only_a_config_that_knows_a_models_cache_is_asked(self):
        class Module(nnx.Module):
            def __init__(self, config):
                self.config, self.kernel = config, nnx.Param(jnp.ones((4, 4)))

        assert resolve(Policy(), Module({"dtype": "bf16"})).activations is None
        config = Qwen3Config(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, dtype=np.dtype("float32"),
        )  # fmt: skip
        plan = Policy(kv_cache="int8").explain(Module(nnx.data(config)))
        assert (plan.activations, plan.kv_bytes) == (np.dtype("float32"), 2 * 2 * 1 * (4 + 4))

    def test_a_scaled_array_keeps_its_own_format(self):
        array = quantize(jnp.ones((4, 64)), {"dtype": "f8_e4m3fn", "block": [1, 32], "scale": "f8_e8m0fnu"})
        assert array.format != FORMATS["mxfp8"]  # the same parts, made by another rule
        for policy in (Policy(), Policy({"0": "f8_e4m3fn"}), Policy({"0": None})):
            assert policy.store((array,))[0].format == array.format
        assert Policy({"0": "mxfp8"}).store((array,))[0].format == FORMATS["mxfp8"]

    def test_a_resolved_tree_resolves_to_itself(self):
        policy = Policy({"kernel": "f8_e4m3fn", "default": "bf16"})
        stored = resolve(policy, TREE).stored
        assert all(isinstance(info, ArrayInfo) for info in stored.values())
        again = resolve(policy, dict(stored))
        assert {param.change for param in again.params.values()} == {"kept"}
        assert again.stored == stored
        assert np.sum([info.bytes for info in stored.values()]) == policy.explain(TREE).total_bytes
