"""Parses the PTX of one kernel: instructions with resolved branches, parameters and number of threads."""

from __future__ import annotations

import dataclasses
import functools
import re

WAIT = "mbarrier.try_wait"
"""The start of the opcodes that wait for a phase of a barrier and say whether it is complete."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    opcode     with all suffixes, `ld.shared.v2.b32`
    operands   text of each operand; vectors and addresses keep their brackets
    predicate  register that decides in which threads it is executed, or None; `negated` where those are the others
    target     index of the instruction that a branch jumps to
    """

    opcode: str
    operands: tuple[str, ...] = ()
    predicate: str | None = None
    negated: bool = False
    target: int | None = None

    @functools.cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    def __str__(self) -> str:
        guard = "" if self.predicate is None else f"@{'!' * self.negated}{self.predicate} "
        text = f"{guard}{self.opcode} {', '.join(self.operands)}"
        return text if len(text) < 100 else f"{text[:97]}..."


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions of a kernel.

    parameters  bytes of each parameter by name, in order
    threads     number of threads of a block
    """

    instructions: tuple[Instruction, ...]
    parameters: dict[str, int]
    threads: int

    def without(self, index: int) -> Program:
        """Returns the program without the effect of one instruction; a wait succeeds at once."""
        removed = self.instructions[index]
        if removed.opcode.startswith(WAIT):
            nothing = Instruction("mov.pred", (removed.operands[0], "1"))
        else:
            nothing = Instruction("nop")
        instructions = (*self.instructions[:index], nothing, *self.instructions[index + 1 :])
        return dataclasses.replace(self, instructions=instructions)


def split(text: str) -> tuple[str, ...]:
    """Returns the parts of text between the commas that are in no bracket.

    >>> split("{%r1,%r2}, [%rd1, {%r3} ], 0")
    ('{%r1,%r2}', '[%rd1, {%r3} ]', '0')
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts if part.strip())


def inside(operand: str) -> tuple[str, ...]:
    """Returns the elements of an operand in brackets, or the operand itself.

    >>> inside("[%rd1, {%r1,%r2} ]"), inside("%r1")
    (('%rd1', '{%r1,%r2}'), ('%r1',))
    """
    return split(operand.strip()[1:-1]) if operand[0] in "[{" else (operand,)


_PART = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[$\w]+):|(?P<statement>[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);)"
)
_GUARDED = re.compile(r"(?:@(?P<negated>!?)(?P<predicate>[%\w]+)\s+)?(?P<opcode>\S+)\s*(?P<operands>.*)", re.DOTALL)


def parse(text: str) -> Program:
    """Returns the only kernel of a PTX module; text after it is ignored."""
    head, _, body = text.partition("$L__func_begin0:")
    body = body.partition("$L__func_end0:")[0]
    body = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*", "", body, flags=re.MULTILINE)
    found: list[tuple[re.Match[str], tuple[int, ...]]] = []
    labels: dict[tuple[int, str], int] = {}
    scopes, opened = [0], 0
    while body.strip():
        match = _PART.match(body)
        if not match:
            raise ValueError(f"cannot parse {body[:100]!r}")
        body = body[match.end() :]
        if match["open"]:
            opened += 1
            scopes.append(opened)
        elif match["close"]:
            scopes.pop()
        elif match["label"]:
            labels[scopes[-1], match["label"]] = len(found)
        elif (statement := match["statement"].strip()) and not statement.startswith("."):
            guarded = _GUARDED.fullmatch(statement)
            assert guarded
            found.append((guarded, tuple(scopes)))
    instructions = []
    for guarded, scope in found:
        operands = split(guarded["operands"])
        target = None
        if guarded["opcode"].startswith("bra"):
            target = next(labels[place, operands[0]] for place in reversed(scope) if (place, operands[0]) in labels)
        instructions.append(
            Instruction(guarded["opcode"], operands, guarded["predicate"], guarded["negated"] == "!", target)
        )
    threads = re.search(r"\.maxntid (\d+)", head)
    assert threads
    found_parameters = re.findall(r"\.param [^\n]*?(\w+)(?:\[(\d+)\])?,?$", head, re.MULTILINE)
    parameters = {name: int(count or 8) for name, count in found_parameters}
    return Program(tuple(instructions), parameters, int(threads[1]))
