"""Arrays on the host, also those with parts on devices of other processes (`jax.distributed`)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def spans_processes(array: Any) -> bool:
    """Returns whether an array has parts on devices of several processes; all of them give the same answer."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer) or jax.process_count() == 1:
        return False
    devices: Any = array.sharding.device_set
    return len({device.process_index for device in devices}) > 1


def on_host(array: Any) -> np.ndarray:
    """Returns the whole array, bit for bit, in NumPy.

    An array with parts on devices of other processes is gathered from them: all processes must call this, in the same
    order.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    dtype = array.dtype
    if dtype.kind not in "biu" and dtype.itemsize in _BITS:
        # As bits: on a CPU, XLA gathers narrow floats in a wider dtype, which need not keep the bits of a NaN.
        array = jax.lax.bitcast_convert_type(array, _BITS[dtype.itemsize])
    return np.asarray(multihost_utils.process_allgather(array, tiled=True)).view(dtype)
