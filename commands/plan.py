"""`perparam plan`: what a policy does to each parameter, from the headers of a checkpoint."""

from __future__ import annotations

import argparse
import sys

from ..loaders import BareCheckpoint, Checkpoint, open_parameters
from ..policies import get_policy
from ..policies.plan import plan
from ..policies.resolved import resolve
from .options import add_checkpoint, add_policy, add_table, print_report

SUMMARY = "Print the storage and compute format of each parameter; reads no weights."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_policy(parser)
    add_table(parser)
    parser.add_argument(
        "--bare", action="store_true", default=None, help="use the names in the files, not those of perparam's model"
    )
    parser.add_argument(
        "--target", metavar="TARGET", help="add the matmul implementations on a device: here, cpu, cuda, cuda:9.0, …"
    )


def run(options: argparse.Namespace) -> None:
    """Prints the plan."""
    checkpoint = open_parameters(options.checkpoint, revision=options.revision, weights=False, bare=options.bare)
    table = plan(resolve(get_policy(options.policy), checkpoint.tree), options.target)
    print_report(table, options)
    if isinstance(checkpoint, BareCheckpoint):
        note = f"The paths are the names in the files, since {checkpoint.reason}."
        print(note, file=sys.stderr if options.json else None)
    elif not options.json:
        print_left_out(checkpoint)


def print_left_out(checkpoint: Checkpoint) -> None:
    """Prints which tensors of a checkpoint are not read, and why."""
    for reason in dict.fromkeys(checkpoint.left_out.values()):
        names = [name for name, each in checkpoint.left_out.items() if each == reason]
        print(f"left out: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}, since {reason}")
