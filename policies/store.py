"""Storage: brings arrays from their current format to the one a policy asks."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from . import dtypes
from .blocks import block_sides
from .errors import InvalidScale
from .formats import Format, ScaledArray, quantize
from .resolved import Resolved, ResolvedParam, change
from .scales import decode_scales, encode_scales
from .trees import parameters, replace_parameters


def store(resolved: Resolved, tree: Any, *, scaled: bool = False) -> Any:
    """`tree`, which was resolved, as its policy stores it; see `Policy.store`."""
    return replace_parameters(tree, stored_arrays(resolved, parameters(tree)), resolved.formats, scaled=scaled)


def stored_arrays(resolved: Resolved, flat: dict[str, Any]) -> dict[str, Any]:
    """The arrays of `flat`, by path, in the formats they resolved to, scales after their kernel."""
    result: dict[str, Any] = {}
    for path, param in resolved.params.items():
        values, scale_inv = store_param(param, flat[path], flat.get(param.scale_path))
        result[path] = values
        if scale_inv is not None:
            result[param.scale_path] = scale_inv
    return result


def store_param(param: ResolvedParam, values: Any, scale_inv: Any = None) -> tuple[Any, Any]:
    """`(values, scale_inv)` as stored, scale_inv None where there is none; what is kept is not copied.

    Raises:
      InvalidScale: scales that are not positive finite numbers, or weights that would make such.
    """
    if scale_inv is not None:
        check_scales(param, scale_inv, values)
    values, scale_inv = convert(param.current.format, param.format, values, scale_inv)
    if makes_scales(param):
        check_made(param, scale_inv)
    return values, scale_inv


def makes_scales(param: ResolvedParam) -> bool:
    """Whether storage makes scales that were not there before."""
    return param.change in ("quantised", "requantised")


def convert(current: Format, requested: Format, values: Any, scale_inv: Any = None) -> tuple[Any, Any]:
    """`(values, scale_inv)` from one complete format to another; looks at no value.

    For whole blocks of rows of a parameter it gives those rows of what it gives for the whole.
    """
    how = change(current, requested, values.shape)
    if how == "kept":
        if requested.scale is None or requested.scale == current.scale:
            return values, scale_inv
        return values, encode_scales(decode_scales(scale_inv), requested.scale)
    if current.scale is not None:
        values = ScaledArray(values, scale_inv, current).dequantize()
    if requested.scale is None:
        return dtypes.saturating_cast(values, requested.values), None
    stored = quantize(values, requested)
    return stored.values, stored.scale_inv


def check_scales(param: ResolvedParam, scale_inv: Any, values: Any = None) -> None:
    """Raises InvalidScale unless every scale is positive and finite; traced values pass unseen.

    A scale of zero passes where `values` shows that its block is all zeros: writers that do not clamp make them.
    """
    if isinstance(scale_inv, jax.core.Tracer):
        return
    scales = np.asarray(scale_inv).astype(np.float32)
    wrong = ~((scales > 0) & np.isfinite(scales))
    if values is not None and (scales == 0).any() and not isinstance(values, jax.core.Tracer):
        wrong &= ~((scales == 0) & zero_blocks(values, param.current.format))
    _refuse(param.scale_path, scales, wrong, "scales are positive finite numbers")


def zero_blocks(values: Any, format: Format) -> np.ndarray:
    """Which blocks are all zeros, of the grid's shape; on the host."""
    assert format.block is not None
    some = np.asarray(values).astype(np.float32) != 0
    for axis, side in zip((-2, -1), block_sides(format.block, some.shape), strict=True):
        some = np.logical_or.reduceat(some, np.arange(0, some.shape[axis], side), axis=axis)
    zero: np.ndarray = ~some
    return zero


def check_made(param: ResolvedParam, scale_inv: Any) -> None:
    """Raises InvalidScale where the scales made for a parameter are none: its weights are not finite."""
    if not isinstance(scale_inv, jax.core.Tracer):
        scales = np.asarray(scale_inv).astype(np.float32)
        problem = "the weights of a block hold NaN or infinity, so they have no scale"
        _refuse(param.path, scales, ~((scales > 0) & np.isfinite(scales)), problem)


def _refuse(path: str, scales: np.ndarray, wrong: np.ndarray, problem: str) -> None:
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise InvalidScale(
            f"{path}: {problem}; found {scales[index]} at block {index}, and {int(wrong.sum())} such of {wrong.size}. "
            "The weights are damaged: fetch or make them again."
        )
