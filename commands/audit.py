"""`perparam audit`: the numerical error of a policy."""

from __future__ import annotations

import argparse

import numpy as np

from ..loaders import audit, load_model
from .options import add_checkpoint, add_policy, add_table, add_tokens, print_report, tokens_or_text

SUMMARY = "Print the numerical error of a policy, relative to float32."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_policy(parser)
    add_table(parser)
    add_tokens(parser, "64 random token ids")


def run(options: argparse.Namespace) -> None:
    """Prints the audit."""
    model = load_model(options.checkpoint, revision=options.revision)
    random = np.random.default_rng(0).integers(0, model.config.vocab_size, 64)
    print_report(audit(model, options.policy, **tokens_or_text(options, tokens=random)), options)
