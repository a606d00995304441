"""Which implementation takes a call: decided when it is traced, by platform, capability, shape, block and dtypes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from .. import dtypes
from ..blocks import DEFAULT_BLOCK, Block, as_block, block_sides
from ..errors import UnknownImplementation, UnsupportedCast
from ..formats import Format, as_format
from ..targets import HOPPER, Target, targeting
from . import cpu, hopper, xla
from .calls import Call, Implementation
from .oracle import ORACLE


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation of a call, and why it was chosen.

    implementation  its name
    gist            how it does it
    refused         names of those that come before it, and why they do not take the call
    """

    implementation: str
    gist: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        passed_over = "".join(f"; not {name}: {why}" for name, why in self.refused)
        return f"{self.implementation} ({self.gist}{passed_over})"


_CPU = (cpu.SLABS, cpu.TWO_ROWS, xla.DOT)
_ANY = (xla.DOT, xla.REDUCTION, xla.BY_BLOCK, xla.WIDENED)
_HOPPER = (xla.DOT, hopper.ROWS, hopper.COLUMNS, *_ANY[1:])
IMPLEMENTATIONS = {one.name: one for one in (*_CPU, *_HOPPER, ORACLE)}


# Part of the keys under which jax caches traces: a function traced outside the context is traced again within.
_override = jax.make_user_context(None)


@contextlib.contextmanager
def matmul_override(implementation: str | None = None, target: str | Target | None = None) -> Iterator[None]:
    """A context in which all matmuls take `implementation`, or are traced as for `target`: for tests, benchmarks, and
    compiling for another machine.

    implementation  a key of `IMPLEMENTATIONS`, such as "oracle"
    target          "cpu", "cuda:9.0", …, see `Target.parse`

    >>> with matmul_override(target="cuda:9.0"):
    ...     matmul_plan(1, (4096, 4096), block=(128, 128)).implementation
    'hopper columns'

    Raises:
      UnknownImplementation: for one that nobody has heard of.
      UnknownTarget: likewise.
      UnsupportedCast: at the call, where the implementation cannot take it.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise UnknownImplementation(f"no implementation {implementation!r}, there are: {', '.join(IMPLEMENTATIONS)}.")
    with _override(implementation or _override.value), targeting(target):
        yield


def choose(call: Call, target: Target) -> tuple[Implementation, Choice]:
    """The first implementation for `target` that takes the call, and what to say about it."""
    if (forced := _override.value) is not None:
        one = IMPLEMENTATIONS[forced]
        if why := one.refuses(call):
            raise UnsupportedCast(f"{forced!r}, which matmul_override asks for, does not take this call: {why}.")
        return one, Choice(one.name, one.gist)
    refused: list[tuple[str, str]] = []
    for one in candidates(target):
        why = one.refuses(call)
        if why is None:
            return one, Choice(one.name, one.gist, tuple(refused))
        refused.append((one.name, why))
    raise AssertionError(f"nothing takes {call}")


def candidates(target: Target) -> tuple[Implementation, ...]:
    """The implementations for `target`, the preferred ones first."""
    if target.platform == "cpu":
        return _CPU
    return _HOPPER if target.platform == "cuda" and target.capability == HOPPER else _ANY


def describe(
    rows: int | None,
    kernel_shape: tuple[int, ...],
    x: np.dtype,
    kernel: Format,
    compute: Format | None,
) -> Call:
    """The call that `scaled_matmul` makes of operands of these shapes and formats.

    kernel  complete where it is narrow; of a plain kernel that is quantised on the way, its block may stand for the
            one that `compute` leaves open
    """
    out_features, in_features = kernel_shape
    both_narrow = compute is not None and compute.narrow
    if both_narrow and not kernel.narrow:
        assert compute is not None
        kernel = compute.completed(kernel.block)
    narrow = kernel.narrow
    weight = None if both_narrow or (narrow and compute is None) else (compute.values if compute else x)
    if compute is not None and compute.narrow:  # a named format says how activations are quantised, else the kernel's
        operand = (compute if compute.block is not None else kernel).of_rows(compute.values)
    else:
        operand = Format(weight or x)
    if narrow:
        assert kernel.block is not None
        kernel = dataclasses.replace(kernel, block=block_sides(kernel.block, (out_features, in_features)))
    else:
        kernel = Format(kernel.values)
    return Call(rows, out_features, in_features, operand, kernel, weight, x)


def matmul_plan(
    rows: int,
    kernel_shape: tuple[int, int],
    *,
    x: DTypeLike = "bf16",
    kernel: Any = "f8_e4m3fn",
    block: Block = DEFAULT_BLOCK,
    compute: Any = None,
    target: str | Target = "here",
) -> Choice:
    """Which implementation `scaled_matmul` takes for operands of these shapes and formats, and why.

    rows          all leading axes of x together
    kernel_shape  (out, in)
    kernel        a dtype, in blocks of `block`, or a format
    compute       as for `scaled_matmul`
    target        "here", "cpu", "cuda", "cuda:9.0", …

    >>> matmul_plan(512, (4096, 4096), target="cuda:9.0", compute="f8_e4m3fn").implementation
    'hopper rows'
    >>> matmul_plan(1, (4096, 4096), target="cuda:8.0").implementation
    'fused reduction'
    """
    format = as_format(kernel).completed(as_block(block))
    call = describe(rows, kernel_shape, dtypes.as_dtype(x), format, None if compute is None else as_format(compute))
    return choose(call, Target.parse(target))[1]
