"""Mixed-precision policies per parameter: rules, formats, plans, storage, casts, the matmul and the Flax wrappers."""

from .blocks import DEFAULT_BLOCK
from .bound import bind
from .checks import Check
from .dtypes import as_dtype, dtype_name, saturating_cast
from .errors import (
    InvalidCheckpoint,
    InvalidGradients,
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
from .formats import FORMATS, Format, as_format, register_format
from .include import preset_names
from .matmul import Choice, Target, matmul_override, matmul_plan, scaled_matmul, scaled_matmuls
from .plan import Plan, Row
from .policy import Policy
from .presets import PolicyLike, get_policy
from .resolved import Resolved, ResolvedParam, resolve
from .rules import Rule, SlotRules
from .scaled_array import ScaledArray, dequantize, quantize
from .scope import ParamSpec, Scope
from .slots import SLOTS, Slot
from .training import serialization as _serialization  # noqa: F401 - registers types with Flax
from .training.by_path import path_labels, path_mask, trainable
from .training.partition import combine, partition, refuse_narrow
from .trees import ArrayInfo, Narrow, describe, parameters
from .wrappers import apply, init

__all__ = [
    "DEFAULT_BLOCK",
    "FORMATS",
    "SLOTS",
    "ArrayInfo",
    "Check",
    "Choice",
    "Format",
    "InvalidCheckpoint",
    "InvalidGradients",
    "InvalidPolicy",
    "InvalidScale",
    "InvalidTokens",
    "MissingFile",
    "Narrow",
    "ParamSpec",
    "PerparamError",
    "Plan",
    "Policy",
    "PolicyLike",
    "Resolved",
    "ResolvedParam",
    "Row",
    "Rule",
    "ScaledArray",
    "Scope",
    "ShadowedRule",
    "Slot",
    "SlotRules",
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
    "as_format",
    "bind",
    "combine",
    "dequantize",
    "describe",
    "dtype_name",
    "get_policy",
    "init",
    "matmul_override",
    "matmul_plan",
    "parameters",
    "partition",
    "path_labels",
    "path_mask",
    "preset_names",
    "quantize",
    "refuse_narrow",
    "register_format",
    "resolve",
    "saturating_cast",
    "scaled_matmul",
    "scaled_matmuls",
    "trainable",
]
