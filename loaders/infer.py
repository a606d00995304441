"""`infer_policy`: a policy that keeps the storage formats of a checkpoint."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Mapping

import numpy as np

from ..models.config import DecoderConfig
from ..policies.blocks import DEFAULT_BLOCK
from ..policies.dtypes import is_floating
from ..policies.formats import Format, stored_format
from ..policies.paths import is_scale, scale_path
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
    dtypes: dict[str, np.dtype | Format] = {}
    for path, info in infos.items():
        scales = infos.get(scale_path(path))
        if len(blocks) > 1 and scales is not None:  # rules with blocks
            dtypes[path] = stored_format(info.dtype, info.block or DEFAULT_BLOCK, scales.dtype)
        elif is_scale(path):
            if len(blocks) <= 1:
                dtypes[path] = info.dtype
        elif is_floating(info.dtype) or scales is not None:  # other integers and booleans have no storage format
            dtypes[path] = info.dtype
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for path in dtypes:
        name = path.rpartition("/")[2]
        kinds[name if name in ("kernel", "embedding") or is_scale(name) else "default"].append(path)
    exceptions: dict[str, np.dtype | Format] = {}
    of_pattern: dict[str, set[np.dtype | Format]] = collections.defaultdict(set)
    for path, dtype in dtypes.items():
        of_pattern[_pattern(path)].add(dtype)
    usual: dict[str, np.dtype | Format] = {}
    for kind, paths in kinds.items():
        usual[kind] = collections.Counter(dtypes[path] for path in paths).most_common(1)[0][0]
        for path in paths:
            if dtypes[path] != usual[kind]:
                one_dtype = len(of_pattern[_pattern(path)]) == 1
                exceptions[_pattern(path) if one_dtype else path] = dtypes[path]
    block = blocks.pop() if len(blocks) == 1 else None
    if config is None:
        return Policy({**exceptions, **usual}, block=block)
    compute = {"kernel": None, "default": config.dtype}
    return Policy({**exceptions, **usual}, compute, config.dtype, block=block)


def _pattern(path: str) -> str:
    """`path` with `*` in place of its layer's number."""
    return re.sub(r"(?<=/)\d+(?=/)", "*", path)
