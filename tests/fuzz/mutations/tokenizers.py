"""Mutations of the files of a tokenizer: its parts, its tokens, and what the smaller files say of them."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import checkpoints

from .in_bytes import in_another_encoding, mutate_bytes, random_count
from .in_json import Raw, dumps, junk, mutate_json, name, number, plain
from .inputs import GENERATION, TEMPLATE, TOKENIZER, Input, something_else

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FOLDERS = ("chat", "llama/llama3", "llama/smollm2", "llama/llama2", "llama/metaspace")
_REGEXES = (
    "(a+a+)+b", "(a*)*b", "((a{1,100}){1,100}){1,100}", "a*a*a*a*b", "(?=a)*", "\\1", "(", "[", "a{99999}", "",
    "a?" * 30,     "\\s+$", "\\p{N}{1,3}", "(?i:'s|'t)|\\p{L}+", "(?<!a)b", ".*", "\\p{Nowhere}",
    "\\s*[\\r\\n]+", "[a&&b]",
    "\\X", "\\R",
)  # fmt: skip


@functools.cache
def _seed(folder: str) -> Mapping[str, bytes]:
    files = (checkpoints.GOLDEN / folder).iterdir()
    names = (TOKENIZER, CONFIG, SPECIAL, ADDED, GENERATION, TEMPLATE)
    return {file.name: file.read_bytes() for file in files if file.name in names}


def sound_tokenizer(folder: str = _FOLDERS[0]) -> dict[str, bytes]:
    """The files of a tokenizer without a fault, by name."""
    return dict(_seed(folder))


# tokenizer.json.


def _text(rng: random.Random) -> Any:
    """A string that a part of a tokenizer inserts or looks for."""
    return rng.choice(["", "a", " ", "▁", "a" * 100, "é", "aa", "\0", "a" * random_count(rng), "<unk>", name(rng)])


def _pattern(rng: random.Random) -> Any:
    return rng.choice(
        [{"String": _text(rng)}, {"Regex": rng.choice(_REGEXES)}, {"Regex": rng.choice(_REGEXES)}, junk(rng)]
    )


def _count(rng: random.Random) -> Any:
    return rng.choice([0, 1, 2, 16, 17, 2**31, 2**64 - 1, -1, number(rng)])


def _piece(rng: random.Random) -> Any:
    kind = rng.choice(["SpecialToken", "SpecialToken", "Sequence", "x"])
    return {kind: {"id": rng.choice(["A", "A", "B", "<s>", "<none>", "<|im_end|>", "0"]), "type_id": _count(rng)}}


def _template(rng: random.Random) -> dict[str, Any]:
    tokens = rng.sample(["<s>", "<none>", "<|im_end|>", "</s>", "a"], rng.randrange(4))
    return {
        "type": "TemplateProcessing",
        "single": [_piece(rng) for _ in range(rng.choice([0, 1, 2, 3, 20]))],
        "pair": [_piece(rng) for _ in range(rng.choice([0, 2, 3, 20]))],
        "special_tokens": {
            token: {"id": token, "ids": [rng.choice([0, 1, 474, 2**32, number(rng)])] * rng.choice([1, 1, 0, 1000]),
                    "tokens": [token] * rng.choice([1, 1, 0, 1000])}
            for token in tokens
        },
    }  # fmt: skip


def _step(rng: random.Random, kinds: Mapping[str, Callable[[random.Random], Any]]) -> dict[str, Any]:
    kind = rng.choice(list(kinds))
    fields = {"type": kind, **kinds[kind](rng)}
    if rng.random() < 0.05:
        fields[rng.choice(list(fields))] = junk(rng)
    return fields


_NONE: Callable[[random.Random], dict[str, Any]] = lambda rng: {}  # noqa: E731
_METASPACE: Callable[[random.Random], dict[str, Any]] = lambda rng: {  # noqa: E731
    "replacement": rng.choice(["▁", "a", "", "ab", "\0", " "]),
    "prepend_scheme": rng.choice(["first", "always", "never", "x"]),
    "split": rng.random() < 0.5,
}
_REPLACE: Callable[[random.Random], dict[str, Any]] = lambda rng: {  # noqa: E731
    "pattern": _pattern(rng),
    "content": _text(rng),
}
_STRIP: Callable[[random.Random], dict[str, Any]] = lambda rng: {  # noqa: E731
    "content": rng.choice([" ", "▁", "", "ab"]),
    "start": _count(rng),
    "stop": rng.choice([0, _count(rng)]),
}
_BYTES: Callable[[random.Random], dict[str, Any]] = lambda rng: {  # noqa: E731
    "add_prefix_space": rng.random() < 0.5,
    "trim_offsets": rng.random() < 0.5,
    "use_regex": rng.random() < 0.5,
}
_PARTS: dict[str, tuple[str, dict[str, Callable[[random.Random], Any]]]] = {
    "normalizer": (
        "normalizers",
        {
            **dict.fromkeys("NFC NFD NFKC NFKD Lowercase StripAccents Nmt ByteLevel BertNormalizer".split(), _NONE),
            "Prepend": lambda rng: {"prepend": _text(rng)},
            "Replace": _REPLACE,
            "Strip": lambda rng: {"strip_left": True, "strip_right": rng.random() < 0.5},
            "Precompiled": lambda rng: {"precompiled_charsmap": rng.choice(["", "AAAA", "x"])},
        },
    ),
    "pre_tokenizer": (
        "pretokenizers",
        {
            **dict.fromkeys("BertPreTokenizer Whitespace WhitespaceSplit UnicodeScripts".split(), _NONE),
            "ByteLevel": _BYTES,
            "Digits": lambda rng: {"individual_digits": rng.random() < 0.5},
            "Punctuation": lambda rng: {"behavior": "Isolated"},
            "CharDelimiterSplit": lambda rng: {"delimiter": "a"},
            "FixedLength": lambda rng: {"length": _count(rng)},
            "Metaspace": _METASPACE,
            "Split": lambda rng: {
                "pattern": _pattern(rng),
                "behavior": rng.choice("Isolated Removed MergedWithPrevious MergedWithNext Contiguous x".split()),
                "invert": rng.random() < 0.5,
            },
        },
    ),
    "post_processor": (
        "processors",
        {
            "ByteLevel": _BYTES,
            "TemplateProcessing": lambda rng: _template(rng),
            "BertProcessing": lambda rng: {"sep": ["a", _count(rng)], "cls": ["b", 0]},
            "RobertaProcessing": lambda rng: {"sep": ["a", 1], "cls": ["b", 0], "trim_offsets": True},
        },
    ),
    "decoder": (
        "decoders",
        {
            "ByteLevel": _BYTES,
            "ByteFallback": _NONE,
            "Fuse": _NONE,
            "Metaspace": _METASPACE,
            "Replace": _REPLACE,
            "Strip": _STRIP,
            "WordPiece": lambda rng: {"prefix": _text(rng), "cleanup": True},
            "BPEDecoder": lambda rng: {"suffix": _text(rng)},
            "CTC": lambda rng: {"pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
        },
    ),
}  # fmt: skip


def _part(rng: random.Random, whole: dict[str, Any]) -> None:
    """Another normalizer, pre-tokenizer, post-processor or decoder, or one more step of it."""
    key = rng.choice(list(_PARTS))
    listed, kinds = _PARTS[key]
    steps = [_step(rng, kinds) for _ in range(rng.choice([1, 1, 2, 4, 4, 20]))]
    if rng.random() < 0.3:
        steps = [steps[0]] * rng.choice([2, 4, 16])
    before = whole.get(key)
    if before and rng.random() < 0.5:
        steps.insert(rng.randrange(len(steps) + 1), before)
    whole[key] = steps[0] if len(steps) == 1 and rng.random() < 0.7 else {"type": "Sequence", listed: steps}
    if rng.random() < 0.02:
        whole[key] = {"type": "Sequence", listed: [whole[key]]}


def _tokens(rng: random.Random, whole: dict[str, Any]) -> None:
    """Other tokens, ids and merges."""
    model = whole["model"]
    vocabulary, merges = model["vocab"], model["merges"]
    move = rng.randrange(7)
    if move == 0:
        vocabulary[rng.choice([*vocabulary])] = rng.choice([0, 1, 2**31, 2**32 - 1, 2**32, number(rng)])
    elif move == 1:
        del vocabulary[rng.choice([*vocabulary])]
    elif move == 2:
        vocabulary[rng.choice(["", "a" * random_count(rng), " ", "<0x41>", "ab", "▁▁"])] = len(vocabulary)
    elif move == 3:
        merges.insert(
            rng.randrange(len(merges) + 1), rng.choice(["a b", "a", "", "a b c", ["a", "b"], ["a"], junk(rng)])
        )
    elif move == 4:
        rng.shuffle(merges)
    elif move == 5:
        vocabulary |= {f"t{i}": rng.choice([i, 7, 2**30 + i]) for i in range(random_count(rng, 20_000))}
    else:
        model[rng.choice([*model])] = junk(rng)


def _added(rng: random.Random, whole: dict[str, Any]) -> None:
    """Other added tokens."""
    added = whole["added_tokens"]
    first = max((token["id"] for token in added if type(token.get("id")) is int), default=0) + 1
    for i in range(rng.choice([1, 1, 3, random_count(rng, 3000)])):
        token = {
            "id": first + i,
            "content": rng.choice([f"<{i}>", f"<{i}>", "a", "▁", " ", "", "a" * random_count(rng)]),
        }
        token |= {flag: rng.random() < 0.5 for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added.append(token)
    if rng.random() < 0.5:
        token = rng.choice(added)
        token[rng.choice([*token])] = junk(rng)


def _anywhere(rng: random.Random, whole: dict[str, Any]) -> None:
    """Any field but the tokens of the model."""
    model = whole["model"]
    rest = {**whole, "model": {key: value for key, value in model.items() if key not in ("vocab", "merges")}}
    changed = json.loads(_readable(mutate_json(rng, plain(rest))))
    if not isinstance(changed, dict):
        return
    whole.clear()
    whole.update(changed)
    if isinstance(whole.get("model"), dict):
        whole["model"] |= {"vocab": model["vocab"], "merges": model["merges"]}


def _readable(value: Any) -> str:
    """The JSON of a value, or of another one if Python cannot read it."""
    try:
        text = dumps(value)
        json.loads(text)
    except (ValueError, RecursionError):
        return "{}"
    return text


# The smaller files.

_FIELDS = (
    "bos_token eos_token unk_token pad_token cls_token additional_special_tokens extra_special_tokens add_bos_token "
    "add_eos_token split_special_tokens added_tokens_decoder chat_template clean_up_tokenization_spaces"
).split()


def _token(rng: random.Random) -> Any:
    """The name of a special token, often of one that exists."""
    content = rng.choice(
        ["<s>", "</s>", "<|im_end|>", "a", "▁", "user", " ", "", Raw('"\\ud800"'), "a" * random_count(rng)]
    )
    return rng.choice([content, content, {"content": content, "lstrip": rng.random() < 0.5}, junk(rng)])


def _config(rng: random.Random, config: dict[str, Any]) -> None:
    field = rng.choice(_FIELDS)
    if field == "added_tokens_decoder" and isinstance(config.get(field), dict) and rng.random() < 0.7:
        for token in config[field].values():
            token["special"] = rng.random() < 0.5
    elif field.endswith("_token"):
        config[field] = _token(rng)
    elif field.endswith("special_tokens"):
        config[field] = [_token(rng) for _ in range(rng.choice([1, 3, random_count(rng, 2000)]))]
    else:
        config[field] = rng.choice([True, False, junk(rng)])


def _older_files(rng: random.Random, files: dict[str, Any]) -> str:
    """What special_tokens_map.json and added_tokens.json say, read without an `added_tokens_decoder`."""
    config = json.loads(files.get(CONFIG, b"{}"))
    config.pop("added_tokens_decoder", None)
    files[CONFIG] = json.dumps(config).encode()
    whole = json.loads(files[TOKENIZER])
    ids = {token["content"]: token["id"] for token in whole["added_tokens"]} | {
        "a": whole["model"]["vocab"].get("a", 0)
    }
    first = max(ids.values(), default=0) + 1
    ids |= {f"<n{i}>": first + i for i in range(rng.choice([0, 1, 3, random_count(rng, 3000)]))}
    long = "a" * rng.choice([10, 600, 100_000, 10 << 20])
    wrong = rng.choice([[], {}, [1], {"a": 1}, "1", None, True, 1.0, -1, 2**31, 2**64, number(rng), first + 9])
    ids |= rng.choice([{}, {"<w>": wrong}, {rng.choice(list(ids)): wrong}, {long: first + len(ids)}, {"": first}])
    files[ADDED] = (
        json.dumps(ids, default=str).encode()
        if rng.random() < 0.9
        else _readable(mutate_json(rng, plain(ids))).encode()
    )
    roles = {rng.choice(_FIELDS[:7]): _token(rng) for _ in range(rng.randrange(4))}
    files[SPECIAL] = dumps(plain(roles)).encode("utf-8", "surrogatepass")
    return "older files"


_MOVES = (_part, _part, _part, _part, _tokens, _added, _anywhere)


def tokenizer_input(rng: random.Random) -> Input:
    """Files of a tokenizer after a few mutations."""
    files: dict[str, Any] = sound_tokenizer(rng.choice(_FOLDERS))
    file = rng.choice([TOKENIZER] * 6 + [CONFIG] * 3 + [GENERATION, SPECIAL, ADDED])
    if special := something_else(rng, files, file, "tokenizer"):
        return special
    way = rng.randrange(10)
    if way == 0:
        data, label = mutate_bytes(rng, files.get(file, b"{}")), "bytes"
        if rng.random() < 0.2:
            data, label = in_another_encoding(rng, files.get(file, b"{}"))
        return Input("tokenizer", f"{file}: {label}", {**files, file: data})
    if file in (SPECIAL, ADDED):
        return Input("tokenizer", _older_files(rng, files), files)
    value = json.loads(files.get(file, b"{}"))
    if file == TOKENIZER:
        moves = [rng.choice(_MOVES) for _ in range(rng.choice([1, 1, 2, 3]))]
        for move in moves:
            with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):
                move(rng, value)  # what a move before has broken, may be too broken for another one
        label = "+".join(move.__name__.strip("_") for move in moves)
    elif file == CONFIG and way < 8:
        for _ in range(rng.choice([1, 1, 3])):
            _config(rng, value)
        label = "config"
    else:
        if file == GENERATION:
            value = {
                "eos_token_id": [1, 2],
                "pad_token_id": 3,
                "temperature": 0.6,
                "top_p": 0.9,
                "do_sample": True,
            } | value
        value, label = mutate_json(rng, plain(value)), f"{file}: json"
    try:
        data = dumps(plain(value) if isinstance(value, dict) else value).encode("utf-8", "surrogatepass")
    except RecursionError:  # of our own writer
        data = b"[]"
    return Input("tokenizer", label, {**files, file: data})
