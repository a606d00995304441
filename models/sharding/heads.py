"""Attention over a mesh: each device has some rows of the batch and some heads, with their part of the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ...policies.matmul.sharded import Names, Split, over_devices, spec

Mix = Callable[..., tuple[jax.Array, Any]]
"""A function `mix(q, k, v, step, past)` that returns attention (b, t, h * d) and a cache."""


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """The mesh axes over which a batch and the heads of attention are divided."""

    split: Split
    batch: Names
    heads: Names


def heads_split(projections: Sequence[Split | None], batch: int, heads: Sequence[int]) -> HeadSplit | None:
    """How attention is divided, from how its projections are; None if each device does not have whole, equal groups.

    projections  of the projections of queries, keys and values
    heads        numbers of heads that are to be divided: of queries, and of keys and values
    """
    splits = [split for split in projections if split is not None]
    if len(splits) < len(projections):
        return None
    names = {split.parts(split.batch_of(batch), (None, None))[0].kept for split in splits}
    if len(names) > 1:
        return None
    (axes,) = names
    if any(count % splits[0].devices(axes) for count in heads):
        return None
    return HeadSplit(splits[0], splits[0].batch_of(batch), axes)


def over_heads(split: HeadSplit, mix: Mix) -> Mix:
    """`mix`, run by each device with its rows of the batch and its heads."""
    by_token, by_head = spec(split.batch, (), split.heads), spec(split.batch, split.heads)

    def sharded(q: jax.Array, k: jax.Array, v: jax.Array, step: Any, past: Any) -> tuple[jax.Array, Any]:
        # All arrays of a step but its start have the batch first.
        steps = jax.tree.map(lambda leaf: spec(split.batch) if jax.numpy.ndim(leaf) else spec(), step)
        caches = by_head if past is None else jax.tree.map(lambda _: by_head, past)
        specs = (by_token, by_token, by_token, steps, caches)
        results: tuple[jax.Array, Any] = over_devices(split.split, mix, specs, (by_token, by_head))(q, k, v, step, past)
        return results

    return sharded
