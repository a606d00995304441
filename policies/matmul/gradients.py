"""The gradient of x in a product: gradient @ weight, by the implementation for the platform of the lowering."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..targets import Target
from . import cpu, native, oracle
from .calls import Call, Operands
from .dispatch import choose
from .portable import unless_portable


def gradient_of_x(call: Call, gradient: jax.Array, operands: Operands) -> jax.Array:
    """Returns gradient (rows, out) @ weight (out, in) in float32: with a widened weight, but not on CPUs."""

    def widened(gradient: jax.Array, operands: Operands) -> jax.Array:
        # Rounding the weight to bfloat16 costs no more accuracy than the gradient in bfloat16 has lost.
        dtype = call.weight or np.dtype(jnp.bfloat16 if gradient.dtype == jnp.bfloat16 else np.float32)
        return oracle.dot(gradient.astype(dtype), oracle.wide_weight(operands.kernel, dtype).T)

    is_native = choose(call, Target("cpu"), run_checks=False)[0] is native.NATIVE
    on_cpu = functools.partial(_natively if is_native else cpu.gradient_of_x, call)
    result: jax.Array = jax.lax.platform_dependent(gradient, operands, cpu=on_cpu, default=widened)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _natively(call: Call, gradient: jax.Array, operands: Operands) -> jax.Array:
    """Returns the gradient of the native library, whose derivatives are those of slabs.

    `vmap` over gradients alone adds the batch to their rows; other batches become a loop.
    """

    @jax.custom_batching.custom_vmap
    def run(gradient: jax.Array, operands: Operands) -> jax.Array:
        by_library, by_slabs = (functools.partial(one.gradient_of_x, call) for one in (native, cpu))
        result: jax.Array = unless_portable(by_library, by_slabs, exportable=False)(gradient, operands)
        return result

    @run.def_vmap
    def batched(size: int, batched: Any, gradient: jax.Array, operands: Operands) -> Any:
        if not any(jax.tree.leaves(batched[1])):
            dx = run(gradient.reshape(size * gradient.shape[1], gradient.shape[2]), operands)
            return dx.reshape(size, gradient.shape[1], dx.shape[-1]), True
        leaves, tree = jax.tree.flatten((gradient, operands))
        flags = jax.tree.leaves(batched)

        def one(slices: Any) -> Any:
            rest = iter(slices)
            arrays = [next(rest) if mapped else leaf for leaf, mapped in zip(leaves, flags, strict=True)]
            return run(*jax.tree.unflatten(tree, arrays))

        return jax.lax.map(one, [leaf for leaf, mapped in zip(leaves, flags, strict=True) if mapped]), True

    result: jax.Array = run(gradient, operands)
    return result


def _forward(call: Call, gradient: jax.Array, operands: Operands) -> Any:
    return _natively(call, gradient, operands), (gradient, operands)


def _backward(call: Call, residuals: Any, cotangent: jax.Array) -> Any:
    return jax.vjp(functools.partial(cpu.gradient_of_x, call), *residuals)[1](cotangent)


_natively.defvjp(_forward, _backward)
