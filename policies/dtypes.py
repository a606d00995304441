"""Names and properties of dtypes, and the saturating cast.

Public functions convert a dtype to `np.dtype` once: dtypes are dict keys, and
`hash(jnp.bfloat16) != hash(np.dtype("bfloat16"))`.
"""

from __future__ import annotations

import difflib
import re

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
    "float8_e3m4",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
# No parameter is stored in these dtypes.  Their names are known so that errors distinguish them from misspellings.
_OTHERS = (
    *("bool", "int2", "int4", "int16", "int32", "int64", "uint2", "uint4", "uint8", "uint16", "uint32", "uint64"),
    *("complex64", "complex128", "float8_e8m0fnu", "float8_e4m3", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
)
# Names in safetensors headers that are not the short name in upper case.
_SAFETENSORS = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BOOL": "bool",
}
# Names that frameworks read differently, with what to write.
_AMBIGUOUS = {
    "f8": "f8_e4m3fn (numpy reads 'f8' as 64-bit)",
    "i8": "int8 (numpy reads 'i8' as 64-bit)",
    "float": "f32 (numpy reads 'float' as 64-bit)",
    "float8": "f8_e4m3fn",
    "fp8": "f8_e4m3fn",
    **dict.fromkeys(
        ("f8_e4m3", "float8_e4m3"),
        "f8_e4m3fn, the type of checkpoints (JAX's float8_e4m3 is another one, with infinities)",
    ),
}


def _numpy(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _short(name: str) -> str:
    """Returns the short form of a dtype name: `bf16`, `f8_e4m3fn`, `i32`, …"""
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
_BY_NAME |= {f"fp{bits}": _numpy(f"float{bits}") for bits in (16, 32, 64)}
_BY_NAME |= {"half": _numpy("float16"), "full": _numpy("float32")}  # as in jmp
_BY_NAME |= {"single": _numpy("float32"), "double": _numpy("float64"), "torch.float": _numpy("float32")}
_BY_NAME |= {alias: _numpy(name) for alias, name in _SAFETENSORS.items()}
for _name in _AMBIGUOUS:
    _BY_NAME.pop(_name, None)
_TORCH = "torch."  # prefix of the names of PyTorch, as in the config.json of many models


def as_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the `np.dtype` for a name, a scalar type or a dtype.

    Names are short (`f8_e4m3fn`), long (`float8_e4m3fn`), as in safetensors headers (`F8_E4M3`) or as in PyTorch
    (`torch.float8_e4m3fn`), for every dtype of numpy and ml_dtypes; `fp16`, `fp32`, and jmp's `half` and `full` are f16
    and f32.  Scalar types are those of jax and numpy, such as `jnp.bfloat16`.

    >>> as_dtype("f8_e4m3fn") == as_dtype("F8_E4M3") == as_dtype(jnp.float8_e4m3fn)
    True

    Raises:
      UnknownDtype: for any other name, with the nearest valid name; for float64 while `jax_enable_x64` is off.
    """
    if isinstance(dtype, str):
        name = dtype.removeprefix(_TORCH)
        result = _BY_NAME.get(dtype)
        if result is None and name in _AMBIGUOUS:
            raise UnknownDtype(f"dtype {dtype!r} is ambiguous. Write {_AMBIGUOUS[name]}.")
        result = result or _BY_NAME.get(name)
        if result is None:
            raise UnknownDtype(f"unknown dtype {dtype!r}{_nearest(dtype)}")
    else:
        # A scalar type of jax has an np.dtype as attribute `dtype`; a scalar type of numpy has a descriptor there.
        attribute = getattr(dtype, "dtype", None)
        candidate = attribute if isinstance(attribute, np.dtype) else dtype
        is_scalar_type = isinstance(candidate, type) and issubclass(candidate, np.generic)
        if not isinstance(candidate, np.dtype) and not is_scalar_type:
            raise UnknownDtype(f"{dtype!r} is not a dtype. Write a name such as 'bf16', 'f32' or 'f8_e4m3fn'.")
        result = np.dtype(candidate).newbyteorder("=")
    if result == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != result:
        raise UnknownDtype("float64 needs jax_enable_x64: without it JAX uses float32. Enable it, or write f32.")
    return result


def is_dtype_name(name: str) -> bool:
    """Returns whether `name` is the name of a dtype, or one of the names that `as_dtype` rejects as ambiguous."""
    return any(each in _BY_NAME or each in _AMBIGUOUS for each in (name, name.removeprefix(_TORCH)))


def _bits(name: str) -> list[str]:
    """Returns the digits of the first number in a name, sorted so that `bf61` has those of `bf16`."""
    number = re.search(r"[0-9]+", name)
    return sorted(number.group()) if number else []


def _nearest(name: str) -> str:
    """Returns the hint at the end of the error for an unknown name: the nearest name with as many bits."""
    bits = _bits(name)
    names = [each for each, dtype in _BY_NAME.items() if can_store(dtype) and bits in ([], _bits(each))]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f". The nearest name is {near[0]!r}." if near else ". Write a name such as 'bf16', 'f32' or 'f8_e4m3fn'."


def dtype_name(dtype: np.dtype) -> str:
    """Returns the short name of a dtype, which `as_dtype` accepts: `f8_e4m3fn`, `bf16`, `f32`.

    >>> dtype_name(np.dtype("float32"))
    'f32'
    """
    short = _short(dtype.name)
    return short if _BY_NAME.get(short) == dtype else dtype.name


def is_narrow(dtype: DTypeLike) -> bool:
    """Returns whether values of `dtype` need scales: True for the float8 types and int8, the narrow dtypes."""
    return np.dtype(dtype) in _NARROW


def is_floating(dtype: DTypeLike) -> bool:
    """Returns whether leaves of `dtype` are cast: True for floats, False for integers, booleans and PRNG keys."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and can_store(np.dtype(dtype))


def is_activation(dtype: DTypeLike) -> bool:
    """Returns whether activations may have `dtype`: True for f32, bf16 and f16."""
    return np.dtype(dtype) in _ACTIVATIONS


def can_store(dtype: np.dtype) -> bool:
    """Returns whether a parameter may be stored as `dtype`."""
    return is_narrow(dtype) or dtype.name in _FLOATS


def largest(dtype: DTypeLike) -> float:
    """Returns the largest finite value of `dtype`: 448 for e4m3fn, 127 for int8."""
    dtype = np.dtype(dtype)
    return float(np.iinfo(dtype).max if dtype.kind == "i" else ml_dtypes.finfo(dtype).max)


def smallest_normal(dtype: DTypeLike) -> float:
    """Returns the smallest positive normal number of `dtype`: 2**-126 for f32 and bf16, 2**-14 for f16."""
    return float(ml_dtypes.finfo(np.dtype(dtype)).smallest_normal)


def saturating_cast(x: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Returns `x` cast to `dtype`, with finite values clipped to the range of `dtype`.

    NaN and infinities are cast without clipping: infinity becomes NaN in a float dtype without infinities.

    >>> saturating_cast(jnp.float32(1000), "float8_e4m3fn")
    Array(448, dtype=float8_e4m3fn)
    """
    x, dtype = as_array(x), np.dtype(dtype)
    if x.dtype == dtype:
        return x
    limit = largest(dtype)
    if limit < largest(x.dtype):
        # Clipping happens in float32, since the limit may not be exact in 16 bits: bfloat16 rounds 65504 to 65536.
        wide = x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)
        bound = jnp.asarray(limit, wide.dtype)
        x = jnp.where(jnp.isfinite(wide), jnp.clip(wide, -bound, bound), wide)
    return (jnp.round(x) if dtype.kind == "i" else x).astype(dtype)


def as_array(x: ArrayLike) -> jax.Array:
    """Returns `x` as a JAX array; where JAX converts float64 to float32, that conversion saturates too."""
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype == np.float64 != jax.dtypes.canonicalize_dtype(np.float64):
        bound = largest(np.float32)
        x = np.where(np.isfinite(x), np.clip(x, -bound, bound), x)
    return jnp.asarray(x)
