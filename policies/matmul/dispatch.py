"""Dispatch: chooses the implementation of a call at trace time, by target, shapes and formats."""

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
    """The implementation of a call, and the reason for the choice.

    implementation  its name
    gist            its method in one line
    refused         names of the preferred implementations, and why each does not accept the call
    """

    implementation: str
    gist: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        reasons = "".join(f"; not {name}: {why}" for name, why in self.refused)
        return f"{self.implementation} ({self.gist}{reasons})"


_CPU = (cpu.SLABS, cpu.TWO_ROWS, xla.DOT)
_ANY = (xla.DOT, xla.REDUCTION, xla.BY_BLOCK, xla.WIDENED)
_HOPPER = (xla.DOT, hopper.ROWS, hopper.COLUMNS, *_ANY[1:])
GENERIC = frozenset(one.name for one in _ANY)
"""Names of the implementations that no device has to itself: what a matmul falls back to."""

IMPLEMENTATIONS = {one.name: one for one in (*_CPU, *_HOPPER, ORACLE)}


# A user context is part of JAX's cache keys: a function that was traced outside the context is traced again inside it.
_override = jax.make_user_context(None)


@contextlib.contextmanager
def matmul_override(implementation: str | None = None, target: str | Target | None = None) -> Iterator[None]:
    """A context in which all matmuls use `implementation`, or are traced for `target`.

    For tests, benchmarks, and compiling for another machine.

    implementation  a key of `IMPLEMENTATIONS`, such as "oracle"; None: the choice of the dispatch
    target          "cpu", "cuda:9.0", …, see `Target.parse`; None: the current target

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
    with _override(implementation or _override.value), targeting(target):
        yield


def choose(call: Call, target: Target) -> tuple[Implementation, Choice]:
    """Returns the first implementation for `target` that accepts the call, and its description as a Choice.

    Raises:
      UnsupportedCast: if the implementation of `matmul_override` does not accept the call.
    """
    if (name := _override.value) is not None:
        implementation = IMPLEMENTATIONS[name]
        if why := implementation.refuses(call):
            raise UnsupportedCast(
                f"{name!r}, the implementation in matmul_override, does not accept this call: {why}. Use another one."
            )
        return implementation, Choice(implementation.name, implementation.gist)
    refused: list[tuple[str, str]] = []
    for implementation in candidates(target):
        why = implementation.refuses(call)
        if why is None:
            return implementation, Choice(implementation.name, implementation.gist, tuple(refused))
        refused.append((implementation.name, why))
    raise AssertionError(f"no implementation accepts {call}")


def candidates(target: Target) -> tuple[Implementation, ...]:
    """Returns the implementations for `target` in order of preference."""
    if target.platform == "cpu":
        return _CPU
    return _HOPPER if target.platform == "cuda" and target.capability == HOPPER else _ANY


def describe(
    rows: int | None,
    kernel_shape: tuple[int, ...],
    x: np.dtype,
    kernel: Format,
    compute: Format | None,
    result: np.dtype | None = None,
) -> Call:
    """Returns the call of `scaled_matmul` for operands of these shapes and formats.

    rows          product of the leading axes of x, or None
    kernel_shape  (out, in)
    x             dtype of x
    kernel        format of the kernel, complete if it is narrow; for a kernel that the call quantises, its block is
                  the default for `compute` formats without a block
    compute       format of `scaled_matmul`'s argument `compute`
    result        dtype of the result; None: that of x
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
    return Call(rows, out_features, in_features, operand, kernel, weight, x if result is None else result)


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
    """Returns the implementation that `scaled_matmul` chooses for operands of these shapes and formats, and the reason.

    rows          product of the leading axes of x
    kernel_shape  (out, in)
    x             dtype of x
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
