"""Storage: converts arrays from their current format to the format that a policy requests."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from . import dtypes
from .blocks import block_sides
from .errors import InvalidScale
from .formats import Format
from .hosts import on_host
from .resolved import Resolved, ResolvedParam, change
from .scaled_array import ScaledArray, quantize
from .scales import decode_scales, encode_scales
from .trees import arrays, replace_parameters


def store(resolved: Resolved, tree: Any, *, scaled: bool = False) -> Any:
    """Returns `tree`, of which `resolved` is the resolution, in its storage formats; see `Policy.store`."""
    return replace_parameters(tree, stored_arrays(resolved, arrays(tree)), resolved.formats, scaled=scaled)


def stored_arrays(resolved: Resolved, flat: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of `flat` in their storage formats, by path, scales after their kernel."""
    result: dict[str, Any] = {}
    for path, param in resolved.params.items():
        values, scale_inv = store_param(param, flat[path], flat.get(param.scale_path))
        result[path] = values
        if scale_inv is not None:
            result[param.scale_path] = scale_inv
    return result


def store_param(param: ResolvedParam, values: Any, scale_inv: Any = None) -> tuple[Any, Any]:
    """Returns `(values, scale_inv)` of a parameter in its storage format; scale_inv is None without scales.

    Arrays that do not change are returned without a copy.

    Raises:
      InvalidScale: if a scale is not a positive finite number, or if weights to quantise are not finite.
    """
    if scale_inv is not None:
        check_scales(param, scale_inv, values)
    values, scale_inv = convert(param.current.format, param.format, values, scale_inv)
    if makes_scales(param):
        check_made(param, scale_inv)
    return values, scale_inv


def makes_scales(param: ResolvedParam) -> bool:
    """Returns whether storage computes new scales for the parameter."""
    return param.change in ("quantised", "requantised")


def convert(current: Format, requested: Format, values: Any, scale_inv: Any = None) -> tuple[Any, Any]:
    """Returns `(values, scale_inv)` converted from one complete format to another, without checks.

    Blocks of rows are independent: the conversion of whole blocks of rows equals those rows of the conversion of the
    whole parameter.
    """
    if change(current, requested, values.shape) == "kept":
        if requested.scale is None or requested.scale == current.scale:
            return values, scale_inv
        return values, encode_scales(decode_scales(scale_inv), requested.scale)
    if current.scale is not None:
        values = ScaledArray(values, scale_inv, current).dequantize()
    if requested.scale is None:
        return dtypes.saturating_cast(values, requested.values), None
    stored = quantize(values, requested)
    return stored.values, stored.scale_inv


def check_scales(param: ResolvedParam, scale_inv: Any, values: Any = None, row: int = 0) -> None:
    """Raises InvalidScale unless every scale is positive and finite; traced scales are not checked.

    row  of the grid with which `scale_inv` begins, for the error

    A scale of zero is valid where all `values` of its block are zero, since some writers do not clamp scales.
    """
    if isinstance(scale_inv, jax.core.Tracer):
        return
    scales = on_host(scale_inv).astype(np.float32)
    invalid = ~((scales > 0) & np.isfinite(scales))
    if values is not None and (scales == 0).any() and not isinstance(values, jax.core.Tracer):
        invalid &= ~((scales == 0) & zero_blocks(values, param.current.format))
    _raise_invalid(param.scale_path, scales, invalid, "scales are positive finite numbers", row)


def zero_blocks(values: Any, format: Format) -> np.ndarray:
    """Returns a boolean array of the grid's shape, on the host: True for blocks whose values are all zero."""
    assert format.block is not None
    nonzero = on_host(values).astype(np.float32) != 0
    for axis, side in zip((-2, -1), block_sides(format.block, nonzero.shape), strict=True):
        nonzero = np.logical_or.reduceat(nonzero, np.arange(0, nonzero.shape[axis], side), axis=axis)
    zero: np.ndarray = ~nonzero
    return zero


def check_made(param: ResolvedParam, scale_inv: Any, row: int = 0) -> None:
    """Raises InvalidScale if new scales are not positive and finite, which means that weights are not finite.

    row  of the grid with which `scale_inv` begins, for the error
    """
    if not isinstance(scale_inv, jax.core.Tracer):
        scales = on_host(scale_inv).astype(np.float32)
        problem = "the weights of a block hold NaN or infinity, so they have no scale"
        _raise_invalid(param.path, scales, ~((scales > 0) & np.isfinite(scales)), problem, row)


def _raise_invalid(path: str, scales: np.ndarray, invalid: np.ndarray, problem: str, row: int) -> None:
    """Raises InvalidScale for the first invalid scale, if there is one."""
    if invalid.any():
        index = tuple(int(i) for i in np.argwhere(invalid)[0])
        block = (index[0] + row, *index[1:]) if index else index
        raise InvalidScale(
            f"{path}: {problem}; found {scales[index]} at block {block}, and {int(invalid.sum())} such of "
            f"{invalid.size}. The weights are damaged: fetch or make them again."
        )
