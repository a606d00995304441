"""Kernels compiled for an H200, and their execution in place of Pallas'."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from perparam.policies.matmul import warpgroup

from . import machine, ptx


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    text   PTX, the log of ptxas, and the host code
    sizes  bytes of its operands and results
    """

    text: str
    sizes: tuple[int, ...]

    @functools.cached_property
    def program(self) -> ptx.Program:
        return ptx.parse(self.text)

    def run(self, arrays: list[np.ndarray], program: ptx.Program | None = None, **options: Any) -> list[machine.Record]:
        """Runs the kernel, or a variant of its program, on operands and results as bytes."""
        return machine.run(program or self.program, self.text, arrays, **options)

    def zeros(self) -> list[np.ndarray]:
        """Returns operands and results of zeros, for what depends on addresses alone."""
        return [np.zeros(size, np.uint8) for size in self.sizes]


_known: dict[str, str] = {}
_ITEMSIZES = {"pred": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2}


def compile_kernels(lowered: jax.stages.Lowered) -> list[Kernel]:
    """Returns the Mosaic kernels of a lowered program, compiled for an H200, in the order of their launches."""
    os.environ["MOSAIC_GPU_DUMP_HOST_LLVM"] = "1"
    import compile_h200  # sets the environment, which only those who compile want

    compiled, printed, _ = compile_h200.build(lowered)
    program = compiled.as_text()
    compile_h200.assembly(program, printed, _known)
    calls = re.findall(
        r"= (\(?[^=]*?\)?) custom-call\([^\n]*?custom_call_target=\"mosaic_gpu_v2\"[^\n]*?"
        r"operand_layout_constraints=\{(.*?)\}, api_version[^\n]*?kernel_hash = \"((?:[^\"\\]|\\.)*)\"",
        program,
    )
    kernels = []
    for results, operands, name in calls:
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", f"{operands}, {results}")
        sizes = tuple(math.prod(map(int, filter(None, sides.split(",")))) * _itemsize(of) for of, sides in shapes)
        kernels.append(Kernel(_known[name], sizes))
    return kernels


def _itemsize(name: str) -> int:
    return _ITEMSIZES.get(name) or int(re.sub(r"\D", "", name)) // 8


Runner = Callable[[Kernel, list[np.ndarray]], Any]


@contextlib.contextmanager
def emulated(runner: Runner) -> Iterator[None]:
    """A context in which Pallas' Mosaic GPU kernels, called outside of `jit`, are compiled and given to `runner`.

    It gets the kernel, and its operands and results as bytes, of which it writes the latter.
    """
    import compile_h200

    def execute(launch: Any, arguments: Any, results: Any) -> Any:
        """Returns the arguments and the results after the execution."""
        (found,) = compile_kernels(jax.jit(launch).lower(*compile_h200.abstract(arguments)))
        leaves, structure = jax.tree.flatten((arguments, results))
        before = [np.array(leaf) for leaf in leaves]
        # Results that nobody writes are NaN.
        count = len(jax.tree.leaves(arguments))
        arrays = [array.view(np.uint8).reshape(-1) for array in before[:count]]
        arrays += [np.full(array.nbytes, 0xFF, np.uint8) for array in before[count:]]
        runner(found, arrays)
        after = [array.view(leaf.dtype).reshape(leaf.shape) for array, leaf in zip(arrays, before, strict=True)]
        return jax.tree.unflatten(structure, map(jnp.asarray, after))

    def kernel(*arguments: Any, **settings: Any) -> Any:
        launch = original(*arguments, **settings)
        return lambda *operands: execute(launch, operands, empty(launch, *operands))[1]

    def kernel_in_place(*arguments: Any, **settings: Any) -> Any:
        launch = original_in_place(*arguments, **settings)

        def call(operands: Any, updated: Any) -> Any:
            # XLA gives an updated array and the result of it one buffer, for which the kernel uses the operand's name.
            (_, new), (results, _) = execute(launch, (operands, updated), empty(launch, operands, updated))
            return results, new

        return call

    def empty(launch: Any, *operands: Any) -> Any:
        return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), jax.eval_shape(launch, *operands))

    original, original_in_place = plgpu.kernel, warpgroup.kernel_in_place
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, "kernel", kernel)
        patch.setattr(warpgroup, "kernel_in_place", kernel_in_place)
        yield


SCHEDULES = 3
"""Of each launch: copies that arrive at random, late and early.  Each thread block of a launch has another one."""


def run_in_all_schedules(kernel: Kernel, arrays: list[np.ndarray]) -> None:
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
