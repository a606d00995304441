"""Chat templates: renders a checkpoint's Jinja template into the prompt of a chat, in bounded time and memory.

Templates get the variables and functions that Hugging Face transformers gives them, and copies of plain data: strings,
numbers, lists and mappings. No part of a template runs before `ChatTemplate.render`. jinja2 parses a template, and
`template_interpreter` renders it; it never becomes Python code.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser

from ...policies.errors import InvalidCheckpoint, InvalidText, PerparamError, UnsupportedConfig, shown
from .template_budget import Budget, TooExpensive
from .template_interpreter import Interpreter
from .template_values import Unavailable

_DEEPEST = 100  # nested lists and mappings in a message; a JSON schema has about ten levels

_MARK = "THE FINAL MESSAGE GOES ON HERE "
"""Marks the end of the message to continue; the prompt has its final space unless the template strips messages."""


class ChatTemplate:
    """A chat template of a tokenizer.

    source     Jinja source
    name       path of its file, for errors
    variables  variables that every chat gets: the special tokens, such as `eos_token`
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
        """Return the prompt of a chat; for the arguments see `Tokenizer.apply_chat_template`.

        Raises:
          InvalidText: if messages, tools or variables are not plain data of the expected form, or the template rejects
            the messages.
          InvalidCheckpoint: if the template is not valid Jinja, fails, or takes too long.
          UnsupportedConfig: if it uses a part of Jinja that published templates do not use.
        """
        chat = [_message(index, message) for index, message in enumerate(_listed("messages", messages))]
        if not chat:
            raise InvalidText("messages: expected at least one message, found an empty list. Pass the user's message.")
        schemas = None
        if tools is not None:
            schemas = [_plain("tools", tool) for tool in _listed("tools", tools)]
        final = chat[-1].get("content")
        if continue_final_message:
            if not isinstance(final, str):
                raise InvalidText(
                    "continue_final_message: expected a last message with content, found none. Leave this option "
                    "out, or give the message `content`."
                )
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
    def _tree(self) -> nodes.Template:
        try:
            with warnings.catch_warnings():  # of escape sequences that Python does not know
                warnings.simplefilter("ignore")
                return _environment().parse(self.source)
        except TemplateSyntaxError as error:
            raise InvalidCheckpoint(
                f"{self.name}: chat template, line {error.lineno}: not readable as Jinja: {error.message}. Correct it."
            ) from error
        except Exception as error:  # the nesting is too deep for Jinja
            raise InvalidCheckpoint(
                f"{self.name}: chat template: not readable as Jinja: {error}. Correct it."
            ) from error

    def _rendered(self, variables: dict[str, Any]) -> str:
        tree, interpreter = self._tree, Interpreter(Budget(variables))
        try:
            return interpreter.render(tree, variables)
        except Exception as error:  # an expression in a template can raise any error
            raise _failure(f"{self.name}: chat template, line {interpreter.line}", error) from error

    def _up_to_mark(self, prompt: str, final: str) -> str:
        """Return `prompt` up to the end of the last message's text, without the mark."""
        at = prompt.rfind(_MARK.rstrip())
        if at < 0 or final.strip() not in prompt[:at]:
            raise InvalidText(
                f"{self.name}: chat template: it omits part of the last message, so this message cannot be continued. "
                "Leave continue_final_message out."
            )
        return prompt[:at] if prompt.startswith(_MARK, at) else prompt[:at].rstrip()


def _failure(where: str, error: Exception) -> PerparamError:
    """Return the error to raise for an error that rendering raised at `where`."""
    reason = str(error).rstrip(".")
    if type(error) is TemplateError:  # from `raise_exception`; Jinja itself raises subclasses
        return InvalidText(f"{where}: the template rejects these messages: {reason}. Change them as it says.")
    if isinstance(error, Unavailable):
        return UnsupportedConfig(
            f"{where}: {reason}: perparam renders the part of Jinja that published templates use. Change the template, "
            "or write the prompt yourself."
        )
    if isinstance(error, SecurityError):
        return InvalidCheckpoint(f"{where}: the template is not safe: {reason}. Do not use this checkpoint.")
    if isinstance(error, (TooExpensive, MemoryError)):
        return InvalidCheckpoint(
            f"{where}: the template is too expensive to render: {reason}. Do not use this checkpoint, or "
            "shorten the chat, or write the prompt yourself."
        )
    return InvalidCheckpoint(
        f"{where}: {type(error).__name__}: {reason}. Pass the fields that the template reads, or correct the template."
    )


def _listed(name: str, value: Any) -> Sequence[Any]:
    """Return `value` if it is a list of mappings."""
    if not isinstance(value, (list, tuple)):
        raise InvalidText(f"{name}: expected a list of mappings, found {shown(value)}.")
    for index, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise InvalidText(f"{name}[{index}]: expected a mapping, found {shown(entry)}.")
    return value


def _message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a message for the template, without keys whose value is None, as in transformers."""
    name = f"messages[{index}]"
    plain = {key: value for key, value in _plain(name, message).items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise InvalidText(f"{name}: role: expected a string, such as 'user', found {shown(plain.get('role'))}.")
    if not isinstance(plain.get("content", "" if plain.get("tool_calls") else None), str):
        raise InvalidText(f"{name}: content: expected a string, found {shown(plain.get('content'))}.")
    return plain


_EXACT: dict[type, Any] = {str: str.__str__, int: int.__int__, float: float.__float__}


def _plain(name: str, value: Any, depth: int = 0) -> Any:
    """Return a copy of `value` in the exact types of JSON; `template_values` knows those alone."""
    if depth > _DEEPEST:
        raise InvalidText(f"{name}: expected at most {_DEEPEST} nested lists and mappings, found more.")
    if value is None or isinstance(value, bool):
        return value
    for kind, exact in _EXACT.items():
        if isinstance(value, kind):
            return exact(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise InvalidText(f"{name}: expected strings as keys, found {shown(odd[0])}.")
        return {str.__str__(key): _plain(f"{name}.{key}", entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{index}]", entry, depth + 1) for index, entry in enumerate(value)]
    raise InvalidText(f"{name}: expected strings, numbers, lists or mappings, found {shown(value)}.")


class _Generation(Extension):
    """The tag `{% generation %}`, which marks an assistant's text for training; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012, Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the node of the block; its content has its own scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@functools.cache
def _environment() -> jinja2.Environment:
    """Return the environment that parses templates, with the options of Hugging Face transformers."""
    return jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], cache_size=0
    )
