"""`prefill`: a prefix is continued and extended as often as one likes, and keeps the room asked for."""

import jax
import numpy as np
import pytest
from checkpoints import relative_error
from generating import FLOAT32_ERROR, IDS, MASK, NEW, WARM

from perparam import Policy, generate
from perparam.generation import GenerationConfig, prefill
from perparam.models import decode, generate_with_logprobs, generation
from perparam.policies.errors import InvalidSampling, InvalidTokens


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


@pytest.mark.slow
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


def test_more_tokens_than_the_cache_has_room_for_are_refused(model, endless):
    prefix = prefill(model, IDS, MASK, max_new_tokens=1)
    room = prefix.room
    assert room >= NEW
    tokens = generate(model, prefix, None, room, eos_token_id=())
    np.testing.assert_array_equal(tokens[:, :NEW], endless)
    match = rf"max_new_tokens: the cache of the prefix has room for {room}, found {room + 1}\. Ask for fewer tokens"
    with pytest.raises(InvalidTokens, match=match):
        generate(model, prefix, None, room + 1)
    with pytest.raises(InvalidTokens, match=match):
        decode(model, prefix, None, GenerationConfig(room + 1))  # before its first part is asked for
    full = prefill(model, IDS, MASK, max_new_tokens=0)
    with pytest.raises(InvalidTokens, match="has room for 0, found 1"):
        generate(model, full, None, 1)
    assert generate(model, full, None, 0).shape == (3, 0)


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
    with pytest.raises(InvalidTokens, match=r"the cache has room for 24 tokens and holds 24, found 1 more"):
        prefill(model, [[1], [1], [1]], prefix=full)


def test_an_extension_of_another_batch_is_refused(model):
    prefix = prefill(model, IDS, MASK, max_new_tokens=NEW)
    with pytest.raises(InvalidTokens, match=r"input_ids: the prefix has 3 rows, found 2\."):
        prefill(model, IDS[:2], MASK[:2], prefix=prefix)
    with pytest.raises(InvalidSampling, match="key: expected an integer or a JAX key, or one for each of 3 rows"):
        generate(model, prefix, None, NEW, key=[1, 2])


def test_buckets_are_few_and_at_most_half_larger_than_asked():
    found = [generation.bucket(count) for count in range(1, 2000)]
    assert all(size >= count for count, size in enumerate(found, start=1))
    assert all(size <= max(16, 1.5 * count) for count, size in enumerate(found, start=1))
    assert len(set(found)) == 15
    assert all(generation.bucket(size) == size for size in found)


def test_settings_and_prefixes_of_the_wrong_kind_are_refused(model):
    prefix = prefill(model, IDS, MASK, max_new_tokens=NEW)
    with pytest.raises(InvalidSampling, match="sampling: expected a Sampling, found 'greedy'"):
        generate(model, prefix, sampling="greedy")
    for function in (decode, generate_with_logprobs):
        with pytest.raises(InvalidTokens, match="config: expected a GenerationConfig, found 20"):
            function(model, IDS, MASK, 20)
    with pytest.raises(InvalidTokens, match="attention_mask: expected None with a Prefix"):
        generate(model, prefix, MASK)
    with pytest.raises(InvalidTokens, match="max_new_tokens: expected an integer of 0 or more, found 1"):
        prefill(model, IDS, MASK, max_new_tokens=1.5)
    with pytest.raises(InvalidTokens, match="logprobs: expected an integer from 0 to 61, found 100"):
        decode(model, IDS, MASK, GenerationConfig(logprobs=100))
    with pytest.raises(InvalidTokens, match=r"eos_token_id: expected a token id or several, found \[\[1\], \[2, 3\]\]"):
        generate(model, IDS, MASK, eos_token_id=[[1], [2, 3]])


def test_a_prefix_of_another_policy_is_refused(model):
    prefix = prefill(model, IDS, MASK, max_new_tokens=NEW)
    other = model.with_policy(Policy(compute="f32", kv_cache="f8_e4m3fn"))
    for use in (lambda: generate(other, prefix), lambda: prefill(other, IDS, MASK, prefix=prefix)):
        with pytest.raises(InvalidTokens, match=r"prefix: its cache has 1 layer in .*, the model's has 1 layer in f8"):
            use()
