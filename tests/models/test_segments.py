"""Packed rows: first-fit loses nothing, and a sequence in a row with others has the logits that it has alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from perparam.models import Qwen3, Qwen3Config, attention, cpu_attention, flash, taps
from perparam.models.kv_cache import EMPTY, LayerCache
from perparam.models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig
from perparam.models.segments import segment_positions
from perparam.policies.errors import InvalidTokens, UnsupportedTask
from perparam.policies.matmul import matmul_override
from perparam.training import pack

FLOAT32_ERROR = 1e-6
"""Logits are sums of 32 products in the last of 2 layers, of another order in attention: sqrt(32) * 2**-24 a layer."""

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
WINDOW = {"windows": (None, 3)}
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 61, length) for length in (5, 3, 7, 1, 4, 6)]


@pytest.fixture(scope="module")
def model():
    return Qwen3(Qwen3Config(**SHAPE, **WINDOW), rngs=nnx.Rngs(0))


def in_place(batch):
    """(row, columns, ids) of every sequence of a packed batch."""
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, segments.max() + 1):
            columns = np.flatnonzero(segments == segment)
            yield row, columns, batch.input_ids[row, columns]


# Packing.


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), max_size=12), st.integers(9, 20))
def test_packing_loses_no_token_and_cuts_no_sequence(sequences, length):
    batch = pack(sequences, length)
    found = sorted(ids.tolist() for _, _, ids in in_place(batch))
    assert found == sorted(sequences)
    for row, columns, ids in in_place(batch):
        assert (np.diff(columns) == 1).all()
        assert batch.positions[row, columns].tolist() == list(range(len(ids)))
    padding = batch.segment_ids == 0
    assert not batch.input_ids[padding].any()
    assert not batch.positions[padding].any()
    assert all(array.dtype == np.int32 and array.shape == padding.shape for array in vars(batch).values())
    # First-fit: no sequence of a later row fits into an earlier one.
    room = padding.sum(axis=1)
    assert all(len(ids) > room[:row].max(initial=0) for row, _, ids in in_place(batch))


@pytest.mark.parametrize("bad", [[], list(range(10)), [[1, 2]]])
def test_a_sequence_that_fits_no_row_is_an_error(bad):
    with pytest.raises(
        InvalidTokens, match=r"sequences\[1\]: expected 1 to 9 token ids, found shape .*cut longer ones"
    ):
        pack([[1], np.array(bad, int)], 9)


def test_a_sequence_is_of_integers():
    with pytest.raises(InvalidTokens, match=r"sequences\[0\]: expected integers, found float"):
        pack([[1.5]], 9)


@pytest.mark.parametrize("bad", [-1, 2**31, 2**64 - 1])
def test_a_token_id_is_from_0_to_the_largest_int32(bad):
    with pytest.raises(InvalidTokens, match=rf"sequences\[1\]\[2\] is {bad}, expected a token id from 0 to 2147483647"):
        pack([[1, 2], np.array([3, 4, bad], np.uint64 if bad > 2**63 else np.int64), [5]], 9)


@pytest.mark.parametrize("length", [4.0, 0, "9"])
def test_a_length_is_a_positive_integer(length):
    with pytest.raises(InvalidTokens, match=r"length: expected a positive number of tokens, found .* Write 2048"):
        pack([[1]], length)


def test_no_sequence_gives_no_row():
    assert pack([], np.int64(4)).input_ids.shape == (0, 4)


# Positions.


def test_positions_start_again_with_each_segment_and_padding_is_empty():
    queries, slots, segments = segment_positions(jnp.array([[0, 3, 3, 3, 1, 1, 0, 2]]))
    assert queries.tolist() == [[0, 0, 1, 2, 0, 1, 0, 0]]
    assert slots.tolist() == [[EMPTY, 0, 1, 2, 0, 1, EMPTY, 0]]
    assert segments.tolist() == [[0, 1, 1, 1, 2, 2, 3, 4]]


# The model.


def alone(model):
    """The logits of each sequence alone, by its ids: one row each, with padding at the end."""
    rows = pack([[*ids, *[0] * (9 - len(ids))] for ids in SEQUENCES], 9)
    mask = np.arange(9) < [[len(ids)] for ids in SEQUENCES]
    logits = np.asarray(nnx.jit(lambda model, *call: model(*call))(model, rows.input_ids, mask))
    return {tuple(ids): row[: len(ids)] for ids, row in zip(SEQUENCES, logits, strict=True)}


@nnx.jit
def packed_call(model, ids, segments):
    return model(ids, segment_ids=segments)


def assert_as_alone(model):
    batch, expected = pack(SEQUENCES, 9), alone(model)
    assert len(batch.input_ids) < len(SEQUENCES)
    packed = np.asarray(packed_call(model, batch.input_ids, batch.segment_ids))
    for row, columns, ids in in_place(batch):
        one = expected[tuple(ids)]
        np.testing.assert_allclose(packed[row, columns], one, rtol=0, atol=FLOAT32_ERROR * np.abs(one).max())


def test_sequences_in_one_row_have_the_logits_that_they_have_alone(model):
    assert_as_alone(model)


def test_a_sequence_has_the_same_bits_whatever_is_before_it(model):
    rows = np.array([SEQUENCES[0][:3].tolist() + SEQUENCES[2][:6].tolist(), [7] * 3 + SEQUENCES[2][:6].tolist()])
    logits = np.asarray(packed_call(model, rows, np.array([[1] * 3 + [2] * 6] * 2)))
    assert (logits[0, 3:] == logits[1, 3:]).all()
    assert (logits[0, :3] != logits[1, :3]).any()


@pytest.mark.slow
def test_the_gradient_of_one_sequence_is_zero_in_the_others(model):
    batch = pack(SEQUENCES, 9)
    assert batch.segment_ids[0].tolist() == [1] * 5 + [2] * 3 + [3]

    @jax.jit
    @jax.grad
    def of_the_second(embeddings):
        changed = nnx.clone(model)
        changed.embed_tokens = lambda ids: embeddings
        return model.logits(changed.hidden(batch.input_ids, segment_ids=batch.segment_ids)[0])[0, 5:8].sum()

    gradient = np.array(of_the_second(model.embed_tokens(jnp.asarray(batch.input_ids))))
    assert gradient[0, 5:8].any(axis=-1).all()
    gradient[0, 5:8] = 0
    assert not gradient.any()


@pytest.mark.slow
def test_queries_of_long_rows_are_processed_in_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 21, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    ids = jnp.repeat(jnp.array([[1, 2, 0], [1, 2, 3]]), 7, axis=1)
    queries, slots, segments = segment_positions(ids)

    def run():
        @jax.jit
        def value_and_gradients(*qkv):
            def mixed(q, k, v):
                cache = LayerCache.of(k, v, np.dtype(np.float32))
                return attention.attend(q, cache, queries, slots, 4, segments=segments)[0]

            result, pull = jax.vjp(mixed, *qkv)
            return result, pull(jnp.cos(result))

        return value_and_gradients(q, k, v)

    whole = run()
    monkeypatch.setattr(attention, "SCORES", 1)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(run()), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=FLOAT32_ERROR * np.abs(other).max())


def test_no_kernel_is_called_that_ignores_segments(model, monkeypatch):
    def fail(*_):
        raise AssertionError("called")

    for module, names in ((cpu_attention, ["attend"]), (flash, ["attend", "attend_masked"])):
        for name in names:
            monkeypatch.setattr(module, name, fail)
    ids = np.arange(flash.LEAST)[None] % 61
    segments = np.repeat([[1, 2]], flash.LEAST // 2, axis=1)
    graphdef, state = nnx.split(model.with_policy("bf16"))

    def run(state, segments):
        return nnx.merge(graphdef, state)(ids, segment_ids=segments)

    jax.jit(run).trace(state, segments)
    with matmul_override(target="cuda:9.0"):
        jax.jit(run).trace(state, segments)
    with pytest.raises(AssertionError, match="called"):  # which kernels otherwise are
        jax.jit(run).trace(state, None)


def test_attention_weights_do_not_cross_segments(model):
    segments = [[1, 1, 2, 2, 2, 0]]
    weights = jax.jit(
        lambda ids: _observed(model, ids, segments),
    )(np.array([[3, 1, 4, 1, 5, 9]]))
    same = np.equal.outer(segments[0], segments[0])
    assert not np.asarray(weights)[:, :, :5][:, :, ~same[:5]].any()
    np.testing.assert_allclose(np.asarray(weights)[:, :, :5].sum(-1), 1, rtol=FLOAT32_ERROR)


def _observed(model, ids, segments):
    values = taps.Taps("layers/0/self_attn/weights")
    with taps.using(values):
        model(ids, segment_ids=segments)
    return values.captured["layers/0/self_attn/weights"]


@pytest.mark.slow
def test_experts_are_those_of_the_sequence_alone():
    config = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model = Qwen3Moe(config, rngs=nnx.Rngs(1))
    assert_as_alone(model)


@pytest.mark.slow
def test_hidden_states_and_classes_of_tokens_take_segments():
    for task in ("feature_extraction", "token_classification"):
        labels = ("a", "b") if task == "token_classification" else ()
        assert_as_alone(Qwen3(Qwen3Config(**SHAPE, task=task, id2label=labels), rngs=nnx.Rngs(0)))


# Errors.

IDS = np.zeros((1, 4), int)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([[1, 1, 2]], r"segment_ids: expected the shape of input_ids, \(1, 4\), found \(1, 3\)"),
        ([[1.0, 1, 2, 2]], "segment_ids: expected integers, found float"),
        ([[1, 1, -2, 0]], r"segment_ids\[0, 2\] is -2, expected 0 for padding and positive numbers"),
        (
            [[1, 2, 1, 1]],
            r"segment_ids\[0\]: segment 1 is in 2 places of the row, expected one. Number .*training.pack",
        ),
    ],
)
def test_segments_that_do_not_fit_are_errors(model, segments, message):
    with pytest.raises(InvalidTokens, match=message):
        model(IDS, segment_ids=np.array(segments))


def test_segments_replace_the_mask_and_cannot_be_continued(model):
    segments = np.ones((1, 4), int)
    message = "segment_ids: expected no attention_mask and no cache. Mark padding with 0"
    with pytest.raises(InvalidTokens, match=message):
        model(IDS, np.ones((1, 4)), segment_ids=segments)
    with pytest.raises(InvalidTokens, match=message):
        model.hidden(IDS, cache=model.empty_cache(1, 8), segment_ids=segments)
    _, cache = jax.jit(lambda segments: model.hidden(IDS, segment_ids=segments))(segments)
    with pytest.raises(InvalidTokens, match="the cache has room for 4 tokens and holds 4, found 1 more"):
        model.hidden(IDS[:, :1], cache=cache)


def test_a_task_with_one_output_for_each_row_refuses_segments():
    config = Qwen3Config(**SHAPE, task="sequence_classification", id2label=("a", "b"))
    with pytest.raises(
        UnsupportedTask, match=r"segment_ids: this model has one output for each row.*Pass one sequence"
    ):
        Qwen3(config, rngs=nnx.Rngs(0))(IDS, segment_ids=np.ones((1, 4), int))
