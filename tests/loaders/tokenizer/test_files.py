"""The files of a tokenizer: what each of them decides, and the errors for missing, damaged and contradictory ones."""

import json
import os

import pytest
from checkpoints import GOLDEN
from small_tokenizer import change_json, write_json

from perparam.loaders.tokenizer import files, load_tokenizer
from perparam.policies.errors import InvalidCheckpoint, MissingFile

CHAT = GOLDEN / "chat"
TOKENIZER = load_tokenizer(CHAT)
USER = [{"role": "user", "content": "Hello"}]


# What each file decides.


def test_ids_are_those_of_the_generation_config_else_of_the_tokens(folder):
    end, text_end = TOKENIZER.token_id("<|im_end|>"), TOKENIZER.token_id("<|endoftext|>")
    loaded = load_tokenizer(folder)
    assert (loaded.eos_ids, loaded.pad_id) == ((end, text_end), text_end)
    change_json(folder / "generation_config.json", eos_token_id=text_end, pad_token_id=end)
    loaded = load_tokenizer(folder)
    assert (loaded.eos_ids, loaded.pad_id) == ((text_end,), end)
    (folder / "generation_config.json").unlink()
    loaded = load_tokenizer(folder)
    assert (loaded.eos_ids, loaded.pad_id) == ((end,), text_end)
    change_json(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    loaded = load_tokenizer(folder)
    assert (loaded.eos_ids, loaded.pad_id) == ((), None)


def test_tokenizer_json_alone_is_enough_for_text(folder):
    for path in folder.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    loaded = load_tokenizer(folder)
    assert loaded.encode("Hello") == TOKENIZER.encode("Hello")
    with pytest.raises(InvalidCheckpoint, match="expected a chat template named default, found none"):
        loaded.apply_chat_template(USER)


def test_special_tokens_may_be_objects_and_in_the_older_files(folder):
    change_json(
        folder / "tokenizer_config.json", added_tokens_decoder=..., eos_token=..., pad_token=..., bos_token="<|im_end|>"
    )
    (folder / "generation_config.json").unlink()
    change_json(folder / "special_tokens_map.json", eos_token={"content": "<|im_end|>", "lstrip": False})
    size = TOKENIZER.vocab_size
    change_json(folder / "added_tokens.json", **{"<|im_end|>": TOKENIZER.token_id("<|im_end|>"), "<new>": size})
    loaded = load_tokenizer(folder)
    assert loaded.eos_ids == (TOKENIZER.token_id("<|im_end|>"),)
    assert loaded.encode("a<new>") == [*TOKENIZER.encode("a"), size]
    change_json(folder / "added_tokens.json", **{"<new>": size + 7})
    with pytest.raises(
        InvalidCheckpoint, match=rf"added_tokens.json: <new> is declared as token {size + 7}, but .* is {size}"
    ):
        load_tokenizer(folder)


def test_an_ordinary_token_that_is_named_becomes_a_special_one(folder):
    change_json(folder / "tokenizer_config.json", additional_special_tokens=["user"])
    loaded = load_tokenizer(folder)
    assert loaded.encode("xuser") == [*TOKENIZER.encode("x"), TOKENIZER.token_id("user")]
    assert loaded.decode(loaded.encode("xuser")) == "x"


def test_special_tokens_in_a_text_are_split_if_the_config_says_so(folder):
    end = TOKENIZER.token_id("<|im_end|>")
    assert TOKENIZER.encode("a<|im_end|>") == [*TOKENIZER.encode("a"), end]
    change_json(folder / "tokenizer_config.json", split_special_tokens=True)
    loaded = load_tokenizer(folder)
    ids = loaded.encode("a<|im_end|>")
    assert end not in ids
    assert loaded.decode(ids) == "a<|im_end|>"


def test_spaces_before_punctuation_are_kept(folder):
    change_json(folder / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    assert load_tokenizer(folder).decode(TOKENIZER.encode("Hello , it .")) == "Hello , it ."


def test_texts_are_neither_truncated_nor_padded(folder):
    length = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    change_json(folder / "tokenizer.json", truncation=length, padding=padding)
    assert load_tokenizer(folder).encode("Hello world") == TOKENIZER.encode("Hello world")


def test_which_chat_template_counts(folder):
    change_json(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}],
    )
    loaded = load_tokenizer(folder)
    assert (loaded.apply_chat_template(USER), loaded.apply_chat_template(USER, tools=[])) == ("plain", "tools")
    change_json(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(InvalidCheckpoint, match="expected a chat template named default, found only rag"):
        load_tokenizer(folder).apply_chat_template(USER)
    (folder / "chat_template.jinja").write_bytes(b"{% if true %}\r\nfrom a file {{ eos_token }}{% endif %}")
    assert load_tokenizer(folder).apply_chat_template(USER) == "from a file <|im_end|>"


# Missing, damaged and contradictory files.


def test_a_missing_tokenizer_says_what_to_do(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingFile, match=r"not from vocab.json, merges.txt or .* Download it, or write it with"):
        load_tokenizer(folder)
    with pytest.raises(MissingFile, match="neither a folder nor a name on the hub"):
        load_tokenizer(folder / "nowhere")


@pytest.mark.parametrize(
    "data",
    [b"", b"[" * 100_000, b"\xff", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'],
    ids=lambda data: repr(data[:10]),
)
def test_a_tokenizer_that_cannot_be_read(folder, data):
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer.json: not readable as a tokenizer: .* Download it again"):
        load_tokenizer(folder)


def test_files_that_are_too_large_or_no_files(folder, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_TEMPLATE", 10)
    (folder / "chat_template.jinja").write_text("x" * 11)
    with pytest.raises(InvalidCheckpoint, match=r"chat_template.jinja: larger than the limit of 0 KiB"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(
        InvalidCheckpoint, match=r"tokenizer_config.json: chat_template: larger than the limit of 0 KiB"
    ):
        load_tokenizer(folder)
    monkeypatch.setattr(files, "LARGEST", 10)
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer.json: larger than the limit of 0 KiB"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer.json: expected a regular file"):
        load_tokenizer(folder)


def test_a_template_that_is_no_utf8(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InvalidCheckpoint, match=r"chat_template.jinja: not UTF-8"):
        load_tokenizer(folder)


def test_added_tokens_keep_the_ids_of_the_file(folder):
    given = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    given["added_tokens"][-1]["id"] += 3
    write_json(folder / "tokenizer.json", given)
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer.json: </think> is declared as token 485, but .* is 482"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token": 3}, "eos_token: expected the text of a token, of 1 to 512 characters, found 3"),
        ({"eos_token": {"content": None}}, "eos_token: expected the text of a token"),
        ({"pad_token": "<none>"}, "the special token <none> is not in tokenizer.json"),
        ({"additional_special_tokens": "x"}, "additional_special_tokens: expected a list of tokens, found 'x'"),
        ({"additional_special_tokens": [1]}, "additional_special_tokens: expected the text of a token"),
        ({"add_bos_token": "yes"}, "add_bos_token: expected true or false, found 'yes'"),
        ({"added_tokens_decoder": [1]}, "the added tokens cannot be read"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "the added tokens cannot be read"),
        ({"added_tokens_decoder": {"3": {"nothing": "a"}}}, "the added tokens cannot be read"),
        (
            {"added_tokens_decoder": {"3": {"content": "<think>"}}},
            "<think> is declared as token 3, but its id in tokenizer.json",
        ),
        (
            {"chat_template": 3},
            "chat_template: expected a string, or a list of objects with name and template, found 3",
        ),
        ({"chat_template": [{"name": "default"}]}, "chat_template: expected a string, or a list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_is_wrong(folder, fields, message):
    change_json(folder / "tokenizer_config.json", **fields)
    with pytest.raises(InvalidCheckpoint, match=message):
        load_tokenizer(folder)
