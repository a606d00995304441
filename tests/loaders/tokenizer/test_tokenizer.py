"""Tokenizers: ids, text and prompts equal those of transformers, and BOS appears once in a prompt."""

import json

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import GOLDEN
from hypothesis import strategies as st
from small_tokenizer import change_json, small_tokenizer

from perparam.loaders.tokenizer import Tokenizer, load_tokenizer
from perparam.policies.errors import InvalidText, InvalidTokens

LLAMA = ("llama3", "smollm2", "llama2", "metaspace")
FOLDERS = {"qwen3": GOLDEN / "chat", **{name: GOLDEN / "llama" / name for name in LLAMA}}
TOKENIZERS = {name: load_tokenizer(folder) for name, folder in FOLDERS.items()}
TOKENIZER = TOKENIZERS["qwen3"]
CASES = {name: json.loads((folder / "cases.json").read_text(encoding="utf-8")) for name, folder in FOLDERS.items()}
BOS = {"llama3": "<|begin_of_text|>", "llama2": "<s>", "metaspace": "<s>"}
USER = [{"role": "user", "content": "Hello"}]


def golden(*sections):
    """A parameter for each golden case: the tokenizer's name and the case."""
    return pytest.mark.parametrize(
        ("name", "case"),
        [
            pytest.param(name, case, id=f"{name}: {case.get('name') or ascii(case.get('text', case['ids']))[:24]}")
            for name, cases in CASES.items()
            for section in sections
            for case in cases.get(section, [])
        ],
    )


# Golden files of transformers.


@golden("chats", "continued")
def test_a_chat_is_rendered_and_encoded_as_transformers_does(name, case):
    tokenizer, options = TOKENIZERS[name], dict(case["options"])
    tools = options.pop("tools", None)
    assert tokenizer.apply_chat_template(case["messages"], tools=tools, **options) == case["prompt"]
    assert tokenizer.apply_chat_template(case["messages"], tokenize=True, tools=tools, **options) == case["ids"]


@golden("texts")
def test_text_is_encoded_as_transformers_does(name, case):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.encode(case["text"], add_special_tokens=False) == case.get("plain", case["ids"])


@golden("texts", "ids")
def test_ids_are_decoded_as_transformers_does(name, case):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(case["ids"]) == case["skipped"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["kept"]


def test_the_golden_files_cover_bos_byte_fallback_and_all_tokenizers():
    for name, bos in BOS.items():
        number = TOKENIZERS[name].token_id(bos)
        assert all(case["ids"] == [number, *case["plain"]] for case in CASES[name]["texts"])
    assert "\ufffd" in "".join(case["kept"] for case in CASES["llama2"]["ids"])
    assert all(len(CASES[name][section]) >= 7 for name in LLAMA for section in ("texts", "ids", "chats"))


def test_the_small_tokenizer_is_the_one_of_the_golden_files(folder):
    made = load_tokenizer(folder)
    for case in CASES["qwen3"]["texts"]:
        assert made.encode(case["text"]) == case["ids"]
    assert made.vocab_size == TOKENIZER.vocab_size == small_tokenizer().get_vocab_size()


# Ids and text.


@hypothesis.given(st.text())
def test_decoding_returns_the_normalized_text(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == small_tokenizer().normalizer.normalize_str(text)
    assert all(0 <= one < TOKENIZER.vocab_size for one in ids)


@pytest.mark.parametrize("name", ["llama3", "smollm2", "llama2"])
@hypothesis.given(text=st.text())
def test_decoding_returns_the_text(name, text):
    """Without a normalizer that changes characters; SentencePiece writes U+2581 for a space."""
    tokenizer, text = TOKENIZERS[name], text.replace("\u2581", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_may_be_arrays_and_ids_outside_the_vocabulary_are_ignored():
    ids = TOKENIZER.encode("Hello 你好")
    for given in (tuple(ids), iter(ids), np.array(ids), jnp.array(ids), [*ids, 10_000], list(map(np.int32, ids))):
        assert TOKENIZER.decode(given) == "Hello 你好"


@pytest.mark.parametrize("ids", [[[1, 2]], [1.5], ["a"], 3, None, np.zeros((2, 2), int), [-1], [2**32]], ids=repr)
def test_values_that_are_not_ids_are_refused(ids):
    with pytest.raises(InvalidTokens, match=r"expected (the )?token ids"):
        TOKENIZER.decode(ids)
    with pytest.raises(InvalidTokens, match=r"expected (the )?token ids"):
        TOKENIZER.decode_stream().add(ids)


@pytest.mark.parametrize("text", [None, 3, b"a", ["a"], "\ud800"], ids=repr)
def test_values_that_are_not_text_are_refused(text):
    for encode in (TOKENIZER.encode, TOKENIZER.encode_prompt):
        with pytest.raises(InvalidText, match="expected a string that can be encoded as UTF-8, found"):
            encode(text)


def test_ids_of_single_tokens():
    assert TOKENIZER.decode([TOKENIZER.token_id("</think>")]) == "</think>"
    with pytest.raises(InvalidTokens, match=r"chat: the vocabulary of 483 tokens has no token 'nowhere'\."):
        TOKENIZER.token_id("nowhere")


# Prompts.


@pytest.mark.parametrize("name", TOKENIZERS)
@hypothesis.given(text=st.lists(st.sampled_from(["BOS", "EOS", " ", "Hello", "\n", "你"]), max_size=4).map("".join))
def test_a_prompt_has_bos_once_more_than_its_text_unless_the_text_begins_with_it(name, text):
    tokenizer, bos = TOKENIZERS[name], BOS.get(name)
    text = text.replace("BOS", bos or "").replace("EOS", "")
    ids, plain = tokenizer.encode_prompt(text), tokenizer.encode(text, add_special_tokens=False)
    if bos is None or text.startswith(bos):
        assert ids == plain
    else:
        assert ids == [tokenizer.token_id(bos), *plain] == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_a_template_that_writes_bos_and_a_post_processor_that_adds_it_give_one(name):
    tokenizer, bos = TOKENIZERS[name], TOKENIZERS[name].token_id(BOS[name])
    prompt = tokenizer.apply_chat_template(USER)
    assert tokenizer.encode(prompt)[:2] == [bos, bos]
    assert tokenizer.encode_prompt(prompt) == tokenizer.apply_chat_template(USER, tokenize=True)
    assert tokenizer.encode_prompt(prompt).count(bos) == 1


def test_a_prompt_has_bos_if_the_template_does_not_write_it():
    tokenizer = TOKENIZERS["metaspace"]
    bos, ids = tokenizer.token_id("<s>"), tokenizer.apply_chat_template(USER, tokenize=True)
    assert bos not in ids
    assert tokenizer.encode_prompt(tokenizer.apply_chat_template(USER)) == [bos, *ids]


def test_a_prompt_has_bos_if_only_the_config_asks_for_it(folder):
    bos, ids = TOKENIZER.token_id("<|endoftext|>"), TOKENIZER.encode("Hello")
    change_json(folder / "tokenizer_config.json", add_bos_token=True, bos_token="<|endoftext|>")
    loaded = load_tokenizer(folder)
    assert loaded.encode("Hello") == ids  # as in transformers, which reads tokenizer.json's post-processor only
    assert loaded.encode_prompt("Hello") == loaded.encode_prompt("<|endoftext|>Hello") == [bos, *ids]
    assert loaded.encode_prompt("") == [bos]
    change_json(folder / "tokenizer_config.json", add_bos_token=False)
    assert load_tokenizer(folder).encode_prompt("Hello") == ids
    change_json(folder / "tokenizer_config.json", add_bos_token=True, bos_token=None)
    assert load_tokenizer(folder).encode_prompt("Hello") == ids


@pytest.mark.parametrize("written", ["post-processor", "config"])
def test_a_prompt_keeps_other_tokens_that_the_post_processor_adds(folder, written):
    bos, end = TOKENIZER.token_id("<|endoftext|>"), TOKENIZER.token_id("<|im_end|>")
    names = ["<|endoftext|>", "<|im_end|>"] if written == "post-processor" else ["<|im_end|>"]
    *before, after = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    single = [*before, {"Sequence": {"id": "A", "type_id": 0}}, after]
    processor = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [TOKENIZER.token_id(name)], "tokens": [name]} for name in names},
    }
    change_json(folder / "tokenizer.json", post_processor=processor)
    change_json(
        folder / "tokenizer_config.json", add_bos_token=True if written == "config" else ..., bos_token="<|endoftext|>"
    )
    loaded, ids = load_tokenizer(folder), TOKENIZER.encode("Hello")
    assert loaded.encode_prompt("Hello") == loaded.encode_prompt("<|endoftext|>Hello") == [bos, *ids, end]
    assert loaded.encode_prompt("") == [bos, end]


# Thinking.


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),
        ("Hm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),
        ("Hm.\n</think>\n\nYes.", True, ("Hm.", "Yes.")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("<think>\nHm", False, ("Hm", "")),
        ("Hm", True, ("Hm", "")),
        ("Yes.\n", False, ("", "Yes.\n")),
        ("One writes <think> so.", False, ("", "One writes <think> so.")),
        ("<think>a</think>It ends with </think>.", False, ("a", "It ends with </think>.")),
        ("", False, ("", "")),
    ],
)
def test_thinking_and_answer_are_split(text, opened, expected):
    assert Tokenizer.split_thinking(text, opened=opened) == expected
