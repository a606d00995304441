"""Stop strings end an answer wherever tokens and parts split them, and pieces of text join."""

import hypothesis
import pytest
from hypothesis import strategies as st
from scripted_text import END, LLAMA2, TOKENIZER, completed, ids, model_of, run, says, streamed

from perparam import generate_text, stream_text
from perparam.loaders import text
from perparam.policies.errors import InvalidText


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
def test_pieces_of_any_tokens_join_to_what_decode_gives(tokens, chunk):
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


def test_only_text_that_may_begin_a_stop_string_is_held_back():
    pieces, returned = streamed([ids(c)[0] for c in "a#b##c"], stop="###", chunk=1)
    assert pieces == ["a", "#b", "##c"]
    assert returned.text == "a#b##c"
    pieces, _ = streamed([ids(c)[0] for c in "xaab"], stop=["aaa", "ab!"], chunk=1)
    assert pieces == ["x", "a", "ab"]
    pieces, _ = streamed([ids(c)[0] for c in "xaabc"], stop=["aaa", "ab!"], chunk=1)
    assert pieces == ["x", "a", "abc"]


def test_text_that_was_held_back_comes_at_the_end():
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


@pytest.mark.parametrize("chunk", [1, 2, 9])
@pytest.mark.parametrize("after", [[], LLAMA2.eos_ids, [LLAMA2.token_id("a")]], ids=["nothing", "end", "letter"])
def test_a_stop_string_ends_an_answer_whose_byte_tokens_are_held_back(after, chunk):
    """Llama 2 writes a newline as a byte token, whose text is known only when another token or the end follows."""
    script = [LLAMA2.token_id("a"), LLAMA2.token_id("<0x0A>"), *after]
    with says(script):
        pieces, found = run(stream_text(model_of(), LLAMA2, "x", len(script), stop="\n", chunk=chunk))
    assert "".join(pieces) == found.text == "a"
    assert (found.finish_reason, found.tokens) == ("stop", tuple(script))


# What is refused.


@pytest.mark.parametrize("stop", ["", ["a", ""], [None], [3], b"a", [b"a"]], ids=repr)
def test_an_invalid_stop_string_is_refused(stop):
    for ask in (generate_text, stream_text):
        with pytest.raises(InvalidText, match="stop: expected strings of at least one character, found"):
            ask(model_of(), TOKENIZER, "a", stop=stop)
