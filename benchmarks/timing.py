"""Times of contenders measured side by side: operands beyond the caches, rounds in shuffled order.

A machine slows down and speeds up for reasons of its own, by more than contenders differ.  So all take a turn in every
round, and what is compared is their ratio within a round, never times of different rounds.
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

MOST_ROTATED_ON_CPU = 512 * MIB
"""The most on a CPU, where a virtual machine may report the third-level cache of a whole server."""

UNKNOWN_CACHE = 32 * MIB
"""What a CPU that does not say how large its third-level cache is, is taken to have."""

SAMPLE_SECONDS = 0.01
"""How long the calls of one sample take together: long beside what it costs to start and to wait for one."""

SEED = 0
"""Of the operands, and of the order of contenders in each round."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """What can be timed, compiled and warm.

    sample      runs it and returns the seconds of a call
    moved       bytes of its operands and its result, each counted once: the least that it moves
    operations  floating-point operations of a call
    kernels     what XLA calls in it, where that is no code of its own: cuBLAS, Triton, Mosaic
    result      of its first call, None where that does not matter
    """

    sample: Callable[[], float]
    moved: int
    operations: int = 0
    kernels: tuple[str, ...] = ()
    result: Any = None


def on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"


def last_level_cache() -> int:
    """Bytes of the CPU's third-level cache."""
    try:
        text = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return UNKNOWN_CACHE
    return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)


def rotated_bytes() -> int:
    """Bytes of operands through which calls cycle, so that none finds its own in a cache."""
    return ROTATED_ON_GPU if on_gpu() else min(2 * last_level_cache(), MOST_ROTATED_ON_CPU)


def chained(function: Callable[..., Any]) -> Callable[[Sequence[tuple]], list]:
    """A function from copies of the operands to the results for all of them, each computed after the one before.

    A barrier ties operands to the result before them, and the result leaves the program through it: XLA can neither
    drop a call, nor merge it with others, nor change the order.
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
    """`function` compiled for `copies` of its operands.

    On a CPU each call is waited for and takes the next copy.  On a GPU a program chains calls on all copies, so that
    the host's part in starting one is paid once for many, and only the last program of a sample is waited for.
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
    """A function that runs `run`, of `calls` calls, for SAMPLE_SECONDS and returns the seconds of a call."""

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
    """The names of libraries' and hand-written kernels in the text of an optimised program."""
    called = re.findall(r'custom_call_target="([^"]+)"', program) + re.findall(r'"kind":"(__[^"]+)"', program)
    return tuple(sorted(set(called)))


def yardsticks() -> dict[str, Timed]:
    """What the machine can do: copy an array, multiply large bfloat16 matrices, and run the smallest program."""
    source = jnp.ones(rotated_bytes() // 4, jnp.float32)
    # Into an array that is there: a new one costs a CPU a page fault every 4 KiB.
    copy = jax.jit(lambda source, target: jnp.copy(source), donate_argnums=1, keep_unused=True)
    target = [jnp.zeros_like(source)]

    def copied() -> jax.Array:
        target[0] = copy(source, target[0])
        return target[0]

    side = 8192 if on_gpu() else 2048  # large enough that no larger one is faster
    square = jax.random.normal(jax.random.key(SEED), (side, side), jnp.bfloat16)
    small = jnp.ones(8)
    return {
        "copy": Timed(sampler(copied), 2 * source.nbytes),
        "large bf16 dot": timed(dot, [(square, square)] * 2, 2 * side**3),
        "smallest program": timed(lambda x: x + 1, [(small,)] * 64),
    }


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's product x (rows, in) @ kernel (out, in).T in their dtype, written so that XLA is fast at it."""
    # Rounding the result after the product takes a CPU a third of the time that it takes within; a GPU, a kernel more.
    sums = None if on_gpu() else jnp.float32
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())), preferred_element_type=sums).astype(x.dtype)


def race(contenders: dict[str, Timed], rounds: int) -> dict[str, np.ndarray]:
    """Seconds a call of each contender in each of `rounds`, in which they take turns in shuffled order."""
    order, shuffle = list(contenders), random.Random(SEED).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(contenders[name].sample())
    return {name: np.array(samples) for name, samples in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """The median of `values`, and the quartiles around it."""
    lower, median, upper = np.percentile(values, (25, 50, 75))
    return {"lower": float(lower), "median": float(median), "upper": float(upper)}


def machine() -> dict[str, Any]:
    """When and where this runs, and on which versions."""
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
    """What the processor calls itself."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def slug(device: str) -> str:
    """`device` as part of a file name.

    >>> slug("NVIDIA H200")
    'nvidia-h200'
    """
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device.lower())).strip("-")
    return name if on_gpu() else f"cpu-{name}"
