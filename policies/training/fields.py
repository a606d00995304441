"""The fields of an optimizer's state: finds the arrays that belong to a parameter, and stores them by the map.

An array belongs to a parameter if its path in the state ends with the parameter's path in the tree.  The key before is
its field: `mu` and `nu` of adam, `trace` of sgd, `v_row` of adafactor.  This holds in any nesting of `optax.chain`,
`multi_transform`, `masked`, `MultiSteps` and `inject_hyperparams`, and for arrays of other shapes than the parameter's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import dtypes
from ..decisions import decide
from ..errors import InvalidGradients, InvalidPolicy
from ..formats import Format
from ..rules import Rule, SlotRules
from ..scales import F32
from ..trees import component
from .state_formats import LINEAR_SECOND_MOMENT, MIN_SIZE, SECOND_MOMENTS, StateArray, StateFormat, encode_state

_NOT_NEGATIVE = frozenset({"nu", "nu_max", "v_row", "v_col", "sum_of_squares", "e_g", "e_x", "exp_avg_sq"})
"""Fields of optax's states that are never negative."""

_SQUARES = {"FactoredState": "v", "ScaleByAdanState": "n", "ScaleBySimplifiedAdEMAMixState": "n"}
"""The same, for names that have another meaning in other states."""

_SIGNED = {"SophiaState": "nu"}
"""Fields that may be negative in these states: Sophia's estimate of the diagonal of the Hessian."""

Cast = Callable[[jax.Array, np.dtype, str, int], jax.Array]
"""`cast(values, dtype, path, index)` returns values in a 16-bit dtype; the index counts the arrays of a parameter."""


@dataclasses.dataclass(frozen=True)
class StateLeaf:
    """One array of an optimizer's state.

    value      the array, or a StateArray
    field      the name of its field; None for an array of no parameter, such as a step count
    path       the path of its parameter; None likewise
    unsigned   whether its values are never negative
    """

    value: Any
    field: str | None = None
    path: str | None = None
    unsigned: bool = False

    @property
    def name(self) -> str:
        """The path in the slot `opt_state`: field and path of the parameter."""
        return "/".join(filter(None, [self.field, self.path]))


def state_leaves(state: Any, keys: Mapping[tuple[Any, ...], str]) -> tuple[list[StateLeaf], Any]:
    """Returns the arrays of an optimizer's state with their fields, and the structure of the state.

    keys  the path of each parameter by its keys in the tree that the optimizer was initialised with
    """
    states = {
        prefix: type(node).__name__
        for prefix, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=_has_own_names)[0]
        if _has_own_names(node)
    }
    flat, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, StateArray))
    return [_state_leaf(place, value, keys, states) for place, value in flat], treedef


def _has_own_names(node: Any) -> bool:
    return type(node).__name__ in _SQUARES.keys() | _SIGNED.keys()


def _state_leaf(
    place: tuple[Any, ...], value: Any, keys: Mapping[tuple[Any, ...], str], states: Mapping[tuple[Any, ...], str]
) -> StateLeaf:
    if not (isinstance(value, StateArray) or dtypes.is_floating(getattr(value, "dtype", np.int32))):
        return StateLeaf(value)
    for start in range(1, len(place) + 1):  # the longest path first
        field = place[start - 1]
        scalar_at_root = start == len(place) and not isinstance(value, StateArray) and value.ndim == 0
        if place[start:] in keys and not isinstance(field, jax.tree_util.SequenceKey) and not scalar_at_root:
            name = component(field)
            if name != "hyperparams":  # a learning rate, which a parameter could be called too
                state = states.get(place[: start - 1], "")
                unsigned = name in _NOT_NEGATIVE - {_SIGNED.get(state)} or _SQUARES.get(state) == name
                return StateLeaf(value, name, keys[place[start:]], unsigned)
    return StateLeaf(value)


def check_rules(slot: SlotRules, leaves: Iterable[StateLeaf], paths: Iterable[str]) -> None:
    """Raises an error for a rule of `opt_state` without effect on the state of these parameters.

    paths  all paths of the tree: a rule for a parameter that is not trained is none without effect

    Raises:
      UnmatchedRule, ShadowedRule: see `decide`.
      InvalidPolicy: for linear codes for a second moment.
    """
    leaves = list(leaves)
    fields = dict.fromkeys(leaf.field for leaf in leaves if leaf.field is not None)
    names = [f"{field}/{path}" if path else field for field in fields for path in paths]
    decide("opt_state", slot, dict.fromkeys([*(leaf.name for leaf in leaves if leaf.field), *names]), "state array")
    for leaf in leaves:
        state_format(slot, leaf)


def state_format(slot: SlotRules, leaf: StateLeaf) -> Format | None:
    """Returns the format in which a state array is stored; None: as the optimizer made it.

    Raises:
      InvalidPolicy: for linear codes for a second moment.
    """
    rule = None if leaf.field is None else slot.rule(leaf.name)
    if rule is None or rule.format is None or not isinstance(rule.format, StateFormat):
        return None if rule is None else rule.format
    if rule.format.values == np.int8 and (leaf.unsigned or leaf.field in SECOND_MOMENTS):
        raise InvalidPolicy(f"{rule.where}{rule.key!r} (opt_state) applies to {leaf.name}: {LINEAR_SECOND_MOMENT}")
    return Format(F32) if stays_wide(rule, leaf) is not None else rule.format


def stays_wide(rule: Rule, leaf: StateLeaf) -> str | None:
    """Returns why a state array stays in float32 under an 8-bit rule for its whole field; None if it does not.

    Embeddings are wide since few rows of their gradient are not zero in a step, so that one scale has to represent
    values of very different magnitude.
    """
    if rule.pattern != "default" and rule.compiled.components[1:] != (None,):
        return None  # the rule names parameters
    if (leaf.path or "").rpartition("/")[2] == "embedding":
        return "an embedding"
    shape = leaf.value.codes.shape if isinstance(leaf.value, StateArray) else leaf.value.shape
    return f"fewer than {MIN_SIZE} values" if int(np.prod(shape)) < MIN_SIZE else None


def widen(slot: SlotRules, leaves: list[StateLeaf]) -> list[Any]:
    """Returns the arrays for the optimizer's arithmetic: those with a rule in float32, others as they are."""

    def wide(leaf: StateLeaf) -> Any:
        if isinstance(leaf.value, StateArray):
            return leaf.value.decode()
        if state_format(slot, leaf) is None or leaf.value.dtype == np.float64:
            return leaf.value
        return leaf.value.astype(jnp.float32)

    return [wide(leaf) for leaf in leaves]


def narrow(slot: SlotRules, leaves: list[StateLeaf], cast: Cast) -> list[Any]:
    """Returns the arrays as they are stored: those with a rule in its format, others as they are."""
    counts: dict[str | None, int] = {}

    def stored(leaf: StateLeaf) -> Any:
        counts[leaf.path] = index = counts.get(leaf.path, -1) + 1
        format = state_format(slot, leaf)
        if format is None or isinstance(leaf.value, StateArray):
            return leaf.value
        if isinstance(format, StateFormat):
            return encode_state(leaf.value, format, unsigned=leaf.unsigned)
        if format.values.itemsize == 2 and leaf.value.dtype != format.values:
            assert leaf.path is not None
            return cast(leaf.value, format.values, leaf.path, index)
        return leaf.value.astype(format.values)

    return [stored(leaf) for leaf in leaves]


def check_structure(before: Any, after: Any) -> None:
    """Raises InvalidGradients if an update changed the structure of an optimizer's state."""
    if before != after:
        raise InvalidGradients(
            f"the update changed the structure of the optimizer's state, from {before} to {after}. Initialise it with "
            "the parameters that are trained, and pass gradients of that structure."
        )
