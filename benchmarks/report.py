"""Shows the results of `matmul.py` as a table and as a picture.

    python benchmarks/report.py benchmarks/results/matmul-cpu-….json    # draws the picture

The picture needs matplotlib: `pip install matplotlib`.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import Any

BASELINES = ("bf16 dot", "naive")
"""The contenders by whose time ratios are divided."""

MAX_RATIO = 3.0
"""The ratio at which bars end, so that short bars can be distinguished; the numbers next to them are not limited."""

MAX_SHAPES = 8
"""Maximum number of shapes in a panel; of more shapes, a sample over their sizes is drawn.  The JSON has all."""

BAR, AROUND, WIDTH = 0.16, 1.0, 6.5
"""Inches of a bar and its label in 7 points, of a panel's title and axis, and of a panel from side to side."""

BASELINE = {"facecolor": "0.7"}
CHOSEN = {"facecolor": "tab:blue"}
OTHER = {"facecolor": "lightsteelblue"}
PART = {"facecolor": "lightsteelblue", "hatch": "////"}


def table(case: dict[str, Any]) -> str:
    """Returns the results of a case as a table of text, with a star at the implementation that perparam chooses."""
    copy, peak = case["copy, bytes per second"]["median"], case["large bf16 dot, operations per second"]["median"]
    smallest = case["smallest program, seconds"]["median"]
    lines = [
        f"\n{shape(case)}, rows: {case['rows']}.  Operands in {case['copies']} copies by turns; copy {copy / 1e9:.4g} "
        f"GB/s, large bf16 dot {peak / 1e12:.3g} TFLOP/s, smallest program {smallest * 1e6:.1f} µs\n"
        f"  {'':38}{'µs a call':>23}{'/ bf16 dot':>26}{'/ naive':>26}{'GB/s (of copy)':>18}{'TFLOP/s (of peak)':>20}"
        f"{'error':>9}",
    ]
    for one in case["contenders"]:
        ratios = "".join(f"{between(one['ratios'][base]) if base in one['ratios'] else '':>26}" for base in BASELINES)
        rate = f"{one['bytes per second']['median'] / 1e9:.4g} ({one['of copy']['median']:.2f})"
        throughput = f"{one['operations per second']['median'] / 1e12:.3g} ({one['of peak']['median']:.2f})"
        error = "" if one["error"] is None else f"{one['error']:.4f}"
        lines.append(
            f"{'*' if one['chosen'] else ' '} {one['name']:38}{between(one['seconds'], 1e6):>23}{ratios}{rate:>18}"
            f"{throughput if one['operations'] else '':>20}{error:>9}  {', '.join(one['kernels'])}".rstrip()
        )
    return "\n".join(lines + [f"  {name} failed: {why.splitlines()[0][:150]}" for name, why in case["failed"].items()])


def shape(case: dict[str, Any]) -> str:
    """Returns the shape of the kernel as text: 4096×1024."""
    return "{}×{}".format(*case["shape"])


def between(values: dict[str, float], scale: float = 1.0) -> str:
    """Returns the median, and in brackets the quartiles, in three digits."""
    median, lower, upper = (digits(values[name] * scale) for name in ("median", "lower", "upper"))
    return f"{median} ({lower}–{upper})"


def digits(value: float) -> str:
    """Returns `value` in three digits: without decimals from 100 on, and in two digits below 0.1."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value >= 0.1 else f"{value:.2g}"


def draw(path: pathlib.Path) -> str:
    """Draws the results in the JSON file at `path`, and returns a message with the path of the picture.

    There is one panel for each mode and number of rows.  Bars are times relative to the bf16 dot, with their
    quartiles as lines.  Without matplotlib nothing is drawn, and the message says how to install it.
    """
    try:
        import matplotlib
    except ImportError:
        return f"no picture: pip install matplotlib, then python {pathlib.Path(__file__)} {path}"
    matplotlib.use("agg")
    from matplotlib import patches, pyplot

    results = json.loads(path.read_text())
    modes = list(dict.fromkeys(one["mode"] for case in results["cases"] for one in case["contenders"] if one["mode"]))
    counts = sorted({case["rows"] for case in results["cases"]})
    columns = [drawn([case for case in results["cases"] if case["rows"] == rows]) for rows in counts]
    lengths = [max(sum(len(bars(case, mode)) + 1.5 for case in cases) for cases in columns) for mode in modes]
    heights = [length * BAR + AROUND for length in lengths]
    size = (WIDTH * len(counts), sum(heights) + AROUND)
    figure, axes = pyplot.subplots(
        len(modes), len(counts), figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for mode, length, line in zip(modes, lengths, axes, strict=True):
        for rows, cases, axis in zip(counts, columns, line, strict=True):
            panel(axis, cases, mode)
            axis.set_ylim(length - 0.5, -1)
            axis.set_title(f"{mode}, rows: {rows}", fontsize=10, fontweight="bold")
    kinds = {"baseline": BASELINE, "perparam's choice": CHOSEN, "other implementation": OTHER, "part of W8A8": PART}
    handles = [patches.Patch(label=kind, edgecolor="white", linewidth=0, **look) for kind, look in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), fontsize=9, frameon=False)
    about = f"{results['device']}, {results['cores']} cores, jax {results['versions']['jax']}, {results['date'][:10]}"
    figure.suptitle(f"Time relative to XLA's bf16 dot, shorter is faster\n{about}", fontsize=11)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return f"drawn in {picture}"


def drawn(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns at most MAX_SHAPES of the cases, in descending order of the size of the kernel."""
    ordered = sorted(cases, key=lambda case: -math.prod(case["shape"]))
    return ordered[:: math.ceil(len(ordered) / MAX_SHAPES)]


def bars(case: dict[str, Any], mode: str) -> list[dict[str, Any]]:
    """Returns the contenders in the panel of a mode: those of the mode and the baselines, without the bf16 dot."""
    shown = [one for one in case["contenders"] if one["mode"] in (mode, None) and one["name"] != BASELINES[0]]
    return [one for one in shown if BASELINES[0] in one["ratios"]]


def panel(axis: Any, cases: list[dict[str, Any]], mode: str) -> None:
    """Draws a group of horizontal bars for each case into a panel, from top to bottom."""
    position, ticks, headings = 0.0, {}, []
    for case in cases:
        headings.append(len(ticks))
        ticks[position] = shape(case)
        for one in bars(case, mode):
            position += 1
            ticks[position] = one["name"]
            ratio = one["ratios"][BASELINES[0]]
            look = PART if "alone" in one["name"] else CHOSEN if one["chosen"] else OTHER
            look = BASELINE if one["mode"] is None or one["name"].startswith("torch") else look
            axis.barh(position, ratio["median"], 0.8, edgecolor="white", linewidth=0, **look)
            axis.plot([ratio["lower"], ratio["upper"]], [position, position], color="black", linewidth=0.8)
            axis.text(1.01, position, between(ratio), transform=axis.get_yaxis_transform(), va="center", fontsize=7)
        position += 1.5
    axis.set_yticks(list(ticks), ticks.values(), fontsize=7)
    for heading in headings:
        axis.get_yticklabels()[heading].set_fontweight("bold")
    axis.set_xlim(0, MAX_RATIO)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print(draw(pathlib.Path(sys.argv[1])))
