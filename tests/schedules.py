"""Runs of compiled kernels in the emulator in several random schedules."""

import numpy as np

SCHEDULES = 3
"""Of each launch: copies that arrive at random, late and early.  Each thread block of a launch has another one."""


def run_in_all_schedules(kernel, arrays):
    """Runs a kernel in several schedules, whose results have to be the same bit by bit."""
    first = None
    for schedule in range(SCHEDULES):
        again = [array.copy() for array in arrays]
        kernel.run(again, schedule=schedule)
        first = first or again
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, other)
    for array, found in zip(arrays, first, strict=True):
        array[:] = found
