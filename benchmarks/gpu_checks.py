"""Checks the results of the kernels for Hopper GPUs on the device; `gpu.py` runs it.

    python benchmarks/gpu_checks.py [--after NAME] [--dry]

Writes a line of JSON when a check begins, `{"begins": name}`, and another with its result.  `gpu.py` stops a check that
does not end, and continues after it in a new process, since an error of a kernel makes a CUDA context unusable.

A check is an entry of `checks`: a name, and a function that returns what was found, the reference, and the largest
difference that is allowed, for each element.  It is called REPEATS times: all calls must return the same bits, so that
a race between warpgroups is found even where a wrong result is rare.

`--dry` runs small checks on a CPU, in Pallas' interpreter for GPU kernels, which is in `tests/`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import gpu_decoding
import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax.typing import ArrayLike

from perparam.models import flash
from perparam.policies import matmul_override, scaled_matmuls
from perparam.policies.checks import Trial
from perparam.policies.formats import Format, stored_format
from perparam.policies.matmul import hopper, hopper_grouped, oracle, trials
from perparam.policies.matmul.dispatch import describe
from perparam.policies.matmul.grouped_calls import GroupedCall
from perparam.policies.scaled_array import ScaledArray
from perparam.policies.targets import Target

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
BF16, F16, F32 = (jnp.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))
ROUNDING = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}
"""The unit roundoff of each dtype of results."""

FP8_SUMS = 2.0**-9
"""Error of sums in float8 tensor cores, relative to the sum of magnitudes.

They add 32 products at a time to a sum, and cut each term about 13 bits below the largest one: for 128 columns, 132
errors of up to 2**-13 of a largest term, after which the kernels add in float32.  Errors of different signs cancel: the
root of their number counts, 2**-9.5, and the largest term is at most the sum of magnitudes.  A step of 128 columns that
is missing, or read too early, changes some elements by more than this.  This bound has not been tried on a GPU yet.
"""

FLASH_ERROR = 2.0**-6
"""Relative to the largest value: attention weights and the result are rounded to 16 bits, in another order."""

QUOTIENT_ERROR = 2.0**-21
"""Relative error of a float32 quotient on a GPU, whose division may be approximate by 2 units in the last place."""

REPEATS = 4


Result = tuple[ArrayLike, ArrayLike, ArrayLike]
"""Found values and the reference, of the same shape, and the bound of their difference for each element."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    name  unique, begins with the kind of the kernel: "hopper rows: …"
    run   computes the results anew
    """

    name: str
    run: Callable[[], Iterator[Result]]


@functools.lru_cache(maxsize=4)
def weight(out: int, features: int, block: tuple[int, int], of: np.dtype) -> ScaledArray:
    """Returns a random kernel (out, in) in a float8 dtype, with a different scale for each block."""
    random = np.random.default_rng([out, features])
    kernel = random.standard_normal((out, features), np.float32).astype(of)
    scales = random.uniform(0.5, 2.0, (-(-out // block[0]), -(-features // block[1]))).astype(np.float32)
    return ScaledArray(jnp.asarray(kernel), jnp.asarray(scales), stored_format(of, block, F32))


@functools.lru_cache(maxsize=4)
def exact_rows(rows: int, features: int, dtype: np.dtype) -> jax.Array:
    """Returns random activations (rows, in) whose quantisation to e4m3 in blocks of (1, 128) is exact.

    The scale of each block is a power of two, so that a product in W8A8 has the reference of one in W8A16.
    """
    random = np.random.default_rng([rows, features])
    values = np.clip(random.standard_normal((rows, features // 128, 128), np.float32) * 100, -448, 448)
    values[:, :, 0] = 448
    exponents = random.integers(-9, -5, (rows, features // 128, 1))
    scaled = values.astype(E4M3).astype(np.float32) * np.exp2(exponents).astype(np.float32)
    return jnp.asarray(scaled.reshape(rows, features).astype(dtype))


def products(
    implementation: str,
    rows: int,
    outs: tuple[int, ...],
    features: int,
    narrow: bool,
    *,
    x: np.dtype = BF16,
    kernel: np.dtype = E4M3,
    block: tuple[int, int] = (128, 128),
    result: np.dtype | None = None,
) -> Check:
    """Returns the check of products of x (rows, in) with kernels (out, in), by one implementation, in one call."""
    result = result or x
    mode = "W8A8" if narrow else "W8A16"
    name = f"{implementation}: {mode}, {rows} rows of {x}, {' + '.join(map(str, outs))} × {features} in {kernel}"
    name += f", blocks {block[0]}×{block[1]}" * (block != (128, 128)) + f", result {result}" * (result != x)

    @functools.partial(jax.jit, static_argnums=2)
    def product(activations: jax.Array, kernels: list[ScaledArray], compute: np.dtype | None) -> tuple[jax.Array, ...]:
        with matmul_override(implementation):
            return scaled_matmuls(activations, kernels, compute=compute, result=result)

    @jax.jit
    def reference(activations: jax.Array, kernel: ScaledArray) -> tuple[jax.Array, jax.Array]:
        wide, weight = activations.astype(F32), kernel.dequantize()
        return oracle.dot(wide, weight), oracle.dot(jnp.abs(wide), jnp.abs(weight))

    def run() -> Iterator[Result]:
        activations = exact_rows(rows, features, x)
        kernels = [weight(out, features, block, kernel) for out in outs]
        found = product(activations, kernels, E4M3 if narrow else None)
        for y, one in zip(found, kernels, strict=True):
            want, magnitude = reference(activations, one)
            # Tensor cores may cut where others round: twice the error for each term, and that of the reference.
            sums = FP8_SUMS if narrow else (3 * features + 8) * ROUNDING[F32]
            rounding = ROUNDING[result] * (1 + 2.0**-7)
            yield y, want, sums * np.asarray(magnitude) + rounding * np.abs(np.asarray(want))

    return Check(name, run)


def grouped(sizes: tuple[int, ...], outs: tuple[int, ...], features: int, narrow: bool, *, x: np.dtype = BF16) -> Check:
    """Returns the check of products of groups of rows with kernels (groups, out, in), in one launch.

    sizes  rows of each group; the kernels of those without rows are NaN, and not read
    """
    rows, used = sum(sizes), sum(size > 0 for size in sizes)
    mode = "W8A8" if narrow else "W8A16"
    kernels_of = f"{' + '.join(map(str, outs))} × {features}"
    name = f"hopper grouped: {mode}, {rows} rows of {x}, {used} of {len(sizes)} groups, {kernels_of}"

    def stack(out: int) -> ScaledArray:
        one = weight(out, features, (128, 128), E4M3)
        # Powers of two distinguish the kernels of groups, and change no rounding.
        factors = np.where(np.array(sizes) > 0, np.exp2(np.arange(len(sizes)) % 5 - 2), np.nan).astype(np.float32)
        values = jnp.broadcast_to(one.values, (len(sizes), *one.values.shape))
        return ScaledArray(values, one.scale_inv * factors[:, None, None], one.format)

    @jax.jit
    def product(activations: jax.Array, kernels: list[ScaledArray]) -> tuple[jax.Array, ...]:
        format = Format(E4M3) if narrow else None
        formats = tuple(kernel.format for kernel in kernels)
        calls = tuple(describe(rows, (out, features), x, formats[0], format) for out in outs)
        call = GroupedCall(len(sizes), calls, formats, x, format, Target("cuda", (9, 0)))
        return hopper_grouped.GROUPED.run(call, activations, kernels, jnp.asarray(sizes, jnp.int32))

    @jax.jit
    def reference(activations: jax.Array, kernel: ScaledArray) -> tuple[jax.Array, jax.Array]:
        wide, weight = activations.astype(F32), kernel.dequantize()
        return oracle.dot(wide, weight), oracle.dot(jnp.abs(wide), jnp.abs(weight))

    def run() -> Iterator[Result]:
        activations = exact_rows(rows, features, x)
        found = product(activations, [stack(out) for out in outs])
        for y, out in zip(found, outs, strict=True):
            factors = np.repeat(np.exp2(np.arange(len(sizes)) % 5 - 2), sizes)[:, None]
            one = reference(activations, weight(out, features, (128, 128), E4M3))
            want, magnitude = (np.asarray(array) * factors for array in one)
            sums = FP8_SUMS if narrow else (3 * features + 8) * ROUNDING[F32]
            yield y, want, sums * magnitude + ROUNDING[x] * (1 + 2.0**-7) * np.abs(want)

    return Check(name, run)


def routed(tokens: int, experts: int = 128, per_token: int = 8) -> tuple[int, ...]:
    """Returns the rows of each expert for tokens with random experts, of which some are chosen more often."""
    random = np.random.default_rng(tokens)
    scores = random.gumbel(size=(tokens, experts)) + random.normal(size=experts)
    return tuple(np.bincount(np.argsort(scores, axis=1)[:, -per_token:].ravel(), minlength=experts).tolist())


def quantised(rows: int, features: int, dtype: np.dtype) -> Check:
    """Returns the check of the kernel that quantises activations (rows, in)."""

    def run() -> Iterator[Result]:
        x = np.random.default_rng(rows).standard_normal((rows, features)).astype(dtype)
        x[0] = 0
        values, scales = jax.jit(hopper.QUANTISATION.run, static_argnums=1)(x, hopper.ROWS_FORMAT)
        wide = x.astype(np.float64)
        amax = np.abs(wide.reshape(rows, features // 128, 128)).max(axis=2)
        expected = np.where(amax == 0, 1, amax / 448)
        yield scales, expected, QUOTIENT_ERROR * expected
        # Half the distance of e4m3 numbers: relative to the value, or to the scale for subnormal numbers.
        by_column = np.repeat(expected, 128, axis=1)
        half = np.maximum(2.0**-4 * np.abs(wide), 2.0**-10 * by_column)
        found = np.asarray(values).astype(np.float64) * np.repeat(np.asarray(scales, np.float64), 128, axis=1)
        yield found, wide, half + 4 * QUOTIENT_ERROR * np.abs(wide)

    return Check(f"hopper quantize: {rows} × {features}, {dtype}", run)


def attention(tokens: int, padding: str, window: int | None, dtype: np.dtype) -> Check:
    """Returns the check of cuDNN's flash attention in a prompt with `padding`: "none" or "last"."""
    name = f"flash attention: {tokens} tokens, {dtype}, padding {padding}, window {window}"

    def run() -> Iterator[Result]:
        random = np.random.default_rng(tokens)
        q, k, v = (random.standard_normal((2, tokens, heads, 128)).astype(dtype) for heads in (16, 8, 8))
        lengths = {"none": [[tokens], [tokens]], "last": [[tokens // 3], [tokens - 7]]}[padding]
        mask = np.arange(tokens)[None] < np.array(lengths)
        run = jax.jit(flash.attend, static_argnums=(4, 5))
        implementation = "cudnn" if timing.on_gpu() else "xla"
        found = run(q, k, v, mask, window, implementation)
        want = run(*(array.astype(np.float32) for array in (q, k, v)), mask, window, "xla")
        yield found, want, np.full(want.shape, FLASH_ERROR * np.abs(want).max())

    return Check(name, run)


def masked_attention(tokens: int, slots: int, dtype: np.dtype) -> Check:
    """Returns the check of cuDNN's attention with a mask, of tokens that follow others in a cache of `slots`."""

    def run() -> Iterator[Result]:
        random = np.random.default_rng(tokens)
        q = random.standard_normal((2, tokens, 16, 128)).astype(dtype)
        k, v = (random.standard_normal((2, slots, 8, 128)).astype(dtype) for _ in range(2))
        start = slots // 2 + np.arange(tokens)
        holes = random.random((2, 1, slots)) < 0.9
        seen = (np.arange(slots) <= start[:, None]) & holes
        run = jax.jit(flash.attend_masked, static_argnums=4)
        found = run(q, k, v, seen, "cudnn" if timing.on_gpu() else "xla")
        want = run(*(array.astype(np.float32) for array in (q, k, v)), seen, "xla")
        yield found, want, np.full(want.shape, FLASH_ERROR * np.abs(want).max())

    return Check(f"flash attention with a mask: {tokens} tokens, {slots} slots, {dtype}", run)


def decoding_step(size: str, mode: str, rows: int, tokens: int, slots: int) -> Check:
    """Returns the check of a decoding step of two layers with fused kernels; see `gpu_decoding.step`."""
    name = f"decoding step: {size}, {mode}, {rows} rows, {tokens} tokens in {slots} slots"
    return Check(name, functools.partial(gpu_decoding.step, size, mode, rows, tokens, slots))


def trial(trial: Trial) -> Check:
    """Returns the check that a kernel passes the trial before its first use: else a benchmark measures another one."""

    def run() -> Iterator[Result]:
        if why := trial.compare():
            raise AssertionError(why)
        yield from ()

    return Check(f"trial: {trial.kernel}, {trial.kind}", run)


def trials_of_kernels() -> Iterator[Check]:
    """Yields the checks of the trials that `generate.py` and the largest products need."""
    yield from map(trial, gpu_decoding.trials())
    for rows, compute in itertools.product((8, 64, 128, 1000), (None, Format(E4M3))):
        call = describe(rows, (4096, 4096), BF16, stored_format(E4M3, (128, 128), F32), compute)
        for implementation in (hopper.COLUMNS, hopper.ROWS, hopper.WIDENED):
            if implementation.refuses(call) is None:
                yield trial(trials.of_product(implementation, call))
    for tokens, compute in itertools.product((1, 4096), (None, Format(E4M3))):
        stored = stored_format(E4M3, (128, 128), F32)
        call = describe(8 * tokens, (768, 2048), BF16, stored, compute)
        yield trial(
            hopper_grouped.GROUPED.trial(GroupedCall(128, (call,), (stored,), BF16, compute, Target("cuda", (9, 0))))
        )
    yield trial(trials.of_quantisation(hopper.QUANTISATION, hopper.ROWS_FORMAT, BF16))


def checks() -> Iterator[Check]:
    """Yields all checks, short ones first within each kind."""
    for rows, features, dtype in itertools.product((1, 64, 1000, 4096), (1024, 4096), (BF16,)):
        yield quantised(rows, features, dtype)
    yield from (quantised(128, 1024, dtype) for dtype in (F16, F32))
    for narrow, rows in itertools.product((False, True), (1, 3, 8, 16, 17, 32, 64)):
        yield products("hopper columns", rows, (1024,), 4096, narrow)
        yield products("hopper columns", rows, (4096,), 1024, narrow)
    for rows in (65, 128, 200, 512, 1000, 4096):
        yield products("hopper columns", rows, (4096,), 4096, False)
    for rows in (65, 128, 130, 256, 512, 1000):  # with split columns
        yield products("hopper columns", rows, (1024,), 4096, True)
    for narrow, rows in itertools.product((False, True), (1, 8, 64, 100, 200)):
        yield products("hopper columns", rows, (4096, 1024, 1024), 4096, narrow)
    yield products("hopper columns", 8, (12288, 12288), 4096, False)
    yield products("hopper columns", 1, (4096,), 12288, True)
    yield products("hopper columns", 8, (1024,), 1024, False, x=F16)
    yield products("hopper columns", 8, (1024,), 1024, False, kernel=E5M2)
    for narrow in (False, True):
        yield products("hopper columns", 8, (1024,), 1024, narrow, block=(256, 512))
        yield products("hopper columns", 8, (1024,), 1024, narrow, result=F32)
    for rows in (513, 1000, 4096):
        yield products("hopper widened", rows, (4096,), 4096, False)
    yield products("hopper widened", 520, (12288, 12288), 4096, False)
    yield products("hopper widened", 4096, (4096,), 12288, False)
    yield products("hopper widened", 1000, (4096,), 1024, False, x=F16)
    yield products("hopper widened", 1000, (4096,), 1024, False, kernel=E5M2)
    yield products("hopper widened", 1000, (4096,), 1024, False, block=(256, 512))
    yield products("hopper widened", 1000, (4096,), 1024, False, result=F32)
    for rows in (65, 128, 200, 384, 512, 1000, 4096):
        yield products("hopper rows", rows, (1024,), 4096, True)
        yield products("hopper rows", rows, (4096,), 1024, True)
    yield products("hopper rows", 384, (5632,), 1024, True)  # 132 tiles: no clusters on a GPU with as many processors
    yield products("hopper rows", 1000, (12288,), 4096, True)
    yield products("hopper rows", 4096, (4096,), 12288, True)
    yield products("hopper rows", 4096, (7168,), 2048, True)
    yield products("hopper rows", 256, (1024,), 1024, True, block=(256, 512))
    yield products("hopper rows", 256, (1024,), 1024, True, result=F32)
    for narrow, tokens in ((False, 1), (True, 4), (False, 64), (True, 128), (False, 256), (True, 1000), (False, 4096)):
        yield grouped(routed(tokens), (768, 768), 2048, narrow)  # tiles of 8, 16, … 128 rows
    for narrow, tokens in ((False, 1), (True, 64), (False, 1000), (True, 4096)):
        yield grouped(routed(tokens), (2048,), 768, narrow)
    yield grouped((0, 1000, 0, 1), (768, 768), 2048, False, x=F16)
    for padding, window in itertools.product(("none", "last"), (None, 100)):
        yield attention(1024, padding, window, BF16)
    yield attention(130, "last", None, F16)
    yield masked_attention(512, 2048, BF16)
    yield masked_attention(131, 1000, F16)
    yield from (decoding_step(*step) for step in gpu_decoding.STEPS)
    yield from trials_of_kernels()


def dry_checks() -> Iterator[Check]:
    """Yields a check of each kind that the interpreter runs in seconds."""
    yield quantised(70, 128, BF16)
    yield products("hopper columns", 2, (128,), 256, False)
    yield products("hopper columns", 5, (128, 128), 128, True)
    yield products("hopper rows", 70, (256,), 128, True)
    yield products("hopper widened", 130, (256,), 128, False)
    yield grouped((1, 0, 3), (128, 128), 128, False)
    yield grouped((0, 9, 3), (128,), 256, True)
    yield attention(130, "last", None, BF16)
    yield masked_attention(131, 280, BF16)


def judged(check: Check, repeats: int) -> dict[str, Any]:
    """Returns the result of a check: whether it passed, the largest difference in bounds, and the relative error.

    A failed check has a reason.
    """
    result: dict[str, Any] = {"name": check.name, "passed": False, "of bound": 0.0, "error": 0.0}
    first: list[np.ndarray] = []
    for turn in range(repeats):
        outputs = []
        for found, want, bound in check.run():
            outputs.append(np.asarray(found))
            if turn:
                continue
            wide, want, bound = (np.asarray(array).astype(np.float64) for array in (found, want, bound))
            if wide.shape != want.shape:
                return result | {"why": f"shape {wide.shape}, expected {want.shape}"}
            # An infinite or NaN difference is no smaller than a bound.
            outside = ~(np.abs(wide - want) <= bound)
            with np.errstate(all="ignore"):
                ratios = np.where(bound > 0, np.abs(wide - want) / np.where(bound > 0, bound, 1), 0)
                error = float(np.linalg.norm(wide - want) / np.linalg.norm(want))
            result["of bound"] = max(result["of bound"], float(np.nan_to_num(ratios, nan=1e9).max()))
            result["error"] = max(result["error"], float(np.nan_to_num(error, nan=1e9)))
            if outside.any():
                where = tuple(int(i) for i in np.argwhere(outside)[0])
                result["why"] = (
                    f"{outside.sum()} of {outside.size} elements outside the bound, the first at {where}: "
                    f"found {wide[where]:.6g}, expected {want[where]:.6g}"
                )
        if turn and any(a.tobytes() != b.tobytes() for a, b in zip(first, outputs, strict=True)):
            result.setdefault("why", f"call {turn + 1} returned other bits than the first")
        first = first or outputs
    return result | {"passed": "why" not in result}


def line(value: Any) -> None:
    """Writes a line of JSON."""
    print(json.dumps(value), flush=True)


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """A context in which the kernels run in Pallas' interpreter, on a CPU, and four tiles keep a GPU busy."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
    import interpreter

    if interpreter.MISSING:
        raise RuntimeError(interpreter.MISSING)
    four = (mock.patch.object(module, "multiprocessors", return_value=4) for module in (hopper, hopper_grouped))
    with interpreter.interpreted(), next(four), next(four):
        yield


def main() -> int:
    """Runs the checks, and returns the exit code: 0, also if some fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", metavar="NAME", help="only the checks after this one")
    parser.add_argument("--dry", action="store_true", help="small checks in an interpreter on a CPU")
    arguments = parser.parse_args()
    left = list(dry_checks() if arguments.dry else checks())
    if arguments.after is not None:
        left = left[[check.name for check in left].index(arguments.after) + 1 :]
    line({"left": [check.name for check in left]})
    with interpreter() if arguments.dry else contextlib.nullcontext():
        for check in left:
            line({"begins": check.name})
            try:
                line(judged(check, 2 if arguments.dry else REPEATS))
            except Exception as error:  # the other checks still run, and the error is the result of this one
                why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                line({"name": check.name, "passed": False, "why": why})
                if isinstance(error, jax.errors.JaxRuntimeError):
                    return 1  # the CUDA context may be unusable
    return 0


if __name__ == "__main__":
    sys.exit(main())
