"""`Qwen3.observe`: what is captured is what modules compute, what is changed goes on, and unused it is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import fields, relative_error, tensors, write
from flax import nnx

import perparam
from perparam import Policy
from perparam.models import taps
from perparam.policies import UnmatchedRule, UnsupportedCast
from perparam.policies.errors import InvalidPolicy, InvalidTokens

FLOAT32_ERROR = 1e-5
"""As in test_qwen3: the same sums in another order."""

IDS = np.array([[3, 14, 15, 9, 26, 5, 35, 8], [60, 60, 9, 7, 1, 2, 3, 4]], np.int32)
MASK = np.array([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]], bool)
WINDOW = 3  # of the second layer
OTHERS = [
    "embed_tokens",
    "layers/0",
    "layers/0/mlp",
    "layers/0/self_attn",
    "layers/1",
    "layers/1/mlp",
    "layers/1/self_attn",
    "norm",
]
WEIGHTS = ["layers/0/self_attn/weights", "layers/1/self_attn/weights"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = fields(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    folder = write(tmp_path_factory.mktemp("small"), config, tensors(config))
    return perparam.load_model(folder, Policy(compute="f32"))


@pytest.fixture(scope="module")
def plain(model):
    return np.asarray(model(IDS, MASK))


@pytest.fixture(scope="module")
def observed(model):
    return model.observe(IDS, MASK, capture="**")


# What is captured.


@pytest.mark.slow
def test_everything_that_has_a_name_is_captured(observed):
    assert sorted(observed[1]) == sorted(OTHERS + WEIGHTS)


def test_the_logits_are_those_of_a_call(observed, plain):
    np.testing.assert_array_equal(observed[0], plain)


def test_modules_compute_what_is_captured(model, observed):
    seen = observed[1]
    np.testing.assert_array_equal(seen["embed_tokens"], model.embed_tokens(jnp.where(MASK, IDS, 0)))
    stream = seen["embed_tokens"]
    for i, layer in enumerate(model.layers):
        stream = stream + seen[f"layers/{i}/self_attn"]
        mlp = layer.mlp(layer.post_attention_layernorm(stream))
        assert relative_error(seen[f"layers/{i}/mlp"], mlp) <= FLOAT32_ERROR
        stream = stream + seen[f"layers/{i}/mlp"]
        assert relative_error(seen[f"layers/{i}"], stream) <= FLOAT32_ERROR
    np.testing.assert_array_equal(model.hidden(IDS, MASK)[0], seen["layers/1"])
    assert relative_error(seen["norm"], model.norm(seen["layers/1"])) <= FLOAT32_ERROR
    assert relative_error(observed[0], model.lm_head(seen["norm"])) <= FLOAT32_ERROR


def test_weights_are_shares_of_what_a_query_sees(model, observed):
    for i, path in enumerate(WEIGHTS):
        weights = np.asarray(observed[1][path])
        assert weights.shape == (2, 4, 8, 8)
        assert weights.dtype == np.float32
        slots = np.arange(8)
        seen = np.tril(np.ones((8, 8), bool))[None] & MASK[:, None]
        if i == 1:
            seen &= slots[:, None] - slots < WINDOW
        for row in range(2):
            real = weights[row][:, MASK[row]]
            np.testing.assert_allclose(real.sum(axis=-1), 1, rtol=0, atol=1e-6)
            assert (real[:, ~seen[row][MASK[row]]] == 0).all()
            assert (real[:, seen[row][MASK[row]]] > 0).all()


def test_weights_mix_values_into_what_attention_adds(model, observed):
    layer = model.layers[0].self_attn
    x = model.layers[0].input_layernorm(observed[1]["embed_tokens"])
    values = np.asarray(layer.v_proj(x)).reshape(2, 8, 2, 18).repeat(2, axis=2)
    mixed = np.einsum("bhts,bshd->bthd", np.asarray(observed[1][WEIGHTS[0]]), values).reshape(2, 8, 72)
    expected = layer.o_proj(jnp.asarray(mixed))
    assert relative_error(observed[1]["layers/0/self_attn"], expected, MASK) <= FLOAT32_ERROR


@pytest.mark.parametrize(
    ("capture", "paths"),
    [
        ("layers/*/mlp", ["layers/0/mlp", "layers/1/mlp"]),
        ("layers/0/self_attn/weights", ["layers/0/self_attn/weights"]),
        ("weights", WEIGHTS),
        ("mlp", ["layers/0/mlp", "layers/1/mlp"]),
        (["norm", "embed_tokens"], ["embed_tokens", "norm"]),
        (("layers/{0,1}", "layers/1/*"), ["layers/0", "layers/1", "layers/1/mlp", "layers/1/self_attn"]),
        ((), []),
    ],
    ids=str,
)
def test_patterns_choose_what_is_captured(model, observed, capture, paths):
    logits, seen = model.observe(IDS, MASK, capture=capture)
    assert sorted(seen) == paths
    for path in paths:
        np.testing.assert_array_equal(seen[path], observed[1][path])
    np.testing.assert_array_equal(logits, observed[0])


def test_it_works_in_compiled_functions(model, observed):
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, ids):
        found = nnx.merge(graphdef, state).observe(ids, MASK, capture=["layers/*/mlp", "weights"])
        return found

    for _ in range(2):
        logits, seen = run(state, IDS)
        assert sorted(seen) == sorted(["layers/0/mlp", "layers/1/mlp", *WEIGHTS])
        assert relative_error(logits, observed[0], MASK) <= FLOAT32_ERROR
        for path, value in seen.items():
            if path not in WEIGHTS:
                assert relative_error(value, observed[1][path], MASK) <= FLOAT32_ERROR
    np.testing.assert_allclose(seen[WEIGHTS[0]], observed[1][WEIGHTS[0]], rtol=0, atol=FLOAT32_ERROR)


@pytest.mark.slow
def test_gradients_go_through_what_is_changed(model):
    """The derivative by a value is that of adding to it: of what the second layer's window sees."""

    def loss(added):
        logits, _ = model.observe(IDS[:1], intervene={"layers/0/mlp": lambda value: value + added})
        return logits[0, -1, 7]

    found = np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((1, 8, 56))))
    np.testing.assert_array_equal(np.abs(found).sum(axis=-1)[0] > 0, np.arange(8) >= 8 - WINDOW)


# What is changed.


def test_a_zeroed_mlp_is_one_without_its_last_weights(model, plain):
    found, seen = model.observe(IDS, MASK, intervene={"layers/0/mlp": jnp.zeros_like}, capture="layers/0/mlp")
    graphdef, state = nnx.split(model)
    without = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    kernel = without.layers[0].mlp.down_proj.kernel
    kernel.set_value(jnp.zeros_like(kernel.get_value()))
    np.testing.assert_array_equal(found, without(IDS, MASK))
    assert relative_error(found, plain, MASK) > 1e-2
    assert not np.asarray(seen["layers/0/mlp"]).any()  # what is captured is what went on
    np.testing.assert_array_equal(model(IDS, MASK), plain)


def test_a_stream_can_be_patched_with_another_ones(model):
    """With the other prompt's stream after the last layer, the logits are the other prompt's."""
    other = IDS[::-1].copy(), MASK[::-1].copy()
    logits, seen = model.observe(*other, capture="layers/1")
    found, _ = model.observe(IDS, MASK, intervene={"layers/1": lambda value: seen["layers/1"]})
    np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize("path", OTHERS)
def test_what_goes_on_is_what_the_function_returns(model, plain, path):
    given = []

    def change(value):
        given.append(value)
        return 1.5 * value + 0.25

    found, seen = model.observe(IDS, MASK, capture=path, intervene={path: change})
    assert len(given) == 1
    np.testing.assert_array_equal(seen[path], 1.5 * given[0] + 0.25)
    assert relative_error(found, plain, MASK) > 1e-3
    same, _ = model.observe(IDS, MASK, intervene={path: lambda value: value})
    np.testing.assert_array_equal(same, plain)


def test_one_pattern_changes_all_it_matches_and_several_follow_one_another(model):
    calls = []

    def first(value):
        calls.append("first")
        return value * 0

    def second(value):
        calls.append("second")
        assert not np.asarray(value).any()
        return value + 1

    _, seen = model.observe(IDS, MASK, capture="mlp", intervene={"layers/*/mlp": first, "mlp": second})
    assert calls == ["first", "second"] * 2
    assert all((np.asarray(value) == 1).all() for value in seen.values())


# What is refused.


@pytest.mark.parametrize("pattern", ["layers/2/mlp", "nothing", "layers/0/mlp/down_proj", "model/layers/0", "lm_head"])
def test_a_pattern_that_matches_nothing_is_refused(model, pattern):
    with pytest.raises(UnmatchedRule, match=rf"'{pattern}'.* matches no value of this model\. Its values"):
        model.observe(IDS, MASK, capture=["norm", pattern])
    with pytest.raises(UnmatchedRule, match=rf"'{pattern}'.* matches no value of this model\. Its values"):
        model.observe(IDS, MASK, intervene={pattern: lambda value: value})


@pytest.mark.parametrize(
    ("change", "found"), [(lambda value: None, "NoneType"), (lambda value: value[0], r"\(8, \d+\)")]
)
def test_a_function_that_returns_no_such_array_is_refused(model, change, found):
    with pytest.raises(
        UnsupportedCast, match=rf"layers/0/mlp: the function of '\*\*/mlp' .* returned {found}, expected an"
    ):
        model.observe(IDS, MASK, intervene={"**/mlp": change})


def test_weights_cannot_be_changed(model):
    with pytest.raises(UnmatchedRule, match="weights"):
        model.observe(IDS, MASK, intervene={"layers/0/self_attn/weights": lambda value: value})


def test_what_is_no_pattern_is_refused(model):
    with pytest.raises(InvalidPolicy, match="empty component"):
        model.observe(IDS, MASK, capture="layers//mlp")


def test_tokens_are_checked_as_in_a_call(model):
    with pytest.raises(InvalidTokens, match=r"input_ids\[0, 0\] is 61"):
        model.observe([[61]], capture="norm")


# What it costs.


def jaxpr(model, ids=IDS):
    graphdef, state = nnx.split(model)
    return str(jax.make_jaxpr(lambda state, ids: nnx.merge(graphdef, state)(ids, MASK))(state, ids))


def test_unused_it_costs_nothing(model, plain):
    before = jaxpr(model)
    model.observe(IDS, MASK, capture="**", intervene={"mlp": lambda value: 2 * value})
    assert jaxpr(model) == before
    np.testing.assert_array_equal(model(IDS, MASK), plain)


def test_after_an_error_nothing_is_left_behind(model, plain):
    def fails(value):
        raise RuntimeError("mine")

    before = jaxpr(model)
    for intervene in ({"layers/1/mlp": fails}, {"nothing": fails}):
        with pytest.raises((RuntimeError, UnmatchedRule)):
            model.observe(IDS, MASK, intervene=intervene)
        assert taps._active.get() is None
        assert jaxpr(model) == before
    np.testing.assert_array_equal(model(IDS, MASK), plain)


def test_observing_captures_only_what_is_asked_for(model):
    """Weights that nobody asks for are in no program."""
    graphdef, state = nnx.split(model)

    def text(capture):
        return str(jax.make_jaxpr(lambda s: nnx.merge(graphdef, s).observe(IDS, MASK, capture=capture))(state))

    assert text("weights").count("exp") > text("norm").count("exp")


def test_a_model_inside_an_intervention_is_another_one(model, plain):
    """A function that runs the model itself sees no taps of the call it stands in, and leaves them in place."""
    inner = []

    def change(value):
        inner.append(model.observe(IDS, MASK, capture="layers/0/mlp")[1])
        return value

    logits, seen = model.observe(IDS, MASK, capture=["layers/0/mlp", "norm"], intervene={"layers/0/mlp": change})
    assert list(inner[0]) == ["layers/0/mlp"]
    assert sorted(seen) == ["layers/0/mlp", "norm"]
    np.testing.assert_array_equal(logits, plain)


@pytest.mark.slow
def test_generation_within_a_tapped_context_is_the_same(model):
    """Programs that are compiled know nothing of taps."""
    tokens = perparam.generate(model, IDS, MASK, 3, eos_token_id=())
    with taps.using(taps.Taps(capture="norm")):
        np.testing.assert_array_equal(perparam.generate(model, IDS, MASK, 3, eos_token_id=()), tokens)
