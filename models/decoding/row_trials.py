"""Trials of norm and gate in a decoding step: small operands, on which kernel and definition are compared on a GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import jit

from ...policies.checks import Trial
from ...policies.dtypes import dtype_name
from . import brackets

EPS = 1e-6


class Shape(NamedTuple):
    """Shape of a trial: rows, columns, and the parts of the sums; 1 are in the activations' dtype, 0 are none."""

    rows: int
    columns: int
    parts: int


NORMS = (Shape(8, 1024, 3), Shape(16, 640, 20), Shape(32, 512, 1), Shape(64, 4608, 0))
"""A row of two tiles; tiles of four rows, and more parts than are read at once; products of one part; and nine tiles of
a row, of which each of five warpgroups has two."""

GATES = (Shape(8, 384, 3), Shape(32, 128, 20), Shape(64, 256, 1))
"""As above; each tile is a thread block."""


def of_norm(dtype: np.dtype, narrow: bool) -> Trial:
    """Returns the trial of `hopper_norm.add_and_norm` for activations of a dtype, quantised if `narrow`.

    The stream has to be equal: its sums are exact.  The norm has to be in the brackets of `brackets.norm`.
    """
    return Trial("hopper norm", _kind(dtype, narrow), functools.partial(_compare_norms, dtype, narrow))


def of_gate(dtype: np.dtype, narrow: bool) -> Trial:
    """Returns the trial of `hopper_gate.gate` for activations of a dtype, quantised if `narrow`; see `brackets`."""
    return Trial("hopper gate", _kind(dtype, narrow), functools.partial(_compare_gates, dtype, narrow))


def _kind(dtype: np.dtype, narrow: bool) -> str:
    return f"x {dtype_name(dtype)}" + (", quantised" if narrow else "")


def _compare_norms(dtype: np.dtype, narrow: bool) -> str | None:
    from .hopper_norm import add_and_norm

    run = jit(functools.partial(add_and_norm, eps=EPS, narrow=narrow))
    for i, shape in enumerate(NORMS):
        random = np.random.default_rng(i)
        stream = _activations(shape.rows, shape.columns, dtype, random)
        scale = (1 + random.standard_normal(shape.columns) / 4).astype(dtype)
        sums = exact_sums(shape.parts, shape.rows, shape.columns, dtype, random) if shape.parts else None
        new, (values, scales) = jax.device_get(run(*map(_on_device, (stream, sums, scale))))
        why = norm_difference((stream, sums, scale), new, values, scales)
        if why:
            return why
    return None


def _compare_gates(dtype: np.dtype, narrow: bool) -> str | None:
    from .hopper_gate import gate

    run = jit(functools.partial(gate, dtype=dtype, narrow=narrow))
    for i, shape in enumerate(GATES):
        sums = exact_sums(shape.parts, shape.rows, 2 * shape.columns, dtype, np.random.default_rng(i))
        values, scales = jax.device_get(run(_on_device(sums)))
        if why := gate_difference(sums, dtype, values, scales):
            return why
    return None


def norm_difference(
    operands: tuple[np.ndarray, np.ndarray | None, np.ndarray],
    new: np.ndarray,
    values: np.ndarray,
    scales: np.ndarray | None,
    eps: float = EPS,
) -> str | None:
    """Returns how results of `add_and_norm` differ from its definition, for (stream, sums, scale) with exact sums."""
    stream, sums, scale = operands
    dtype = stream.dtype
    expected = stream.astype(np.float64)
    if sums is not None:
        with np.errstate(all="ignore"):
            expected = (expected + product(sums, dtype)).astype(dtype).astype(np.float64)
    if why := brackets.difference("the stream", new, (expected, expected)):
        return why
    return brackets.operand_difference(values, scales, brackets.norm(expected, scale, eps, dtype))


def gate_difference(sums: np.ndarray, dtype: np.dtype, values: np.ndarray, scales: np.ndarray | None) -> str | None:
    """Returns how results of `gate` differ from its definition, for exact sums."""
    gate, up = np.split(product(sums, dtype), 2, axis=1)
    return brackets.operand_difference(values, scales, brackets.gate(gate, up, dtype))


def product(sums: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the product (rows, out) of exact sums in float64, rounded to `dtype`."""
    with np.errstate(all="ignore"):
        rounded: np.ndarray = sums.astype(np.float64).sum(axis=0).astype(dtype).astype(np.float64)
    return rounded


def exact_sums(parts: int, rows: int, columns: int, dtype: np.dtype, random: np.random.Generator) -> np.ndarray:
    """Returns sums (parts, rows, columns) that are the same in float32 in any order: integers times 2**-8.

    One part is in `dtype`.  Some blocks of columns are zero, some small and some large.
    """
    powers = 2.0 ** random.choice([-3, 0, 2], (rows, columns // 128, 1))
    powers[::3, 0] = 0
    sums = np.rint(random.standard_normal((parts, rows, columns // 128, 128)) * powers * 2**8) * 2.0**-8
    shaped: np.ndarray = sums.reshape(parts, rows, columns).astype(np.float32 if parts > 1 else dtype)
    return shaped


def _activations(rows: int, columns: int, dtype: np.dtype, random: np.random.Generator) -> np.ndarray:
    """Returns activations (rows, columns), the rows of different magnitudes, and one zero."""
    sizes = np.resize([1, 2.0**-9, 0, 2.0**4], (rows, 1))
    values: np.ndarray = (random.standard_normal((rows, columns)) * sizes).astype(dtype)
    return values


def _on_device(array: np.ndarray | None) -> jax.Array | None:
    return None if array is None else jnp.asarray(array)
