"""A chat template: Jinja that a checkpoint brings along, rendered in jinja2's sandbox into the prompt of a chat.

The environment is the one that Hugging Face transformers gives templates, and what a template sees is plain data: text,
numbers, lists and mappings, copied. Nothing of a template runs before `ChatTemplate.render`. The sandbox keeps it from
Python's internals, files and the network, not from taking long.
"""

from __future__ import annotations

import datetime
import functools
import json
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ...policies.errors import InvalidCheckpoint, InvalidText, PerparamError, shown

_LONGEST_PROMPT = 1 << 26  # characters: 16 million tokens or more, hundreds of times what a model attends to
_DEEPEST = 100  # levels of lists and mappings in a message; a JSON schema has ten

_MARK = "THE FINAL MESSAGE GOES ON HERE "
"""Stands at the end of a message that is to be continued; its last blank tells whether the template strips."""


class ChatTemplate:
    """The template of a tokenizer.

    source     the Jinja
    name       the file it is of, for errors
    variables  what the template sees besides a chat: special tokens, such as `eos_token`
    """

    def __init__(self, source: str, name: str, variables: Mapping[str, str] | None = None):
        self.source, self.name, self.variables = source, name, dict(variables or {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt; see `Tokenizer.chat`.

        Raises:
          InvalidText: for messages, tools or variables that are not plain data of the right shape, and where the
            template refuses them.
          InvalidCheckpoint: for a template that is not Jinja, fails, or reaches for what the sandbox forbids.
        """
        chat = [_message(index, message) for index, message in enumerate(_listed("messages", messages))]
        if not chat:
            raise InvalidText("messages: expected at least one, found none.")
        schemas = None
        if tools is not None:
            schemas = [_plain("tools", tool) for tool in _listed("tools", tools)]
        final = chat[-1].get("content")
        if continue_final_message:
            if not isinstance(final, str):
                raise InvalidText("messages: the last one has no content to continue.")
            chat[-1]["content"] = final + _MARK
        prompt = self._rendered(
            {
                "documents": None,
                **self.variables,
                **_plain("variables", variables or {}),
                "messages": chat,
                "tools": schemas,
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
            }
        )
        return self._up_to_mark(prompt, str(final)) if continue_final_message else prompt

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except TemplateSyntaxError as error:
            raise InvalidCheckpoint(
                f"{self.name}: chat template, line {error.lineno}: not readable as Jinja: {error.message}. Correct it."
            ) from error
        except Exception as error:  # nested too deep, for Jinja or for the Python that it writes
            raise InvalidCheckpoint(
                f"{self.name}: chat template: not readable as Jinja: {error}. Correct it."
            ) from error

    def _rendered(self, variables: dict[str, Any]) -> str:
        compiled, parts, length = self._compiled, [], 0
        try:
            for part in compiled.generate(variables):
                parts.append(part)
                length += len(part)
                if length > _LONGEST_PROMPT:
                    raise OverflowError(f"it writes more than {_LONGEST_PROMPT} characters")
        except Exception as error:  # whatever an expression of nobody knows who raises
            lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if _is_template(frame)]
            where = f"{self.name}: chat template, line {lines[-1]}" if lines else f"{self.name}: chat template"
            raise _failure(where, error) from error
        return "".join(parts)

    def _up_to_mark(self, prompt: str, final: str) -> str:
        """`prompt` up to the end of the last message's text."""
        at = prompt.rfind(_MARK.rstrip())
        if at < 0 or final.strip() not in prompt[:at]:
            raise InvalidText(
                f"{self.name}: chat template: it does not render all of the last message, so that cannot be continued."
            )
        return prompt[:at] if prompt.startswith(_MARK, at) else prompt[:at].rstrip()


def _failure(where: str, error: Exception) -> PerparamError:
    said = str(error).rstrip(".")
    if type(error) is TemplateError:  # `raise_exception`, of which all else that Jinja raises is derived
        return InvalidText(f"{where}: it refuses these messages: {said}.")
    if isinstance(error, SecurityError):
        return InvalidCheckpoint(f"{where}: it reaches for what no template needs: {said}. Do not use this checkpoint.")
    return InvalidCheckpoint(
        f"{where}: {type(error).__name__}: {said}. Give what the template reads of a message, or correct it."
    )


def _is_template(frame: Any) -> bool:
    return frame.f_code.co_filename == "<template>"  # which Jinja writes into tracebacks, with the template's lines


def _listed(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise InvalidText(f"{name}: expected a list of mappings, found {shown(value)}.")
    for index, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise InvalidText(f"{name}[{index}]: expected a mapping, found {shown(entry)}.")
    return value


def _message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates see it: without the keys that are None, as transformers leaves them out."""
    name = f"messages[{index}]"
    plain = {key: value for key, value in _plain(name, message).items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise InvalidText(f"{name}: role: expected text, such as 'user', found {shown(plain.get('role'))}.")
    if not isinstance(plain.get("content", "" if plain.get("tool_calls") else None), str):
        raise InvalidText(f"{name}: content: expected text, found {shown(plain.get('content'))}.")
    return plain


_EXACT: dict[type, Any] = {str: str.__str__, int: int.__int__, float: float.__float__}


def _plain(name: str, value: Any, depth: int = 0) -> Any:
    """A copy of `value` in exact JSON types, whose methods the sandbox knows."""
    if depth > _DEEPEST:
        raise InvalidText(f"{name}: more than {_DEEPEST} levels of lists and mappings.")
    if value is None or isinstance(value, bool):
        return value
    for kind, exact in _EXACT.items():
        if isinstance(value, kind):
            return exact(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise InvalidText(f"{name}: expected keys that are text, found {shown(odd[0])}.")
        return {str.__str__(key): _plain(f"{name}.{key}", entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{index}]", entry, depth + 1) for index, entry in enumerate(value)]
    raise InvalidText(f"{name}: expected text, numbers, lists or mappings, found {shown(value)}.")


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training on it: here its content counts."""

    tags = {"generation"}  # noqa: RUF012, since Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace without names that Python itself would look up."""

    def __init__(*args: Any, **names: Any):
        # `self` is no parameter, so that `namespace(self=1)` works, as in Jinja.
        self, *given = args
        values: dict[str, Any] = dict(*given, **names)
        for name in values:
            _refuse_hidden(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"{name!r} in a namespace is not safe.")


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a model reads it: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_now, namespace=_Namespace)
    return environment
