"""A model whose every token decides on the next one, and conversations with it."""

import itertools

import numpy as np
import pytest
from chatting import TEMPLATE, Screen
from checkpoints import fields, tensors, write
from small_tokenizer import small_tokenizer, write_tokenizer

import perparam
from perparam import Sampling, load_tokenizer
from perparam.commands import conversation

ANSWERS = {
    "hello": ("Ġworld", "Ġthere", "<|im_end|>"),
    "why": ("<think>", "Ġthink", "Ġstring", "</think>", "Ġanswer", "<|im_end|>"),
    "the": ("Ġand", "Ġuser", "Ġand"),  # and on and on
}
"""What the model of these tests answers to a message that ends with a word: each token decides on the next one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One layer that adds nothing, between an embedding and a head that know what follows what; float32 files."""
    tokenizer = small_tokenizer()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    config = fields(
        hidden_size=64, num_hidden_layers=1, vocab_size=size, quantization_config=None, torch_dtype="float32",
        eos_token_id=None, pad_token_id=None, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    arrays = tensors(config, plain_dtype=np.float32)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        arrays[f"model.layers.0.{name}.weight"][:] = 0
    embedding = np.random.default_rng(0).choice([-1.0, 1.0], (size, 64)).astype(np.float32)
    head = np.zeros_like(embedding)
    follows = {}
    for word, answer in ANSWERS.items():
        ids = [tokenizer.encode(word).ids[-1], *map(tokenizer.token_to_id, answer)]
        for before, after in itertools.pairwise(ids):
            assert follows.setdefault(before, after) == after
    for before, after in follows.items():
        head[after] += embedding[before]
    arrays |= {
        "model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": np.ones(64, np.float32),
    }  # fmt: skip
    found = write(tmp_path_factory.mktemp("chat"), config, arrays)
    write_tokenizer(found, TEMPLATE)
    return found


@pytest.fixture(autouse=True)
def colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture(scope="module")
def model(folder):
    return perparam.load_model(folder)


@pytest.fixture
def screen():
    """What a chat of `chat` writes to, unless it is given another stream."""
    return Screen()


@pytest.fixture
def chat(folder, model, screen):
    def make(out=None, **options):
        options = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 8, **options}
        return conversation.Chat(model, load_tokenizer(folder), out=screen if out is None else out, **options)

    return make
