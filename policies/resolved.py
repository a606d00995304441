"""Resolution: what a policy makes of every parameter of a tree, and which rule said so.

`resolve` is the one strict check: rules that decide nothing, scales without a kernel and grids that do not fit are
errors here and nowhere else.  Plans, storage, loading, saving and the wrappers read its result.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from . import dtypes
from .blocks import DEFAULT_BLOCK, Block, check_grid
from .errors import InvalidPolicy, InvalidScale, PerparamError, ShadowedRule, UnmatchedRule, UnpairedScale
from .formats import Format, stored_format
from .paths import is_scale, scale_path
from .patterns import Pattern
from .rules import PolicyRules, Rule, SlotRules
from .scales import F32
from .scope import ParamSpec
from .slots import SLOTS
from .trees import ArrayInfo, describe

Change = Literal["kept", "cast", "quantised", "dequantised", "requantised", "made", "dissolved"]

Decisions = Mapping[str, Rule | None]
"""The rule that decided, by slot; None where nothing did."""


@runtime_checkable
class ModelConfig(Protocol):
    """What a model's config says that its parameters do not."""

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype in which the model was meant to run."""

    def kv_bytes(self, dtype: np.dtype) -> int:
        """Bytes of cached keys and values for each token in `dtype`, scales included."""


@dataclasses.dataclass(frozen=True)
class ResolvedParam:
    """One parameter, with the scales that belong to it: what it is, what it becomes, and which rule said so.

    path         where it stands
    current      its shape, and its format before: complete for a scaled pair
    format       its format after storage: complete where it is narrow
    rules        the rules that decided, by slot
    scale_rules  likewise for its scales
    """

    path: str
    current: ArrayInfo
    format: Format
    rules: Decisions
    scale_rules: Decisions

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.current.shape

    @property
    def scale_path(self) -> str:
        """Where its scales stand."""
        return scale_path(self.path)

    @property
    def has_scales(self) -> bool:
        """Whether it is a scaled pair before storage."""
        return self.current.format.scale is not None

    @property
    def stored(self) -> dict[str, ArrayInfo]:
        """What is stored afterwards, by path: the parameter and its scales."""
        stored = {self.path: ArrayInfo(self.shape, self.format)}
        for shape, dtype in self.format.parts(self.shape)[1:]:
            stored[self.scale_path] = ArrayInfo(shape, Format(dtype))
        return stored

    @property
    def change(self) -> Change:
        """What storage does with the values."""
        return change(self.current.format, self.format, self.shape)

    @property
    def compute(self) -> Format | None:
        """What the compute slot says; None: narrow as stored, plain in the activations' dtype."""
        rule = self.rules.get("compute")
        return None if rule is None else rule.format


def change(current: Format, requested: Format, shape: tuple[int, ...]) -> Change:
    """What it takes to bring an array of `shape` from one complete format to another."""
    if current.scale is None:
        if requested.scale is not None:
            return "quantised"
        return "kept" if current.values == requested.values else "cast"
    if requested.scale is None:
        return "dequantised"
    # Wider scales hold every current one exactly, so that the values may stay; rounded ones need new values.
    exact = requested.scale in (current.scale, F32)
    same = dataclasses.replace(requested, scale=current.scale).represents_as(current, shape)
    return "kept" if same and exact else "requantised"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What a policy resolved to on one tree.

    policy       the policy
    params       every parameter by path, in the tree's order, scales with their kernel
    activations  the dtype of activations, None where neither the policy nor the model names one
    output       the dtype of what the model returns, likewise
    kv_cache     the dtype of cached keys and values; None for what has no cache
    kv_bytes     bytes of them for each token, scales included
    """

    policy: PolicyRules
    params: Mapping[str, ResolvedParam]
    activations: np.dtype | None = None
    output: np.dtype | None = None
    kv_cache: np.dtype | None = None
    kv_bytes: int = 0

    @property
    def stored(self) -> dict[str, ArrayInfo]:
        """What is stored afterwards, by path, scales after their kernel."""
        return {path: info for param in self.params.values() for path, info in param.stored.items()}

    @property
    def specs(self) -> dict[str, ParamSpec]:
        """What a module keeps of each parameter, by path."""
        return {path: ParamSpec(param.format, param.compute) for path, param in self.params.items()}

    @property
    def formats(self) -> dict[str, Format]:
        """The format of every parameter that is narrow after storage, by path."""
        return {path: param.format for path, param in self.params.items() if param.format.scale is not None}


def resolve(
    policy: PolicyRules, tree: Any, *, slots: Iterable[str] | None = None, config: ModelConfig | None = None
) -> Resolved:
    """What `policy` makes of every parameter of `tree`.

    tree    arrays, shapes or `ArrayInfo`s, in any container that `trees` knows
    slots   the slots that are read, by default all; "params" left out leaves storage as it is
    config  what the model says of itself; by default the tree's own `config`

    Raises:
      UnpairedScale, InvalidScale: narrow values without scales, scales without values, a grid that does not fit.
      UnmatchedRule, ShadowedRule: a rule that decides nothing.
      InvalidPolicy: a narrow dtype for a parameter of fewer than two dimensions; two dtypes for the same scales.
    """
    infos = describe(tree)
    wanted = [name for name in SLOTS if slots is None or name in slots]
    by_parameter = [name for name in wanted if SLOTS[name].by_parameter]
    storing = policy if "params" in wanted else PolicyRules({}, policy.block)
    raise_together(pair_problems(infos, policy))
    asked = {path: storing.params.format(path) for path, info in infos.items() if not is_scale(path)}
    made = [
        scale_path(path)
        for path, format in asked.items()
        if format is not None and format.narrow and dtypes.is_floating(infos[path].dtype)
    ]
    decided = {"params": decide("params", storing.params, [*infos, *(path for path in made if path not in infos)])}
    # What is narrow after storage is settled before the other slots: they are asked of what is there then.
    formats = {
        path: _before_and_after(
            policy, storing, path, infos[path], infos.get(scale_path(path)), decided["params"][path]
        )
        for path in asked
    }
    after = [*formats, *(scale_path(path) for path, (_, format) in formats.items() if format.scale is not None)]
    decided |= {name: decide(name, policy.slot(name), after) for name in by_parameter if name != "params"}
    params = {}
    for path, (current, format) in formats.items():
        # Rules that name integers and the like have no effect, and a plan says what happens.
        counts = format.scale is not None or current.format.scale is not None or dtypes.is_floating(current.dtype)
        rules = {name: rule[path] if counts else None for name, rule in decided.items()}
        scale_rules = {name: rule.get(scale_path(path)) for name, rule in decided.items()}
        params[path] = ResolvedParam(path, current, format, rules, scale_rules)
        if (compute := rules.get("compute")) is not None:
            _check_compute(path, current.shape, compute)
    own = getattr(tree, "config", None)  # of any module: only a config that answers is asked
    answers = isinstance(own, ModelConfig) and (own.dtype is None or isinstance(own.dtype, np.dtype))
    return _with_model(policy, params, config or (own if answers else None))


def _with_model(policy: PolicyRules, params: Mapping[str, ResolvedParam], config: ModelConfig | None) -> Resolved:
    activations = policy.activations or (None if config is None else config.dtype)
    kv_cache = policy.kv_cache or activations
    kv_bytes = 0 if config is None or kv_cache is None else config.kv_bytes(kv_cache)
    # A module that knows nothing of perparam returns what it returns; a model of ours its activations' dtype.
    output = policy.output or (None if config is None or config.dtype is None else activations)
    return Resolved(policy, params, activations, output, kv_cache if kv_bytes else None, kv_bytes)


def _before_and_after(
    policy: PolicyRules,
    storing: PolicyRules,
    path: str,
    info: ArrayInfo,
    scales: ArrayInfo | None,
    rule: Rule | None,
) -> tuple[ArrayInfo, Format]:
    """One parameter as it is, its format complete, and the format that `rule`, which is of `storing`, asks."""
    asked = None if rule is None or (not dtypes.is_floating(info.dtype) and scales is None) else rule.format
    if asked is not None and asked.narrow and len(info.shape) < 2:
        assert rule is not None
        raise too_flat(rule, path, info.shape)
    if scales is None:
        plain = Format(info.dtype)
        return ArrayInfo(info.shape, plain), plain if asked is None else asked.completed(
            storing.block, storing.scale(path)
        )
    scale, block = storing.scale(path) or scales.dtype, current_block(path, info, policy)
    known = info.format.scale is not None  # a ScaledArray says itself what it is
    current = info.format if known else stored_format(info.dtype, block, scales.dtype)
    if asked is None:  # as it is, but for a rule that names its scales
        requested = stored_format(info.dtype, block, scale)
    else:
        requested = asked.completed(storing.block or block, scale)
    if requested != asked and requested.represents_as(current, info.shape):  # what a rule leaves open stays as it is
        requested = current
    return ArrayInfo(info.shape, current), requested


def current_block(path: str, info: ArrayInfo, policy: PolicyRules) -> Block:
    """The block of the narrow parameter at `path`: its own; where the tree does not know it, the one that its rule or
    the policy names, or else (128, 128)."""
    named = policy.params.format(path)
    own = info.block or (named.block if named is not None else None) or policy.block
    return own or DEFAULT_BLOCK


def pair_problems(infos: Mapping[str, ArrayInfo], policy: PolicyRules) -> list[PerparamError]:
    """What is wrong with the scaled pairs of a tree: halves without the other, grids that do not fit."""
    problems: list[PerparamError] = []
    kernels = {scale_path(path): path for path in infos if not is_scale(path)}
    for path, info in infos.items():
        if is_scale(path):
            if path not in kernels:
                problems.append(
                    UnpairedScale(
                        f"{path}: scales {info.shape} without the kernel they belong to. Add it, or remove them."
                    )
                )
            elif not dtypes.is_narrow(infos[kernels[path]].dtype):
                kernel, dtype = kernels[path], dtypes.dtype_name(infos[kernels[path]].dtype)
                problems.append(
                    UnpairedScale(
                        f"{path}: scales {info.shape} beside {kernel!r}, which is {dtype} and needs none. "
                        "Remove the scales, or give the narrow kernel."
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
                    "so its magnitude is lost. Give the tree with both, or the kernel in f32 or bf16."
                )
            )
    return problems


def raise_together(problems: Iterable[PerparamError]) -> None:
    """Raises all of `problems` as one error of the first one's type."""
    problems = list(problems)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


def too_flat(rule: Rule, path: str, shape: tuple[int, ...]) -> InvalidPolicy:
    """The error for a rule that asks a narrow dtype of a parameter that has no two axes for blocks."""
    assert rule.format is not None
    return InvalidPolicy(
        f"{rule.where}{rule.key!r} (params) asks {rule.format} of {path!r}, whose shape is {shape}. "
        "Narrow dtypes are for parameters of two or more dimensions."
    )


def _check_compute(path: str, shape: tuple[int, ...], rule: Rule) -> None:
    if rule.format is not None and rule.format.narrow and len(shape) < 2:
        raise InvalidPolicy(
            f"{rule.where}{rule.key!r} (compute) asks {rule.format} of {path!r}, whose shape is {shape}. "
            "Only kernels of two or more dimensions are computed narrow."
        )


def decide(name: str, slot: SlotRules, paths: Iterable[str]) -> dict[str, Rule | None]:
    """The rule of the slot called `name` that decides for each of `paths`: the first that reaches it, or the default.

    Raises:
      UnmatchedRule: a rule reaches no path; `?` and `scale_inv: null` are forgiven.
      ShadowedRule: earlier rules take every path that a rule reaches.
    """
    paths = list(paths)
    takers: dict[Rule, set[str]] = {rule: set() for rule in slot.rules}  # the rules that are first on what it reaches
    deciding: set[Rule] = set()
    decisions: dict[str, Rule | None] = {}
    for path in paths:
        reaching = slot.reaching(path)
        for rule in reaching:
            takers[rule].add(reaching[0].key)
        if reaching:
            deciding.add(reaching[0])
            decisions[path] = reaching[0]
        else:
            decisions[path] = None if is_scale(path) else slot.default
    for rule in slot.rules:
        if rule in deciding:
            continue
        if takers[rule]:
            raise ShadowedRule(
                f"{rule.where}{rule.key!r} ({name}) decides nothing: every parameter it matches is taken before it by "
                f"{', '.join(map(repr, sorted(takers[rule])))}.\n"
                "  The first rule that matches wins. Write the narrower rule first, or remove this one."
            )
        if not (rule.optional or (rule.pattern == "scale_inv" and rule.format is None)):
            raise UnmatchedRule(
                f"{rule.where}{rule.key!r} ({name}) matches none of {len(paths)} parameters.\n"
                f"{_nearest(rule, paths)}"
                "  Correct the pattern, remove the rule, or end it with '?' if it may match nothing."
            )
    return decisions


def _nearest(rule: Rule, paths: list[str]) -> str:
    """The line that shows the nearest path."""
    pattern = Pattern.of(rule.pattern)
    if pattern.bare:
        names = {path.rpartition("/")[2]: path for path in reversed(paths)}
        near = [names[name] for name in difflib.get_close_matches(rule.pattern, names, n=1, cutoff=0.0)]
    else:
        near = difflib.get_close_matches(rule.pattern.replace("*", "0"), dict.fromkeys(paths), n=1, cutoff=0.0)
    unanchored = pattern.bare or pattern.alternatives[0][0] == "**"
    anchor = "" if unanchored else "  Patterns are anchored at the root; '**/…' reaches any depth.\n"
    return (f"  nearest: {near[0]}\n" if near else "") + anchor
