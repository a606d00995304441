"""Random bits that are computed where they are used, so that XLA keeps no array of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns random uint32 numbers of `shape`, which depend on the key and each element's place alone.

    `jax.random.bits` has the same generator in a loop or a kernel of its own, and with it four temporary arrays of the
    result's size; here each number is a chain of elementwise operations.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    within = jnp.zeros(shape, jnp.uint32)
    for axis in range(1, len(shape)):
        within = within * jnp.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    first = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) if shape else within
    return threefry(words[0], words[1], first, within)[0]


def threefry(key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the block cipher Threefry-2x32 of two counters, elementwise, in 20 rounds; all arrays are uint32.

    Source: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    keys = key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (x1 << rotation | x1 >> (32 - rotation))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
