"""Hostile inputs for everything that reads files from elsewhere, each made from a kind, a seed and a number alone.

Two ways lead away from what is well-formed: structural mutations, which know JSON, safetensors, YAML, tokenizers and
Jinja, and reach what lies behind the parsers; and mutations of bytes, which reach the parsers themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .config import config_fields, config_input, with_field
from .index import index_input
from .inputs import (
    CONFIG,
    FIFO,
    FOLDER,
    GENERATION,
    LOOP,
    POLICY,
    TEMPLATE,
    TOKENIZER,
    WHOLE,
    Input,
    seed_checkpoint,
    sound_checkpoint,
)
from .policies import policy_input
from .safetensors_files import safetensors_input, safetensors_of
from .templates import template_input
from .tokenizers import sound_tokenizer, tokenizer_input

_KINDS: dict[str, Callable[[random.Random], Input]] = {
    "safetensors": safetensors_input,
    "index": index_input,
    "config": config_input,
    "policy": policy_input,
    "tokenizer": tokenizer_input,
    "template": template_input,
}
KINDS = tuple(_KINDS)


def make(kind: str, seed: int, number: int) -> Input:
    """The input of that kind, seed and number: always the same one."""
    rng = random.Random(f"{kind}/{seed}/{number}")
    return _KINDS[kind](rng)


__all__ = [
    "CONFIG",
    "FIFO",
    "FOLDER",
    "GENERATION",
    "KINDS",
    "LOOP",
    "POLICY",
    "TEMPLATE",
    "TOKENIZER",
    "WHOLE",
    "Input",
    "config_fields",
    "make",
]
__all__ += ["safetensors_of", "seed_checkpoint", "sound_checkpoint", "sound_tokenizer", "with_field"]
