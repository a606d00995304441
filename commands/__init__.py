"""The command line `perparam`: one module for each command."""

from .program import COMMANDS, main

__all__ = ["COMMANDS", "main"]
