"""Options that several commands share, and the values that they take."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from ..models import CausalLM
from ..policies.errors import PerparamError
from ..policies.tables import Report

_POLICY = "a YAML file, a preset (f32, bf16, fp8_weight_only, fp8_dynamic), a dtype, or params=…,compute=…,output=…"


class OptionError(PerparamError, ValueError):
    """The value of an option of the command line cannot be used."""


def add_checkpoint(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds the argument CHECKPOINT, of which the help says `more`, and the option `--revision`."""
    text = "a folder with config.json and safetensors files, or the name of a repository on the Hugging Face hub"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=f"{text}{more}")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository; default: main")


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--policy`."""
    parser.add_argument("--policy", metavar="POLICY", help=_POLICY)


def add_policies(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--policy` of a command that takes several."""
    text = f"{_POLICY}; repeat it for each policy"
    parser.add_argument("--policy", metavar="POLICY", help=text, action="append", required=True)


def add_table(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `print_report`."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON with one line per row, for programs and diffs")
    form.add_argument("--wide", action="store_true", help="print whole lines, not folded at the width of the terminal")


def print_report(report: Report, options: argparse.Namespace) -> None:
    """Prints a plan, an audit or a comparison as the options of `add_table` say."""
    if options.json:
        print(report.to_json(), end="")
    else:
        report.print(wide=options.wide)


def add_tokens(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the options of `tokens_or_text`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--text", metavar="FILE", help=f"a file with the text to compare on; default: {default}")
    group.add_argument("--tokens", metavar="1,2,3", type=token_ids, help="token ids instead of a text")


def tokens_or_text(options: argparse.Namespace, **default: Any) -> dict[str, Any]:
    """The argument `tokens` or `text` of `audit` and `compare`; `default` without the options."""
    if options.text is not None:
        return {"text": read_text("--text", options.text)}
    return default if options.tokens is None else {"tokens": options.tokens}


def token_ids(text: str) -> list[int]:
    """The ids in a text such as 1,2,3: the type of `--tokens`."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected token ids such as 1,2,3, found {text!r}") from None


def read_text(option: str, file: str) -> str:
    """The text in the file that `option` names, or of standard input for `-`."""
    if file == "-" and sys.stdin is None:
        raise OptionError(f"{option}: standard input is closed.")
    try:
        return sys.stdin.read() if file == "-" else pathlib.Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{option}: {file}: cannot be read as UTF-8 text: {error}.") from error
    except OSError as error:
        raise OptionError(f"{option}: {message(error)}") from error


def message(error: OSError) -> str:
    """The message of an error of the file system: what failed, and why."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error.strerror or error)


def folder_of(model: CausalLM) -> pathlib.Path:
    """The folder that a model was loaded from."""
    assert model.config.source is not None
    return model.config.source.parent
