"""The block-scaled matmul: public functions, the oracle that defines the result, and one file per implementation."""

from ..scaled_array import quantize_rows
from ..targets import Target
from .dispatch import IMPLEMENTATIONS, Choice, matmul_override, matmul_plan
from .face import scaled_matmul, scaled_matmuls
from .grouped import grouped_matmul, grouped_matmuls

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Target",
    "grouped_matmul",
    "grouped_matmuls",
    "matmul_override",
    "matmul_plan",
    "quantize_rows",
    "scaled_matmul",
    "scaled_matmuls",
]
