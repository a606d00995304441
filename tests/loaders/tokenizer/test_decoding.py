"""Streaming decoders: the pieces of a stream join to the text of all ids, for each kind of decoder."""

import json
import shutil

import hypothesis
import pytest
from checkpoints import GOLDEN
from hypothesis import strategies as st
from small_tokenizer import change_json
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Backend

from perparam.loaders.tokenizer import DecodeStream, load_tokenizer
from perparam.policies.errors import UnsupportedConfig

TOKENIZERS = {"qwen3": load_tokenizer(GOLDEN / "chat")} | {
    name: load_tokenizer(GOLDEN / "llama" / name) for name in ("llama3", "smollm2", "llama2", "metaspace")
}


def pieces(stream, ids, step):
    return [*(stream.add(ids[start : start + step]) for start in range(0, len(ids), step)), stream.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@hypothesis.settings(max_examples=30)
@hypothesis.given(data=st.data(), skip=st.booleans(), step=st.integers(1, 4))
def test_a_stream_returns_in_pieces_the_text_that_decode_returns(name, data, skip, step):
    tokenizer = TOKENIZERS[name]
    # The first ids are special tokens and bytes, which make up most invalid sequences.
    one = st.one_of(st.integers(0, 260), st.integers(0, tokenizer.vocab_size + 1))
    ids = data.draw(st.lists(one, max_size=20))
    stream = tokenizer.decode_stream(skip_special_tokens=skip)
    assert "".join(pieces(stream, ids, step)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", TOKENIZERS)
@hypothesis.given(text=st.text(st.sampled_from("a é中👩\u200d\n▁<>"), max_size=12), step=st.integers(1, 3))
def test_a_stream_never_takes_back_text(name, text, step):
    tokenizer = TOKENIZERS[name]
    ids, stream, seen = tokenizer.encode(text), tokenizer.decode_stream(), ""
    expected = tokenizer.decode(ids)
    for piece in pieces(stream, ids, step):
        seen += piece
        assert expected.startswith(seen)
    assert seen == expected


BYTES = "<0xE4> <0xBD> <0xA0> <0xF0> <0x9F> <0xFF> <0x80> <0x41> <0x0a> <0x20> <0xC3>".split()
ODD = [
    "",
    "\u2581",
    "\u2581\u2581a",
    " ",
    "   b",
    "a",
    "é",
    "Ġ",
    "Ã",
    "©",
    "<0x+A>",
    "<0xé>",
    "<0x4>",
    "<0x441>",
    "</s>",
]
VOCABULARY = {token: number for number, token in enumerate(BYTES + ODD + ["<s>", "<kept>"])}


def backend(decoder):
    """A tokenizer of tokens that decoders may take for something else."""
    made = Backend(models.BPE(vocab=VOCABULARY, merges=[]))
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    made.add_tokens([AddedToken("<kept>", special=False)])
    made.decoder = decoder
    return made


def sequence(*steps):
    return decoders.Sequence(list(steps))


REPLACE, FALLBACK, FUSE = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()
STRIP = decoders.Strip(" ", 1, 0)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.ByteLevel(),
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="first"),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Metaspace(replacement="a"),
        decoders.ByteFallback(),
        sequence(),
        sequence(REPLACE, FALLBACK, FUSE, STRIP),
        sequence(REPLACE, FALLBACK, FUSE),
        sequence(REPLACE, FALLBACK),
        sequence(FALLBACK, REPLACE, FUSE, decoders.Strip(" ", 3, 0), decoders.Strip("a", 1, 0)),
        sequence(FALLBACK, decoders.Metaspace()),
        sequence(decoders.Metaspace(), FALLBACK, FUSE),
        sequence(decoders.Replace("0x", ""), FALLBACK, FUSE),
        sequence(decoders.Replace("a", "<0x41>"), FALLBACK, FUSE),
        sequence(REPLACE, decoders.ByteLevel(), STRIP),
        sequence(decoders.ByteLevel(), FUSE, decoders.Strip("b", 0, 0)),
    ],
    ids=lambda decoder: repr(decoder)[:60],
)
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    ids=st.lists(st.integers(0, len(VOCABULARY)), max_size=10), skip=st.booleans(), step=st.integers(1, 3)
)
def test_each_kind_of_decoder_streams_exactly(decoder, ids, skip, step):
    made = backend(decoder)
    stream = DecodeStream(made, {"<s>", "</s>"} if skip else ())
    assert "".join(pieces(stream, ids, step)) == made.decode(ids, skip_special_tokens=skip)
    # A flushed stream starts a new text.
    assert "".join(pieces(stream, ids, step)) == made.decode(ids, skip_special_tokens=skip)


def test_a_special_token_stays_special_when_the_config_declares_it_again(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for token in config["added_tokens_decoder"].values():
        token["special"] = False
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=config["added_tokens_decoder"])
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.token_id(token) for token in ("<|im_start|>", "user", "<|endoftext|>", "<think>")]
    assert "".join(pieces(tokenizer.decode_stream(), ids, 1)) == tokenizer.decode(ids) == "user<think>"


def test_a_special_token_that_decodes_to_nothing_stays_special_too(tmp_path):
    shutil.copytree(GOLDEN / "llama" / "metaspace", tmp_path, dirs_exist_ok=True)
    whole = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    number = whole["model"]["vocab"]["\u2581"]
    token = {"content": "\u2581", **dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)}
    added = [*whole["added_tokens"], {**token, "id": number, "special": True}]
    change_json(tmp_path / "tokenizer.json", added_tokens=added)
    change_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(number): {**token, "special": False}})
    tokenizer = load_tokenizer(tmp_path)
    ids = [number, *tokenizer.encode("hello"), number, *tokenizer.encode("world")]
    assert "".join(pieces(tokenizer.decode_stream(), ids, 1)) == tokenizer.decode(ids) == "hello world"


@pytest.mark.parametrize(
    ("decoder", "tokens", "text"),
    [
        (decoders.Metaspace(), ["", "\u2581\u2581a"], "  a"),
        (decoders.Metaspace(), ["\u2581\u2581a", "\u2581"], "a "),
        (FALLBACK, ["<0xC3>", "", "<0xA0>"], "\ufffd\ufffd"),
    ],
)
def test_empty_tokens_count_as_tokens(decoder, tokens, text):
    made = backend(decoder)
    ids = [VOCABULARY[token] for token in tokens]
    assert "".join(pieces(DecodeStream(made), ids, 1)) == made.decode(ids) == text


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.WordPiece(), "decoder WordPiece"),
        (decoders.BPEDecoder(), "decoder BPEDecoder"),
        (decoders.CTC(), "decoder CTC"),
        (decoders.Replace(Regex(".."), "b"), "decoder Replace"),
        (STRIP, "decoder Strip"),
        (sequence(REPLACE, decoders.WordPiece()), "decoder Sequence: step WordPiece"),
        (sequence(REPLACE, STRIP), "decoder Sequence: step Strip"),
        (sequence(FUSE, decoders.Strip(" ", 1, 1)), "decoder Sequence: step Strip"),
        (sequence(FUSE, REPLACE), "decoder Sequence: step Replace"),
        (sequence(decoders.ByteLevel(), FALLBACK), "decoder Sequence: step ByteFallback"),
        (sequence(FUSE, decoders.Metaspace()), "decoder Sequence: step Metaspace"),
        (sequence(sequence(FUSE), STRIP), "decoder Sequence: step Sequence"),
    ],
    ids=str,
)
def test_other_decoders_are_refused_by_name(decoder, name):
    with pytest.raises(UnsupportedConfig, match=rf"tokenizer\.json: {name} is not implemented here\. Supported"):
        DecodeStream(backend(decoder))


@pytest.mark.parametrize(
    ("fields", "name"), [(None, "null"), ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece")]
)
def test_a_tokenizer_with_another_decoder_is_not_loaded(folder, fields, name):
    change_json(folder / "tokenizer.json", decoder=fields)
    with pytest.raises(UnsupportedConfig, match=rf"tokenizer\.json: decoder {name} is not implemented here"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["a👩‍👩‍👧b", "你好文", "🇩🇪", "é", "<think>中</think>"])
def test_a_character_that_is_split_over_tokens_is_held_back(text):
    tokenizer = TOKENIZERS["qwen3"]
    stream, seen = tokenizer.decode_stream(), ""
    for one in tokenizer.encode(text):
        seen += stream.add([one])
        assert text.startswith(seen)
    assert seen == text
    assert stream.flush() == ""


def test_flush_replaces_an_incomplete_character():
    tokenizer = TOKENIZERS["qwen3"]
    stream = tokenizer.decode_stream()
    first, *_ = tokenizer.encode("👩")
    assert stream.add([first]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.add(tokenizer.encode("Hello")) == "Hello"


def test_byte_tokens_wait_for_the_end_of_their_run():
    tokenizer = TOKENIZERS["llama2"]
    ids = {text: tokenizer.token_id(text) for text in ("<0xE4>", "<0xB8>", "<0xAD>", "\u2581", "a")}
    stream = tokenizer.decode_stream()
    assert stream.add([ids["\u2581"], ids["a"]]) == "a"
    assert stream.add([ids["<0xE4>"], ids["<0xB8>"], ids["<0xAD>"]]) == ""
    assert stream.add([ids["a"]]) == "中a"
    assert stream.add([ids["<0xE4>"], ids["<0xB8>"], ids["<0xAD>"], ids["<0xE4>"]]) == ""
    assert stream.flush() == "\ufffd" * 4
