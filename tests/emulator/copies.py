"""Instructions that copy boxes and rows between global and shared memory asynchronously."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault, Misaligned, Race
from .operands import RANK_SHIFT, U16, U32, U64, Effect, address, one_thread, source
from .ptx import Instruction, inside
from .synchronisation import barrier_at

if TYPE_CHECKING:
    from .warpgroup import Warpgroup


def _coordinates(operand: str) -> tuple[Callable, Callable]:
    """Returns functions that read the address of a tensor map and the coordinates of a box, slowest first."""
    pointer, places = inside(operand)
    map_address, sources = source(pointer, U64), [source(place, np.dtype(np.int32)) for place in inside(places)]

    def start(group: Warpgroup, thread: int) -> tuple[int, ...]:
        return tuple(int(read(group)[thread]) for read in reversed(sources))

    return map_address, start


def _copy_in(ins: Instruction) -> Effect:
    place, bar = address(ins.operands[0]), address(ins.operands[2])
    map_address, start = _coordinates(ins.operands[1])
    blocks = source(ins.operands[3], U16) if "multicast::cluster" in ins.parts else None

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        thread = one_thread(mask, ins)
        if thread is None:
            return
        block, warp = group.block, group.warp_of[[thread]]
        tensor, box = block.tensor_map(int(map_address(group)[thread])), start(group, thread)
        at, bar_at = int(place(group)[thread]), int(bar(group)[thread])
        if at >> RANK_SHIFT or bar_at >> RANK_SHIFT:
            raise NotImplementedError(f"{ins}: a copy to the shared memory of another block alone")
        block.record.loads.append((at, tensor))
        block.record.boxes.append(box)
        ranks = [block.rank] if blocks is None else _ranks(int(blocks(group)[thread]), block.cluster_size, ins)
        for rank in ranks:  # in each, the data and the bytes that the barrier counts are at the same addresses
            barrier = barrier_at(group, bar_at + (rank + 1 << RANK_SHIFT), mask)
            if not barrier.fenced:
                raise Race(f"{ins}: the initialisation of its barrier was not made visible to copies")
            target, places = block.cluster.blocks[rank], tensor.places(at)
            target.shared.start_write(warp, barrier.agent, barrier.phase + 1, places, "a copy writes")
            target.expect(places, barrier, tensor, box)

    return effect


def _ranks(bits: int, size: int, ins: Instruction) -> list[int]:
    if bits >> size:
        raise Fault(f"{ins}: the mask {bits:#b} of blocks, of which a cluster has {size}")
    return [rank for rank in range(size) if bits >> rank & 1]


def _tensor_copy(ins: Instruction) -> Effect:
    return _copy_out(ins) if ".global.shared" in ins.opcode else _copy_in(ins)


def _copy_out(ins: Instruction) -> Effect:
    tensor_copy = "tensor" in ins.parts
    place = address(ins.operands[1])
    map_address, start = _coordinates(ins.operands[0]) if tensor_copy else (address(ins.operands[0]), None)
    size = None if tensor_copy else source(ins.operands[2], U32)

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        thread = one_thread(mask, ins)
        if thread is None:
            return
        block, at, warp = group.block, int(place(group)[thread]), int(group.warp_of[thread])
        target = int(map_address(group)[thread])
        if start is not None:
            tensor, box = block.tensor_map(target), start(group, thread)
            block.record.stores.append((at, tensor))
            places = tensor.places(at)
            write = lambda data: tensor.store(block.memory, box, data)  # noqa: E731
        else:
            assert size is not None
            count = int(size(group)[thread])
            if at % 16 or target % 16 or count % 16:
                raise Misaligned(f"{ins}: {count} bytes from {at:#x} to {target:#x}, which have to be multiples of 16")
            places = at + np.arange(count)
            write = lambda data: block.memory.write(target + np.arange(count), data)  # noqa: E731
        agent, clock = block.clocks.stores(warp), group.bulk.started + 1
        block.shared.start_read(np.array([warp]), agent, clock, places, "an asynchronous store reads")
        group.bulk.open.append(lambda: write(block.shared.peek(places)))
        group.bulk.warp = warp

    return effect


def _commit(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        group.bulk.commit()
        yield

    return effect


def _wait(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        done = group.bulk.finish(int(ins.operands[0]))
        if group.bulk.warp is not None:
            clocks = group.block.clocks
            clocks.learn(np.array([group.bulk.warp]), clocks.stores(group.bulk.warp), done)

    return effect


TABLE = {
    "cp.async.bulk.commit_group": _commit,
    "cp.async.bulk.wait_group": _wait,
    "cp.async.bulk.tensor": _tensor_copy,
    "cp.async.bulk.global": _copy_out,
}
"""Functions that make the effect of an instruction, by the start of its opcode."""
