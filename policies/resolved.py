"""Resolution: applies the rules of a policy to the parameters of a tree.

The result has the current format, the requested format and the rules of every parameter.  `resolve` is the only place
that checks rules and pairs: rules without effect, scales without a kernel and grids that do not fit are errors here.
Plans, storage, loading, saving and the wrappers use its result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from . import dtypes
from .blocks import DEFAULT_BLOCK, Block, check_grid
from .decisions import decide
from .errors import InvalidPolicy, InvalidScale, PerparamError, UnpairedScale
from .formats import Format, stored_format
from .paths import is_scale, scale_path
from .rules import PolicyRules, Rule
from .scales import F32
from .scope import ParamSpec
from .slots import SLOTS
from .trees import ArrayInfo, describe

Change = Literal["kept", "cast", "quantised", "dequantised", "requantised", "made", "dissolved"]

Decisions = Mapping[str, Rule | None]
"""The rule that applies to a parameter, by slot; None for a slot without such a rule."""


@runtime_checkable
class ModelConfig(Protocol):
    """The part of a model's config that resolution uses."""

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of activations that the config specifies."""

    def kv_bytes(self, dtype: np.dtype) -> int:
        """Returns the bytes of cached keys and values for each token in `dtype`, with scales; 0 without a cache."""


@dataclasses.dataclass(frozen=True)
class ResolvedParam:
    """One parameter and its scales: the current format, the requested format, and the rules that apply.

    path         path of the parameter
    current      its shape and its format before storage; the format of a scaled pair is complete
    format       its format after storage; complete if it is narrow
    rules        the rules that apply to it, by slot
    scale_rules  the rules that apply to its scales, by slot
    """

    path: str
    current: ArrayInfo
    format: Format
    rules: Decisions
    scale_rules: Decisions

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.current.shape

    @property
    def scale_path(self) -> str:
        """The path of its scales."""
        return scale_path(self.path)

    @property
    def has_scales(self) -> bool:
        """Whether the parameter has scales before storage."""
        return self.current.format.scale is not None

    @property
    def stored(self) -> dict[str, ArrayInfo]:
        """Shape and format after storage, by path, of the parameter and of its scales."""
        stored = {self.path: ArrayInfo(self.shape, self.format)}
        for shape, dtype in self.format.parts(self.shape)[1:]:
            stored[self.scale_path] = ArrayInfo(shape, Format(dtype))
        return stored

    @property
    def change(self) -> Change:
        """The conversion of the values by storage."""
        return change(self.current.format, self.format, self.shape)

    @property
    def compute(self) -> Format | None:
        """The format in the compute slot; None: a narrow parameter as stored, another in the activations' dtype."""
        rule = self.rules.get("compute")
        return None if rule is None else rule.format


def change(current: Format, requested: Format, shape: tuple[int, ...]) -> Change:
    """Returns the conversion that an array of `shape` needs from one complete format to another."""
    if current.scale is None:
        if requested.scale is not None:
            return "quantised"
        return "kept" if current.values == requested.values else "cast"
    if requested.scale is None:
        return "dequantised"
    # Float32 represents every current scale exactly, so the values do not change; rounded scales need new values.
    exact = requested.scale in (current.scale, F32)
    same = dataclasses.replace(requested, scale=current.scale).represents_as(current, shape)
    return "kept" if same and exact else "requantised"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The result of applying a policy to one tree.

    policy       the policy
    params       every parameter by path, in the tree's order; scales are part of their parameter
    activations  the dtype of activations; None if neither the policy nor the model specifies it
    output       the dtype of the model's result; None likewise
    kv_cache     the dtype of keys and values; None for a tree without them, or a model without a cache and a rule
    kv_bytes     bytes of cached keys and values for each token, including scales; 0 without a cache
    """

    policy: PolicyRules
    params: Mapping[str, ResolvedParam]
    activations: np.dtype | None = None
    output: np.dtype | None = None
    kv_cache: np.dtype | None = None
    kv_bytes: int = 0

    @property
    def stored(self) -> dict[str, ArrayInfo]:
        """Shape and format of every array after storage, by path, scales after their kernel."""
        return {path: info for param in self.params.values() for path, info in param.stored.items()}

    @property
    def specs(self) -> dict[str, ParamSpec]:
        """The storage and compute format of every parameter, by path."""
        return {path: ParamSpec(param.format, param.compute) for path, param in self.params.items()}

    @property
    def formats(self) -> dict[str, Format]:
        """The format of every parameter that has scales after storage, by path."""
        return {path: param.format for path, param in self.params.items() if param.format.scale is not None}


def resolve(
    policy: PolicyRules, tree: Any, *, slots: Iterable[str] | None = None, config: ModelConfig | None = None
) -> Resolved:
    """Returns the result of applying `policy` to every parameter of `tree`.

    tree    arrays, shapes or `ArrayInfo`s in any container that `describe` supports
    slots   the slots that are applied, by default all but those for training; without "params", storage does not
            change.  `opt_state` is not applied here, since its paths are those of an optimizer's state
    config  the config of the model; by default `tree.config` if it is one

    Raises:
      UnpairedScale, InvalidScale: for narrow values without scales, scales without values, a grid that does not fit.
      UnmatchedRule, ShadowedRule: for a rule without effect.
      InvalidPolicy: for a narrow dtype of a parameter with fewer than two dimensions; for two dtypes of the same
        scales.
    """
    infos = describe(tree)
    applied = [name for name, slot in SLOTS.items() if (not slot.training if slots is None else name in slots)]
    by_parameter = [name for name in applied if SLOTS[name].by_parameter and not SLOTS[name].by_field]
    storage = policy if "params" in applied else PolicyRules({}, policy.block)
    raise_together(pair_problems(infos, policy))
    requested = {path: storage.params.format(path) for path, info in infos.items() if not is_scale(path)}
    new_scales = [
        scale_path(path)
        for path, format in requested.items()
        if format is not None and format.narrow and dtypes.is_floating(infos[path].dtype)
    ]
    decisions = {"params": decide("params", storage.params, [*infos, *(p for p in new_scales if p not in infos)])}
    # The other slots apply to the parameters and scales that exist after storage.
    formats = {
        path: _before_and_after(
            policy, storage, path, infos[path], infos.get(scale_path(path)), decisions["params"][path]
        )
        for path in requested
    }
    after = [*formats, *(scale_path(path) for path, (_, format) in formats.items() if format.scale is not None)]
    decisions |= {name: decide(name, policy.slot(name), after) for name in by_parameter if name != "params"}
    params = {}
    for path, (current, format) in formats.items():
        # Rules have no effect on integers, booleans and keys, and a plan shows no rule for these.
        has_effect = format.scale is not None or current.format.scale is not None or dtypes.is_floating(current.dtype)
        rules = {name: rule[path] if has_effect else None for name, rule in decisions.items()}
        scale_rules = {name: rule.get(scale_path(path)) for name, rule in decisions.items()}
        params[path] = ResolvedParam(path, current, format, rules, scale_rules)
        if (compute := rules.get("compute")) is not None:
            _check_compute(path, current.shape, compute)
    return _with_model(policy, params, config or (tree.config if has_config(tree) else None))


def has_config(tree: Any) -> bool:
    """Returns whether `tree` is a model with a `ModelConfig`; any module may have an attribute `config`."""
    own = getattr(tree, "config", None)
    return isinstance(own, ModelConfig) and (own.dtype is None or isinstance(own.dtype, np.dtype))


def _with_model(policy: PolicyRules, params: Mapping[str, ResolvedParam], config: ModelConfig | None) -> Resolved:
    """Returns the resolved parameters together with the dtypes that depend on the model's config."""
    activations = policy.activations or (None if config is None else config.dtype)
    kv_cache = policy.kv_cache or activations
    kv_bytes = 0 if config is None or kv_cache is None else config.kv_bytes(kv_cache)
    # Without a rule for it, the result of perparam's models has the activations' dtype, and other results are not cast.
    output = policy.output or (None if config is None or config.dtype is None else activations)
    if not kv_bytes:  # a model without a cache rounds keys and values if the policy says so
        kv_cache = None if config is None else policy.kv_cache
    return Resolved(policy, params, activations, output, kv_cache, kv_bytes)


def _before_and_after(
    policy: PolicyRules,
    storage: PolicyRules,
    path: str,
    info: ArrayInfo,
    scales: ArrayInfo | None,
    rule: Rule | None,
) -> tuple[ArrayInfo, Format]:
    """Returns a parameter with its complete current format, and its complete format after storage.

    policy   the policy, which may specify the block of a stored pair
    storage  the rules that storage applies: `policy`, or no rules
    scales   the current scales of the parameter
    rule     the rule of `storage` that applies to the parameter
    """
    requested = None if rule is None or (not dtypes.is_floating(info.dtype) and scales is None) else rule.format
    if requested is not None and requested.narrow and len(info.shape) < 2:
        assert rule is not None
        raise too_flat(rule, path, info.shape)
    if scales is None:
        plain = Format(info.dtype)
        after = plain if requested is None else requested.completed(storage.block, storage.scale(path))
        return ArrayInfo(info.shape, plain), after
    scale, block = storage.scale(path) or scales.dtype, current_block(path, info, policy)
    is_complete = info.format.scale is not None and info.block is not None  # as in a ScaledArray
    current = info.format if is_complete else stored_format(info.dtype, block, scales.dtype)
    if requested is None:  # only a rule for the scales can change the pair
        after = stored_format(info.dtype, block, scale)
    else:
        after = requested.completed(storage.block or block, scale)
    if after != requested and after.represents_as(current, info.shape):  # unspecified fields do not change
        after = current
    return ArrayInfo(info.shape, current), after


def current_block(path: str, info: ArrayInfo, policy: PolicyRules) -> Block:
    """Returns the block of the narrow parameter at `path`.

    A tree without that information takes it from the parameter's rule, from the policy's block, or uses (128, 128).
    """
    format = policy.params.format(path)
    return info.block or (format.block if format is not None else None) or policy.block or DEFAULT_BLOCK


def pair_problems(infos: Mapping[str, ArrayInfo], policy: PolicyRules) -> list[PerparamError]:
    """Returns an error for each narrow parameter without scales, scales without such, and grid that does not fit."""
    problems: list[PerparamError] = []
    kernels = {scale_path(path): path for path in infos if not is_scale(path)}
    for path, info in infos.items():
        if is_scale(path):
            if path not in kernels:
                problems.append(
                    UnpairedScale(
                        f"{path}: scales {info.shape} without their kernel. Add the kernel, or remove the scales."
                    )
                )
            elif not dtypes.is_narrow(infos[kernels[path]].dtype):
                kernel, dtype = kernels[path], dtypes.dtype_name(infos[kernels[path]].dtype)
                problems.append(
                    UnpairedScale(
                        f"{path}: scales {info.shape} beside {kernel!r}, which is {dtype} and needs none. "
                        "Remove the scales, or use the narrow kernel."
                    )
                )
        elif dtypes.is_narrow(info.dtype) and scale_path(path) in infos:
            try:
                grid = infos[scale_path(path)].shape
                check_grid(info.shape, grid, current_block(path, info, policy), scale_path(path))
            except InvalidScale as error:
                problems.append(error)
        elif dtypes.is_narrow(info.dtype) and dtypes.is_floating(info.dtype):
            problems.append(
                UnpairedScale(
                    f"{path}: {dtypes.dtype_name(info.dtype)} {info.shape} without its scales {scale_path(path)!r}, "
                    "so its magnitude is lost. Add the scales to the tree, or use the kernel in f32 or bf16."
                )
            )
    return problems


def raise_together(problems: Iterable[PerparamError]) -> None:
    """Raises all `problems`, if any, as one error of the type of the first."""
    problems = list(problems)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


def too_flat(rule: Rule, path: str, shape: tuple[int, ...]) -> InvalidPolicy:
    """Returns the error for a rule that requests a narrow dtype for a parameter of fewer than two dimensions."""
    assert rule.format is not None
    return InvalidPolicy(
        f"{rule.where}{rule.key!r} (params) asks {rule.format} of {path!r}, whose shape is {shape}. "
        "Use narrow dtypes only for parameters of two or more dimensions."
    )


def _check_compute(path: str, shape: tuple[int, ...], rule: Rule) -> None:
    if rule.format is not None and rule.format.narrow and len(shape) < 2:
        raise InvalidPolicy(
            f"{rule.where}{rule.key!r} (compute) asks {rule.format} of {path!r}, whose shape is {shape}. "
            "Use narrow compute dtypes only for kernels of two or more dimensions."
        )
