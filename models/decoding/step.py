"""A decoding step through all layers with fused kernels: 10 launches a layer.

Four are matrix products, two are norms and two attention, one rotates queries and keys, and one is the MLP's gate.  A
product leaves its sums to the launch after it, which adds them; where activations are narrow, the launch before a
product quantises its operand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...policies.checks import Trial, check
from ...policies.dtypes import saturating_cast
from ...policies.formats import Format
from ...policies.matmul import dispatch, hopper
from ...policies.matmul.calls import Call
from ...policies.matmul.hopper_costs import row_tile
from ...policies.matmul.portable import unless_portable
from ...policies.targets import HOPPER, Target
from .. import taps
from ..by_platform import batched_as
from ..kv_cache import LayerCache
from ..layers import Linear, RMSNorm, pair
from ..plain import plain_class
from ..transformer import MLP, Attention, Layer, Step
from .reference import Operand, product


def refuses(layers: Sequence[Layer], x: jax.Array, caches: Sequence[LayerCache], target: Target) -> str | None:
    """The reason not to decode x (b, t, hidden) with the fused kernels; None if they can be used.

    target  device that the program is compiled for
    """
    if target != Target("cuda", HOPPER):
        return "its kernels are for Hopper GPUs"
    if x.shape[1] != 1:
        return "it is for one token of each sequence"
    if not isinstance(x.shape[0], int):
        return "the number of sequences is not known"
    if x.shape[0] > hopper.FEW_ROWS:
        return f"it is for at most {hopper.FEW_ROWS} sequences"
    if x.dtype not in (jnp.bfloat16, np.float16):
        return "activations are not in 16 bits"
    if taps.active():
        return "intermediate values are observed"
    if jax.sharding.get_abstract_mesh().manual_axes:
        return "it is within shard_map"
    for layer, cache in zip(layers, caches, strict=True):
        if cache.dtype != x.dtype:
            return "the cache has another dtype than activations"
        if why := _refuses_layer(layer, np.dtype(x.dtype), cache.values.shape[2]):
            return why
    linears = [linear for layer in layers for group in _products(layer) for linear in group]
    for call in dict.fromkeys(_call(linear, x.shape[0], np.dtype(x.dtype)) for linear in linears):
        if dispatch.choose(call, target)[0].name != hopper.COLUMNS.name:
            return f"a product is not computed by {hopper.COLUMNS.name!r}"
    kinds = dict.fromkeys(_trials(layers, np.dtype(x.dtype)))
    return next((f"the check of {one.kernel!r} failed" for one in kinds if check(one, target).state == "refused"), None)


def _refuses_layer(layer: Layer, dtype: np.dtype, slots: int) -> str | None:
    from . import hopper_attention, hopper_rotate  # Pallas is imported only where a kernel is used

    if plain_class(layer) is not Layer or plain_class(layer.mlp) is not MLP:
        return "a layer is of another class"
    attention = layer.self_attn
    if plain_class(attention).__call__ is not Attention.__call__:
        return "attention is of another class"
    if any(plain_class(norm) is not RMSNorm for norm in _norms(layer)):
        return "a norm is of another class"
    if any({norm.compute or dtype, norm.activations or dtype} != {dtype} for norm in _norms(layer)):
        return "a norm is not computed in the activations' dtype"
    if len({norm.eps for norm in attention.head_norms() or ()}) > 1:
        return "the norms of queries and keys differ in eps"
    heads = attention.heads, attention.kv_heads, attention.head_dim
    if not hopper_rotate.accepts(*heads):
        return "there is no kernel for {} and {} heads of {} columns".format(*heads)
    if not hopper_attention.accepts(*heads, slots, narrow=_narrow(attention.o_proj)):
        return "there is no kernel for {} and {} heads of {} columns and a cache of {} slots".format(*heads, slots)
    for linears in _products(layer):
        if any(plain_class(linear) is not Linear or linear.scale_inv is None for linear in linears):
            return "a projection has a kernel that is not narrow, or is of another class"
        if any(linear.adapter is not None for linear in linears):
            return "a projection has an adapter"
        if any(linear.split is not None for linear in linears):
            return "the model is divided over a mesh"
        if any(linear.bias is not None or linear.activations not in (None, dtype) for linear in linears):
            return "a projection has a bias, or other activations"
        if len({linear.launch_key() for linear in linears}) > 1:
            return "projections of the same operand differ in their formats"
    try:
        hash(nnx.split(layer)[0])
    except TypeError:
        return "a layer has attributes that cannot be hashed"
    return None


def _norms(layer: Layer) -> list[RMSNorm]:
    return [layer.input_layernorm, layer.post_attention_layernorm, *(layer.self_attn.head_norms() or ())]


def _products(layer: Layer) -> list[tuple[Any, ...]]:
    """The projections of a layer, in order; those with the same operand together."""
    attention, mlp = layer.self_attn, cast(MLP, layer.mlp)  # `_refuses_layer` has no reason against it
    return [
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ]


def _call(linear: Linear, rows: int, dtype: np.dtype) -> Call:
    assert linear.scale_inv is not None
    kernel = pair(linear.kernel, linear.scale_inv)
    return dispatch.describe(rows, kernel.shape, dtype, kernel.format, linear.compute)


def _narrow(linear: Any) -> bool:
    """Whether the operand of a projection is quantised."""
    compute: Format | None = getattr(linear, "compute", None)
    return compute is not None and compute.narrow


def _trials(layers: Sequence[Layer], dtype: np.dtype) -> Iterator[Trial]:
    """The trials of the kernels that these layers need."""
    from . import attention_trials, row_trials

    for layer in layers:
        (q, *_), (o,), (gate, *_), (down,) = _products(layer)
        yield from (row_trials.of_norm(dtype, narrow=_narrow(one)) for one in (q, gate))
        yield attention_trials.of_rotation(dtype, normed=layer.self_attn.head_norms() is not None)
        yield attention_trials.of_attention(dtype, narrow=_narrow(o))
        yield row_trials.of_gate(dtype, narrow=_narrow(down))


def decode(
    layers: Sequence[Layer], x: jax.Array, step: Step, caches: Sequence[LayerCache]
) -> tuple[jax.Array, list[LayerCache]]:
    """The stream x (b, 1, hidden) after all layers, and their caches; `refuses` must have no reason against it.

    Where a program cannot contain kernels, and for derivatives and batches (`vmap`), this is `through`.
    """
    graphs, states = zip(*map(nnx.split, layers), strict=True)

    def merged(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(states: Any, *rest: Any) -> Any:
            return run([nnx.merge(*both) for both in zip(graphs, states, strict=True)], *rest)

        return call

    plain, on_gpu = merged(_through), unless_portable(merged(fused), merged(_through))

    def dispatched(*operands: Any) -> Any:
        return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=plain)

    # Unlike attention, which has no narrow kernels, the layers have derivatives in reverse mode only.
    run = jax.custom_vjp(batched_as(plain, dispatched))
    run.defvjp(lambda *operands: jax.vjp(plain, *operands), lambda pull_back, gradients: pull_back(gradients))
    results: tuple[jax.Array, list[LayerCache]] = run(list(states), x, step, list(caches))
    return results


def _through(
    layers: Sequence[Layer], x: jax.Array, step: Step, caches: Sequence[LayerCache]
) -> tuple[jax.Array, list[LayerCache]]:
    """`through`; equal layers are traced once."""
    results = []
    for layer, cache in zip(layers, caches, strict=True):
        x, new = _layer(*nnx.split(layer), x, step, cache)
        results.append(new)
    return x, results


@functools.partial(jax.jit, static_argnums=0)
def _layer(graph: Any, state: Any, x: jax.Array, step: Step, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
    result: tuple[jax.Array, LayerCache] = nnx.merge(graph, state)(x, step, cache)
    return result


def fused(
    layers: Sequence[Layer], x: jax.Array, step: Step, caches: Sequence[LayerCache]
) -> tuple[jax.Array, list[LayerCache]]:
    """The results of `through`, by the kernels."""
    batch, dtype = x.shape[0], np.dtype(x.dtype)
    stream = jnp.pad(x[:, 0], ((0, row_tile(batch) - batch), (0, 0)))
    sums, results = None, []
    for layer, cache in zip(layers, caches, strict=True):
        stream, sums, new = _fused_layer(*nnx.split(layer), stream, sums, step, cache)
        results.append(new)
    assert sums is not None
    return (stream + product(sums, dtype))[:batch, None], results


@functools.partial(jax.jit, static_argnums=0)
def _fused_layer(
    graph: Any, state: Any, stream: jax.Array, sums: jax.Array | None, step: Step, cache: LayerCache
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """`(stream, sums, cache)`: the stream (rows, hidden) without the MLP's product, and the sums of that product.

    Mosaic's lowering takes up to a second for a kernel: equal layers are lowered once, and the first layer, which has
    no sums, shares its other kernels with them.
    """
    from . import hopper_attention, hopper_gate, hopper_norm, hopper_rotate

    layer, dtype = nnx.merge(graph, state), np.dtype(stream.dtype)
    attention, rows = layer.self_attn, stream.shape[0]
    qkv, (o,), gate_up, (down,) = _products(layer)

    def scale(norm: RMSNorm) -> jax.Array:
        return saturating_cast(norm.scale[...], dtype)

    def normed(sums: jax.Array | None, norm: RMSNorm, linear: Linear) -> tuple[jax.Array, Operand]:
        run = jax.jit(hopper_norm.add_and_norm, static_argnames=("eps", "narrow"))
        return run(stream, sums, scale(norm), eps=norm.eps, narrow=_narrow(linear))

    stream, x = normed(sums, layer.input_layernorm, qkv[0])
    norms = attention.head_norms()
    q, cache = jax.jit(hopper_rotate.rotate_and_store, static_argnames="eps")(
        _sums(x, qkv, dtype),
        None if norms is None else (scale(norms[0]), scale(norms[1])),
        step.cos[:, 0, 0],
        step.sin[:, 0, 0],
        cache,
        jnp.asarray(step.start, jnp.int32),
        eps=0.0 if norms is None else norms[0].eps,
    )
    mixed = jax.jit(hopper_attention.attend, static_argnames=("rows", "window", "narrow"))(
        q,
        cache,
        step.queries[:, 0],
        step.slots,
        jnp.asarray(step.start, jnp.int32) + 1,
        rows=rows,
        window=attention.window,
        narrow=_narrow(o),
    )
    stream, x = normed(_sums(mixed, (o,), dtype), layer.post_attention_layernorm, gate_up[0])
    gate = jax.jit(hopper_gate.gate, static_argnames=("dtype", "narrow"))
    x = gate(_sums(x, gate_up, dtype), dtype=dtype, narrow=_narrow(down))
    return stream, _sums(x, (down,), dtype), cache


def _sums(x: Operand, linears: Sequence[Linear], dtype: np.dtype) -> jax.Array:
    """The sums of the products of one operand with several projections, side by side."""
    kernels = tuple(pair(linear.kernel, linear.scale_inv) for linear in linears if linear.scale_inv is not None)
    calls = tuple(_call(linear, x[0].shape[0], dtype) for linear in linears)
    return jax.jit(hopper.sums, static_argnums=0)(calls, *x, kernels)
