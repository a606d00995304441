"""`init` and `apply`: initialise and run any Flax module, Linen or NNX, with a policy.

A module with an argument `policy` applies it itself.  Any other module runs unchanged: its parameters are in their
storage format, and inside the compiled program each is cast or dequantised to its compute dtype before the module runs.
Flax's linear layers multiply in a narrow format where the policy computes their kernels so: see `stock`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

from .bound_classes import is_bound
from .cast import cast_floats
from .compute import to_compute
from .errors import UnsupportedCast
from .modules import activations_of, build, check_callable, fill, refuse_kv_cache, reseeded, streams, takes_policy
from .policy import Policy
from .presets import PolicyLike, get_policy
from .resolved import has_config, resolve
from .scope import Scope
from .stock import linen_products, prepare
from .store import store
from .trees import Narrow, variables_by_path

AnyModule = nn.Module | nnx.Module | Callable[..., nnx.Module]


def init(module: AnyModule, policy: PolicyLike, key: Any, *inputs: Any, **kwargs: Any) -> Any:
    """Returns the variables of `module`, initialised by the module and then converted to their storage format.

    module  a Linen module, or for NNX a callable `module(rngs=rngs)`: a class, a partial, a lambda; a callable with an
            argument `policy` gets the policy and stores its own parameters
    policy  any value that `get_policy` accepts
    key     a PRNG key, or a dict of keys by stream
    inputs  example inputs with which Linen traces the module; NNX needs none

    The result is Linen's variable dict or an `nnx.State`.  A kernel that is quantised has its `scale_inv` beside it.

    >>> import jax, numpy as np
    >>> variables = init(nn.Dense(3), {"params": {"kernel": "f8_e4m3fn"}}, jax.random.key(0), np.ones((1, 2), "f4"))
    >>> {name: x.dtype.name for name, x in variables["params"].items()}
    {'kernel': 'float8_e4m3fn', 'scale_inv': 'float32', 'bias': 'float32'}

    Raises:
      UnsupportedCast: if `module` is neither a Linen module nor such a callable.
      UnmatchedRule, ShadowedRule: for a rule without effect, or `kv_cache` and a module without a model of perparam.
    """
    policy = get_policy(policy)
    if isinstance(module, nn.Module):
        refuse_kv_cache(policy, module)
        variables = module.init(key, *inputs, **kwargs)
        params = variables.get("params", {})
        return _with_params(variables, store(resolve(policy, params), params))
    if isinstance(module, nnx.Module):
        raise UnsupportedCast(
            f"init makes new variables, and this {type(module).__name__} has its own. Use "
            "policy.store(nnx.state(module)) for these, or pass a callable that makes the module, such as its class."
        )
    check_callable(module)
    rngs = nnx.Rngs(**key) if isinstance(key, Mapping) else nnx.Rngs(key)
    if takes_policy(module):
        built = build(module, policy=policy, rngs=rngs)
        if not any(has_config(part) for _, part in nnx.iter_modules(built)):
            refuse_kv_cache(policy, built)
        state = nnx.state(built)
        resolve(policy, state)  # raises for rules without effect, which the lookups of single names cannot detect
        return state
    built = build(module, rngs=rngs)
    refuse_kv_cache(policy, built)
    state = nnx.state(built)
    return store(resolve(policy, state), state)


def apply(
    module: AnyModule,
    policy: PolicyLike,
    variables: Any,
    *inputs: Any,
    rngs: Mapping[str, Any] | None = None,
    mutable: Any = False,
    method: Any = None,
    **kwargs: Any,
) -> Any:
    """Returns the result of `module` for `inputs` and the `variables` from `init`, cast to the policy's output dtype.

    Floating-point inputs are cast to the default of the compute slot if it has one.  Parameters are cast or dequantised
    as the compute slot specifies; `variables` do not change.  Scaled pairs in Linen variables need a policy with the
    block of `init`: see `Policy.store`.  Inside a module without an argument `policy`, Flax's own
    promotion rules apply.

    module   as for `init`; or an NNX module, of which the structure is used, and not the variables
    policy   any value that `get_policy` accepts
    rngs     keys by stream, for dropout and other random operations
    mutable  as in Linen (`["batch_stats"]`, True): the result is `(result, updated variables)`.  For NNX a filter
             (`nnx.BatchStat`, True for all); the updated variables are an `nnx.State` without parameters
    method   a method of the module other than `__call__`, by name or as a function

    Raises:
      UnsupportedCast: for a narrow compute dtype and a module without an argument `policy`, unless the kernel is that
        of a linear layer of Flax; for a module that is not Flax's, or `variables` of another module.
      UnmatchedRule, ShadowedRule, UnpairedScale, InvalidScale: see `Policy.explain`.
    """
    policy = get_policy(policy)
    if not isinstance(module, (nn.Module, nnx.Module)):
        check_callable(module)
    if isinstance(module, nnx.Module) and is_bound(module):
        raise UnsupportedCast(
            f"this {type(module).__name__} is bound to a policy, which cannot be replaced. Call the module itself, or "
            "pass the module that was bound."
        )
    run, kind = (_apply_linen, Mapping) if isinstance(module, nn.Module) else (_apply_nnx, nnx.State)
    if not isinstance(variables, kind):
        raise UnsupportedCast(
            f"variables: expected a {kind.__name__} as init returns it, found {type(variables).__name__}. "
            f"Pass the {'variables of a Linen module' if kind is Mapping else 'nnx.state(module) of an NNX module'}."
        )
    if policy.activations is not None:
        inputs, kwargs = cast_floats((inputs, kwargs), policy.activations)
    return run(module, policy, variables, inputs, rngs, mutable, method, kwargs)


def _apply_linen(
    module: Any,
    policy: Policy,
    variables: Any,
    inputs: tuple[Any, ...],
    rngs: Mapping[str, Any] | None,
    mutable: Any,
    method: Any,
    kwargs: dict[str, Any],
) -> Any:
    # Only the collection `params`: `batch_stats` are not parameters.
    params = _computed(policy, variables.get("params", {}), (inputs, kwargs))
    computed = _with_params(variables, params)
    with linen_products():
        result = module.apply(computed, *inputs, rngs=rngs, mutable=mutable, method=method, **kwargs)
    if mutable is False:
        return policy.cast_output(result)
    result, updated = result
    if "params" in updated:  # in compute dtypes, returned unchanged by the module: replaced by the stored parameters
        updated = {**updated, "params": variables["params"]}
    return policy.cast_output(result), updated


def _with_params(variables: Mapping[str, Any], params: Any) -> Any:
    """Returns a Linen variable dict with other parameters; a dict without parameters is returned unchanged."""
    if "params" not in variables:
        return variables
    changed = {**variables, "params": params}
    return FrozenDict(changed) if isinstance(variables, FrozenDict) else changed


def _apply_nnx(
    module: Any,
    policy: Policy,
    variables: Any,
    inputs: tuple[Any, ...],
    rngs: Mapping[str, Any] | None,
    mutable: Any,
    method: Any,
    kwargs: dict[str, Any],
) -> Any:
    if takes_policy(type(module) if isinstance(module, nnx.Module) else module):
        if isinstance(module, nnx.Module):
            raise UnsupportedCast(
                f"this {type(module).__name__} was built with a policy, which cannot be replaced. Pass the class, or a "
                "callable with an argument `policy`; or call the module itself."
            )
        resolved = resolve(policy, variables, slots=("compute", "backward"))
        scope = Scope(policy, policy.activations, stored=resolved.specs)
        make = functools.partial(build, module, policy=scope)
    else:
        variables = _computed(policy, variables, (inputs, kwargs))
        make = functools.partial(build, module)
    model = fill(module if isinstance(module, nnx.Module) else _rebuilt(make, variables), variables_by_path(variables))
    prepare(model)
    if rngs is not None:
        nnx.reseed(model, **reseeded(rngs, variables))
    if method is None:
        result = model(*inputs, **kwargs)
    else:
        bound = getattr(model, method) if isinstance(method, str) else lambda *a, **k: method(model, *a, **k)
        result = bound(*inputs, **kwargs)
    if mutable is False:
        return policy.cast_output(result)
    return policy.cast_output(result), nnx.state(model, nnx.All(mutable, nnx.Not(nnx.Any(nnx.Param, Narrow))))


def _rebuilt(make: Callable[..., nnx.Module], variables: Any) -> nnx.Module:
    """Returns the module of `variables`, with shapes in place of arrays that `fill` replaces."""
    # A module with arrays as plain attributes is built in full: `fill` replaces only variables, and `nnx.eval_shape`
    # would leave shapes in place of the other arrays.
    plain = any(not isinstance(leaf, nnx.Variable) for _, leaf in nnx.to_flat_state(variables))
    return make(rngs=streams(variables)) if plain else nnx.eval_shape(lambda: make(rngs=streams(variables)))


def _computed(policy: Policy, variables: Any, inputs: Any) -> Any:
    """Returns the variables with which a module that knows nothing of perparam runs for `inputs`."""
    return to_compute(policy, variables, activations_of(policy, inputs), narrow=True)
