"""The parameters with which a model computes: cast to their compute dtypes, scaled pairs dequantised."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from . import dtypes
from .errors import UnsupportedCast
from .formats import Format
from .products import NarrowKernel
from .resolved import resolve
from .rules import PolicyRules
from .scaled_array import ScaledArray
from .trees import arrays, replace_parameters


def to_compute(policy: PolicyRules, tree: Any, activations: np.dtype, *, narrow: bool = False) -> Any:
    """Returns `tree` with every parameter in its compute dtype, and every scaled pair dequantised to one kernel.

    activations  the dtype of a narrow kernel for which the compute slot has neither a rule nor a default
    narrow       whether a kernel with a narrow compute format becomes a `NarrowKernel`

    Raises:
      UnsupportedCast: for a narrow compute format, unless `narrow`.
    """
    flat, resolved = arrays(tree), resolve(policy, tree, slots=("compute", "backward") if narrow else ("compute",))
    computed = {}
    for path, param in resolved.params.items():
        rule = param.rules.get("compute")
        format = None if rule is None else rule.format
        if rule is not None and format is not None and format.narrow and not narrow:
            raise UnsupportedCast(
                f"{path}: computing in {format} (rule {rule.key!r}) needs a layer that quantises its activations, "
                "and code without perparam multiplies wide arrays. Write bf16 or null in compute, or use "
                "perparam.models.Linear or perparam.scaled_matmul."
            )
        value = flat[path]
        if param.has_scales:
            value = ScaledArray(value, flat[param.scale_path], param.current.format)
        computed[path] = as_computed(value, format, policy.activations or activations, path, param.backward)
    return replace_parameters(tree, computed, {})


def as_computed(
    value: jax.Array | ScaledArray,
    format: Format | None,
    activations: np.dtype,
    path: str = "",
    backward: Format | None = None,
) -> jax.Array | NarrowKernel:
    """Returns a parameter as the code of a module reads it: the only place where modules get weights of stored pairs.

    value        the parameter as it is stored
    format       its format in the compute slot; None: not cast, and dequantised to `activations`
    activations  the dtype of activations
    path         of the parameter, for errors of a `NarrowKernel`, which the result is for a narrow format
    backward     the format of the products that give its gradients
    """
    if format is not None and format.narrow:
        return NarrowKernel(value, format, path, backward)
    if backward is not None and backward.narrow:
        raise UnsupportedCast(
            f"{path or 'parameter'}: gradients of products in {backward} (slot backward) need a layer that quantises "
            f"its activations. Compute this kernel in a narrow format too, as in compute: {{kernel: {backward}}}, or "
            "write null for it in backward."
        )
    if isinstance(value, ScaledArray):
        return value.dequantize(activations if format is None else format.values)
    return value if format is None else dtypes.saturating_cast(value, format.values)
