"""`generate_text` and `stream_text` with a model: they give the answers of `generate`."""

import numpy as np
import pytest
from checkpoints import fields, tensors, write
from scripted_text import END, TOKENIZER, ids, run

import perparam
from perparam import Policy, Sampling, generate, generate_text, stream_text
from perparam.generation import GenerationConfig, prefill
from perparam.models import generate_with_logprobs
from perparam.policies.errors import InvalidSampling, InvalidText, InvalidTokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = fields(num_hidden_layers=1, vocab_size=490, eos_token_id=END, pad_token_id=None)
    folder = write(tmp_path_factory.mktemp("small"), config, tensors(config, seed=1))
    return perparam.load_model(folder, Policy(compute="f32"))


WARM = Sampling(temperature=1.5)
PROMPTS = ["Hello", "the weather is"]
NEW = 12


@pytest.fixture(scope="module")
def answers(model):
    return generate_text(
        model, TOKENIZER, PROMPTS, NEW, sampling=WARM, key=[1, 2], num_return_sequences=2, logprobs=True
    )


def test_answers_are_what_generate_gives(model, answers):
    longest = max(len(ids(prompt)) for prompt in PROMPTS)
    padding = [longest - len(ids(prompt)) for prompt in PROMPTS]
    padded = np.array([[0] * count + ids(prompt) for count, prompt in zip(padding, PROMPTS, strict=True)])
    config = GenerationConfig(
        NEW, eos_token_id=TOKENIZER.eos_ids, sampling=WARM, key=[1, 2], num_return_sequences=2, logprobs=0
    )
    wanted = generate_with_logprobs(model, padded, np.arange(longest) >= np.array(padding)[:, None], config)
    assert len({each.tokens for each in answers}) == 4
    for row, each in enumerate(answers):
        length = wanted.lengths[row]
        assert each.tokens == tuple(wanted.tokens[row, :length])
        assert each.text == TOKENIZER.decode(each.tokens)
        assert each.finish_reason == ("stop" if wanted.ended[row] else "length")
        np.testing.assert_array_equal(np.float32(each.logprobs), wanted.logprobs[row, :length])


def test_a_prompt_is_answered_alike_alone_and_streamed(model, answers):
    (alone,) = generate_text(model, TOKENIZER, PROMPTS[1], NEW, sampling=WARM, key=[2])
    assert (alone.text, alone.tokens) == (answers[2].text, answers[2].tokens)
    prefix = prefill(model, [ids(PROMPTS[1])], max_new_tokens=NEW)
    for prompt in (PROMPTS[1], prefix, prefix):
        pieces, found = run(stream_text(model, TOKENIZER, prompt, NEW, sampling=WARM, key=[2], chunk=5))
        assert "".join(pieces) == found.text == alone.text
        assert found == alone
    assert generate_text(model, TOKENIZER, prefix, NEW, sampling=WARM, key=[2]) == [alone]


def test_a_stop_string_ends_what_a_model_says(model, answers):
    said = answers[0].text
    stop = said[len(said) // 2 :][:2]
    (found,) = generate_text(model, TOKENIZER, PROMPTS[0], NEW, stop=stop, sampling=WARM, key=[1])
    assert found.text == said[: said.index(stop)]
    assert found.finish_reason == "stop"
    assert found.tokens == answers[0].tokens[: len(found.tokens)]
    pieces, streamed = run(stream_text(model, TOKENIZER, PROMPTS[0], NEW, stop=stop, sampling=WARM, key=[1], chunk=3))
    assert "".join(pieces) == found.text
    assert streamed == found


def test_generate_text_is_greedy_by_default(model):
    (found,) = generate_text(model, TOKENIZER, "Hello", 4)
    tokens = np.asarray(generate(model, [ids("Hello")], None, 4, eos_token_id=TOKENIZER.eos_ids))[0]
    assert found.tokens == tuple(tokens)


def test_a_prefix_of_several_prompts_is_not_streamed(model):
    with pytest.raises(InvalidText, match="stream_text answers one prompt, found 2"):
        stream_text(model, TOKENIZER, prefill(model, [[1, 2], [3, 4]]))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_new_tokens": "3"}, InvalidTokens, "max_new_tokens: expected an integer"),
        ({"max_new_tokens": -1}, InvalidTokens, "max_new_tokens: expected an integer"),
        ({"max_new_tokens": 2.5}, InvalidTokens, "max_new_tokens: expected an integer"),
        ({"num_return_sequences": 0}, InvalidTokens, "num_return_sequences: expected an integer of 1 or more"),
        ({"num_return_sequences": 1.5}, InvalidTokens, "num_return_sequences: expected an integer of 1 or more"),
        ({"key": "a"}, InvalidSampling, "key: expected an integer"),
        ({"key": [1, 2, 3]}, InvalidSampling, "key: expected an integer"),
    ],
    ids=str,
)
def test_arguments_of_generate_are_refused_as_it_refuses_them(model, options, error, match):
    with pytest.raises(error, match=match):
        generate_text(model, TOKENIZER, "Hello", **options)
    if "num_return_sequences" not in options:  # at the call, before anything is taken
        with pytest.raises(error, match=match):
            stream_text(model, TOKENIZER, "Hello", **options)


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "2"], ids=repr)
def test_an_invalid_chunk_is_refused(model, chunk):
    with pytest.raises(InvalidTokens, match="chunk: expected an integer of 1 or more"):
        stream_text(model, TOKENIZER, "Hello", chunk=chunk)
