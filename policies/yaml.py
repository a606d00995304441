"""Policies as text: YAML files and jmp's one-line form, read into `{slot: rules}` for the constructor.

YAML is read node by node through PyYAML's safe loader, which keeps the line of every rule for errors and plans and
runs nothing.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import yaml

from .errors import InvalidPolicy, MissingFile, shown
from .rules import PolicyRules, located, read_slot, unknown_slot
from .slots import SLOTS

_SHORT = {"p": "params", "c": "compute", "o": "output"}
_LARGEST = 1 << 16  # characters; a policy is a page, and a hostile file should not cost a minute
_NEEDS_QUOTES = re.compile(r"\s*([*{&!%@`\[][^:]*?)\s*:(\s|$)")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The slots that the YAML file at `path` writes."""
    try:
        with open(path, encoding="utf-8") as file:
            return loads(file.read(_LARGEST + 1), os.fspath(path))
    except FileNotFoundError as error:
        raise MissingFile(f"{os.fspath(path)}: there is no such policy file. Look in {pathlib.Path.cwd()}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidPolicy(f"{os.fspath(path)}: cannot be read as UTF-8 text: {error}.") from error


def loads(text: str, name: str) -> dict[str, Any]:
    """The slots, and the block, that YAML `text` writes; errors and rules call the text `name`."""
    if len(text) > _LARGEST:
        raise InvalidPolicy(f"{name}: longer than {_LARGEST} characters. A policy is a short map.")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        raise InvalidPolicy(f"{name}:{line + 1}: {_yaml_problem(text, line, error)}") from error
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise InvalidPolicy(f"{name}: not readable as YAML: {str(error).partition(chr(10))[0]}.") from error
    if root is None:
        raise InvalidPolicy(f"{name}: empty. A policy that changes nothing is written {{}}.")
    read: dict[str, Any] = {}
    for key, node, source in _entries(root, name):
        with located(source):
            if key == "block":
                read[key] = PolicyRules({}, _block(node)).block
                continue
            if key not in SLOTS:
                raise unknown_slot(key)
        sources: dict[str, str] = {}
        if isinstance(node, yaml.MappingNode) and SLOTS[key].by_parameter:
            value: Any = {}
            for pattern, written, rule_source in _entries(node, name):
                with located(rule_source):
                    value[pattern] = _format(pattern, written, name)
                sources[pattern] = rule_source
        else:
            with located(source):
                value = _format(key, node, name)
        if sources:  # errors have the lines of their rules
            read[key] = read_slot(SLOTS[key], value, sources)
        else:
            with located(source):
                read[key] = read_slot(SLOTS[key], value, default_source=source)
    return read


def _entries(node: yaml.Node, name: str) -> list[tuple[str, yaml.Node, str]]:
    """Key, value and source of each line of a mapping."""
    source = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        raise InvalidPolicy(f"{source}: expected lines of 'name: dtype', found {_text(node)}.")
    entries, seen = [], dict[str, str]()
    for key, value in node.value:
        source = f"{name}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InvalidPolicy(f"{source}: a key begins with '{{' or '['. Put it in quotes: \"{{q,k}}_proj/kernel\".")
        if key.tag != "tag:yaml.org,2002:str":
            kind = key.tag.rpartition(":")[2]
            raise InvalidPolicy(f"{source}: YAML reads the key {_text(key)} as {kind}. Put it in quotes.")
        if key.value in seen:
            raise InvalidPolicy(
                f"{source}: {key.value!r} is written a second time, first at {seen[key.value]}. Keep one."
            )
        seen[key.value] = source
        entries.append((key.value, value, source))
    return entries


def _format(key: str, node: yaml.Node, name: str) -> Any:
    """What a rule's value writes: a name, None for null, or a mapping of `dtype`, `block` and `scale`."""
    if isinstance(node, yaml.MappingNode):
        parts = _entries(node, name)
        return {part: _block(each) if part == "block" else _name(f"{key}: {part}", each) for part, each, _ in parts}
    return _name(key, node)


def _name(key: str, node: yaml.Node) -> str | None:
    """A name, or None for null."""
    kind = node.tag.rpartition(":")[2]
    if not isinstance(node, yaml.ScalarNode) or kind not in ("str", "null"):
        raise InvalidPolicy(f"{key}: expected the name of a dtype or null, found {_text(node)}.")
    return node.value if kind == "str" else None


def _block(node: yaml.Node) -> Any:
    """The sides of a block as they are written; what is no list stays as it is, for the error."""
    if isinstance(node, yaml.SequenceNode):
        return [_integer(item) for item in node.value]
    return _integer(node)


def _integer(node: yaml.Node) -> int | str | None:
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if isinstance(node, yaml.ScalarNode) and re.fullmatch(r"-1|\d{1,9}", node.value, re.ASCII):
        return int(node.value)
    return _text(node)


def _text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return shown(node.value)
    return "a map" if isinstance(node, yaml.MappingNode) else "a list"


def _yaml_problem(text: str, line: int, error: yaml.MarkedYAMLError) -> str:
    lines = text.splitlines()
    written = lines[line] if line < len(lines) else ""
    if key := _NEEDS_QUOTES.match(written[:200]):
        return (
            f"YAML gives {key.group(1)[0]!r} at the start of a key a meaning of its own. "
            f'Put the key in quotes: "{key.group(1)}".'
        )
    return f"not YAML: {error.problem or error.context}. The line reads {shown(written.strip())}."


def parse(line: str) -> dict[str, str | None]:
    """The slots of `params=f32,compute=bf16,output=f32`; each may be left out, `p`, `c` and `o` are short."""
    slots: dict[str, str | None] = {}
    for part in line.split(","):
        key, equals, dtype = (word.strip() for word in part.partition("="))
        slot = _SHORT.get(key, key)
        if not equals or slot not in SLOTS:
            raise InvalidPolicy(
                f"{line!r}: {part!r} is not slot=dtype. Write params=f32,compute=bf16,output=f32, or p=,c=,o=."
            )
        if slot in slots:
            raise InvalidPolicy(f"{line!r}: {slot} is written twice. Keep one.")
        slots[slot] = None if dtype == "null" else dtype
    return slots


def dumps(policy: PolicyRules) -> str:
    """The YAML of `policy`; null slots are left out."""
    written = policy.plain()
    if policy.block is not None:
        written["block"] = list(policy.block)
    return yaml.safe_dump(written, sort_keys=False)
