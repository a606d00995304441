"""Names of dtypes, and casts that keep finite values finite.

A dtype is normalised once, at the boundary, to `np.dtype`: `hash(jnp.bfloat16) != hash(np.dtype("bfloat16"))`.
"""

from __future__ import annotations

import difflib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .errors import UnknownDtype

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_NARROW_FLOATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3",
    "float8_e3m4",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
# Known by name, so that they can be told apart from a misspelling; a parameter is never stored as one.
_OTHERS = (
    *("bool", "int2", "int4", "int16", "int32", "int64", "uint2", "uint4", "uint8", "uint16", "uint32", "uint64"),
    *("complex64", "complex128", "float8_e8m0fnu", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
)
# What safetensors headers call them, where that differs from the rule "upper case of the short name".
_SAFETENSORS = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BOOL": "bool",
}
_AMBIGUOUS = {
    "f8": "f8_e4m3fn (numpy reads 'f8' as 64-bit)",
    "i8": "int8 (numpy reads 'i8' as 64-bit)",
    "f8_e4m3": "f8_e4m3fn (what checkpoints call F8_E4M3) or float8_e4m3 (the type with infinities)",
    "float8": "f8_e4m3fn",
    "fp8": "f8_e4m3fn",
}


def _numpy(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _short(name: str) -> str:
    """The short form: `bf16`, `f8_e4m3fn`, `i32`, …"""
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name


_NARROW = frozenset(map(_numpy, (*_NARROW_FLOATS, "int8")))
_ACTIVATIONS = frozenset(map(_numpy, ("float16", "bfloat16", "float32")))
_BY_NAME: dict[str, np.dtype] = {}
for _name in (*_FLOATS, *_NARROW_FLOATS, "int8", *_OTHERS):
    _dtype = _numpy(_name)
    _BY_NAME |= {_name: _dtype, _short(_name): _dtype, _short(_name).upper(): _dtype}
_BY_NAME |= {"half": _numpy("float16"), "single": _numpy("float32"), "double": _numpy("float64")}
_BY_NAME |= {theirs: _numpy(ours) for theirs, ours in _SAFETENSORS.items()}
for _name in _AMBIGUOUS:
    _BY_NAME.pop(_name, None)


def as_dtype(dtype: DTypeLike) -> np.dtype:
    """The `np.dtype` that a name, scalar type or dtype stands for.

    Accepts `f8_e4m3fn`, `float8_e4m3fn`, `F8_E4M3` and the like for every dtype of numpy and ml_dtypes, and what jax
    and numpy call a dtype.

    >>> as_dtype("f8_e4m3fn") == as_dtype("F8_E4M3") == as_dtype(jnp.float8_e4m3fn)
    True

    Raises:
      UnknownDtype: for any other name, with the nearest one; for float64 while `jax_enable_x64` is off.
    """
    if isinstance(dtype, str):
        if dtype in _AMBIGUOUS:
            raise UnknownDtype(f"dtype {dtype!r} is ambiguous. Write {_AMBIGUOUS[dtype]}.")
        found = _BY_NAME.get(dtype)
        if found is None:
            raise UnknownDtype(f"unknown dtype {dtype!r}{_nearest(dtype)}")
    else:
        inner = getattr(dtype, "dtype", None)  # jax's scalar types and arrays have one; numpy's types an attribute
        known = inner if isinstance(inner, np.dtype) else dtype
        if not isinstance(known, np.dtype) and not (isinstance(known, type) and issubclass(known, np.generic)):
            raise UnknownDtype(f"{dtype!r} is no dtype. Write a name such as 'bf16', 'f32' or 'f8_e4m3fn'.")
        found = np.dtype(known).newbyteorder("=")
    if found == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != found:
        raise UnknownDtype("float64 needs jax_enable_x64, else JAX makes it float32. Enable it, or write f32.")
    return found


def is_dtype_name(name: str) -> bool:
    """Whether `name` is meant as a dtype's: a known one, or one that is refused as ambiguous."""
    return name in _BY_NAME or name in _AMBIGUOUS


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.5)
    return f". The nearest name is {near[0]!r}." if near else ". Names are such as 'bf16', 'f32' and 'f8_e4m3fn'."


def dtype_name(dtype: np.dtype) -> str:
    """The short name that `as_dtype` reads back: `f8_e4m3fn`, `bf16`, `f32`.

    >>> dtype_name(np.dtype("float32"))
    'f32'
    """
    short = _short(dtype.name)
    return short if _BY_NAME.get(short) == dtype else dtype.name


def is_narrow(dtype: DTypeLike) -> bool:
    """Whether values of `dtype` need a scale: the float8 types and int8."""
    return np.dtype(dtype) in _NARROW


def is_floating(dtype: DTypeLike) -> bool:
    """Whether a leaf of `dtype` is cast at all: the floats a parameter can be, not integers, booleans or PRNG keys."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and can_store(np.dtype(dtype))


def is_activation(dtype: DTypeLike) -> bool:
    """Whether activations, and the scales of narrow kernels, may have `dtype`: f32, bf16 and f16."""
    return np.dtype(dtype) in _ACTIVATIONS


def can_store(dtype: np.dtype) -> bool:
    """Whether a parameter may be stored as `dtype`."""
    return is_narrow(dtype) or dtype.name in _FLOATS


def largest(dtype: DTypeLike) -> float:
    """The largest finite value: 448 for e4m3fn, 127 for int8."""
    dtype = np.dtype(dtype)
    return float(np.iinfo(dtype).max if dtype.kind == "i" else ml_dtypes.finfo(dtype).max)


def smallest_normal(dtype: DTypeLike) -> float:
    """The smallest positive normal value: 2**-126 for f32 and bf16, 2**-14 for f16."""
    return float(ml_dtypes.finfo(np.dtype(dtype)).smallest_normal)


def saturating_cast(x: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """`x` in `dtype`; a finite value beyond its range becomes the largest one instead of infinity or NaN.

    NaN and infinities stay what they are as far as `dtype` has them.

    >>> saturating_cast(jnp.float32(1000), "float8_e4m3fn")
    Array(448, dtype=float8_e4m3fn)
    """
    x, dtype = _as_array(x), np.dtype(dtype)
    if x.dtype == dtype:
        return x
    limit = largest(dtype)
    if limit < largest(x.dtype):
        # In 16 bits the limit itself may round up: float16's 65504 is 65536 in bfloat16.
        wide = x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)
        bound = jnp.asarray(limit, wide.dtype)
        x = jnp.where(jnp.isfinite(wide), jnp.clip(wide, -bound, bound), wide)
    return (jnp.round(x) if dtype.kind == "i" else x).astype(dtype)


def _as_array(x: ArrayLike) -> jax.Array:
    """`x` on a device; where JAX makes float64 float32, that cast saturates as well."""
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype == np.float64 != jax.dtypes.canonicalize_dtype(np.float64):
        bound = largest(np.float32)
        x = np.where(np.isfinite(x), np.clip(x, -bound, bound), x)
    return jnp.asarray(x)
