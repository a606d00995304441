"""Storage: from what was found to what the policy asks, kernel by kernel, with the scales that belong to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from . import dtypes
from .blocks import check_grid, dequantize, quantize
from .errors import InvalidPolicy, InvalidScale, PerparamError, UnpairedScale
from .policy import Policy
from .resolution import Answer, resolve
from .slots import DEFAULT_BLOCK, Block, is_scale, scale_path
from .trees import Found, found, parameters, replace_parameters

Change = Literal["kept", "cast", "quantised", "dequantised", "requantised", "made", "dissolved"]


@dataclasses.dataclass(frozen=True)
class Step:
    """What storage does with one parameter and its scales.

    change        what happens to the kernel (or plain parameter)
    storage       its dtype afterwards
    scale         dtype of its scales afterwards; None: it has none
    block         block of its scales afterwards
    found_scale   dtype of its scales before; None: it had none
    found_block   block of its scales before
    """

    change: Change
    storage: np.dtype
    scale: np.dtype | None = None
    block: Block | None = None
    found_scale: np.dtype | None = None
    found_block: Block | None = None

    def run(self, path: str, kernel: Any, scale_inv: Any = None) -> tuple[Any, Any]:
        """`(kernel, scale_inv)` as stored afterwards, scale_inv None where there is none; what is kept is not copied.

        Raises:
          InvalidScale: scales that are not positive finite numbers, or weights that would make such.
        """
        if scale_inv is not None:
            check_scales(scale_path(path), scale_inv)
        kernel, scale_inv = self.convert(kernel, scale_inv)
        if self.makes_scales:
            check_made(path, scale_inv)
        return kernel, scale_inv

    @property
    def makes_scales(self) -> bool:
        """Whether scales come out that were not there before."""
        return self.change in ("quantised", "requantised")

    def convert(self, kernel: Any, scale_inv: Any = None) -> tuple[Any, Any]:
        """`run` without a look at any value: for whole blocks of rows of a parameter it is what it is for all of it."""
        if self.change == "kept":
            if self.scale is None or self.scale == self.found_scale:
                return kernel, scale_inv
            return kernel, dtypes.saturating_cast(scale_inv, self.scale)
        if self.found_block is not None:
            kernel = dequantize(kernel, scale_inv, self.found_block)
        if self.scale is None or self.block is None:
            return dtypes.saturating_cast(kernel, self.storage), None
        return quantize(kernel, self.storage, self.block, scale_dtype=self.scale)


def check_scales(path: str, scale_inv: Any, problem: str = "scales are positive finite numbers") -> None:
    """Raises InvalidScale unless every scale is positive and finite; traced values pass unseen."""
    if isinstance(scale_inv, jax.core.Tracer):
        return
    values = np.asarray(scale_inv).astype(np.float32)
    wrong = ~((values > 0) & np.isfinite(values))
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise InvalidScale(
            f"{path}: {problem}; found {values[index]} at block {index}, and {int(wrong.sum())} such of {wrong.size}. "
            "The weights are damaged: fetch or make them again."
        )


def check_made(path: str, scale_inv: Any) -> None:
    """Raises InvalidScale where the scales made for the parameter at `path` are none: its weights are not finite."""
    check_scales(path, scale_inv, "the weights of a block hold NaN or infinity, so they have no scale")


def pair_problems(found: Mapping[str, Found], policy: Policy) -> list[PerparamError]:
    """What is wrong with the scaled pairs of a tree: halves that lack the other, grids that do not fit."""
    problems: list[PerparamError] = []
    kernels = {scale_path(path): path for path in found if not is_scale(path)}
    for path, one in found.items():
        if is_scale(path):
            if path not in kernels:
                problems.append(
                    UnpairedScale(
                        f"{path}: scales {one.shape} without the kernel they belong to. Add it, or remove them."
                    )
                )
            elif not dtypes.is_narrow(found[kernels[path]].dtype):
                kernel, dtype = kernels[path], dtypes.dtype_name(found[kernels[path]].dtype)
                problems.append(
                    UnpairedScale(
                        f"{path}: scales {one.shape} beside {kernel!r}, which is {dtype} and needs none. "
                        "Remove the scales, or give the narrow kernel."
                    )
                )
        elif dtypes.is_narrow(one.dtype) and scale_path(path) in found:
            try:
                check_grid(one.shape, found[scale_path(path)].shape, found_block(one, policy), scale_path(path))
            except InvalidScale as error:
                problems.append(error)
        elif dtypes.is_narrow(one.dtype) and dtypes.is_floating(one.dtype):
            problems.append(
                UnpairedScale(
                    f"{path}: {dtypes.dtype_name(one.dtype)} {one.shape} without its scales {scale_path(path)!r}, "
                    "so its magnitude is lost. Give the tree with both, or the kernel in f32 or bf16."
                )
            )
    return problems


def raise_together(problems: Iterable[PerparamError]) -> None:
    """Raises what is in `problems`, in one error of the first one's type."""
    problems = list(problems)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))


def found_block(one: Found, policy: Policy) -> Block:
    """The block of a narrow kernel that was found: its own, or the policy's where the tree does not hold it."""
    return one.block or policy.block or DEFAULT_BLOCK


def plan_storage(policy: Policy, found: Mapping[str, Found]) -> tuple[dict[str, Step], dict[str, Answer]]:
    """The step of every parameter that is not a scale, and the answers of the `params` slot for all paths.

    Raises:
      UnpairedScale, InvalidScale: see `pair_problems`.
      UnmatchedRule, ShadowedRule: see `resolve`.
      InvalidPolicy: a narrow dtype for a parameter of fewer than two dimensions.
    """
    raise_together(pair_problems(found, policy))
    made = [scale_path(path) for path, one in found.items() if _becomes_narrow(policy, path, one)]
    answers = resolve("params", policy.params, [*found, *(path for path in made if path not in found)])
    steps = {}
    for path, one in found.items():
        if not is_scale(path):
            scales = scale_path(path)
            steps[path] = _step(policy, path, one, found.get(scales), answers[path], answers.get(scales, Answer()))
    return steps, answers


def _becomes_narrow(policy: Policy, path: str, one: Found) -> bool:
    asked = policy.params.dtype(path)
    return asked is not None and dtypes.is_narrow(asked) and dtypes.is_floating(one.dtype) and not is_scale(path)


def _step(policy: Policy, path: str, one: Found, scales: Found | None, answer: Answer, scale_answer: Answer) -> Step:
    asked = answer.dtype
    if asked is not None and dtypes.is_narrow(asked) and len(one.shape) < 2 and dtypes.is_floating(one.dtype):
        raise too_flat(answer.source, answer.rule, asked, path, one.shape)
    if scales is None:
        if asked is None or asked == one.dtype or not dtypes.is_floating(one.dtype):
            return Step("kept", one.dtype)
        if dtypes.is_narrow(asked):
            return Step("quantised", asked, scale_answer.dtype or np.dtype(np.float32), policy.block or DEFAULT_BLOCK)
        return Step("cast", asked)
    own = found_block(one, policy)
    if asked is not None and not dtypes.is_narrow(asked):
        return Step("dequantised", asked, found_scale=scales.dtype, found_block=own)
    storage, scale = asked or one.dtype, scale_answer.dtype or scales.dtype
    block = own if asked is None else policy.block or own
    # A wider scale holds every found one exactly, so the kernel may stay; a rounded one needs its kernel made anew.
    exact = scale in (scales.dtype, np.dtype(np.float32))
    change: Change = "kept" if storage == one.dtype and block == own and exact else "requantised"
    return Step(change, storage, scale, block, scales.dtype, own)


def too_flat(source: str | None, key: str | None, dtype: np.dtype, path: str, shape: tuple[int, ...]) -> InvalidPolicy:
    """The error for a rule that asks a narrow dtype of a parameter that has no two axes for blocks."""
    where = f"{source}: " if source else ""
    return InvalidPolicy(
        f"{where}{key!r} (params) asks {dtypes.dtype_name(dtype)} of {path!r}, whose shape is {shape}. "
        "Narrow dtypes are for parameters of two or more dimensions."
    )


def store(policy: Policy, tree: Any) -> Any:
    """See `Policy.store`."""
    flat = parameters(tree)
    steps, _ = plan_storage(policy, found(tree))
    return replace_parameters(
        tree, run_steps(steps, flat), {path: step.block for path, step in steps.items() if step.block}
    )


def run_steps(steps: Mapping[str, Step], flat: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of `flat` as stored after `steps`, scales beside their kernels."""
    result: dict[str, Any] = {}
    for path, step in steps.items():
        kernel, scale_inv = step.run(path, flat[path], flat.get(scale_path(path)))
        result[path] = kernel
        if scale_inv is not None:
            result[scale_path(path)] = scale_inv
    return result
