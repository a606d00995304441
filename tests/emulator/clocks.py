"""Vector clocks: what each warp knows to have happened, from which follows whether two accesses are in an order.

After FastTrack (Flanagan and Freund, PLDI 2009).  Besides warps there are agents that work asynchronously: the stores
of each warp, the matrix products of each warpgroup, and the copies that arrive at each barrier.  The clock of a warp
advances whenever it tells others what it did; that of asynchronous stores and products is the number of their group,
that of copies the number of the barrier's phase.

A write by a thread is seen by asynchronous agents only after `fence.proxy.async`, by the thread or by one that knows of
the write: therefore each warp has a second clock, of what asynchronous agents see that it starts.  The initialisation
of barriers has clocks of its own, since `fence.mbarrier_init` orders nothing else.
"""

from __future__ import annotations

import dataclasses

import numpy as np

BARRIERS = 128
"""Limit of the number of barriers of a thread block."""


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """The clocks of all agents, (agents,) each: as threads see them, and as asynchronous agents do."""

    known: np.ndarray
    visible: np.ndarray

    def join(self, other: Knowledge) -> Knowledge:
        return Knowledge(np.maximum(self.known, other.known), np.maximum(self.visible, other.visible))


class Clocks:
    """The knowledge of each warp of a cluster of thread blocks.

    Warps are numbered through the cluster.  So are agents: those of the first block, then those of the next.

    warps    number of warps of a block
    readers  number of agents of a block that read shared memory; they come first, and its warps first of them
    agents   number of agents of a block
    """

    def __init__(self, warps: int, blocks: int):
        self.warps, self.blocks = warps, blocks
        self.readers = 2 * warps + warps // 4
        self.agents = self.readers + warps + BARRIERS
        each = np.arange(blocks * warps)
        self.agent = each // warps * self.agents + each % warps
        """The agent of each warp."""
        shape = (each.size, blocks * self.agents)
        self.known, self.visible, self.published = (np.zeros(shape, np.int32) for _ in range(3))
        self.known[each, self.agent] = 1
        place = np.arange(shape[1]) % self.agents
        self._initialises = (place >= self.readers) & (place < self.readers + warps)

    def stores(self, warp: int) -> int:
        """Returns the agent of a warp's asynchronous stores."""
        return int(self.agent[warp]) + self.warps

    def products(self, warp: int) -> int:
        """Returns the agent of the matrix products of the warpgroup that begins with a warp."""
        block, number = divmod(warp, self.warps)
        return block * self.agents + 2 * self.warps + number // 4

    def copies(self, block: int, barrier: int) -> int:
        """Returns the agent of the copies that arrive at a barrier of a block."""
        return block * self.agents + self.readers + self.warps + barrier

    def now(self, warps: np.ndarray) -> np.ndarray:
        return self.known[warps, self.agent[warps]]

    def of(self, warps: np.ndarray) -> Knowledge:
        """Returns what all of the warps know."""
        return Knowledge(self.known[warps].min(0), self.visible[warps].min(0))

    def of_any(self, block: int) -> np.ndarray:
        """Returns what at least one warp of a block knows, (agents,)."""
        return self.known[block * self.warps : (block + 1) * self.warps].max(0)

    def release(self, warps: np.ndarray) -> Knowledge:
        """Returns what the warps know together, to tell others; what they do from now on is later."""
        told = Knowledge(self.known[warps].max(0), self.visible[warps].max(0))
        self.known[warps, self.agent[warps]] += 1
        return told

    def acquire(self, warps: np.ndarray, told: Knowledge) -> None:
        self.known[warps] = np.maximum(self.known[warps], told.known)
        self.visible[warps] = np.maximum(self.visible[warps], told.visible)

    def learn(self, warps: np.ndarray, agent: int, clock: int) -> None:
        self.known[warps, agent] = np.maximum(self.known[warps, agent], clock)

    def fence(self, warps: np.ndarray) -> None:
        """Makes all that the warps know visible to the asynchronous agents that they start."""
        self.visible[warps] = np.maximum(self.visible[warps], self.known[warps])

    def initialise(self, warp: int) -> tuple[int, int]:
        """Records that a warp initialises a barrier; returns the agent and the clock of this."""
        agent = int(self.agent[warp]) + self.readers
        self.known[warp, agent] += 1
        return agent, int(self.known[warp, agent])

    def publish(self, warps: np.ndarray) -> None:
        """Lets relaxed arrivals of the warps tell which initialisations they know."""
        self.published[warps] = np.where(self._initialises, self.known[warps], 0)

    def relaxed(self, warps: np.ndarray) -> Knowledge:
        """Returns what a relaxed arrival of the warps tells others."""
        told = self.published[warps].max(0)
        return Knowledge(told, np.zeros_like(told))
