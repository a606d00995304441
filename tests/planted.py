"""Stand-ins for the Hopper kernels in jnp, right ones and wrong ones, and a process that seems to have a device."""

import collections
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perparam.policies import check_records, checks
from perparam.policies.blocks import expand
from perparam.policies.matmul import (
    Target,
    face,
    grouped_trials,
    hopper_columns,
    hopper_grouped_kernel,
    hopper_quantize,
    hopper_rows,
    trials,
)

HOPPER = Target("cuda", (9, 0))


@contextlib.contextmanager
def device(folder, columns=None, rows=None, quantize=None, grouped=None, identity="a device"):
    """A new process with a Hopper device, which has these kernels; yields how often each kind was compared.

    The device is the CPU, the trials are small, and records of checks are in `folder`.
    """
    compared = collections.Counter()
    real = checks._compared

    def counted(trial, device):
        compared[trial.kernel, trial.kind] += 1
        return real(trial, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv(checks.VARIABLE, raising=False)
        patch.setattr(checks, "local_device", lambda target: jax.devices()[0] if target == HOPPER else None)
        patch.setattr(check_records, "identity", lambda device: identity)
        patch.setattr(checks, "_verdicts", {})
        patch.setattr(checks, "_warned", set())
        patch.setattr(checks, "_compared", counted)
        patch.setattr(trials, "LAUNCHES", (((256, 384),), ((256, 384), (128, 384))))
        patch.setattr(trials, "MANY_ROWS", 140)
        patch.setattr(grouped_trials, "LAUNCHES", grouped_trials.LAUNCHES[:1])
        patch.setattr(hopper_columns, "products", columns or products)
        patch.setattr(hopper_rows, "product", rows or product)
        patch.setattr(hopper_quantize, "quantize", quantize or quantized)
        patch.setattr(hopper_grouped_kernel, "products", grouped or globals()["grouped"])
        try:
            yield compared
        finally:
            face._matmuls.clear_cache()


def products(x, x_scales, kernels, scales, *, blocks, result, processors):
    """What `hopper_columns.products` returns."""
    wide = x.astype(jnp.float32)
    if x_scales is not None:
        wide = wide * jnp.repeat(x_scales[:, : x.shape[0]].T, 128, axis=1)
    weights = [k.astype(jnp.float32) * expand(s, k.shape, b) for k, s, b in zip(kernels, scales, blocks, strict=True)]
    return tuple(jnp.matmul(wide, weight.T, precision="highest").astype(result) for weight in weights)


def product(x, x_scales, kernel, scale_inv, *, block, result, processors):
    """What `hopper_rows.product` returns."""
    return products(x, x_scales, (kernel,), (scale_inv,), blocks=(block,), result=result, processors=processors)[0]


def grouped(x, x_scales, tiles, kernels, scales, *, blocks, result, processors):
    """What `hopper_grouped_kernel.products` returns, with zeros for what is undefined."""
    parts = []
    for tile, group in enumerate(tiles.groups):
        rows = jax.lax.dynamic_slice_in_dim(x, tiles.starts[tile] * 8, tiles.height)
        rows_scales = None
        if x_scales is not None:
            rows_scales = jax.lax.dynamic_slice_in_dim(x_scales, tiles.starts[tile] * 8, tiles.height, axis=1)
        of_group = ([one[group] for one in stacks] for stacks in (kernels, scales))
        y = products(rows, rows_scales, *of_group, blocks=blocks, result=result, processors=processors)
        parts.append(jnp.where(tile < tiles.until[-1], jnp.concatenate(y, axis=1), 0))
    return jnp.stack(parts)


def quantized(x):
    """What `hopper_quantize.quantize` returns."""
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, 128)
    amax = jnp.abs(blocks).max(axis=2)
    scales = jnp.where(amax == 0, jnp.float32(1), amax / jnp.float32(448))
    values = jnp.clip(blocks / scales[:, :, None], -448, 448).astype(jnp.float8_e4m3fn)
    return values.reshape(x.shape), scales.T


def _operands(change):
    """A wrong `products`, which computes with other operands."""
    return lambda x, x_scales, kernels, scales, **settings: products(*change(x, x_scales, kernels, scales), **settings)


def _results(change):
    """A wrong `products`, which returns other results."""
    return lambda *operands, **settings: tuple(map(change, products(*operands, **settings)))


def _ones(arrays):
    return tuple(map(jnp.ones_like, arrays))


def _transposed(kernel):
    return kernel.at[:128, :128].set(kernel[:128, :128].T)


def _flushed(kernel):
    codes = jax.lax.bitcast_convert_type(kernel, jnp.uint8)
    return jnp.where(codes & 0x7F < 8, jnp.zeros_like(kernel), kernel)


def _raise(*_, **__):
    raise NotImplementedError("ptxas exited with code 255")


def _wrong_together(x, x_scales, kernels, scales, **settings):
    if len(kernels) > 1:
        kernels = (kernels[0], kernels[1][::-1])
    return products(x, x_scales, kernels, scales, **settings)


WRONG = {
    "the scales of the kernel dropped": _operands(lambda x, xs, kernels, scales: (x, xs, kernels, _ones(scales))),
    "the scales of the kernel transposed": _operands(
        lambda x, xs, kernels, scales: (x, xs, kernels, tuple(s.ravel()[::-1].reshape(s.shape) for s in scales))
    ),
    "a tile transposed": _operands(
        lambda x, xs, kernels, scales: (x, xs, (_transposed(kernels[0]), *kernels[1:]), scales)
    ),
    "subnormal numbers flushed": _operands(lambda x, xs, kernels, s: (x, xs, tuple(map(_flushed, kernels)), s)),
    "a step left out": _operands(lambda x, xs, kernels, scales: (x.at[:, -128:].set(0), xs, kernels, scales)),
    "NaN": _results(lambda y: y.at[1, 3].set(jnp.nan)),
    "one wrong element": _results(lambda y: y.at[2, 5].multiply(1.05)),
    "the last row lost": _results(lambda y: y.at[4 if y.shape[0] == 8 else -1].set(0)),
    "infinity": _results(lambda y: y.at[0, 0].set(-jnp.inf)),
    "two rows exchanged": _results(lambda y: y.at[:2].set(y[1::-1])),
    "another shape": _results(lambda y: y[:, :-1]),
    "rounded twice": _results(lambda y: y.astype(jnp.float8_e5m2).astype(y.dtype)),
    "wrong in a shared launch": _wrong_together,
    "an exception": _raise,
}
"""Wrong kernels with swapped operands."""

WRONG_QUANTISATION = {
    "scales of other rows": lambda x: (quantized(x)[0], quantized(x)[1][:, ::-1]),
    "scales 2**-12 too large": lambda x: (quantized(x)[0], quantized(x)[1] * (1 + 2.0**-12)),
    "values truncated": lambda x: (_truncated(x), quantized(x)[1]),
    "zeros with the scale 0": lambda x: (quantized(x)[0], jnp.where(quantized(x)[1] == 1, 0, quantized(x)[1])),
    "NaN for zeros": lambda x: (quantized(x)[0], jnp.where(quantized(x)[1] == 1, jnp.nan, quantized(x)[1])),
    "an exception": _raise,
}


def _truncated(x):
    """The values of `quantized`, rounded towards zero."""
    values, scales = quantized(x)
    wide, exact = values.astype(jnp.float32), x.astype(jnp.float32) / jnp.repeat(scales.T, 128, axis=1)
    codes = jax.lax.bitcast_convert_type(values, jnp.uint8)
    lower = jax.lax.bitcast_convert_type(codes - jnp.uint8(1), jnp.float8_e4m3fn)
    return jnp.where((jnp.abs(wide) > jnp.abs(exact)) & (codes & 0x7F > 0), lower, values)


def pair(shape=(256, 384), seed=0):
    """`(kernel, scale_inv)` in e4m3."""
    random = np.random.default_rng(seed)
    kernel = jnp.asarray(random.normal(size=shape).astype(jnp.float8_e4m3fn))
    return kernel, jnp.asarray(random.uniform(0.5, 2, (shape[0] // 128, shape[1] // 128)), jnp.float32)
