"""`infer_policy`: the policy that describes what a checkpoint holds."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Mapping

import numpy as np

from ..models.config import DecoderConfig
from ..policies.paths import is_scale
from ..policies.policy import Policy
from ..policies.trees import ArrayInfo
from .checkpoint import open_checkpoint


def infer_policy(folder: str | os.PathLike[str]) -> Policy:
    """The policy under which every parameter of the checkpoint in `folder` is kept as it is; headers only are read.

    It names the dtype of kernels, scales and embeddings, and by path those that differ from their kind; what is left
    falls under the default.  Kernels compute as stored, everything else and the output in the config's dtype.  A start
    for a policy of one's own.

    Raises:
      As `checkpoint_tree`.
    """
    checkpoint = open_checkpoint(folder)
    return describe(checkpoint.infos, checkpoint.config)


def describe(infos: Mapping[str, ArrayInfo], config: DecoderConfig) -> Policy:
    """The policy under which parameters that are stored as `infos` says stay as they are; see `infer_policy`."""
    dtypes = {path: info.dtype for path, info in infos.items()}
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for path in infos:
        name = path.rpartition("/")[2]
        kinds[name if name in ("kernel", "embedding") or is_scale(name) else "default"].append(path)
    exceptions: dict[str, np.dtype] = {}
    of_pattern: dict[str, set[np.dtype]] = collections.defaultdict(set)
    for path, dtype in dtypes.items():
        of_pattern[_pattern(path)].add(dtype)
    usual: dict[str, np.dtype] = {}
    for kind, paths in kinds.items():
        usual[kind] = collections.Counter(dtypes[path] for path in paths).most_common(1)[0][0]
        for path in paths:
            if dtypes[path] != usual[kind]:
                alike = len(of_pattern[_pattern(path)]) == 1
                exceptions[_pattern(path) if alike else path] = dtypes[path]
    blocks = {info.block for info in infos.values() if info.block is not None}
    runs_in = config.dtype
    compute = {"kernel": None, "default": runs_in}
    return Policy({**exceptions, **usual}, compute, runs_in, block=blocks.pop() if blocks else None)


def _pattern(path: str) -> str:
    """`path` with `*` for its layer."""
    return re.sub(r"(?<=/)\d+(?=/)", "*", path)
