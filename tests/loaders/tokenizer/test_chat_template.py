"""Chat templates: what templates can use, what they cannot, and the errors for bad templates and messages."""

import numpy as np
import pytest
from checkpoints import GOLDEN

from perparam.loaders.tokenizer import chat_template, load_tokenizer
from perparam.policies.errors import InvalidCheckpoint, InvalidText, UnsupportedConfig

TOKENIZER = load_tokenizer(GOLDEN / "chat")
USER = [{"role": "user", "content": "Hello"}]


def templated(source, **variables):
    return chat_template.ChatTemplate(source, "it", variables)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", r"it: chat template, line 2: not readable as Jinja: Expected an expression"),
        ("\n\n{{ ''.__class__.__mro__ }}", r"line 3: the template is not safe: str.__class__ is not available"),
        ("{{ ''.__class__.mro() }}", r"line 1: the template is not safe: str.__class__"),
        ("{{ cycler.__init__.__globals__ }}", r"line 1: the template is not safe: Function.__init__"),
        ("{{ raise_exception.__globals__.x }}", r"line 1: the template is not safe: Function.__globals__"),
        ("\n{{ messages[0].nothing + 'a' }}", r"line 2: UndefinedError: .* has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", r"line 1: ZeroDivisionError"),
        ("{{ 'a' + 1 }}", r"line 1: TypeError: cannot compute str \+ int"),
        ("{{ 1('a') }}", r"int is not callable"),
        ("{% macro f(a) %}{% endmacro %}{{ f(1, b=2) }}", r"TypeError: macro 'f' takes the arguments a, found 'b'"),
        ("{% set n = 1 %}{% set n.a = 2 %}", r"cannot assign attribute on non-namespace object"),
        ("{% for a, b in [(1, 2, 3)] %}{% endfor %}", r"ValueError: expected 2 values to unpack, found 3"),
        ("{% break %}", r"break or continue outside of a loop"),
        ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", r"line 1: RecursionError"),
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


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{% include 'x' %}", "the statement 'include'"),
        ("{% for a in [] recursive %}{% endfor %}", "the statement 'for … recursive'"),
        ("{{ 10 ** (10 ** 8) }}", r"the operator '\*\*'"),
        ("{{ [1] | slice(10 * 99999) | list }}", "the filter 'slice'"),
        ("{{ messages | map('pprint') }}", "the filter 'pprint'"),
        ("{{ 1 is filter }}", "the test 'filter'"),
        ("{{ messages.append(1) }}", "the attribute 'list.append"),
        ("{{ '{0.__class__}'.format(1) }}", "the attribute 'str.format"),
        ("{{ dict.fromkeys is defined }}", "the attribute 'Function.fromkeys"),
        ("{{ messages[0].copy is defined }}", "the attribute 'dict.copy"),
        ("{{ messages[0]['pop'] }}", "the attribute 'dict.pop"),
        ("{{ lipsum is defined }}", "the variable 'lipsum'"),
        ("{% macro f() %}{{ varargs }}{% endmacro %}{{ f() }}", "the variable 'varargs'"),
        ("{% macro f() %}{% endmacro %}{{ f.catch_kwargs }}", "the attribute 'Function.catch_kwargs"),
        ("{{ [range] }}", "the text of 'range'"),
        ("{{ namespace() }}", "the text of 'namespace'"),
        ("{{ [1] | unique(key=1) }}", "the filter .unique .got an unexpected keyword argument .*key"),
        ("{{ 4 is divisibleby(num=2) }}", "the test 'divisibleby"),
        ("{{ '%*d' % (99999999, 1) }}", "the format '%.d'"),
        ("{{ '%999999999s' % q }}", "the format '%999999999s'"),
        ("{{ dict(**messages[0]) }}", "the operator .* before an argument"),
    ],
    ids=lambda value: value[:40],
)
def test_the_parts_of_jinja_that_no_published_template_uses_are_refused_by_name(source, what):
    with pytest.raises(
        UnsupportedConfig, match=rf"it: chat template, line 1: {what}.* is not available to templates: "
    ):
        templated(source).render(USER)


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
        ("{{ ''.__class__ }}", ""),
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


def test_a_template_sees_plain_copies_only(monkeypatch):
    seen = {}
    message = {"role": Text("user"), "content": "", "n": np.float64(-0.0), "b": True}
    monkeypatch.setattr(
        chat_template.Interpreter, "render", lambda _, tree, given: seen.update(given["messages"][0]) or ""
    )
    templated("").render([message])
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
