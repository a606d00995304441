"""The parameters with which a model computes: cast to their compute dtypes, scaled pairs dequantised."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import dtypes
from .errors import UnsupportedCast
from .formats import ScaledArray
from .resolved import ResolvedParam, resolve
from .rules import PolicyRules
from .trees import arrays, replace_parameters


def to_compute(policy: PolicyRules, tree: Any, activations: np.dtype) -> Any:
    """Returns `tree` with every parameter in its compute dtype, and every scaled pair dequantised to one kernel.

    activations  the dtype of a narrow kernel for which the compute slot has neither a rule nor a default

    Raises:
      UnsupportedCast: for a narrow compute format.
    """
    flat, resolved = arrays(tree), resolve(policy, tree, slots=("compute",))
    computed = {
        path: _computed(param, flat[path], flat.get(param.scale_path), policy.activations or activations)
        for path, param in resolved.params.items()
    }
    return replace_parameters(tree, computed, {})


def _computed(param: ResolvedParam, values: Any, scale_inv: Any, activations: np.dtype) -> Any:
    """Returns one parameter in its compute dtype."""
    rule = param.rules.get("compute")
    format = None if rule is None else rule.format
    if rule is not None and format is not None and format.narrow:
        raise UnsupportedCast(
            f"{param.path}: computing in {format} (rule {rule.key!r}) needs a layer that quantises its activations, "
            "and code without perparam multiplies wide arrays. Write bf16 or null in compute, or use "
            "perparam.models.Linear or perparam.scaled_matmul."
        )
    dtype = None if format is None else format.values
    if param.has_scales:
        return ScaledArray(values, scale_inv, param.current.format).dequantize(dtype or activations)
    return values if dtype is None else dtypes.saturating_cast(values, dtype)
