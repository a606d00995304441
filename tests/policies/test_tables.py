"""Tables: folded at a width without losing anything, in colour on a terminal only, escaped in HTML."""

import io
import json
import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perparam import Policy
from perparam.policies.tables import Column, Table, json_lines

COLUMNS = (Column("path"), Column("shape", leave=1), Column("storage", colour=True), Column("bytes", right=True))
words = st.text("abcdefgh_", min_size=1, max_size=12)
paths = st.lists(words, min_size=1, max_size=5).map("/".join)
lines = st.lists(
    st.tuples(paths, st.just("16×320"), st.sampled_from(["f32 cast", "f8_e4m3fn quantised"]), st.just("2.5 KiB")),
    min_size=1, max_size=4,
)  # fmt: skip
LEAST = 13 + 2 + 11 + 2 + 7
"""Widest pieces of a path, with its slash or indent, of a format or change, and of bytes; two blanks between them."""


@given(lines=lines, width=st.integers(LEAST, 100))
def test_lines_keep_to_the_width_and_nothing_is_lost(lines, width):
    text = Table(COLUMNS, lines).to_text(width)
    assert max(map(len, text.splitlines())) <= width
    head, *rest = text.splitlines()
    left = "left out for lack of width: shape" in text
    assert ("shape" in head) is not left
    # The first column, read from top to bottom without the folds' blanks, is the paths.
    end = min(head.index("storage"), head.index("shape") if not left else width)
    rows = rest[:-1] if left else rest
    assert "".join(row[:end].strip() for row in rows) == "".join(path for path, *_ in lines)
    assert text.count("2.5 KiB") == len(lines)


def test_a_column_is_left_out_only_where_folding_is_not_enough():
    table = Table(COLUMNS, [("layers/0-3/mlp/up_proj/kernel ×4", "704×320", "f8_e4m3fn quantised", "880.0 KiB")])
    assert table.to_text(60).splitlines() == [
        "path                 shape    storage                  bytes",
        "layers/0-3/mlp/      704×320  f8_e4m3fn quantised  880.0 KiB",
        " up_proj/kernel ×4",
    ]
    assert table.to_text(38).splitlines() == [
        "path          storage            bytes",
        "layers/0-3/   f8_e4m3fn      880.0 KiB",
        " mlp/          quantised",
        " up_proj/",
        " kernel ×4",
        "left out for lack of width: shape",
    ]


def test_cells_are_folded_at_underscores_where_nothing_else_is_enough():
    table = Table(COLUMNS, [("post_attention_layernorm/scale ×4", "320", "f32 cast", "64 B")])
    lines = table.to_text(32).splitlines()
    assert [line[:15].rstrip() for line in lines[1:4]] == ["post_attention_", " layernorm/", " scale ×4"]
    assert max(map(len, lines)) <= 32
    assert table.to_text(0).split() == table.to_text(1).split()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def plan():
    return Policy({"kernel": "f8_e4m3fn"}).explain({"dense": {"kernel": TREE}})


TREE = np.ones((8, 4), np.float32)


def printed(plan, out, monkeypatch, **options):
    monkeypatch.setattr("sys.stdout", out)
    plan.print(**options)
    text = str(plan)
    monkeypatch.undo()
    return out.getvalue(), text


def test_a_terminal_gets_its_width_and_colours_and_a_pipe_whole_plain_lines(plan, monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((50, 20)))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, text = printed(plan, Terminal(), monkeypatch)
    piped, whole = printed(plan, io.StringIO(), monkeypatch)
    assert piped == f"{whole}\n" == f"{plan.to_text()}\n"
    assert "\x1b" not in piped + text
    assert "\x1b[35mquantised" in shown
    assert re.sub(r"\x1b\[\d+m", "", shown) == f"{text}\n" == f"{plan.to_text(50)}\n"
    assert max(map(len, text.splitlines())) <= 50 < max(map(len, piped.splitlines()))


def test_no_color_and_wide_are_obeyed(plan, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert printed(plan, Terminal(), monkeypatch, wide=True)[0] == f"{plan.to_text()}\n"


def test_html_is_escaped_and_has_every_cell():
    html = Policy({"default": "bf16"}).explain({"<b>&": {"kernel": TREE}})._repr_html_()
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;/kernel" in html
    assert html.count("<th ") == 7
    assert "stored in 64 B (bf16 64 B), now in 128 B" in html


def test_control_characters_of_a_path_are_escaped():
    text = Policy().explain({"a\x1b[31m\nb": TREE}).to_text()
    assert "a\\x1b[31m\\nb" in text.splitlines()[1]
    assert "\x1b" not in text


def test_json_has_a_line_a_row_and_null_for_what_json_does_not_have():
    text = json_lines([{"a": float("nan")}, {"a": 1.5}], {"total": float("inf")})
    assert text.splitlines()[1:3] == ['  {"a": null},', '  {"a": 1.5}']
    assert json.loads(text) == {"rows": [{"a": None}, {"a": 1.5}], "total": None}
