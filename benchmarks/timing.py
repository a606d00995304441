"""Timing of several contenders: operands larger than the caches, and rounds in shuffled order.

The speed of a machine varies over time by more than contenders differ.  So every contender runs once in each round, and
benchmarks compare ratios within a round, not times of different rounds.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import math
import os
import pathlib
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MIB = 2**20

ROTATED_ON_GPU = 256 * MIB
"""Bytes of operands that calls cycle through on a GPU: five times the second-level cache of an H100 or H200."""

MAX_ROTATED_ON_CPU = 512 * MIB
"""Maximum on a CPU, since a virtual machine may report the third-level cache of a whole server."""

UNKNOWN_CACHE = 32 * MIB
"""Assumed size of the third-level cache of a CPU that does not report it."""

SAMPLE_SECONDS = 0.01
"""Seconds of all calls of one sample, which is long compared to the time to start and to wait for a call."""

SEED = 0
"""Seed of the operands, and of the order of contenders in each round."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """A compiled function that can be timed.

    sample      runs the function several times and returns the seconds of one call
    moved       bytes of operands and result, each counted once: the minimum of bytes moved
    operations  floating-point operations of a call
    kernels     names of the library kernels and hand-written kernels that it calls: cuBLAS, Triton, Mosaic
    result      the result of the first call, or None
    """

    sample: Callable[[], float]
    moved: int
    operations: int = 0
    kernels: tuple[str, ...] = ()
    result: Any = None


def on_gpu() -> bool:
    """Returns whether JAX's default device is a GPU."""
    return jax.default_backend() == "gpu"


def last_level_cache() -> int:
    """Returns the bytes of the CPU's third-level cache."""
    try:
        text = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return UNKNOWN_CACHE
    return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)


def rotated_bytes() -> int:
    """Returns the bytes of operands through which calls cycle, so that no call finds its operands in a cache."""
    return ROTATED_ON_GPU if on_gpu() else min(2 * last_level_cache(), MAX_ROTATED_ON_CPU)


def chained(function: Callable[..., Any]) -> Callable[[Sequence[tuple]], list]:
    """Returns a program that calls `function` on each copy of the operands in order, and returns all results.

    A barrier makes the operands of each call depend on the result of the call before, which is returned through the
    barrier: XLA can neither remove calls, nor merge them, nor change their order.
    """

    def program(copies: Sequence[tuple]) -> list:
        results, last = [], ()
        for operands in copies:
            operands, last = jax.lax.optimization_barrier((operands, last))
            results.append(last)
            last = function(*operands)
        return [*results[1:], last]

    return program


def timed(function: Callable[..., Any], copies: Sequence[tuple], operations: int = 0) -> Timed:
    """Returns `function`, compiled for `copies` of its operands.

    On a CPU each call uses the next copy and ends before the next call starts.  On a GPU one program chains calls on
    all copies, so that the cost of a launch from the host is shared by many calls, and only the end of a sample is
    waited for.
    """
    if on_gpu():
        compiled = jax.jit(chained(function)).lower(copies).compile()
        sample = sampler(lambda: compiled(copies), len(copies))
        result = compiled(copies)[0]
    else:
        compiled = jax.jit(function).lower(*copies[0]).compile()
        turns = itertools.cycle(copies)
        sample = sampler(lambda: compiled(*next(turns)))
        result = compiled(*copies[0])
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((copies[0], result)))
    return Timed(sample, moved, operations, kernels(compiled.as_text()), result)


def sampler(run: Callable[[], Any], calls: int = 1) -> Callable[[], float]:
    """Returns a function that repeats `run`, of `calls` calls, for SAMPLE_SECONDS and returns the seconds per call."""

    def sample(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = run()
            if not on_gpu():
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / (count * calls)

    sample(2)  # warm
    return functools.partial(sample, math.ceil(SAMPLE_SECONDS / (sample(1) * calls)))


def kernels(program: str) -> tuple[str, ...]:
    """Returns the names of library kernels and hand-written kernels in the text of an optimised program."""
    names = re.findall(r'custom_call_target="([^"]+)"', program) + re.findall(r'"kind":"(__[^"]+)"', program)
    return tuple(sorted(set(names)))


def yardsticks(rotated: int | None = None) -> dict[str, Timed]:
    """Returns measures of the machine: a copy of an array, a large bfloat16 product, and the smallest program.

    rotated  bytes of the array; None: `rotated_bytes()`
    """
    source = jnp.ones((rotated or rotated_bytes()) // 4, jnp.float32)
    # The copy goes to an existing array: a new array costs a CPU a page fault every 4 KiB.
    copy = jax.jit(lambda source, target: jnp.copy(source), donate_argnums=1, keep_unused=True)
    target = [jnp.zeros_like(source)]

    def copied() -> jax.Array:
        target[0] = copy(source, target[0])
        return target[0]

    side = 8192 if on_gpu() else 2048  # larger products have no higher throughput
    square = jax.random.normal(jax.random.key(SEED), (side, side), jnp.bfloat16)
    small = jnp.ones(8)
    return {
        "copy": Timed(sampler(copied), 2 * source.nbytes),
        "large bf16 dot": timed(dot, [(square, square)] * 2, 2 * side**3),
        "smallest program": timed(lambda x: x + 1, [(small,)] * 64),
    }


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns XLA's product x (rows, in) @ kernel (out, in).T in their dtype, in the form that XLA computes fastest."""
    # On a CPU rounding the result after the product takes a third of the time of rounding in the product; on a GPU it
    # takes an additional kernel.
    sums = None if on_gpu() else jnp.float32
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())), preferred_element_type=sums).astype(x.dtype)


def race(contenders: dict[str, Timed], rounds: int) -> dict[str, np.ndarray]:
    """Returns the seconds per call of each contender in each of `rounds`, each round in a shuffled order."""
    order, shuffle = list(contenders), random.Random(SEED).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(contenders[name].sample())
    return {name: np.array(samples) for name, samples in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns the median and the quartiles of `values`."""
    lower, median, upper = np.percentile(values, (25, 50, 75))
    return {"lower": float(lower), "median": float(median), "upper": float(upper)}


def machine() -> dict[str, Any]:
    """Returns the date, the device, and the versions of Python and packages."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind if on_gpu() else cpu_model(),
        "platform": jax.default_backend(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": versions | {"python": platform.python_version()},
    }


def cpu_model() -> str:
    """Returns the model name of the processor."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def slug(device: str) -> str:
    """Returns `device` in a form for file names, with the prefix "cpu-" for a CPU.

    >>> slug("NVIDIA H200")
    'nvidia-h200'
    """
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device.lower())).strip("-")
    return name if on_gpu() else f"cpu-{name}"
