"""Low-rank adapters (LoRA): the product that an adapter adds to that of a linear layer, or of all experts' layers.

The weight of a layer with an adapter is `kernel + scaling * lora_b @ lora_a` (Hu et al. 2021, arXiv:2106.09685), and it
is never formed: the layer computes `x @ kernel.T + scaling * (x @ lora_a.T) @ lora_b.T`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ..policies.dtypes import saturating_cast
from ..policies.matmul import grouped_matmul
from ..policies.matmul.sharded import Split, spec
from ..policies.scales import F32


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The settings of one layer's adapter; its arrays are `lora_a` (rank, in) and `lora_b` (out, rank) of the layer.

    rank      rows of `lora_a`
    alpha     numerator of the scaling
    rslora    whether the scaling is alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732), and not alpha / rank
    computes  dtypes in which the products with `lora_a` and `lora_b` take their operands; None: the activations' dtype.
              Their sums are float32
    splits    how `lora_a` and `lora_b` are divided over a mesh; None: on one device, or as XLA decides

    >>> Adapter(rank=4, alpha=8.0).scaling, Adapter(rank=4, alpha=8.0, rslora=True).scaling
    (2.0, 4.0)
    """

    rank: int
    alpha: float
    rslora: bool = False
    computes: tuple[np.dtype | None, np.dtype | None] = (None, None)
    splits: tuple[Split | None, Split | None] = (None, None)

    @property
    def scaling(self) -> float:
        """The factor of `lora_b @ lora_a`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def placed(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """`lora_a` and `lora_b`, divided over a mesh as they are stored, and with them their gradients."""
        return tuple(
            array
            if split is None
            else jax.lax.with_sharding_constraint(array, NamedSharding(split.mesh, spec(*split.dims)))
            for array, split in zip(arrays, self.splits, strict=True)
        )

    def added(self, y: jax.Array, x: jax.Array, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
        """The layer's result y (..., out) for x (..., in) with the adapter's product, in y's dtype.

        As in peft, the product is added in float32 to the rounded result of the base layer. A `lora_b` of zeros
        changes no value.
        """
        lora_a, lora_b = self.placed(lora_a, lora_b)
        narrowed = _product(x, lora_a, self.computes[0] or x.dtype)
        product = _product(narrowed.astype(x.dtype), lora_b, self.computes[1] or x.dtype)
        return _sum(y, product, self.scaling)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lora_a", "lora_b"], meta_fields=["adapter"])
@dataclasses.dataclass(frozen=True)
class ExpertAdapters:
    """The adapters of one linear layer of all experts.

    lora_a   (experts, rank, in)
    lora_b   (experts, out, rank)
    adapter  their settings
    """

    lora_a: jax.Array
    lora_b: jax.Array
    adapter: Adapter

    def added(self, y: jax.Array, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """The results y (rows, out) for rows x (rows, in), sorted by expert, with the adapters' products.

        group_sizes  (experts,) int32  rows of each expert
        """
        first, second = (compute or x.dtype for compute in self.adapter.computes)
        lora_a, lora_b = saturating_cast(self.lora_a, first), saturating_cast(self.lora_b, second)
        narrowed = grouped_matmul(x.astype(first), lora_a, group_sizes, result=F32).astype(x.dtype)
        product = grouped_matmul(narrowed.astype(second), lora_b, group_sizes, result=F32)
        return _sum(y, product, self.adapter.scaling)


def _product(x: jax.Array, kernel: jax.Array, dtype: np.dtype) -> jax.Array:
    """x (..., in) @ kernel (out, in).T in float32, of operands in `dtype`."""
    operands = x.astype(dtype), saturating_cast(kernel, dtype)
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    # A plain product, which XLA can partition.
    return jax.lax.dot_general(*operands, dimensions, precision="highest", preferred_element_type=jnp.float32)


def _sum(y: jax.Array, product: jax.Array, scaling: float) -> jax.Array:
    return (y.astype(jnp.float32) + jnp.float32(scaling) * product).astype(y.dtype)
