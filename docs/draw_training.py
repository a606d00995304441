"""Draws docs/training.png, which shows where the slots of a policy apply in a training step. Needs matplotlib.

python docs/draw_training.py
"""

from __future__ import annotations

import pathlib

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

KEPT, MADE, INK, SLOT = "#dbe9f6", "#fdf1d6", "#222222", "#8a1c1c"
WIDTH, HEIGHT = 2.9, 1.4
LEFT, MIDDLE, RIGHT = 0.25, 4.85, 9.45
UPPER, LOWER = 3.75, 1.1

BOXES = (
    (LEFT, UPPER, KEPT, "Storage", "params",
     "kernel  f8_e4m3fn\nscale_inv  one for each block\nother parameters  bf16 or f32"),
    (MIDDLE, UPPER, MADE, "Compute", "compute",
     "each operand of a product\nin its compute dtype,\nsums in f32"),
    (RIGHT, UPPER, MADE, "Output", "output",
     "logits in f32,\nthe loss in f32"),
    (RIGHT, LOWER, MADE, "Backward pass", "backward",
     "products with the gradient:\nbf16 or f32, or block-scaled\ne5m2 or e4m3"),
    (MIDDLE, LOWER, MADE, "Gradients", "grads",
     "one wide array for each\nparameter, also for\na narrow one"),
    (LEFT, LOWER, KEPT, "Optimizer", "master, opt_state",
     "master  the true values, f32\nmu, nu  f32, bf16 or 8 bits\narithmetic in f32"),
)  # fmt: skip
"""Lower left corner, colour, title, slot and text of each box."""


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    """Draws an arrow with its label: above a horizontal arrow, to the right of a vertical one."""
    style = {"arrowstyle": "-|>", "lw": 1.5, "color": INK, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    place = (x + 0.12, y, "left", "center") if start[0] == end[0] else (x, y + 0.08, "center", "bottom")
    axes.text(*place[:2], text, ha=place[2], va=place[3], fontsize=8.5, color=INK, linespacing=1.3)


def draw(path: pathlib.Path) -> None:
    """Writes the picture."""
    figure = Figure(figsize=(11, 5.1), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12.6), ylim=(0, 5.84))
    axes.axis("off")
    title = "A training step, and the slot that decides each format"
    axes.text(LEFT, 5.5, title, va="center", fontsize=12, weight="bold", color=INK)
    for x, y, colour, title, slot, text in BOXES:
        edges = "round,pad=0.02,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle=edges, fc=colour, ec=INK, lw=1.2))
        top = y + HEIGHT - 0.14
        axes.text(x + 0.12, top, title, va="top", fontsize=11, weight="bold", color=INK)
        axes.text(
            x + WIDTH - 0.12, top - 0.02, slot, va="top", ha="right", fontsize=9.5, family="monospace", color=SLOT
        )
        axes.text(x + 0.12, top - 0.4, text, va="top", fontsize=9, color=INK, linespacing=1.35)
    upper, lower, half = UPPER + HEIGHT / 2, LOWER + HEIGHT / 2, WIDTH / 2
    arrow(axes, (LEFT + WIDTH, upper), (MIDDLE, upper), "cast or scaled\ninside the program")
    arrow(axes, (MIDDLE + WIDTH, upper), (RIGHT, upper), "cast")
    arrow(axes, (RIGHT + half, UPPER), (RIGHT + half, LOWER + HEIGHT), "× loss scale")
    arrow(axes, (RIGHT, lower), (MIDDLE + WIDTH, lower), "straight through\nthe rounding")
    arrow(axes, (MIDDLE, lower), (LEFT + WIDTH, lower), "÷ loss scale,\nin f32")
    rounded = "new values and scales, rounded to nearest\n(with a master) or stochastically (without)"
    arrow(axes, (LEFT + half, LOWER + HEIGHT), (LEFT + half, UPPER), rounded)
    for x, colour, text in ((LEFT, KEPT, "kept from step to step"), (3.35, MADE, "made in a step")):
        axes.add_patch(FancyBboxPatch((x, 0.35), 0.3, 0.2, boxstyle="round,pad=0.02", fc=colour, ec=INK, lw=1))
        axes.text(x + 0.45, 0.45, text, va="center", fontsize=9, color=INK)
    axes.text(5.85, 0.45, "slot of the policy", va="center", fontsize=9.5, family="monospace", color=SLOT)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(pathlib.Path(__file__).with_name("training.png"))
