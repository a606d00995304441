"""Runs thread blocks: chooses at random which warpgroup goes on, and when copies arrive."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

import numpy as np

from . import host
from .arithmetic import THREADS, compile_arithmetic, source
from .barriers import Barrier
from .clocks import Clocks
from .effects import compile_effect
from .faults import Deadlock, Fault, Race, Unfinished
from .ptx import Instruction, Program
from .shared import BASE, Shared
from .tensor_maps import Global, TensorMap

LAZINESS = (0.5, 0.02, 0.98)
"""Probabilities with which a copy arrives before a warpgroup goes on, one for each schedule in turn."""

_PARAMETERS = 1 << 60
"""Address of a parameter: no copy or load may take it for memory."""


class Queue:
    """Asynchronous work of a warpgroup, in groups that are waited for.

    started  number of committed groups
    open     work that is in no group yet; groups are those committed, oldest first
    written  registers that the work writes, read those that it reads
    """

    def __init__(self) -> None:
        self.started, self.warp = 0, None
        self.open: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []
        self.written: set[str] = set()
        self.read: set[str] = set()

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []
        self.started += 1

    def finish(self, remaining: int) -> int:
        """Does the work of all groups but the last `remaining`, as late as is allowed; returns their number."""
        while len(self.groups) > remaining:
            for work in self.groups.pop(0):
                work()
        if not self.groups and not self.open:
            self.written.clear()
            self.read.clear()
        return self.started - len(self.groups)

    @property
    def is_empty(self) -> bool:
        return not self.open and not any(self.groups)


@dataclasses.dataclass
class Record:
    """What a thread block did: `(address, tensor map)` of each copy, `(opcode, swizzle modes)` of each product."""

    loads: list[tuple[int, TensorMap]] = dataclasses.field(default_factory=list)
    stores: list[tuple[int, TensorMap]] = dataclasses.field(default_factory=list)
    products: list[tuple[str, set[int]]] = dataclasses.field(default_factory=list)
    is_complete: bool = True


class Warpgroup:
    """128 threads that execute the same instructions."""

    def __init__(self, block: Block, number: int):
        self.block, self.number = block, number
        self.warps = 4 * number + np.arange(4)
        self.warp_of = np.repeat(self.warps, 32)
        self.registers: dict[str, np.ndarray] = {}
        self.products, self.bulk = Queue(), Queue()
        self.unfenced: set[str] = set()
        self.mask: np.ndarray | None = None

    def special(self, name: str) -> np.ndarray:
        kind, axis = name[1:].split(".")
        place = "xyz".index(axis)
        if kind == "tid":
            return (THREADS * self.number + np.arange(THREADS)) * (place == 0)
        one = (self.block.threads, 1, 1) if kind == "ntid" else None
        return np.full(THREADS, (one or {"ctaid": self.block.index, "nctaid": self.block.launch.grid}[kind])[place])

    def symbol(self, name: str) -> int:
        name, _, offset = name.partition("+")
        return self.block.symbol(name) + int(offset or 0)

    def write(self, name: str, value: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Writes a register (threads,), in the threads that execute the current instruction."""
        mask = self.mask if mask is None else mask
        if mask is not None and not mask.all():
            value = np.where(mask, value, self.registers.get(name, np.zeros_like(value)))
        if name in self.products.written or name in self.products.read:
            raise Race(f"register {name} is written while a matrix product is in flight that uses it")
        self.registers[name] = value
        self.unfenced.add(name)

    def run(self) -> Iterator[Callable[[], bool] | None]:
        position, code = 0, self.block.code
        everywhere = np.ones(THREADS, bool)
        while True:
            ins, arithmetic, effect, condition, reads = code[position]
            self.block.position = position
            position += 1
            if ins.opcode == "ret":
                break
            if self.products.written and not reads.isdisjoint(self.products.written):
                raise Race(f"{ins} reads the result of a matrix product that is in flight")
            mask = everywhere
            if condition is not None:
                mask = condition(self) != ins.negated
            if ins.target is not None:
                if mask.any() and not mask.all():
                    raise Fault(f"threads of a warpgroup take different branches: {ins}")
                if mask.all():
                    position = ins.target
            elif arithmetic is not None:
                self.mask = mask
                arithmetic(self)
                self.mask = None
            else:
                yield from effect(self, mask)
        if not self.products.is_empty or not self.bulk.is_empty:
            raise Unfinished("a warpgroup ends while its asynchronous stores or products are in flight")


Code = list[tuple[Instruction, object, object, object, frozenset[str]]]


def compile_program(program: Program) -> Code:
    """Returns each instruction with what it does, its condition, and the registers that it reads."""
    code: Code = []
    for ins in program.instructions:
        arithmetic = effect = None
        if ins.target is None and ins.opcode != "ret":
            arithmetic = compile_arithmetic(ins)
            effect = compile_effect(ins) if arithmetic is None else None
            if arithmetic is None and effect is None:
                raise NotImplementedError(f"the emulator does not know the instruction {ins}")
        condition = None if ins.predicate is None else source(ins.predicate, np.dtype(bool))
        reads = frozenset() if ins.opcode.startswith("wgmma") else _names(ins.operands[1:])
        if ins.opcode.startswith(("st.", "stmatrix")):
            reads = _names(ins.operands)
        code.append((ins, arithmetic, effect, condition, reads))
    return code


def _names(operands: tuple[str, ...]) -> frozenset[str]:
    for bracket in "[]{},":
        operands = tuple(operand.replace(bracket, " ") for operand in operands)
    return frozenset(name.partition("+")[0] for operand in operands for name in operand.split() if name[0] == "%")


class Block:
    """One thread block of a launch."""

    def __init__(self, program: Program, code: Code, launch: host.Launch, index: tuple[int, int, int], memory: Global):
        self.program, self.code, self.launch, self.index, self.memory = program, code, launch, index, memory
        self.threads = program.threads
        self.clocks = Clocks(self.threads // 32)
        self.shared = Shared(launch.shared, self.clocks)
        self.barriers: dict[int, Barrier] = {}
        self.initialised: dict[int, tuple[int, int]] = {}
        self.meetings: dict[tuple[int, int], list[list[Warpgroup]]] = {}
        self.owners: dict[tuple[int, int], Warpgroup] = {}
        self.in_flight: list[Callable[[], None]] = []
        self.record, self.position = Record(), 0
        self.names = list(program.parameters)

    def symbol(self, name: str) -> int:
        return BASE if name == "__dynamic_shmem__0" else _PARAMETERS + (self.names.index(name) << 32)

    def argument(self, name: str) -> int:
        value = self.launch.arguments[self.names.index(name)]
        if isinstance(value, dict):
            raise Fault(f"the tensor maps of {name} are read as a number")
        return value

    def tensor_map(self, address: int) -> TensorMap:
        maps = self.launch.arguments[(address - _PARAMETERS) >> 32]
        if address < _PARAMETERS or not isinstance(maps, dict) or address & 0xFFFFFFFF not in maps:
            raise Fault(f"there is no tensor map at {address:#x}")
        return maps[address & 0xFFFFFFFF]

    def run(self, schedule: int, steps: int | None = None) -> Record:
        """Runs the block in one of the random schedules, and returns what it did; stops after `steps` of them."""
        chance, eager = random.Random(schedule), LAZINESS[schedule % len(LAZINESS)]
        groups = [Warpgroup(self, number) for number in range(self.threads // THREADS)]
        running = [(group.run(), None) for group in groups]
        taken = 0
        try:
            while running:
                taken += 1
                if steps is not None and taken > steps:
                    self.record.is_complete = False
                    return self.record
                ready = [i for i, (_, condition) in enumerate(running) if condition is None or condition()]
                if self.in_flight and (not ready or chance.random() < eager):
                    self.in_flight.pop(chance.randrange(len(self.in_flight)))()
                elif ready:
                    chosen = chance.choice(ready)
                    try:
                        running[chosen] = (running[chosen][0], next(running[chosen][0]))
                    except StopIteration:
                        running.pop(chosen)
                else:
                    raise Deadlock("every warpgroup waits, and no copy is in flight")
        except Fault as fault:
            fault.add_note(f"block {self.index}, schedule {schedule}: {self.program.instructions[self.position]}")
            raise
        if self.in_flight or not all(barrier.is_clean for barrier in self.barriers.values()):
            raise Unfinished("the thread block ends with a copy in flight or a barrier in the middle of a phase")
        return self.record


def run(
    program: Program,
    host_code: str,
    arrays: list[np.ndarray],
    *,
    schedule: int = 0,
    blocks: int | None = None,
    steps: int | None = None,
) -> list[Record]:
    """Runs the thread blocks of a launch, one after the other, and returns what each did.

    arrays    operands and results of the kernel as bytes (n,); results are written
    schedule  number of the random schedule of the first block; each has another
    blocks    number of blocks, by default all
    steps     limit of the scheduler's steps in each block, for what only looks at the record
    """
    memory = Global(arrays)
    launch, code = host.launch(host_code, memory.addresses), compile_program(program)
    x, y, z = launch.grid
    indices = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)][:blocks]
    return [Block(program, code, launch, index, memory).run(schedule + i, steps) for i, index in enumerate(indices)]
