"""The Mosaic kernels on a CPU: Pallas's interpreter for GPUs, and in plain jnp what it lacks of a warpgroup."""

import contextlib
import dataclasses
import faulthandler
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from perparam.models.decoding import hopper_attention, hopper_gate, hopper_norm, hopper_rotate
from perparam.policies.matmul import (
    face,
    hopper_columns,
    hopper_grouped_kernel,
    hopper_quantize,
    hopper_rows,
    hopper_widened,
    warpgroup,
)

try:  # private, and so perhaps somewhere else in the next version
    from jax._src import core
    from jax._src.pallas.mosaic.interpret import thread_map
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory
except ImportError as error:
    MISSING = f"this JAX has no interpreter of Mosaic GPU kernels: {error}"
else:
    MISSING = ""
    _store_buffer = GPUSharedMemory.store_buffer_content
    _RACES = "GPURaceDetectionState" if hasattr(gpu_callbacks, "GPURaceDetectionState") else "RaceDetectionState"
    # Without an exception, after which threads wait for each other: JAX 0.10 and 0.11 only print.
    _WARN = {"on_race": "warn"} if any(f.name == "on_race" for f in dataclasses.fields(InterpretGPUParams)) else {}

PATIENCE = 900
"""Seconds after which nobody believes any more that a file of tests goes on: each takes one of them or two."""

CLOCKS = 1024
"""Clocks that the race detector gives to tensor copies in turn: a later copy with the same clock hides that nobody
awaited the earlier one."""
KERNELS = (
    (hopper_rows, "product"),
    (hopper_widened, "product"),
    (hopper_columns, "products"),
    (hopper_columns, "sums"),
    (hopper_grouped_kernel, "products"),
    (hopper_quantize, "quantize"),
    (hopper_norm, "add_and_norm"),
    (hopper_gate, "gate"),
    (hopper_rotate, "rotate_and_store"),
    (hopper_attention, "attend"),
)
"""Modules of kernels, and the function of each."""

required = pytest.mark.skipif(bool(MISSING), reason=MISSING or "never")
"""On tests that need the interpreter."""


@contextlib.contextmanager
def interpreted():
    """A context in which the kernels for Hopper run on the CPU, wherever they are called from.

    Memory that nobody has written is NaN.  An access out of bounds, or a barrier that is waited for in vain, leaves the
    interpreter's threads waiting for each other: then the process ends, and says where it was.

    Pallas' race detector runs, and the context ends with an error if it found a race.  It yields what the detector
    knows of each launch, for `assert_no_races` after every test and for races that a test expects.  The detector of JAX
    0.10 follows copies to shared memory only; those of 0.11 and later also copies from it, and the fences before them.
    """
    with pytest.MonkeyPatch.context() as patch:
        launches = []
        state = getattr(gpu_callbacks, _RACES)
        patch.setattr(gpu_callbacks, _RACES, lambda *args, **kwargs: _appended(launches, state(*args, **kwargs)))
        for name in (
            "load",
            "store",
            "full",
            "product",
            "product_plain",
            "product_widened",
            "zeros",
            "store_transposed",
        ):
            patch.setattr(warpgroup, name, globals()[f"_{name}"])
        patch.setattr(plgpu, "layout_cast", lambda x, _: x)
        patch.setattr(plgpu, "broadcasted_iota", _broadcasted_iota)
        if jax.__version_info__ < (0, 11):  # which compiles every block of the grid, and every thread of it, anew
            patch.setattr(thread_map, "_run_jaxpr", _run_jaxpr)
        if jax.__version_info__ < (0, 11):  # which drops a copy that reaches beyond its target
            patch.setattr(GPUSharedMemory, "store_buffer_content", _store_within_bounds)
        # Where a tensor copy reads beyond its source, a GPU fills in zeros, as JAX 0.11 does; in JAX 0.10 it is NaN.
        parameters = InterpretGPUParams(
            out_of_bounds_reads="uninitialized", detect_races=True, num_tma_threads_per_device=CLOCKS, **_WARN
        )
        if not hasattr(gpu_callbacks, "call_allocate_cluster_barriers"):  # a barrier of several thread blocks
            patch.setattr(plgpu, "BlockSpec", functools.partial(_block_spec, plgpu.BlockSpec))
        for module, name in KERNELS:
            patch.setattr(module, name, functools.partial(getattr(module, name), interpret=parameters))
        patch.setattr(face, "unless_portable", lambda kernel, *_, **__: kernel)  # which takes no side effects
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            yield launches
            assert_no_races(launches)
        finally:
            faulthandler.cancel_dump_traceback_later()
            gpu_callbacks.reset_gpu_interpret_mode_state()  # of which an exception leaves something behind
            face._matmuls.clear_cache()


def _block_spec(original, *args, collective_axes=(), **kwargs):
    """Without multicast: each block of a cluster copies all of a tile, and releases it by itself."""
    return original(*args, **kwargs)


def assert_no_races(launches):
    """Asserts that no race was found in any launch so far; where it was is in the test's output."""
    assert not has_race(launches), "Pallas' race detector found a race"


def has_race(launches) -> bool:
    """Whether a race was found in any launch since the last call."""
    found = any(launch.races_found for launch in launches)
    launches.clear()
    return found


def _appended(launches, launch):
    launches.append(launch)
    return launch


def _read(ref):
    """Shared memory, with a fence for the detector.

    From 0.11 on it wants one between a load and a later copy to the same memory.  Matrix instructions, which read
    most of it on a GPU, need none; neither do loads that an mbarrier orders, after which DeepGEMM has none.
    """
    value = ref[...]
    plgpu.commit_smem()
    return value


def _load(ref, layout, optimized=True):
    return _read(ref)


def _full(shape, value, layout):
    return jnp.full(shape, value, jnp.float32)


def _store(ref, values):
    ref[...] = values


def _broadcasted_iota(dtype, shape, dimension, layout):
    return jax.lax.broadcasted_iota(dtype, shape, dimension)


def _product(a, b):
    a, b = ((operand if isinstance(operand, jax.Array) else _read(operand)).astype(jnp.float32) for operand in (a, b))
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision="highest")


def _product_plain(a, b):
    a, b = ((operand if isinstance(operand, jax.Array) else operand[...]).astype(jnp.float32) for operand in (a, b))
    return jnp.matmul(a, b, precision="highest")


def _product_widened(a, b, columns, *, synchronise=False):
    a, b = _read(a), _read(b)
    parts = [slice(start, start + columns) for start in range(0, a.shape[1], columns)]
    return sum(_product(a[:, part], b[:, part]) for part in parts)


def _zeros(columns):
    return jnp.zeros((warpgroup.ROWS, columns), jnp.float32)


def _store_transposed(ref, values):
    ref[...] = values.T


def _evaluate(jaxpr, consts, *args):
    core.eval_jaxpr(jaxpr, consts, *args)


def _run_jaxpr(jaxpr, consts, *args):
    """As later versions have it: a function of the module's, under which JAX finds the compiled program again."""
    jax.jit(_evaluate, static_argnums=0).trace(jaxpr, consts, *args).lower().compile()(consts, *args)


def _store_within_bounds(self, key, ranges, value, *args, **kwargs):
    """Stores the part of a value that is within the buffer, as tensor copies do."""
    sides = list(zip(ranges, self.mem[key].logical_shape, strict=False))
    kept = tuple(slice(max(side - one.start, 0)) for one, side in sides if isinstance(one, slice))
    within = tuple(slice(one.start, min(one.stop, side)) if isinstance(one, slice) else one for one, side in sides)
    return _store_buffer(self, key, within, value[kept], *args, **kwargs)
