"""Text in, text out: the ends of answers and their reasons, whole characters, and prompts as models read them."""

import dataclasses
import time

import pytest
from scripted_text import END, LLAMA2, LLAMA3, START, TOKENIZER, completed, ids, model_of, run, says, streamed

from perparam import generate_text, stream_text
from perparam.policies.errors import InvalidText


def test_a_token_that_ends_an_answer_is_no_part_of_its_text():
    for chunk in (1, 3, 100):
        pieces, found = streamed([*ids("Hello"), END, *ids("more")], chunk=chunk)
        assert "".join(pieces) == found.text == "Hello"
        assert found.tokens == (*ids("Hello"), END)
        assert found.finish_reason == "stop"


def test_an_answer_says_why_it_ended():
    tokens = ids("hello world")
    assert completed(tokens).finish_reason == "length"
    assert completed([*tokens, END]).finish_reason == "stop"
    assert completed([*tokens, END], count=len(tokens)).finish_reason == "length"
    assert completed(tokens, stop="ld").finish_reason == "stop"
    assert completed(tokens, stop="ld!").finish_reason == "length"
    found = completed(tokens, count=0)
    assert (found.text, found.tokens, found.finish_reason) == ("", (), "length")
    assert streamed(tokens, count=0) == ([], found)


def test_the_ids_of_config_and_generation_config_end_an_answer():
    other = ids("!")[0]
    for eos in ((), (other,)):
        with says(ids("a")) as asked:
            generate_text(model_of(eos), TOKENIZER, "x", 5)
        assert asked[0]["eos"] == sorted({*TOKENIZER.eos_ids, *eos})
    with says([*ids("a"), other, *ids("b")]):
        (found,) = generate_text(model_of((other,)), TOKENIZER, "x", 5)
    assert (found.text, found.finish_reason) == ("a", "stop")


def test_text_holds_thinking_but_no_special_tokens():
    think = TOKENIZER.token_id("<think>")
    found = completed([think, START, *ids("a")])
    assert found.text == "<think>a"
    assert found.tokens == (think, START, *ids("a"))


# Characters.


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_characters_come_whole(chunk):
    answer = "a👩‍👩‍👧é文b"
    assert len(ids(answer)) > len(answer)
    pieces, _ = streamed(ids(answer), chunk=chunk)
    assert "".join(pieces) == answer
    assert all("�" not in piece for piece in pieces)


def test_a_character_that_stays_incomplete_is_replaced_at_the_end():
    whole = ids("👩")
    assert len(whole) > 1
    for tail, reason in (([], "length"), ([END], "stop")):
        pieces, found = streamed([*ids("a"), *whole[:-1], *tail], chunk=1)
        assert pieces[0] == "a"
        assert "".join(pieces) == found.text == "a�"
        assert found.finish_reason == reason


def test_an_answer_that_stops_within_a_character_leaves_it_out():
    """The stop string is whole before the character is."""
    assert completed([*ids("ab!"), *ids("👩")[:-1]], stop="!").text == "ab"


# What an answer says beside its text.


def test_log_probabilities_are_those_of_the_tokens():
    tokens = ids("ab!cd")
    assert completed(tokens).logprobs is None
    found = completed(tokens, logprobs=True)
    assert found.logprobs == tuple(-float(token) for token in tokens)
    stopped = completed(tokens, stop="!", logprobs=True)
    assert stopped.logprobs == tuple(-float(token) for token in tokens[:3])
    assert len(stopped.tokens) == 3


def test_a_completion_says_when_its_tokens_came():
    before = time.perf_counter()
    _, found = streamed(ids("Hello, how are you"), chunk=1)
    first, last = found.arrived
    assert before < first < last < time.perf_counter()
    _, found = streamed(ids("Hello, how are you"), chunk=100)
    assert found.arrived[0] == found.arrived[1]
    assert found == dataclasses.replace(found, arrived=(0.0, 0.0))  # the same answer, whenever it came


# Prompts.


def test_prompts_of_different_length_are_padded_on_the_left():
    with says([5], [6], [7]) as asked:
        generate_text(model_of(), TOKENIZER, ["a", "abc", "ab"], 1)
    assert asked[0]["mask"].tolist() == [[False, False, True], [True] * 3, [False, True, True]]
    assert [row[mask].tolist() for row, mask in zip(asked[0]["ids"], asked[0]["mask"], strict=True)] == [
        ids("a"), ids("abc"), ids("ab"),
    ]  # fmt: skip


@pytest.mark.parametrize("tokenizer", [LLAMA2, LLAMA3], ids=["llama2", "llama3"])
def test_a_model_reads_bos_once(tokenizer):
    chat = [{"role": "user", "content": "Hello"}]
    prompt, expected = tokenizer.apply_chat_template(chat), tokenizer.apply_chat_template(chat, tokenize=True)
    assert tokenizer.encode(prompt) == [expected[0], *expected]
    with says([5], [6]) as asked:
        generate_text(model_of(), tokenizer, [prompt, "Hello"], 1)
    given = [row[mask].tolist() for row, mask in zip(asked[0]["ids"], asked[0]["mask"], strict=True)]
    assert given == [expected, tokenizer.encode("Hello")]
    with says([5]) as asked:
        run(stream_text(model_of(), tokenizer, prompt, 1))
    assert asked[0]["ids"].tolist() == [expected]


@pytest.mark.parametrize("prompts", ["", [], ["a", ""]], ids=repr)
def test_an_empty_prompt_is_refused(prompts):
    with pytest.raises(InvalidText, match="a prompt is empty, so there is nothing to continue"):
        generate_text(model_of(), TOKENIZER, prompts)
    if isinstance(prompts, str):
        with pytest.raises(InvalidText, match="a prompt is empty"):
            stream_text(model_of(), TOKENIZER, prompts)


@pytest.mark.parametrize("prompt", [3, None, [1, 2], "\ud800"], ids=repr)
def test_a_prompt_that_is_no_text_is_refused(prompt):
    with pytest.raises(InvalidText, match="expected a string that can be encoded as UTF-8"):
        stream_text(model_of(), TOKENIZER, prompt)
