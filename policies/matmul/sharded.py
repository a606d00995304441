"""`sharded_matmuls`: products with kernels that are divided over a mesh, each device with its part and its kernel.

Everything runs inside `jax.shard_map`, since XLA would gather kernels, and cannot partition those that are written for
one device.  What each device does follows from the axes over which a kernel is divided:

- Axes that divide the batch too are those of FSDP: the device gathers the kernel, as bytes if it is narrow.
- Others are tensor parallel.  A device has some rows of the kernel, and so some columns of the result; or it has some
  columns of the kernel and of x, and its float32 sums are added to those of the others before they are rounded.
"""

from __future__ import annotations

import dataclasses
import functools
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
from ..errors import InvalidSharding
from ..formats import Format
from ..scaled_array import ScaledArray, quantize_rows
from .backward import frozen
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

    def parts(self, batch: Names) -> tuple[Part, ...]:
        """Returns what a device has of each dimension, and what it gathers, beside a batch divided over `batch`."""
        parts = []
        for names in self.dims:
            gathered = tuple(name for name in names if name in batch)
            kept = () if gathered else names
            parts.append(Part(kept, gathered, self.devices(kept or gathered)))
        return tuple(parts)


@dataclasses.dataclass(frozen=True)
class Part:
    """One dimension of a parameter on one device, inside `shard_map`.

    kept      mesh axes over which it stays divided
    gathered  mesh axes over which it is divided until it is used
    count     devices along these axes
    """

    kept: Names
    gathered: Names
    count: int

    def has_whole(self, unit: int, size: int) -> bool:
        """Returns whether the device has whole units of a dimension of this size when it multiplies."""
        return not self.kept or (size // self.count) % unit == 0

    @property
    def names(self) -> Names:
        """The axes over which it is divided when the function inside `shard_map` begins."""
        return self.kept or self.gathered


WHOLE = Part((), (), 1)
"""A dimension that is not divided."""


def spec(*names: Names) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these mesh axes for its dimensions."""
    return PartitionSpec(*(each if len(each) > 1 else each[0] if each else None for each in names))


def over_devices(split: Split, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `function`, run by each device of the split's mesh on its parts.

    Raises:
      InvalidSharding: inside `jax.set_mesh` or `shard_map` with another mesh, which JAX does not combine.
    """
    current = jax.sharding.get_abstract_mesh()
    if not current.empty and current != split.mesh.abstract_mesh:
        raise InvalidSharding(
            f"the model is divided over {split.mesh.abstract_mesh}, and is called inside jax.set_mesh or shard_map "
            f"with {current}. Call it outside of them."
        )
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
    return ScaledArray(values, scales, array.format, None if array.proxy is None else values)


def local(array: Kernel, parts: Sequence[Part], shape: tuple[int, ...]) -> Kernel:
    """Returns, inside `shard_map`, the device's part of a kernel, with scales for blocks that begin at its first index.

    array  what the device has, by `array_specs`
    shape  of the kernel on all devices together
    """
    if not isinstance(array, ScaledArray):
        return _gathered(array, parts)
    values, scales = _gathered(array.values, parts), array.scale_inv
    proxy = None if array.proxy is None else _gathered(array.proxy, parts)
    block = []
    for dim, (part, size, side) in enumerate(zip(parts, shape, _sides(array, shape), strict=True)):
        length = size // part.count
        if length % side == 0:
            scales = _gathered(scales, [part if i == dim else WHOLE for i in range(scales.ndim)])
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
    return ScaledArray(values, scales, format, proxy)


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
    backward: Format | None = None,
) -> tuple[jax.Array, ...]:
    """Returns the `scaled_matmuls` of x with kernels that are divided over a mesh, as one of a Linear is.

    x       (batch, ..., in)
    splits  how each kernel is divided; of one mesh and one batch

    Equal to `scaled_matmuls` within the order of sums, and in every bit if no kernel is divided by columns and the
    implementation of the matmul on a device does not depend on the shapes.
    """
    dtype = np.dtype(x.dtype) if result is None else dtypes.as_dtype(result)
    batch = splits[0].batch_of(x.shape[0] if x.ndim > 1 else None)
    plans = [product_plan(np.dtype(x.dtype), k, s, batch, compute) for k, s in zip(kernels, splits, strict=True)]
    if len({(plan.parts[1], plan.rounding) for plan in plans}) > 1:
        pairs = zip(kernels, splits, strict=True)
        one = functools.partial(sharded_matmuls, x, compute=compute, result=result, backward=backward)
        return tuple(one([k], [s])[0] for k, s in pairs)
    parts, rounding, summed = [plan.parts for plan in plans], plans[0].rounding, plans[0].parts[1].kept
    shapes = [kernel.shape for kernel in kernels]

    def function(x: jax.Array, kernels: Sequence[Kernel]) -> tuple[jax.Array, ...]:
        if rounding is not None:
            x = rounded_part(x, summed, rounding)
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
            x, kernels = together(x, kernels)
        mine = [local(kernel, parts[i], shapes[i]) for kernel, i in zip(kernels, chosen, strict=True)]
        pairs: list[Any] = [kernel if isinstance(kernel, ScaledArray) else (kernel, None) for kernel in mine]
        format = compute if rounding is None else None
        products = scaled_matmuls(x, pairs, compute=format, result=jnp.float32 if summed else dtype, backward=backward)
        return jax.lax.psum(products, summed) if summed else products

    if any(map(needs_more, parts, splits)):
        # The same barrier for what XLA gathers.
        x, kernels = together(x, list(kernels))
    between = ((),) * (x.ndim - 2)
    x_spec = spec(batch, *between, summed) if x.ndim > 1 else spec(summed)
    in_specs = x_spec, [array_specs(kernel, each) for kernel, each in zip(kernels, parts, strict=True)]
    out_specs = tuple(spec(batch, *between, each[0].kept) if x.ndim > 1 else spec(each[0].kept) for each in parts)
    results: tuple[jax.Array, ...] = over_devices(splits[0], function, in_specs, out_specs)(x, list(kernels))
    return results


def together(x: jax.Array, kernels: Sequence[Kernel]) -> tuple[jax.Array, list[Kernel]]:
    """Returns x and kernels behind an optimization barrier, but not proxies, which XLA is to remove."""
    proxies = [kernel.proxy if isinstance(kernel, ScaledArray) else None for kernel in kernels]
    x, arrays = jax.lax.optimization_barrier((x, list(map(frozen, kernels))))
    pairs = zip(arrays, proxies, strict=True)
    return x, [array if proxy is None else dataclasses.replace(array, proxy=proxy) for array, proxy in pairs]


@dataclasses.dataclass(frozen=True)
class ProductPlan:
    """How products with a kernel are divided.

    parts     of the kernel's dimensions
    rounding  the narrow format of activations, where a device has columns of x that are no whole blocks of it: x is
              then rounded to it as a whole row, by `rounded_part`, and multiplied in float32; else None
    """

    parts: tuple[Part, ...]
    rounding: Format | None


def product_plan(x: np.dtype, kernel: Kernel, split: Split, batch: Names, compute: Format | None) -> ProductPlan:
    """Returns how products of activations of dtype `x` with a kernel (..., out, in) are divided."""
    *leading, rows, columns = split.parts(batch)
    rounding = None
    if compute is not None and compute.narrow:
        format = kernel.format if isinstance(kernel, ScaledArray) else Format(np.dtype(kernel.dtype), DEFAULT_BLOCK)
        call = describe(None, kernel.shape[-2:], x, format, compute)
        assert call.x.block is not None
        unit = call.in_features if call.x.block[1] == -1 else call.x.block[1]
        if isinstance(kernel, ScaledArray) and kernel.format.narrow:
            rounding = None if columns.has_whole(unit, call.in_features) else call.x
        else:  # it is quantised in the product
            assert call.kernel.block is not None
            rows = rows if rows.has_whole(call.kernel.block[0], call.out_features) else WHOLE
            unit = math.lcm(unit, call.kernel.block[1])
            columns = columns if columns.has_whole(unit, call.in_features) else WHOLE
    return ProductPlan((*leading, rows, columns), rounding)


def needs_more(parts: Sequence[Part], split: Split) -> bool:
    """Returns whether devices need more of an array for these parts than they have, which XLA has to gather before."""
    return any(set(part.names) != set(names) for part, names in zip(parts, split.dims, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def rounded_part(x: jax.Array, names: Names, format: Format) -> jax.Array:
    """Returns, inside `shard_map`, the device's columns of x (..., columns) after whole rows were rounded to a format.

    names   mesh axes over which columns are divided
    format  of activations, with scales

    The result is float32, so that products with it are those of the narrow values and their scales. Its derivative is
    that of x.
    """
    whole = jax.lax.all_gather(x, names, axis=x.ndim - 1, tiled=True)
    first = jax.lax.axis_index(names) * x.shape[-1]
    rounded = quantize_rows(whole.reshape(-1, whole.shape[-1]), format).dequantize()
    return jax.lax.dynamic_slice_in_dim(rounded.reshape(whole.shape), first, x.shape[-1], axis=x.ndim - 1)


def _rounded_forward(x: jax.Array, names: Names, format: Format) -> tuple[jax.Array, jax.Array]:
    return rounded_part(x, names, format), x[..., :0]


def _rounded_backward(names: Names, format: Format, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient.astype(like.dtype),)


rounded_part.defvjp(_rounded_forward, _rounded_backward)
