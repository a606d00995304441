"""`perparam embed`: embeddings of texts."""

from __future__ import annotations

import argparse
import os
import pathlib

import numpy as np

from ..loaders import embed, load_model, load_tokenizer
from .options import OptionError, add_checkpoint, add_policy, folder_of, message
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
    if output is not None and (output.suffix != ".npy" or not os.access(output.parent, os.W_OK)):
        options.usage_error(f"--output: expected a .npy file in a folder that can be written, found {options.output}")
    texts = texts_of(options)
    model = load_model(options.checkpoint, options.policy, revision=options.revision)
    tokenizer = load_tokenizer(folder_of(model))
    embeddings = embed(model, tokenizer, texts, instruction=options.instruction, dimensions=options.dimensions)
    if output is None:
        for row in embeddings:
            print(*(f"{value:.6g}" for value in row))
    else:
        try:
            np.save(output, embeddings)
        except OSError as error:
            raise OptionError(f"--output: {message(error)}") from error
        print(f"{output}: {embeddings.shape[0]}×{embeddings.shape[1]} float32")
