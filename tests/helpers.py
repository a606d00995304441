"""What several test files share: independent references, in numpy and plain Python, and hypothesis strategies."""

import functools
import itertools
import math
import re

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from perparam import Policy

# Patterns.


def reference_matches(pattern: str, path: str) -> bool:
    """The definition, by expansion and recursion: bare names last, `*` within a component, `**` any number of them."""
    if not any(special in pattern for special in "*/{"):
        return path.split("/")[-1] == pattern
    return any(_walk(choice.split("/"), path.split("/")) for choice in written_out(pattern))


def written_out(pattern: str) -> list[str]:
    """The alternatives of a pattern without braces."""

    def words(piece: str) -> list[str]:
        ends = [word.split("..") for word in piece.strip("{}").split(",")]
        return [str(i) for end in ends for i in (range(int(end[0]), int(end[1]) + 1) if end[1:] else end)]

    choices = [words(piece) for piece in re.split(r"(\{[^}]*\})", pattern)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _walk(pattern: list[str], path: list[str]) -> bool:
    if not pattern or not path:
        return not path and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _walk(pattern[1:], path) or _walk(pattern, path[1:])
    return _fits(pattern[0], path[0]) and _walk(pattern[1:], path[1:])


@functools.cache
def _fits(part: str, name: str) -> bool:
    if not part or not name:
        return not name and not part.strip("*")
    if part[0] == "*":
        return _fits(part[1:], name) or _fits(part, name[1:])
    return part[0] == name[0] and _fits(part[1:], name[1:])


# Block formats.


def dtype(name: str) -> np.dtype:
    """The dtype of numpy or ml_dtypes with that long name, found without perparam."""
    return np.dtype(getattr(ml_dtypes, name, name))


def largest(of: np.dtype) -> float:
    return float(ml_dtypes.iinfo(of).max if of.kind == "i" else ml_dtypes.finfo(of).max)


def reference_quantize(weight, narrow: str, block, scale_dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """`(kernel, scale_inv)` by IEEE arithmetic in numpy, one block after the other."""
    weight, narrow, scales = np.asarray(weight, np.float32), dtype(narrow), dtype(scale_dtype)
    limit = np.float32(largest(narrow))
    floor = np.float32(max(np.finfo(np.float32).smallest_normal, float(ml_dtypes.finfo(scales).smallest_normal)))
    *leading, rows, columns = weight.shape
    grid = (*leading, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    kernel, scale_inv = np.zeros(weight.shape, narrow), np.zeros(grid, scales)
    for index in np.ndindex(*grid):
        *batch, row, column = index
        tile = (
            *batch,
            slice(row * block[0], (row + 1) * block[0]),
            slice(column * block[1], (column + 1) * block[1]),
        )
        amax = np.abs(weight[tile]).max()
        scale = np.float32(1) if amax == 0 else max(amax / limit, floor)
        scale_inv[index] = np.clip(scale, 0, largest(scales)).astype(scales)
        scaled = np.clip(weight[tile] / scale_inv[index].astype(np.float32), -limit, limit)
        kernel[tile] = (np.rint(scaled) if narrow.kind == "i" else scaled).astype(narrow)
    return kernel, scale_inv


def spread(scale_inv, shape, block, of=np.float64) -> np.ndarray:
    """The scale of every element."""
    rows, columns = (np.arange(side) // step for side, step in zip(shape[-2:], block, strict=True))
    return np.asarray(scale_inv).astype(of)[..., rows[:, None], columns[None, :]]


def reference_dequantize(kernel, scale_inv, block, of=np.float64) -> np.ndarray:
    """`kernel * scale_inv` in the float type `of`: float64 holds every product of the two exactly."""
    kernel = np.asarray(kernel)
    return kernel.astype(of) * spread(scale_inv, kernel.shape, block, of)


def bits(array) -> tuple[str, tuple[int, ...], bytes]:
    """What is compared where two arrays are to be the same bit for bit."""
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()


# Policies.

ACTIVATIONS = ("f32", "bf16", "f16")
NARROW = ("f8_e4m3fn", "f8_e5m2", "int8")
_patterns = st.sampled_from(
    [
        "kernel",
        "bias",
        "embedding",
        "**/gate/kernel",
        "layers/*/mlp/**",
        "layers/{0,1}/{q,k}_proj/kernel",
        "a*b/c",
        "on",
        "0",
    ]
)
_scales = st.sampled_from(["scale_inv", "embedding_scale_inv", "**/scale_inv"])


def _keys(patterns):
    return st.builds(lambda pattern, optional: pattern + "?" * optional, patterns, st.booleans())


def _slots(dtypes, scales):
    rule = st.one_of(
        st.tuples(_keys(_patterns), st.sampled_from([*dtypes, None])),
        st.tuples(_keys(_scales), st.sampled_from([*scales, None])),
        st.tuples(st.just("default"), st.sampled_from([*ACTIVATIONS, None])),
    )
    return st.one_of(st.none(), st.sampled_from(ACTIVATIONS), st.lists(rule, max_size=5).map(dict))


policy_fields = st.fixed_dictionaries(
    {
        "params": _slots((*ACTIVATIONS, *NARROW), ACTIVATIONS),
        "compute": _slots((*ACTIVATIONS, "f8_e4m3fn"), ()),
        "output": st.sampled_from([None, *ACTIVATIONS]),
        "block": st.sampled_from([None, (128, 128), (1, 7)]),
    }
)
policies = policy_fields.map(lambda fields: Policy(**fields))
