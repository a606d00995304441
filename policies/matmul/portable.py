"""A choice that is made when a program is lowered: a kernel for one device, or what all platforms understand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import mlir

_choice = Primitive("perparam_kernel")
_choice.multiple_results = True


def unless_portable(kernel: Callable[..., Any], portable: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, but `portable` where a program is lowered for several platforms at once, as `jax.export` can do, or is
    to be partitioned over several devices by XLA, which does not see into a kernel (inside `shard_map` it need not).

    Pallas refuses such lowerings, and when a function is traced nobody knows yet for what it will be lowered.
    """

    def call(*operands: Any) -> Any:
        leaves = jax.tree.leaves(operands)
        one, shapes = jax.make_jaxpr(kernel, return_shape=True)(*operands)
        other = jax.make_jaxpr(portable)(*operands)
        return jax.tree.unflatten(jax.tree.structure(shapes), _choice.bind(*leaves, kernel=one, portable=other))

    return call


def _abstract(*_: Any, kernel: ClosedJaxpr, portable: ClosedJaxpr) -> list[Any]:
    return list(kernel.out_avals)


_choice.def_abstract_eval(_abstract)


def _run(*operands: Any, kernel: ClosedJaxpr, portable: ClosedJaxpr) -> list[Any]:
    result: list[Any] = jaxpr_as_fun(kernel)(*operands)
    return result


_choice.def_impl(_run)


def _lower(context: Any, *operands: Any, kernel: ClosedJaxpr, portable: ClosedJaxpr) -> Any:
    module = context.module_context
    partitioned = getattr(module.axis_context, "num_devices", 1) not in (1, None)
    chosen = portable if partitioned or len(module.platforms) > 1 else kernel
    return mlir.lower_fun(jaxpr_as_fun(chosen), multiple_results=True)(context, *operands)


mlir.register_lowering(_choice, _lower)
