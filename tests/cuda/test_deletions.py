"""The emulator's own test: a kernel without one of its waits, arrivals or fences is found to be faulty.

What is not found is harmless, and listed with the reason.
"""

import functools

import jax.numpy as jnp
import pytest
from emulator.compiled import Kernel, emulated
from emulator.faults import Fault
from hopper_operands import columns_products, rows_product, wide_rows, widened_product
from matmuls import FP8

from perparam.policies.matmul import hopper_quantize

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]

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

TWINS = "the same instruction stands beside it; without both it is caught"
EITHER = "each thread fences its writes before the threads meet, or one does after it: without both it is caught"

PARTS = "the next part of a kernel is widened in other registers of PTX, and the last wait is for all parts"

ANY = "any"
HARMLESS = {
    ("expect", "sync", "load"): "a phase ends only when all threads have arrived, with all bytes they expect",
    ("init fence", "sync", "sync"): TWINS,
    ("sync", "sync", "sync"): TWINS,
    ("sync", "sync", "expect"): TWINS,
    ("sync", "sync", "write"): TWINS,
    ("store wait", "sync", "sync"): TWINS,
    ("wgmma fence", "wgmma fence", "wgmma"): TWINS,
    ("read", "wgmma fence", "wgmma fence"): TWINS,
    ("wgmma commit", "wgmma wait", "read"): PARTS,
    ("wgmma", "wgmma commit", "wgmma wait", "read"): PARTS,
    ("wait", "wgmma fence", "read"): "another stands before the product, after the operand is in registers",
    ("write", "sync", "proxy fence"): EITHER,
    ("proxy fence", "sync", "store"): EITHER,
    ("store commit", "sync", "write"): "of a block with one tile: nobody has used the memory of results before",
    ("read", "sync", "write"): "what is written lies apart from what was read",
    ("write", "sync", "sync"): "what is written next lies apart from what was written",
    ("arrive", "store commit", ANY): "no store is in the group, or one that was committed before",
    ("store", "store commit", "end"): "in a loop: the commit of the next step contains the store",
    ("store", "store commit", "store"): "the group of the next store contains this one",
    ("store wait", "sync", "end"): "the last instruction",
    ("load", "wait", "wait"): "the next waits are for later steps, which end after this one",
    ("wait", "wait", "wait"): "the end of a pipeline: later steps end after this one, or nothing is copied any more",
    ("cluster wait", "sync", "sync"): TWINS,
    ("read", "proxy fence", "sync"): "in a step that writes nothing: only the meeting of the threads matters",
    ("wgmma commit", "proxy fence", "sync"): "in a step that writes nothing: only the meeting of the threads matters",
}
"""Deletions that may leave a right program, and why: the second instruction between its neighbours of `KINDS`."""

HARMLESS_ALONE = {
    ("wait", "wait", "end"): "the end of a pipeline: nothing is copied any more",
    ("wait", "wait", "store wait"): "the end of a pipeline: nothing is copied any more",
}
"""The same for a thread block without a partner, whose last arrivals would otherwise come after its end."""

SCHEDULES = 3


def kind(opcode: str) -> str | None:
    if opcode.startswith("cp.async.bulk.tensor"):
        return "store" if ".global.shared" in opcode else "load"
    return next((name for start, name in KINDS.items() if opcode.startswith(start)), None)


class Case:
    """A compiled kernel with operands, and what it computes in one thread block, or in a cluster of two."""

    def __init__(self, kernel: Kernel, arrays):
        self.kernel, self.arrays = kernel, arrays
        self.harmless = HARMLESS if "multicast" in kernel.text else HARMLESS | HARMLESS_ALONE
        self.expected = self.run(kernel.program, 0)
        named = [(i, kind(ins.opcode)) for i, ins in enumerate(kernel.program.instructions)]
        self.ordered = [(i, name) for i, name in named if name]

    def run(self, program, schedule):
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

    def contexts(self, length: int):
        """Yields the positions and names of `length` neighbours."""
        ends = [(-1, "start"), *self.ordered, (-1, "end"), (-1, "end")]
        for i in range(len(ends) - length + 1):
            positions, names = zip(*ends[i : i + length], strict=True)
            yield positions, names


def compile_case(run) -> Case:
    found = []
    with emulated(lambda kernel, arrays: found.append((kernel, [array.copy() for array in arrays]))):
        run()
    return Case(*found[0])


CASES = {
    "rows": lambda: rows_product(128, 256, 640, "bfloat16", processors=1),
    "rows, clusters": lambda: rows_product(256, 256, 640, "bfloat16", processors=2),
    "columns W8A16": lambda: columns_products(64, [128 * 100], 128 * 8),
    "columns W8A16, split": lambda: columns_products(8, [128], 512, "float16"),
    "columns W8A8": lambda: columns_products(64, [128 * 100], 128 * 10, FP8),
    "widened": lambda: widened_product(136, 256, 640, result="bfloat16", processors=1),
    "widened, clusters": lambda: widened_product(136, 256, 640, result="bfloat16", processors=2),
    "quantisation": lambda: hopper_quantize.quantize(jnp.asarray(wide_rows(64, 128, "bfloat16"))),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request, compiler) -> Case:
    return compile_case(CASES[request.param])


def test_each_deletion_is_caught_or_harmless(case):
    wrong = {}
    for (_, position, *_), names in case.contexts(4):
        listed = any(key in case.harmless for key in (names, names[:3], (*names[:2], ANY)))
        if names[1] in DELETED and not listed and not case.caught(position):
            wrong[position] = (names, str(case.kernel.program.instructions[position]))
    assert not wrong


def test_twins_and_both_sides_of_a_fence_are_caught_together(case):
    found = 0
    for positions, names in case.contexts(5):
        if names == ("write", "sync", "proxy fence", "sync", "store"):
            assert case.caught(positions[1], positions[3])
            found += 1
    names = [name for _, name in case.ordered]
    for start, name in enumerate(names):
        before = names[start - 1]
        if name == "wgmma fence" != before or (name == "sync" and before in ("init fence", "store wait")):
            end = next(i for i in range(start, len(names) + 1) if i == len(names) or names[i] != name)
            following = names[end] if end < len(names) else "end"
            if following == "wgmma" or (name == "sync" and following != "end"):
                assert case.caught(*(position for position, _ in case.ordered[start:end])), (before, name)
                found += 1
    assert found > 1


def test_a_kernel_without_all_of_a_kind_is_caught(case):
    for deleted in DELETED:
        positions = [position for position, name in case.ordered if name == deleted]
        assert not positions or case.caught(*positions), deleted
