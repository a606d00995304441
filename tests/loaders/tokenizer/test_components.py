"""Parts of a tokenizer.json that are refused before the package tokenizers reads them, and panics of that package."""

import json

import pytest
from small_tokenizer import change_json

from perparam.loaders.tokenizer import files, load_tokenizer
from perparam.loaders.tokenizer.split_patterns import takes_linear_time
from perparam.policies.errors import InvalidCheckpoint, PerparamError, UnsupportedConfig


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(key, *steps):
    return {"type": "Sequence", key: list(steps)}


def template(*pieces, **tokens):
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": tokens}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
END = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("normalizer", sequence("normalizers", *[replace("a", "a" * 100)] * 4), "content: expected 0 to 16"),
        ("normalizer", sequence("normalizers", *[replace("a", "aa")] * 16), "content: expected at most the 1"),
        ("normalizer", replace("", "a"), "Replace: pattern: String: expected 1 to 16 characters, found ''"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "a*"}, "content": ""}, "Replace: pattern: String"),
        ("normalizer", {"type": "Prepend", "prepend": "aa"}, "Prepend: prepend: expected one character, found 'aa'"),
        ("normalizer", sequence("normalizers", *[{"type": "NFC"}] * 17), "expected at most 16 steps, found 17"),
        ("normalizer", sequence("normalizers", sequence("normalizers")), "step Sequence is not implemented here"),
        ("normalizer", {"type": "Lowercase"}, "Lowercase is not implemented here. Supported are NFC"),
        ("pre_tokenizer", sequence("pretokenizers", *[{"type": "ByteLevel"}] * 2), "ByteLevel: expected it once"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "FixedLength is not implemented here"),
        ("pre_tokenizer", split("(a+a+)+b"), r"the regular expression '\(a\+a\+\)\+b' may take more than linear time"),
        ("pre_tokenizer", {**split(""), "pattern": {"String": ""}}, "Split: pattern: String: expected 1 to 16"),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": ""}, "Metaspace: replacement: expected one character"),
        ("decoder", replace("a", "aa"), "Replace: content: expected at most the 1 characters"),
        ("decoder", {"type": "Strip", "content": " ", "start": 2**40, "stop": 0}, "Strip: start: expected 0 to 16"),
        ("model", {"type": "Unigram", "vocab": [["a", 0.0]]}, "Unigram is not implemented here. Supported is BPE"),
        ("post_processor", template(*[END] * 17, **{}), "in at most 16 pieces, found 0 texts in 17"),
        ("post_processor", template(TEXT, TEXT), "expected each text once, in at most 16 pieces, found 2 texts"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_parts_that_no_family_uses_are_refused_by_name(folder, key, value, message):
    change_json(folder / "tokenizer.json", **{key: value})
    with pytest.raises(
        UnsupportedConfig, match=rf"tokenizer\.json: ({key}|Temp).*{message}.* If you trust this checkpoint"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"post_processor": template(END, TEXT)}, r"the token '<\|im_end\|>' is not in special_tokens"),
        ({"post_processor": template(END, **{"<|im_end|>": {"ids": [3], "tokens": ["<|im_end|>"]}})},
         "expected ids and tokens of the vocabulary"),
        ({"post_processor": template(END, **{"<|im_end|>": {"ids": [], "tokens": []}})},
         "expected ids and tokens of the vocabulary"),
        ({"normalizer": 3}, "normalizer: expected an object with a type, found 3"),
        ({"added_tokens": [{"id": [1], "content": "a"}]}, r"the id of the added token 'a': .* found \[1\]"),
        ({"added_tokens": [{"id": 0, "content": "a" * 513}]}, "the text of a token, of 1 to 512 characters"),
        ({"model": {}}, "the model is missing, or has no type"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_parts_that_contradict_themselves_are_refused(folder, fields, message):
    change_json(folder / "tokenizer.json", **fields)
    with pytest.raises(InvalidCheckpoint, match=rf"tokenizer\.json: .*{message}.* Download"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"<a>": [1]}, r"the id of the added token '<a>': expected an integer .*, found \[1\]"),
        ({"<a>": {"id": 1}}, "the id of the added token '<a>'"),
        ({"<a>": True}, "the id of the added token '<a>'"),
        ({"<a>": 483, "<b>": 483}, "two tokens have the same id"),
        ({"a" * 10_000_000: 483}, r"of 1 to 512 characters, found .* \(10000002 characters\)"),
        (
            {f"<{i:500}>": 483 + i for i in range(2100)},
            "expected at most 65536 added tokens of 1048576 characters in all",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_added_tokens_have_ids_and_bounded_lengths(folder, ids, message):
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=...)
    change_json(folder / "added_tokens.json", **ids)
    with pytest.raises((InvalidCheckpoint, UnsupportedConfig), match=rf"added_tokens\.json: .*{message}"):
        load_tokenizer(folder)


def test_half_of_a_surrogate_pair_is_no_token(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "eos_token": "\ud800"}))
    with pytest.raises(InvalidCheckpoint, match=r"eos_token: half of a surrogate pair in '\\ud800'\. Download"):
        load_tokenizer(folder)


class PanicException(BaseException):
    """What pyo3 raises when Rust panics: no Exception."""


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_panic_is_an_error_of_perparam_and_an_interrupt_is_not(folder, method, monkeypatch):
    loaded, raised = load_tokenizer(folder), []

    class Backend:
        def __getattr__(self, name):
            raise raised[0]

    monkeypatch.setattr(loaded, "_backend", Backend())
    call, given = getattr(loaded, method), "a" if method == "encode" else [1]
    raised[:] = [PanicException("index out of bounds")]
    with pytest.raises(
        InvalidCheckpoint, match=rf"tokenizer\.json: the tokenizer cannot {method} .*: index out of bounds"
    ):
        call(given)
    for other in (KeyboardInterrupt, SystemExit):
        raised[:] = [other()]
        with pytest.raises(other):
            call(given)


def test_a_panic_while_loading_is_an_error_of_perparam():
    with (
        pytest.raises(PerparamError, match=r"it: not readable: a panic\. Download"),
        files.rust_errors("it: not readable"),
    ):
        raise PanicException("a panic")


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "pattern",
    [
        GPT2,
        LLAMA3,
        DEEPSEEK3,
        DEEPSEEK3.replace(r"\r\n", "\r\n"),
        "[ ]{2,}",
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ]+",
        r"\s?[A-Za-zµ]+",
        r"\s+$",
    ],
)
def test_published_patterns_are_accepted(pattern):
    assert takes_linear_time(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+a+)+b", "(a|a)*", "(?:a*)*", "a*a*b", "a*b", r"\s*[\r\n]+", r"\s*[\r\n]+| |\s+", "a?a?a?a?a?b",
     "a{0,9}a{0,9}b",      "a{2,}b", "a{1,1000}", "a++", "a*?", ".*x", r"(?=a)", r"\1", "(?<!a)b", "[a&&b]", "(a", "[a",
     "a|", "", "|".join("a" * 30)],
)  # fmt: skip
def test_patterns_that_may_be_tried_again_and_again_are_refused(pattern):
    assert not takes_linear_time(pattern)
