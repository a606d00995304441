"""The picture of a comparison: size against divergence, perplexity, and speed of each policy."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

from ..policies.errors import MissingPackage, UnsupportedExport

_MOST_DIGITS = 7


class _Row(Protocol):
    """What the picture shows of a policy; see `Compared`."""

    @property
    def name(self) -> str: ...
    @property
    def perplexity(self) -> float: ...
    @property
    def perplexity_error(self) -> float: ...
    @property
    def kl(self) -> float: ...
    @property
    def bytes(self) -> int: ...
    @property
    def tokens_per_second(self) -> float: ...


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raises an error if a plot cannot be written to `path`; to be called before anything is computed.

    Raises:
      MissingPackage: without matplotlib.
      UnsupportedExport: a file type that matplotlib cannot write, or a folder that does not exist.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingPackage("a plot needs matplotlib. Install it: pip install matplotlib.") from error
    path = pathlib.Path(path)
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        what = f"the extension {path.suffix}" if path.suffix else "a name without extension"
        raise UnsupportedExport(f"{path}: {what} is no type of picture. Write one of .{', .'.join(sorted(kinds))}.")
    if not path.parent.is_dir():
        raise UnsupportedExport(f"{path}: there is no folder {path.parent}. Make it, or name a file in another one.")


def plot(rows: Sequence[_Row], tokens: int, path: str | os.PathLike[str]) -> None:
    """Writes the picture of `rows`, the first one the reference, to `path`."""
    check_plot(path)
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = [colormaps["tab10"](i % 10) for i in range(len(rows))]
    names = [_shortened(row.name) for row in rows]
    figure = Figure(figsize=(10, 4.5 + 0.3 * len(rows)), layout="constrained")
    figure.suptitle(f"Policies compared on {tokens} tokens of text, {names[0]} as the reference")
    panels = figure.subplot_mosaic([["size", "perplexity"], ["size", "speed"]], width_ratios=(1.2, 1))

    axes, sizes, kls = panels["size"], [row.bytes / 2**20 for row in rows], [row.kl for row in rows]
    axes.set_title("size against divergence: lower left is better", fontsize=10, loc="left")
    for name, size, kl, colour in zip(names, sizes, kls, colours, strict=True):
        axes.scatter(size, kl, color=colour, s=60, label=name, zorder=3, clip_on=False)
    positive = [kl for kl in kls if kl > 0]
    if positive:  # logarithmic, with a place for zero
        axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(min(positive))))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("parameters, MiB")
    axes.set_ylabel(f"KL from {names[0]}, nats a token")
    axes.grid(alpha=0.3)

    axes, values = panels["perplexity"], [row.perplexity for row in rows]
    errors = [0.0 if math.isnan(row.perplexity_error) else row.perplexity_error for row in rows]
    axes.set_title("perplexity" + (", with standard error" if any(errors) else ""), fontsize=10, loc="left")
    for i, label in enumerate(_labels(values)):
        axes.errorbar(values[i], i, xerr=errors[i] or None, fmt="o", color=colours[i], capsize=3)
        axes.annotate(label, (values[i], i), (0, 6), textcoords="offset points", ha="center", fontsize=8)

    axes, values = panels["speed"], [row.tokens_per_second for row in rows]
    axes.set_title("decoding, tokens/s", fontsize=10, loc="left")
    axes.bar_label(axes.barh(range(len(rows)), values, color=colours), _labels(values), padding=3, fontsize=8)
    for name in ("perplexity", "speed"):
        panels[name].set_yticks(range(len(rows)), names, fontsize=8)
        panels[name].set_ylim(len(rows) - 0.4, -0.6)
        panels[name].margins(x=0.2)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels["size"].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=120)


def _shortened(name: str) -> str:
    return name if len(name) <= 28 else f"…{name[-27:]}"


def _labels(values: Sequence[float]) -> list[str]:
    """The values with three digits or more, so that values that differ have labels that differ.

    >>> _labels([3054.254, 3047.594, 12.5])
    ['3054', '3048', '12.5']
    """
    for digits in range(3, _MOST_DIGITS + 1):
        labels = [_number(value, digits) for value in values]
        if len(set(labels)) == len(set(values)):
            break
    return labels


def _number(value: float, digits: int) -> str:
    """A number with `digits` significant digits and no exponent: at least the digits before the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
