"""`Chat` without a process: the history, prompts, interruptions, seeds and policies of a conversation."""

import io
import re

import checkpoints
import numpy as np
import pytest
from chatting import DIM, PLAIN, SUMMARY, TEMPLATE, Screen, dimmed
from small_tokenizer import change_json, write_tokenizer

import perparam
from perparam import Sampling, load_tokenizer
from perparam.commands import conversation
from perparam.loaders import Completion
from perparam.models.generation import programs
from perparam.models.kv_cache import EMPTY


@pytest.mark.slow
def test_only_thinking_and_the_summary_are_dim(chat, screen):
    talk = chat()
    talk.take("why")
    plain, dim = dimmed(screen.take())
    assert plain.startswith("<think> think string</think> answer\n6 tokens")
    assert dim == ["<think> think string</think>", plain.splitlines()[1]]
    assert re.fullmatch(SUMMARY, dim[1])
    assert plain.endswith(("on the host\n", "on the device\n"))


@pytest.mark.parametrize("out", [Screen, io.StringIO])
def test_a_plain_stream_and_no_color_get_no_escapes(out, chat, monkeypatch):
    if out is Screen:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = out()
    chat(stream).take("why")
    assert stream.getvalue().startswith("<think> think string</think> answer\n6 tokens")
    assert "\x1b" not in stream.getvalue()


def test_a_thought_that_the_prompt_has_opened_is_dim_from_its_first_word(chat, screen, monkeypatch):
    def stream(*_, **__):
        yield from ("a thou", "ght</th", "ink>\n\nso")
        return Completion("a thought</think>\n\nso", (1, 2, 3, 4), "stop")

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = chat()
    talk.take("<think>")
    plain, dim = dimmed(screen.take())
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


@pytest.mark.slow
def test_only_the_new_part_of_a_conversation_is_read(chat, monkeypatch):
    read = []
    for name in ("prefill", "extend"):
        real = getattr(programs, name)
        monkeypatch.setattr(programs, name, lambda *given, real=real, name=name: read.append(name) or real(*given))
    talk = chat(max_new_tokens=113)  # for which a cache of 192 slots is made, with room for two turns more
    for line in ("why", "hello", "why", "/reset", "why", "/policy bf16", "hello"):
        talk.take(line)
    assert read == ["prefill", "extend", "extend", "prefill", "prefill"]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(chat, screen, monkeypatch):
    def stream(*_, **__):
        yield "<think>a</think>\n\nso"
        yield " far"
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = chat()
    assert talk.answer("hello") is None
    assert dimmed(screen.take()) == ("<think>a</think>\n\nso far\n(stopped)\n", ["<think>a</think>"])
    assert talk.messages[-1] == {"role": "assistant", "content": "so far"}


def test_ctrl_c_before_the_answer_begins_changes_nothing(chat, screen, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    talk = chat()
    monkeypatch.setattr(conversation, "stream_text", interrupted)
    talk.take("hello")
    monkeypatch.setattr(perparam.models.Qwen3, "with_policy", interrupted)
    talk.take("/policy bf16")
    assert screen.take() == "(stopped)\n(stopped)\n"
    assert talk.messages == []


def test_an_error_in_an_answer_leaves_the_terminal_as_it_was(chat, screen, monkeypatch):
    def stream(*_, **__):
        yield "<think>a"
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = chat()
    with pytest.raises(RuntimeError, match="RESOURCE"):
        talk.take("hello")
    assert dimmed(f"{screen.take()}after")[1] == ["<think>a"]


def test_a_line_that_is_not_utf_8_is_asked_for_again(chat, screen, monkeypatch):
    talk, lines = chat(), iter([b"\xff", KeyboardInterrupt, b"  hello ", EOFError])

    def read(_):
        line = next(lines)
        if isinstance(line, bytes):
            return line.decode()
        raise line

    monkeypatch.setattr("builtins.input", read)
    talk.run()
    written = screen.take()
    assert "perparam: the line is not UTF-8 text" in written
    assert " world there" in written
    assert len(talk.messages) == 2


def test_an_interrupted_thought_is_dim_no_longer_and_leaves_an_empty_answer(chat, screen, monkeypatch):
    def stream(*_, **__):
        yield "<think>a <"
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "stream_text", stream)
    talk = chat()
    talk.answer("hello")
    assert screen.take() == f"{PLAIN}{DIM}<think>a <{PLAIN}\n(stopped)\n"
    assert talk.messages[-1] == {"role": "assistant", "content": ""}


def test_an_answer_is_cut_off_after_the_most_tokens(chat, screen):
    talk = chat(max_new_tokens=20)
    completion = talk.answer("the")
    assert (completion.text, completion.finish_reason) == (" and user" * 10, "length")
    count, _, rate, _ = re.search(SUMMARY, screen.take()).groups()
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


def test_a_bad_policy_changes_nothing(chat, screen):
    talk = chat()
    talk.take("/policy bf16")
    before = talk.model
    assert "Policy(" in screen.take()
    for line in ("/policy bf17", "/policy nowhere.yaml", "/policy params=i8"):
        talk.take(line)
        assert screen.take().startswith("perparam: ")
        assert talk.model is before
    assert talk.messages == []
