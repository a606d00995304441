"""What `init` and `apply` accept as a module, and the errors for what is none."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import perparam
from perparam import Policy
from perparam.policies import UnmatchedRule, UnsupportedCast

eqx = pytest.importorskip("equinox")

POLICY = Policy({"kernel": "f8_e4m3fn"}, "f32", "f32")
KEY, X = 0, np.ones((2, 6), np.float32)


class MLP(eqx.Module):
    weight: np.ndarray

    def __call__(self, x):
        return self.weight @ x


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.inner = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


class Scaled(nnx.Module):
    def __init__(self, *, policy, rngs):
        self.inner = perparam.Linear(6, 3, policy=policy.at("inner"), rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


class TestAnInstance:
    def test_apply_uses_its_structure_and_the_variables_that_are_passed(self):
        module, other = Block(rngs=nnx.Rngs(0)), Block(rngs=nnx.Rngs(1))
        variables = POLICY.store(nnx.state(other))
        before = nnx.state(module)
        y = perparam.apply(module, POLICY, variables, X)
        assert (y == perparam.apply(Block, POLICY, variables, X)).all()
        assert not np.allclose(y, module(X))
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, nnx.state(module)))

    def test_init_says_how_to_store_its_variables(self):
        with pytest.raises(UnsupportedCast, match=r"this Block has its own. Use policy.store\(nnx.state\(module\)\)"):
            perparam.init(Block(rngs=nnx.Rngs(0)), POLICY, KEY)

    def test_one_that_was_built_with_a_policy_is_refused(self):
        module = Scaled(policy=POLICY, rngs=nnx.Rngs(0))
        with pytest.raises(UnsupportedCast, match=r"this Scaled was built with a policy.*Pass the class"):
            perparam.apply(module, POLICY, nnx.state(module), X)


OTHERS = {
    "an Equinox class": (MLP, "MLP is neither"),
    "an Equinox module": (MLP(X), "MLP is neither"),
    "a callable that returns an Equinox module": (lambda rngs: MLP(X), "<lambda>, which returns MLP, is neither"),
    "a callable that returns a Linen module": (lambda rngs: nn.Dense(3), "which returns Dense, is neither"),
    "a mapping": ({"kernel": X}, "dict is neither"),
    "nothing": (None, "NoneType is neither"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("call", ["init", "apply"])
def test_a_module_of_no_flax_is_answered_with_store_and_to_compute(name, call):
    module, message = OTHERS[name]
    with pytest.raises(UnsupportedCast, match=rf"{message} a Linen module nor .*policy.to_compute\(tree\)"):
        perparam.init(module, POLICY, KEY) if call == "init" else perparam.apply(module, POLICY, nnx.State({}), X)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nnx.Linear, r"Linear cannot be called as module\(rngs=rngs\): missing a required argument: 'in_features'"),
        (
            functools.partial(nnx.Linear, 6),
            r"Linear cannot be called as .*: missing a required argument: 'out_features'",
        ),
        (lambda: None, r"<lambda> cannot be called as .* unexpected keyword argument 'rngs'. Write lambda rngs: "),
        (lambda policy: None, r"cannot be called as module\(rngs=rngs, policy=policy\)"),
        (nn.Dense, r"Dense is a class of Linen, expected a module. Pass Dense\(…\) with its arguments"),
        (MLP(X), "MLP is neither a Linen module nor"),
    ],
)
def test_a_callable_with_other_arguments_is_refused(module, message):
    with pytest.raises(UnsupportedCast, match=message):
        perparam.init(module, POLICY, KEY)
    with pytest.raises(UnsupportedCast, match=message):
        perparam.apply(module, POLICY, {"params": {}}, X)


@pytest.mark.parametrize("module", [nn.Dense(3), Block, Scaled, functools.partial(perparam.Linear, 6, 3)])
def test_a_cache_dtype_is_refused_for_a_module_that_cannot_read_it(module):
    message = r"kv_cache: int8 has no effect on (Dense|Block|Scaled|Linear): .*replace\(kv_cache=None\)"
    with pytest.raises(UnmatchedRule, match=message):
        perparam.init(module, Policy(kv_cache="int8"), KEY, X)


@pytest.mark.parametrize(
    ("module", "variables", "message"),
    [
        (Block, {"inner": {}}, r"expected a State as init returns it, found dict. Pass the nnx.state\(module\)"),
        (
            nn.Dense(3),
            X,
            "expected a Mapping as init returns it, found ndarray. Pass the variables of a Linen",
        ),
    ],
)
def test_variables_of_another_kind_are_refused(module, variables, message):
    with pytest.raises(UnsupportedCast, match=f"variables: {message}"):
        perparam.apply(module, POLICY, variables, X)
