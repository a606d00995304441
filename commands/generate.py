"""`perparam generate`: the continuation of a prompt."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from ..loaders import load_model, load_tokenizer, stream_text
from ..models import generate
from .conversation import Stopwatch
from .options import add_checkpoint, add_policy, folder_of, read_text, token_ids
from .sampling import add_sampling, sampling

SUMMARY = "Continue a prompt, given as text or token ids."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_policy(parser)
    add_sampling(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--file", metavar="FILE", help="a file with the prompt; -: standard input")
    prompt.add_argument("--tokens", metavar="1,2,3", type=token_ids, help="the prompt as token ids; prints the new ids")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a string that ends the answer; may be repeated"
    )


def run(options: argparse.Namespace) -> None:
    """Prints the continuation, and the time it took on stderr."""
    if options.stop and options.tokens is not None:
        options.usage_error("--stop needs a prompt as text, not --tokens")
    model = load_model(options.checkpoint, options.policy, revision=options.revision)
    drawn = {"sampling": sampling(options, model), "key": options.seed}
    if options.tokens is not None:
        tokens = generate(model, [options.tokens], max_new_tokens=options.max_new_tokens, **drawn)
        print(",".join(map(str, np.asarray(tokens)[0])))
        return
    text = options.prompt if options.file is None else read_text("--file", options.file)
    tokenizer, watch = load_tokenizer(folder_of(model)), Stopwatch()
    pieces = stream_text(model, tokenizer, text, options.max_new_tokens, stop=options.stop, **drawn)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            print(f"\n{watch.summary(end.value)}", file=sys.stderr)
            return
        sys.stdout.write(piece)
        sys.stdout.flush()
