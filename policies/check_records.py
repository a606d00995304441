"""Records of checks on disk: one small file for each kind of kernel, device and set of versions.

A record that cannot be read or written is no error: the check is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile

import jax

_VERSIONS = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
"""Distributions that compile or run a kernel."""

_DRIVER = pathlib.Path("/sys/module/nvidia/version")
"""The version of NVIDIA's driver on Linux; absent in WSL, where the driver is not part of what identifies a device."""

_LARGEST = 100_000
"""Bytes of a record at most; a larger file is none."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a check.

    difference  how the kernel differs from its reference, as a clause; None: it agrees
    lasting     whether it holds for other processes as well
    """

    difference: str | None
    lasting: bool = True

    @property
    def refused(self) -> bool:
        """Whether the kernel differs from its reference."""
        return self.difference is not None


@functools.cache
def identity(device: jax.Device) -> str:
    """Returns a text that changes with all that may change a kernel's result: device, driver, versions and sources."""
    versions = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    fields = {
        "device": device.device_kind,
        "capability": getattr(device, "compute_capability", None),
        "platform": device.client.platform_version,
        "driver": driver(),
        "versions": versions,
        "sources": sources(),
    }
    return json.dumps(fields, sort_keys=True)


def driver() -> str | None:
    """Returns the version of NVIDIA's driver, or None where it is not known."""
    try:
        return _DRIVER.read_text().strip()
    except OSError:
        return None


@functools.cache
def sources() -> str:
    """Returns a hash of the sources of `policies/`, which has the kernels, their references and their trials."""
    folder = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def folder() -> pathlib.Path:
    """Returns the folder of the records: `perparam/kernel-checks` in $XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    caches = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path(os.path.expanduser("~/.cache"))
    return caches / "perparam" / "kernel-checks"


def read(identity: str, kernel: str, kind: str) -> Verdict | None:
    """Returns the recorded result of a check; None without a readable record."""
    try:
        with open(_path(identity, kernel, kind), "rb") as file:
            record = json.loads(file.read(_LARGEST))
        difference = record["difference"]
        if [record["identity"], record["kernel"], record["kind"]] != [identity, kernel, kind]:
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Verdict(difference) if difference is None or isinstance(difference, str) else None


def write(identity: str, kernel: str, kind: str, verdict: Verdict) -> bool:
    """Writes the result of a check, so that another process reads either all of it or nothing.

    Returns whether it was written.
    """
    path = _path(identity, kernel, kind)
    record = {"identity": identity, "kernel": kernel, "kind": kind, "difference": verdict.difference}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
        return True
    return False


def _path(identity: str, kernel: str, kind: str) -> pathlib.Path:
    name = hashlib.sha256("\0".join((identity, kernel, kind)).encode()).hexdigest()[:32]
    return folder() / f"{name}.json"
