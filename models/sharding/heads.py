"""Attention over a mesh: each device has some rows of the batch and some heads, with their part of the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...policies.matmul.sharded import Names, Split, over_devices, spec

Mix = Callable[..., tuple[jax.Array, Any]]
"""A function `mix(q, k, v, step, past)` that returns attention (b, t, h * d) and a cache."""


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """How a batch and the heads of attention are divided over a mesh.

    batch     mesh axes over which the rows are divided
    heads     mesh axes over which the heads of queries are divided
    sharing   devices that share each head of keys and values; 1: these are divided as queries are
    kv_heads  heads of the cache on all devices together, a shared one for each of its devices
    """

    split: Split
    batch: Names
    heads: Names
    sharing: int
    kv_heads: int


def heads_split(projections: Sequence[Split | None], batch: int, heads: int, kv_heads: int) -> HeadSplit | None:
    """How attention is divided, from how its projections are; None if each device does not have whole, equal groups.

    projections      of the projections of queries, keys and values
    heads, kv_heads  numbers of heads of queries, and of keys and values

    With more devices than heads of keys and values, each device has the one head that its queries share: it computes
    those of all heads, and keeps that one.
    """
    splits = [split for split in projections if split is not None]
    if len(splits) < len(projections):
        return None
    # Axes of the batch never divide heads, even if the batch is not divided: the cache of a row is repeated for many.
    queries, *others = (() if set(split.dims[0]) & set(split.batch) else split.dims[0] for split in splits)
    devices = splits[0].devices(queries)
    if heads % devices:
        return None
    rows = splits[0].batch_of(batch)
    if all(names == queries for names in others) and kv_heads % devices == 0:
        return HeadSplit(splits[0], rows, queries, 1, kv_heads)
    if not any(others) and devices % kv_heads == 0:
        return HeadSplit(splits[0], rows, queries, devices // kv_heads, devices)
    return None


def over_heads(split: HeadSplit, mix: Mix) -> Mix:
    """`mix`, run by each device with its rows of the batch and its heads."""
    by_token, by_head = spec(split.batch, (), split.heads), spec(split.batch, split.heads)
    keys = by_token if split.sharing == 1 else spec(split.batch)

    def with_own_head(q: jax.Array, k: jax.Array, v: jax.Array, step: Any, past: Any) -> tuple[jax.Array, Any]:
        if split.sharing > 1:
            own = jax.lax.axis_index(split.heads) // split.sharing
            k, v = (jax.lax.dynamic_slice_in_dim(each, own, 1, axis=2) for each in (k, v))
        return mix(q, k, v, step, past)

    def sharded(q: jax.Array, k: jax.Array, v: jax.Array, step: Any, past: Any) -> tuple[jax.Array, Any]:
        # All arrays of a step but its start have the batch first.
        steps = jax.tree.map(lambda leaf: spec(split.batch) if jnp.ndim(leaf) else spec(), step)
        caches = by_head if past is None else jax.tree.map(lambda _: by_head, past)
        specs = (by_token, keys, keys, steps, caches)
        run = over_devices(split.split, with_own_head, specs, (by_token, by_head))
        results: tuple[jax.Array, Any] = run(q, k, v, step, past)
        return results

    return sharded
