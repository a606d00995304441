"""The entry point of `perparam` and `python -m perparam`."""

import sys

from .commands import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
