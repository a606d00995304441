"""Checks: compares each kernel once with its reference on the device of this process, before a program uses it.

A kernel that no device has run is not trusted.  The result of a check is kept in memory and on disk; a kernel that
fails is refused, with one warning, and the caller uses something else.

A check runs in a thread of its own, so that neither the trace in which the kernel is chosen nor its mesh, device and
other contexts apply to it.  The thread chooses no kernel itself, so that it never waits for the lock of the checks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from . import check_records
from .check_records import Verdict
from .targets import Target, local_device

VARIABLE = "PERPARAM_CHECK_KERNELS"
"""The environment variable that disables all checks if its value is 0."""

LIMIT = 120.0
"""Seconds after which a check has failed: a kernel whose barriers never complete does not return.  Compiling the
kernels of a check takes seconds."""

FAULTS = ("ILLEGAL_ADDRESS", "MISALIGNED_ADDRESS", "ILLEGAL_INSTRUCTION", "INVALID_PC", "LAUNCH_FAILED")
"""Faults of a kernel, which end the process's use of a GPU.  Other exceptions say little about the kernel, such as too
little memory: another process compares it again."""

State = Literal["checked", "unchecked", "refused"]


@dataclasses.dataclass(frozen=True)
class Check:
    """What is known about a kernel on the device of a program.

    kernel  name of the kernel
    state   "checked": it agrees with its reference on this device; "refused": it does not, and is not used;
            "unchecked": it was not compared, and is used
    why     the reason, as a clause
    """

    kernel: str
    state: State
    why: str


def clauses(checks: Iterable[Check]) -> list[str]:
    """Returns checks as clauses, one for each state and reason.

    >>> clauses([Check("a", "unchecked", "no device"), Check("b", "unchecked", "no device")])
    ['a and b unchecked: no device']
    """
    kernels: dict[tuple[str, str], list[str]] = {}
    for check in dict.fromkeys(checks):
        kernels.setdefault((check.state, check.why), []).append(check.kernel)
    return [f"{' and '.join(names)} {state}: {why}" for (state, why), names in kernels.items()]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A comparison of one kind of kernel with its reference, on small operands.

    kernel   name of the kernel
    kind     what else distinguishes kinds of the kernel, such as dtypes; equal kinds are compared once
    compare  runs both on JAX's default device and returns the difference as a clause; None: they agree
    """

    kernel: str
    kind: str
    compare: Callable[[], str | None] = dataclasses.field(compare=False)


# A user context is part of JAX's cache keys: a function that was traced outside the context is traced again inside it.
_enabled = jax.make_user_context(None)
_lock = threading.Lock()
_verdicts: dict[tuple[str, str, str], Verdict] = {}
_warned: set[tuple[str, str, str]] = set()


@contextlib.contextmanager
def checking(enabled: bool | None) -> Iterator[None]:
    """A context in which kernels are checked before their first use, or not; None changes nothing."""
    with _enabled(_enabled.value if enabled is None else enabled):
        yield


def check(trial: Trial, target: Target, *, run: bool = True) -> Check:
    """Returns what is known about the kernel of a trial on `target`, after comparing it with its reference if needed.

    target  the target of the program; without a device of it in this process there is nothing to run
    run     False: only returns the result of an earlier check

    Warns:
      RuntimeWarning: once for a kind that is refused.
    """
    if not _is_enabled():
        return Check(trial.kernel, "unchecked", "checks of kernels are disabled")
    device = local_device(target)
    if device is None:
        return Check(trial.kernel, "unchecked", f"this process has no device {target} to compare it on")
    identity = check_records.identity(device)
    key = identity, trial.kernel, trial.kind
    with _lock:
        verdict = _verdicts.get(key) or check_records.read(*key)
        if verdict is None and not run:
            return Check(trial.kernel, "unchecked", "its first call on this device compares it with the reference")
        if verdict is None:
            verdict = _compared(trial, device)
            if verdict.lasting and not check_records.write(*key, verdict):
                verdict = dataclasses.replace(verdict, lasting=False)
        _verdicts[key] = verdict
        is_news = verdict.refused and run and key not in _warned
        if is_news:
            _warned.add(key)
    if is_news:
        warnings.warn(_warning(trial, device, verdict), RuntimeWarning, stacklevel=2)
    if verdict.refused:
        return Check(trial.kernel, "refused", f"on this device {verdict.difference}")
    return Check(trial.kernel, "checked", "it agrees with the reference on this device")


def _is_enabled() -> bool:
    return os.environ.get(VARIABLE, "1") != "0" if _enabled.value is None else bool(_enabled.value)


def _compared(trial: Trial, device: jax.Device) -> Verdict:
    """Returns the result of running a trial on a device."""
    verdicts: list[Verdict] = []

    def compare() -> None:
        ready = False
        try:
            with jax.default_device(device), jax.disable_jit(False), jax.transfer_guard("allow"):
                jnp.zeros(1).block_until_ready()  # after an earlier fault of another program this raises
                ready = True
                verdicts.append(Verdict(trial.compare()))
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            lasting = ready and any(fault in text for fault in FAULTS)
            verdicts.append(Verdict(f"it raised {type(error).__name__}: {text}", lasting))

    thread = threading.Thread(target=compare, name="perparam-check", daemon=True)
    thread.start()
    thread.join(LIMIT)
    if verdicts:
        return verdicts[0]
    return Verdict(f"it did not finish in {LIMIT:.0f} s, and may still occupy the device: restart the process", False)


def _warning(trial: Trial, device: jax.Device, verdict: Verdict) -> str:
    kept = (
        f"Please report this. The result is kept in {check_records.folder()}, and later processes read it; remove the "
        "folder to check again. "
    )
    return (
        f"the kernel {trial.kernel!r} ({trial.kind}) is not used: on this {device.device_kind} {verdict.difference}. "
        f"Another implementation replaces it; matmul_plan says which. {kept if verdict.lasting else ''}"
        f"matmul_override(check=False), or {VARIABLE}=0 in the environment, uses kernels without a check."
    )
