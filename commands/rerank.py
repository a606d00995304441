"""`perparam rerank`: documents by how well they answer a query."""

from __future__ import annotations

import argparse

from ..loaders import load_model, load_tokenizer, rerank
from ..loaders.rerank import INSTRUCTION
from .options import add_checkpoint, add_policy, folder_of
from .texts import add_texts, texts_of

SUMMARY = "Print documents by how well they answer a query, the best first."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_checkpoint(parser)
    add_texts(parser, "DOCUMENT")
    add_policy(parser)
    parser.add_argument("--query", metavar="TEXT", required=True, help="the query")
    parser.add_argument("--instruction", metavar="TASK", default=INSTRUCTION, help=f"default: {INSTRUCTION}")


def run(options: argparse.Namespace) -> None:
    """Prints the documents with their scores."""
    documents = texts_of(options)
    model = load_model(options.checkpoint, options.policy, revision=options.revision)
    tokenizer = load_tokenizer(folder_of(model))
    scores = rerank(model, tokenizer, options.query, documents, instruction=options.instruction)
    for place in sorted(range(len(documents)), key=lambda i: -scores[i]):
        print(f"{scores[place]:.4f}  {' '.join(documents[place].split())}")
