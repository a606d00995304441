"""Options that several commands share, and the values that they take."""

from __future__ import annotations

import argparse
import pathlib
import sys

from ..models import CausalLM
from ..policies.errors import InvalidText

_POLICY = "a YAML file, a preset (f32, bf16, fp8_weight_only, fp8_dynamic), a dtype, or params=…,compute=…,output=…"


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the argument CHECKPOINT and the option `--revision`."""
    text = "a folder with config.json and safetensors files, or the name of a repository on the Hugging Face hub"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository; default: main")


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--policy`."""
    parser.add_argument("--policy", metavar="POLICY", help=_POLICY)


def add_policies(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--policy` of a command that takes several."""
    text = f"{_POLICY}; repeat it for each policy"
    parser.add_argument("--policy", metavar="POLICY", help=text, action="append", required=True)


def token_ids(text: str) -> list[int]:
    """The ids in a text such as 1,2,3: the type of `--tokens`."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected token ids such as 1,2,3, found {text!r}") from None


def read_text(file: str) -> str:
    """The text in a file, or of standard input for `-`."""
    try:
        return sys.stdin.read() if file == "-" else pathlib.Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidText(f"{file}: cannot be read as UTF-8 text: {error}.") from error


def folder_of(model: CausalLM) -> pathlib.Path:
    """The folder that a model was loaded from."""
    assert model.config.source is not None
    return model.config.source.parent
