"""Chat templates made to cost time or memory, to leave the interpreter, or only to be a little wrong."""

from __future__ import annotations

import random
from collections.abc import Callable

from jinja2 import filters
from jinja2.tests import TESTS

from .in_bytes import in_another_encoding, mutate_bytes, random_count
from .in_json import random_depth
from .inputs import TEMPLATE, Input, something_else
from .tokenizers import sound_tokenizer

_METHODS = [
    *dir(str),
    *dir(list),
    *dir(dict),
    "gi_frame",
    "f_globals",
    "mro",
    "func_globals",
    "im_func",
    "values",
    "_x",
]
_NAMES = (
    "messages tools add_generation_prompt eos_token bos_token x y ns loop f namespace range dict cycler joiner lipsum "
    "raise_exception strftime_now self caller varargs kwargs true false none missing"
).split()
_OPERATORS = [*"+ - * / // % ** ~ == != < > <= >= in and or".split(), "not in"]


def _number(rng: random.Random) -> str:
    return rng.choice(["0", "1", "2", "-1", "3", "99999", "100001", "10**9", str(10**18), "1e308", "0.5", "9" * 400])


def _literal(rng: random.Random) -> str:
    return rng.choice(
        ["'a'", "''", "' '", "'<b>&'", "'a b c'", "'\\x00'", "'😀é'", "[1, 2]", "[]", "{}", "{'a': 1}", "(1, 2)",
         _number(rng),
         "'%1000000000d'", "'{0.__class__}'", "'{:>1000000000}'", "'" + "a" * random_count(rng, 5000) + "'"]
    )  # fmt: skip


def _call(rng: random.Random, depth: int) -> str:
    arguments = [_expression(rng, depth) for _ in range(rng.choice([0, 0, 1, 1, 2, 3]))]
    if rng.random() < 0.2:
        key = rng.choice(
            ["indent", "width", "attribute", "default", "a", "reverse", "separators", "sort_keys", "count"]
        )
        arguments.append(f"{key}={_expression(rng, depth)}")
    return ", ".join(arguments)


def _expression(rng: random.Random, depth: int = 3) -> str:
    """A random expression, of anything that Jinja knows."""
    if depth <= 0 or rng.random() < 0.25:
        return rng.choice([rng.choice(_NAMES), rng.choice(_NAMES), _literal(rng)])
    inner = lambda: _expression(rng, depth - 1)  # noqa: E731
    return rng.choice([
        lambda: f"{inner()} {rng.choice(_OPERATORS)} {inner()}",
        lambda: f"({inner()} {rng.choice(_OPERATORS)} {inner()})",
        lambda: f"({inner()})|{rng.choice(sorted(filters.FILTERS))}" + rng.choice(["", f"({_call(rng, depth - 1)})"]),
        lambda: f"({inner()}) is {rng.choice(sorted(name for name in TESTS if name.isalpha()))}",
        lambda: f"({inner()}).{rng.choice(_METHODS)}" + rng.choice(["", f"({_call(rng, depth - 1)})"]),
        lambda: f"({inner()})[{inner()}]",
        lambda: f"({inner()})[{inner()}:{inner()}]",
        lambda: f"({inner()})[::{rng.choice(['-1', '2', '0'])}]",
        lambda: f"{rng.choice(_NAMES)}({_call(rng, depth - 1)})",
        lambda: f"({inner()} if {inner()} else {inner()})",
        lambda: f"[{inner()}, {inner()}]",
        lambda: f"{{'a': {inner()}, {inner()}: {inner()}}}",
        lambda: f"namespace(a={inner()})",
        lambda: f"not {inner()}",
    ])()  # fmt: skip


def _statement(rng: random.Random, depth: int = 3) -> str:
    """A random statement, with others inside."""
    inner = lambda: "".join(_statement(rng, depth - 1) for _ in range(rng.choice([0, 1, 2])))  # noqa: E731
    one = lambda: _expression(rng)  # noqa: E731
    if depth <= 0:
        return f"{{{{ {one()} }}}}"
    return rng.choice([
        lambda: f"{{{{ {one()} }}}}",
        lambda: f"{{{{ {one()} }}}}",
        lambda: rng.choice(["text\n", " ", "<|im_start|>"]),
        lambda: f"{{% set {rng.choice(['x', 'y', 'ns', 'messages'])} = {one()} %}}",
        lambda: f"{{% set ns = namespace(a={one()}) %}}",
        lambda: f"{{% set ns.a = {one()} %}}",
        lambda: f"{{% set x %}}{inner()}{{% endset %}}",
        lambda: f"{{% if {one()} %}}{inner()}{{% elif {one()} %}}{inner()}{{% else %}}{inner()}{{% endif %}}",
        lambda: f"{{% for x in {one()} %}}{inner()}{{% else %}}{inner()}{{% endfor %}}",
        lambda: f"{{% for x in range({rng.choice(['3', '1000', '99999', '100001'])}) %}}{inner()}{{% endfor %}}",
        lambda: f"{{% for x, y in {one()} if {one()} %}}{inner()}{{% endfor %}}",
        lambda: f"{{% for m in messages %}}{inner()}{{{{ m.content }}}}"
                + rng.choice(["", "{% break %}", "{% continue %}"]) + "{% endfor %}",
        lambda: f"{{% macro f(x, y={one()}) %}}{inner()}{{% endmacro %}}{{{{ f({_call(rng, 1)}) }}}}",
        lambda: f"{{% macro f(x) %}}{{{{ f(x) }}}}{inner()}{{% endmacro %}}{{{{ f(1) }}}}",
        lambda: f"{{% call f(1) %}}{inner()}{{% endcall %}}",
        lambda: f"{{% filter {rng.choice(sorted(filters.FILTERS))} %}}{inner()}{{% endfilter %}}",
        lambda: f"{{% with x = {one()} %}}{inner()}{{% endwith %}}",
        lambda: f"{{% generation %}}{inner()}{{% endgeneration %}}",
        lambda: f"{{% {rng.choice(['include', 'import', 'extends'])} {one()} %}}",
        lambda: f"{{% block a %}}{inner()}{{% endblock %}}",
        lambda: f"{{# {inner()} #}}",
        lambda: f"{{% raw %}}{inner()}{{% endraw %}}",
    ])()  # fmt: skip


_GROWING = (
    "ns.a ~ ns.a", "ns.a + ns.a", "[ns.a, ns.a]", "(ns.a, ns.a)", "{'a': ns.a, 'b': ns.a}", "[ns.a]", "ns.a * 2",
    "ns.a|list",     "ns.a|string", "ns.a|tojson", "ns.a|replace('a', 'aaaaaaaa')", "ns.a|join(ns.a)", "ns.a|indent(9)",
    "ns.a.split('')",     "ns.a|safe + '<'", "ns.a|urlize", "ns.a.upper()", "ns.a.replace('a', ns.a)",
    "ns.a == [ns.a]", "ns.a in [ns.a]",
    "ns.a|map('string')|list", "ns.a|sort", "ns.a|unique", "dict(a=ns.a)", "namespace(a=ns.a)", "f", "ns.a|dictsort",
)  # fmt: skip


def _bomb(rng: random.Random) -> str:
    """A template that doubles a value, nests loops or macros, or parses slowly."""
    start = rng.choice(["'ab'", "[1, 1]", "{}", "()", "1", "'<&'", "messages", "range(9)"])
    turns = rng.choice([30, 64, 1000, 99_999])
    growing, depth, count = rng.choice(_GROWING), random_depth(rng), random_count(rng)
    use = rng.choice(
        ["ns.a", "ns.a|tojson", "ns.a|string|length", "ns.a == ns.a", "ns.a in [ns.a]", "ns.a|length", "'x'"]
    )
    return rng.choice([
        lambda: f"{{% set ns = namespace(a={start}) %}}{{% macro f() %}}{{% endmacro %}}{{% for i in range({turns}) %}}"
                f"{{% set ns.a = {growing} %}}{{% endfor %}}{{{{ {use} }}}}",
        lambda: f"{{% set ns = namespace(a={start}) %}}{{% for i in range({turns}) %}}{{% macro f() %}}{{% endmacro %}}"
                f"{{% set ns.a = [ns.a, f] %}}{{% endfor %}}{{{{ {use} }}}}",
        lambda: "{% for x in range(99999) %}" * rng.choice([1, 2, 9]) + _statement(rng, 1),
        lambda: "{% for x in range(99999) %}" * 2 + _statement(rng, 1) + "{% endfor %}" * 2,
        lambda: "{{ " + "(" * depth + "1" + ")" * depth + " }}",
        lambda: "{{ " + "[" * depth + "]" * depth + " }}",
        lambda: "{{ " + "not " * depth + "1 }}",
        lambda: "{{ " + "-" * depth + "1 }}",
        lambda: "{{ a" + ".b" * count + " }}",
        lambda: "{{ 1" + rng.choice([" + 1", "|string", " ~ 1", " and 1", " is none"]) * min(count, 30_000) + " }}",
        lambda: "{% if 1 %}" * depth + "{% endif %}" * depth,
        lambda: "{% if 1 %}" + "{% elif 1 %}" * min(count, 20_000) + "{% endif %}",
        lambda: "{{ x }}" * min(count, 40_000),
        lambda: rng.choice(["{%", "{{", "{#", "{% raw %}", "{%-", "\n", " ", "{% endif %}", "#}", "{% if %}"]) * count,
        lambda: "{{ '" + "\\x41" * min(count, 60_000) + "' }}",
        lambda: "{{ " + "9" * count + " }}",
        lambda: "{{ " + rng.choice(["0x", "0b", "1e", "1_", "1."]) + "9" * min(count, 9999) + " }}",
        lambda: "{% set " + ", ".join(f"a{i}" for i in range(min(count, 5000))) + " = range(9) %}",
        lambda: "{% macro f(" + ", ".join(f"a{i}" for i in range(min(count, 5000))) + ") %}{% endmacro %}{{ f() }}",
        lambda: "{{ (m.content" + rng.choice(["", "*99999"]) + ").strip('" + "b" * min(count, 9999) + "') }}",
        lambda: "{{ strftime_now('" + rng.choice(["%Y", "%999999999d", "%" * 500, "%c" * 5000, "\\x00"]) + "') }}",
        lambda: "{{ raise_exception(" + _expression(rng) + ") }}",
        lambda: "a" * rng.choice([count, (1 << 16) - 1, (1 << 16) + 1, 1 << 20]),
    ])()  # fmt: skip


_BENIGN: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: "".join(_statement(rng) for _ in range(rng.choice([1, 2, 5]))),
    _bomb,
)


def _spliced(rng: random.Random) -> str:
    """Two published templates' tags and texts in another order."""
    pieces: list[str] = []
    for folder in rng.sample(["chat", "llama/llama2", "llama/metaspace"], 2):
        files = sound_tokenizer(folder)
        text = files.get(TEMPLATE, files["tokenizer_config.json"]).decode()
        pieces += text.replace("{%", "\0{%").replace("{{", "\0{{").split("\0")
    for _ in range(rng.choice([1, 3, 10])):
        at, to = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        pieces[at] = rng.choice([pieces[to], "", pieces[at] + pieces[to], _statement(rng, 1)])
    return "".join(pieces)


def template_input(rng: random.Random) -> Input:
    """A tokenizer with a hostile chat template."""
    files = sound_tokenizer()
    if special := something_else(rng, dict(files), TEMPLATE, "template"):
        return special
    way = rng.randrange(10)
    if way < 2:
        data, label = mutate_bytes(rng, files[TEMPLATE]), "bytes"
    else:
        writer = _spliced if way == 2 else rng.choice(_BENIGN)
        data, label = writer(rng).encode("utf-8", "surrogatepass"), writer.__name__.strip("_<>")
    if rng.random() < 0.02:
        data, label = in_another_encoding(rng, data)
    return Input("template", label, {**files, TEMPLATE: data})
