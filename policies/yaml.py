"""Policies as text: reads YAML and jmp's one-line form into `{slot: rules}`, and writes YAML.

YAML is read node by node through PyYAML's safe loader: nodes know their line, which errors and plans show, and the safe
loader runs no code.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import yaml

from .errors import InvalidPolicy, MissingFile, shown
from .include import included_file
from .rules import PolicyRules, SlotRules, located, read_slot, unknown_slot
from .slots import SLOTS, Slot

_SHORT = {"p": "params", "c": "compute", "o": "output"}
_MAX_CHARACTERS = 1 << 16  # a policy is about a page; parsing a larger hostile file could take a minute
_MAX_NODES = 1 << 13  # keys, values and list items: each takes some 50 µs
_MAX_DEPTH = 16  # a side of a block, in a format, in a rule, in a slot, has a depth of five
_NEEDS_QUOTES = re.compile(r"\s*([*{%@`\[][^:]*?)\s*:(\s|$)")


class _Unsupported(yaml.MarkedYAMLError):
    """Valid YAML that a policy does not support."""


class _Loader(yaml.SafeLoader):
    """The safe loader, except that anchors, aliases and explicit tags are errors: with them a line does not show its
    value. More nodes, or deeper ones, than a policy needs are an error too."""

    nodes = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node.

        Raises:
          _Unsupported: for an alias, an anchor, an explicit tag, too many nodes or too deep ones, with the line.
        """
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            problem = f"more than {_MAX_NODES} keys and values. A policy is a short map"
        elif self.depth == _MAX_DEPTH:
            problem = f"nested more than {_MAX_DEPTH} deep. A policy is a short map"
        elif isinstance(event, yaml.AliasEvent):
            problem = f"the alias '*{event.anchor}' is not supported in a policy. Write the value itself"
        elif getattr(event, "anchor", None) is not None:
            problem = f"the anchor '&{event.anchor}' is not supported in a policy. Remove it"
        elif getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"the tag {shown(tag)} is not supported in a policy. Remove it"
        else:
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node
        raise _Unsupported(problem=problem, problem_mark=event.start_mark)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the slots of the policy in the YAML file at `path`; see `loads`."""
    return _load(pathlib.Path(path), os.fspath(path), ())


def _load(path: pathlib.Path, name: str, files: tuple[pathlib.Path, ...]) -> dict[str, Any]:
    """Returns the slots of the policy in a file that errors call `name` and that the last of `files` includes."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise InvalidPolicy(f"{name}: not a regular file. A policy is a YAML file.")
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_CHARACTERS + 1)
    except FileNotFoundError as error:
        raise MissingFile(
            f"{name}: there is no such policy file. Check the path; relative paths start in {pathlib.Path.cwd()}."
        ) from error
    except InvalidPolicy:
        raise
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a NUL character
        raise InvalidPolicy(f"{name}: cannot be read as UTF-8 text: {error}.") from error
    return loads(text, name, (*files, path))


def loads(text: str, name: str, files: tuple[pathlib.Path, ...] = ()) -> dict[str, Any]:
    """Returns the slots and the block of the policy in YAML `text`; errors and rules refer to the text as `name`.

    files  the file of the text, and before it the files that include it; empty for text without a file

    Raises:
      InvalidPolicy, UnknownDtype: for text that is not a policy, with `name` and the line.
      MissingFile: if the text includes a file that does not exist.
    """
    slots: dict[str, Any] = {}
    entries = _entries(_root(text, name), name)
    for key, node, source in sorted(entries, key=lambda entry: entry[0] != "include"):  # which the other keys change
        with located(source):
            if key == "include":
                slots = _included(node, files)
            elif key == "block":
                slots[key] = PolicyRules({}, _block(node)).block
            elif key in SLOTS:
                slots[key] = _slot(SLOTS[key], node, name, source, slots.get(key, SlotRules()))
            else:
                raise unknown_slot(key, "include")
    return slots


def _included(node: yaml.Node, files: tuple[pathlib.Path, ...]) -> dict[str, Any]:
    """Returns the slots of the policy that `include:` names."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        raise InvalidPolicy(f"include: expected one preset or file, found {_text(node)}. Write include: bf16.")
    file, name = included_file(node.value, files)
    return _load(file, name, files)


def _slot(slot: Slot, node: yaml.Node, name: str, source: str, base: SlotRules) -> SlotRules:
    """Returns the rules of a slot, followed by those of `base` if the slot is a map."""
    if isinstance(node, yaml.SequenceNode):
        lines = "'kernel: f8_e4m3fn' lines, without '-', or one dtype" if slot.by_parameter else "one dtype"
        raise InvalidPolicy(f"{name}:{node.start_mark.line + 1}: {slot.name}: found a list. Write {lines}.")
    if not isinstance(node, yaml.MappingNode) or not slot.by_parameter:
        return read_slot(slot, _format(slot.name, node, name), default_source=source)
    value, sources = {}, {}
    for pattern, format_node, rule_source in _entries(node, name):
        with located(rule_source):
            value[pattern] = _format(pattern, format_node, name)
        sources[pattern] = rule_source
    return read_slot(slot, value, sources, base=base)


def _root(text: str, name: str) -> yaml.Node:
    """Returns the root node of YAML text."""
    if len(text) > _MAX_CHARACTERS:
        raise InvalidPolicy(f"{name}: longer than {_MAX_CHARACTERS} characters. A policy is a short map.")
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        raise InvalidPolicy(f"{name}:{line + 1}: {_yaml_problem(text, line, error)}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InvalidPolicy(f"{name}: not readable as YAML: {str(error).partition(chr(10))[0]}.") from error
    if root is None:
        raise InvalidPolicy(f"{name}: empty. A policy that changes nothing is written {{}}.")
    return root


def _entries(node: yaml.Node, name: str) -> list[tuple[str, yaml.Node, str]]:
    """Returns `(key, value node, "file:line")` for each entry of a mapping."""
    source = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise InvalidPolicy(f"{source}: expected lines of 'name: dtype', found {_text(node)}.")
    entries, sources = [], dict[str, str]()
    for key, value in node.value:
        source = f"{name}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InvalidPolicy(f"{source}: a key begins with '{{' or '['. Put it in quotes: \"{{q,k}}_proj/kernel\".")
        if key.tag != "tag:yaml.org,2002:str":
            kind = key.tag.rpartition(":")[2]
            raise InvalidPolicy(f"{source}: YAML reads the key {_text(key)} as {kind}. Put it in quotes.")
        if key.value in sources:
            raise InvalidPolicy(
                f"{source}: {key.value!r} is written a second time, first at {sources[key.value]}. Keep one."
            )
        sources[key.value] = source
        entries.append((key.value, value, source))
    return entries


def _format(key: str, node: yaml.Node, name: str) -> Any:
    """Returns the value of a rule: a name, None for null, or a mapping of `dtype`, `block` and `scale`."""
    if isinstance(node, yaml.MappingNode):
        parts = _entries(node, name)
        return {part: _block(item) if part == "block" else _name(f"{key}: {part}", item) for part, item, _ in parts}
    return _name(key, node)


def _name(key: str, node: yaml.Node) -> str | None:
    """Returns the text of a scalar, or None for null."""
    kind = node.tag.rpartition(":")[2]
    if not isinstance(node, yaml.ScalarNode) or kind not in ("str", "null"):
        raise InvalidPolicy(f"{key}: expected the name of a dtype or null, found {_text(node)}.")
    return node.value if kind == "str" else None


def _block(node: yaml.Node) -> Any:
    """Returns the sides of a block, unchecked: `as_block` raises the error for anything but two integers."""
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
    """Describes a node for an error message."""
    if isinstance(node, yaml.ScalarNode):
        return shown(node.value)
    return "a map" if isinstance(node, yaml.MappingNode) else "a list"


def _yaml_problem(text: str, line: int, error: yaml.MarkedYAMLError) -> str:
    """Returns the description of a YAML error, with a remedy where the line begins with an unquoted special key."""
    lines = text.splitlines()
    source_line = lines[line] if line < len(lines) else ""
    if key := _NEEDS_QUOTES.match(source_line[:200]):
        return (
            f"in YAML {key.group(1)[0]!r} has a special meaning at the start of a key. "
            f'Put the key in quotes: "{key.group(1)}".'
        )
    if isinstance(error, _Unsupported):
        return f"{error.problem}."
    return f"not YAML: {error.problem or error.context}. The line reads {shown(source_line.strip())}."


def parse(line: str) -> dict[str, str | None]:
    """Returns the slots of a line such as `params=f32,compute=bf16,output=f32`.

    Every slot is optional; `p`, `c` and `o` abbreviate `params`, `compute` and `output`.
    """
    slots: dict[str, str | None] = {}
    for part in line.split(","):
        key, equals, dtype = (word.strip() for word in part.partition("="))
        slot = _SHORT.get(key, key)
        if not equals or slot not in SLOTS:
            raise InvalidPolicy(
                f"{line!r}: expected slot=dtype, found {part!r}. Write params=f32,compute=bf16,output=f32, or "
                "p=f32,c=bf16,o=f32."
            )
        if slot in slots:
            raise InvalidPolicy(f"{line!r}: {slot} is written twice. Keep one.")
        slots[slot] = None if dtype == "null" else dtype
    return slots


def dumps(policy: PolicyRules) -> str:
    """Returns `policy` as YAML, without its empty slots."""
    slots = policy.plain()
    if policy.block is not None:
        slots["block"] = list(policy.block)
    return yaml.safe_dump(slots, sort_keys=False)
