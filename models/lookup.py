"""Lookups of rows in a table of embeddings, which may be narrow or divided over a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..policies.matmul.sharded import Part, Split, array_specs, local, over_devices, spec
from ..policies.scaled_array import ScaledArray
from ..policies.scales import decode_scales
from ..policies.trainable import straight_through

Table = jax.Array | ScaledArray


def lookup(table: Table, ids: jax.Array) -> jax.Array:
    """Rows (..., features) of ids (...), in the table's dtype, float32 of a narrow table; ids outside are clipped."""
    if not isinstance(table, ScaledArray):
        return _rows(table, ids)
    rows = _rows(table.values, ids).astype(jnp.float32)
    height, width = table.block[0], min(table.block[1], table.shape[1])
    scales = jnp.take(decode_scales(table.scale_inv), ids // height, axis=0, mode="clip")
    rows = rows * jnp.repeat(scales, width, axis=-1)[..., : rows.shape[-1]]
    return rows if table.proxy is None else straight_through(rows, jnp.take(table.proxy, ids, axis=0, mode="clip"))


def sharded_lookup(table: Table, ids: jax.Array, split: Split) -> jax.Array:
    """`lookup` of ids (batch, ...) in a table that is divided over a mesh; the rows are divided as the batch is.

    The table is not gathered.  Each device looks up the ids that it has, or its columns of them, and the devices
    exchange results: a sum of one row and zeros is exact.
    """
    batch = split.batch_of(ids.shape[0])
    rows, columns = split.parts(batch)
    # Over axes of the batch each device looks up the ids of all, instead of gathering the table.
    mine = [Part(part.names, (), part.count) for part in (rows, columns)]
    shape = table.shape

    def function(table: Table, ids: jax.Array) -> jax.Array:
        table = local(table, mine, shape)
        for names in filter(None, (columns.gathered, rows.gathered)):
            ids = jax.lax.all_gather(ids, names, axis=0, tiled=True)
        if rows.names:
            ids = ids - jax.lax.axis_index(rows.names) * table.shape[0]
        found = lookup(table, ids)
        is_here = ((ids >= 0) & (ids < table.shape[0]))[..., None]
        if rows.kept:
            found = jax.lax.psum(jnp.where(is_here, found, 0), rows.kept)
        if rows.gathered:
            found = jax.lax.psum_scatter(jnp.where(is_here, found, 0), rows.gathered, tiled=True)
        if columns.gathered:
            found = jax.lax.all_to_all(found, columns.gathered, 0, found.ndim - 1, tiled=True)
        return found

    between = ((),) * (ids.ndim - 1)
    specs = array_specs(table, mine), spec(batch, *between)
    found: jax.Array = over_devices(split, function, specs, spec(batch, *between, columns.kept))(table, ids)
    return found


@jax.custom_jvp
def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table, gathered as bits behind an optimization barrier.

    XLA's CPU backend would convert a whole narrow table for a gather, and move that out of the decoding loop.
    """
    table, ids = jax.lax.optimization_barrier((table, ids))
    bits = jax.lax.bitcast_convert_type(table, jnp.dtype(f"uint{8 * table.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(jnp.take(bits, ids, axis=0, mode="clip"), table.dtype)


@_rows.defjvp
def _rows_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (table, ids), (tangent, _) = primals, tangents
    return _rows(table, ids), jnp.take(tangent, ids, axis=0, mode="clip")
