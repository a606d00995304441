"""The program `perparam`: its commands, and what it prints after an error."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import jax

from ..policies import PerparamError
from ..policies.errors import (
    InvalidPolicy,
    InvalidSharding,
    InvalidSize,
    InvalidText,
    InvalidTokens,
    MissingPackage,
    UnknownDtype,
    UnknownTarget,
    UnsupportedCast,
    UnsupportedExport,
)
from .options import message
from .parser import parser

_CAUSES: dict[type[PerparamError], tuple[str, ...]] = {
    InvalidPolicy: ("policy",),
    UnknownDtype: ("policy",),
    UnsupportedCast: ("policy",),
    UnknownTarget: ("target",),
    InvalidSharding: ("mesh",),
    InvalidTokens: ("tokens", "text", "prompt", "file"),
    InvalidText: ("text", "prompt", "file"),
    InvalidSize: ("max_shard_size",),
    UnsupportedExport: ("plot",),
    MissingPackage: ("plot",),
}
"""The options whose value may have caused an error; the first one that is given is named."""


_JAX = os.path.dirname(jax.__file__)
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 after an error, 1 after an internal error.

    The message of an error is on stderr.
    """
    if sys.stderr is None:  # closed by the shell, as standard output below
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
    if sys.stdout is None:
        return _failed("standard output is closed")
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot print × prints a question mark
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"perparam: warning: {message}", file=sys.stderr)
            options.run(options)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _discard_output()
    except PerparamError as error:
        return _failed(_with_option(error, options))
    except OSError as error:
        if error.filename is None and error.errno in _OUTPUT_ERRORS:  # files that commands write have a name
            _discard_output()
            return _failed(f"standard output: {error.strerror}")
        return _failed(message(error))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever else: an internal error, shown with its traceback
        return _unexpected(error)
    return 0


def _with_option(error: PerparamError, options: argparse.Namespace) -> str:
    """The message of an error, with the option that it is about in front."""
    text, given = str(error), {name for name, value in vars(options).items() if value not in (None, [])}
    name, _, rest = text.partition(":")
    name = {"key": "seed"}.get(name, name)
    if name in given:  # an argument of a function, such as max_new_tokens
        return f"{_option(name)}:{rest}"
    names = next((names for kind, names in _CAUSES.items() if isinstance(error, kind)), ())
    return next((f"{_option(name)}: {text}" for name in names if name in given), text)


def _option(name: str) -> str:
    return "--for" if name == "for_library" else f"--{name.replace('_', '-')}"


def _failed(text: str) -> int:
    print(f"perparam: error: {text}", file=sys.stderr)
    return 2


def _unexpected(error: Exception) -> int:
    """Prints an error of JAX in one line, any other one with its traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    in_jax = isinstance(error, (RuntimeError, AssertionError)) and last.filename.startswith(_JAX)
    if in_jax or isinstance(error, (jax.errors.JaxRuntimeError, MemoryError)):  # no such device, not enough memory
        lines = str(error).splitlines() or [f"{type(error).__name__} {last.line or ''}".strip()]
        return _failed(f"JAX could not run this: {lines[0]}")
    traceback.print_exception(error)
    print("perparam: internal error: please report it with the lines above and the command.", file=sys.stderr)
    return 1


def _discard_output() -> None:
    """Sends the rest of standard output nowhere: Python would fail on it again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
