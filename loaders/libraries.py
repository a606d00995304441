"""What transformers and vLLM can load: the conditions of each, with the place in its source that has the condition.

None of this concerns perparam, which loads every checkpoint that it writes.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

from ..policies.blocks import Block
from ..policies.dtypes import dtype_name, is_narrow
from ..policies.errors import UnsupportedExport, shown
from ..policies.trees import ArrayInfo
from .export import Export

Library = Literal["transformers", "vllm"]


class ExportWarning(UserWarning):
    """Another program cannot load what is saved."""


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of a checkpoint to write.

    block   of all quantised kernels; -1 for a whole axis
    method  `Quantization.method`
    narrow  {path: shape} of those that are quantised
    wide    paths of the others
    """

    block: Block
    method: str
    narrow: Mapping[str, tuple[int, ...]]
    wide: frozenset[str]

    def not_divided(self, axis: int, modules: Iterable[str] | None = None) -> list[str]:
        """Paths of the quantised kernels, in these modules or in all, whose `axis` is no multiple of the block."""
        side, names = self.block[axis], None if modules is None else set(modules)
        return [
            path
            for path, shape in self.narrow.items()
            if side != -1 and shape[axis] % side and (names is None or path.split("/")[-2] in names)
        ]


@dataclasses.dataclass(frozen=True)
class _Condition:
    """A condition of a program: what it needs, the place in its source, and `failing`: the paths that fail it."""

    needs: str
    source: str
    failing: Callable[[_Kernels], list[str]]


def _misread_grid(kernels: _Kernels) -> list[str]:
    """Kernels of the fp8 layout whose side is not their number of blocks times the block: transformers divides each
    side by the number of its scales, and reads 192 rows in blocks of 128 as blocks of 96."""
    if kernels.method != "fp8":
        return []
    return [
        path
        for path, shape in kernels.narrow.items()
        if any(size > side and size % side for size, side in zip(shape, kernels.block, strict=True))
    ]


def _part_of_fused(kernels: _Kernels) -> list[str]:
    """Wide kernels that vLLM merges with quantised ones."""
    return sorted(path for path in kernels.wide if any(other in kernels.narrow for other in _fused_with(path)))


def _fused_with(path: str) -> list[str]:
    """Paths of the kernels that vLLM merges with that at `path`, and `path`."""
    *parents, module, name = path.split("/")
    group = next((group for group in _FUSED if module in group), (module,))
    return ["/".join((*parents, each, name)) for each in group]


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that vLLM merges into one (packed_modules_mapping of its models)."""

_SPELLED = {"transformers": "transformers", "vllm": "vLLM"}
_FP8 = "model_executor/layers/quantization/fp8.py"
_UTILS = "model_executor/layers/quantization/utils"

CONDITIONS: dict[str, tuple[_Condition, ...]] = {
    "transformers": (
        _Condition(
            "blocks that divide the sides of a kernel",
            "transformers 5.24, integrations/finegrained_fp8.py, Fp8Dequantize",
            _misread_grid,
        ),
        _Condition(
            "blocks that divide the input axis of a kernel",
            "compressed-tensors 0.20, quantization/utils/helpers.py, compute_dynamic_scales_and_zp",
            lambda kernels: kernels.not_divided(1) if kernels.method != "fp8" else [],
        ),
    ),
    "vllm": (
        _Condition(
            "blocks that divide the input axis of a kernel",
            f"vLLM, {_UTILS}/fp8_utils.py, per_token_group_quant_fp8",
            lambda kernels: kernels.not_divided(1),
        ),
        _Condition(
            "blocks that divide the output axis of q_proj, k_proj and gate_proj, which it merges with others",
            f"vLLM, {_UTILS}/fp8_utils.py, validate_fp8_block_shape",
            lambda kernels: kernels.not_divided(0, (each for group in _FUSED for each in group[:-1])),
        ),
        _Condition(
            "blocks whose sides are powers of two from 16 on",
            f"vLLM, {_UTILS}/fp8_utils.py, w8a8_triton_block_scaled_mm",
            lambda kernels: (
                []
                if -1 in kernels.block or all(side & -side == side >= 16 for side in kernels.block)
                else [*kernels.narrow]
            ),
        ),
        _Condition(
            "square blocks in the layout fp8",
            f"vLLM, {_FP8}, Fp8LinearMethod.__init__",
            lambda kernels: [*kernels.narrow] if kernels.method == "fp8" and len(set(kernels.block)) > 1 else [],
        ),
        _Condition(
            "one precision for q_proj, k_proj and v_proj, and one for gate_proj and up_proj",
            f"vLLM, {_UTILS}/quant_utils.py, is_layer_skipped",
            _part_of_fused,
        ),
        _Condition(
            "a head that is not quantised",
            f"vLLM, {_FP8}, Fp8Config.get_quant_method",
            lambda kernels: [path for path in kernels.narrow if path == "lm_head/kernel"],
        ),
    ),
}
"""The conditions of each library, for kernels in e4m3."""


def check_library(contents: Export, stored: Mapping[str, ArrayInfo], library: Library | None) -> None:
    """Checks that a library can load the checkpoint to write.

    library  None: warns if blocks do not divide the kernels in a way that transformers or vLLM cannot load

    Raises:
      UnsupportedExport: the library cannot load the checkpoint.
    """
    if library is not None and library not in get_args(Library):
        listed = " or ".join(map(repr, get_args(Library)))
        raise UnsupportedExport(f"for_library: expected {listed}, found {shown(library)}.")
    quantization = contents.config.quantization
    if quantization is None:
        return
    paths = [path for path in contents.names if path.endswith("/kernel") and path in stored]
    shapes = {path: stored[path].shape[-2:] for path in paths}  # without the axis of experts
    narrow = {path: shape for path, shape in shapes.items() if is_narrow(stored[path].dtype)}
    kernels = _Kernels(quantization.block, quantization.method, narrow, frozenset(shapes.keys() - narrow.keys()))
    wide = dtype_name(contents.config.dtype) if contents.config.dtype is not None else "bf16"
    if library is not None:
        failed = [(each, paths) for each in CONDITIONS[library] if (paths := each.failing(kernels))]
        if failed:
            lines = [f"  it needs {each.needs} ({each.source}): {_some(paths, shapes)}" for each, paths in failed]
            heading = (
                f"{_SPELLED[library]} cannot load this checkpoint, with kernels in blocks of {_text(kernels.block)}:"
            )
            by_blocks, otherwise = (
                {path for each, paths in failed if ("blocks" in each.needs) == of_blocks for path in paths}
                for of_blocks in (True, False)
            )
            remedy = _remedy(kernels, by_blocks, otherwise, wide)
            raise UnsupportedExport("\n".join([heading, *lines, remedy]))
        return
    by_program = {
        program: [path for each in CONDITIONS[program] if "divide" in each.needs for path in each.failing(kernels)]
        for program in CONDITIONS
    }
    failing = dict.fromkeys(path for paths in by_program.values() for path in paths)
    if failing:
        programs = " and ".join(_SPELLED[program] for program, paths in by_program.items() if paths)
        remedy = _remedy(kernels, set(failing), set(), wide)
        warnings.warn(
            f"blocks of {_text(kernels.block)} do not divide the sides of {_some(list(failing), shapes)}. "
            f"{programs} cannot load this checkpoint; perparam can.\n{remedy}",
            ExportWarning,
            stacklevel=4,
        )


def _remedy(kernels: _Kernels, by_blocks: set[str], otherwise: set[str], wide: str) -> str:
    """The last lines of an error: blocks that would do, and the rules that leave kernels wide.

    by_blocks  paths that other blocks would mend
    otherwise  paths that fail whatever the blocks
    """
    sides = [size for shape in kernels.narrow.values() for size in shape]
    square = next((side for side in (128, 64, 32, 16) if not any(size % side for size in sides)), None)
    blocks = [[square, square]] if square is not None and kernels.block != (square, square) else []
    ways = [f"block: {block}" for block in blocks] + ["block: [1, -1] (a scale for each row)"] if by_blocks else []
    rules = _left_wide(kernels, otherwise)
    if by_blocks and otherwise and len(rules) < len(kernels.narrow):
        heading = f"  Save under a policy with {' or '.join(ways)}, and with these rules first:"
    else:
        rules = _left_wide(kernels, by_blocks | otherwise)
        if by_blocks and len(rules) == len(kernels.narrow):  # rules for all of them would leave none to quantise
            return f"  Save under a policy with {' or '.join(ways)}."
        heading = f"  Save under a policy with {', or '.join([*ways, 'these rules first:'])}"
    patterns = dict.fromkeys(re.sub(r"(?<=/)\d+(?=/)", "*", path) for path in rules)
    return "\n".join([heading, "  params:", *(f"    {pattern}: {wide}" for pattern in patterns)])


def _left_wide(kernels: _Kernels, failing: set[str]) -> list[str]:
    """Paths of the quantised kernels to leave wide: those that fail, and those that are merged with them."""
    fused = {other for path in failing for other in _fused_with(path)}
    return [path for path in kernels.narrow if path in failing | fused]


def _some(paths: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The first paths of a list, with their shapes, and the number of all."""
    kinds = collections.Counter(path.split("/")[-2] for path in paths)
    first = {path.split("/")[-2]: path for path in reversed(paths)}
    listed = [f"{first[kind]} {_text(shapes[first[kind]])}" for kind in kinds]
    count = "1 kernel" if len(paths) == 1 else f"{len(paths)} kernels"
    return f"{count}, such as {', '.join(listed[:3])}" if len(paths) > 1 else listed[0]


def _text(sides: tuple[int, ...]) -> str:
    return "×".join("all" if side == -1 else str(side) for side in sides)
