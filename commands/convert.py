"""`perparam convert`: a checkpoint in the storage formats of a policy."""

from __future__ import annotations

import argparse
import time

from ..loaders import convert_checkpoint, open_checkpoint
from ..loaders.save import shard_sizes
from ..policies import get_policy
from ..policies.labels import human_bytes
from ..policies.plan import plan
from ..policies.resolved import resolve
from .options import add_checkpoint, add_policy
from .plan import print_left_out

SUMMARY = "Convert a checkpoint to the storage formats of a policy."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_policy(parser)
    parser.add_argument("folder", metavar="DST", help="the new folder; an old checkpoint there is replaced")
    parser.add_argument(
        "--for",
        choices=("transformers", "vllm"),
        dest="for_library",
        help="refuse what this library cannot load; default: warn if blocks do not divide kernels",
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="maximum size of a file; default: 5GB")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the file sizes; write nothing")


def run(options: argparse.Namespace) -> None:
    """Writes the new checkpoint, or prints what would be written."""
    policy, weights = get_policy(options.policy), not options.dry_run
    checkpoint = open_checkpoint(options.checkpoint, revision=options.revision, weights=weights)
    resolved = resolve(policy, checkpoint.tree)
    costs = plan(resolved)
    if options.dry_run:
        costs.print()
        print_left_out(checkpoint)
        sizes = shard_sizes(checkpoint, resolved, options.max_shard_size, options.for_library)
        files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files, the largest {human_bytes(max(sizes.values()))}"
        print(f"would write {human_bytes(sum(sizes.values()))} to {options.folder} in {files}")
        return
    start = time.perf_counter()
    written = {"for_library": options.for_library, "max_shard_size": options.max_shard_size}
    folder = convert_checkpoint(checkpoint.folder, options.folder, policy, **written)
    took = time.perf_counter() - start
    print(f"{folder}: {human_bytes(costs.total_bytes)} from {human_bytes(costs.total_bytes_before)} in {took:.1f} s")
