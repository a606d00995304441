"""Tables of results: as lines of text, folded at the width of a terminal and in colour there, as HTML and as JSON."""

from __future__ import annotations

import dataclasses
import functools
import html
import io
import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from .dtypes import as_dtype, is_narrow
from .errors import UnknownDtype, printable
from .formats import FORMATS

_GAP = "  "
"""Blanks between columns."""

_PIECES = re.compile(r"(?:\| |×)?[^/, ×]*[/,]+ ?|(?:\| |×)?[^/, ×]+ ?| ")
"""Pieces of a cell that stay whole: they end with a slash, comma or blank, and `|` and `×` begin one."""

_FINE_PIECES = re.compile(_PIECES.pattern.replace("×]", "×_]").replace("[/,]", "[/,_]"))
"""Pieces that end at an underscore too, for terminals that are narrower than the others allow."""

_HTML_LINES = 200

_STYLES = {
    "cast": "bold",
    "quantised": "magenta",
    "requantised": "red",
    "dequantised": "magenta",
    "made": "dim",
    "dissolved": "dim",
}
"""Styles of changes; those of formats are in `_style`."""

_COLOURS = {"magenta": "#a349a4", "red": "#d1453b", "green": "#2f8f4e", "cyan": "#1f86a8"}
"""Colours in HTML that can be read on white and on black."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    name    its header
    right   whether cells are aligned to the right
    leave   when the table is too wide: columns with a number are left out, the smallest number first
    colour  whether names of formats and changes are in colour
    """

    name: str
    right: bool = False
    leave: int | None = None
    colour: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and lines of cells.

    >>> print(Table((Column("name"), Column("bytes", right=True)), [("kernel", "4"), ("bias", "16")]).to_text())
    name    bytes
    kernel      4
    bias       16
    """

    columns: tuple[Column, ...]
    lines: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        cells = [tuple(map(printable, line)) for line in self.lines]  # paths come from files
        object.__setattr__(self, "lines", cells)

    def to_text(self, width: int | None = None) -> str:
        """Returns the table as plain text: whole lines, or lines of at most `width` characters where that is possible.

        Wide cells are folded at blanks, slashes and commas; then columns are left out, which a last line names; then
        cells are folded at underscores too.
        """
        return self.styled(width).plain

    def styled(self, width: int | None = None) -> Text:
        """Returns the same with styles for a terminal."""
        kept, widths, pieces = self._layout(width)
        columns = [self.columns[i] for i in kept]
        lines = [self._line([column.name for column in columns], columns, widths, pieces, "bold")]
        lines += [self._line([line[i] for i in kept], columns, widths, pieces) for line in self.lines]
        if left := [column.name for i, column in enumerate(self.columns) if i not in kept]:
            lines.append(Text(_wrapped([f"left out for lack of width: {', '.join(left)}"], width), "dim"))
        return Text("\n").join(lines)

    def kept(self, width: int | None = None) -> list[str]:
        """Returns the names of the columns that text of this width has."""
        return [self.columns[i].name for i in self._layout(width)[0]]

    def _layout(self, width: int | None) -> tuple[list[int], list[int], re.Pattern[str]]:
        """Returns the columns that are kept, their widths, and the pieces of cells that stay whole."""
        cells = [[column.name, *(line[i] for line in self.lines)] for i, column in enumerate(self.columns)]
        wide = [max(map(len, column)) for column in cells]
        if width is None:
            return list(range(len(wide))), wide, _PIECES

        def least_widths(pieces: re.Pattern[str]) -> list[int]:
            return [
                max(len(line) for cell in texts for line in _fold(cell, 1, column.right, pieces))
                for column, texts in zip(self.columns, cells, strict=True)
            ]

        pieces, least = _PIECES, least_widths(_PIECES)
        numbers = [(column.leave, i) for i, column in enumerate(self.columns) if column.leave is not None]
        kept, leave = list(range(len(wide))), [i for _, i in sorted(numbers)]
        while leave and sum(least[i] + len(_GAP) for i in kept) - len(_GAP) > width:
            kept.remove(leave.pop(0))
        if sum(least[i] + len(_GAP) for i in kept) - len(_GAP) > width:
            pieces, least = _FINE_PIECES, least_widths(_FINE_PIECES)
        widths = {i: wide[i] for i in kept}
        while sum(widths.values()) + len(_GAP) * (len(kept) - 1) > width:
            widest = max(kept, key=lambda i: (widths[i] > least[i], widths[i]))
            if widths[widest] == least[widest]:
                break
            widths[widest] -= 1
        return kept, [widths[i] for i in kept], pieces

    def _line(
        self,
        cells: Sequence[str],
        columns: Sequence[Column],
        widths: Sequence[int],
        pieces: re.Pattern[str],
        style: str = "",
    ) -> Text:
        """Returns the lines of text of one line of the table."""
        folded = [
            _fold(cell, width, column.right, pieces) for cell, column, width in zip(cells, columns, widths, strict=True)
        ]
        lines = []
        for number in range(max(map(len, folded))):
            line = Text()
            for parts, column, width in zip(folded, columns, widths, strict=True):
                part = parts[number] if number < len(parts) else ""
                line.append(" " * (width - len(part)) if column.right else "")
                line.append_text(_coloured(part) if column.colour and not style else Text(part, style))
                line.append(" " * (0 if column.right else width - len(part)) + _GAP)
            line.rstrip()
            lines.append(line)
        return Text("\n").join(lines)

    def to_html(self) -> str:
        """Returns the table as HTML, at most 200 lines of it."""

        def cell(text: str, column: Column, tag: str = "td") -> str:
            shown = " ".join(_html_word(word) if column.colour else html.escape(word) for word in text.split(" "))
            return f'<{tag} style="text-align:{"right" if column.right else "left"}">{shown}</{tag}>'

        head = "".join(cell(column.name, column, "th") for column in self.columns)
        lines = [
            "".join(cell(text, column) for text, column in zip(line, self.columns, strict=True))
            for line in self.lines[:_HTML_LINES]
        ]
        more = len(self.lines) - len(lines)
        rest = f"<p>and {more} more lines</p>" if more else ""
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>{rest}"


class Report:
    """A result that prints as a table with notes; subclasses define the methods that raise or return nothing here.

    `str(report)` has the width of the terminal if standard output is one, and whole lines otherwise.
    """

    def _table(self) -> Table:
        raise NotImplementedError

    def _legend(self, columns: Collection[str]) -> list[str]:
        """Returns explanations of the cells in the columns that are printed, which follow the table."""
        return []

    def _notes(self) -> list[str]:
        """Returns lines of text, printed below the table and the legend."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Returns rows and totals as JSON that suits a diff: one line for each row, and one for the totals."""
        raise NotImplementedError

    def to_text(self, width: int | None = None, *, colour: bool = False) -> str:
        """Returns the table and its notes as text.

        width   the most characters of a line, if cells can be folded so far; None: whole lines.  Paths below the table
                stay whole
        colour  whether to add the escape codes of a terminal's colours
        """
        table, notes = self._table(), [*map(printable, self._notes())]
        legend = [*map(printable, self._legend(table.kept(width)))]
        blocks = [table.styled(width)] if table.lines else []
        blocks += [Text(_wrapped(legend, width), "dim")] if legend else []
        blocks += [Text(_wrapped(notes, width))] if notes else []
        text = Text("\n\n").join(blocks)
        return _ansi(text) if colour else text.plain

    def print(self, *, wide: bool = False) -> None:
        """Prints the table: on a terminal in colour and, unless `wide`, at its width; plain whole lines otherwise."""
        width, colour = _terminal()
        print(self.to_text(None if wide else width, colour=colour))

    def __str__(self) -> str:
        return self.to_text(_terminal()[0])

    def _repr_html_(self) -> str:
        table = self._table()
        texts = [*self._legend(table.kept()), *self._notes()]
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in texts)
        return f"<div>{table.to_html() if table.lines else ''}{lines}</div>"


def json_lines(rows: Iterable[Mapping[str, Any]], totals: Mapping[str, Any]) -> str:
    """Returns rows and totals as JSON that suits a diff: one line for each row, and one for the totals.

    Numbers that JSON does not have (NaN and infinity) are null.
    """

    def dumped(fields: Mapping[str, Any]) -> str:
        return json.dumps({k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in fields.items()})

    lines = ",\n".join(f"  {dumped(row)}" for row in rows)
    return f'{{"rows": [\n{lines}\n],\n{dumped(totals)[1:]}\n'


def _fold(cell: str, width: int, right: bool = False, pieces: re.Pattern[str] = _PIECES) -> list[str]:
    """Returns a cell as lines of at most `width` characters if its pieces are short enough.

    >>> _fold("layers/0-3/mlp/up_proj/kernel ×4", 17)
    ['layers/0-3/mlp/', ' up_proj/kernel', ' ×4']
    """
    if len(cell) <= width:
        return [cell]
    if right:
        return [line.strip() for line in re.split("(?=±)", cell)]
    lines = [""]
    for piece in pieces.findall(cell):
        if lines[-1].strip() and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append(" ")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


@functools.cache
def _style(word: str) -> str:
    """Returns the style of a word: a change or a format."""
    name = word.strip("()")
    if name in _STYLES:
        return _STYLES[name]
    if name in FORMATS:
        return "green"
    try:
        dtype = as_dtype(name)
    except UnknownDtype:
        return ""
    return "green" if is_narrow(dtype) else "cyan" if dtype.itemsize >= 4 else ""


def _coloured(text: str) -> Text:
    return Text("").join(Text(part, _style(part)) for part in re.split(r"( +)", text))


def _html_word(word: str) -> str:
    colour = _COLOURS.get(_style(word))
    return f'<span style="color:{colour}">{html.escape(word)}</span>' if colour else html.escape(word)


def _wrapped(lines: Iterable[str], width: int | None) -> str:
    if width is None:
        return "\n".join(lines)
    return "\n".join(
        textwrap.fill(line, max(width, 1), subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        for line in lines
    )


def _terminal() -> tuple[int | None, bool]:
    """Returns the width of the terminal on standard output, None if it is none, and whether to use colours there.

    The variables NO_COLOR and TERM decide on colours, as rich reads them.
    """
    if sys.stdout is None or not sys.stdout.isatty():
        return None, False
    console = Console()
    return shutil.get_terminal_size().columns, console.color_system is not None and not console.no_color


def _ansi(text: Text) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=sys.maxsize, no_color=False)
    console.print(text, soft_wrap=True, end="", highlight=False)
    return out.getvalue()
