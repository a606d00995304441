"""Policies as text: YAML files and jmp's one-line form.

YAML is read node by node through PyYAML's safe loader, which keeps the line of every rule for errors and plans and
runs nothing.
"""

from __future__ import annotations

import difflib
import os
import pathlib
import re
from typing import Any

import yaml

from . import dtypes
from .errors import InvalidPolicy, MissingFile, shown
from .policy import Policy
from .slots import located, make_slot

SLOTS = ("params", "compute", "output", "kv_cache", "block")
_SHORT = {"p": "params", "c": "compute", "o": "output"}
_LARGEST = 1 << 16  # characters; a policy is a page, and a hostile file should not cost a minute
_NEEDS_QUOTES = re.compile(r"\s*([*{&!%@`\[][^:]*?)\s*:(\s|$)")


def load(path: str | os.PathLike[str]) -> Policy:
    """The policy in the YAML file at `path`."""
    try:
        with open(path, encoding="utf-8") as file:
            return loads(file.read(_LARGEST + 1), os.fspath(path))
    except FileNotFoundError as error:
        raise MissingFile(f"{os.fspath(path)}: there is no such policy file. Look in {pathlib.Path.cwd()}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidPolicy(f"{os.fspath(path)}: cannot be read as UTF-8 text: {error}.") from error


def loads(text: str, name: str) -> Policy:
    """The policy that YAML `text` writes; errors and rules call it `name`."""
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
    slots: dict[str, Any] = {}
    for key, value, source in _entries(root, name):
        with located(source):
            if key not in SLOTS:
                raise unknown_slot(key)
        if isinstance(value, yaml.MappingNode):
            rules, sources = {}, {}
            for pattern, dtype, rule_source in _entries(value, name):
                with located(rule_source):
                    rules[pattern] = _scalar(pattern, dtype)
                sources[pattern] = rule_source
            if key in ("params", "compute"):
                slots[key] = make_slot(key, rules, sources)
                continue
            plain: Any = rules
        elif isinstance(value, yaml.SequenceNode):
            plain = [_integer(item) for item in value.value]
        else:
            with located(source):
                plain = _integer(value) if key == "block" else _scalar(key, value)
        with located(source):
            slots[key] = make_slot(key, plain, default_source=source) if key in ("params", "compute") else plain
            Policy(**{key: slots[key]})  # checked here, where the line is known
    return Policy(**slots)


def unknown_slot(key: str) -> InvalidPolicy:
    """The error for a slot that no policy has, with the nearest that one has."""
    near = difflib.get_close_matches(key, SLOTS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InvalidPolicy(f"unknown slot {key!r}. A policy has {', '.join(SLOTS)}.{hint}")


def _entries(node: yaml.Node, name: str) -> list[tuple[str, yaml.Node, str]]:
    """Key, value and source of each line of a mapping."""
    source = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
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


def _scalar(key: str, node: yaml.Node) -> str | None:
    """A dtype's name, or None for null."""
    kind = node.tag.rpartition(":")[2]
    if not isinstance(node, yaml.ScalarNode) or kind not in ("str", "null"):
        raise InvalidPolicy(f"{key}: expected the name of a dtype or null, found {_text(node)}.")
    return node.value if kind == "str" else None


def _integer(node: yaml.Node) -> int | str | None:
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if isinstance(node, yaml.ScalarNode) and re.fullmatch(r"\d{1,9}", node.value, re.ASCII):
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


def parse(line: str) -> Policy:
    """The policy of `params=f32,compute=bf16,output=f32`; each slot may be left out, `p`, `c` and `o` are short."""
    slots: dict[str, str | None] = {}
    for part in line.split(","):
        key, equals, dtype = (word.strip() for word in part.partition("="))
        slot = _SHORT.get(key, key)
        if not equals or slot not in SLOTS[:4]:
            raise InvalidPolicy(
                f"{line!r}: {part!r} is not slot=dtype. Write params=f32,compute=bf16,output=f32, or p=,c=,o=."
            )
        if slot in slots:
            raise InvalidPolicy(f"{line!r}: {slot} is written twice. Keep one.")
        slots[slot] = None if dtype == "null" else dtype
    return Policy(**slots)


def dumps(policy: Policy) -> str:
    """The YAML of `policy`; null slots are left out."""
    plain: dict[str, Any] = {"params": policy.params.plain(), "compute": policy.compute.plain()}
    plain["output"] = make_slot("output", policy.output).plain()
    plain["kv_cache"] = policy.kv_cache and dtypes.dtype_name(policy.kv_cache)
    plain["block"] = policy.block and list(policy.block)
    return yaml.safe_dump({slot: value for slot, value in plain.items() if value is not None}, sort_keys=False)


def dump(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Writes `dumps(policy)` to `path`."""
    pathlib.Path(path).write_text(dumps(policy), encoding="utf-8")
