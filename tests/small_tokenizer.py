"""A small Qwen3 tokenizer for tests: byte-level, with Qwen3's splitting and special tokens, but about 480 tokens."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

TEMPLATE = Path(__file__).parent / "golden" / "chat" / "chat_template.jinja"

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen3's splitting into words with the character before them, single digits, punctuation and white space."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NOT_SPECIAL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Added tokens that are not special: decoding keeps them, as for Qwen3."""

WORDS = (
    "the and user system assistant name arguments city weather function string type description what is it there "
    "hello world answer question think 中 你好 é"
).split()


def vocabulary(words: Iterable[str] = WORDS) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return ids by token, and merges: all bytes, and the prefixes of each word with and without a space before it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {character: index for index, character in enumerate(alphabet)}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    for word in (space + word for word in words for space in ("", " ")):
        ((text, _),) = byte_level.pre_tokenize_str(word)
        for end in range(2, len(text) + 1):
            if text[:end] not in tokens:
                tokens[text[:end]] = len(tokens)
                merges.append((text[: end - 1], text[end - 1]))
    return tokens, merges


def small_tokenizer(words: Iterable[str] = WORDS, append: str | None = None) -> tokenizers.Tokenizer:
    """`append`: a special token after every text, as in Qwen3-Embedding."""
    tokens, merges = vocabulary(words)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in NOT_SPECIAL])
    if append is not None:
        appended = [(append, tokenizer.token_to_id(append))]
        template = processors.TemplateProcessing(single=f"$A {append}", special_tokens=appended)
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    return tokenizer


def write_tokenizer(folder: Path, template: str | None = None, **options: Any) -> tokenizers.Tokenizer:
    """Write the tokenizer's files and generation_config.json into `folder`, as for Qwen3, and return the tokenizer.

    template  the chat template; None takes the one in `golden/chat`
    options   of `small_tokenizer`
    """
    tokenizer = small_tokenizer(**options)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(number): {field: getattr(token, field) for field in fields}
            for number, token in tokenizer.get_added_tokens_decoder().items()
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": TEMPLATE.read_text(encoding="utf-8") if template is None else template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad})
    return tokenizer


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def change_json(path: Path, **fields: object) -> None:
    """Set fields of a JSON file, which is created if it is missing; the value `...` removes a field."""
    given = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {name: value for name, value in {**given, **fields}.items() if value is not ...})
