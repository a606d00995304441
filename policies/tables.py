"""Plain-text tables with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def table(lines: Sequence[Sequence[str]], right: int = 0) -> str:
    """The lines as text, columns two blanks apart; the last `right` columns are aligned to the right.

    >>> print(table([("name", "bytes"), ("kernel", "4"), ("bias", "16")], right=1))
    name    bytes
    kernel      4
    bias       16
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first_right = len(widths) - right

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if i >= first_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, lines))
