"""`perparam chat`: on a pseudo-terminal as somebody uses it, and without a process, thinking and history."""

import io
import itertools
import os
import re
import subprocess
import sys

import checkpoints
import numpy as np
import pytest
from checkpoints import fields, tensors, write
from small_tokenizer import change_json, small_tokenizer, write_tokenizer

import perparam
from perparam import Sampling, load_tokenizer
from perparam import chat as conversation
from perparam.loaders import Completion
from perparam.models.generation import programs
from perparam.models.kv_cache import EMPTY

ANSWERS = {
    "hello": ("Ġworld", "Ġthere", "<|im_end|>"),
    "why": ("<think>", "Ġthink", "Ġstring", "</think>", "Ġanswer", "<|im_end|>"),
    "the": ("Ġand", "Ġuser", "Ġand"),  # and on and on
}
"""What the model of these tests answers to a message that ends with a word: each token decides on the next one."""

TEMPLATE = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' + messages[-1].content }}"""
"""Has an answer go on from the question, which decides on it."""

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
SUMMARY = r"(\d+) tokens, the first after ([\d.]+) s(?:, then ([\d.]+) tokens/s)?, ([\d.]+) GiB on the (?:host|device)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One layer that adds nothing, between an embedding and a head that know what follows what; float32 files."""
    tokenizer = small_tokenizer()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    config = fields(
        hidden_size=64, num_hidden_layers=1, vocab_size=size, quantization_config=None, torch_dtype="float32",
        eos_token_id=None, pad_token_id=None, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    arrays = tensors(config, plain_dtype=np.float32)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        arrays[f"model.layers.0.{name}.weight"][:] = 0
    embedding = np.random.default_rng(0).choice([-1.0, 1.0], (size, 64)).astype(np.float32)
    head = np.zeros_like(embedding)
    follows = {}
    for word, answer in ANSWERS.items():
        ids = [tokenizer.encode(word).ids[-1], *map(tokenizer.token_to_id, answer)]
        for before, after in itertools.pairwise(ids):
            assert follows.setdefault(before, after) == after
    for before, after in follows.items():
        head[after] += embedding[before]
    arrays |= {
        "model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": np.ones(64, np.float32),
    }  # fmt: skip
    found = write(tmp_path_factory.mktemp("chat"), config, arrays)
    write_tokenizer(found, TEMPLATE)
    return found


# On a terminal.


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


def test_thinking_is_dimmed_on_the_terminal(talk):
    assert f"{DIM}<think> think string</think>{PLAIN} answer\r\n" in talk.say("why")


def test_lines_that_begin_with_a_stroke(talk):
    assert conversation.HELP in talk.say("/help")
    assert conversation.HELP in talk.say("/hlep")
    assert "Conversation cleared." in talk.say("/reset")
    assert "Policy(" in talk.say("/policy bf16")
    assert " world there" in talk.say("hello")
    assert "perparam: 'bf17' is neither a preset" in talk.say("/policy bf17")
    assert "perparam: " in talk.say("/policy params=bf16,comptue=f32")
    assert talk.say("") == ""
    assert " world there" in talk.say("hello")


def test_ctrl_c_ends_an_answer_and_no_more(talk):
    for _ in range(2):
        talk.terminal.sendline("the")
        talk.terminal.expect_exact(" and user and user")
        talk.terminal.send("\x03")
        printed = talk.prompt()
        assert printed.endswith("(stopped)\r\n")
        assert "tokens/s" not in printed
    assert " world there" in talk.say("hello")


def test_ctrl_c_at_the_prompt_gives_up_a_line_and_no_more(talk):
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


@pytest.mark.slow
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


# Without a process.


class Screen(io.StringIO):
    """A terminal that remembers."""

    def isatty(self):
        return True

    def take(self):
        """What was written since the last time."""
        written = self.getvalue()
        self.seek(0)
        self.truncate()
        return written


@pytest.fixture(autouse=True)
def colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture(scope="module")
def model(folder):
    return perparam.load_model(folder)


@pytest.fixture
def chat(folder, model):
    def make(out=None, **options):
        options = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 8, **options}
        return conversation.Chat(model, load_tokenizer(folder), out=Screen() if out is None else out, **options)

    return make


def dimmed(written):
    """The text without escapes, and the stretches of it that are dim."""
    plain, stretches, dim = "", [""], False
    for part in re.split("(\x1b\\[[02]m)", written):
        if part in (DIM, PLAIN):
            dim = part == DIM
            stretches.append("")
        else:
            plain += part
            stretches[-1] += part if dim else ""
    return plain, [stretch for stretch in stretches if stretch]


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


def test_nothing_that_is_certain_is_held_back():
    out = Screen()
    screen = conversation._AnswerPrinter(out, False, True)
    for piece, sure in [("so", "so"), (" <", " "), ("b", "<b"), ("</thin", ""), ("g", "</thing"), ("</think>", None)]:
        screen.add(piece)
        assert out.take() == (piece if sure is None else sure)
    for piece in ("a <", "</thin", "<think"):  # nothing is a mark any more
        screen.add(piece)
        assert out.take() == piece


def test_what_a_terminal_would_obey_is_not_written_but_every_language_is():
    assert shown(["a\x1b[2J\x0e\x9b\rb\tc\nd"], colour=False) == "a\ufffd[2J\ufffd\ufffd\ufffdb\tc\nd\n"
    text = "你好\u3000世界 l\u2019été\u202f! \u200f\u05d0 👨\u200d👩"
    assert shown([text], colour=False) == f"{text}\n"


def test_a_plain_stream_gets_no_escapes():
    assert shown(["<think>a", "</thi", "nk>so"], colour=False) == "<think>a</think>so\n"
    assert shown(["a</think>so"], opened=True, colour=False) == "a</think>so\n"


def test_only_thinking_and_the_summary_are_dim(chat):
    talk = chat()
    talk.take("why")
    plain, dim = dimmed(talk._out.take())
    assert plain.startswith("<think> think string</think> answer\n6 tokens")
    assert dim == ["<think> think string</think>", plain.splitlines()[1]]
    assert re.fullmatch(SUMMARY, dim[1])
    assert plain.endswith(("on the host\n", "on the device\n"))


@pytest.mark.parametrize("out", [Screen, io.StringIO])
def test_no_escapes_on_a_plain_stream_nor_under_no_color(out, chat, monkeypatch):
    if out is Screen:
        monkeypatch.setenv("NO_COLOR", "1")
    talk = chat(out())
    talk.take("why")
    assert talk._out.getvalue().startswith("<think> think string</think> answer\n6 tokens")
    assert "\x1b" not in talk._out.getvalue()


def test_a_thought_that_the_prompt_has_opened_is_dim_from_its_first_word(chat, monkeypatch):
    def stream(*_, **__):
        yield from ("a thou", "ght</th", "ink>\n\nso")
        return Completion("a thought</think>\n\nso", (1, 2, 3, 4), "stop")

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = chat()
    talk.take("<think>")
    plain, dim = dimmed(talk._out.take())
    assert plain.startswith("a thought</think>\n\nso\n4 tokens")
    assert "".join(dim[:-1]) == "a thought</think>"
    assert talk.messages[-1] == {"role": "assistant", "content": "so"}


def test_the_history_holds_answers_without_thinking(chat):
    talk = chat(system="and")
    system = {"role": "system", "content": "and"}
    assert talk.messages == [system]
    talk.take("why")
    talk.take("hello")
    assert talk.messages == [
        system,
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": " answer"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": " world there"},
    ]
    talk.take("/reset")
    assert talk.messages == [system]


def test_each_prompt_holds_what_was_said(chat, monkeypatch):
    asked = []
    original = conversation.stream_text

    def stream(model, tokenizer, prefix, *rest, **options):
        ids = np.asarray(prefix.tokens)[np.asarray(prefix.cache.positions) != EMPTY]
        asked.append(tokenizer.decode(ids, skip_special_tokens=False))
        return original(model, tokenizer, prefix, *rest, **options)

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = chat()
    talk.take("why")
    talk.take("hello")
    talk.take("/reset")
    talk.take("hello")
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    assert asked[1] == "".join(
        [turn("user", "why"), turn("assistant", " answer"), turn("user", "hello"), "<|im_start|>assistant\nhello"]
    )
    assert asked[2] == turn("user", "hello") + "<|im_start|>assistant\nhello"


@pytest.mark.parametrize("template", [TEMPLATE, "{{- bos_token }}" + TEMPLATE], ids=["config", "both"])
def test_every_prompt_has_bos_once_whoever_writes_it(model, tmp_path, monkeypatch, template):
    write_tokenizer(tmp_path, template)
    change_json(tmp_path / "tokenizer_config.json", add_bos_token=True, bos_token="<|endoftext|>")
    tokenizer, asked, original = load_tokenizer(tmp_path), [], conversation.stream_text

    def stream(model, tokenizer, prefix, *rest, **options):
        asked.append(np.asarray(prefix.tokens)[np.asarray(prefix.cache.positions) != EMPTY].tolist())
        return original(model, tokenizer, prefix, *rest, **options)

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = conversation.Chat(model, tokenizer, out=Screen(), sampling=Sampling(temperature=0.0), max_new_tokens=8)
    talk.take("why")
    talk.take("hello")
    bos = tokenizer.token_id("<|endoftext|>")
    assert [(ids[0], ids.count(bos)) for ids in asked] == [(bos, 1), (bos, 1)]


def test_of_a_conversation_only_what_is_new_is_read(chat, monkeypatch):
    read = []
    for name in ("prefill", "extend"):
        real = getattr(programs, name)
        monkeypatch.setattr(programs, name, lambda *given, real=real, name=name: read.append(name) or real(*given))
    talk = chat(max_new_tokens=113)  # for which a cache of 192 slots is made, with room for two turns more
    for line in ("why", "hello", "why", "/reset", "why", "/policy bf16", "hello"):
        talk.take(line)
    assert read == ["prefill", "extend", "extend", "prefill", "prefill"]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(chat, monkeypatch):
    def stream(*_, **__):
        yield "<think>a</think>\n\nso"
        yield " far"
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = chat()
    assert talk.answer("hello") is None
    assert dimmed(talk._out.take()) == ("<think>a</think>\n\nso far\n(stopped)\n", ["<think>a</think>"])
    assert talk.messages[-1] == {"role": "assistant", "content": "so far"}


def test_ctrl_c_before_the_answer_begins_changes_nothing(chat, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    talk = chat()
    monkeypatch.setattr(conversation, "stream_text", interrupted)
    talk.take("hello")
    monkeypatch.setattr(perparam.models.Qwen3, "with_policy", interrupted)
    talk.take("/policy bf16")
    assert talk._out.take() == "(stopped)\n(stopped)\n"
    assert talk.messages == []


def test_an_error_in_an_answer_leaves_the_terminal_as_it_was(chat, monkeypatch):
    def stream(*_, **__):
        yield "<think>a"
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = chat()
    with pytest.raises(RuntimeError, match="RESOURCE"):
        talk.take("hello")
    assert dimmed(f"{talk._out.take()}after")[1] == ["<think>a"]


def test_a_line_that_is_no_text_is_asked_again(chat, monkeypatch):
    talk, lines = chat(), iter([b"\xff", KeyboardInterrupt, b"  hello ", EOFError])

    def read(_):
        line = next(lines)
        if isinstance(line, bytes):
            return line.decode()
        raise line

    monkeypatch.setattr("builtins.input", read)
    talk.run()
    written = talk._out.take()
    assert "perparam: the line is not UTF-8 text" in written
    assert " world there" in written
    assert len(talk.messages) == 2


def test_a_thought_that_was_interrupted_is_dim_no_longer_and_no_answer(chat, monkeypatch):
    def stream(*_, **__):
        yield "<think>a <"
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = chat()
    talk.answer("hello")
    assert talk._out.take() == f"{PLAIN}{DIM}<think>a <{PLAIN}\n(stopped)\n"
    assert talk.messages[-1] == {"role": "assistant", "content": ""}


def test_an_answer_is_cut_off_after_the_most_tokens(chat):
    talk = chat(max_new_tokens=20)
    completion = talk.answer("the")
    assert (completion.text, completion.finish_reason) == (" and user" * 10, "length")
    count, _, rate, _ = re.search(SUMMARY, talk._out.take()).groups()
    assert int(count) == 20
    assert float(rate) > 0


def test_the_same_question_is_answered_anew_with_the_next_seed(chat, monkeypatch):
    seeds = []
    original = conversation.stream_text
    monkeypatch.setattr(
        conversation,
        "stream_text",
        lambda *given, **options: seeds.append(options["key"]) or original(*given, **options),
    )
    talk = chat(seed=7)
    talk.take("hello")
    talk.take("hello")
    assert seeds == [7, 8]


def test_a_policy_is_applied_to_the_parameters_as_they_were_loaded(chat, model):
    talk, loaded = chat(), checkpoints.arrays(model)
    name = "layers/0/self_attn/k_proj/kernel"
    talk.take("/policy bf16")
    narrow = np.asarray(checkpoints.arrays(talk.model)[name])
    assert narrow.dtype == checkpoints.BF16
    assert (narrow.astype(np.float32) != np.asarray(loaded[name])).any()
    talk.take("/policy f32")
    assert all((array == loaded[path]).all() for path, array in checkpoints.arrays(talk.model).items())
    talk.take("/policy bf16")
    talk.take("/policy")
    assert all((array == loaded[path]).all() for path, array in checkpoints.arrays(talk.model).items())


def test_a_bad_policy_changes_nothing(chat):
    talk = chat()
    talk.take("/policy bf16")
    before = talk.model
    assert "Policy(" in talk._out.take()
    for line in ("/policy bf17", "/policy nowhere.yaml", "/policy params=i8"):
        talk.take(line)
        assert talk._out.take().startswith("perparam: ")
        assert talk.model is before
    assert talk.messages == []
