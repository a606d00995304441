"""The program `perparam`: its commands, and what it prints after an error."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..policies import PerparamError

COMMANDS = (
    "plan",
    "chat",
    "generate",
    "compare",
    "audit",
    "convert",
    "demo",
)
"""The commands, in the order of the help. Each is a module of this folder, which has

SUMMARY                a sentence for the help
add_options(parser)    adds the command's arguments
run(options)           runs it; `options.usage_error(text)` prints the usage and ends the program
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 after an error, whose message is on stderr."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot print × prints a question mark
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"perparam: warning: {message}", file=sys.stderr)
            options.run(options)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (PerparamError, OSError) as error:
        print(f"perparam: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError, AssertionError) as error:  # from JAX: no such device, not enough memory
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"perparam: error: JAX could not run this: {lines[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="perparam", description="Mixed-precision policies for JAX and Flax.")
    parser.add_argument("--version", action="version", version=f"perparam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __package__)
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_options(command)
        command.set_defaults(run=module.run, usage_error=command.error)
    return parser
