"""Mixtures of experts over a mesh: experts that are divided by number, by the width of their MLP, or both.

Over axes that do not divide the batch, all devices have the same tokens: each computes its experts, or its part of
their width, and the float32 sums are added up.  Over axes that divide the batch too, tokens travel to the devices of
their experts and back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...policies.matmul.sharded import (
    WHOLE,
    Names,
    Part,
    Split,
    array_specs,
    local,
    needs_more,
    over_devices,
    product_plan,
    spec,
    together,
)
from ...policies.matmul.shards import vary
from ..experts import ExpertKernels, Kernel, MLPs, by_expert, inverse, weighted_sum


def sharded_mixture(
    kernels: ExpertKernels,
    splits: Sequence[Split | None],
    x: jax.Array,
    logits: jax.Array,
    choose: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """`mixture` of x (batch, ..., hidden) over a mesh.

    splits  how the kernels are divided, of one mesh and one batch
    logits  (batch, ..., experts)  of the router
    choose  `(weights, experts)` of logits: those of each token's experts

    Where experts are divided by width, their results are added up before they are rounded, and weighted in float32.
    """
    found = [split for split in splits if split is not None]
    batch = found[0].batch_of(x.shape[0])
    arrays: list[Any] = [kernels.gate, kernels.up, kernels.down]
    dtype = np.dtype(kernels.activations or x.dtype)
    plans = [
        product_plan(dtype, array, split, batch, compute)
        for array, split, compute in zip(arrays, found, kernels.computes, strict=True)
    ]
    adapted = [i for i, adapters in enumerate(kernels.adapters) if adapters is not None]
    arrays += [each for adapters in kernels.adapters if adapters for each in (adapters.lora_a, adapters.lora_b)]
    number, width, hidden = common_parts(*(plan.parts for plan in plans))
    here = Part(number.names, (), number.count)  # experts are never gathered: tokens travel instead
    parts = [(here, width, hidden), (here, width, hidden), (here, hidden, width)]
    parts += [each for i in adapted for each in ((here, WHOLE, parts[i][2]), (here, parts[i][1], WHOLE))]
    shapes = [array.shape for array in arrays]

    def function(arrays: Sequence[Kernel], x: jax.Array, logits: jax.Array) -> jax.Array:
        # Here, since XLA gathers the operand of a top-k that it partitions.
        weights, experts = choose(logits)
        # Without the barrier XLA may gather kernels once before a decoding loop, and keep them whole in memory.
        if width.gathered or hidden.gathered:
            x, arrays = together(x, arrays)
        mine: list[Any] = [local(array, each, shape) for array, each, shape in zip(arrays, parts, shapes, strict=True)]
        rest = iter(mine[3:])
        adapters = tuple(
            each and dataclasses.replace(each, lora_a=next(rest), lora_b=next(rest)) for each in kernels.adapters
        )
        mlps = functools.partial(
            dataclasses.replace(kernels, gate=mine[0], up=mine[1], down=mine[2], adapters=adapters).mlps,
            hidden=hidden.kept,
            width=width.kept,
            roundings=tuple(
                plan.rounding if part.kept else None for plan, part in zip(plans, (hidden, hidden, width), strict=True)
            ),
        )
        tokens, chosen, count = x.reshape(-1, x.shape[-1]), experts.reshape(-1), mine[0].shape[0]
        if number.gathered:
            results, order = exchanged(mlps, tokens, chosen, count, number.gathered, number.count)
        else:
            first = jax.lax.axis_index(number.kept) * count if number.kept else 0
            results, order = by_expert(mlps, tokens, chosen, count, first)
        sums = weighted_sum(results, order, weights)
        if number.kept or width.kept:
            sums = jax.lax.psum(sums, (*number.kept, *width.kept))
        return sums.astype(x.dtype).reshape(x.shape)

    if any(map(needs_more, parts, found)):
        x, arrays = together(x, arrays)  # likewise
    between = ((),) * (x.ndim - 2)
    of_x = spec(batch, *between, hidden.kept)
    of_arrays = [array_specs(array, each) for array, each in zip(arrays, parts, strict=True)]
    run = over_devices(found[0], function, (of_arrays, of_x, spec(batch)), of_x)
    result: jax.Array = run(arrays, x, logits)
    return result


def common_parts(gate: Sequence[Part], up: Sequence[Part], down: Sequence[Part]) -> tuple[Part, Part, Part]:
    """The parts of experts, width and hidden size that suit all three kernels; whole where they differ."""
    triples = (gate[0], up[0], down[0]), (gate[1], up[1], down[2]), (gate[2], up[2], down[1])
    found = [set(triple) for triple in triples]
    number, width, hidden = (each.pop() if len(each) == 1 else WHOLE for each in found)
    return number, width, hidden


def exchanged(
    mlps: MLPs, tokens: jax.Array, chosen: jax.Array, experts: int, axes: Names, devices: int
) -> tuple[jax.Array, jax.Array]:
    """`by_expert` inside `shard_map`, with experts on all devices along `axes`: tokens travel there, results back.

    experts  the number of experts of each device

    A device has room for all rows of every other one, so that none is dropped.
    """
    per_token = chosen.shape[0] // tokens.shape[0]
    order = jnp.argsort(chosen, stable=True)  # rows sorted by expert, and so by device
    rows = tokens[order // per_token]
    sizes = jnp.zeros(devices * experts, jnp.int32).at[chosen].add(1).reshape(devices, experts)
    route = _Route.of(sizes, axes, rows.shape[0])
    arrived = route.there(rows)
    numbers = _numbers(route.sizes, rows.shape[0])
    by_number = jnp.argsort(numbers, stable=True)
    results = mlps(arrived[by_number], route.sizes.sum(axis=0))[inverse(by_number)]
    return route.back(results), order


def _numbers(sizes: jax.Array, room: int) -> jax.Array:
    """The experts (devices * room,) of rows that arrived, in blocks of `room` rows; their number for no row.

    sizes  (devices, experts) rows from each device for each expert, in this order in a block
    """
    ends = jnp.cumsum(sizes, axis=1)
    return jnp.sum(jnp.arange(room)[None, :, None] >= ends[:, None, :], axis=2, dtype=jnp.int32).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Route:
    """The way of rows to the devices of their experts, and of their results back.

    On a CPU, where XLA has no `ragged_all_to_all`, an `all_to_all` takes a block of `room` rows to each device.

    axes      mesh axes of the exchange
    room      rows that one device sends at most
    sent      (devices,) rows for each device, which follow each other in the order of devices
    starts    (devices,) the first of them
    sizes     (devices, experts) rows from each device for each expert of this one
    returned  (devices,) for each device the first of its rows for this one, in its own order
    """

    axes: Names
    room: int
    sent: jax.Array
    starts: jax.Array
    sizes: jax.Array
    returned: jax.Array

    @classmethod
    def of(cls, sizes: jax.Array, axes: Names, room: int) -> _Route:
        """The way of rows that are sorted by device.

        sizes  (devices, experts) rows for each expert of each device
        """
        sent = sizes.sum(axis=1)
        starts = jnp.cumsum(sent) - sent
        sizes, returned = (jax.lax.all_to_all(each, axes, 0, 0, tiled=True) for each in (sizes, starts))
        return cls(axes, room, sent, starts, sizes, returned)

    def there(self, rows: jax.Array) -> jax.Array:
        """The rows (devices * room, hidden) for this device's experts: a block from each device, zeros at its end."""
        place = jax.lax.axis_index(self.axes) * self.room
        count = self.sent.shape[0]

        def padded(rows: jax.Array) -> jax.Array:
            index = self.starts[:, None] + jnp.arange(self.room)
            blocks = jnp.where(
                (jnp.arange(self.room) < self.sent[:, None])[..., None], rows[jnp.minimum(index, self.room - 1)], 0
            )
            return jax.lax.all_to_all(blocks, self.axes, 0, 0, tiled=True).reshape(count * self.room, -1)

        def ragged(rows: jax.Array) -> jax.Array:
            offsets, arrived = jnp.full(count, place, jnp.int32), self.sizes.sum(axis=1)
            return self._ragged(rows, count * self.room, self.starts, self.sent, offsets, arrived)

        moved: jax.Array = jax.lax.platform_dependent(rows, cpu=padded, default=ragged)
        return moved

    def back(self, results: jax.Array) -> jax.Array:
        """The results (room, hidden) of this device's rows, in the order in which they were sent."""
        count = self.sent.shape[0]

        def padded(results: jax.Array) -> jax.Array:
            blocks = results.reshape(count, self.room, -1)
            blocks = jax.lax.all_to_all(blocks, self.axes, 0, 0, tiled=True)
            device = jnp.sum(jnp.arange(self.room)[:, None] >= (self.starts + self.sent)[None, :], axis=1)
            return blocks[device, jnp.arange(self.room) - self.starts[device]]

        def ragged(results: jax.Array) -> jax.Array:
            starts = vary(jnp.arange(count, dtype=jnp.int32) * self.room, results)
            return self._ragged(results, self.room, starts, self.sizes.sum(axis=1), self.returned, self.sent)

        moved: jax.Array = jax.lax.platform_dependent(results, cpu=padded, default=ragged)
        return moved

    def _ragged(self, rows: jax.Array, count: int, *where: jax.Array) -> jax.Array:
        """`count` rows, zeros but for those that arrive."""
        empty = vary(jnp.zeros((count, rows.shape[1]), rows.dtype), rows)
        moved: jax.Array = jax.lax.ragged_all_to_all(rows, empty, *where, axis_name=self.axes)
        return moved
