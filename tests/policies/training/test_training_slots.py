"""The slots for training: what they accept, how they are written, and when their rules are checked."""

import jax.numpy as jnp
import pytest

from perparam import Policy
from perparam.policies import InvalidPolicy, UnknownDtype, UnmatchedRule, resolve
from perparam.policies.decisions import decide

TREE = {"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "embed": {"embedding": jnp.ones((4, 4))}}
TEXT = """\
params:
  kernel: f8_e4m3fn
  default: f32
grads: bf16
opt_state:
  mu/**/embedding: f32
  mu: dynamic8
  '{nu,nu_max}': f8_e4m3fn
  '*/**/bias': f32
  default: bf16
master:
  kernel: f32
  scale_inv: null
"""


def format_of(policy, path):
    found = policy.opt_state.format(path)
    return found and str(found)


class TestWriting:
    def test_yaml_and_repr_come_back_equal(self):
        policy = Policy.loads(TEXT)
        assert policy.dumps() == TEXT
        assert Policy.loads(policy.dumps()) == policy == eval(repr(policy))
        assert hash(Policy.loads(TEXT)) == hash(policy)
        assert policy != policy.replace(master="f32") != policy.replace(opt_state=None)

    def test_merging_puts_rules_first_in_each_slot(self):
        policy = Policy(opt_state={"mu": "bf16", "default": "f32"}, grads="f32")
        merged = policy.merge({"opt_state": {"mu/**/bias": "f32", "mu": "dynamic8"}, "grads": "bf16"})
        assert merged.opt_state.plain() == {"mu/**/bias": "f32", "mu": "dynamic8", "default": "f32"}
        assert merged.grads.plain() == "bf16"

    def test_properties_are_the_rules(self):
        policy = Policy.loads(TEXT)
        assert policy.grads.format("any/kernel").values == jnp.bfloat16
        assert policy.master.format("a/kernel").values == jnp.float32
        assert policy.master.format("a/bias") is None
        assert Policy().grads == Policy().opt_state == Policy().master

    def test_one_line(self):
        assert Policy.parse("p=bf16,grads=f32,master=f32") == Policy("bf16", grads="f32", master="f32")


class TestPathsOfState:
    def test_a_key_without_a_slash_is_a_field(self):
        policy = Policy.loads(TEXT)
        assert format_of(policy, "mu/embed/embedding") == "f32"
        assert format_of(policy, "mu/dense/kernel") == "dynamic8"
        assert format_of(policy, "nu/dense/bias") == "f8_e4m3fn"  # the first rule that matches
        assert format_of(policy, "trace/dense/bias") == "f32"
        assert format_of(policy, "trace/mu/kernel") == "bf16"  # a module called mu is no field

    def test_a_parameter_that_is_written_as_a_field_is_corrected(self):
        policy = Policy.loads("opt_state:\n  embedding: f32\n", "p.yaml")
        paths = ["mu/embed/embedding", "nu/embed/embedding"]
        with pytest.raises(UnmatchedRule, match=r"p.yaml:2: 'embedding' \(opt_state\) matches none of 2 arrays.*\n.*"
                           r"Did you mean '\*\*/embedding'\? Paths of this slot begin with a field"):  # fmt: skip
            decide("opt_state", policy.opt_state, paths, "array")

    def test_the_nearest_field_is_named(self):
        policy = Policy(opt_state={"nuu": "bf16"})
        with pytest.raises(UnmatchedRule, match=r"nearest: nu\n  Correct"):
            decide("opt_state", policy.opt_state, ["mu/kernel", "nu/kernel"], "array")


class TestValues:
    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("grads: f8_e5m2", UnknownDtype, r"^p:1: grads: gradients cannot be f8_e5m2. Write f32, bf16 or f16"),
            ("grads: {kernel: int8}", UnknownDtype, r"^p:1: grads: kernel: gradients cannot be int8."),
            ("grads: {scale_inv: f32}", InvalidPolicy, r"^p:1: grads: scale_inv: scales are computed from their"),
            ("master: {kernel: f8_e4m3fn}", UnknownDtype, r"^p:1: master: kernel: master cannot be f8_e4m3fn."),
            ("opt_state: {nu: int8}", InvalidPolicy, r"^p:1: opt_state: nu: int8 has linear codes.* Write dynamic8"),
            ("opt_state: {exp_avg_sq: int8}", InvalidPolicy, r"opt_state: exp_avg_sq: int8 has linear codes"),
            ("opt_state: {v/**: int8}", InvalidPolicy, r"opt_state: v/\*\*: int8 has linear codes"),
            ("opt_state: {mu: f8_e5m2}", UnknownDtype, r"^p:1: opt_state: mu: state is stored in 8 bits as dynamic8"),
            ("opt_state: {mu: {dtype: int8, block: [1, 8]}}", UnknownDtype, r"in blocks of 256 consecutive values"),
            ("opt_state: {mu: f64}", UnknownDtype, r"float64 needs jax_enable_x64"),
            ("opt_state: {mu: dynamic9}", UnknownDtype, r"unknown dtype 'dynamic9'"),
            ("params: {kernel: dynamic8}", UnknownDtype, r"unknown dtype 'dynamic8'"),
        ],
    )  # fmt: skip
    def test_others_are_errors_with_the_line(self, text, error, message):
        with pytest.raises(error, match=message):
            Policy.loads(text, "p")

    def test_a_first_moment_may_be_linear(self):
        assert Policy(opt_state={"mu": "int8"}).opt_state.plain() == {"mu": "int8"}


class TestWhenRulesAreChecked:
    policy = Policy(grads={"kernal": "bf16"}, master={"nothing": "f32"}, opt_state={"nothing": "f32"})

    def test_not_where_nothing_is_trained(self):
        tree = {"kernel": jnp.ones((2, 2))}
        assert self.policy.store(tree).keys() == tree.keys()
        assert self.policy.to_compute(tree).keys() == tree.keys()
        assert not resolve(self.policy, TREE).params["dense/kernel"].rules.keys() & {"grads", "master", "opt_state"}

    @pytest.mark.parametrize("slot", ["grads", "master"])
    def test_explain_checks_gradients_and_masters(self, slot):
        policy = Policy.loads(f"{slot}:\n  kernal: bf16\n", "p.yaml")
        with pytest.raises(UnmatchedRule, match=rf"p.yaml:2: 'kernal' \({slot}\) matches none of 3.*\n.*dense/kernel"):
            policy.explain(TREE)

    def test_explain_does_not_check_state_without_an_optimizer(self):
        assert len(Policy(opt_state={"nothing": "f32"}).explain(TREE)) == 3
