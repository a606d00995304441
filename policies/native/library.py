"""Loads the native library on first use, checks that jaxlib supports it, and registers its handlers with XLA."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import pathlib
import re
import threading

import jax

HANDLERS = ("perparam_matmul", "perparam_grouped_matmul", "perparam_attention", "perparam_put")
"""Names of the FFI targets, and of their handlers in the library."""

FILE = "libperparam.cpu.so"

_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _Library:
    """The instruction set that the library uses, or the reason why it cannot be used."""

    instructions: str = ""
    reason: str | None = None


def unavailable() -> str | None:
    """The reason why the native kernels cannot be used in this process; None: their FFI targets are registered.

    The first call loads the library and reads `PERPARAM_CPU` (`off`, or the name of an instruction set); later ones
    repeat its answer.
    """
    return _loaded().reason


def instructions() -> str:
    """The instruction set of the native kernels, such as `avx512bf16`; empty if they cannot be used."""
    return _loaded().instructions


def _loaded() -> _Library:
    with _lock:  # threads may trace at the same time
        return _load()


@functools.cache
def _load() -> _Library:
    if os.environ.get("PERPARAM_CPU") == "off":
        return _Library(reason="PERPARAM_CPU=off in the environment")
    path = _path()
    if path is None:
        return _Library(reason="they were not compiled when perparam was installed, which needs a C++17 compiler")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return _Library(reason=f"the library does not load: {error}")
    compiled = library.perparam_ffi_api_major(), library.perparam_ffi_api_minor()
    supported = _supported()
    # XLA would accept the registration of a newer handler, and then fail to initialise the CPU.
    if supported is None or compiled[0] != supported[0] or compiled[1] > supported[1]:
        has = "no version that could be read" if supported is None else "version {}.{}".format(*supported)
        return _Library(
            reason="they were compiled for version {}.{} of XLA's FFI, and this jaxlib has {}".format(*compiled, has)
        )
    library.perparam_instructions.restype = ctypes.c_char_p
    name = library.perparam_instructions()
    if name is None:
        return _Library(reason=f"this processor or build does not have PERPARAM_CPU={os.environ.get('PERPARAM_CPU')}")
    try:
        for handler in HANDLERS:
            jax.ffi.register_ffi_target(handler, jax.ffi.pycapsule(getattr(library, handler)), platform="cpu")
    except Exception as error:  # of many kinds: jaxlib's and ctypes'; slabs serve
        return _Library(reason=f"they cannot be registered: {error}")
    return _Library(instructions=name.decode())


def _path() -> pathlib.Path | None:
    """The library: `PERPARAM_LIBRARY` (for tests), or beside this file, or in the tree to which an install links."""
    if named := os.environ.get("PERPARAM_LIBRARY"):
        return pathlib.Path(named)
    here = pathlib.Path(__file__)
    return next((path for path in (here.resolve().with_name(FILE), here.with_name(FILE)) if path.is_file()), None)


def _supported() -> tuple[int, int] | None:
    """The FFI version of the running jaxlib, from its headers; None if they do not state it."""
    try:
        text = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    except OSError:
        return None
    found = {part: int(number) for part, number in re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text)}
    return (found["MAJOR"], found["MINOR"]) if len(found) == 2 else None
