"""Shared memory of a thread block, in which accesses have to be in an order, or both reads."""

from __future__ import annotations

import numpy as np

from .clocks import Clocks
from .faults import Misaligned, OutOfBounds, Race, Undefined

BASE = 1024
"""Address of the first byte: the hardware reserves 1 KiB below."""

POISON = 0x7F
"""Bytes of memory that is being written: NaN in float8, and in wider dtypes NaN or a huge number."""

NOBODY = -1


class Shared:
    """Bytes of the shared memory of a block, and for every two of them which agents wrote and read them last, and when.

    Threads of other blocks neither load nor store here; the copies that they start are agents of this block.

    rank  number of the block in its cluster
    """

    def __init__(self, size: int, clocks: Clocks, rank: int = 0):
        self.clocks = clocks
        self.first = rank * clocks.agents
        self.here = slice(self.first, self.first + clocks.agents)
        """The agents of the block, among those of the cluster."""
        self.data = np.full(size, POISON, np.uint8)
        cells = -(-size // 2)
        self.writer = np.full(cells, NOBODY, np.int16)
        self.written = np.zeros(cells, np.int32)
        self.read = np.zeros((clocks.readers, cells), np.int32)

    def _offsets(self, addresses: np.ndarray) -> np.ndarray:
        offsets = addresses - BASE
        if offsets.min() < 0 or offsets.max() >= self.data.size:
            worst = offsets.max() if offsets.max() >= self.data.size else offsets.min()
            raise OutOfBounds(f"byte {worst} of {self.data.size} bytes of shared memory")
        return offsets

    def _cells(self, addresses: np.ndarray) -> np.ndarray:
        """Returns the cells of the bytes at addresses (..., bytes), (..., max(bytes / 2, 1))."""
        offsets = self._offsets(addresses)
        return offsets[..., :: 2 if offsets.shape[-1] > 1 else 1] // 2

    def _agents(self, warps: np.ndarray) -> np.ndarray:
        """Returns the agents of warps, among those of the block."""
        return self.clocks.agent[warps] - self.first

    def _name(self, agent: int) -> str:
        clocks = self.clocks
        kinds = [
            (clocks.warps, "warp {}"),
            (clocks.warps, "an asynchronous store of warp {}"),
            (clocks.warps // 4, "a matrix product of warpgroup {}"),
            (clocks.warps, "the initialisation of a barrier by warp {}"),
        ]
        for count, name in kinds:
            if agent < count:
                return name.format(agent)
            agent -= count
        return f"a copy that arrives at barrier {agent}"

    def _require_written(self, cells: np.ndarray, known: np.ndarray, what: str) -> None:
        """Checks that the last writes of cells are known.

        cells  (n,) or (threads, n)
        known  (agents,) or (threads, agents)
        """
        writer, written = self.writer[cells], self.written[cells]
        if (writer == NOBODY).any():
            raise Undefined(f"{what} shared memory that nobody has written, byte {2 * cells[writer == NOBODY].flat[0]}")
        late = np.take_along_axis(known, writer, -1) < written if known.ndim > 1 else known[writer] < written
        if late.any():
            name, byte = self._name(int(writer[late].flat[0])), 2 * int(cells[late].flat[0])
            raise Race(f"{what} shared memory, byte {byte}, that {name} may be writing, or wrote without a fence")

    def _require_read(self, cells: np.ndarray, known: np.ndarray, what: str) -> None:
        """Checks that all reads of cells (n,) are known; known (agents,) or (n, agents)."""
        limits = known[: self.clocks.readers, None] if known.ndim == 1 else known[:, : self.clocks.readers].T
        late = self.read[:, cells] > limits
        if late.any():
            agent, cell = np.argwhere(late)[0]
            raise Race(
                f"{what} shared memory, byte {2 * int(cells[cell])}, that {self._name(int(agent))} may be reading"
            )

    def _require_overwritable(self, cells: np.ndarray, known: np.ndarray, seen: np.ndarray, what: str) -> None:
        writer = self.writer[cells]
        old = writer != NOBODY
        if old.any():
            if seen.ndim == 1:
                self._require_written(cells[old], seen, what)
            else:
                self._require_written(cells[old, None], seen[old], what)
        self._require_read(cells, known, what)

    def load(self, warps: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Returns bytes (threads, bytes) at addresses of that shape, for threads of the given warps (threads,)."""
        if (addresses[:, 0] % addresses.shape[1]).any():
            raise Misaligned(f"a load of {addresses.shape[1]} bytes at shared address {addresses[:, 0]}")
        cells = self._cells(addresses)
        self._require_written(cells, self.clocks.known[warps, self.here], "a thread reads")
        self.read[self._agents(warps)[:, None], cells] = self.clocks.now(warps)[:, None]
        return self.data[addresses - BASE]

    def store(self, warps: np.ndarray, addresses: np.ndarray, data: np.ndarray) -> None:
        """Writes bytes (threads, bytes)."""
        if (addresses[:, 0] % addresses.shape[1]).any():
            raise Misaligned(f"a store of {addresses.shape[1]} bytes at shared address {addresses[:, 0]}")
        cells = self._cells(addresses)
        flat, each = cells.reshape(-1), np.repeat(warps, cells.shape[1])
        known = self.clocks.known[each, self.here]
        self._require_overwritable(flat, known, known, "a thread writes")
        self.writer[flat], self.written[flat] = self._agents(each), self.clocks.now(each)
        self.data[addresses - BASE] = data

    def _seen(self, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns what warps know, and what an asynchronous agent sees that they start: copies need no fence."""
        knowledge, count = self.clocks.of(warps), self.clocks.warps
        known, visible = knowledge.known[self.here], knowledge.visible[self.here]
        return known, np.concatenate([visible[:count], known[count:]])

    def start_read(self, warps: np.ndarray, agent: int, clock: int, addresses: np.ndarray, what: str) -> None:
        """Records that `agent`, started by warps, reads the bytes at addresses (bytes,) until `clock`."""
        cells = self._cells(addresses)
        self._require_written(cells, self._seen(warps)[1], what)
        self.read[agent - self.first, cells] = clock

    def start_write(self, warps: np.ndarray, agent: int, clock: int, addresses: np.ndarray, what: str) -> None:
        """Records that `agent`, started by warps, writes the bytes at addresses (bytes,) until `clock`."""
        cells = self._cells(addresses)
        known, seen = self._seen(warps)
        self._require_overwritable(cells, known, seen, what)
        self.writer[cells], self.written[cells] = agent - self.first, clock
        self.read[:, cells] = 0
        self.data[addresses - BASE] = POISON

    def peek(self, addresses: np.ndarray) -> np.ndarray:
        """Returns bytes, unchecked: of an access that was checked when it started."""
        return self.data[addresses - BASE]

    def poke(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """Writes bytes, unchecked: of an access that was checked when it started."""
        self.data[addresses - BASE] = data
