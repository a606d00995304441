"""`perparam audit`: the numerical error of a policy."""

from __future__ import annotations

import argparse

import numpy as np

from ..loaders import audit, load_model
from .options import add_checkpoint, add_policy, token_ids

SUMMARY = "Print the numerical error of a policy, relative to float32."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_policy(parser)
    parser.add_argument(
        "--tokens", metavar="1,2,3", type=token_ids, help="token ids of the comparison; default: 64 random ids"
    )


def run(options: argparse.Namespace) -> None:
    """Prints the audit."""
    model = load_model(options.checkpoint, revision=options.revision)
    tokens = options.tokens or np.random.default_rng(0).integers(0, model.config.vocab_size, 64).tolist()
    print(audit(model, options.policy, [tokens]))
