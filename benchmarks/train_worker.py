"""The process of one contender of `train.py`: makes it, measures its memory, and takes a sample when it is told to.

python benchmarks/train_worker.py CONTENDER SIZE
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import train_models
import trainers

Report = dict[str, Any]

UPDATES = 4
"""Updates of one sample: an update takes a fraction of the time of a step."""

AGAIN = ", again"
"""The end of the name of a contender that takes part a second time."""


def work(name: str, size: str) -> None:
    """Runs one contender as a worker process.

    Prints its memory, or {"error": …}; then reads "step" or "update" from each line of stdin, and prints seconds and,
    of a step, its loss.
    """
    try:
        samples, memory = prepare(name, size)
    except Exception as error:  # of any library: one that does not run must not stop the others
        message = str(error).strip() or repr(error)
        print(json.dumps({"error": f"{type(error).__name__}: {message.splitlines()[0][:300]}"}), flush=True)
        return
    print(json.dumps(memory), flush=True)
    for line in sys.stdin:
        print(json.dumps(samples[line.strip()]()), flush=True)


def prepare(name: str, size: str) -> tuple[dict[str, Callable[[], Report]], Report]:
    """Returns a contender's functions that take a sample, compiled and run once, and its memory in bytes."""
    shape = train_models.SIZES[size]
    ids = train_models.batch(shape)
    trainer = trainers.CONTENDERS[name.removesuffix(AGAIN)](shape)
    held = {"params": trainer.params, "state": trainer.state}
    live = {"parameters": _bytes(held["params"]), "optimizer": _bytes(held["state"]), "frozen": _bytes(trainer.frozen)}
    step = jax.jit(trainer.step, donate_argnums=(0, 1)).lower(*held.values(), trainer.frozen, ids).compile()
    _, shapes = jax.eval_shape(trainer.gradients, trainer.params, trainer.frozen, ids)
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3, x.dtype), shapes)
    update = jax.jit(trainer.update, donate_argnums=(0, 1)).lower(*held.values(), gradients).compile()
    analysis, planned, frozen = step.memory_analysis(), trainer.planned, trainer.frozen
    del trainer

    def take_step() -> Report:
        start = time.perf_counter()
        held["params"], held["state"], loss = jax.block_until_ready(step(*held.values(), frozen, ids))
        return {"seconds": time.perf_counter() - start, "loss": float(loss)}

    def take_updates() -> Report:
        start = time.perf_counter()
        for _ in range(UPDATES):
            held["params"], held["state"] = jax.block_until_ready(update(*held.values(), gradients))
        return {"seconds": (time.perf_counter() - start) / UPDATES}

    release()
    reset_peak()
    before, first = resident(), take_step()
    grown = resident("VmHWM") - before
    memory = {
        "planned": planned and dict(planned),
        "live": live,
        "arguments": analysis.argument_size_in_bytes,
        "batch": ids.nbytes,
        "temporary": analysis.temp_size_in_bytes,
        "peak": sum(live.values()) + grown,
        "loss": first["loss"],
    }
    take_updates()  # after the step, whose loss would change
    return {"step": take_step, "update": take_updates}, memory


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def resident(field: str = "VmRSS") -> int:
    """Returns the resident bytes of this process, or with "VmHWM" the most that there were; 0 where Linux is not."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> None:
    """Makes the peak of resident memory that of now."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def release() -> None:
    """Gives memory that compilation used back to the system, so that it does not hide what a step needs."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    work(*sys.argv[1:])
