"""What `with_policy` returns to optax: the state between steps, and updates that are new stored values."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import InvalidGradients


class PolicyState(NamedTuple):
    """The state of an optimizer under a policy.

    step    ()  int32, the number of updates so far
    inner   the state of the wrapped transformation, in the formats of `opt_state`
    master  the structure of the parameters, with a master copy where there is one and None elsewhere
    amax    the structure of the parameters, with float32 magnitudes for delayed scales, (*batch, down, across), where
            a parameter has scales, and None elsewhere
    """

    step: jax.Array
    inner: Any
    master: Any
    amax: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StoredUpdate:
    """An update that replaces an array: `array + update` is `value` if the parameter moved, and `array` otherwise.

    value  the new stored array, which a difference in the array's dtype could not express
    moved  ()  bool, whether the optimizer changed the parameter

    Where a caller multiplies updates by 0 or False to skip a step, as `optax.MultiSteps` does, `moved` becomes False.

    >>> jnp.ones(2) + StoredUpdate(jnp.zeros(2), jnp.array(True))
    Array([0., 0.], dtype=float32)
    """

    value: jax.Array
    moved: jax.Array

    __array_ufunc__ = None  # numpy arrays leave `+` to this class

    def __radd__(self, stored: Any) -> jax.Array:
        if self.moved.dtype != jnp.bool_:
            raise InvalidGradients(
                "the updates of with_policy are new stored values, and something after it computed with them "
                f"(a flag of theirs became {self.moved.dtype}). Put the transformation inside: "
                "with_policy(optax.chain(tx, other), policy)."
            )
        return jnp.where(self.moved, self.value, stored)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NoUpdate:
    """The update of an array that stays as it is, bit for bit: `array + update` is `array`."""

    __array_ufunc__ = None

    def __radd__(self, stored: Any) -> Any:
        return stored
