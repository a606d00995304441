"""Targets: the platform and compute capability for which a program is compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax

from .errors import UnknownTarget

HOPPER = (9, 0)
"""The compute capability of H100, H200 and H20."""

CAPABILITIES = {
    **dict.fromkeys(("H100", "H200", "H800", "H20"), HOPPER),
    "B200": (10, 0),
    "B300": (10, 3),
}
"""Compute capabilities of GPUs by a part of their names, for meshes, which have names only; GH200 contains H200."""

MULTIPROCESSORS = 132
"""Streaming multiprocessors of an H200 and an H100 SXM: for programs that are compiled for a GPU that is not known."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The platform and compute capability for which a program is compiled.

    platform    "cpu", "cuda", "rocm" or "tpu"
    capability  compute capability of an NVIDIA GPU, (9, 0) for H100 and H200; None: unknown
    """

    platform: str
    capability: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """Returns the target for `cpu`, `tpu`, `rocm`, `cuda`, `cuda:9.0` or `here`, the device of this process.

        >>> Target.parse("cuda:9.0")
        Target(platform='cuda', capability=(9, 0))

        Raises:
          UnknownTarget: for any other text.
        """
        if isinstance(text, Target):
            return text
        if text == "here":
            return here()
        platform, _, capability = text.partition(":")
        if platform not in ("cpu", "cuda", "rocm", "tpu"):
            raise UnknownTarget(
                f"{text!r} is not a target. Write here, cpu, tpu, rocm, cuda, or cuda:9.0 (H100, H200)."
            )
        try:
            return cls(platform, _capability(capability) if capability else None)
        except ValueError:
            raise UnknownTarget(f"{text!r} is not a target. Write the compute capability as in cuda:9.0.") from None

    def __str__(self) -> str:
        return self.platform + (":{}.{}".format(*self.capability) if self.capability else "")


# A user context is part of JAX's cache keys: a function that was traced outside the context is traced again inside it.
_override = jax.make_user_context(None)


@contextlib.contextmanager
def targeting(target: str | Target | None) -> Iterator[None]:
    """A context in which programs are traced for `target`; None changes nothing."""
    with _override(_override.value if target is None else Target.parse(target)):
        yield


def here() -> Target:
    """Returns the current target: that of `targeting`, else of the current mesh, else of JAX's default device."""
    if isinstance(_override.value, Target):
        return _override.value
    device = _mesh_device()
    if device is not None:
        local = _local()
        if local.platform == "cuda" and device.device_kind == jax.local_devices()[0].device_kind:
            return local
        known = (capability for name, capability in CAPABILITIES.items() if name in device.device_kind)
        return Target("cuda", next(known, None))
    return _local()


def multiprocessors() -> int:
    """Returns the number of streaming multiprocessors of the GPU for which a program is compiled.

    114 for an H100 PCIe and 78 for an H20; `MULTIPROCESSORS` where it is not known, because the program is compiled for
    a target that is not the device of this process.
    """
    device = _mesh_device()
    if device is not None:
        return device.num_cores or MULTIPROCESSORS
    if jax.default_backend() != "gpu" or here() != _local():
        return MULTIPROCESSORS
    return getattr(jax.local_devices()[0], "core_count", None) or MULTIPROCESSORS


def _mesh_device() -> Any:
    """Returns a description of the NVIDIA GPUs of the current mesh, its `device_kind` and `num_cores`, or None."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device if device is not None and "NVIDIA" in device.device_kind else None


def _local() -> Target:
    """Returns the target of JAX's default device."""
    platform = jax.default_backend()
    if platform != "gpu":
        return Target(platform)
    device = jax.local_devices()[0]
    if "rocm" in device.client.platform_version.lower():
        return Target("rocm")
    return Target("cuda", _capability(device.compute_capability))


def local_device(target: Target) -> jax.Device | None:
    """Returns a device of this process that is the target; None when compiling for another machine.

    Only NVIDIA GPUs of a known compute capability are looked for.
    """
    if target.platform != "cuda" or target.capability is None:
        return None
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return next((device for device in devices if _capability(device.compute_capability) == target.capability), None)


def host_device() -> jax.Device | None:
    """JAX's CPU device; None if JAX_PLATFORMS excludes it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def peak_memory() -> tuple[int, str]:
    """Bytes in use at the peak so far, and where: on the "device" if it reports them, else resident on the "host"."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if peak := statistics.get("peak_bytes_in_use"):
        return peak, "device"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "host"


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)
