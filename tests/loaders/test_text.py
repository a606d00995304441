"""Text in, text out: stop strings wherever tokens and parts split them, ends and their reasons, pieces that join."""

import contextlib
import dataclasses
import json
import time
import types

import hypothesis
import numpy as np
import pytest
from checkpoints import GOLDEN, fields, tensors, write
from hypothesis import strategies as st

import perparam
from perparam import Policy, Sampling, generate, generate_text, stream_text
from perparam.generation import GenerationConfig, prefill
from perparam.loaders import sampling_defaults, text
from perparam.loaders.tokenizer import load_tokenizer
from perparam.models import Generated, generate_with_logprobs
from perparam.models.generation.sampling import GREEDY
from perparam.policies.errors import InvalidCheckpoint, InvalidSampling, InvalidText, InvalidTokens

TOKENIZER = load_tokenizer(GOLDEN / "chat")
LLAMA2, LLAMA3 = (load_tokenizer(GOLDEN / "llama" / name) for name in ("llama2", "llama3"))
END, START = TOKENIZER.token_id("<|im_end|>"), TOKENIZER.token_id("<|im_start|>")


# A model that says what it is told to.


def scripted(*scripts):
    """A `decode` that answers row i with the tokens `scripts[i]`, then goes on with 0s; `asked` notes what it got."""
    asked = []

    def decode(model, ids, mask, config, *, chunk):
        count, eos, samples = config.max_new_tokens, config.eos_token_id, config.num_return_sequences
        asked.append({"ids": ids, "mask": mask, "eos": eos, "chunk": chunk, "samples": samples, "sent": []})
        rows = np.array([[*script, *[0] * count][:count] for script in scripts], np.int32).reshape(len(scripts), count)
        done, given = np.zeros(len(rows), bool), 0
        while given < count and not done.all():
            stop, lengths = min(given + chunk, count), np.zeros(len(rows), np.int32)
            part = rows[:, given:stop].copy()
            for place in range(part.shape[1]):
                lengths += ~done
                part[done, place] = 0
                done = done | np.isin(part[:, place], eos) & ~done
                if done.all():
                    part = part[:, : place + 1]
                    break
            told = None if config.logprobs is None else -part.astype(np.float32)
            ended = yield Generated(part, lengths, done.copy(), told)
            asked[-1]["sent"].append(ended)
            done, given = done | ended, stop

    decode.asked = asked
    return decode


def model_of(eos=()):
    return types.SimpleNamespace(config=types.SimpleNamespace(eos_token_id=eos))


@contextlib.contextmanager
def says(*scripts):
    """A context in which models answer so."""
    before, text.decode = text.decode, scripted(*scripts)
    try:
        yield text.decode.asked
    finally:
        text.decode = before


def run(pieces):
    """The pieces of a stream, and the completion that it returns."""
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


def streamed(script, **options):
    with says(script):
        count = options.pop("count", len(script))
        return run(stream_text(model_of(), TOKENIZER, "Hello", count, **options))


def completed(script, **options):
    with says(script):
        count = options.pop("count", len(script))
        (found,) = generate_text(model_of(), TOKENIZER, "Hello", count, **options)
        return found


def ids(text):
    return TOKENIZER.encode(text)


def expected(tokens, stops):
    """The text and the number of tokens of an answer, by looking at the text after every token."""
    for count in range(1, len(tokens) + 1):
        so_far = TOKENIZER.decode(tokens[:count]).rstrip("�")
        if places := [so_far.find(stop) for stop in stops if stop in so_far]:
            return so_far[: min(places)], count, "stop"
    return TOKENIZER.decode(tokens), len(tokens), "length"


ALPHABET = st.sampled_from(["a", "b", "\n", " the", "é", "中", "👩", "hello", "."])
STOPS = st.lists(st.lists(ALPHABET, min_size=1, max_size=3).map("".join), max_size=3)


@hypothesis.given(st.lists(ALPHABET, max_size=20).map("".join), STOPS, st.integers(1, 9))
@hypothesis.settings(max_examples=300)
def test_an_answer_ends_before_its_first_stop_string(answer, stops, chunk):
    """However tokens and parts split it, in one piece or streamed."""
    tokens = ids(answer)
    wanted, count, reason = expected(tokens, stops)
    whole = completed(tokens, stop=stops)
    assert (whole.text, whole.tokens, whole.finish_reason) == (wanted, tuple(tokens[:count]), reason)
    pieces, returned = streamed(tokens, stop=stops, chunk=chunk)
    assert "".join(pieces) == wanted
    assert all(pieces)
    assert returned == whole


@hypothesis.given(st.lists(st.integers(0, TOKENIZER.vocab_size + 3)), st.integers(1, 9))
def test_whatever_tokens_come_pieces_join_to_what_decode_gives(tokens, chunk):
    tokens = [token for token in tokens if token not in TOKENIZER.eos_ids]
    pieces, returned = streamed(tokens, chunk=chunk)
    assert "".join(pieces) == returned.text == completed(tokens).text == TOKENIZER.decode(tokens)
    assert returned.finish_reason == "length"


# Stop strings.


@pytest.mark.parametrize("chunk", range(1, 8))
def test_a_stop_string_is_found_across_tokens_and_parts(chunk):
    """Four tokens spell it, and what comes before begins like it."""
    tokens = [one for character in "ab#x##b##END##c" for one in ids(character)]
    pieces, returned = streamed(tokens, stop="##END##", chunk=chunk)
    assert "".join(pieces) == returned.text == "ab#x##b"
    assert returned.finish_reason == "stop"
    assert len(returned.tokens) == len("ab#x##b##END##")


def test_what_may_begin_a_stop_string_is_held_back_and_nothing_else():
    pieces, returned = streamed([ids(c)[0] for c in "a#b##c"], stop="###", chunk=1)
    assert pieces == ["a", "#b", "##c"]
    assert returned.text == "a#b##c"
    pieces, _ = streamed([ids(c)[0] for c in "xaab"], stop=["aaa", "ab!"], chunk=1)
    assert pieces == ["x", "a", "ab"]
    pieces, _ = streamed([ids(c)[0] for c in "xaabc"], stop=["aaa", "ab!"], chunk=1)
    assert pieces == ["x", "a", "abc"]


def test_what_was_held_back_comes_at_the_end():
    letters = [ids(c)[0] for c in "ab##"]
    assert streamed(letters, stop="###", chunk=1)[0] == ["a", "b", "##"]
    pieces, returned = streamed([*letters, END], stop="###", chunk=1)
    assert pieces == ["a", "b", "##"]
    assert (returned.text, returned.finish_reason) == ("ab##", "stop")


def test_the_first_of_several_stop_strings_counts():
    (token,) = ids(" world")
    assert completed([token], stop=["ld", "wo"]).text == " "
    assert completed([token], stop=["or", "r"]).text == " w"
    assert completed([token], stop=" world").text == ""
    assert completed([token, token], stop="d w").text == " worl"


def test_a_stop_string_is_not_looked_for_in_the_prompt():
    assert completed(ids("world"), stop="Hello").text == "world"
    assert completed(ids("o world"), stop="Helloo").text == "o world"


def test_nothing_is_decoded_after_all_rows_have_stopped():
    with says(ids("a!bc" * 20), ids("ab!c" * 20)) as asked:
        found = generate_text(model_of(), TOKENIZER, ["x", "yy"], 60, stop="!")
    assert [each.text for each in found] == ["a", "ab"]
    sent = asked[0]["sent"]
    assert len(sent) == 1
    assert sent[0].tolist() == [True, True]


def test_rows_stop_one_by_one():
    with says(ids("a" * 30 + "!" + "b" * 9), ids("!" + "c" * 50), ids("d" * 40)) as asked:
        found = generate_text(model_of(), TOKENIZER, ["x", "y", "z"], 40, stop="!")
    assert [each.text for each in found] == ["a" * 30, "", "d" * 40]
    assert [each.finish_reason for each in found] == ["stop", "stop", "length"]
    assert [len(each.tokens) for each in found] == [31, 1, 40]
    assert asked[0]["sent"][0].tolist() == [False, True, False]


def test_without_stop_strings_all_is_decoded_at_once():
    with says(ids("a" * 50)) as asked:
        generate_text(model_of(), TOKENIZER, "x", 50)
        generate_text(model_of(), TOKENIZER, "x", 50, stop="!")
    assert [one["chunk"] for one in asked] == [50, text.CHUNK]


# Ends.


def test_a_token_that_ends_an_answer_is_no_part_of_its_text():
    for chunk in (1, 3, 100):
        pieces, found = streamed([*ids("Hello"), END, *ids("more")], chunk=chunk)
        assert "".join(pieces) == found.text == "Hello"
        assert found.tokens == (*ids("Hello"), END)
        assert found.finish_reason == "stop"


def test_reasons():
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


def test_special_tokens_are_no_text_and_thinking_is():
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


@pytest.mark.parametrize("chunk", [1, 2, 9])
@pytest.mark.parametrize("after", [[], LLAMA2.eos_ids, [LLAMA2.token_id("a")]], ids=["nothing", "end", "letter"])
def test_a_stop_string_ends_an_answer_whose_byte_tokens_are_held_back(after, chunk):
    """Llama 2 writes a newline as a byte token, whose text is known only when another token or the end follows."""
    script = [LLAMA2.token_id("a"), LLAMA2.token_id("<0x0A>"), *after]
    with says(script):
        pieces, found = run(stream_text(model_of(), LLAMA2, "x", len(script), stop="\n", chunk=chunk))
    assert "".join(pieces) == found.text == "a"
    assert (found.finish_reason, found.tokens) == ("stop", tuple(script))


# What is told and asked.


def test_log_probabilities_are_those_of_the_tokens():
    tokens = ids("ab!cd")
    assert completed(tokens).logprobs is None
    found = completed(tokens, logprobs=True)
    assert found.logprobs == tuple(-float(token) for token in tokens)
    stopped = completed(tokens, stop="!", logprobs=True)
    assert stopped.logprobs == tuple(-float(token) for token in tokens[:3])
    assert len(stopped.tokens) == 3


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


@pytest.mark.parametrize("stop", ["", ["a", ""], [None], [3], b"a", [b"a"]], ids=repr)
def test_what_is_no_stop_string_is_refused(stop):
    for ask in (generate_text, stream_text):
        with pytest.raises(InvalidText, match="stop: expected strings of at least one character, found"):
            ask(model_of(), TOKENIZER, "a", stop=stop)


@pytest.mark.parametrize("prompts", ["", [], ["a", ""]], ids=repr)
def test_an_empty_prompt_is_refused(prompts):
    with pytest.raises(InvalidText, match="a prompt is empty, so there is nothing to continue"):
        generate_text(model_of(), TOKENIZER, prompts)
    if isinstance(prompts, str):
        with pytest.raises(InvalidText, match="a prompt is empty"):
            stream_text(model_of(), TOKENIZER, prompts)


@pytest.mark.parametrize("prompt", [3, None, [1, 2], "\ud800"], ids=repr)
def test_what_is_no_text_is_refused(prompt):
    with pytest.raises(InvalidText, match="expected a string that can be encoded as UTF-8"):
        stream_text(model_of(), TOKENIZER, prompt)


# A model of its own.


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


def test_stop_strings_of_what_a_model_says(model, answers):
    said = answers[0].text
    stop = said[len(said) // 2 :][:2]
    (found,) = generate_text(model, TOKENIZER, PROMPTS[0], NEW, stop=stop, sampling=WARM, key=[1])
    assert found.text == said[: said.index(stop)]
    assert found.finish_reason == "stop"
    assert found.tokens == answers[0].tokens[: len(found.tokens)]
    pieces, streamed = run(stream_text(model, TOKENIZER, PROMPTS[0], NEW, stop=stop, sampling=WARM, key=[1], chunk=3))
    assert "".join(pieces) == found.text
    assert streamed == found


def test_greedily_by_default(model):
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
def test_a_chunk_that_is_none_is_refused(model, chunk):
    with pytest.raises(InvalidTokens, match="chunk: expected an integer of 1 or more"):
        stream_text(model, TOKENIZER, "Hello", chunk=chunk)


# generation_config.json.


def defaults(folder, **config):
    (folder / "generation_config.json").write_text(json.dumps(config))
    return sampling_defaults(folder)


def test_the_makers_way_of_sampling_is_read(tmp_path):
    """As Qwen3-0.6B has it."""
    config = {
        "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0",
    }  # fmt: skip
    assert defaults(tmp_path, **config) == Sampling(temperature=0.6, top_k=20, top_p=0.95)


def test_fields_that_are_null_or_not_there_have_no_effect(tmp_path):
    assert defaults(tmp_path, do_sample=True) == Sampling()
    assert defaults(tmp_path, do_sample=True, top_k=None, temperature=1, min_p=0.1) == Sampling(min_p=0.1)
    assert defaults(tmp_path, do_sample=True, repetition_penalty=1.05).repetition_penalty == 1.05


def test_without_the_file_or_without_sampling_it_is_greedy(tmp_path):
    assert sampling_defaults(tmp_path) == GREEDY
    assert sampling_defaults(str(tmp_path)) == GREEDY
    for config in ({}, {"temperature": 0.6}, {"do_sample": False, "temperature": 0.6}, {"do_sample": None}):
        assert defaults(tmp_path, **config) == GREEDY


@pytest.mark.parametrize(
    "wrong", [{"temperature": "0.6"}, {"top_k": 20.5}, {"top_k": True}, {"top_p": [0.9]}, {"min_p": False}], ids=str
)
def test_fields_of_another_type_are_refused(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(InvalidCheckpoint, match=rf"generation_config\.json: {name}: expected a number, found"):
        defaults(tmp_path, do_sample=True, **wrong)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 1.5}, {"top_k": -3}], ids=str)
def test_fields_out_of_range_are_refused(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(InvalidSampling, match=f"{name}: expected a number from"):
        defaults(tmp_path, do_sample=True, **wrong)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json"):
        sampling_defaults(tmp_path)


def test_a_completion_says_when_its_tokens_came():
    before = time.perf_counter()
    _, found = streamed(ids("Hello, how are you"), chunk=1)
    first, last = found.arrived
    assert before < first < last < time.perf_counter()
    _, found = streamed(ids("Hello, how are you"), chunk=100)
    assert found.arrived[0] == found.arrived[1]
    assert found == dataclasses.replace(found, arrived=(0.0, 0.0))  # the same answer, whenever it came
