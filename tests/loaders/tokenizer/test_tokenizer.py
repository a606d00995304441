"""Text in, text out: beside what Hugging Face transformers makes of the same files, and what wrong files say."""

import contextlib
import json
import os
import shutil

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import GOLDEN
from hypothesis import strategies as st
from small_tokenizer import small_tokenizer, write_json, write_tokenizer

from perparam.loaders.tokenizer import Tokenizer, chat_template, files, load_tokenizer
from perparam.policies.errors import InvalidCheckpoint, InvalidText, InvalidTokens, MissingFile, UnsupportedConfig

CHAT = GOLDEN / "chat"
CASES = json.loads((CHAT / "cases.json").read_text(encoding="utf-8"))
TOKENIZER = load_tokenizer(CHAT)
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def change(path, **fields):
    given = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {name: value for name, value in {**given, **fields}.items() if value is not ...})


def templated(source, **variables):
    return chat_template.ChatTemplate(source, "it", variables)


# What transformers makes of the same files.


@pytest.mark.parametrize("case", CASES["chats"] + CASES["continued"], ids=lambda case: case["name"])
def test_a_chat_is_rendered_and_encoded_as_transformers_does(case):
    options = dict(case["options"])
    tools = options.pop("tools", None)
    assert TOKENIZER.chat(case["messages"], tools=tools, **options) == case["prompt"]
    assert TOKENIZER.encode_chat(case["messages"], tools=tools, **options) == case["ids"]


@pytest.mark.parametrize("case", CASES["texts"], ids=lambda case: ascii(case["text"][:20]))
def test_text_is_encoded_and_decoded_as_transformers_does(case):
    assert TOKENIZER.encode(case["text"]) == case["ids"]
    assert TOKENIZER.decode(case["ids"]) == case["skipped"]
    assert TOKENIZER.decode(case["ids"], skip_special_tokens=False) == case["kept"]


def test_the_tokenizer_made_here_is_the_one_of_the_golden_files(folder):
    made = load_tokenizer(folder)
    for case in CASES["texts"]:
        assert made.encode(case["text"]) == case["ids"]
    assert made.vocab_size == TOKENIZER.vocab_size == small_tokenizer().get_vocab_size()


# Ids and text.


@hypothesis.given(st.text())
def test_text_comes_back_normalised(text):
    ids = TOKENIZER.encode(text)
    decoded = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert decoded == small_tokenizer_normalised(text)
    assert all(0 <= one < TOKENIZER.vocab_size for one in ids)


def small_tokenizer_normalised(text):
    return small_tokenizer().normalizer.normalize_str(text)


def test_ids_may_be_arrays_and_ids_without_a_token_are_nothing():
    ids = TOKENIZER.encode("Hello 你好")
    for given in (tuple(ids), iter(ids), np.array(ids), jnp.array(ids), [*ids, 10_000], list(map(np.int32, ids))):
        assert TOKENIZER.decode(given) == "Hello 你好"


@pytest.mark.parametrize("ids", [[[1, 2]], [1.5], ["a"], 3, None, np.zeros((2, 2), int), [-1], [2**32]], ids=repr)
def test_what_are_no_ids_is_refused(ids):
    with pytest.raises(InvalidTokens, match=r"expected (the )?token ids"):
        TOKENIZER.decode(ids)
    with pytest.raises(InvalidTokens, match=r"expected (the )?token ids"):
        TOKENIZER.decode_stream().add(ids)


@pytest.mark.parametrize("text", [None, 3, b"a", ["a"], "\ud800"], ids=repr)
def test_what_is_no_text_is_refused(text):
    with pytest.raises(InvalidText, match="expected text that UTF-8 can write, found"):
        TOKENIZER.encode(text)


def test_ids_of_single_tokens():
    assert TOKENIZER.decode([TOKENIZER.token_id("</think>")]) == "</think>"
    with pytest.raises(InvalidTokens, match=r"chat: no token 'nowhere' among 483\."):
        TOKENIZER.token_id("nowhere")


# Streams.


@hypothesis.given(st.lists(st.integers(0, TOKENIZER.vocab_size + 1)), st.booleans(), st.integers(1, 4))
def test_a_stream_returns_in_parts_what_decode_returns(ids, skip, step):
    stream = TOKENIZER.decode_stream(skip_special_tokens=skip)
    parts = [stream.add(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join(parts) + stream.flush() == TOKENIZER.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", ["a👩‍👩‍👧b", "你好文", "🇩🇪", "é", "<think>中</think>"])
def test_a_stream_holds_back_characters_that_are_split_over_tokens(text):
    stream, seen = TOKENIZER.decode_stream(), ""
    for one in TOKENIZER.encode(text):
        seen += stream.add([one])
        assert text.startswith(seen)
    assert seen == text
    assert stream.flush() == ""


def test_flush_gives_up_on_an_incomplete_character():
    stream = TOKENIZER.decode_stream()
    first, *_ = TOKENIZER.encode("👩")
    assert stream.add([first]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.add(TOKENIZER.encode("Hello")) == "Hello"


# Thinking.


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),
        ("Hm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),
        ("Hm.\n</think>\n\nYes.", True, ("Hm.", "Yes.")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("<think>\nHm", False, ("Hm", "")),
        ("Hm", True, ("Hm", "")),
        ("Yes.\n", False, ("", "Yes.\n")),
        ("One writes <think> so.", False, ("", "One writes <think> so.")),
        ("<think>a</think>It ends with </think>.", False, ("a", "It ends with </think>.")),
        ("", False, ("", "")),
    ],
)
def test_thinking_and_answer_are_split(text, opened, expected):
    assert Tokenizer.split_thinking(text, opened=opened) == expected


# What the files say.


def test_ids_are_those_of_the_generation_config_else_of_the_tokens(folder):
    end, text_end = TOKENIZER.token_id("<|im_end|>"), TOKENIZER.token_id("<|endoftext|>")
    loaded = load_tokenizer(folder)
    assert (loaded.eos_ids, loaded.pad_id) == ((end, text_end), text_end)
    change(folder / "generation_config.json", eos_token_id=text_end, pad_token_id=end)
    loaded = load_tokenizer(folder)
    assert (loaded.eos_ids, loaded.pad_id) == ((text_end,), end)
    (folder / "generation_config.json").unlink()
    loaded = load_tokenizer(folder)
    assert (loaded.eos_ids, loaded.pad_id) == ((end,), text_end)
    change(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    loaded = load_tokenizer(folder)
    assert (loaded.eos_ids, loaded.pad_id) == ((), None)


def test_tokenizer_json_alone_is_enough_for_text(folder):
    for path in folder.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    loaded = load_tokenizer(folder)
    assert loaded.encode("Hello") == TOKENIZER.encode("Hello")
    with pytest.raises(InvalidCheckpoint, match="expected a chat template, found none"):
        loaded.chat(USER)


def test_special_tokens_may_be_objects_and_in_the_older_files(folder):
    change(
        folder / "tokenizer_config.json", added_tokens_decoder=..., eos_token=..., pad_token=..., bos_token="<|im_end|>"
    )
    (folder / "generation_config.json").unlink()
    change(folder / "special_tokens_map.json", eos_token={"content": "<|im_end|>", "lstrip": False})
    size = TOKENIZER.vocab_size
    change(folder / "added_tokens.json", **{"<|im_end|>": TOKENIZER.token_id("<|im_end|>"), "<new>": size})
    loaded = load_tokenizer(folder)
    assert loaded.eos_ids == (TOKENIZER.token_id("<|im_end|>"),)
    assert loaded.encode("a<new>") == [*TOKENIZER.encode("a"), size]
    change(folder / "added_tokens.json", **{"<new>": size + 7})
    with pytest.raises(InvalidCheckpoint, match=rf"added_tokens.json: <new> is token {size + 7}, but .* it {size}"):
        load_tokenizer(folder)


def test_an_ordinary_token_that_is_named_becomes_a_special_one(folder):
    change(folder / "tokenizer_config.json", additional_special_tokens=["user"])
    loaded = load_tokenizer(folder)
    assert loaded.encode("xuser") == [*TOKENIZER.encode("x"), TOKENIZER.token_id("user")]
    assert loaded.decode(loaded.encode("xuser")) == "x"


def test_tokens_are_added_around_a_text_where_the_config_says_so(folder):
    ids, end = TOKENIZER.encode("Hello"), TOKENIZER.token_id("<|im_end|>")
    change(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=True, bos_token="<|endoftext|>")
    loaded = load_tokenizer(folder)
    assert loaded.encode("Hello") == [TOKENIZER.token_id("<|endoftext|>"), *ids, end]
    assert loaded.encode("Hello", add_special_tokens=False) == ids
    assert loaded.encode_chat(USER) == TOKENIZER.encode_chat(USER)
    change(folder / "tokenizer_config.json", bos_token=None)
    assert load_tokenizer(folder).encode("Hello") == [*ids, end]


def test_texts_are_neither_cut_nor_filled_up(folder):
    length = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    change(folder / "tokenizer.json", truncation=length, padding=padding)
    assert load_tokenizer(folder).encode("Hello world") == TOKENIZER.encode("Hello world")


def test_which_chat_template_counts(folder):
    change(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}],
    )
    loaded = load_tokenizer(folder)
    assert (loaded.chat(USER), loaded.chat(USER, tools=[])) == ("plain", "tools")
    change(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(InvalidCheckpoint, match="expected a chat template, found only rag"):
        load_tokenizer(folder).chat(USER)
    (folder / "chat_template.jinja").write_bytes(b"{% if true %}\r\nfrom a file {{ eos_token }}{% endif %}")
    assert load_tokenizer(folder).chat(USER) == "from a file <|im_end|>"


# Files that nobody vouches for.


def test_a_missing_tokenizer_says_what_to_do(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingFile, match=r"not vocab.json and merges.txt. Fetch it, or write it with transformers"):
        load_tokenizer(folder)
    with pytest.raises(MissingFile, match="neither a folder nor a name on the hub"):
        load_tokenizer(folder / "nowhere")


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[" * 100_000, b"\xff", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'],
    ids=lambda data: repr(data[:10]),
)
def test_a_tokenizer_that_cannot_be_read(folder, data):
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer.json: not readable as a tokenizer: .* Fetch it again"):
        load_tokenizer(folder)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(max_size=4),
)
def test_damaged_files_load_or_say_so(tmp_path, name, at, damage):
    shutil.copytree(CHAT, tmp_path, dirs_exist_ok=True)
    data = (tmp_path / name).read_bytes()
    start = int(at * len(data))
    (tmp_path / name).write_bytes(data[:start] + damage + data[start + len(damage) :])
    with contextlib.suppress(InvalidCheckpoint, UnsupportedConfig):
        load_tokenizer(tmp_path).encode_chat(USER)


def test_files_that_are_too_large_or_no_files(folder, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_TEMPLATE", 10)
    (folder / "chat_template.jinja").write_text("x" * 11)
    with pytest.raises(InvalidCheckpoint, match=r"chat_template.jinja: more than 0 MiB"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer_config.json: chat_template: more than 0 MiB"):
        load_tokenizer(folder)
    monkeypatch.setattr(files, "LARGEST", 10)
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer.json: more than 0 MiB"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer.json: this is no file"):
        load_tokenizer(folder)


def test_a_template_that_is_no_utf8(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InvalidCheckpoint, match=r"chat_template.jinja: not UTF-8"):
        load_tokenizer(folder)


def test_added_tokens_keep_the_ids_of_the_file(folder):
    given = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    given["added_tokens"][-1]["id"] += 3
    write_json(folder / "tokenizer.json", given)
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer.json: </think> is token 485, but .* makes it 482"):
        load_tokenizer(folder)


def test_a_tokenizer_that_is_not_byte_level(folder):
    change(folder / "tokenizer.json", decoder={"type": "Fuse"})
    with pytest.raises(UnsupportedConfig, match=r"tokenizer.json: decoder Fuse is not implemented"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token": 3}, "eos_token: expected a token's text, found 3"),
        ({"eos_token": {"content": None}}, "eos_token: expected a token's text"),
        ({"pad_token": "<none>"}, "<none> is no token of tokenizer.json"),
        ({"additional_special_tokens": "x"}, "additional_special_tokens: expected a list"),
        ({"additional_special_tokens": [1]}, "additional_special_tokens: expected a token's text"),
        ({"add_bos_token": "yes"}, "add_bos_token, add_eos_token: expected true or false, found 'yes'"),
        ({"added_tokens_decoder": [1]}, "added tokens: not readable"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added tokens: not readable"),
        ({"added_tokens_decoder": {"3": {"nothing": "a"}}}, "added tokens: not readable"),
        ({"added_tokens_decoder": {"3": {"content": "<think>"}}}, "<think> is token 3, but tokenizer.json makes it"),
        ({"chat_template": 3}, "chat_template: expected text, or a list of name and template, found 3"),
        ({"chat_template": [{"name": "default"}]}, "chat_template: expected text, or a list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_is_wrong(folder, fields, message):
    change(folder / "tokenizer_config.json", **fields)
    with pytest.raises(InvalidCheckpoint, match=message):
        load_tokenizer(folder)


# Templates.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", r"it: chat template, line 2: not readable as Jinja: Expected an expression"),
        ("{% include 'x' %}", r"line 1: TypeError: no loader"),
        ("\n\n{{ ''.__class__.__mro__ }}", r"line 3: it reaches for what no template needs: .*'__class__'"),
        ("{{ messages.append(1) }}", r"line 1: it reaches for what no template needs: .*append"),
        ("{{ namespace(__class__=1) }}", r"line 1: it reaches for what no template needs: '__class__' in a namespace"),
        ("{% set n = namespace() %}\n{% set n._x = 1 %}", r"line 2: it reaches for what no template needs: '_x'"),
        ("{{ ''.__class__.mro() }}", r"line 1: it reaches for what no template needs"),
        ("{{ cycler.__init__.__globals__ }}", r"line 1: it reaches for what no template needs"),
        ("\n{{ messages[0].nothing + 'a' }}", r"line 2: UndefinedError: .* has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", r"line 1: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", r"line 1: RecursionError"),
        ("{% for i in range(999999999) %}{% endfor %}", r"line 1: OverflowError: Range too big"),
        ("{{ open('/etc/passwd') }}", r"line 1: UndefinedError: 'open' is undefined"),
        ("(" * 3000 + "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", r"not readable as Jinja"),
    ],
    ids=lambda value: value[:40],
)
def test_a_template_that_is_wrong(source, message):
    with pytest.raises(InvalidCheckpoint, match=message):
        templated(source).render(USER)


def test_a_template_may_refuse_messages():
    with pytest.raises(InvalidText, match=r"it: chat template, line 2: it refuses these messages: roles alternate\."):
        templated("\n{{ raise_exception('roles alternate') }}").render(USER)


def test_a_template_writes_no_endless_prompt(monkeypatch):
    monkeypatch.setattr(chat_template, "_LONGEST_PROMPT", 1000)
    with pytest.raises(InvalidCheckpoint, match="chat template: OverflowError: it writes more than 1000 characters"):
        templated("{% for i in range(99999) %}x{% endfor %}").render(USER)


def test_loading_runs_nothing_of_a_template(folder):
    (folder / "chat_template.jinja").write_text("{% wrong")
    loaded = load_tokenizer(folder)
    with pytest.raises(InvalidCheckpoint, match=r"chat_template.jinja: chat template, line 1: not readable as Jinja"):
        loaded.chat(USER)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ x | tojson }}", '{"b": "<é>\'", "a": [1]}'),
        ("{{ x | tojson(ensure_ascii=true, sort_keys=true, indent=1) }}",
         '{\n "a": [\n  1\n ],\n "b": "<\\u00e9>\'"\n}'),
        ("{{ x | tojson(separators=(',', ':')) }}", '{"b":"<é>\'","a":[1]}'),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hello!"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}", "0"),
        ("{% for i in 'ab' %}{% if i == 'a' %}{% continue %}{% endif %}{{ i }}{% endfor %}", "b"),
        ("{% set n = namespace(self=1, a=2) %}{% set n.a = n.a + n.self %}{{ n.a }}", "3"),
        ("{{ '{0.__class__}'.format(1) }}", ""),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ dict(a=1).a }}{{ '<b>' }}{{ missing }}", "1<b>"),
        ("{{ documents is none }} {{ tools is none }} {{ enable_thinking is defined }}", "True True False"),
        ("{{ messages[0] }}", "{'role': 'user', 'content': 'Hello'}"),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_what_templates_can_use(source, expected):
    variables = {"x": {"b": "<é>'", "a": (1,)}}
    messages = [{**USER[0], "tool_calls": None}]
    assert templated(source).render(messages, variables=variables) == expected


class Text(str):
    def __getattr__(self, name):
        raise AssertionError(name)


def test_a_template_sees_plain_copies_only():
    seen = {}
    template = templated("{{ seen(messages) }}")
    chat_template._environment().globals["seen"] = lambda messages: seen.update(messages[0]) or ""
    message = {"role": Text("user"), "content": "", "n": np.float64(-0.0), "b": True}
    try:
        template.render([message])
    finally:
        del chat_template._environment().globals["seen"]
    assert {name: type(value) for name, value in seen.items()} == {"role": str, "content": str, "n": float, "b": bool}


LOOP: list = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", r"messages: expected a list of mappings, found 'Hello'"),
        ([], r"messages: expected at least one"),
        (["Hello"], r"messages\[0\]: expected a mapping, found 'Hello'"),
        ([{"content": "a"}], r"messages\[0\]: role: expected text, such as 'user', found None"),
        ([*USER, {"role": 3, "content": "a"}], r"messages\[1\]: role: expected text"),
        ([{"role": "user"}], r"messages\[0\]: content: expected text, found None"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"messages\[0\]: content: expected text, f"),
        ([{"role": "user", "content": "a", "image": object()}], r"messages\[0\].image: expected text, numbers, lists"),
        ([{"role": "user", "content": "a", 1: 2}], r"messages\[0\]: expected keys that are text, found 1"),
        ([{"role": "user", "content": "a", "b": LOOP}], r"more than 100 levels of lists and mappings"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_messages_of_another_shape_are_refused(messages, message):
    with pytest.raises(InvalidText, match=message):
        TOKENIZER.chat(messages)


def test_tools_and_variables_are_plain_data():
    with pytest.raises(InvalidText, match=r"tools\[0\]: expected a mapping, found <built-in function print>"):
        TOKENIZER.chat(USER, tools=[print])
    with pytest.raises(InvalidText, match=r"variables.a: expected text, numbers"):
        TOKENIZER.chat(USER, a=object())


def test_a_message_is_continued_only_where_the_template_shows_it():
    with pytest.raises(InvalidText, match="it does not render all of the last message"):
        templated("{{ messages[-1].content[:3] }}").render(USER, continue_final_message=True)
    with pytest.raises(InvalidText, match="the last one has no content to continue"):
        templated("").render([{"role": "assistant", "tool_calls": [{}]}], continue_final_message=True)
    given = [{"role": "user", "content": "Hello "}]
    assert templated("<{{ messages[-1].content | trim }}>").render(given, continue_final_message=True) == "<Hello"
    assert templated("<{{ messages[-1].content }}>").render(given, continue_final_message=True) == "<Hello "
    assert given == [{"role": "user", "content": "Hello "}]
