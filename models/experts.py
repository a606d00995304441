"""Mixtures of experts as functions: the MLPs of some experts, and the weighted sum over a token's experts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..policies.formats import Format
from ..policies.matmul import grouped_matmuls
from ..policies.matmul.sharded import Names, rounded_part
from ..policies.matmul.shards import vary_alike
from ..policies.scaled_array import ScaledArray
from ..policies.scales import F32
from .adapters import ExpertAdapters

Kernel = jax.Array | ScaledArray
MLPs = Callable[[jax.Array, jax.Array], jax.Array]
"""A function of rows (rows, hidden), sorted by expert, and the rows of each expert, which returns (rows, hidden)."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["gate", "up", "down", "adapters"],
    meta_fields=["computes", "activations", "backwards"],
)
@dataclasses.dataclass(frozen=True)
class ExpertKernels:
    """The kernels of experts.

    gate, up     (experts, width, hidden)
    down         (experts, hidden, width)
    computes     the format of each in products; see `scaled_matmul`
    activations  the dtype of activations; None: that of x
    adapters     the low-rank adapters of each
    backwards    the format of each in the products that give gradients; see `scaled_matmul`
    """

    gate: Kernel
    up: Kernel
    down: Kernel
    computes: tuple[Format | None, ...]
    activations: np.dtype | None
    adapters: tuple[ExpertAdapters | None, ...] = (None, None, None)
    backwards: tuple[Format | None, ...] = (None, None, None)

    def mlps(
        self,
        x: jax.Array,
        group_sizes: jax.Array,
        hidden: Names = (),
        width: Names = (),
        roundings: tuple[Format | None, ...] = (None, None, None),
    ) -> jax.Array:
        """down(silu(gate(x)) * up(x)) of rows (rows, hidden) that are sorted by expert, in x's dtype.

        group_sizes  (experts,) int32  rows of each expert; rows after their sum are of none, and have zeros
        hidden       inside `shard_map`: mesh axes over which `hidden` is divided
        width        mesh axes over which `width` is divided: the results are float32, and are to be added up
        roundings    see `ProductPlan`
        """
        x = x.astype(self.activations or x.dtype)
        result = F32 if hidden else None

        stacks: tuple[Any, ...] = (self.gate, self.up, self.down)

        def products(x: jax.Array, chosen: slice, names: Names, result: np.dtype | None) -> tuple[jax.Array, ...]:
            compute, rounding, rounded = self.computes[chosen][0], roundings[chosen][0], x
            if rounding is not None:
                rounded, compute = rounded_part(x, names, rounding), None
            backward = self.backwards[chosen][0]
            sums = grouped_matmuls(
                rounded, stacks[chosen], group_sizes, compute=compute, result=result, backward=backward
            )
            # Parts of sums too, since adapters are linear in x.
            return tuple(
                y if adapters is None else adapters.added(y, x, group_sizes)
                for y, adapters in zip(sums, self.adapters[chosen], strict=True)
            )

        if (
            self.computes[0] == self.computes[1]
            and self.backwards[0] == self.backwards[1]
            and roundings[0] == roundings[1]
        ):
            gate, up = products(x, slice(0, 2), hidden, result)
        else:
            gate, up = (products(x, slice(i, i + 1), hidden, result)[0] for i in (0, 1))
        if hidden:
            gate, up = (sums.astype(x.dtype) for sums in jax.lax.psum((gate, up), hidden))
        x = jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
        return products(x, slice(2, 3), width, F32 if width else None)[0]


def mixture(kernels: ExpertKernels, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
    """The sum of the results of each token's experts, in x's shape and dtype.

    x        (..., hidden)
    weights  (..., per_token)        of each token's experts
    experts  (..., per_token) int32  their numbers
    """
    tokens, chosen = x.reshape(-1, x.shape[-1]), experts.reshape(-1)
    results, order = by_expert(kernels.mlps, tokens, chosen, kernels.gate.shape[0])
    return weighted_sum(results, order, weights).astype(x.dtype).reshape(x.shape)


def by_expert(
    mlps: MLPs, tokens: jax.Array, chosen: jax.Array, experts: int, first: Any = 0
) -> tuple[jax.Array, jax.Array]:
    """`(results, order)`: the results (rows, hidden) of each token with each of its experts, of which row i has the
    place order[i] in `chosen`.

    tokens   (tokens, hidden)
    chosen   (tokens * per_token,) int32  experts of the tokens; rows of other experts than these have zeros:
    experts  the number of experts of `mlps`
    first    the number of their first one
    """
    per_token = chosen.shape[0] // tokens.shape[0]
    numbers = chosen - first
    numbers = jnp.where((numbers >= 0) & (numbers < experts), numbers, experts)
    # The gradients of rows are added up over the devices that have other experts; a lookup alone would not do so.
    tokens, numbers = vary_alike((tokens, numbers))
    order = jnp.argsort(numbers, stable=True)  # rows sorted by expert; row i is of token order[i] // per_token
    group_sizes = jnp.zeros(experts, jnp.int32).at[numbers].add(1, mode="drop")
    return mlps(tokens[order // per_token], group_sizes), order


def inverse(order: jax.Array) -> jax.Array:
    """The inverse of a permutation, int32, without sorting again."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype), unique_indices=True)


def weighted_sum(results: jax.Array, order: jax.Array, weights: jax.Array) -> jax.Array:
    """The sums (tokens, hidden), float32, of the results of each token's experts, weighted in the dtype of results.

    results  (tokens * per_token, hidden)
    order    (tokens * per_token,) int32  the weight of each result, counted token by token: a permutation
    weights  (..., per_token)             of all tokens
    """
    by_token = weights.reshape(-1, weights.shape[-1]).astype(results.dtype)
    sums: jax.Array = _weighted_sum(*vary_alike((results, order, by_token)))
    return sums


@jax.custom_vjp
def _weighted_sum(results: jax.Array, order: jax.Array, weights: jax.Array) -> jax.Array:
    """The sums for weights (tokens, per_token).

    XLA:CPU is several times slower with one gather and a sum over its second axis.  The gradients are gathers too: the
    transposes of gathers would be additions one by one.
    """
    rows = inverse(order).reshape(weights.shape)
    total = jnp.zeros((weights.shape[0], results.shape[1]), jnp.float32)
    for i in range(weights.shape[1]):
        total = total + (results[rows[:, i]] * weights[:, i, None]).astype(jnp.float32)
    return total


def _forward(results: jax.Array, order: jax.Array, weights: jax.Array) -> Any:
    return _weighted_sum(results, order, weights), (results, order, weights)


def _backward(residuals: Any, gradient: jax.Array) -> Any:
    results, order, weights = residuals
    of_rows = gradient[order // weights.shape[1]].astype(results.dtype)
    of_weights = (of_rows * results).astype(jnp.float32).sum(axis=1).astype(weights.dtype)
    of_weights = of_weights[inverse(order)].reshape(weights.shape)
    return of_rows * weights.reshape(-1)[order][:, None], None, of_weights


_weighted_sum.defvjp(_forward, _backward)
