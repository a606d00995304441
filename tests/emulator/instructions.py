"""The instructions of a program as functions: what each does, when, and which registers it reads."""

from __future__ import annotations

import dataclasses

import numpy as np

from . import copies, memory, products, synchronisation
from .arithmetic import compile_arithmetic
from .moves import compile_move
from .operands import BOOL, Effect, Source, Step, source
from .ptx import Instruction, Program

_EFFECTS = memory.TABLE | synchronisation.TABLE | copies.TABLE | products.TABLE


@dataclasses.dataclass(frozen=True)
class Action:
    """An instruction, and what it does: nothing, a step or an effect.

    condition  in which threads its predicate holds; None: in all
    reads      registers that it reads at once, unlike matrix products
    """

    instruction: Instruction
    step: Step | None
    effect: Effect | None
    condition: Source | None
    reads: frozenset[str]

    def mask(self, group: object) -> np.ndarray | None:
        """Returns in which threads of a warpgroup the instruction is executed; None: in all."""
        return None if self.condition is None else self.condition(group) != self.instruction.negated  # type: ignore[arg-type]


def compile_program(program: Program) -> list[Action]:
    """Returns the instructions of a program as actions.

    Raises:
      NotImplementedError: for an instruction that the emulator does not know.
    """
    return [_compile(ins) for ins in program.instructions]


def _compile(ins: Instruction) -> Action:
    step = effect = None
    if ins.target is None and ins.opcode != "ret":
        step = compile_move(ins) or compile_arithmetic(ins)
        if step is None:
            make = next((make for start, make in _EFFECTS.items() if ins.opcode.startswith(start)), None)
            if make is None:
                raise NotImplementedError(f"the emulator does not know the instruction {ins}")
            effect = make(ins)
    condition = None if ins.predicate is None else source(ins.predicate, BOOL)
    stores = ins.opcode.startswith(("st.", "stmatrix"))
    reads = frozenset() if ins.opcode.startswith("wgmma") else _names(ins.operands[0 if stores else 1 :])
    return Action(ins, step, effect, condition, reads)


def _names(operands: tuple[str, ...]) -> frozenset[str]:
    for bracket in "[]{},":
        operands = tuple(operand.replace(bracket, " ") for operand in operands)
    return frozenset(name.partition("+")[0] for operand in operands for name in operand.split() if name[0] == "%")
