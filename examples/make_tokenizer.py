"""The tokenizer of the example checkpoints: one token per byte, and Qwen3's chat format (ChatML)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import tokenizers

TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""


def write_tokenizer(folder: pathlib.Path, end: int, pad: int, words: Sequence[str] = ()) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`.

    end    id of `<|im_end|>`, which ends an answer
    pad    id of `<|endoftext|>`, the padding token
    words  further tokens, which no text is encoded to; their ids begin at 259
    """
    vocabulary = {byte: i for i, byte in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {word: 259 + i for i, word in enumerate(words)}
    vocabulary |= {"<|im_start|>": 256, "<think>": 257, "</think>": 258, "<|endoftext|>": pad, "<|im_end|>": end}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for token, special in (("<|im_start|>", True), ("<|im_end|>", True), ("<|endoftext|>", True), ("<think>", False)):
        tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=special)])
    tokenizer.add_tokens([tokenizers.AddedToken("</think>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
