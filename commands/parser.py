"""The parser of the command line."""

from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

from .. import __version__

COMMANDS = (
    "plan",
    "chat",
    "generate",
    "embed",
    "rerank",
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


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and names the nearest option or command after a typo."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **{"allow_abbrev": False, **options})

    # `type: ignore`, since typeshed declares overloads for a namespace of another type, which commands do not use.
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Returns what argparse does, after a look at the names: argparse itself reports missing arguments first."""
        for word in args or ():
            name = word.split("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                self.error(f"there is no option {name}{_nearest(name, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"there is no command {value}{_nearest(value, action.choices)}")
        super()._check_value(action, value)


def parser() -> argparse.ArgumentParser:
    """The parser, whose result has the command's `run` and `usage_error`."""
    parser = Parser(prog="perparam", description="Mixed-precision policies for JAX and Flax.")
    parser.add_argument("--version", action="version", version=f"perparam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __package__)
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_options(command)
        command.set_defaults(run=module.run, usage_error=command.error)
    return parser


def _nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1) or [each for each in names if each.startswith(name)]
    return f". Did you mean {near[0]}?" if near else f". There are: {', '.join(names)}."
