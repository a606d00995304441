"""`perparam embed`: embeddings of texts."""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from ..loaders import embed, load_model, load_tokenizer
from .options import add_checkpoint, add_policy, folder_of
from .texts import add_texts, texts_of

SUMMARY = "Print the embeddings of texts, one a line, or write them to a .npy file."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_texts(parser, "TEXT")
    add_policy(parser)
    parser.add_argument("--instruction", metavar="TASK", help="the task in a sentence, for queries; none for documents")
    parser.add_argument("--dimensions", type=int, metavar="N", help="keep the first N dimensions; default: all")
    parser.add_argument("--output", metavar="FILE.npy", help="write a numpy array (texts, dimensions) in float32")


def run(options: argparse.Namespace) -> None:
    """Prints or writes the embeddings."""
    output = None if options.output is None else pathlib.Path(options.output)
    if output is not None and (output.suffix != ".npy" or not output.parent.is_dir()):
        options.usage_error(f"--output: expected a .npy file in an existing folder, found {options.output}")
    texts = texts_of(options)
    model = load_model(options.checkpoint, options.policy, revision=options.revision)
    tokenizer = load_tokenizer(folder_of(model))
    found = embed(model, tokenizer, texts, instruction=options.instruction, dimensions=options.dimensions)
    if output is None:
        for row in found:
            print(*(f"{value:.6g}" for value in row))
    else:
        np.save(output, found)
        print(f"{output}: {found.shape[0]}×{found.shape[1]} float32")
