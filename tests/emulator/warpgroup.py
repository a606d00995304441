"""A warpgroup: 128 threads that execute the same instructions, with their registers and asynchronous work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault, Race, Unfinished
from .operands import THREADS

if TYPE_CHECKING:
    from .machine import Block


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


class Warpgroup:
    """128 threads of a thread block; their warps are numbered through the cluster."""

    def __init__(self, block: Block, number: int):
        self.block, self.number = block, number
        self.warps = block.rank * (block.threads // 32) + 4 * number + np.arange(4)
        self.warp_of = np.repeat(self.warps, 32)
        self.registers: dict[str, np.ndarray] = {}
        self.products, self.bulk = Queue(), Queue()
        self.unfenced: set[str] = set()
        self.mask: np.ndarray | None = None

    def special(self, name: str) -> np.ndarray:
        """Returns a register that the hardware sets, (threads,)."""
        kind, _, axis = name[1:].partition(".")
        if kind == "tid":
            return (THREADS * self.number + np.arange(THREADS)) * (axis == "x")
        block, launch = self.block, self.block.launch
        if kind == "cluster_ctarank":
            return np.full(THREADS, block.rank)
        values = {"ntid": (block.threads, 1, 1), "ctaid": block.index, "nctaid": launch.grid}
        values |= {"cluster_ctaid": block.place, "cluster_nctaid": launch.cluster}
        return np.full(THREADS, values[kind]["xyz".index(axis)])

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
        """Runs the program; yields where other warpgroups may go on, None or a condition to wait for."""
        position, code = 0, self.block.code
        everywhere = np.ones(THREADS, bool)
        while True:
            action = code[position]
            ins = action.instruction
            self.block.position = position
            position += 1
            if ins.opcode == "ret":
                break
            if self.products.written and not action.reads.isdisjoint(self.products.written):
                raise Race(f"{ins} reads the result of a matrix product that is in flight")
            mask = action.mask(self)
            mask = everywhere if mask is None else mask
            if ins.target is not None:
                if mask.any() and not mask.all():
                    raise Fault(f"threads of a warpgroup take different branches: {ins}")
                if mask.all():
                    position = ins.target
            elif action.step is not None:
                self.mask = mask
                action.step(self)
                self.mask = None
            elif action.effect is not None:
                yield from action.effect(self, mask)
        if not self.products.is_empty or not self.bulk.is_empty:
            raise Unfinished("a warpgroup ends while its asynchronous stores or products are in flight")
