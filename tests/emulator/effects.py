"""Instructions that access memory, synchronise threads or start something asynchronous.

Each is a generator: what it yields is None, or a condition that the warpgroup waits for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import BF16, DTYPES, THREADS, address, source
from .barriers import Barrier
from .faults import Fault, Misaligned, Race
from .ptx import Instruction, inside
from .tensor_maps import NO_SWIZZLE, swizzled

if TYPE_CHECKING:
    from .machine import Warpgroup

Effect = Callable[["Warpgroup", np.ndarray], Iterator[Callable[[], bool] | None]]
"""Runs an instruction in the threads of a mask (threads,)."""

U32, U64, BOOL = (np.dtype(kind) for kind in (np.uint32, np.uint64, bool))


def _one(mask: np.ndarray, ins: Instruction) -> int | None:
    """Returns the only thread of a mask, or None if there is none."""
    if mask.sum() > 1:
        raise Fault(f"{mask.sum()} threads of a warpgroup execute {ins}")
    return int(mask.argmax()) if mask.any() else None


def _access(ins: Instruction) -> tuple[int, int]:
    """Returns the number of elements that a load or store has for each thread, and their bytes."""
    count = next((int(part[1:]) for part in ins.parts if re.fullmatch(r"v\d", part)), 1)
    return count, DTYPES[ins.parts[-1]].itemsize


def _load(ins: Instruction) -> Effect:
    count, size = _access(ins)
    targets, place = inside(ins.operands[0]), address(ins.operands[1])
    shared = ins.parts[1].startswith("shared")

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        addresses = place(group)[mask, None] + np.arange(count * size)
        data = np.zeros((THREADS, count * size), np.uint8)
        if mask.any():
            memory = group.block.shared.load(group.warp_of[mask], addresses) if shared else None
            data[mask] = group.block.memory.read(addresses) if memory is None else memory
        for i, target in enumerate(targets):
            group.write(target, data[:, i * size : (i + 1) * size].copy().view(f"uint{8 * size}")[:, 0], mask)

    return effect


def _store(ins: Instruction) -> Effect:
    count, size = _access(ins)
    place = address(ins.operands[0])
    sources = [source(operand, np.dtype(f"uint{8 * size}")) for operand in inside(ins.operands[1])]
    shared = ins.parts[1].startswith("shared")

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        addresses = place(group)[mask, None] + np.arange(count * size)
        data = np.stack([read(group) for read in sources], axis=1).view(np.uint8)[mask]
        if mask.any() and shared:
            group.block.shared.store(group.warp_of[mask], addresses, data)
        elif mask.any():
            group.block.memory.write(addresses, data)

    return effect


def _matrices(ins: Instruction) -> Effect:
    """Loads or stores of 8×8 matrices: eight threads have the addresses of a matrix' rows, four the values of a row."""
    loads = ins.parts[0] == "ldmatrix"
    registers, place = (ins.operands[0], ins.operands[1]) if loads else (ins.operands[1], ins.operands[0])
    names, at = inside(registers), address(place)
    sources = [] if loads else [source(name, U32) for name in names]
    if ins.parts[-1] != "b16" or "m8n8" not in ins.parts:
        raise NotImplementedError(str(ins))
    count, transposed = len(names), "trans" in ins.parts

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        rows = at(group).reshape(4, 32)[:, : 8 * count].reshape(-1, 1) + np.arange(16)
        warps, shared = np.repeat(group.warps, 8 * count), group.block.shared
        if loads:
            data = shared.load(warps, rows).view(np.uint16).reshape(4, count, 8, 8)
            data = np.ascontiguousarray(data.swapaxes(2, 3) if transposed else data)
            for i, name in enumerate(names):
                group.write(name, data[:, i].copy().view(np.uint32).reshape(THREADS), mask)
        else:
            values = np.stack([read(group).reshape(4, 32) for read in sources], axis=1)
            data = values.view(np.uint16).reshape(4, count, 8, 8)
            data = np.ascontiguousarray(data.swapaxes(2, 3) if transposed else data)
            shared.store(warps, rows, data.view(np.uint8).reshape(-1, 16))

    return effect


def _param(ins: Instruction) -> Effect:
    (name,) = inside(ins.operands[1])

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        group.write(ins.operands[0], np.full(THREADS, group.block.argument(name), np.uint64))
        yield

    return effect


def _init(ins: Instruction) -> Effect:
    place, count = address(ins.operands[0]), source(ins.operands[1], U32)

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        thread = _one(mask, ins)
        if thread is not None:
            block, at, warp = group.block, int(place(group)[thread]), group.warp_of[[thread]]
            if at % 8:
                raise Misaligned(f"barrier at shared address {at:#x}")
            if at in block.barriers:
                raise Fault(f"the barrier at {at:#x} is initialised twice")
            told = block.clocks.release(warp)
            block.barriers[at] = Barrier(block.clocks, len(block.barriers), int(count(group)[thread]), told)
            block.initialised[at] = (int(warp[0]), int(told.known[warp[0]]))
        yield

    return effect


def _barrier(group: Warpgroup, at: int, mask: np.ndarray) -> Barrier:
    """Returns the barrier at an address, which the threads of the mask know to be initialised."""
    block = group.block
    if at not in block.barriers:
        raise Fault(f"no barrier is initialised at shared address {at:#x}")
    warp, clock = block.initialised[at]
    if (block.clocks.known[group.warp_of[mask], warp] < clock).any():
        raise Race(f"the barrier at {at:#x} is used by threads that do not wait for its initialisation")
    return block.barriers[at]


def _uniform(values: np.ndarray, mask: np.ndarray, ins: Instruction) -> int:
    if len(found := set(values[mask].tolist())) != 1:
        raise Fault(f"threads of a warpgroup have different operands in {ins}")
    return int(found.pop())


def _arrive(ins: Instruction) -> Effect:
    place = address(ins.operands[1])
    number = source(ins.operands[2] if len(ins.operands) > 2 else "1", U32)
    expects = "expect_tx" in ins.parts

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        if mask.any():
            barrier = _barrier(group, _uniform(place(group), mask, ins), mask)
            total = int(number(group)[mask].sum())
            told = group.block.clocks.release(np.unique(group.warp_of[mask]))
            barrier.arrive(int(mask.sum()) if expects else total, total if expects else 0, told)

    return effect


def _wait(ins: Instruction) -> Effect:
    place, parity = address(ins.operands[1]), source(ins.operands[2], U32)

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[Callable[[], bool]]:
        barrier = _barrier(group, _uniform(place(group), mask, ins), mask)
        phase = _uniform(parity(group), mask, ins) & 1
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
        key = (_uniform(name(group), mask, ins), threads)
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


def _fence(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        block = group.block
        warps = np.unique(group.warp_of[mask])
        if "mbarrier_init" in ins.parts:
            for at, (warp, _) in block.initialised.items():
                block.barriers[at].fenced |= warp in warps
        elif "async" in ins.parts:
            block.clocks.fence(warps)
        yield

    return effect


def _coordinates(operand: str) -> tuple[Callable, Callable]:
    """Returns functions that read the address of a tensor map and the coordinates of a box, slowest first."""
    pointer, places = inside(operand)
    map_address, sources = source(pointer, U64), [source(place, np.dtype(np.int32)) for place in inside(places)]

    def start(group: Warpgroup, thread: int) -> tuple[int, ...]:
        return tuple(int(read(group)[thread]) for read in reversed(sources))

    return map_address, start


def _copy_in(ins: Instruction) -> Effect:
    place, bar = address(ins.operands[0]), address(ins.operands[2])
    if "multicast::cluster" in ins.parts:
        raise NotImplementedError(str(ins))
    map_address, start = _coordinates(ins.operands[1])

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        thread = _one(mask, ins)
        if thread is None:
            return
        block = group.block
        tensor, box = block.tensor_map(int(map_address(group)[thread])), start(group, thread)
        at, warp = int(place(group)[thread]), group.warp_of[[thread]]
        barrier = _barrier(group, int(bar(group)[thread]), mask)
        if not barrier.fenced:
            raise Race(f"{ins}: the initialisation of its barrier was not made visible to copies")
        block.record.loads.append((at, tensor))
        places = tensor.places(at)
        block.shared.start_write(warp, barrier.agent, barrier.phase + 1, places, "a copy writes")

        def arrive() -> None:
            block.shared.poke(places, tensor.load(block.memory, box))
            barrier.receive(tensor.bytes)

        block.in_flight.append(arrive)

    return effect


def _copy_out(ins: Instruction) -> Effect:
    tensor_copy = "tensor" in ins.parts
    place = address(ins.operands[1])
    map_address, start = _coordinates(ins.operands[0]) if tensor_copy else (address(ins.operands[0]), None)
    size = None if tensor_copy else source(ins.operands[2], U32)

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        thread = _one(mask, ins)
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
        (group.products if ins.parts[0] == "wgmma" else group.bulk).commit()
        yield

    return effect


def _bulk_wait(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        done = group.bulk.finish(int(ins.operands[0]))
        if group.bulk.warp is not None:
            clocks = group.block.clocks
            clocks.learn(np.array([group.bulk.warp]), clocks.stores(group.bulk.warp), done)

    return effect


def _products_wait(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        done = group.products.finish(int(ins.operands[0]))
        clocks = group.block.clocks
        clocks.learn(group.warps, clocks.products(group.number), done)

    return effect


def _products_fence(ins: Instruction) -> Effect:
    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        group.unfenced.clear()
        yield

    return effect


def operand_places(descriptor: int, rows: int, transposed: bool = False) -> np.ndarray:
    """Returns the shared addresses (rows, 32) of an operand of a matrix product: 32 bytes of each row, along K.

    Of a transposed operand, with 16-bit elements, it is M or N that is contiguous: rows of the swizzle's width in bytes
    are 8 steps of K, after which the next 8 begin `stride` bytes, and the next such part of M or N `leading` bytes on.
    """
    start, stride = (descriptor & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    leading = ((descriptor >> 16) & 0x3FFF) << 4
    span = {0: NO_SWIZZLE, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    if span == NO_SWIZZLE:
        raise NotImplementedError("operands of matrix products without swizzle")
    if descriptor >> 49 & 7 or start & 7 * span:
        raise Misaligned(f"an operand of a matrix product begins within the pattern of its swizzle, at {start:#x}")
    row, column = np.arange(rows)[:, None], np.arange(32)
    if transposed:
        step, byte = column // 2, 2 * row + column % 2
        return swizzled(start + byte // span * leading + step // 8 * stride + step % 8 * span + byte % span, span)
    return swizzled(start + row // 8 * stride + row % 8 * span + column, span)


_LANE, _PAIR = np.arange(THREADS) % 32 // 4, np.arange(THREADS) % 4
_ROW = 16 * (np.arange(THREADS) // 32) + _LANE
"""The row of a thread's first element in a result or operand in registers (PTX, wgmma, figures of fragments)."""


def _product(ins: Instruction) -> Effect:
    match = re.search(r"m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)$", ins.opcode)
    if not match:
        raise NotImplementedError(str(ins))
    columns, dtypes = int(match[1]), (DTYPES[match[3]], DTYPES[match[4]])
    results, left, right = inside(ins.operands[0]), ins.operands[1], ins.operands[2]
    accumulates, settings = source(ins.operands[3], BOOL), ins.operands[4:]
    fragments = inside(left) if left[0] == "{" else ()
    transposed = tuple(flag != "0" for flag in (settings[2:] or ("0", "0")))
    if settings[:2] != ("1", "1") or (transposed[0] and not fragments):
        raise NotImplementedError(f"negated operands, or a transposed one at the left: {ins}")
    reads = [source(fragment, U32) for fragment in fragments]
    descriptors = [source(operand, U64) for operand in ((right,) if fragments else (left, right))]
    within = 4 // dtypes[0].itemsize  # elements of the left operand in a register

    def left_in_registers(group: Warpgroup) -> np.ndarray:
        a = np.zeros((64, 32 // dtypes[0].itemsize), np.float32)
        for i, read in enumerate(reads):
            values = read(group).copy().view(dtypes[0]).reshape(THREADS, within).astype(np.float32)
            for j in range(within):
                a[_ROW + 8 * (i % 2), within * _PAIR + 4 * within * (i // 2) + j] = values[:, j]
        return a

    def effect(group: Warpgroup, mask: np.ndarray) -> Iterator[None]:
        yield
        if not mask.all():
            raise Fault(f"some threads of a warpgroup do not execute {ins}")
        if unfenced := group.unfenced & {*results, *fragments}:
            raise Race(f"{sorted(unfenced)[0]} was written without wgmma.fence before {ins}")
        block, queue = group.block, group.products
        found = [int(read(group)[0]) for read in descriptors]
        places = [operand_places(found[-1], columns, transposed[-1])]
        if not fragments:
            places.insert(0, operand_places(found[0], 64))
        agent = block.clocks.products(group.number)
        for operand in places:
            block.shared.start_read(
                group.warps, agent, queue.started + 1, operand.reshape(-1), "a matrix product reads"
            )
        block.record.products.append((ins.opcode, {descriptor >> 62 for descriptor in found}))
        a_registers = left_in_registers(group) if fragments else None
        keep = accumulates(group).all()

        def compute() -> None:
            b = block.shared.peek(places[-1]).view(dtypes[1]).astype(np.float64)
            a = block.shared.peek(places[0]).view(dtypes[0]) if a_registers is None else a_registers
            with np.errstate(all="ignore"):
                product = (a.astype(np.float64) @ b.T).astype(np.float32)
                for i, name in enumerate(results):
                    term = product[_ROW + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * _PAIR + i % 2]
                    old = group.registers[name].view(np.float32) if keep else np.float32(0)
                    group.registers[name] = (old + term).astype(np.float32).view(np.uint32)

        queue.open.append(compute)
        queue.written.update(results)
        queue.read.update(fragments)

    return effect


_TABLE: tuple[tuple[str, Callable[[Instruction], Effect]], ...] = (
    ("ld.param", _param),
    ("ld.shared", _load),
    ("ld.global", _load),
    ("st.shared", _store),
    ("st.global", _store),
    *((f"ld.{of}", _load) for of in "bv"),  # of global memory, by generic addresses
    *((f"st.{of}", _store) for of in "bv"),
    ("ldmatrix", _matrices),
    ("stmatrix", _matrices),
    ("mbarrier.init", _init),
    ("mbarrier.arrive", _arrive),
    ("mbarrier.try_wait.parity", _wait),
    ("bar.sync", _synchronise),
    ("barrier.sync", _synchronise),
    ("fence", _fence),
    ("cp.async.bulk.commit_group", _commit),
    ("cp.async.bulk.wait_group", _bulk_wait),
    ("cp.async.bulk.tensor", _copy_in),
    ("cp.async.bulk.global", _copy_out),
    ("wgmma.fence", _products_fence),
    ("wgmma.commit_group", _commit),
    ("wgmma.wait_group", _products_wait),
    ("wgmma.mma_async", _product),
)


def compile_effect(ins: Instruction) -> Effect | None:
    """Returns what an instruction does to a warpgroup and its surroundings, or None if it is not one of this file."""
    if ins.opcode.startswith("cp.async.bulk.tensor") and ".global.shared" in ins.opcode:
        return _copy_out(ins)
    return next((make(ins) for start, make in _TABLE if ins.opcode.startswith(start)), None)


assert BF16 in DTYPES.values()
