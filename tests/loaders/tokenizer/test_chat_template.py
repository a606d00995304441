"""Chat templates: what templates may use, what the sandbox forbids, and the errors for bad templates and messages."""

import numpy as np
import pytest
from checkpoints import GOLDEN

from perparam.loaders.tokenizer import chat_template, load_tokenizer
from perparam.policies.errors import InvalidCheckpoint, InvalidText

TOKENIZER = load_tokenizer(GOLDEN / "chat")
USER = [{"role": "user", "content": "Hello"}]


def templated(source, **variables):
    return chat_template.ChatTemplate(source, "it", variables)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", r"it: chat template, line 2: not readable as Jinja: Expected an expression"),
        ("{% include 'x' %}", r"line 1: TypeError: no loader"),
        ("\n\n{{ ''.__class__.__mro__ }}", r"line 3: the sandbox forbids what the template does: .*'__class__'"),
        ("{{ messages.append(1) }}", r"line 1: the sandbox forbids what the template does: .*append"),
        (
            "{{ namespace(__class__=1) }}",
            r"line 1: the sandbox forbids what the template does: '__class__' in a namespace",
        ),
        ("{% set n = namespace() %}\n{% set n._x = 1 %}", r"line 2: the sandbox forbids what the template does: '_x'"),
        ("{{ ''.__class__.mro() }}", r"line 1: the sandbox forbids what the template does"),
        ("{{ cycler.__init__.__globals__ }}", r"line 1: the sandbox forbids what the template does"),
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
    with pytest.raises(
        InvalidText, match=r"it: chat template, line 2: the template rejects these messages: roles alternate\."
    ):
        templated("\n{{ raise_exception('roles alternate') }}").render(USER)


def test_a_template_writes_no_endless_prompt(monkeypatch):
    monkeypatch.setattr(chat_template, "_LONGEST_PROMPT", 1000)
    with pytest.raises(
        InvalidCheckpoint, match="chat template: OverflowError: the prompt has more than 1000 characters"
    ):
        templated("{% for i in range(99999) %}x{% endfor %}").render(USER)


def test_loading_runs_nothing_of_a_template(folder):
    (folder / "chat_template.jinja").write_text("{% wrong")
    loaded = load_tokenizer(folder)
    with pytest.raises(InvalidCheckpoint, match=r"chat_template.jinja: chat template, line 1: not readable as Jinja"):
        loaded.apply_chat_template(USER)


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
        ([{"content": "a"}], r"messages\[0\]: role: expected a string, such as 'user', found None"),
        ([*USER, {"role": 3, "content": "a"}], r"messages\[1\]: role: expected a string"),
        ([{"role": "user"}], r"messages\[0\]: content: expected a string, found None"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"messages\[0\]: content: expected a string"),
        (
            [{"role": "user", "content": "a", "image": object()}],
            r"messages\[0\].image: expected strings, numbers, lists",
        ),
        ([{"role": "user", "content": "a", 1: 2}], r"messages\[0\]: expected strings as keys, found 1"),
        ([{"role": "user", "content": "a", "b": LOOP}], r"expected at most 100 nested lists and mappings"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_messages_of_another_shape_are_refused(messages, message):
    with pytest.raises(InvalidText, match=message):
        TOKENIZER.apply_chat_template(messages)


def test_tools_and_variables_are_plain_data():
    with pytest.raises(InvalidText, match=r"tools\[0\]: expected a mapping, found <built-in function print>"):
        TOKENIZER.apply_chat_template(USER, tools=[print])
    with pytest.raises(InvalidText, match=r"variables.a: expected strings, numbers"):
        TOKENIZER.apply_chat_template(USER, a=object())


def test_a_message_is_continued_only_where_the_template_shows_it():
    with pytest.raises(InvalidText, match="it omits part of the last message, so"):
        templated("{{ messages[-1].content[:3] }}").render(USER, continue_final_message=True)
    with pytest.raises(InvalidText, match="expected a last message with content, found none"):
        templated("").render([{"role": "assistant", "tool_calls": [{}]}], continue_final_message=True)
    given = [{"role": "user", "content": "Hello "}]
    assert templated("<{{ messages[-1].content | trim }}>").render(given, continue_final_message=True) == "<Hello"
    assert templated("<{{ messages[-1].content }}>").render(given, continue_final_message=True) == "<Hello "
    assert given == [{"role": "user", "content": "Hello "}]
