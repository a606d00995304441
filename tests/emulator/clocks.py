"""Vector clocks: what each warp knows to have happened, from which follows whether two accesses are in an order.

After FastTrack (Flanagan and Freund, PLDI 2009).  Besides warps there are agents that work asynchronously: the stores
of each warp, the matrix products of each warpgroup, and the copies that arrive at each barrier.  The clock of a warp
advances whenever it tells others what it did; that of asynchronous stores and products is the number of their group,
that of copies the number of the barrier's phase.

A write by a thread is seen by asynchronous agents only after `fence.proxy.async`, by the thread or by one that knows of
the write: therefore each warp has a second clock, of what asynchronous agents see that it starts.
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
    """The knowledge of each warp of a thread block."""

    def __init__(self, warps: int):
        self.warps = warps
        self.readers = 2 * warps + warps // 4
        self.agents = self.readers + BARRIERS
        self.known = np.zeros((warps, self.agents), np.int32)
        self.visible = np.zeros((warps, self.agents), np.int32)
        self.known[np.arange(warps), np.arange(warps)] = 1

    def stores(self, warp: int) -> int:
        """Returns the agent of a warp's asynchronous stores."""
        return self.warps + warp

    def products(self, warpgroup: int) -> int:
        """Returns the agent of a warpgroup's matrix products."""
        return 2 * self.warps + warpgroup

    def copies(self, barrier: int) -> int:
        """Returns the agent of the copies that arrive at a barrier."""
        return self.readers + barrier

    def now(self, warps: np.ndarray) -> np.ndarray:
        return self.known[warps, warps]

    def of(self, warps: np.ndarray) -> Knowledge:
        """Returns what all of the warps know."""
        return Knowledge(self.known[warps].min(0), self.visible[warps].min(0))

    def release(self, warps: np.ndarray) -> Knowledge:
        """Returns what the warps know together, to tell others; what they do from now on is later."""
        told = Knowledge(self.known[warps].max(0), self.visible[warps].max(0))
        self.known[warps, warps] += 1
        return told

    def acquire(self, warps: np.ndarray, told: Knowledge) -> None:
        self.known[warps] = np.maximum(self.known[warps], told.known)
        self.visible[warps] = np.maximum(self.visible[warps], told.visible)

    def learn(self, warps: np.ndarray, agent: int, clock: int) -> None:
        self.known[warps, agent] = np.maximum(self.known[warps, agent], clock)

    def fence(self, warps: np.ndarray) -> None:
        """Makes all that the warps know visible to the asynchronous agents that they start."""
        self.visible[warps] = np.maximum(self.visible[warps], self.known[warps])
