"""Runs clusters of thread blocks: chooses at random which warpgroup goes on, and when copies arrive."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np

from . import host
from .barriers import Barrier, ClusterBarrier
from .clocks import Clocks
from .faults import Deadlock, Fault, Race, Unfinished
from .instructions import Action, compile_program
from .operands import THREADS
from .ptx import Program
from .shared import BASE, Shared
from .tensor_maps import Global, TensorMap
from .warpgroup import Warpgroup

LAZINESS = (0.5, 0.02, 0.98)
"""Probabilities with which a copy arrives before a warpgroup goes on, one for each schedule in turn."""

PACES = (1, 4, 32)
"""Weights of the warpgroups of a block, one of which is drawn for each block of a cluster: some fall far behind."""

_PARAMETERS = 1 << 60
"""Address of a parameter: no copy or load may take it for memory."""


@dataclasses.dataclass
class Record:
    """What a thread block did: `(address, tensor map)` of each copy, `(opcode, swizzle modes)` of each product.

    boxes  for each of `loads` the coordinates of the box that it reads
    """

    loads: list[tuple[int, TensorMap]] = dataclasses.field(default_factory=list)
    boxes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    stores: list[tuple[int, TensorMap]] = dataclasses.field(default_factory=list)
    products: list[tuple[str, set[int]]] = dataclasses.field(default_factory=list)
    is_complete: bool = True


class Block:
    """One thread block of a cluster.

    index    its place in the grid; place is that in the cluster, rank its number there
    visits   the clock of each warp of another block when it last arrived at one of this block's barriers
    is_over  whether all of its threads have ended
    """

    def __init__(self, cluster: Cluster, rank: int, place: tuple[int, int, int], origin: tuple[int, int, int]):
        self.cluster, self.rank, self.place = cluster, rank, place
        self.index = tuple(first + own for first, own in zip(origin, place, strict=True))
        self.program, self.code, self.launch = cluster.program, cluster.code, cluster.launch
        self.memory, self.threads, self.clocks = cluster.memory, cluster.program.threads, cluster.clocks
        self.shared = Shared(self.launch.shared, self.clocks, rank)
        self.barriers: dict[int, Barrier] = {}
        self.visits: dict[int, int] = {}
        self.meetings: dict[tuple[int, int], list[list[Warpgroup]]] = {}
        self.owners: dict[tuple[int, int], Warpgroup] = {}
        self.in_flight: list[Callable[[], None]] = []
        self.record, self.position, self.is_over = Record(), 0, False
        self.names = list(self.program.parameters)
        self.groups = [Warpgroup(self, number) for number in range(self.threads // THREADS)]

    @property
    def cluster_size(self) -> int:
        return len(self.cluster.blocks)

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

    def expect(self, places: np.ndarray, barrier: Barrier, tensor: TensorMap, box: tuple[int, ...]) -> None:
        """Lets a copy of a box arrive at addresses of shared memory, and at a barrier, at any time from now on."""

        def arrive() -> None:
            self.shared.poke(places, tensor.load(self.memory, box))
            barrier.receive(tensor.bytes)

        self.in_flight.append(arrive)

    def end(self) -> None:
        """Checks that nobody accesses the shared memory of the block any more, when all of its threads have ended."""
        self.is_over = True
        if self.in_flight or not all(barrier.is_clean for barrier in self.barriers.values()):
            raise Unfinished("the thread block ends with a copy in flight or a barrier in the middle of a phase")
        known = self.clocks.of_any(self.rank)
        for barrier in self.barriers.values():
            if barrier.copied and known[barrier.agent] < barrier.phase:
                raise Unfinished("the thread block ends without waiting for a copy to its shared memory")
        for warp, clock in self.visits.items():
            if known[self.clocks.agent[warp]] < clock:
                raise Race(f"the thread block ends, and does not wait for warp {warp}, which arrives at its barriers")


class Cluster:
    """Thread blocks that run at the same time and access each other's shared memory; often one alone."""

    def __init__(
        self,
        program: Program,
        code: list[Action],
        launch: host.Launch,
        origin: tuple[int, int, int],
        memory: Global,
    ):
        self.program, self.code, self.launch, self.memory = program, code, launch, memory
        x, y, z = launch.cluster
        self.clocks = Clocks(program.threads // 32, x * y * z)
        places = [(i, j, k) for k, j, i in itertools.product(range(z), range(y), range(x))]
        self.blocks = [Block(self, rank, place, origin) for rank, place in enumerate(places)]
        self.barrier = ClusterBarrier(sum(len(block.groups) for block in self.blocks))

    def run(self, schedule: int, steps: int | None = None) -> list[Record]:
        """Runs the blocks in one of the random schedules, and returns what each did; stops after `steps` of them."""
        chance, eager = random.Random(schedule), LAZINESS[schedule % len(LAZINESS)]
        paces = [chance.choice(PACES) for _ in self.blocks]
        running = [(group, group.run(), None) for block in self.blocks for group in block.groups]
        taken, block = 0, self.blocks[0]
        try:
            while running:
                taken += 1
                if steps is not None and taken > steps:
                    for block in self.blocks:
                        block.record.is_complete = False
                    break
                ready = [one for one in running if one[2] is None or one[2]()]
                receivers = [block for block in self.blocks if block.in_flight]
                if receivers and (not ready or chance.random() < eager):
                    copies = chance.choice(receivers).in_flight
                    copies.pop(chance.randrange(len(copies)))()
                elif ready:
                    chosen = chance.choices(ready, [paces[group.block.rank] for group, _, _ in ready])[0]
                    block = chosen[0].block
                    self._advance(running, chosen)
                else:
                    raise Deadlock("every warpgroup waits, and no copy is in flight")
        except Fault as fault:
            fault.add_note(f"block {block.index}, schedule {schedule}: {self.program.instructions[block.position]}")
            raise
        return [block.record for block in self.blocks]

    @staticmethod
    def _advance(running: list[tuple[Warpgroup, Iterator, Callable[[], bool] | None]], chosen: tuple) -> None:
        """Runs a warpgroup until it lets others go on, and ends its block if it was the last one of it."""
        group, code, _ = chosen
        place = running.index(chosen)
        try:
            running[place] = (group, code, next(code))
        except StopIteration:
            running.pop(place)
            if all(other.block is not group.block for other, _, _ in running):
                group.block.end()


def run(
    program: Program,
    host_code: str,
    arrays: list[np.ndarray],
    *,
    schedule: int = 0,
    clusters: int | None = None,
    steps: int | None = None,
) -> list[Record]:
    """Runs the clusters of a launch, one after the other, and returns what each thread block did.

    arrays    operands and results of the kernel as bytes (n,); results are written
    schedule  number of the random schedule of the first cluster; each has another
    clusters  number of clusters, by default all
    steps     limit of the scheduler's steps in each cluster, for what only looks at the record
    """
    memory = Global(arrays)
    launch, code = host.launch(host_code, memory.addresses), compile_program(program)
    sides = [range(0, whole, side) for whole, side in zip(launch.grid, launch.cluster, strict=True)]
    origins = [(x, y, z) for z, y, x in itertools.product(*reversed(sides))][:clusters]
    records = []
    for i, origin in enumerate(origins):
        records += Cluster(program, code, launch, origin, memory).run(schedule + i, steps)
    return records
