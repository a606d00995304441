"""Which implementation takes a call: decided when it is traced, by platform, capability, shape, block and dtypes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jax.typing import DTypeLike

from .. import dtypes
from ..errors import UnknownImplementation, UnknownTarget, UnsupportedCast
from ..slots import DEFAULT_BLOCK, Block, as_block
from . import cpu, hopper, xla
from .calls import Call, Implementation
from .oracle import ORACLE

HOPPER = (9, 0)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is compiled for.

    platform    "cpu", "cuda", "rocm" or "tpu"
    capability  CUDA's compute capability, (9, 0) for H100 and H200; None: not known
    """

    platform: str
    capability: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """The target that `cpu`, `tpu`, `cuda` or `cuda:9.0` names; `here` is what this process computes on.

        >>> Target.parse("cuda:9.0")
        Target(platform='cuda', capability=(9, 0))
        """
        if isinstance(text, Target):
            return text
        if text == "here":
            return here()
        platform, _, capability = text.partition(":")
        if platform not in ("cpu", "cuda", "rocm", "tpu"):
            raise UnknownTarget(f"{text!r} is no target. Write here, cpu, tpu, rocm, cuda, or cuda:9.0 (H100, H200).")
        try:
            return cls(platform, _capability(capability) if capability else None)
        except ValueError:
            raise UnknownTarget(f"{text!r} is no target: a compute capability is written 9.0.") from None

    def __str__(self) -> str:
        return self.platform + (":{}.{}".format(*self.capability) if self.capability else "")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation of a call, and why it was chosen.

    implementation  its name
    gist            how it does it
    refused         names of those that come before it, and why they do not take the call
    """

    implementation: str
    gist: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        passed_over = "".join(f"; not {name}: {why}" for name, why in self.refused)
        return f"{self.implementation} ({self.gist}{passed_over})"


_CPU = (cpu.SLABS, cpu.TWO_ROWS, xla.DOT)
_ANY = (xla.DOT, xla.REDUCTION, xla.BY_BLOCK, xla.WIDENED)
_HOPPER = (xla.DOT, hopper.ROWS, hopper.COLUMNS, *_ANY[1:])
IMPLEMENTATIONS = {one.name: one for one in (*_CPU, *_HOPPER, ORACLE)}


@dataclasses.dataclass(frozen=True)
class _Override:
    implementation: str | None = None
    target: Target | None = None


# Part of the keys under which jax caches traces: a function traced outside the context is traced again within.
_override = jax.make_user_context(_Override())


@contextlib.contextmanager
def matmul_override(implementation: str | None = None, target: str | Target | None = None) -> Iterator[None]:
    """A context in which all matmuls take `implementation`, or are traced as for `target`: for tests, benchmarks, and
    compiling for another machine.

    implementation  a key of `IMPLEMENTATIONS`, such as "oracle"
    target          "cpu", "cuda:9.0", …, see `Target.parse`

    >>> with matmul_override(target="cuda:9.0"):
    ...     matmul_plan(1, (4096, 4096), block=(128, 128)).implementation
    'hopper columns'

    Raises:
      UnknownImplementation: for one that nobody has heard of.
      UnknownTarget: likewise.
      UnsupportedCast: at the call, where the implementation cannot take it.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise UnknownImplementation(f"no implementation {implementation!r}, there are: {', '.join(IMPLEMENTATIONS)}.")
    before = _override.value
    chosen = _Override(
        implementation or before.implementation, before.target if target is None else Target.parse(target)
    )
    with _override(chosen):
        yield


def here() -> Target:
    """What programs are compiled for: the target of `matmul_override`, the mesh in use, or JAX's default device."""
    if _override.value.target is not None:
        return _override.value.target
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None and "NVIDIA" in device.device_kind:
        known = ("H100", "H200", "H800", "H20", "GH200")
        return Target("cuda", HOPPER if any(name in device.device_kind for name in known) else None)
    platform = jax.default_backend()
    if platform != "gpu":
        return Target(platform)
    device = jax.local_devices()[0]
    if "rocm" in device.client.platform_version.lower():
        return Target("rocm")
    return Target("cuda", _capability(device.compute_capability))


def choose(call: Call, target: Target) -> tuple[Implementation, Choice]:
    """The first implementation for `target` that takes the call, and what to say about it."""
    if (forced := _override.value.implementation) is not None:
        one = IMPLEMENTATIONS[forced]
        if why := one.refuses(call):
            raise UnsupportedCast(f"{forced!r}, which matmul_override asks for, does not take this call: {why}.")
        return one, Choice(one.name, one.gist)
    refused: list[tuple[str, str]] = []
    for one in candidates(target):
        why = one.refuses(call)
        if why is None:
            return one, Choice(one.name, one.gist, tuple(refused))
        refused.append((one.name, why))
    raise AssertionError(f"nothing takes {call}")


def candidates(target: Target) -> tuple[Implementation, ...]:
    """The implementations for `target`, the preferred ones first."""
    if target.platform == "cpu":
        return _CPU
    return _HOPPER if target.platform == "cuda" and target.capability == HOPPER else _ANY


def describe(
    rows: int | None,
    kernel_shape: tuple[int, ...],
    x: np.dtype,
    kernel: np.dtype,
    block: Block | None,
    compute: np.dtype | None,
) -> Call:
    """The call that `scaled_matmul` makes of operands of these shapes and dtypes."""
    out_features, in_features = kernel_shape
    both_narrow = compute is not None and dtypes.is_narrow(compute)
    narrow = dtypes.is_narrow(kernel)
    if both_narrow and not narrow:
        kernel, narrow = np.dtype(compute), True
    weight = None if both_narrow or (narrow and compute is None) else compute or x
    values = np.dtype(compute if both_narrow else weight or x)
    return Call(rows, out_features, in_features, values, kernel, block if narrow else None, weight, x)


def matmul_plan(
    rows: int,
    kernel_shape: tuple[int, int],
    *,
    x: DTypeLike = "bf16",
    kernel: DTypeLike = "f8_e4m3fn",
    block: Block = DEFAULT_BLOCK,
    compute: DTypeLike | None = None,
    target: str | Target = "here",
) -> Choice:
    """Which implementation `scaled_matmul` takes for operands of these shapes and dtypes, and why.

    rows          all leading axes of x together
    kernel_shape  (out, in)
    target        "here", "cpu", "cuda", "cuda:9.0", …

    >>> matmul_plan(512, (4096, 4096), target="cuda:9.0", compute="f8_e4m3fn").implementation
    'hopper rows'
    >>> matmul_plan(1, (4096, 4096), target="cuda:8.0").implementation
    'fused reduction'
    """
    call = describe(
        rows, kernel_shape, dtypes.as_dtype(x), dtypes.as_dtype(kernel), as_block(block),
        None if compute is None else dtypes.as_dtype(compute),
    )  # fmt: skip
    return choose(call, Target.parse(target))[1]


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)
