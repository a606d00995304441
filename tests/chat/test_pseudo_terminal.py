"""`perparam chat` as a program, on a pseudo-terminal as somebody uses it."""

import os
import re
import subprocess
import sys

import pytest
from chatting import DIM, PLAIN, SUMMARY, dimmed

from perparam.commands import conversation


class Talk:
    """`perparam chat` on a pseudo-terminal that echoes nothing."""

    # The first thing a new session does: take the conversation, so that Ctrl-C means it.  A fork would do that too, but
    # not in a process in which JAX has threads.
    START = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"

    def __init__(self, *arguments, **environment):
        fdpexpect = pytest.importorskip("pexpect.fdpexpect")
        termios = pytest.importorskip("termios")
        ours, theirs = os.openpty()
        modes = termios.tcgetattr(theirs)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, modes)
        rest = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.START, sys.executable, "-m", "perparam", "chat", *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=rest | environment,
        )  # fmt: skip
        os.close(theirs)
        self.terminal = fdpexpect.fdspawn(ours, timeout=120, encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.terminal.close()

    def prompt(self):
        """What was written up to the next prompt."""
        self.terminal.expect(r"(?<![^\n])> ")  # at the beginning of a line
        return self.terminal.before

    def say(self, line):
        """What a line is answered with, up to the next prompt."""
        self.terminal.sendline(line)
        return self.prompt()

    def ends(self):
        """The exit code, and what was written last."""
        pexpect = pytest.importorskip("pexpect")
        self.terminal.expect(pexpect.EOF)
        return self.process.wait(timeout=60), self.terminal.before


@pytest.fixture(scope="module")
def talk(folder):
    """A conversation that several tests go on with, since each start imports and compiles anew."""
    with Talk(folder, "--max-new-tokens", 12_000, "--temperature", 0) as found:
        assert found.prompt().endswith(f"{conversation.HELP}\r\n")
        yield found


def test_an_answer_comes_with_its_summary(talk):
    printed = talk.say("hello")
    assert "\x1b" in printed
    assert " world there\r\n" in printed
    count, first, _, memory = re.search(SUMMARY, printed).groups()
    assert int(count) == 3
    assert 0 <= float(first) < 120
    assert 0.05 < float(memory) < 64
    assert dimmed(talk.say("hello there, hello"))[0].startswith(" world there\r\n3 tokens")


@pytest.mark.thorough
def test_thinking_is_dimmed_on_the_terminal(talk):
    assert f"{DIM}<think> think string</think>{PLAIN} answer\r\n" in talk.say("why")


@pytest.mark.slow
def test_lines_that_begin_with_a_slash_are_commands(talk):
    assert conversation.HELP in talk.say("/help")
    assert conversation.HELP in talk.say("/hlep")
    assert "Conversation cleared." in talk.say("/reset")
    assert "Policy(" in talk.say("/policy bf16")
    assert " world there" in talk.say("hello")
    assert "perparam: 'bf17' is neither a preset" in talk.say("/policy bf17")
    assert "perparam: " in talk.say("/policy params=bf16,comptue=f32")
    assert talk.say("") == ""
    assert " world there" in talk.say("hello")


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_but_not_the_program(talk):
    for _ in range(2):
        talk.terminal.sendline("the")
        talk.terminal.expect_exact(" and user and user")
        talk.terminal.send("\x03")
        printed = talk.prompt()
        assert printed.endswith("(stopped)\r\n")
        assert "tokens/s" not in printed
    assert " world there" in talk.say("hello")


def test_ctrl_c_at_the_prompt_discards_the_line_but_does_not_end_the_program(talk):
    talk.terminal.send("\x03")
    assert talk.prompt().strip() == ""
    talk.terminal.send("quest\x03")
    talk.prompt()
    assert " world there" in talk.say("hello")


def test_ctrl_d_ends_the_program(talk):
    talk.terminal.send("\x04")
    code, printed = talk.ends()
    assert code == 0
    assert "Traceback" not in printed


@pytest.mark.thorough
def test_quit_ends_the_program_and_no_color_is_respected(folder):
    with Talk(folder, "--max-new-tokens", 4, "--temperature", 0, "--system", "the", NO_COLOR="1") as talk:
        talk.prompt()
        printed = talk.say("why")
        assert "<think> think string</think>" in printed
        assert "4 tokens, " in printed
        assert "\x1b" not in printed
        talk.terminal.sendline("/quit")
        code, printed = talk.ends()
        assert code == 0
        assert "Traceback" not in printed


@pytest.mark.slow
def test_questions_may_come_through_a_pipe(folder):
    command = [sys.executable, "-m", "perparam", "chat", str(folder), "--max-new-tokens", "8"]
    done = subprocess.run(command, input="why\nhello\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "<think> think string</think> answer\n6 tokens" in done.stdout
    assert " world there\n3 tokens" in done.stdout
