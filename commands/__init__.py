"""The command line `perparam`: one module for each command."""

from .parser import COMMANDS
from .program import main

__all__ = ["COMMANDS", "main"]
