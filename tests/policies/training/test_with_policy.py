"""`with_policy` on plain trees: the bits of optax when all is float32, and state that is stored by the map.

What is tested of every optimizer follows optax's own alias_test: dtypes, shapes, and accumulation.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perparam import Policy
from perparam.policies import InvalidPolicy, ShadowedRule, UnmatchedRule
from perparam.policies.training.optimizer import with_policy
from perparam.policies.training.states import PolicyState

pytestmark = pytest.mark.optimised  # whose tests compare bits

STEPS = 3
SHAPES = {"dense": {"kernel": (48, 40), "bias": (40,)}, "embed": {"embedding": (16, 24)}}


def drawn(seed, dtype="float32"):
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


PARAMS, GRADIENTS = drawn(0), [drawn(1 + step) for step in range(STEPS)]

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, 0.9),
    "nesterov": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 10), mask={"dense": True, "embed": False}),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=32),
    "muon": lambda: optax.contrib.muon(1e-2),
}
COMPOSED = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), optax.ema(0.9)),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.1, 0.9)}, {"dense": "a", "embed": "b"}
    ),
    "masked": lambda: optax.masked(optax.rmsprop(1e-2), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(1e-2, 0.0, 10), weight_decay=0.1
    ),
    "accumulation": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}
EVERY = OPTIMIZERS | COMPOSED
QUICK = ("momentum", "adam", "multi_transform")
FIELDS = {
    "sgd": [], "momentum": ["trace"], "nesterov": ["trace"], "adam": ["mu", "nu"],
    "adamw": ["mu", "nu"], "lion": ["mu"],
    "adafactor": ["v_row", "v_col", "v"], "muon": ["mu", "nu"], "chain": ["mu", "nu", "ema"],
    "multi_transform": ["mu", "nu", "trace"], "masked": ["nu"], "inject_hyperparams": ["mu", "nu"],
    "accumulation": ["mu", "nu", "acc_grads"],
}  # fmt: skip


def trained(tx, params, gradients, **extra):
    """Parameters and state after a step for each gradient, each compiled; optax needs the usual dtype promotion."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params, **extra)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        params = jax.tree.map(jnp.copy, params)
        for gradient in gradients:
            params, state = step(params, state, gradient)
    return params, state


def dtypes_of(state):
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(keys): (x.dtype.name, x.shape) for keys, x in flat}


def marked(name):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in EVERY])
def test_everything_in_float32_has_the_bits_of_optax(name):
    policy = Policy("f32", grads="f32", master="f32", opt_state="f32" if FIELDS[name] else None)
    params, state = trained(EVERY[name](), PARAMS, GRADIENTS)
    ours, ours_state = trained(with_policy(EVERY[name](), policy), PARAMS, GRADIENTS)
    chex.assert_trees_all_equal(ours, params)
    chex.assert_trees_all_equal(ours_state.inner, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours_state.inner, state)
    assert int(ours_state.step) == STEPS
    assert jax.tree.leaves((ours_state.master, ours_state.amax)) == []


@pytest.mark.parametrize("name", [name for name in EVERY if FIELDS[name]])
def test_every_field_of_the_state_is_stored_in_its_dtype_and_keeps_it(name):
    policy = Policy(opt_state={"*/**/embedding": "f32", "*": "bf16"})
    tx = with_policy(EVERY[name](), policy)
    state = jax.eval_shape(tx.init, PARAMS)
    updates, next_state = jax.eval_shape(tx.update, GRADIENTS[0], state, PARAMS)
    after = dtypes_of(next_state)
    assert dtypes_of(state) == after
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    stored = {keys: dtype for keys, (dtype, _) in after.items() if any(f".{field}[" in keys for field in FIELDS[name])}
    assert {dtype for keys, dtype in stored.items() if "embedding" in keys} <= {"float32"}
    assert {dtype for keys, dtype in stored.items() if "dense" in keys} == {"bfloat16"}
    for field in FIELDS[name]:
        assert any(f".{field}[" in keys for keys in stored)
    others = {keys: dtype for keys, (dtype, _) in after.items() if keys not in stored}
    assert set(others.values()) <= {"int32", "float32"}


@pytest.mark.slow
def test_arithmetic_is_in_float32_and_only_storage_rounds():
    tx, policy = optax.adam(1e-2), Policy(opt_state={"mu": "bf16", "nu": "f16"})
    ours = with_policy(tx, policy)
    with jax.numpy_dtype_promotion("standard"):
        params, state, our_params, our_state = PARAMS, tx.init(PARAMS), PARAMS, ours.init(PARAMS)
        for gradient in GRADIENTS:
            # What the wrapper says that it does, step by step.
            adam, rest = state
            wide = adam._replace(
                **{field: jax.tree.map(lambda x: x.astype("float32"), getattr(adam, field)) for field in ("mu", "nu")}
            )
            updates, (adam, rest) = tx.update(gradient, (wide, rest), params)
            params = optax.apply_updates(params, updates)
            state = (
                adam._replace(
                    mu=jax.tree.map(lambda x: x.astype("bfloat16"), adam.mu),
                    nu=jax.tree.map(lambda x: x.astype("float16"), adam.nu),
                ),
                rest,
            )
            our_updates, our_state = ours.update(gradient, our_state, our_params)
            our_params = optax.apply_updates(our_params, our_updates)
    chex.assert_trees_all_equal(our_params, params)
    chex.assert_trees_all_equal(our_state.inner, state)


def test_injected_hyperparameters_promote_no_moment():
    """optax#1552 and tunix#1880: there moments in bf16 became float32 after a step, since b1 is an array."""
    factory = optax.inject_hyperparams(optax.adam, static_args="mu_dtype")
    params = gradients = jax.eval_shape(lambda: drawn(0, "bfloat16"))
    tx = with_policy(factory(learning_rate=1e-2), Policy(opt_state={"mu": "bf16", "nu": "f32"}))
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, gradients, state, params)
    assert dtypes_of(state) == dtypes_of(after)
    assert dtypes_of(state)[".inner.inner_state[0].mu['dense']['kernel']"] == ("bfloat16", (48, 40))
    # Without a rule, optax's own argument decides.
    plain = with_policy(factory(learning_rate=1e-2, mu_dtype=jnp.bfloat16), Policy())
    state = jax.eval_shape(plain.init, params)
    assert dtypes_of(state) == dtypes_of(jax.eval_shape(plain.update, gradients, state, params)[1])
    assert dtypes_of(state)[".inner.inner_state[0].mu['dense']['kernel']"] == ("bfloat16", (48, 40))


def test_an_injected_hyperparameter_can_be_set_to_a_number():
    tx = with_policy(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0), Policy())
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    state.inner.hyperparams["learning_rate"] = 0.5
    updates, state = tx.update({"w": jnp.ones(2)}, state, params)
    assert updates["w"].tolist() == [-0.5, -0.5]
    assert state.inner.hyperparams["learning_rate"].dtype == jnp.float32


def test_state_without_a_rule_keeps_the_dtype_that_init_gave_it():
    mean = jax.tree.map(lambda x: x.astype("bfloat16"), PARAMS)
    promoting = optax.GradientTransformation(
        lambda params: optax.EmaState(jnp.zeros((), "int32"), mean),
        lambda updates, state, params: (updates, state._replace(ema=updates)),
    )
    tx = with_policy(promoting, Policy())
    state = tx.init(PARAMS)
    _, after = tx.update(GRADIENTS[0], state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state._replace(step=after.step))
    chex.assert_trees_all_equal(after.inner.ema, jax.tree.map(lambda x: x.astype("bfloat16"), GRADIENTS[0]))


@pytest.mark.slow
def test_extra_arguments_are_passed_on():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))  # needs `value`
    params, state = trained(tx, PARAMS, GRADIENTS, value=1.0)
    ours, ours_state = trained(with_policy(tx, Policy()), PARAMS, GRADIENTS, value=1.0)
    chex.assert_trees_all_equal((ours, ours_state.inner), (params, state))


def test_gradients_overflow_visibly_in_their_dtype():
    gradient = jax.tree.map(lambda x: jnp.full_like(x, 1e5), PARAMS)
    params, _ = trained(
        with_policy(optax.sgd(1.0), Policy(grads={"kernel": "f16", "default": "bf16"})), PARAMS, [gradient]
    )
    assert np.isinf(params["dense"]["kernel"]).all()
    rounded = np.float32(np.asarray(jnp.float32(1e5).astype("bfloat16")))
    np.testing.assert_array_equal(params["dense"]["bias"], np.asarray(PARAMS["dense"]["bias"]) - rounded)


@pytest.mark.slow
def test_a_step_in_a_loop_keeps_structure_and_dtypes():
    tx = with_policy(optax.adam(1e-2), Policy("bf16", master="f32", opt_state={"mu": "bf16", "nu": "dynamic8"}))
    params = drawn(0, "bfloat16")

    def body(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), ()

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADIENTS)
    carry = (params, tx.init(params))
    scanned, _ = jax.eval_shape(lambda *arguments: jax.lax.scan(body, *arguments), carry, stacked)
    chex.assert_trees_all_equal_shapes_and_dtypes(scanned, carry)


class TestRules:
    def test_state_rules_are_checked_by_init(self):
        policy = Policy.loads("opt_state:\n  mu: bf16\n  nue: f32\n", "p.yaml")
        with pytest.raises(
            UnmatchedRule, match=r"p.yaml:3: 'nue' \(opt_state\) matches none of 6 state arrays.*\n  nearest: nu"
        ):
            with_policy(optax.adam(1.0), policy).init(PARAMS)
        policy = Policy(opt_state={"mu": "bf16", "mu/**/bias": "f32"})
        with pytest.raises(ShadowedRule, match=r"'mu/\*\*/bias' \(opt_state\) decides nothing.*'mu'"):
            with_policy(optax.adam(1.0), policy).init(PARAMS)
        with pytest.raises(UnmatchedRule, match="matches none of 0 state arrays"):
            with_policy(optax.sgd(1.0), Policy(opt_state={"mu": "bf16"})).init(PARAMS)

    @pytest.mark.parametrize("slot", ["grads", "master"])
    def test_rules_of_gradients_and_masters_are_checked_by_init(self, slot):
        policy = Policy.loads(f"{slot}:\n  kernal: bf16\n", "p.yaml")
        with pytest.raises(UnmatchedRule, match=rf"p.yaml:2: 'kernal' \({slot}\) matches none of 3.*\n.*dense/kernel"):
            with_policy(optax.adam(1.0), policy).init(PARAMS)

    def test_a_rule_for_what_is_frozen_has_an_effect_elsewhere(self):
        policy = Policy(grads={"embedding": "f32"}, master={"embedding": "f32"}, opt_state={"mu/**/embedding": "f32"})
        tx = with_policy(optax.adam(1e-2), policy)
        for frozen in (None, optax.MaskedNode()):
            state = tx.init(PARAMS | {"embed": {"embedding": frozen}})
            assert jax.tree.leaves(state.master) == []
            assert jax.tree.leaves(state.inner[0].mu["embed"]) == []

    def test_linear_codes_of_second_moments_are_refused_whatever_rule_asks_for_them(self):
        policy = Policy.loads("opt_state:\n  mu: f32\n  '*/**/kernel': int8\n", "p.yaml")
        with pytest.raises(
            InvalidPolicy, match=r"p.yaml:3: '\*/\*\*/kernel' \(opt_state\) applies to nu/dense/kernel: int8"
        ):
            with_policy(optax.adam(1.0), policy).init(PARAMS)
        with pytest.raises(InvalidPolicy, match=r"'default' \(opt_state\) applies to v_row/dense/bias"):
            with_policy(optax.adafactor(1.0, min_dim_size_to_factor=32), Policy(opt_state="int8")).init(PARAMS)

    def test_arguments(self):
        with pytest.raises(InvalidPolicy, match=r"rounding: expected 'nearest' or 'stochastic', found 'up'."):
            with_policy(optax.sgd(1.0), Policy(), rounding="up")
        with pytest.raises(InvalidPolicy, match=r"scales: expected 'fresh' or 'delayed', found 'old'."):
            with_policy(optax.sgd(1.0), Policy(), scales="old")
        with pytest.raises(InvalidPolicy, match=r"'bf17' is neither a preset"):
            with_policy(optax.sgd(1.0), "bf17")

    def test_a_policy_is_anything_that_get_policy_accepts(self):
        params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
        state = with_policy(optax.sgd(1.0), {"master": "f32"}).init(params)
        assert state.master["kernel"].dtype == jnp.float32
        assert with_policy(optax.sgd(1.0), "bf16").init(params).master == {"kernel": None}


class TestEightBitState:
    def test_the_hessian_of_sophia_has_a_sign(self):
        def made(tx):
            return jax.eval_shape(with_policy(tx, Policy(opt_state="dynamic8")).init, {"kernel": jnp.ones((64, 64))})

        states = [made(tx).inner[0] for tx in (optax.contrib.sophia(1.0), optax.adam(1.0))]
        assert [state.nu["kernel"].unsigned for state in states] == [False, True]

    def test_small_arrays_and_embeddings_stay_wide_unless_a_path_names_them(self):
        params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64), "embedding": jnp.ones((64, 80))}
        policy = Policy(opt_state={"nu/**/{embedding,bias}": "f8_e4m3fn", "mu": "dynamic8", "default": "dynamic8"})
        (adam, _) = jax.eval_shape(with_policy(optax.adam(1.0), policy).init, params).inner
        assert str(adam.mu["kernel"].format) == "dynamic8"
        assert adam.mu["bias"].dtype == adam.mu["embedding"].dtype == jnp.float32
        assert {name: str(x.format) for name, x in adam.nu.items()} == {
            "kernel": "dynamic8", "bias": "f8_e4m3fn", "embedding": "f8_e4m3fn"
        }  # fmt: skip

    def test_fields_that_are_never_negative_have_unsigned_codes(self):
        params = {"kernel": jnp.ones((96, 64))}
        for tx, fields in (
            (optax.adam(1.0), {"mu": False, "nu": True}),
            (optax.adan(1.0), {"m": False, "v": False, "n": True}),  # Adan's v is a mean of differences
            (optax.adafactor(1.0, factored=False), {"v": True}),
        ):
            tx = with_policy(tx, Policy(opt_state={"*/**/kernel": "dynamic8"}))
            state = jax.eval_shape(tx.init, params)
            found = dict(_arrays(state.inner))
            assert {field: found[field].unsigned for field in fields} == fields

    @pytest.mark.slow
    @pytest.mark.parametrize("format", ["dynamic8", "f8_e4m3fn"])
    def test_adam_follows_float32_closely(self, format):
        target = jax.random.normal(jax.random.key(0), (64, 80))

        def losses(policy):
            tx, params = with_policy(optax.adam(0.05), policy), {"kernel": jnp.zeros((64, 80))}

            def body(carry, _):
                params, state = carry
                loss, gradient = jax.value_and_grad(lambda p: jnp.mean((p["kernel"] - target) ** 2))(params)
                updates, state = tx.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), loss

            return jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), length=100)[1])()

        wide, narrow = losses(Policy()), losses(Policy(opt_state=format))
        assert float(wide[-1]) < 1e-3 * float(wide[0])
        # Adam's step is bounded by its learning rate: codes that lost small second moments would overshoot by far.
        assert float(narrow[-1]) < 1e-3 * float(wide[0])
        assert float(narrow.max()) <= float(wide[0])


def _arrays(state):
    from perparam.policies.training.state_formats import StateArray

    flat = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, StateArray))[0]
    return [(keys[-2].name, x) for keys, x in flat if isinstance(x, StateArray)]


def test_the_state_is_no_parameter_of_a_train_state():
    from perparam.policies.trees import parameters

    state = with_policy(optax.adam(1.0), Policy()).init(PARAMS)
    assert isinstance(state, PolicyState)
    assert parameters({"params": PARAMS, "state": state}).keys() == parameters({"params": PARAMS}).keys()
