"""Keys of rows: each seed gives its own, whatever the batch, and seeds that do not fit are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perparam.models.generation.keys import row_keys
from perparam.policies.errors import InvalidSampling


def bits(keys):
    return np.asarray(jax.random.key_data(keys))


def test_a_seed_of_its_own_gives_a_row_the_same_keys_whatever_the_batch():
    seeds = [5, -1, 5, 2**31, 0]
    together = bits(row_keys(seeds, 5, 3))
    assert together.shape[0] == 15
    for row, seed in enumerate(seeds):
        np.testing.assert_array_equal(bits(row_keys([seed], 1, 3)), together[3 * row : 3 * row + 3])
        np.testing.assert_array_equal(bits(row_keys([seed], 1)), together[3 * row : 3 * row + 1])
    np.testing.assert_array_equal(together[:3], together[6:9])
    assert len(np.unique(together, axis=0)) == 12


def test_rows_and_samples_of_one_seed_differ():
    keys = bits(row_keys(5, 4, 3))
    assert len(np.unique(keys, axis=0)) == 12
    np.testing.assert_array_equal(keys, bits(row_keys(5, 4, 3)))
    np.testing.assert_array_equal(keys[:6], bits(row_keys(5, 2, 3)))
    assert not np.isin(bits(row_keys(6, 4, 3)), keys).all()


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32", "int64", "uint64"])
def test_seeds_may_be_of_any_integer_dtype(dtype):
    seeds = np.array([1, 2, 3], dtype)
    np.testing.assert_array_equal(bits(row_keys(seeds, 3)), bits(row_keys([1, 2, 3], 3)))
    np.testing.assert_array_equal(bits(row_keys(seeds[1], 3)), bits(row_keys(2, 3)))


def test_a_list_of_keys_is_one_for_each_row():
    keys = list(jax.random.split(jax.random.key(0), 3))
    np.testing.assert_array_equal(bits(row_keys(keys, 3)), bits(row_keys(jnp.stack(keys), 3)))
    for mixed in ([keys[0], 1, 2], [[1], [2, 3]]):
        with pytest.raises(InvalidSampling, match="key: expected an integer or a JAX key"):
            row_keys(mixed, 3)


def test_a_jax_key_is_the_integer_it_was_made_from():
    for key in (jax.random.key(7), jax.random.PRNGKey(7)):
        np.testing.assert_array_equal(bits(row_keys(key, 3, 2)), bits(row_keys(7, 3, 2)))
    for keys in (jax.random.split(jax.random.key(0), 3), jax.random.split(jax.random.PRNGKey(0), 3)):
        found = row_keys(keys, 3)
        assert len(np.unique(bits(found), axis=0)) == 3
        np.testing.assert_array_equal(bits(row_keys(keys[1:2], 1)), bits(found[1:2]))
    with pytest.raises(InvalidSampling, match="one for each of 2 rows"):
        row_keys(jax.random.split(jax.random.key(0), 3), 2)


@pytest.mark.parametrize("seed", [1.5, "1", None, [1, 2], [[1], [2], [3]], [1.0, 2.0, 3.0], [], True], ids=repr)
def test_seeds_that_do_not_fit_are_refused(seed):
    with pytest.raises(
        InvalidSampling, match="key: expected an integer or a JAX key, or one for each of 3 rows, found"
    ):
        row_keys(seed, 3)
