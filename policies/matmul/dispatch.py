"""Dispatch: chooses the implementation of a call at trace time, by target, shapes and formats."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from .. import dtypes
from ..blocks import DEFAULT_BLOCK, Block, as_block, block_sides
from ..checks import Check, check, checking, clauses
from ..errors import UnknownImplementation, UnsupportedCast
from ..formats import Format, as_format
from ..targets import Target, targeting
from . import blackwell, cpu, hopper, native, trials, xla
from .calls import BY_XLA, Call, Implementation, Quantizer, by_xla
from .oracle import ORACLE


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation of a call, and the reason for the choice.

    implementation  its name
    gist            its method in one line
    refused         names of the preferred implementations, and why each does not accept the call, or is slower
    checks          for each kernel made for the device that accepts the call: whether it was compared with the
                    reference on this device, and is used or not
    """

    implementation: str
    gist: str
    refused: tuple[tuple[str, str], ...] = ()
    checks: tuple[Check, ...] = ()

    def __str__(self) -> str:
        reasons = "".join(f"; not {name}: {why}" for name, why in self.refused)
        checks = "".join(f"; {clause}" for clause in clauses(self.checks))
        return f"{self.implementation} ({self.gist}{reasons}{checks})"


_CPU = (native.NATIVE, cpu.SLABS, cpu.TWO_ROWS, xla.DOT)
_ANY = (xla.DOT, xla.REDUCTION, xla.BY_BLOCK, xla.WIDENED)
_HOPPER = (xla.DOT, hopper.WIDENED, hopper.ROWS, hopper.COLUMNS, *_ANY[1:])
_BLACKWELL = (xla.DOT, blackwell.BLOCK_SCALED, *_ANY[1:])
_TARGETS: dict[tuple[str, int | None, int | None], tuple[Implementation, ...]] = {
    ("cpu", None, None): _CPU,
    ("cuda", 8, None): _ANY,  # Ampere and Ada (8.9), whose float8 tensor cores XLA does not use with scales of blocks
    ("cuda", 9, 0): _HOPPER,
    ("cuda", 10, None): _BLACKWELL,  # B200, B300
    ("cuda", 12, None): _BLACKWELL,  # RTX 50, RTX PRO and DGX Spark
}
"""Implementations in order of preference, by platform and compute capability; None: any. Of others, `_ANY`."""

FALLBACKS = frozenset(one.name for one in (*_ANY, cpu.SLABS, cpu.TWO_ROWS))
"""Names of the implementations without a kernel of their own: what a matmul falls back to."""

IMPLEMENTATIONS = {one.name: one for one in (*_CPU, *_HOPPER, *_BLACKWELL, ORACLE)}


# A user context is part of JAX's cache keys: a function that was traced outside the context is traced again inside it.
_override = jax.make_user_context(None)


@contextlib.contextmanager
def matmul_override(
    implementation: str | None = None, target: str | Target | None = None, check: bool | None = None
) -> Iterator[None]:
    """A context in which all matmuls use `implementation`, are traced for `target`, or use kernels without a check.

    For tests, benchmarks, and compiling for another machine.

    implementation  a key of `IMPLEMENTATIONS`, such as "oracle", which is not checked; None: the choice of the dispatch
    target          "cpu", "cuda:9.0", …, see `Target.parse`; None: the current target
    check           whether kernels are compared with the reference before their first use on a device of this process;
                    None: as before, at the outset yes, unless the environment has PERPARAM_CHECK_KERNELS=0

    >>> with matmul_override(target="cuda:9.0"):
    ...     matmul_plan(1, (4096, 4096), block=(128, 128)).implementation
    'hopper columns'

    Raises:
      UnknownImplementation, UnknownTarget: for any other name.
      UnsupportedCast: from a matmul in the context that the implementation does not accept.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise UnknownImplementation(
            f"no implementation {implementation!r}. Write one of these: {', '.join(IMPLEMENTATIONS)}."
        )
    with _override(implementation or _override.value), targeting(target), checking(check):
        yield


def override() -> str | None:
    """Returns the name of the implementation in `matmul_override`, or None."""
    name: str | None = _override.value
    return name


def choose(
    call: Call, target: Target, x: np.dtype | None = None, *, run_checks: bool = True
) -> tuple[Implementation, Choice]:
    """Returns the first implementation for `target` that accepts the call, and its description as a Choice.

    A kernel that differs from the reference on this device does not accept the call; if only its kernel that quantises
    activations does, `quantize_rows` replaces that.

    x           dtype of the activations before any quantisation; None: unknown, their quantisation is not checked
    run_checks  False: only results of earlier checks count

    Warns:
      RuntimeWarning: once for each kind of kernel that differs from the reference.
    Raises:
      UnsupportedCast: if the implementation of `matmul_override` does not accept the call.
    """
    if (name := _override.value) is not None:
        implementation = IMPLEMENTATIONS[name]
        if why := implementation.refuses(call):
            raise UnsupportedCast(
                f"{name!r}, the implementation in matmul_override, does not accept this call: {why}. Use another one."
            )
        named = (Check(name, "unchecked", "matmul_override names it"),) * implementation.needs_check
        return implementation, Choice(implementation.name, implementation.gist, (), named)
    refused: dict[str, str] = {}
    checks: list[Check] = []
    left = list(candidates(target))
    while left:
        implementation = left.pop(0)
        with targeting(target):  # whose number of multiprocessors costs depend on
            why = implementation.refuses(call)
            slower = None if why or implementation.name in refused else implementation.slower(call)
            preferred = None if slower is None else next(one for one in left if one.refuses(call) is None)
        if slower is not None and preferred is not None:
            refused[implementation.name] = slower
            left.insert(left.index(preferred) + 1, implementation)  # used if that one is wrong on this device
            continue
        if why is None and implementation.needs_check:
            checks.append(check(trials.of_product(implementation, call), target, run=run_checks))
            why = "its check failed" if checks[-1].state == "refused" else None
        if why is None:
            own = implementation.quantizer(call)
            quantizer, checked = checked_quantizer(own, call, target, x, run_checks)
            checks += checked
            if quantizer is not own:
                implementation = dataclasses.replace(implementation, quantizer=by_xla)
            refused.pop(implementation.name, None)
            choice = Choice(implementation.name, implementation.gist, tuple(refused.items()), tuple(checks))
            return implementation, choice
        refused[implementation.name] = why
    raise AssertionError(f"no implementation accepts {call}")


def checked_quantizer(
    quantizer: Quantizer, call: Call, target: Target, x: np.dtype | None, run_checks: bool = True
) -> tuple[Quantizer, list[Check]]:
    """Returns what quantises the activations of a call, `quantizer` unless it fails its check, and any check.

    x  dtype of the activations before the quantisation; None: unknown, nothing is checked
    """
    if x is None or not call.x.narrow or not quantizer.opaque:
        return quantizer, []
    found = check(trials.of_quantisation(quantizer, call.x, x), target, run=run_checks)
    return BY_XLA if found.state == "refused" else quantizer, [found]


def portable(call: Call, platform: str) -> Implementation:
    """Returns the first implementation without a kernel that accepts the call, whatever `matmul_override` names."""
    accept = (one for one in candidates(Target(platform)) if not one.opaque and one.refuses(call) is None)
    return next(accept)


def candidates(target: Target) -> tuple[Implementation, ...]:
    """Returns the implementations for `target` in order of preference."""
    major, minor = target.capability or (None, None)
    for key in ((target.platform, major, minor), (target.platform, major, None)):
        if key in _TARGETS:
            return _TARGETS[key]
    return _ANY


def describe(
    rows: int | None,
    kernel_shape: tuple[int, ...],
    x: np.dtype,
    kernel: Format,
    compute: Format | None,
    result: np.dtype | None = None,
    beside: tuple[int, ...] = (),
) -> Call:
    """Returns the call of `scaled_matmul` for operands of these shapes and formats.

    rows          product of the leading axes of x, or None
    kernel_shape  (out, in)
    x             dtype of x
    kernel        format of the kernel, complete if it is narrow; for a kernel that the call quantises, its block is
                  the default for `compute` formats without a block
    compute       format of `scaled_matmul`'s argument `compute`
    result        dtype of the result; None: that of x
    beside        out_features of other kernels in the same call of `scaled_matmuls`
    """
    out_features, in_features = kernel_shape
    both_narrow = compute is not None and compute.narrow
    if both_narrow and not kernel.narrow:
        assert compute is not None
        kernel = compute.completed(kernel.block)
    narrow = kernel.narrow
    weight = None if both_narrow or (narrow and compute is None) else (compute.values if compute else x)
    if compute is not None and compute.narrow:  # activations have the format of a named `compute`, else the kernel's
        operand = (compute if compute.block is not None else kernel).of_rows(compute.values)
    else:
        operand = Format(weight or x)
    if narrow:
        assert kernel.block is not None
        kernel = dataclasses.replace(kernel, block=block_sides(kernel.block, (out_features, in_features)))
    else:
        kernel = Format(kernel.values)
    return Call(rows, out_features, in_features, operand, kernel, weight, x if result is None else result, beside)


def matmul_plan(
    rows: int,
    kernel_shape: tuple[int, int],
    *,
    x: DTypeLike = "bf16",
    kernel: Any = "f8_e4m3fn",
    block: Block = DEFAULT_BLOCK,
    compute: Any = None,
    target: str | Target = "here",
    beside: Sequence[int] = (),
) -> Choice:
    """Returns the implementation that `scaled_matmul` chooses for operands of these shapes and formats, and the reason.

    Nothing runs on a device: the checks of the Choice are results of earlier calls on a device of this process.

    rows          product of the leading axes of x
    kernel_shape  (out, in)
    x             dtype of x
    kernel        a dtype, in blocks of `block`, or a format
    compute       as for `scaled_matmul`
    target        "here", "cpu", "cuda", "cuda:9.0", …
    beside        out_features of other kernels in the same call of `scaled_matmuls`

    >>> matmul_plan(512, (4096, 4096), target="cuda:9.0", compute="f8_e4m3fn").implementation
    'hopper rows'
    >>> matmul_plan(1, (4096, 4096), target="cuda:8.0").implementation
    'fused reduction'
    """
    format = as_format(kernel).completed(as_block(block))
    activations = dtypes.as_dtype(x)
    compute = None if compute is None else as_format(compute)
    call = describe(rows, kernel_shape, activations, format, compute, beside=tuple(beside))
    return choose(call, Target.parse(target), activations, run_checks=False)[1]
