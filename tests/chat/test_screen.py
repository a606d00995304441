"""What `perparam chat` writes: thinking is dim wherever pieces end, and the terminal is left as it was."""

import itertools

import pytest
from chatting import DIM, PLAIN, Screen, dimmed

from perparam.commands import conversation


def shown(pieces, opened=False, colour=True):
    out = Screen()
    screen = conversation._AnswerPrinter(out, colour, opened)
    for piece in pieces:
        screen.add(piece)
    screen.end()
    return out.getvalue()


def cuts(text, count):
    for places in itertools.combinations(range(1, len(text)), count):
        yield [text[a:b] for a, b in itertools.pairwise((0, *places, len(text)))]


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(
    ("text", "opened", "dim"),
    [
        ("<think>a < b\n</think>\n\nso", False, "<think>a < b\n</think>"),
        (" \n<think>a</think>so", False, "<think>a</think>"),
        ("a</</think>so", True, "a</</think>"),
        ("<think>cut off</thin", False, "<think>cut off</thin"),
        ("<think>a</think>b<think>c</think>", False, "<think>a</think>"),
        ("a</think>the mark <think> it", True, "a</think>"),
        ("the mark <think> and", False, ""),
        ("2 < 3 </think>", False, ""),
        ("</think>at once", True, "</think>"),
        ("<thin", False, ""),
    ],
)
def test_the_thought_is_dim_wherever_pieces_end(text, opened, dim, count):
    for pieces in cuts(text, count):
        plain, stretches = dimmed(shown(pieces, opened))
        assert plain == f"{text}\n"
        assert "".join(stretches).rstrip("\n") == dim.rstrip("\n"), pieces
    assert "".join(dimmed(shown(text, opened))[1]) == dim  # letter by letter


def test_the_terminal_is_left_as_it_was():
    for text in ("<think>a", "<think>a</th", "<think>a</think>b", "b", ""):
        for opened in (True, False):
            written = shown([text], opened)
            assert written.endswith("\n")
            assert written.rfind(PLAIN) >= written.rfind(DIM)


def test_text_that_cannot_be_part_of_a_mark_is_written_at_once():
    out = Screen()
    screen = conversation._AnswerPrinter(out, False, True)
    for piece, sure in [("so", "so"), (" <", " "), ("b", "<b"), ("</thin", ""), ("g", "</thing"), ("</think>", None)]:
        screen.add(piece)
        assert out.take() == (piece if sure is None else sure)
    for piece in ("a <", "</thin", "<think"):  # nothing is a mark any more
        screen.add(piece)
        assert out.take() == piece


def test_control_characters_are_replaced_and_every_language_is_written():
    assert shown(["a\x1b[2J\x0e\x9b\rb\tc\nd"], colour=False) == "a\ufffd[2J\ufffd\ufffd\ufffdb\tc\nd\n"
    text = "你好\u3000世界 l\u2019été\u202f! \u200f\u05d0 👨\u200d👩"
    assert shown([text], colour=False) == f"{text}\n"


def test_a_plain_stream_gets_no_escapes():
    assert shown(["<think>a", "</thi", "nk>so"], colour=False) == "<think>a</think>so\n"
    assert shown(["a</think>so"], opened=True, colour=False) == "a</think>so\n"
