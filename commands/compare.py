"""`perparam compare`: several policies side by side."""

from __future__ import annotations

import argparse
import sys

from ..loaders import compare
from ..loaders.compare import TEXT
from ..loaders.compare_plot import check_plot
from .options import add_checkpoint, add_policies, add_table, add_tokens, print_report, tokens_or_text

SUMMARY = "Compare policies: perplexity, KL to the first policy, memory, speed."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_policies(parser)
    add_table(parser)
    add_tokens(parser, "a paragraph of Darwin")
    parser.add_argument("--plot", metavar="FILE.png", help="also write a plot of the table; needs matplotlib")


def run(options: argparse.Namespace) -> None:
    """Prints the table, and writes the plot."""
    if options.plot is not None:
        check_plot(options.plot)
    tokens = tokens_or_text(options, text=TEXT)
    comparison = compare(options.checkpoint, options.policy, **tokens, revision=options.revision)
    print_report(comparison, options)
    if options.plot is not None:
        comparison.plot(options.plot)
        print(f"plot written to {options.plot}", file=sys.stderr if options.json else sys.stdout)
