"""How often generation compiles: once for all prompts whose lengths fall into one bucket."""

import numpy as np
import pytest
from generating import IDS, MASK, NEW, ended

import perparam
from perparam import Policy, Sampling, generate
from perparam.generation import GenerationConfig, prefill
from perparam.models import decode
from perparam.models.generation import programs


def compiled():
    return {name: getattr(programs, name)._cache_size() for name in ("prefill", "extend", "begin", "decode")}


def more(before):
    return {name: count - before[name] for name, count in compiled().items()}


def test_a_bucket_is_compiled_once(model):
    """Two rows, as in no other test; whatever the length, the count, the numbers of a sampling, the seed, the chunk."""
    before, rng = compiled(), np.random.default_rng(0)
    for length in (1, 2, 3, 4, 10, 13, 15, 16):  # each of the four ways twice, with the least and the most of a bucket
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
    for length in (1, 2, 7, 8, 15, 16):
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
