"""Random bits: the generator of JAX, numbers that depend on their place, and no array of them in compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from perparam.policies.training.random_bits import random_bits, threefry
from perparam.policies.training.rounding import requantize, stochastic_cast


def test_the_generator_is_that_of_jax():
    key, counters = jnp.array([17, 2**31 + 5], jnp.uint32), jnp.arange(64, dtype=jnp.uint32) * jnp.uint32(77)
    found = threefry(key[0], key[1], counters[:32], counters[32:])
    assert np.array_equal(np.concatenate(found), threefry_2x32(key, counters))


@pytest.mark.parametrize("shape", [(4096,), (2, 64, 32), (64, 64)])
def test_numbers_differ_by_place_and_by_key(shape):
    one, other = (np.asarray(random_bits(jax.random.key(seed), shape)) for seed in (0, 1))
    # Of 4096 numbers of 32 bits two are equal with a probability of 4096**2 / 2**33, or 0.2 %, under fixed keys.
    assert len(set(one.ravel().tolist())) == len(set(other.ravel().tolist())) == 4096
    assert not (one == other).any()


def test_a_scalar_and_an_empty_array_have_bits_too():
    assert random_bits(jax.random.key(0), ()).shape == ()
    assert random_bits(jax.random.key(0), (0, 3)).shape == (0, 3)


def temporaries(function):
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    return jax.jit(function).lower(x, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes


def test_a_stochastic_cast_keeps_no_array():
    assert temporaries(lambda x, key: stochastic_cast(x, "bf16", key)) < 4096


@pytest.mark.parametrize("format", ["f8_e4m3fn", "mxfp8"])
def test_stochastic_quantisation_keeps_no_more_than_quantisation_to_nearest(format):
    nearest = temporaries(lambda x, key: requantize(x, format))
    assert temporaries(lambda x, key: requantize(x, format, key=key)) < nearest + 4096
