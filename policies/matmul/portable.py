"""A JAX primitive that chooses at lowering time between a kernel for one device and a portable function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import mlir

_choice = Primitive("perparam_kernel")
_choice.multiple_results = True


def unless_portable(
    kernel: Callable[..., Any], portable: Callable[..., Any], exportable: bool = True
) -> Callable[..., Any]:
    """Returns a function that runs `kernel`, or `portable` in programs that cannot contain the kernel.

    These are programs lowered for several platforms at once, as `jax.export` can do, and programs that XLA partitions
    over several devices, since XLA cannot partition a kernel.  (Inside `shard_map` XLA does not partition.)  If the
    kernel is not `exportable`, they are all programs of `jax.export`.  Nothing of this is known when a function is
    traced.
    """

    def call(*operands: Any) -> Any:
        leaves = jax.tree.leaves(operands)
        first, shapes = jax.make_jaxpr(kernel, return_shape=True)(*operands)
        second = jax.make_jaxpr(portable)(*operands)
        results = _choice.bind(*leaves, kernel=first, portable=second, exportable=exportable)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


def _abstract(*_: Any, kernel: ClosedJaxpr, portable: ClosedJaxpr, exportable: bool) -> list[Any]:
    return list(kernel.out_avals)


_choice.def_abstract_eval(_abstract)


def _run(*operands: Any, kernel: ClosedJaxpr, portable: ClosedJaxpr, exportable: bool) -> list[Any]:
    result: list[Any] = jaxpr_as_fun(kernel)(*operands)
    return result


_choice.def_impl(_run)


def _lower(context: Any, *operands: Any, kernel: ClosedJaxpr, portable: ClosedJaxpr, exportable: bool) -> Any:
    module = context.module_context
    partitioned = getattr(module.axis_context, "num_devices", 1) not in (1, None)
    exported = module.lowering_parameters.for_export and not exportable
    chosen = portable if partitioned or exported or len(module.platforms) > 1 else kernel
    return mlir.lower_fun(jaxpr_as_fun(chosen), multiple_results=True)(context, *operands)


mlir.register_lowering(_choice, _lower)
