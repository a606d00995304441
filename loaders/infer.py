"""`infer_policy`: a policy that keeps the storage formats of a checkpoint."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Mapping

import jax
import numpy as np

from ..models.config import DecoderConfig
from ..policies.blocks import DEFAULT_BLOCK
from ..policies.dtypes import is_floating
from ..policies.formats import Format, stored_format
from ..policies.paths import is_scale, scale_path
from ..policies.patterns import Pattern
from ..policies.policy import Policy
from ..policies.trees import ArrayInfo
from .bare import open_parameters, warn_if_guessed


def infer_policy(path: str | os.PathLike[str], *, revision: str | None = None, bare: bool | None = None) -> Policy:
    """The policy that stores every parameter as a checkpoint does; reads headers, not weights.

    path, revision, bare  as for `load_params`

    It has rules for the usual dtypes of kernels, scales and embeddings, rules by path for parameters that differ from
    these, and a default for all others. Kernels compute as stored; everything else and the output are in the config's
    dtype. A starting point for your own policies.

    Raises:
      MissingFile, InvalidCheckpoint, UnsupportedConfig: see `checkpoint_tree`.
    """
    checkpoint = open_parameters(path, revision=revision, weights=False, bare=bare)
    warn_if_guessed(checkpoint, bare)
    return describe(checkpoint.infos, checkpoint.config)


def describe(infos: Mapping[str, ArrayInfo], config: DecoderConfig | None) -> Policy:
    """The policy that stores parameters as `infos` says, by path; see `infer_policy`."""
    blocks = {info.block for info in infos.values() if info.block is not None}
    dtypes: dict[str, np.dtype | Format | None] = {}
    for path, info in infos.items():
        scales = infos.get(scale_path(path))
        if info.dtype == np.float64 != jax.dtypes.canonicalize_dtype(np.float64):
            dtypes[path] = None  # a policy cannot name it
        elif len(blocks) > 1 and scales is not None:  # rules with blocks
            dtypes[path] = stored_format(info.dtype, info.block or DEFAULT_BLOCK, scales.dtype)
        elif is_scale(path):
            if len(blocks) <= 1:
                dtypes[path] = info.dtype
        elif is_floating(info.dtype) or scales is not None:  # other integers and booleans have no storage format
            dtypes[path] = info.dtype
    # Names with a rule: a narrow dtype cannot be the default, and a path without "/" is a rule for every path that ends
    # in this name.
    names = {"kernel", "embedding"} | {_name(path) for path in dtypes if scale_path(path) in infos}
    names |= dtypes.keys() & {_name(path) for path in dtypes if "/" in path}
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    of_pattern: dict[str, set[np.dtype | Format | None]] = collections.defaultdict(set)
    for path in dtypes:
        name = _name(path)
        kinds[name if name in names or is_scale(name) else "default"].append(path)
        of_pattern[_pattern(path)].add(dtypes[path])
    exceptions: dict[str, np.dtype | Format | None] = {}
    usual: dict[str, np.dtype | Format | None] = {}
    for kind, paths in kinds.items():
        most = collections.Counter(dtypes[path] for path in paths).most_common(1)[0][0]
        usual[kind] = dtypes.get(kind, most)
        for path in paths:
            if dtypes[path] != usual[kind]:
                pattern = _pattern(path)
                matched = [of_pattern[each] for each in of_pattern if Pattern.of(pattern).matches(each)]
                exceptions[pattern if len(set().union(*matched)) == 1 else path] = dtypes[path]
    block = blocks.pop() if len(blocks) == 1 else None
    if config is None:
        return Policy({**exceptions, **usual}, block=block)
    compute = {"kernel": None, "default": config.dtype}
    return Policy({**exceptions, **usual}, compute, config.dtype, block=block)


def _name(path: str) -> str:
    """The last component of `path`."""
    return path.rpartition("/")[2]


def _pattern(path: str) -> str:
    """`path` with `*` in place of its layer's number."""
    return re.sub(r"(?<=/)\d+(?=/)", "*", path)
