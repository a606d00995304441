"""Texts in tables: numbers of bytes, and one label for several paths."""

from __future__ import annotations


def human_bytes(size: int) -> str:
    """Returns a number of bytes with a binary unit, such as 1.5 MiB."""
    power = min(max(size.bit_length() - 1, 0) // 10, 4)
    return f"{size} B" if power == 0 else f"{size / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def folded_label(paths: list[str]) -> str:
    """Returns the label of a line in the table: a path, or one for several paths that differ only in numbers."""
    if len(paths) == 1:
        return paths[0]
    components = []
    for column in zip(*(path.split("/") for path in paths), strict=True):
        components.append(column[0] if len(set(column)) == 1 else _ranges(sorted({int(number) for number in column})))
    return f"{'/'.join(components)} ×{len(paths)}"


def _ranges(numbers: list[int]) -> str:
    """Returns ascending integers as ranges: "0-2,5" for [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
