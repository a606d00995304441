"""Prompts that begin as the one before: what is read again, and that it makes no difference."""

import jax
import numpy as np
import pytest
from checkpoints import fields, relative_error, tensors, write

import perparam
from perparam import Policy, Sampling, generate
from perparam.generation import prefill
from perparam.models import extend_prefix
from perparam.models.generation import programs
from perparam.policies.errors import InvalidTokens

FLOAT32_ERROR = 1e-5
"""As in test_qwen3: the same sums in another order."""

NEW, ROOM = 5, 40
BEFORE = np.arange(3, 23)[None]


@pytest.fixture(scope="module", params=[None, pytest.param("f8_e4m3fn", marks=pytest.mark.slow)], ids=["f32", "f8"])
def model(request, tmp_path_factory):
    config = fields(num_hidden_layers=1)
    folder = write(tmp_path_factory.mktemp("small"), config, tensors(config, seed=1))
    return perparam.load_model(folder, Policy(compute="f32", kv_cache=request.param))


@pytest.fixture
def read(monkeypatch):
    """How many tokens each program is given, padding included."""
    seen = []
    for name in ("prefill", "extend"):
        real = getattr(programs, name)
        monkeypatch.setattr(
            programs,
            name,
            lambda *given, real=real, name=name: seen.append((name, given[2].shape[1])) or real(*given),
        )
    return seen


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        ([*range(3, 23), 30, 31, 32], [("extend", 16)]),
        ([*range(3, 13), 40, 41], [("extend", 16)]),
        ([*range(3, 23)], [("extend", 16)]),
        ([*range(3, 9)], [("extend", 16)]),
        ([50, 51, 52], [("prefill", 16)]),
        pytest.param([*range(3, 23), *range(70)], [("prefill", 96)], marks=pytest.mark.slow),
    ],
    ids=["goes on", "turns off", "the same", "its beginning", "another", "too long for the cache"],
)
def test_what_is_read_again(model, read, ids, what):
    ids = np.array([ids]) % model.config.vocab_size
    before = prefill(model, BEFORE, max_new_tokens=ROOM)
    held = [np.array(leaf) for leaf in jax.tree.leaves(before)]
    del read[:]
    found = extend_prefix(model, before, ids, max_new_tokens=NEW)
    assert read == what
    assert relative_error(found.logits, prefill(model, ids, max_new_tokens=ROOM).logits) <= FLOAT32_ERROR
    for leaf, old in zip(jax.tree.leaves(before), held, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_what_follows_is_the_same(model):
    """With a penalty, which hangs on the tokens that were read and on those that were taken back."""
    ids, warm = [[*range(3, 13), 40, 41]], Sampling(temperature=1.0, repetition_penalty=3.0)
    found = extend_prefix(model, prefill(model, BEFORE, max_new_tokens=ROOM), ids, max_new_tokens=NEW)
    answers = [
        np.asarray(generate(model, each, None, NEW, eos_token_id=(), sampling=warm))
        for each in (found, prefill(model, ids, max_new_tokens=ROOM))
    ]
    np.testing.assert_array_equal(*answers)


def test_a_conversation_is_read_once(model, read):
    """Turn after turn, with what left padding leaves between them, and a turn that takes the last one back."""
    prefix, ids = prefill(model, BEFORE[:, :14], max_new_tokens=ROOM), list(BEFORE[0, :14])
    for turn in range(3):
        ids = [*ids[: len(ids) - 2 * (turn == 2)], 40 + turn, 41 + turn, 42 + turn]
        prefix = extend_prefix(model, prefix, [ids], max_new_tokens=0)
        assert relative_error(prefix.logits, prefill(model, [ids], max_new_tokens=ROOM).logits) <= FLOAT32_ERROR
        assert int(prefix.cache.tokens[0]) == len(ids)
    assert [each for each in read if each[0] == "extend"] == [("extend", 16)] * 3


@pytest.mark.slow
def test_room_is_left_as_asked(model, read):
    before = prefill(model, BEFORE, max_new_tokens=20)
    assert before.room == 24  # of 48 slots 24 are filled, with 20 tokens
    ids = [[*BEFORE[0], 1, 2, 3]]
    # The padding after the 20 tokens makes room for the new ones, which take 16 slots.
    assert extend_prefix(model, before, ids, max_new_tokens=12).room == 48 - 20 - 16
    assert extend_prefix(model, before, ids, max_new_tokens=13).room >= 13
    assert [name for name, _ in read] == ["prefill", "extend", "prefill"]


def test_one_row_is_read(model):
    two = np.repeat(BEFORE, 2, axis=0)
    with pytest.raises(InvalidTokens, match="expected one row and a prefix of one row, found 2 and 1"):
        extend_prefix(model, prefill(model, BEFORE), two)
    with pytest.raises(InvalidTokens, match="expected one row and a prefix of one row, found 1 and 2"):
        extend_prefix(model, prefill(model, two), BEFORE)
