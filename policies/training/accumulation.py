"""Gradient accumulation: the mean loss and gradient of a batch, from parts of it one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import UnsupportedCast
from ..trees import Narrow

ValueAndGrad = Callable[..., tuple[Any, Any]]
"""A function of parameters and a batch that returns `(value, gradient)`, such as `jax.value_and_grad` returns."""


def accumulate(
    value_and_grad: ValueAndGrad, steps: int, *, weight: Callable[..., jax.Array] | None = None
) -> ValueAndGrad:
    """Returns `value_and_grad` for batches that are divided into microbatches, by `jax.lax.scan`.

    value_and_grad  called with parameters, or an NNX module, and with a microbatch; as `jax.value_and_grad(loss)`,
                    `nnx.value_and_grad(loss)` or `perparam.training.value_and_grad(loss)` return it, with `has_aux` too
    steps           number of microbatches
    weight          called with a microbatch, without parameters: its weight in the mean, such as the number of real
                    tokens, whose mean the loss is (`perparam.training.label_count`); None: all weights are equal

    Every array of a batch that has axes is divided along the first one, and others go to all microbatches; microbatch i
    has the rows i, i + steps, ..., so that a batch that is divided over devices stays where it is. A key of
    `jax.random.key` is split, so that each microbatch has dropout masks of its own; a key of `jax.random.PRNGKey` is an
    array like any other, and would be divided: pass `jax.random.wrap_key_data(key)`. Losses and gradients
    are added in float32, and the means are rounded once to the dtypes that `value_and_grad` returns. Auxiliary data are
    stacked along a new first axis. State of a module other than parameters, such as the averages of norms, passes from
    one microbatch to the next.

    >>> loss = lambda w, x: jnp.mean((w * x) ** 2)
    >>> value, gradient = accumulate(jax.value_and_grad(loss), 2)(jnp.float32(3), jnp.array([1.0, 2.0, 3.0, 4.0]))
    >>> float(value), float(gradient)
    (67.5, 45.0)

    Raises:
      UnsupportedCast: steps that are not positive; an axis that does not divide into as many parts.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise UnsupportedCast(f"accumulate: expected a positive number of steps, found {steps!r}. Write 1 or more.")

    def accumulated(parameters: Any, *batch: Any, **keywords: Any) -> tuple[Any, Any]:
        divided, whole, join = _divide((batch, keywords), int(steps))
        pure, state = _as_pure(value_and_grad, parameters)

        def run(state: Any, micro: Any) -> tuple[Any, Any, Any, Any]:
            arguments, named = join(micro, whole)
            (value, gradient), state = pure(state, *arguments, **named)
            loss, *auxiliary = value if isinstance(value, tuple) else (value,)
            share = jnp.float32(1) if weight is None else jnp.asarray(weight(*arguments, **named)).astype(jnp.float32)
            return state, (loss, gradient), share, auxiliary

        def body(carry: Any, micro: Any) -> tuple[Any, Any]:
            state, sums, total = carry
            state, results, share, auxiliary = run(state, micro)
            sums = [s + share.astype(s.dtype) * x.astype(s.dtype) for s, x in zip(sums, _summed(results), strict=True)]
            return (state, sums, total + share), auxiliary

        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), divided)
        _, results, _, _ = jax.eval_shape(run, state, first)
        zeros = [jnp.zeros(x.shape, _wide(x.dtype)) for x in _summed(results)]
        carry = (state, zeros, jnp.float32(0))
        (state, sums, total), auxiliary = jax.lax.scan(body, carry, divided, length=int(steps))
        if isinstance(parameters, nnx.Module):
            nnx.update(parameters, state)
        total = jnp.where(total == 0, 1, total)  # of no real token the mean is 0
        loss, gradient = _replaced(results, [s / total.astype(s.dtype) for s in sums])
        return ((loss, *auxiliary) if auxiliary else loss), gradient

    return accumulated


def _as_pure(value_and_grad: ValueAndGrad, parameters: Any) -> tuple[Callable[..., Any], Any]:
    """Returns `(function, state)`: the function of the state and a batch, which returns its results and the new state.

    The state is that of a module, without its parameters; of other parameters it is None.
    """
    if not isinstance(parameters, nnx.Module):
        return lambda state, *batch, **keywords: (value_and_grad(parameters, *batch, **keywords), None), None
    parts: Any = nnx.split(parameters, (nnx.Param, Narrow), ...)
    graphdef, constant, state = parts

    def function(state: Any, *batch: Any, **keywords: Any) -> Any:
        # Variables of this trace, since transformations of NNX update those of their arguments.
        own = jax.tree.map(lambda x: x, (constant, state))
        module = nnx.merge(graphdef, *own)
        results = value_and_grad(module, *batch, **keywords)
        after: Any = nnx.split(module, (nnx.Param, Narrow), ...)
        return results, after[2]

    return function, state


def _divide(tree: Any, steps: int) -> tuple[list[Any], list[Any], Callable[[list[Any], list[Any]], Any]]:
    """Returns `(divided, whole, join)`: arrays (steps, n / steps, ...), other leaves, and the inverse for one step."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    divided, whole, is_divided = [], [], []
    for keys, leaf in paths:
        if steps > 1 and _is_key(leaf):
            is_divided.append(True)
            divided.append(jax.random.split(leaf, steps))
            continue
        is_divided.append(bool(np.ndim(leaf)) if not isinstance(leaf, jax.Array) else leaf.ndim > 0)
        if not is_divided[-1]:
            whole.append(leaf)
            continue
        leaf = jnp.asarray(leaf)
        if leaf.shape[0] % steps:
            path = jax.tree_util.keystr(keys[1:], simple=True, separator="/")
            raise UnsupportedCast(
                f"accumulate: argument {path} of shape {leaf.shape} does not divide into {steps} microbatches along "
                "its first axis. Pad the batch with rows that have no real tokens, or choose another number."
            )
        divided.append(jnp.swapaxes(leaf.reshape(-1, steps, *leaf.shape[1:]), 0, 1))

    def join(micro: list[Any], whole: list[Any]) -> Any:
        parts, others = iter(micro), iter(whole)
        return jax.tree.unflatten(structure, [next(parts) if flag else next(others) for flag in is_divided])

    return divided, whole, join


def _is_key(leaf: Any) -> bool:
    """Returns whether a leaf is one PRNG key, of a type of its own."""
    return isinstance(leaf, jax.Array) and leaf.ndim == 0 and bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _is_summed(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _wide(dtype: np.dtype) -> np.dtype:
    """Returns the dtype in which arrays of `dtype` are added: float32, or a dtype of 8 bytes itself."""
    return np.dtype(np.float32) if dtype.itemsize < 8 else dtype


def _summed(tree: Any) -> list[Any]:
    """Returns the floating-point leaves; the gradients of integers (float0) are empty."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_summed(leaf)]


def _replaced(tree: Any, values: list[jax.Array]) -> Any:
    """Returns a tree of shapes with these values for its floating-point leaves, in their dtypes."""
    rest = iter(values)
    return jax.tree.map(
        lambda x: next(rest).astype(x.dtype) if _is_summed(x) else np.zeros(x.shape, jax.dtypes.float0), tree
    )
