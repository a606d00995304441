"""`next_token_loss`: that of the logits a model returns, for every head, and which tokens count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from perparam import Policy
from perparam.models import Linear, Qwen3, Qwen3Config
from perparam.models.losses import _targets
from perparam.policies.errors import InvalidTokens, UnsupportedTask
from perparam.training import accumulate, add_lora, add_proxies, label_count, next_token_loss, pack, value_and_grad

FLOAT32_ERROR = 2e-5
"""Of losses: sums of 61 exponentials in two orders, 2 * (61 + 3 * 4) * 2**-24 = 9e-6, and logits that differ by sums of
24 products in two orders, 2 * 24 * 2**-24 * 4 = 1e-5.  Of gradients: likewise, relative to the largest."""

SHAPE = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
FP8 = {"params": {"kernel": "f8_e4m3fn", "embedding": "f8_e4m3fn", "scale_inv": None, "default": "f32"}}
IDS = np.random.default_rng(0).integers(0, 61, (2, 7))


def build(policy=None, **changes):
    return Qwen3(Qwen3Config(**SHAPE | changes), policy=policy, rngs=nnx.Rngs(0))


def plain(model, ids, **call):
    """The mean of optax's losses of the whole logits."""
    logits = model(ids, **call).astype(jnp.float32)[:, :-1]
    with jax.numpy_dtype_promotion("standard"):
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(ids)[:, 1:]).mean()


POLICIES = {
    "f32": None,
    "FP8 weight-only": Policy(**FP8, compute="f32", block=(16, 24)),
    "FP8 dynamic": Policy(
        **FP8, compute={"kernel": "f8_e4m3fn", "embedding": "f8_e4m3fn", "default": "f32"}, block=(16, 24)
    ),
}


@pytest.mark.parametrize(
    ("policy", "tied"),
    [
        ("FP8 weight-only", False),
        pytest.param("f32", True, marks=pytest.mark.slow),
        pytest.param("FP8 dynamic", True, marks=pytest.mark.slow),
        pytest.param("f32", False, marks=pytest.mark.thorough),
        pytest.param("FP8 weight-only", True, marks=pytest.mark.thorough),
        pytest.param("FP8 dynamic", False, marks=pytest.mark.thorough),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_logits(policy, tied):
    model = build(POLICIES[policy], tie_word_embeddings=tied)

    @nnx.jit
    def both(model):
        found = nnx.value_and_grad(lambda m: next_token_loss(m, IDS, chunk=20))(model)
        return *found, *nnx.value_and_grad(lambda m: plain(m, IDS))(model)

    loss, gradients, plain_loss, plain_gradients = both(model)
    assert loss.dtype == jnp.float32
    assert abs(loss - plain_loss) <= FLOAT32_ERROR
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True):
        assert jnp.abs(one - other).max() <= FLOAT32_ERROR * max(jnp.abs(other).max(), 1e-3)


THOROUGH = pytest.mark.thorough
ALL_FP8 = Policy(**FP8, compute="f32", block=(16, 24))
TRAINED = {
    "FP8": (ALL_FP8, {}),
    "FP8, tied": (ALL_FP8, {"tie_word_embeddings": True}),
    "FP8 dynamic": (POLICIES["FP8 dynamic"], {}),
    "int8": (Policy({**FP8["params"], "kernel": "int8"}, compute="f32", block=(16, 24)), {}),
}


def assert_equal_gradients(found, exact):
    found, exact = (dict(jax.tree_util.tree_leaves_with_path(each)) for each in (found, exact))
    assert found.keys() == exact.keys()
    for path, one in found.items():
        assert one.dtype == exact[path].dtype, path
        assert jnp.abs(one - exact[path]).max() <= FLOAT32_ERROR * max(jnp.abs(exact[path]).max(), 1e-3), path


@pytest.mark.parametrize(
    "name",
    [
        "FP8",
        pytest.param("FP8, tied", marks=pytest.mark.slow),
        *(pytest.param(n, marks=THOROUGH) for n in list(TRAINED)[2:]),
    ],
)
def test_a_narrow_head_that_is_trained_has_the_gradients_of_the_whole_logits(name):
    policy, changes = TRAINED[name]
    model = build(policy, **{"tie_word_embeddings": False} | changes)
    head = "embed_tokens/embedding" if changes else "lm_head/kernel"
    others = () if changes else ("norm/scale",)

    @nnx.jit
    def both(model):
        run = functools.partial(value_and_grad, trainable=(head, *others))
        return run(lambda m: next_token_loss(m, IDS, chunk=20))(model), run(lambda m: plain(m, IDS))(model)

    (loss, found), (exact_loss, exact) = both(model)
    assert abs(loss - exact_loss) <= FLOAT32_ERROR
    gradient = functools.reduce(lambda node, key: node[key], head.split("/"), found)
    assert (gradient.dtype, bool(gradient[...].all(axis=0).any())) == (jnp.float32, True)
    assert_equal_gradients(found, exact)


@pytest.mark.thorough
def test_so_it_has_in_trees_and_with_persistent_proxies():
    model = build(ALL_FP8, tie_word_embeddings=False)
    graphdef, state = nnx.split(model)

    @jax.jit
    def trees(state):
        run = functools.partial(value_and_grad, trainable="lm_head/kernel")
        return [run(lambda s, f=f: f(nnx.merge(graphdef, nnx.State(s))))(state)[1] for f in (chunks, whole)]

    def chunks(model):
        return next_token_loss(model, IDS, chunk=20)

    def whole(model):
        return plain(model, IDS)

    assert_equal_gradients(*trees(nnx.to_pure_dict(state)))
    add_proxies(model, "lm_head/kernel")
    assert_equal_gradients(*nnx.jit(lambda m: tuple(nnx.grad(f)(m) for f in (chunks, whole)))(model))


@pytest.mark.parametrize(
    "policy", [pytest.param("FP8 weight-only", marks=pytest.mark.slow), pytest.param("f32", marks=THOROUGH)]
)
def test_a_head_with_an_adapter_has_the_gradients_of_the_whole_logits(policy):
    policy = (
        None if policy == "f32" else Policy({"**/lora_{a,b}?": "f32", **FP8["params"]}, compute="f32", block=(16, 24))
    )
    model = add_lora(build(policy, tie_word_embeddings=False), 3, 6, "lm_head", rngs=nnx.Rngs(1))
    model.lm_head.lora_b[...] = jax.random.normal(jax.random.key(2), model.lm_head.lora_b.shape)

    @nnx.jit
    def both(model):
        state = nnx.DiffState(0, nnx.LoRAParam)
        return tuple(
            nnx.grad(f, argnums=state)(model)
            for f in (lambda m: next_token_loss(m, IDS, chunk=20), lambda m: plain(m, IDS))
        )

    found, exact = both(model)
    assert set(found["lm_head"]) == {"lora_a", "lora_b"}
    assert_equal_gradients(found, exact)


@pytest.mark.thorough
@pytest.mark.parametrize("params", ["f32", "f8_e4m3fn"])
def test_narrow_products_in_gradients_are_those_of_the_whole_logits(params):
    """Of 128 tokens and slices of 128 outputs, whose blocks are those of the whole: only sums are in another order.

    A sum in another order moves a few values to their neighbour in FP8, a relative 2**-3 of a block of 128: of the
    norm, 2**-3 / sqrt(128) for each value that moves.
    """
    policy = Policy(
        {"lm_head/kernel": params, "default": "f32"}, compute="f32", backward={"lm_head/kernel": "f8_e4m3fn"}
    )
    model = build(policy, vocab_size=300, tie_word_embeddings=False)
    ids = np.random.default_rng(3).integers(0, 300, (2, 64))

    @nnx.jit
    def grads(model):
        run = functools.partial(value_and_grad, trainable=("lm_head/kernel", "norm/scale"))
        return [run(f)(model)[1] for f in (lambda m: next_token_loss(m, ids, chunk=1), lambda m: plain(m, ids))]

    found, exact = grads(model)
    wide, _ = nnx.jit(lambda m: [value_and_grad(lambda m: plain(m, ids), trainable="lm_head/kernel")(m)[1], 0])(
        model.with_policy(policy.replace(backward=None))
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert jnp.linalg.norm(one - other) <= 2.0**-6 / 128**0.5 * jnp.linalg.norm(other)
    of_head = found["lm_head"]["kernel"][...]
    error = jnp.linalg.norm(of_head - wide["lm_head"]["kernel"][...]) / jnp.linalg.norm(of_head)
    assert 1e-3 < error < 2.0**-4  # e4m3 has a relative error of 2**-4


@pytest.mark.slow
def test_logits_are_rounded_to_the_output_dtype_first():
    model = build(Policy(compute="f32", output="bf16"))
    loss, exact = nnx.jit(lambda m: (next_token_loss(m, IDS, chunk=20), plain(m, IDS)))(model)
    unrounded = nnx.jit(lambda m: next_token_loss(m, IDS))(build(Policy(compute="f32")))
    assert abs(loss - exact) <= FLOAT32_ERROR < abs(loss - unrounded)


class WithBias(Linear):
    """A head with a bias, which transformers has not."""

    def __init__(self, *sizes, use_bias=False, **others):
        super().__init__(*sizes, use_bias=True, **others)
        self.bias[...] = jnp.arange(self.bias.shape[0], dtype=jnp.float32) / 10


@pytest.mark.slow
def test_a_subclass_of_linear_is_sliced_with_its_bias():
    model = Qwen3(Qwen3Config(**SHAPE), linear=WithBias, rngs=nnx.Rngs(0))
    loss, exact = nnx.jit(lambda m: (next_token_loss(m, IDS, chunk=20), plain(m, IDS)))(model)
    assert abs(loss - exact) <= FLOAT32_ERROR


# Which tokens count.


def targets(ids, **call):
    return _targets(None, ids, call.get("attention_mask"), call.get("labels"), call.get("segment_ids")).tolist()


def test_the_target_is_the_next_token_of_the_same_sequence():
    ids = [[5, 6, 7, 8, 9]]
    assert targets(ids) == [[6, 7, 8, 9, -100]]
    assert targets(ids, attention_mask=[[0, 1, 1, 1, 0]]) == [[-100, 7, 8, -100, -100]]
    assert targets(ids, attention_mask=[[1, 1, 0, 1, 1]]) == [[6, -100, -100, 9, -100]]
    assert targets(ids, segment_ids=[[1, 1, 2, 2, 0]]) == [[6, -100, 8, -100, -100]]
    assert targets(ids, labels=[[1, 2, -100, 4, 0]]) == [[2, -100, 4, 0, -100]]
    assert targets(ids, labels=[[1, 2, 3, 4, 0]], segment_ids=[[1, 1, 2, 2, 2]]) == [[2, -100, 4, 0, -100]]
    for call in ({}, {"attention_mask": [[0, 1, 1, 1, 0]]}, {"segment_ids": [[1, 1, 2, 2, 0]]}):
        assert int(label_count(ids, **call)) == np.sum(np.array(targets(ids, **call)) != -100)


@pytest.mark.slow
def test_the_loss_of_packed_rows_is_that_of_their_sequences():
    model, rng = build(), np.random.default_rng(1)
    sequences = [rng.integers(0, 61, length) for length in (6, 3, 4, 7)]
    batch = pack(sequences, 9)
    rows = np.array([[*ids, *[0] * (7 - len(ids))] for ids in sequences])
    mask = np.arange(7) < [[len(ids)] for ids in sequences]
    packed = nnx.jit(lambda m: next_token_loss(m, batch.input_ids, segment_ids=batch.segment_ids))(model)
    assert abs(packed - nnx.jit(lambda m: next_token_loss(m, rows, mask))(model)) <= FLOAT32_ERROR
    assert label_count(batch.input_ids, segment_ids=batch.segment_ids) == label_count(rows, mask) == 16


@pytest.mark.thorough
def test_without_a_token_that_counts_the_loss_is_zero():
    loss, gradients = nnx.jit(nnx.value_and_grad(lambda m: next_token_loss(m, IDS, np.zeros_like(IDS))))(build())
    assert loss == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_accumulated_by_the_number_of_labels_it_is_the_loss_of_the_whole_batch():
    model = build()
    ids = np.random.default_rng(2).integers(0, 61, (6, 7))
    mask = np.arange(7) < [[7], [2], [5], [0], [3], [1]]
    step = nnx.value_and_grad(lambda *call: next_token_loss(*call))  # NNX takes no keyword-only arguments
    whole = nnx.jit(step)(model, ids, mask)
    parts = nnx.jit(accumulate(step, 3, weight=label_count))(model, ids, mask)
    assert abs(whole[0] - parts[0]) <= FLOAT32_ERROR
    for one, other in zip(jax.tree.leaves(parts[1]), jax.tree.leaves(whole[1]), strict=True):
        assert jnp.abs(one - other).max() <= FLOAT32_ERROR * jnp.abs(other).max()
    unweighted = nnx.jit(accumulate(step, 3))(model, ids, mask)
    assert abs(whole[0] - unweighted[0]) > 100 * FLOAT32_ERROR


# Errors.


def test_labels_that_do_not_fit_are_errors():
    model = build()
    with pytest.raises(InvalidTokens, match=r"labels: expected the shape of input_ids, \(2, 7\), found \(2, 6\)"):
        next_token_loss(model, IDS, labels=IDS[:, :6])
    with pytest.raises(InvalidTokens, match=r"segment_ids: expected no attention_mask\. Mark padding with 0"):
        label_count(IDS, np.ones_like(IDS), segment_ids=np.ones_like(IDS))
    labels = IDS.copy()
    labels[1, 3] = 61
    with pytest.raises(InvalidTokens, match=r"labels\[1, 3\] is 61, outside the vocabulary of 61. Write -100"):
        next_token_loss(model, IDS, labels=labels)


def test_a_model_without_a_language_model_head_is_an_error():
    with pytest.raises(UnsupportedTask, match="next_token_loss needs a language-model head"):
        next_token_loss(build(task="feature_extraction"), IDS)


def test_a_model_of_another_kind_is_an_error():
    other = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(UnsupportedTask, match=r"expected a Decoder, .* found Linear\. Pass .*chunked_cross_entropy"):
        next_token_loss(other, IDS)


def test_a_head_whose_outputs_cannot_be_sliced_is_an_error():
    class Gated(Linear):
        def __init__(self, *sizes, **others):
            super().__init__(*sizes, **others)
            self.gate = nnx.Param(jnp.ones(sizes[1]))

    model = Qwen3(Qwen3Config(**SHAPE), linear=Gated, rngs=None)
    with pytest.raises(
        UnsupportedTask, match=r"lm_head: a Gated with the parameters gate, kernel cannot be computed in"
    ):
        next_token_loss(model, IDS)
