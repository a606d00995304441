"""Barriers in shared memory (mbarrier), which count arrivals of threads and bytes of copies."""

from __future__ import annotations

import numpy as np

from .clocks import Clocks, Knowledge
from .faults import Fault


class Barrier:
    """A barrier.

    agent   the agent of the copies that arrive at it
    count   arrivals of a phase
    phase   number of complete phases
    fenced  whether copies may arrive: its initialisation was made visible to them
    """

    def __init__(self, clocks: Clocks, number: int, count: int, initialised: Knowledge):
        self.agent, self.count, self.phase, self.fenced = clocks.copies(number), count, 0, False
        self.pending, self.bytes = count, 0
        self.told = initialised
        self.gathered = Knowledge(np.zeros_like(initialised.known), np.zeros_like(initialised.visible))

    def arrive(self, count: int, expected: int, told: Knowledge) -> None:
        """Counts `count` arrivals, and `expected` bytes which the phase waits for."""
        if count > self.pending:
            raise Fault(f"{count} arrivals at a barrier that waits for {self.pending} of {self.count}")
        self.pending -= count
        self.bytes += expected
        self.gathered = self.gathered.join(told)
        self._complete()

    def receive(self, count: int) -> None:
        """Counts bytes of a copy."""
        self.bytes -= count
        self._complete()

    def _complete(self) -> None:
        if not self.pending and not self.bytes:
            self.phase += 1
            self.pending = self.count
            self.told = self.told.join(self.gathered)

    def is_complete(self, parity: int) -> bool:
        """Returns whether the last phase of this parity is complete: phases count from 0."""
        return self.phase % 2 != parity

    @property
    def is_clean(self) -> bool:
        return self.pending == self.count and not self.bytes
