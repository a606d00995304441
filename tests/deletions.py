"""Compiled kernels without some of the instructions that order accesses, which the emulator has to find faulty."""

import functools
from collections.abc import Iterator, Mapping

import numpy as np
from emulator.compiled import Kernel, emulated
from emulator.faults import Fault

KINDS = {
    "mbarrier.try_wait": "wait",
    "mbarrier.arrive.expect_tx": "expect",
    "mbarrier.arrive": "arrive",
    "mbarrier.init": "init",
    "bar.sync": "sync",
    "barrier.cluster.arrive": "cluster arrive",
    "barrier.cluster.wait": "cluster wait",
    "fence.mbarrier_init": "init fence",
    "fence.proxy.async": "proxy fence",
    "wgmma.fence": "wgmma fence",
    "wgmma.mma_async": "wgmma",
    "wgmma.commit_group": "wgmma commit",
    "wgmma.wait_group": "wgmma wait",
    "cp.async.bulk.commit_group": "store commit",
    "cp.async.bulk.wait_group": "store wait",
    "cp.async.bulk.global": "store",
    "ld.shared": "read",
    "st.shared": "write",
    "ldmatrix": "read",
    "stmatrix": "write",
    "ret": "end",
}
"""Short names of the instructions that order accesses, and of accesses, by the start of their opcodes."""

DELETED = ("wait", "expect", "arrive", "sync", "init fence", "proxy fence", "wgmma fence", "wgmma commit", "wgmma wait")
DELETED += ("store commit", "store wait", "cluster arrive", "cluster wait")

ANY = "any"

TWINS = "the same instruction stands beside it; without both it is caught"
EITHER = "each thread fences its writes before the threads meet, or one does after it: without both it is caught"

SCHEDULES = 3


def kind(opcode: str) -> str | None:
    if opcode.startswith("cp.async.bulk.tensor"):
        return "store" if ".global.shared" in opcode else "load"
    return next((name for start, name in KINDS.items() if opcode.startswith(start)), None)


class Case:
    """A compiled kernel with operands, and what it computes in one thread block, or in a cluster of two.

    harmless  deletions that may leave a right program, and why: the second of some neighbours of `KINDS`
    unneeded  kinds of which a right program needs none
    """

    def __init__(
        self,
        kernel: Kernel,
        arrays: list[np.ndarray],
        harmless: Mapping[tuple[str, ...], str],
        unneeded: frozenset[str] = frozenset(),
    ):
        self.kernel, self.arrays, self.harmless, self.unneeded = kernel, arrays, harmless, unneeded
        self.expected = self.run(kernel.program, 0)
        named = [(i, kind(ins.opcode)) for i, ins in enumerate(kernel.program.instructions)]
        self.ordered = [(i, name) for i, name in named if name]

    def run(self, program, schedule: int) -> bytes:
        arrays = [array.copy() for array in self.arrays]
        self.kernel.run(arrays, program, schedule=schedule, clusters=1)
        return b"".join(array.tobytes() for array in arrays)

    def caught(self, *positions: int) -> bool:
        """Whether the kernel without some instructions is faulty, or wrong, in one of the schedules."""
        program = functools.reduce(lambda rest, i: rest.without(i), positions, self.kernel.program)
        try:
            return any(self.run(program, schedule) != self.expected for schedule in range(SCHEDULES))
        except Fault:
            return True

    def positions(self, name: str) -> list[int]:
        return [position for position, other in self.ordered if other == name]

    def neighbours(self, count: int) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
        """Yields the positions and names of `count` neighbours."""
        ends = [(-1, "start"), *self.ordered, (-1, "end"), (-1, "end")]
        for i in range(len(ends) - count + 1):
            positions, names = zip(*ends[i : i + count], strict=True)
            yield positions, names

    def assert_each_deletion_is_caught_or_harmless(self) -> None:
        wrong = {}
        for (_, position, *_), names in self.neighbours(4):
            listed = any(key in self.harmless for key in (names, names[:3], (*names[:2], ANY)))
            if names[1] in DELETED and not listed and not self.caught(position):
                wrong[position] = (names, str(self.kernel.program.instructions[position]))
        assert not wrong

    def assert_twins_are_caught_together(self) -> None:
        """Asserts that instructions are needed of which one is harmless to delete because others do the same."""
        groups = list(self._twins())
        assert groups
        for positions in groups:
            instructions = [str(self.kernel.program.instructions[i]) for i in positions]
            assert self.caught(*positions), (positions, instructions)

    def _twins(self) -> Iterator[list[int]]:
        """Yields the positions of instructions of which one is needed."""
        names = [name for _, name in self.ordered]

        def syncs(start: int, ends: tuple[str, ...]) -> list[int]:
            """Returns the positions of meetings from `start` to the first instruction of some kinds."""
            end = next(i for i in range(start, len(names)) if names[i] in ends)
            return [position for position, name in self.ordered[start:end] if name == "sync"]

        if "cluster wait" not in names:  # which orders the initialisation of barriers as well
            yield syncs(0, ("expect", "arrive", "wait"))
        for i, name in enumerate(names):
            if name == "proxy fence" and names[i - 2 : i] == ["write", "sync"]:
                yield syncs(i - 1, ("load", "store", "wgmma"))
            before, end = names[i - 1], next((j for j in range(i, len(names)) if names[j] != name), len(names))
            following = names[end] if end < len(names) else "end"
            fences = name == "wgmma fence" != before and following == "wgmma"
            if fences or (name == "sync" and before == "store wait" and following == "write"):
                yield [position for position, _ in self.ordered[i:end]]

    def assert_all_of_a_kind_are_needed(self) -> None:
        for deleted in DELETED:
            positions = self.positions(deleted)
            if positions:
                assert self.caught(*positions) == (deleted not in self.unneeded), deleted


def compile_kernel(run) -> tuple[Kernel, list[np.ndarray]]:
    """Returns the kernel that a function launches, and its operands and results as bytes."""
    found = []
    with emulated(lambda kernel, arrays: found.append((kernel, [array.copy() for array in arrays]))):
        run()
    (one,) = found
    return one
