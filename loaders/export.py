"""`export`: the tensors and the `quantization_config` of a checkpoint to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from ..models.config import DecoderConfig, Method, Quantization
from ..policies.blocks import Block
from ..policies.dtypes import dtype_name, is_activation, is_narrow
from ..policies.errors import UnsupportedExport
from ..policies.paths import is_scale, scale_path
from ..policies.trees import ArrayInfo
from .families import family_of
from .families.quantization import SCALE_SUFFIX
from .safetensors.writer import NAMES, Tensors

Names = str | tuple[str, ...]
"""The name of a parameter's tensor, or those of its slices along the first axis, each of which is a tensor."""


@dataclasses.dataclass(frozen=True)
class Export:
    """The contents of a checkpoint to write.

    config  the model's config with the quantization of its stored kernels
    names   the tensor name of every parameter and its scales, by path; of a stack of experts, the name of each
    groups  shapes and dtypes of each parameter's tensors, by name, in the order of the files
    """

    config: DecoderConfig
    names: dict[str, Names]
    groups: list[Tensors]


def export(config: DecoderConfig, stored: Mapping[str, ArrayInfo]) -> Export:
    """The contents of a checkpoint of parameters with the shapes and formats in `stored`, by path.

    Raises:
      UnsupportedExport: parameters without a name in the family's checkpoints, or a format that no
        `quantization_config` can describe.
    """
    names = _names(config, stored)
    quantization = _quantization(stored, names, config)
    suffix = SCALE_SUFFIX[(quantization or Quantization()).method]
    names |= {
        scale_path(path): f"{name}{suffix}" if isinstance(name, str) else tuple(f"{each}{suffix}" for each in name)
        for path, name in names.items()
    }
    groups = []
    for path in [path for path in names if path in stored and not is_scale(path)]:
        tensors = [
            _named(names[each], _in_file(each, stored[each], quantization))
            for each in (path, scale_path(path))
            if each in stored
        ]
        groups += [dict(group) for group in zip(*tensors, strict=True)]
    return Export(dataclasses.replace(config, quantization=quantization), names, groups)


def listed(names: Names) -> tuple[str, ...]:
    """The names of one parameter's tensors."""
    return (names,) if isinstance(names, str) else names


def _named(names: Names, array: jax.ShapeDtypeStruct) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    """`(name, shape and dtype)` of each tensor of an array: of the whole, or of its slices along the first axis."""
    if isinstance(names, str):
        return [(names, array)]
    return [(name, jax.ShapeDtypeStruct(array.shape[1:], array.dtype)) for name in names]


def _in_file(path: str, info: ArrayInfo, quantization: Quantization | None) -> jax.ShapeDtypeStruct:
    """Shape and dtype in the file, where one scale for a whole tensor is a vector; experts have a leading axis."""
    one_scale = is_scale(path) and quantization is not None and quantization.block == (-1, -1)
    return jax.ShapeDtypeStruct((*info.shape[:-2], 1) if one_scale else info.shape, info.dtype)


def _names(config: DecoderConfig, stored: Mapping[str, ArrayInfo]) -> dict[str, Names]:
    """The name of every parameter in the family's checkpoints, by path, without the scales.

    Raises:
      UnsupportedExport: parameters without a name in the family's checkpoints, or with another shape.
    """
    family = family_of(config)
    expected: dict[str, tuple[Names, tuple[int, ...]]] = {}
    for name, (path, shape, expert) in family.tensors(config).items():
        if expert is None:
            expected[path] = name, shape
        else:
            before = expected[path][0] if path in expected else ()
            expected[path] = (*before, name), (expert + 1, *shape)
    scales = {scale_path(path) for path in expected}
    if unnamed := [path for path in stored if path not in expected.keys() | scales]:
        count = "1 parameter" if len(unnamed) == 1 else f"{len(unnamed)} parameters"
        raise UnsupportedExport(
            f"a {family.architecture(config.task)} checkpoint has no name for {count}: {', '.join(unnamed[:5])}. Merge "
            "added parameters into the model's kernels first: adapters with perparam.training.merge_lora, or save them "
            "apart with save_lora."
        )
    for path, (_, shape) in expected.items():
        if path not in stored or stored[path].shape != shape:
            current = stored[path].shape if path in stored else "no such parameter"
            raise UnsupportedExport(
                f"{path}: expected the shape {shape} of the model's config, found {current}. Correct the config."
            )
    return {path: name for path, (name, _) in expected.items()}


def _quantization(
    stored: Mapping[str, ArrayInfo], names: Mapping[str, Names], config: DecoderConfig
) -> Quantization | None:
    """The quantization of the narrow kernels, in the layout of the checkpoint that `config` comes from if possible.

    Raises:
      UnsupportedExport: formats that no `quantization_config` can describe.
    """
    narrow = {path: one for path, one in stored.items() if is_narrow(one.dtype)}
    for path, one in stored.items():
        if one.dtype not in NAMES:
            raise UnsupportedExport(
                f"{path}: {dtype_name(one.dtype)} is not supported in this layout, whose dtypes are "
                f"{', '.join(map(dtype_name, NAMES))}. Save under a policy that stores it as one of them."
            )
        if is_scale(path) and not is_activation(one.dtype):
            raise UnsupportedExport(
                f"{path}: {dtype_name(one.dtype)} is not supported in this layout, whose scales are f32, bf16 or f16. "
                "Save under a policy with such scales, or use Orbax."
            )
        if path in narrow and not path.endswith("/kernel"):
            raise UnsupportedExport(
                f"{path}: {dtype_name(one.dtype)}, but in this layout only kernels are quantised: other programs "
                "would read it without its scales. Save under a policy that stores it in bf16."
            )
    if not narrow:
        return None
    blocks = sorted({one.block for one in narrow.values() if one.block is not None})
    if len(blocks) != 1:
        raise UnsupportedExport(
            f"kernels in blocks of {blocks}: config.json can have only one. Save under a policy with a block."
        )
    plain = [each for path, each in names.items() if path.endswith("/kernel") and path in stored and path not in narrow]
    # transformers gives a tied model a head of its own, and quantises it unless it is listed.
    tied = ("lm_head",) if config.task == "causal_lm" and config.head is None else ()
    not_converted = (*tied, *(name.removesuffix(".weight") for names in plain for name in listed(names)))
    return Quantization(blocks[0], not_converted, _method(blocks[0], config.quantization))


def _method(block: Block, source: Quantization | None) -> Method:
    """The layout that can describe a block; where both can, that of `source`.

    Raises:
      UnsupportedExport: a block that neither can describe.
    """
    if block in _COMPRESSED_ONLY or (-1 not in block and source is not None and source.method != "fp8"):
        return "compressed-tensors"
    if -1 in block:
        raise UnsupportedExport(
            f"kernels in blocks of {list(block)}, -1 for a whole axis: no quantization_config can describe that. Save "
            "under a policy with a block of two numbers, [1, -1] or [-1, -1], or use Orbax."
        )
    return "fp8"


_COMPRESSED_ONLY = ((1, -1), (-1, -1))
"""A scale for each output channel, and one for the tensor."""
