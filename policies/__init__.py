"""What dtype a parameter has: policies, their resolution, casting, block formats, the matmul, and wrappers."""

from .blocks import dequantize, quantize
from .dtypes import as_dtype, dtype_name, saturating_cast
from .errors import (
    InvalidCheckpoint,
    InvalidPolicy,
    InvalidScale,
    InvalidTokens,
    MissingFile,
    PerparamError,
    ShadowedRule,
    UnknownDtype,
    UnknownImplementation,
    UnknownTarget,
    UnmatchedRule,
    UnpairedScale,
    UnsupportedCast,
    UnsupportedConfig,
)
from .matmul import Choice, Target, matmul_override, matmul_plan, scaled_matmul, scaled_matmuls
from .plan import Plan, Row
from .policy import ParamSpec, Policy, Scope
from .presets import get_policy, preset_names
from .slots import DEFAULT_BLOCK, Rule, Slot
from .training import join_trainable, refuse_narrow, split_trainable
from .trees import Found, Narrow
from .wrappers import apply, init

__all__ = [
    "DEFAULT_BLOCK",
    "Choice",
    "Found",
    "InvalidCheckpoint",
    "InvalidPolicy",
    "InvalidScale",
    "InvalidTokens",
    "MissingFile",
    "Narrow",
    "ParamSpec",
    "PerparamError",
    "Plan",
    "Policy",
    "Row",
    "Rule",
    "Scope",
    "ShadowedRule",
    "Slot",
    "Target",
    "UnknownDtype",
    "UnknownImplementation",
    "UnknownTarget",
    "UnmatchedRule",
    "UnpairedScale",
    "UnsupportedCast",
    "UnsupportedConfig",
    "apply",
    "as_dtype",
    "dequantize",
    "dtype_name",
    "get_policy",
    "init",
    "join_trainable",
    "matmul_override",
    "matmul_plan",
    "preset_names",
    "quantize",
    "refuse_narrow",
    "saturating_cast",
    "scaled_matmul",
    "scaled_matmuls",
    "split_trainable",
]
