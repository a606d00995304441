"""`perparam compare`: several policies side by side."""

from __future__ import annotations

import argparse

from ..loaders import compare, load_tokenizer
from ..loaders.compare import TEXT, check_plot
from .options import add_checkpoint, add_policies, read_text, token_ids

SUMMARY = "Compare policies: perplexity, KL to the first policy, memory, speed."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_policies(parser)
    parser.add_argument("--text", metavar="FILE", help="the text to evaluate; default: a paragraph of Darwin")
    parser.add_argument("--tokens", metavar="1,2,3", type=token_ids, help="token ids instead of a text")
    parser.add_argument("--plot", metavar="FILE.png", help="also write a plot of the table; needs matplotlib")


def run(options: argparse.Namespace) -> None:
    """Prints the table, and writes the plot."""
    if options.plot is not None:
        check_plot(options.plot)
    tokens = options.tokens
    if tokens is None:
        text = TEXT if options.text is None else read_text(options.text)
        tokens = load_tokenizer(options.checkpoint, options.revision).encode(text)
    comparison = compare(options.checkpoint, options.policy, tokens, revision=options.revision)
    print(comparison)
    if options.plot is not None:
        comparison.plot(options.plot)
        print(f"plot written to {options.plot}")
