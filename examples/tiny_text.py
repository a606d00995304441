"""The text of `train_tiny`, the King James Bible of Debian's packages, its parts, and a tokenizer trained on one.

Debian's `bible-kjv-text` has the text, compressed, and `bible-kjv` the program that prints it. The text is of 1611 and
in the public domain, except in the United Kingdom, where the Crown's letters patent restrict printing it; the files of
`bible-kjv-text` may be copied, modified and distributed at will.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import numpy as np
import tokenizers

END = 0
"""Id of `<|endoftext|>`, which ends a chapter."""

SPECIAL = ("<|endoftext|>",)
"""Tokens that the tokenizer finds in no text; their ids are the first ones."""


class Parts(NamedTuple):
    """A text in three contiguous parts: the model is trained on the first and chosen by the second."""

    train: str
    validation: str
    held_out: str


def fetched() -> str:
    """The King James Bible from Debian's packages `bible-kjv` and `bible-kjv-text`; nothing is installed.

    Raises:
      CalledProcessError, FileNotFoundError: without apt-get and dpkg-deb, a network, or libreadline.
    """
    with tempfile.TemporaryDirectory() as folder:
        # apt's own sandbox user cannot write into the folder, which apt-get warns about as root.
        subprocess.run(["apt-get", "download", "-qq", "bible-kjv", "bible-kjv-text"], cwd=folder, check=True)
        for package in pathlib.Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        command = [f"{folder}/usr/bin/bible", "-p", f"{folder}/usr/lib", "-f", "gen1:1-rev22:21"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return chapters(printed.stdout)


def chapters(printed: str) -> str:
    """The text without its references: a verse on each line, and an empty line between chapters.

    >>> chapters("Ge1:31 And it was very good.\\nGe2:1 Thus the heavens were finished.\\n")
    'And it was very good.\\n\\nThus the heavens were finished.\\n'
    """
    lines, current = [], None
    for line in printed.splitlines():
        if (match := re.fullmatch(r"\s*(\w+):\d+ (.*)", line)) is None:
            continue
        if match[1] != current and current is not None:
            lines.append("")
        current = match[1]
        lines.append(match[2].strip())
    return "\n".join(lines) + "\n"


def parts(text: str, held_out: float = 0.04, validation: float = 0.01) -> Parts:
    """The parts of a text: the last 4 % of its characters, 1 % before them, and the rest, cut after empty lines.

    >>> parts("a b\\n\\n" * 50, held_out=0.2, validation=0.1).held_out == "a b\\n\\n" * 10
    True
    """

    def cut(share: float) -> int:
        place = text.find("\n\n", int(len(text) * (1 - share)) - 2)
        return len(text) if place < 0 else place + 2

    first, second = cut(held_out + validation), cut(held_out)
    return Parts(text[:first], text[first:second], text[second:])


def trained_tokenizer(text: str, vocabulary: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of `vocabulary` tokens, trained on a text: every text has tokens and comes back."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def encoded(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """Ids (length,) int32 of a text; `<|endoftext|>` stands for the empty line between chapters, so nothing is lost."""
    *chapters, last = text.split("\n\n")
    rows = [encoding.ids for encoding in tokenizer.encode_batch([f"{chapter}\n" for chapter in chapters] + [last])]
    ends = [[END]] * len(chapters) + [[]]
    return np.array([token for row, end in zip(rows, ends, strict=True) for token in row + end], np.int32)


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path) -> None:
    """Writes a tokenizer's files and generation_config.json into the folder of a checkpoint.

    The chat template adds nothing to messages, so that in a chat the model continues the text of its user.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{%- for message in messages %}{{- message.content }}{%- endfor %}"
    token = SPECIAL[END]
    config = {"chat_template": template, "eos_token": token, "pad_token": token}
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50, "eos_token_id": END, "pad_token_id": END}
    for name, fields in (("tokenizer_config.json", config), ("generation_config.json", sampling)):
        (folder / name).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
