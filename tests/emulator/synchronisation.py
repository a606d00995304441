"""Instructions that order what threads do: barriers in shared memory, meetings of threads, and fences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .barriers import Barrier
from .faults import Fault, Misaligned, Race
from .operands import RANK_SHIFT, THREADS, U32, Effect, address, one_thread, source, uniform
from .ptx import Instruction

if TYPE_CHECKING:
    from .machine import Block
    from .warpgroup import Warpgroup


def _init(ins: Instruction) -> Effect:
    place, count = address(ins.operands[0]), source(ins.operands[1], U32)

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        thread = one_thread(mask, ins)
        if thread is not None:
            block, at, warp = group.block, int(place(group)[thread]), int(group.warp_of[thread])
            if at % 8:
                raise Misaligned(f"barrier at shared address {at:#x}")
            if at in block.barriers:
                raise Fault(f"the barrier at {at:#x} is initialised twice")
            agent, initialised = block.clocks.copies(block.rank, len(block.barriers)), block.clocks.initialise(warp)
            told = block.clocks.release(np.array([warp]))
            block.barriers[at] = Barrier(agent, int(count(group)[thread]), (warp, *initialised), told)
        yield

    return effect


def locate(group: Warpgroup, at: int) -> tuple[Block, int]:
    """Returns the block of the cluster in whose shared memory an address is, and the address as this block has it."""
    rank, block = at >> RANK_SHIFT, group.block
    if rank and rank - 1 != block.rank:
        block = block.cluster.blocks[rank - 1]
        if block.is_over:
            raise Fault(f"the thread block {block.index}, whose shared memory is accessed, has ended")
    return block, at & ((1 << RANK_SHIFT) - 1)


def barrier_at(group: Warpgroup, at: int, mask: np.ndarray) -> Barrier:
    """Returns the barrier at an address, which the threads of the mask know to be initialised."""
    block, place = locate(group, at)
    if place not in block.barriers:
        raise Fault(f"no barrier is initialised at shared address {place:#x} of block {block.index}")
    barrier = block.barriers[place]
    _, agent, clock = barrier.initialiser
    if (block.clocks.known[group.warp_of[mask], agent] < clock).any():
        raise Race(f"the barrier at {place:#x} is used by threads that do not wait for its initialisation")
    return barrier


def _arrive(ins: Instruction) -> Effect:
    place = address(ins.operands[1])
    number = source(ins.operands[2] if len(ins.operands) > 2 else "1", U32)
    expects = "expect_tx" in ins.parts

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        places, clocks = place(group), group.block.clocks
        for at in np.unique(places[mask]).tolist():  # threads may arrive at barriers of different blocks
            some = mask & (places == at)
            barrier, warps = barrier_at(group, at, some), np.unique(group.warp_of[some])
            total, told = int(number(group)[some].sum()), clocks.release(warps)
            barrier.arrive(int(some.sum()) if expects else total, total if expects else 0, told)
            block, _ = locate(group, at)
            if block is not group.block:
                block.visits.update({int(warp): int(told.known[clocks.agent[warp]]) for warp in warps})

    return effect


def _wait(ins: Instruction) -> Effect:
    place, parity = address(ins.operands[1]), source(ins.operands[2], U32)

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[Callable[[], bool]]:
        at = uniform(place(group), mask, ins)
        if at >> RANK_SHIFT:
            raise Fault(f"{ins} waits at a barrier of another thread block")
        barrier = barrier_at(group, at, mask)
        phase = uniform(parity(group), mask, ins) & 1
        yield lambda: barrier.is_complete(phase)
        warps, clocks = np.unique(group.warp_of[mask]), group.block.clocks
        clocks.acquire(warps, barrier.told)
        clocks.learn(warps, barrier.agent, barrier.phase)
        group.write(ins.operands[0], np.ones(THREADS, bool), mask)

    return effect


def _synchronise(ins: Instruction) -> Effect:
    name = source(ins.operands[0], U32)
    number = source(ins.operands[1], U32) if len(ins.operands) > 1 else None

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[Callable[[], bool]]:
        block = group.block
        threads = int(number(group)[0]) if number else block.threads
        key = (uniform(name(group), mask, ins), threads)
        met = block.meetings.setdefault(key, [])
        generation = met[-1] if met and len(met[-1]) < threads // THREADS else []
        if not generation:
            met.append(generation)
        if group in generation:
            raise Fault(f"a warpgroup arrives twice at {ins}")
        if threads == THREADS and block.owners.setdefault(key, group) is not group:
            raise Race(f"{ins}: two warpgroups use the same barrier of {THREADS} threads")
        generation.append(group)
        complete = threads // THREADS
        if len(generation) == complete:
            warps = np.concatenate([member.warps for member in generation])
            block.clocks.acquire(warps, block.clocks.release(warps))
        yield lambda: len(generation) == complete

    return effect


def _cluster_arrive(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        _require_all(mask, ins)
        clocks = group.block.clocks
        told = clocks.relaxed(group.warps) if "relaxed" in ins.parts else clocks.release(group.warps)
        group.block.cluster.barrier.arrive(group, told)

    return effect


def _cluster_wait(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[Callable[[], bool]]:
        _require_all(mask, ins)
        complete, told = group.block.cluster.barrier.wait(group)
        yield complete
        for knowledge in told:
            group.block.clocks.acquire(group.warps, knowledge)

    return effect


def _require_all(mask: np.ndarray, ins: Instruction) -> None:
    if not mask.all():
        raise Fault(f"some threads of a warpgroup do not execute {ins}")


def _fence(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        block = group.block
        warps = np.unique(group.warp_of[mask])
        if "mbarrier_init" in ins.parts:
            for barrier in block.barriers.values():
                barrier.fenced |= barrier.initialiser[0] in warps
            block.clocks.publish(warps)
        elif "async" in ins.parts:
            block.clocks.fence(warps)
        yield

    return effect


TABLE = {
    "mbarrier.init": _init,
    "mbarrier.arrive": _arrive,
    "mbarrier.try_wait.parity": _wait,
    "bar.sync": _synchronise,
    "barrier.sync": _synchronise,
    "barrier.cluster.arrive": _cluster_arrive,
    "barrier.cluster.wait": _cluster_wait,
    "fence": _fence,
}
"""Functions that make the effect of an instruction, by the start of its opcode."""
