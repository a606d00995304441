"""The interpreter of chat templates: it renders what jinja2 renders, and no template exceeds its budget."""

import time

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perparam.loaders.tokenizer import chat_template, template_budget
from perparam.loaders.tokenizer.chat_template import ChatTemplate
from perparam.policies.errors import InvalidCheckpoint

USER = [{"role": "user", "content": "Hello"}]
VALUES = {
    "s": " a<b>&'x' B\n", "e": "", "n": 3, "z": 0, "f": 1.5, "t": True, "none_": None, "l": [3, "b", 1, "B"],
    "d": {"b": 1, "A": [1, 2], "items": "an entry"}, "m": [{"r": "u", "c": "x"}, {"r": "a", "c": "y", "k": {"v": 2}}],
}  # fmt: skip


def rendered_by_jinja(source):
    """What jinja2's own sandbox renders, with the filter and the tag that transformers adds."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[chat_template._Generation, "jinja2.ext.loopcontrols"]
    )
    return environment.from_string(source).render(VALUES)


def rendered(source):
    return ChatTemplate(source, "it", VALUES).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = 1 %}{% for i in l %}{% set x = i %}{{ x }}{% endfor %}{{ x }}",
        "{% for i in l %}{{ x }}{% set x = i %}{{ x }}{% endfor %}",
        "{% if t %}{% set x = 1 %}{% endif %}{{ x }}{% if z %}{% set y = 1 %}{% endif %}{{ y }}",
        "{% macro f(a, b=a) %}{{ a }}{{ b }}{{ x }}{% endmacro %}{% set x = 5 %}{{ f(1) }}{{ f(1, 2) }}"
        "{{ f(b=3) }}{{ f() }}",
        "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
        "{% macro f() %}<{{ caller(2) }}>{% endmacro %}{% call(v) f() %}{{ v }}{{ s }}{% endcall %}",
        "{% for i in l %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.revindex }}{{ loop.length }}"
        "{% endfor %}",
        "{% for i in l %}{{ loop.previtem }}-{{ loop.nextitem }}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{% for i in l if i is string %}{{ loop.length }}{{ i }}{% else %}none{% endfor %}{% for i in [] %}"
        "{% else %}e{% endfor %}",
        "{% for a in l %}{% for b in m %}{{ loop.index }}{% endfor %}{{ loop.index }}{% endfor %}",
        "{% set ns = namespace(go=true) %}{% for i in l if ns.go %}{{ i }}{% set ns.go = false %}{% endfor %}",
        "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in d | dictsort %}{{ k }}{% endfor %}",
        "{% for i in l %}{% if i == 'b' %}{% continue %}{% endif %}{{ i }}{% if i == 1 %}{% break %}{% endif %}"
        "{% endfor %}",
        "{% set x %}a{{ s }}{% endset %}{{ x | length }}{% set x | upper %}a{% endset %}{{ x }}",
        "{% with a = n, b = s %}{{ a }}{{ b }}{% endwith %}{{ a }}{% filter upper %}{{ s }}{% endfilter %}",
        "{% filter trim | upper | replace('A', s) | trim %} a {% endfilter %}",
        "{% set x | trim | upper | length %} a {% endset %}{{ x }}",
        "{% macro f() %}{{ caller is defined }}{{ g() }}{% endmacro %}{% macro g() %}{{ caller is defined }}"
        "{% endmacro %}{% call f() %}{% endcall %}{{ f.name }}{{ f.arguments }}{{ f['name'] }}{{ f.q }}",
        "{% set ns = namespace(a=1) %}{{ ns['a'] }}{{ ns.b }}{{ ns['b'] }}{{ ns[0] }}",
        "{% set ns = namespace(a=1) %}{{ [ns] | map(attribute='a') | join }}",
        "{% for i in l %}{{ loop['index'] }}{{ loop['last'] }}{{ loop.changed(i is string) }}{{ loop[0] }}{% endfor %}",
        "{% set a, b = [1, 2] %}{{ a }}{{ b }}{% generation %}{% set a = 3 %}{{ a }}{% endgeneration %}{{ a }}",
        "{{ d['items'] }}{{ d.values is defined }}",
        "{{ d.b }}{{ d['A'][-1] }}{{ m[1].k.v }}{{ l[9] }}{{ d.get('q', 7) }}{{ d.get('q') }}{{ 'b' in d }}",
        "{{ l[::-1] }}{{ l['x'] }}{{ l[true] }}{{ l[1.0] }}{{ 'abc'['upper']() }}{{ d[true] }}{{ d['q'] }}{{ n.q }}",
        "{{ d.items() }}{{ d.keys() }}{{ d.values() }}{{ d.items()[0] is defined }}{{ d.keys() | list }}",
        "{{ 'b' in d.keys() }}",
        "{{ d.items() is sequence }}{{ d.items() | length }}{{ 1 in d.values() }}{{ d | items | list }}",
        "{{ joiner is defined }}{% set j = joiner('|') %}{{ j() }}{{ j() }}{% set c = cycler(1, 2) %}{{ c.next() }}"
        "{{ c.current }}{{ c['next']() }}{{ c.reset() }}{{ c.next() }}",
        "{{ q | default(default_value='q') }}{{ 'xax' | trim(chars='x') }}{{ m | unique(attribute='r') | list }}",
        "{{ [1, 2.5] | sum }}{{ m | sum('q.w') if z }}{{ ['b', 'A'] | max }}{{ ['b', 'A'] | min }}{{ [] | max }}",
        "{{ m | max(attribute='c') }}{{ ['b', 'A'] | min(case_sensitive=true) }}{{ s | e }}{{ s | escape }}{{ n | e }}",
        "{{ '%s-%5.1f%%' % ('a', f) }}{{ '%s' % s }}{{ '%03d' | format(n) }}{{ '%(a)s' | format(a=s) }}{{ '%s' % q }}",
        "{{ ('%s' | safe) % s }}{{ '%(b)s' % d }}{{ [e] | map('default', 'x', boolean=true) | list }}",
        "{{ s[1:3] }}{{ l[:-1] }}{{ l[:e | length] }}{{ s.strip() }}{{ s.split() }}{{ s.split('<', 1) }}",
        "{{ s.startswith(' a') }}",
        "{{ 7 // 2 }}{{ 7 % 4 }}{{ 7 / 2 }}{{ -n }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ 1 < n <= 3 }}{{ n is odd }}",
        "{{ 1 ~ 'a' ~ none }}",
        "{{ (s | safe) + '<' }}{{ '<' + (s | safe) }}{{ s | safe ~ '<' }}{{ [s | safe] }}",
        "{{ (s | safe).strip() + '&' }}",
        "{{ m | map(attribute='r') | join('&') }}{{ m | selectattr('k', 'defined') | list }}",
        "{{ l | select('string') | list }}",
        "{{ m | rejectattr('r', 'equalto', 'u') | list }}{{ l | reject('in', [1, 3]) | list }}",
        "{{ [e, s] | select | list }}",
        "{{ l | map('string') | sort }}{{ m | sort(attribute='c', reverse=true) }}",
        "{{ ['a', 'A', 'b'] | unique | list }}",
        "{{ s | indent(2, true) }}{{ s | replace('a', '<') }}{{ s | trim }}{{ s | title }}{{ s | capitalize }}",
        "{{ s | upper | lower }}",
        "{{ '12' | int + 1 }}{{ 'x' | int(7) }}{{ '1.5' | float }}{{ f | round }}{{ l | first }}{{ l | last }}",
        "{{ s | reverse }}{{ l | reverse | list }}",
        "{{ q | default('d') }}{{ e | default('d', true) }}{{ none_ | default('d') }}{{ q is defined }}",
        "{{ q | length }}{{ q | trim }}",
        "{{ q is none }}{{ none_ is none }}{{ l is iterable }}{{ d is mapping }}{{ l is sequence }}",
        "{{ t is boolean }}{{ n is sameas 3 }}{{ range is callable }}",
        "{{ range(3) | list }}{{ range(9, 1, -3) | list }}{{ dict(a=1, b=2) }}{{ (1, 2) }}{{ {'a': s} }}",
        "{{ 'x' if z }}{{ z and q.w or n }}",
        "  {% if t -%}\n  a  {%- endif %}\n\n{#- c #} b \n",
    ],
)  # fmt: skip
def test_what_published_templates_use_is_rendered_as_by_jinja(source):
    assert rendered(source) == rendered_by_jinja(source)


NAMES = st.sampled_from([*VALUES, "q", "x"])
LEAVES = NAMES | st.sampled_from(["1", "'a'", "' b '", "[1, 'x']", "{'a': 2}", "none", "true", "-1", "''"])
ATTRIBUTES = st.sampled_from("b c items() keys() strip() get('b') split('a') lstrip('ab')".split())
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([*"+ - * / % ~ == != < in and or".split(), "not in"]), inner).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        st.tuples(inner, st.sampled_from("trim length string upper first last list default safe int join".split())).map(
            lambda parts: f"({parts[0]} | {parts[1]})"
        ),
        st.tuples(inner, st.sampled_from("defined string mapping iterable none true false number".split())).map(
            lambda parts: f"({parts[0]} is {parts[1]})"
        ),
        st.tuples(
            inner, st.sampled_from(["b", "c", "items()", "keys()", "strip()", "get('b')", "split('a')", "lstrip('a ')"])
        ).map(lambda parts: f"({parts[0]}).{parts[1]}"),
        st.tuples(inner, inner).map(lambda parts: f"({parts[0]})[{parts[1]}]"),
        st.tuples(inner, inner, inner).map(lambda parts: f"({parts[0]} if {parts[1]} else {parts[2]})"),
    ),
    max_leaves=5,
)
CHAINS = st.lists(st.sampled_from("trim upper length first string e".split()), max_size=3).map(
    lambda names: "".join(f" | {name}" for name in names)
)
STATEMENTS = st.recursive(
    EXPRESSIONS.map(lambda one: f"{{{{ {one} }}}}") | EXPRESSIONS.map(lambda one: f"{{% set x = {one} %}}"),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(EXPRESSIONS, inner, inner).map(lambda p: f"{{% if {p[0]} %}}{p[1]}{{% else %}}{p[2]}{{% endif %}}"),
        st.tuples(EXPRESSIONS, inner).map(lambda p: f"{{% for x in {p[0]} %}}{{{{ loop.index }}}}{p[1]}{{% endfor %}}"),
        st.tuples(inner, EXPRESSIONS).map(lambda p: f"{{% macro g(x) %}}{p[0]}{{% endmacro %}}{{{{ g({p[1]}) }}}}"),
        st.tuples(CHAINS, inner).map(lambda p: f"{{% set y{p[0]} %}}{p[1]}{{% endset %}}{{{{ y }}}}"),
        st.tuples(CHAINS, inner).map(lambda p: f"{{% filter string{p[0]} %}}{p[1]}{{% endfilter %}}"),
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(source=STATEMENTS)
def test_any_template_is_rendered_as_by_jinja_or_fails_as_there(source):
    try:
        expected = rendered_by_jinja(source)
    except Exception:
        with pytest.raises(InvalidCheckpoint):
            rendered(source)
        return
    if "<generator" not in expected:
        assert rendered(source) == expected


GROWING = "{% set ns = namespace(x=START) %}{% for i in range(9999) %}{% set ns.x = TURN %}{% endfor %}{{ ns.x USE }}"
"""Doubles a value again and again, and prints it."""


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) if a < 0 %}{% endfor %}" * 9,
        "{% for i in range(999999999) %}{% endfor %}",
        "{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}",
        "{{ 'a' * 2000000000 }}",
        "{{ [1] * 2000000000 }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ [1] | tojson(separators=('a' * 9999, 'b')) }}",
        "{{ 'a' | indent(1000000000, true) }}",
        "{{ ('a' * 999999).replace('a', 'a' * 999) }}",
        "{{ ('a' * 999999) | list | join('b' * 999) }}",
        "{{ ('a ' * 999999).split() }}",
        "{{ ('a' * 999999).strip('b' * 999999 ~ 'a') }}",
        "{% set x = 'a' * 999999 %}{% for i in range(99999) %}{{ 'b' in x }}{% endfor %}",
        "{% set x = ['a'] * 99999 %}{% for i in range(99999) %}{{ 'b' in x }}{% endfor %}",
        "{% set x = ['a'] * 99999 %}{% for i in range(99999) %}{{ x == x }}{% endfor %}",
        "{{ 9223372036854775807 * 9223372036854775807 }}",
        "{{ strftime_now('%9999d' * 999) }}",
        GROWING.replace("START", "'ab'").replace("TURN", "ns.x ~ ns.x").replace("USE", ""),
        GROWING.replace("START", "'ab'").replace("TURN", "ns.x + ns.x").replace("USE", ""),
        "{% set x = 'a' * 999999 %}{% for i in range(9999) %}{{ (x + 'b') is none }}{% endfor %}",
        "{% set ns = namespace(s='a' * 999999, l=[]) %}{% for i in range(999) %}{% set ns.s = ns.s + 'b' %}"
        "{% set ns.l = ns.l + [ns.s] %}{% endfor %}",
        "{{ '%99d' * 99999 % 1 }}",
        GROWING.replace("START", "'<' | safe").replace("TURN", "ns.x + '<'").replace("USE", "+ ns.x * 99999"),
        GROWING.replace("START", "1").replace("TURN", "[ns.x, ns.x]").replace("USE", ""),
        GROWING.replace("START", "1").replace("TURN", "[ns.x, ns.x]").replace("USE", "| tojson"),
        GROWING.replace("START", "1").replace("TURN", "(ns.x, ns.x)").replace("USE", "== (ns.x, 1)"),
        GROWING.replace("START", "1").replace("TURN", "{'a': ns.x, 'b': ns.x}").replace("USE", "in [1, ns.x]"),
        GROWING.replace("START", "[1]").replace("TURN", "ns.x + ns.x").replace("USE", "| sort"),
    ],
    ids=lambda source: source[:60],
)
def test_a_template_that_would_take_minutes_or_gigabytes_is_refused(source, monkeypatch):
    monkeypatch.setattr(template_budget, "STEPS", 30_000)  # a tenth of a second
    with pytest.raises(
        InvalidCheckpoint, match=r"it: chat template, line 1: the template is too expensive to render: "
    ):
        ChatTemplate(source, "it").render(USER)


def test_nested_loops_end_within_two_seconds():
    begin = time.process_time()
    with pytest.raises(InvalidCheckpoint, match="it runs for too long"):
        ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it").render(
            USER
        )
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("turn", ["ns.s + m.content", "ns.s ~ m.content ~ '\n'"])
def test_a_loop_may_append_each_message_to_a_text(turn):
    loop = f"{{% for m in messages %}}{{% set ns.s = {turn} %}}{{% endfor %}}"
    source = "{% set ns = namespace(s='') %}" + loop + "{{ ns.s }}"
    begin = time.process_time()
    assert len(ChatTemplate(source, "it").render([{"role": "user", "content": "a" * 500}] * 2000)) >= 1_000_000
    assert time.process_time() - begin < 2


def test_a_longer_chat_may_take_more_steps_and_characters():
    source = "{% for m in messages %}" + "{{ m.content }}" * 20 + "{% endfor %}"
    messages = [{"role": "user", "content": "a" * 10_000}] * 100
    assert len(ChatTemplate(source, "it").render(messages)) == 20 * 1_000_000 > template_budget.CHARACTERS
