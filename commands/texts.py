"""The texts of `embed` and `rerank`: arguments, or the lines of files."""

from __future__ import annotations

import argparse

from .options import read_text


def add_texts(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the arguments `name`, and the option that they are names of files."""
    parser.add_argument("texts", metavar=name, nargs="+", help="a text")
    parser.add_argument(
        "--lines",
        action="store_true",
        help=f"each {name} is the name of a file with one text a line; -: standard input",
    )


def texts_of(options: argparse.Namespace) -> list[str]:
    """The texts that a command line gives."""
    if not options.lines:
        return options.texts
    return [line for file in options.texts for line in read_text("--lines", file).removesuffix("\n").split("\n")]
