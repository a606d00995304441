"""Barriers in shared memory (mbarrier), which count arrivals of threads and bytes of copies, and that of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np

from .clocks import Knowledge
from .faults import Fault


class Barrier:
    """A barrier in shared memory.

    agent        the agent of the copies that arrive at it
    count        arrivals of a phase
    initialiser  the warp that initialised it, and the agent and the clock of this
    phase        number of complete phases
    fenced       whether copies may arrive: its initialisation was made visible to them
    copied       whether one has
    """

    def __init__(self, agent: int, count: int, initialiser: tuple[int, int, int], told: Knowledge):
        self.agent, self.count, self.initialiser = agent, count, initialiser
        self.phase, self.fenced, self.copied = 0, False, False
        self.pending, self.bytes = count, 0
        self.told = told
        self.gathered = Knowledge(np.zeros_like(told.known), np.zeros_like(told.visible))

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
        self.copied = True
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


class ClusterBarrier:
    """The barrier of all threads of a cluster, whose arrivals and waits are separate instructions (barrier.cluster).

    count  number of warpgroups that arrive in each phase
    """

    def __init__(self, count: int):
        self.count = count
        self.arrived: dict[Hashable, int] = {}
        """The phase of each warpgroup that has arrived and has not yet waited."""
        self.phases: list[list[Knowledge]] = [[]]
        """What the arrivals of each phase tell."""

    def arrive(self, group: Hashable, told: Knowledge) -> None:
        if group in self.arrived:
            raise Fault("a warpgroup arrives twice at the barrier of its cluster, without a wait")
        self.arrived[group] = len(self.phases) - 1
        self.phases[-1].append(told)
        if len(self.phases[-1]) == self.count:
            self.phases.append([])

    def wait(self, group: Hashable) -> tuple[Callable[[], bool], list[Knowledge]]:
        """Returns whether all have arrived, to be asked again, and what they tell then."""
        if group not in self.arrived:
            raise Fault("a warpgroup waits at the barrier of its cluster, at which it has not arrived")
        phase = self.arrived.pop(group)
        return (lambda: len(self.phases) - 1 > phase), self.phases[phase]
