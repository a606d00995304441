"""Generation: the tokens of full passes, greedy and drawn, ends of rows, prefixes, and how often it compiles."""

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import fields, relative_error, tensors, write

import perparam
from perparam import Policy, Sampling, generate
from perparam.generation import GenerationConfig, prefill
from perparam.models import decode, generate_with_logprobs, generation
from perparam.models.generation import programs
from perparam.models.generation.keys import row_keys
from perparam.policies.errors import InvalidSampling, InvalidTokens

FLOAT32_ERROR = 1e-5
"""As in test_qwen3: the same sums in another order."""

NEW, PAD = 7, 60
IDS = np.array([[3, 14, 15, 9, 26, 5], [60, 60, 9, 7, 1, 2], [50, 51, 52, 53, 54, 60]])
MASK = np.array([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def load(folder, **changes):
    """One layer: programs are compiled here for half a dozen shapes."""
    config = fields(num_hidden_layers=1, **changes)
    return perparam.load_model(write(folder, config, tensors(config, seed=1)), Policy(compute="f32"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def endless(model):
    """The tokens that nothing ends."""
    return np.asarray(generate(model, IDS, MASK, NEW, eos_token_id=()))


def ended(tokens, eos, pad=PAD):
    """The rows of `tokens` with `pad` after the first of `eos`."""
    after = np.cumsum(np.isin(tokens, eos), axis=1) - np.isin(tokens, eos) > 0
    return np.where(after, pad, tokens)


# The tokens.


def test_tokens_are_those_of_full_passes_over_single_rows(model, endless):
    """A row left-padded, one right-padded and one whole, each beside itself alone, without a cache."""
    for ids, mask, found in zip(IDS, MASK, endless, strict=True):
        row = list(ids[mask == 1])
        for token in found:
            padded = np.array([row + [0] * (IDS.shape[1] + NEW - len(row))])  # one shape, one compilation
            logits = checkpoints.logits(model, padded, np.arange(padded.shape[1])[None] < len(row))
            assert token == logits[0, len(row) - 1].argmax()
            row.append(token)


def test_the_result_is_the_new_tokens_alone(endless):
    assert endless.shape == (3, NEW)
    assert endless.dtype == np.int32
    assert ((endless >= 0) & (endless < 61)).all()
    assert len(np.unique(endless)) > NEW  # not one token again and again, which mistakes would pass


def test_what_stands_in_the_padding_changes_nothing(model, endless):
    for outside in (0, -1, 10**6):
        ids = np.where(MASK == 1, IDS, outside)
        np.testing.assert_array_equal(generate(model, ids, MASK, NEW, eos_token_id=()), endless)


def test_without_a_mask_all_tokens_are_real(model, endless):
    np.testing.assert_array_equal(generate(model, IDS, None, NEW, eos_token_id=())[0], endless[0])
    assert not np.array_equal(generate(model, IDS, None, NEW, eos_token_id=())[1], endless[1])


def test_lists_and_jax_arrays_are_taken(model, endless):
    np.testing.assert_array_equal(generate(model, IDS.tolist(), MASK.tolist(), NEW, eos_token_id=()), endless)
    np.testing.assert_array_equal(
        generate(model, jnp.asarray(IDS), jnp.asarray(MASK == 1), NEW, eos_token_id=()), endless
    )


# Ends of rows.


@pytest.mark.parametrize("index", [0, 3, NEW - 1])
def test_an_eos_ends_its_row_and_pads_it(model, endless, index):
    eos = int(endless[0, index])
    found = generate(model, IDS, MASK, NEW, eos_token_id=eos)
    np.testing.assert_array_equal(found, ended(endless, eos))
    assert found[0, list(endless[0]).index(eos)] == eos


def test_any_of_several_eos_ends_a_row(model, endless):
    eos = [int(endless[0, 2]), int(endless[1, 4]), int(endless[2, 5])]
    np.testing.assert_array_equal(generate(model, IDS, MASK, NEW, eos_token_id=eos), ended(endless, eos))


@pytest.mark.slow
def test_the_configs_eos_is_the_default(tmp_path, endless):
    eos = int(endless[0, 1])
    np.testing.assert_array_equal(generate(load(tmp_path, eos_token_id=eos), IDS, MASK, NEW), ended(endless, eos))


def test_the_configs_eos_is_repeated_where_it_names_no_pad_id(tmp_path, endless):
    eos = int(endless[0, 1])
    model = load(tmp_path, eos_token_id=[eos], pad_token_id=None)
    np.testing.assert_array_equal(generate(model, IDS, MASK, NEW), ended(endless, eos, pad=eos))


def test_it_stops_when_all_rows_have_ended(model, endless):
    def drawn(eos):
        """How many tokens were drawn for the longest row."""
        (part,) = decode(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=eos), chunk=NEW)
        return part.tokens.shape[1]

    firsts = [int(row[1]) for row in endless]
    last = int(np.isin(endless, firsts).argmax(axis=1).max())
    assert drawn(firsts) == last + 1 < NEW
    assert drawn(()) == NEW


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens_are_the_first_ones(model, endless, count):
    found = generate(model, IDS, MASK, count, eos_token_id=())
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, endless[:, :count])


# What is told of answers.


def test_where_rows_ended_is_told(model, endless):
    eos = int(endless[0, 2])
    answer = generate_with_logprobs(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=eos, logprobs=None))
    np.testing.assert_array_equal(answer.tokens, ended(endless, eos))
    ends = np.isin(endless, eos)
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, NEW)
    np.testing.assert_array_equal(answer.lengths, lengths)
    np.testing.assert_array_equal(answer.ended, ends.any(axis=1))
    assert answer.ended[0]
    assert answer.logprobs is answer.top_tokens is answer.top_logprobs is None


def test_an_answer_that_ends_with_its_last_token_has_ended(model, endless):
    eos = int(endless[0, -1])
    assert eos not in endless[0, :-1]
    answer = generate_with_logprobs(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=eos, logprobs=None))
    assert (answer.lengths[0], answer.ended[0]) == (NEW, True)


def whole_passes(model, tokens, ids=IDS, mask=MASK):
    """Logits (b, new, vocabulary) that a model without a cache gives before each of `tokens` (b, new)."""
    every = np.concatenate([np.where(mask, ids, 0), tokens], axis=1)
    real = np.concatenate([mask, np.ones_like(tokens)], axis=1)
    logits = checkpoints.logits(model, every, real)
    new = tokens.shape[1]
    before = [
        np.concatenate([logits[row : row + 1, [last]], logits[row : row + 1, -new:-1]], axis=1)
        for row, last in enumerate(mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1))
    ]
    return np.concatenate(before).astype(np.float64)


def log_shares(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(temperature=0), marks=pytest.mark.slow, id="greedy"),
        pytest.param(Sampling(temperature=2.5, top_p=0.9), id="hot"),
        pytest.param(Sampling(repetition_penalty=1.5, logit_bias={3: 5}), marks=pytest.mark.slow, id="penalties"),
    ],
)
def test_log_probabilities_are_those_of_full_passes_before_any_processing(model, sampling):
    answer = generate_with_logprobs(
        model, IDS, MASK, GenerationConfig(NEW, eos_token_id=(), sampling=sampling, key=4, logprobs=3)
    )
    expected = log_shares(whole_passes(model, answer.tokens))
    of_tokens = np.take_along_axis(expected, answer.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(answer.logprobs, of_tokens, rtol=0, atol=FLOAT32_ERROR * 10)
    assert answer.top_tokens.shape == answer.top_logprobs.shape == (3, NEW, 3)
    best = np.sort(expected, axis=-1)[..., ::-1][..., :3]
    np.testing.assert_allclose(answer.top_logprobs, best, rtol=0, atol=FLOAT32_ERROR * 10)
    assert (np.diff(best) < -FLOAT32_ERROR * 20).all()  # so that the order of tokens is certain
    np.testing.assert_array_equal(answer.top_tokens, np.argsort(-expected, axis=-1)[..., :3])
    assert answer.logprobs.dtype == answer.top_logprobs.dtype == np.float32
    assert answer.top_tokens.dtype == np.int32


@pytest.mark.slow
def test_log_probabilities_of_the_tokens_alone(model, endless):
    answer = generate_with_logprobs(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=(), logprobs=0))
    np.testing.assert_array_equal(answer.tokens, endless)
    assert answer.logprobs.shape == (3, NEW)
    assert answer.top_tokens.shape == (3, NEW, 0)


def test_after_the_end_of_a_row_nothing_is_told(model, endless):
    answer = generate_with_logprobs(
        model, IDS, MASK, GenerationConfig(NEW, eos_token_id=[int(endless[0, 1])] * 3, logprobs=0)
    )
    after = np.arange(NEW) >= answer.lengths[:, None]
    assert after[0].sum() == NEW - 2
    assert not after.all(axis=0).any()  # another row goes on
    assert (answer.logprobs[after] == 0).all()
    assert (answer.logprobs[~after] < 0).all()


@pytest.mark.parametrize("logprobs", [0, 2])
def test_log_probabilities_of_no_tokens_are_empty(model, logprobs):
    answer = generate_with_logprobs(model, IDS, MASK, GenerationConfig(0, num_return_sequences=2, logprobs=logprobs))
    assert answer.tokens.shape == (6, 0)
    assert answer.logprobs.shape == (6, 0)
    assert answer.top_tokens.shape == answer.top_logprobs.shape == (6, 0, logprobs)
    np.testing.assert_array_equal(answer.lengths, [0] * 6)
    assert not answer.ended.any()


# Drawn tokens.

WARM = Sampling(temperature=1.3)
SEEDS = [5, 6, 5, 2**31 + 1, 0, 99, 7, 8]
EIGHT = np.random.default_rng(0).integers(0, 59, (8, 12))
EIGHT_MASK = np.array([[0] * (row % 4) + [1] * (12 - row % 4 - row // 4) + [0] * (row // 4) for row in range(8)])


def noise(seed, count, vocabulary=61):
    """The Gumbel noise that a row of that seed is drawn with, (count, vocabulary)."""
    (key,) = row_keys([seed], 1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.int32))
    return np.asarray(jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,)))(keys))


@pytest.mark.slow
def test_a_row_is_answered_by_its_seed_whatever_the_batch(model):
    """Alone, without its padding, and beside what full passes and the row's own noise say; where two tokens are nearly
    as good, rounding could decide, but here they never are."""
    together = np.asarray(generate(model, EIGHT, EIGHT_MASK, NEW, eos_token_id=(), sampling=WARM, key=SEEDS))
    logits = whole_passes(model, together, EIGHT, EIGHT_MASK)
    for row, seed in enumerate(SEEDS):
        noisy = logits[row] / 1.3 + noise(seed, NEW)
        best = np.sort(noisy, axis=-1)[:, ::-1]
        assert (best[:, 0] - best[:, 1] > 2 * FLOAT32_ERROR * np.abs(logits[row]).max()).all()
        np.testing.assert_array_equal(together[row], noisy.argmax(axis=-1))
        real = EIGHT_MASK[row] == 1
        alone = generate(model, EIGHT[row : row + 1, real], None, NEW, eos_token_id=(), sampling=WARM, key=[seed])
        np.testing.assert_array_equal(alone[0], together[row])


def test_the_logits_of_a_row_are_those_of_the_row_alone(model):
    together = prefill(model, EIGHT, EIGHT_MASK, max_new_tokens=NEW).logits
    for row in range(8):
        real = EIGHT_MASK[row] == 1
        alone = prefill(model, EIGHT[row : row + 1, real], max_new_tokens=NEW).logits
        assert relative_error(together[row], alone[0]) <= FLOAT32_ERROR


def test_equal_rows_of_one_seed_differ_and_calls_do_not(model):
    same = np.repeat(EIGHT[:1], 8, axis=0)
    tokens = np.asarray(generate(model, same, None, NEW, eos_token_id=(), sampling=WARM, key=3))
    assert len(np.unique(tokens, axis=0)) == 8
    np.testing.assert_array_equal(generate(model, same, None, NEW, eos_token_id=(), sampling=WARM, key=3), tokens)
    other = np.asarray(generate(model, same, None, NEW, eos_token_id=(), sampling=WARM, key=4))
    assert (other != tokens).any(axis=1).all()
    seeded = np.asarray(generate(model, same, None, NEW, eos_token_id=(), sampling=WARM, key=[3] * 8))
    assert len(np.unique(seeded, axis=0)) == 1


@pytest.mark.slow
def test_samples_are_answers_to_repeated_prompts(model, endless):
    greedy = generate(model, IDS, MASK, NEW, eos_token_id=(), num_return_sequences=2)
    np.testing.assert_array_equal(greedy, np.repeat(endless, 2, axis=0))
    tokens = np.asarray(
        generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=WARM, key=[1, 2, 3], num_return_sequences=2)
    )
    assert tokens.shape == (6, NEW)
    assert len(np.unique(tokens, axis=0)) == 6
    single = generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=WARM, key=[1, 2, 3])
    np.testing.assert_array_equal(tokens[::2], single)
    one = generate(model, IDS[1:2], MASK[1:2], NEW, eos_token_id=(), sampling=WARM, key=[2], num_return_sequences=2)
    np.testing.assert_array_equal(tokens[2:4], one)


def test_samples_share_one_prefill(model, monkeypatch):
    seen, real = [], programs.prefill

    def counted(graphdef, state, ids, *rest):
        seen.append(ids.shape)
        return real(graphdef, state, ids, *rest)

    monkeypatch.setattr(programs, "prefill", counted)
    generate(model, IDS, MASK, NEW, eos_token_id=(), num_return_sequences=2)
    assert seen == [(3, 16)]


def only_then(history, logits):
    """Counts on from the last token: 7, 8, 9, …"""
    last = jnp.sum(history.real, axis=1, dtype=jnp.int32) - 1
    order = jnp.cumsum(history.real, axis=1, dtype=jnp.int32) - 1
    newest = jnp.sum(jnp.where(history.real & (order == last[:, None]), history.tokens, 0), axis=1)
    return jnp.where(jnp.arange(logits.shape[1]) == (newest[:, None] + 1) % 61, logits, -jnp.inf)


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_processor_is_told_what_stands_in_prompt_and_answer(model, temperature):
    how = Sampling(temperature=temperature, processors=(only_then,))
    found = generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=how)
    last = np.array([5, 2, 54])[:, None]
    np.testing.assert_array_equal(found, (last + 1 + np.arange(NEW)) % 61)


def test_penalties_see_prompt_and_answer(model):
    """No token comes twice, and none of the prompt, where repeating one is made impossible."""
    how = Sampling(temperature=0, frequency_penalty=1e4)
    found = np.asarray(generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=how))
    assert all(len(set(row)) == NEW for row in found)
    positive = Sampling(temperature=0, repetition_penalty=1e6, logit_bias=())
    found = np.asarray(generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=positive))
    for row, ids, mask in zip(found, IDS, MASK, strict=True):
        assert len(set(row)) == NEW
        assert not set(row) & set(ids[mask == 1])


@pytest.mark.slow
def test_padding_is_no_token_of_the_prompt(model, endless):
    """Penalties leave the ids that stand in padding, and 0, which takes their place, alone."""
    how = Sampling(temperature=0, repetition_penalty=1.5)
    found = generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=how)
    for row in range(3):
        alone = generate(model, IDS[row : row + 1, MASK[row] == 1], None, NEW, eos_token_id=(), sampling=how)
        np.testing.assert_array_equal(found[row : row + 1], alone)


# In parts.


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), WARM], ids=["greedy", "drawn"])
def test_parts_are_together_what_generate_returns(model, sampling):
    whole = generate_with_logprobs(
        model, IDS, MASK, GenerationConfig(NEW, eos_token_id=(), sampling=sampling, key=2, logprobs=0)
    )
    for chunk in (1, 2, NEW - 1, NEW, 100):
        parts = list(
            decode(
                model,
                IDS,
                MASK,
                GenerationConfig(NEW, eos_token_id=(), sampling=sampling, key=2, logprobs=0),
                chunk=chunk,
            )
        )
        sizes = (
            [NEW] if chunk >= NEW else [1, *[chunk] * ((NEW - 1) // chunk), *[(NEW - 1) % chunk] * (NEW % chunk != 1)]
        )
        assert [part.tokens.shape[1] for part in parts] == [size for size in sizes if size]
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts], axis=1), whole.tokens)
        np.testing.assert_array_equal(np.concatenate([part.logprobs for part in parts], axis=1), whole.logprobs)
        np.testing.assert_array_equal(sum(part.lengths for part in parts), whole.lengths)
        np.testing.assert_array_equal(parts[-1].ended, whole.ended)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_parts_tell_where_rows_end(model, endless, chunk):
    firsts = [int(row[1]) for row in endless]
    ends = np.isin(endless, firsts)
    last = int(ends.argmax(axis=1).max())
    parts = list(decode(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=firsts), chunk=chunk))
    tokens = np.concatenate([part.tokens for part in parts], axis=1)
    np.testing.assert_array_equal(tokens, ended(endless, firsts)[:, : last + 1])
    np.testing.assert_array_equal(sum(part.lengths for part in parts), ends.argmax(axis=1) + 1)
    given = 0
    for part in parts:
        given += part.tokens.shape[1]
        np.testing.assert_array_equal(part.ended, ends[:, :given].any(axis=1))


def test_rows_can_be_ended_from_outside(model, endless):
    parts = decode(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=()), chunk=2)
    np.testing.assert_array_equal(next(parts).tokens, endless[:, :1])
    part = parts.send(np.array([False, True, False]))
    np.testing.assert_array_equal(part.tokens[[0, 2]], endless[[0, 2], 1:3])
    np.testing.assert_array_equal(part.tokens[1], [PAD, PAD])
    np.testing.assert_array_equal(part.lengths, [2, 0, 2])
    np.testing.assert_array_equal(part.ended, [False, True, False])
    np.testing.assert_array_equal(next(parts).tokens[[0, 2]], endless[[0, 2], 3:5])
    with pytest.raises(StopIteration):
        parts.send([True, False, True])


def test_no_tokens_come_in_no_parts(model):
    assert list(decode(model, IDS, MASK, GenerationConfig(0))) == []


# Prefixes.


def snapshot(prefix):
    return [np.asarray(each).copy() for each in jax.tree.leaves(prefix)]


def assert_unchanged(prefix, before):
    for now, then in zip(jax.tree.leaves(prefix), before, strict=True):
        assert not now.is_deleted()
        assert np.asarray(now).tobytes() == then.tobytes()


def test_a_prefix_is_continued_as_often_as_one_likes_and_stays_as_it_is(model, endless):
    prefix = prefill(model, IDS, MASK, max_new_tokens=NEW)
    before = snapshot(prefix)
    drawn = generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=WARM, key=9)
    for _ in range(2):
        np.testing.assert_array_equal(generate(model, prefix, max_new_tokens=NEW, eos_token_id=()), endless)
        assert_unchanged(prefix, before)
        found = generate(model, prefix, None, NEW, eos_token_id=(), sampling=WARM, key=9)
        np.testing.assert_array_equal(found, drawn)
        assert_unchanged(prefix, before)


def test_a_prefix_stays_as_it_is_when_it_gets_several_answers(model, endless):
    prefix = prefill(model, IDS, MASK, max_new_tokens=NEW)
    before = snapshot(prefix)
    for _ in range(2):
        found = generate(model, prefix, max_new_tokens=NEW, eos_token_id=(), num_return_sequences=2)
        np.testing.assert_array_equal(found, np.repeat(endless, 2, axis=0))
        assert_unchanged(prefix, before)


def test_a_prefix_stays_as_it_is_where_decoding_is_given_up(model):
    prefix = prefill(model, IDS, MASK, max_new_tokens=NEW)
    before = snapshot(prefix)
    parts = decode(model, prefix, None, GenerationConfig(NEW, eos_token_id=()), chunk=2)
    next(parts)
    parts.close()
    assert_unchanged(prefix, before)


@pytest.mark.slow
def test_a_prefix_can_be_extended(model, endless):
    first = prefill(model, IDS[:, :4], MASK[:, :4], max_new_tokens=24)
    before = snapshot(first)
    whole = prefill(model, IDS[:, 4:], MASK[:, 4:], prefix=first)
    assert_unchanged(first, before)
    assert relative_error(whole.logits, prefill(model, IDS, MASK, max_new_tokens=NEW).logits) <= FLOAT32_ERROR
    np.testing.assert_array_equal(generate(model, whole, None, NEW, eos_token_id=()), endless)
    other = prefill(model, [[7, 8], [7, 8], [7, 8]], prefix=first)
    assert not np.array_equal(generate(model, other, None, NEW, eos_token_id=()), endless)
    np.testing.assert_array_equal(generate(model, whole, None, NEW, eos_token_id=()), endless)
    assert_unchanged(first, before)


@pytest.mark.slow
def test_penalties_see_all_of_an_extended_prefix(model):
    how = Sampling(temperature=0, repetition_penalty=3.0)
    expected = generate(model, IDS, MASK, NEW, eos_token_id=(), sampling=how)
    extended = prefill(
        model, IDS[:, 4:], MASK[:, 4:], prefix=prefill(model, IDS[:, :4], MASK[:, :4], max_new_tokens=64)
    )
    np.testing.assert_array_equal(generate(model, extended, None, NEW, eos_token_id=(), sampling=how), expected)


def test_where_the_cache_is_full_rows_are_cut_off(model, endless):
    prefix = prefill(model, IDS, MASK, max_new_tokens=1)
    room = prefix.room
    assert NEW <= room < 20
    answer = generate_with_logprobs(model, prefix, None, GenerationConfig(20, eos_token_id=(), logprobs=3))
    assert answer.tokens.shape == answer.logprobs.shape == (3, 20)
    np.testing.assert_array_equal(answer.lengths, [room] * 3)
    assert not answer.ended.any()
    np.testing.assert_array_equal(answer.tokens[:, :NEW], endless)
    assert (answer.tokens[:, room:] == PAD).all()
    full = prefill(model, IDS, MASK, max_new_tokens=0)
    assert full.room == 0
    answer = generate_with_logprobs(model, full, None, GenerationConfig(5, eos_token_id=(), logprobs=None))
    np.testing.assert_array_equal(answer.tokens, np.full((3, 5), PAD))
    np.testing.assert_array_equal(answer.lengths, [0] * 3)
    assert not answer.ended.any()


def test_a_prefix_has_the_room_that_was_asked_for(model):
    for room in (0, 1, 8, 9):
        assert prefill(model, IDS, MASK, max_new_tokens=room).room >= room


def test_an_extension_may_fill_the_cache_to_its_last_slot(model):
    prefix = prefill(model, IDS, MASK, max_new_tokens=1)  # 8 slots are left, a bucket has 16
    ids = np.arange(3 * prefix.room).reshape(3, -1)
    full = prefill(model, ids, prefix=prefix)
    assert full.room == 0
    whole = prefill(
        model, np.concatenate([IDS, ids], axis=1), np.concatenate([MASK, np.ones_like(ids)], axis=1), max_new_tokens=8
    )
    assert relative_error(full.logits, whole.logits) <= FLOAT32_ERROR
    with pytest.raises(InvalidTokens, match=r"the cache has 24 slots, 24 are filled, 1 more tokens do not fit"):
        prefill(model, [[1], [1], [1]], prefix=full)


def test_an_extension_of_another_batch_is_refused(model):
    prefix = prefill(model, IDS, MASK, max_new_tokens=NEW)
    with pytest.raises(InvalidTokens, match=r"input_ids: the prefix has 3 rows, found 2\."):
        prefill(model, IDS[:2], MASK[:2], prefix=prefix)
    with pytest.raises(InvalidSampling, match="key: expected an integer or a JAX key, or one for each of 3 rows"):
        generate(model, prefix, key=[1, 2])


# How often it compiles.


def test_buckets():
    found = [generation.bucket(count) for count in range(1, 2000)]
    assert all(size >= count for count, size in enumerate(found, start=1))
    assert all(size <= max(16, 1.5 * count) for count, size in enumerate(found, start=1))
    assert len(set(found)) == 15
    assert all(generation.bucket(size) == size for size in found)


def compiled():
    return {name: getattr(programs, name)._cache_size() for name in ("prefill", "extend", "begin", "decode")}


def more(before):
    return {name: count - before[name] for name, count in compiled().items()}


def test_a_bucket_is_compiled_once(model):
    """Two rows, as in no other test; whatever the length, the count, the numbers of a sampling, the seed, the chunk."""
    before, rng = compiled(), np.random.default_rng(0)
    for length in range(1, 17):
        ids = rng.integers(0, 61, (2, length))
        how = Sampling(
            temperature=rng.uniform(0.1, 2),
            top_p=rng.uniform(0.1, 0.9),
            logit_bias={int(rng.integers(61)): rng.normal()},
        )
        count, eos = int(rng.integers(1, 9)), int(rng.integers(61))
        options = {"sampling": how, "key": length}
        if length % 4 == 0:
            generate(model, ids, np.arange(length)[None] >= [[0], [length // 3]], count, eos_token_id=eos, **options)
        elif length % 4 == 1:
            generate(model, ids, None, count, eos_token_id=eos, sampling=how, key=[length, 2])
        elif length % 4 == 2:
            list(
                decode(
                    model,
                    ids,
                    None,
                    GenerationConfig(count, eos_token_id=eos, **options),
                    chunk=int(rng.integers(1, 9)),
                )
            )
        else:
            generate(model, prefill(model, ids, max_new_tokens=8), None, count, eos_token_id=eos, **options)
    assert more(before) == {"prefill": 1, "extend": 0, "begin": 1, "decode": 1}


@pytest.mark.slow
def test_another_bucket_is_compiled_once_more(model):
    ids = np.ones((2, 24), int)
    generate(model, ids[:, :16], None, 4, eos_token_id=1)
    before = compiled()
    for length in (17, 20, 24):
        generate(model, ids[:, :length], None, 4, eos_token_id=1)
    assert more(before) == {"prefill": 1, "extend": 0, "begin": 1, "decode": 1}


@pytest.mark.slow
def test_extensions_are_compiled_once(model):
    prefix = prefill(model, IDS[:2], MASK[:2], max_new_tokens=100)
    before = compiled()
    for length in range(1, 17):
        prefill(model, np.ones((2, length), int), prefix=prefix)
    again = prefill(model, np.ones((2, 5), int), prefix=prefix)
    prefill(model, np.ones((2, 5), int), prefix=again)
    assert more(before) == {"prefill": 0, "extend": 1, "begin": 0, "decode": 0}


def test_calls_of_one_shape_share_a_program(model, endless):
    before = compiled()
    eos = [int(endless[0, 0])]
    np.testing.assert_array_equal(
        generate(model, IDS[::-1], MASK[::-1], NEW, eos_token_id=eos), ended(endless, eos)[::-1]
    )
    assert max(more(before).values()) <= 1
    once = compiled()
    generate(model, IDS, MASK, NEW, eos_token_id=[5])
    generate(perparam.models.Qwen3.with_policy(model, Policy(compute="f32")), IDS, MASK, NEW, eos_token_id=[6])
    assert compiled() == once


# What is refused.


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        ([[3, 61]], None, r"input_ids\[0, 1\] is 61, outside the vocabulary of 61\. Use the tokenizer"),
        ([[3, 4], [5, -1]], None, r"input_ids\[1, 1\] is -1, outside the vocabulary of 61"),
        ([3, 4], None, r"expected integers of shape \(batch, length\), found int64 \(2,\)"),
        ([[]], None, r"expected integers of shape \(batch, length\), found \w+ \(1, 0\)"),
        (np.zeros((0, 3), int), None, r"found int32 \(0, 3\)"),
        ([[3.0, 4.0]], None, "found float64"),
        ([[True, False]], None, "found bool"),
        ([[3, 4], [5]], None, "input_ids"),
        ([[3, 4]], [[1]], r"attention_mask: expected the shape of input_ids, \(1, 2\), found \(1, 1\)"),
        ([[3, 4], [5, 6]], [[1, 1], [0, 0]], "row 1 has no real token, so there is nothing to continue"),
    ],
    ids=["beyond", "negative", "one row", "empty rows", "no rows", "floats", "booleans", "ragged", "mask", "padding"],
)  # fmt: skip
def test_prompts_that_make_no_sense_are_refused(model, ids, mask, match):
    with pytest.raises(InvalidTokens, match=match):
        generate(model, ids, mask, NEW)


@pytest.mark.parametrize("count", [-1, 2.0, "3"])
def test_a_count_that_is_none_is_refused(model, count):
    with pytest.raises(InvalidTokens, match="max_new_tokens: expected"):
        generate(model, IDS, MASK, count)


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None], ids=repr)
def test_numbers_of_answers_and_chunks_that_are_not_positive_are_refused(model, value):
    with pytest.raises(InvalidTokens, match="num_return_sequences: expected an integer of 1 or more, found"):
        GenerationConfig(NEW, num_return_sequences=value)
    with pytest.raises(InvalidTokens, match="chunk: expected an integer of 1 or more, found"):
        decode(model, IDS, MASK, chunk=value)


@pytest.mark.parametrize("value", [-1, 62, 1.0, "2"], ids=repr)
def test_a_count_of_likely_tokens_that_is_none_is_refused(model, value):
    with pytest.raises(InvalidTokens, match="logprobs: expected"):
        generate_with_logprobs(model, IDS, MASK, GenerationConfig(NEW, logprobs=value))


@pytest.mark.parametrize("eos", [-1, 2.5, "a", [[1]], 2**31], ids=repr)
def test_what_is_no_eos_is_refused(model, eos):
    with pytest.raises(InvalidTokens, match="eos_token_id: expected a token id or several, found"):
        decode(model, IDS, MASK, GenerationConfig(NEW, eos_token_id=eos))


def test_a_bias_outside_the_vocabulary_is_refused(model):
    with pytest.raises(InvalidSampling, match="logit_bias: 61 is outside the vocabulary of 61"):
        generate(model, IDS, MASK, NEW, sampling=Sampling(logit_bias={61: 1.0}))
