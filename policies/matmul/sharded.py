"""`sharded_matmuls`: products with kernels that are divided over a mesh, each device with its part and its kernel.

Everything runs inside `jax.shard_map`, since XLA would gather kernels, and cannot partition those that are written for
one device.  What each device does follows from the axes over which a kernel is divided:

- Axes that divide the batch too are those of FSDP: the device gathers the kernel, as bytes if it is narrow.
- Others are tensor parallel.  A device has some rows of the kernel, and so some columns of the result; or it has some
  columns of the kernel and of x, and its float32 sums are added to those of the others before they are rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from .. import dtypes
from ..blocks import DEFAULT_BLOCK, block_sides
from ..formats import Format, ScaledArray
from .dispatch import describe
from .face import scaled_matmuls

Names = tuple[str, ...]
Kernel = jax.Array | ScaledArray


@dataclasses.dataclass(frozen=True)
class Split:
    """How a parameter, and the activations that are multiplied with it, are divided over a mesh.

    mesh   the devices; its axes are Auto
    batch  mesh axes over which the first axis of the activations is divided, where its size allows
    dims   for each dimension of the parameter the mesh axes over which it is divided
    """

    mesh: Mesh
    batch: Names
    dims: tuple[Names, ...]

    def devices(self, names: Names) -> int:
        """Returns the number of devices along these axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def batch_of(self, size: Any) -> Names:
        """Returns the axes over which a batch of this size is divided: none if it does not divide evenly."""
        return self.batch if isinstance(size, int) and size % self.devices(self.batch) == 0 else ()

    def parts(self, batch: Names, whole: Sequence[int | None]) -> tuple[Part, ...]:
        """Returns what a device has of each dimension, and what it gathers, beside a batch divided over `batch`.

        whole  for each dimension None; or a number of indices of which a device must have a multiple: if it would not,
               it has the whole dimension
        """
        parts = []
        for names, unit in zip(self.dims, whole, strict=True):
            gathered = tuple(name for name in names if name in batch)
            kept = () if gathered else names
            parts.append(Part(kept, gathered, self.devices(kept or gathered), unit))
        return tuple(parts)


@dataclasses.dataclass(frozen=True)
class Part:
    """One dimension of a parameter on one device, inside `shard_map`.

    kept      mesh axes over which it stays divided
    gathered  mesh axes over which it is divided until it is used
    count     devices along these axes
    unit      see `Split.parts`
    """

    kept: Names
    gathered: Names
    count: int
    unit: int | None = None

    def of(self, size: int) -> Part:
        """Returns the part for a dimension of this size: not divided if that would divide a unit."""
        if self.kept and self.unit is not None and (size // self.count) % self.unit:
            return Part((), (), 1)
        return self

    @property
    def names(self) -> Names:
        """The axes over which it is divided when the function inside `shard_map` begins."""
        return self.kept or self.gathered


def spec(*names: Names) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these mesh axes for its dimensions."""
    return PartitionSpec(*(each if len(each) > 1 else each[0] if each else None for each in names))


def over_devices(split: Split, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `function`, run by each device of the split's mesh on its parts."""
    return jax.shard_map(function, mesh=split.mesh, in_specs=in_specs, out_specs=out_specs)


def array_specs(array: Kernel, parts: Sequence[Part]) -> Any:
    """Returns the PartitionSpecs of a kernel and of any scales, as `local` expects them.

    Scales are divided like their kernel where each device has whole blocks, else each device has them all.
    """
    if not isinstance(array, ScaledArray):
        return spec(*(part.names for part in parts))
    has_whole_blocks = (
        (size // part.count) % side == 0
        for part, size, side in zip(parts, array.shape, _sides(array, array.shape), strict=True)
    )
    scales: Any = spec(*(part.names if whole else () for part, whole in zip(parts, has_whole_blocks, strict=True)))
    values: Any = spec(*(part.names for part in parts))
    return ScaledArray(values, scales, array.format)


def local(array: Kernel, parts: Sequence[Part], shape: tuple[int, ...]) -> Kernel:
    """Returns, inside `shard_map`, the device's part of a kernel, with scales for blocks that begin at its first index.

    array  what the device has, by `array_specs`
    shape  of the kernel on all devices together
    """
    if not isinstance(array, ScaledArray):
        return _gathered(array, parts)
    values, scales = _gathered(array.values, parts), array.scale_inv
    block = []
    for dim, (part, size, side) in enumerate(zip(parts, shape, _sides(array, shape), strict=True)):
        length = size // part.count
        if length % side == 0:
            scales = _gathered(scales, [part if i == dim else Part((), (), 1) for i in range(scales.ndim)])
        elif part.kept:
            # The part begins or ends within a block: it has smaller blocks, which repeat the scale of their block.
            smaller = math.gcd(side, length)
            first = jax.lax.axis_index(part.kept) * length
            scales = jnp.take(scales, (first + smaller * jnp.arange(length // smaller)) // side, axis=dim)
            side = smaller
        block.append(side)
    format = dataclasses.replace(
        array.format, block=(block[-2], block[-1]), activations=array.format.of_rows(array.format.values)
    )
    return ScaledArray(values, scales, format)


def _sides(array: ScaledArray, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the side of a scale's block along each dimension of an array of this shape, 1 for leading ones."""
    assert array.format.block is not None
    return (*(1,) * (len(shape) - 2), *block_sides(array.format.block, shape))


def _gathered(array: jax.Array, parts: Sequence[Part]) -> jax.Array:
    """Returns the array with the dimensions that are to be gathered; narrow values travel as bytes.

    XLA's CPU backend would widen float8 to float16 in an all-gather.
    """
    if not any(part.gathered for part in parts):
        return array
    dtype = array.dtype
    if dtypes.is_narrow(dtype):
        array = jax.lax.bitcast_convert_type(array, jnp.uint8)
    for dim, part in enumerate(parts):
        if part.gathered:
            array = jax.lax.all_gather(array, part.gathered, axis=dim, tiled=True)
    return jax.lax.bitcast_convert_type(array, dtype) if array.dtype != dtype else array


def sharded_matmuls(
    x: jax.Array,
    kernels: Sequence[Kernel],
    splits: Sequence[Split],
    *,
    compute: Format | None = None,
    result: DTypeLike | None = None,
) -> tuple[jax.Array, ...]:
    """Returns the `scaled_matmuls` of x with kernels that are divided over a mesh, as one of a Linear is.

    x       (batch, ..., in)
    splits  how each kernel is divided; of one mesh and one batch

    Equal to `scaled_matmuls` within the order of sums, and in every bit if no kernel is divided by columns and the
    implementation of the matmul on a device does not depend on the shapes.
    """
    dtype = np.dtype(x.dtype) if result is None else dtypes.as_dtype(result)
    first, batch = splits[0], splits[0].batch_of(x.shape[0] if x.ndim > 1 else None)
    parts = [
        kernel_parts(np.dtype(x.dtype), kernel, split, batch, compute)
        for kernel, split in zip(kernels, splits, strict=True)
    ]
    if len(columns := {each[1] for each in parts}) > 1:
        pairs = zip(kernels, splits, strict=True)
        return tuple(sharded_matmuls(x, [k], [s], compute=compute, result=result)[0] for k, s in pairs)
    (summed,) = (each.kept for each in columns)
    between = ((),) * (x.ndim - 2)
    x_spec = spec(batch, *between, summed) if x.ndim > 1 else spec(summed)

    def function(x: jax.Array, kernels: Sequence[Kernel]) -> tuple[jax.Array, ...]:
        results: dict[int, jax.Array] = {}
        # Together only those whose results vary over the same axes.
        for rows in dict.fromkeys(each[0].kept for each in parts):
            chosen = [i for i, each in enumerate(parts) if each[0].kept == rows]
            products = multiplied(x, [kernels[i] for i in chosen], chosen)
            results |= dict(zip(chosen, products, strict=True))
        return tuple(results[i].astype(dtype) for i in range(len(parts)))

    def multiplied(x: jax.Array, kernels: Sequence[Kernel], chosen: Sequence[int]) -> Sequence[jax.Array]:
        if any(part.gathered for i in chosen for part in parts[i]):
            # Without the barrier XLA may gather kernels once before a decoding loop, and keep them whole in memory.
            x, kernels = jax.lax.optimization_barrier((x, kernels))
        mine = [local(kernel, parts[i], shapes[i]) for kernel, i in zip(kernels, chosen, strict=True)]
        pairs: list[Any] = [kernel if isinstance(kernel, ScaledArray) else (kernel, None) for kernel in mine]
        products = scaled_matmuls(x, pairs, compute=compute, result=jnp.float32 if summed else dtype)
        return jax.lax.psum(products, summed) if summed else products

    shapes = [kernel.shape for kernel in kernels]
    in_specs = x_spec, [array_specs(kernel, each) for kernel, each in zip(kernels, parts, strict=True)]
    out_specs = tuple(spec(batch, *between, each[0].kept) if x.ndim > 1 else spec(each[0].kept) for each in parts)
    results: tuple[jax.Array, ...] = over_devices(first, function, in_specs, out_specs)(x, list(kernels))
    return results


def kernel_parts(x: np.dtype, kernel: Kernel, split: Split, batch: Names, compute: Format | None) -> tuple[Part, ...]:
    """Returns the parts of a kernel (..., out, in) for products of activations of dtype `x`.

    Where activations or the kernel are quantised for the product, a device has whole blocks of them.
    """
    rows: int | None = None
    columns: int | None = None
    if compute is not None and compute.narrow:
        format = kernel.format if isinstance(kernel, ScaledArray) else Format(np.dtype(kernel.dtype), DEFAULT_BLOCK)
        call = describe(None, kernel.shape[-2:], x, format, compute)
        assert call.x.block is not None
        columns = call.in_features if call.x.block[1] == -1 else call.x.block[1]
        if not (isinstance(kernel, ScaledArray) and kernel.format.narrow):  # it is quantised in the product
            assert call.kernel.block is not None
            rows, columns = call.kernel.block[0], math.lcm(columns, call.kernel.block[1])
    parts = split.parts(batch, (*(None,) * (len(kernel.shape) - 2), rows, columns))
    return tuple(part.of(size) for part, size in zip(parts, kernel.shape, strict=True))
