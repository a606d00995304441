"""`perparam chat`: a conversation with a model."""

from __future__ import annotations

import argparse

from ..loaders import load_model, load_tokenizer
from ..models.heads import check_causal_lm
from .conversation import Chat
from .options import add_checkpoint, add_policy, folder_of
from .sampling import add_sampling, sampling

SUMMARY = "Chat with a model. /help lists commands; Ctrl-C stops an answer."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_policy(parser)
    add_sampling(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--no-thinking", action="store_true", help="set enable_thinking=False in the chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, default=2048, metavar="N", help="maximum length of an answer; default: 2048"
    )


def run(options: argparse.Namespace) -> None:
    """Chats until the input ends."""
    model = load_model(options.checkpoint, options.policy, revision=options.revision)
    check_causal_lm(model.config.task, "chat")
    Chat(
        model,
        load_tokenizer(folder_of(model)),
        system=options.system,
        enable_thinking=False if options.no_thinking else None,
        sampling=sampling(options, model),
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    ).run()
