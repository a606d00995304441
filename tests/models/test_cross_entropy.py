"""`chunked_cross_entropy`: optax's losses and gradients, from logits that never exist as a whole."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from perparam.models.cross_entropy import slice_size
from perparam.models.head_slices import rows
from perparam.policies import UnsupportedCast
from perparam.policies.errors import InvalidGradients
from perparam.policies.matmul import scaled_matmul
from perparam.policies.scaled_array import quantize
from perparam.policies.trainable import TrainableValues
from perparam.training import chunked_cross_entropy, grad

EPSILON = 2.0**-24
FEATURES = 24


def loss_error(vocabulary, size):
    """Absolute: two sums of `vocabulary` exponentials in any order, with three roundings for each, and one more
    exponential and product for each slice; the logarithm makes a relative error absolute.  Twice, for either loss."""
    return 2 * (vocabulary + 3 + 3 * math.ceil(vocabulary / size)) * EPSILON


def case(tokens, vocabulary, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(tokens), 3)
    hidden = 2 * jax.random.normal(keys[0], (tokens, FEATURES))
    head = jax.random.normal(keys[1], (vocabulary, FEATURES))
    return hidden.astype(dtype), head, jax.random.randint(keys[2], (tokens,), 0, vocabulary)


def plain(hidden, head, labels, compute=None):
    logits = scaled_matmul(hidden, head, compute=compute).astype(jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@pytest.mark.slow
@settings(max_examples=6)
@given(st.integers(1, 9), st.integers(1, 90), st.integers(1, 100))
def test_losses_are_those_of_optax(tokens, vocabulary, chunk):
    hidden, head, labels = case(tokens, vocabulary)
    found = jax.jit(lambda *call: chunked_cross_entropy(*call, chunk=chunk))(hidden, head, labels)
    exact = plain(hidden, head, labels)
    # Logits are sums of 24 products, in two orders, and at most 40.
    np.testing.assert_allclose(found, exact, rtol=0, atol=loss_error(vocabulary, chunk) + 2 * 24 * EPSILON * 40)
    assert found.dtype == jnp.float32


SLOW, THOROUGH = pytest.mark.slow, pytest.mark.thorough


@pytest.mark.parametrize("chunk", [16, *(pytest.param(chunk, marks=THOROUGH) for chunk in (7, 61, 100))])
def test_gradients_of_hidden_states_and_head_are_those_of_optax(chunk):
    hidden, head, labels = case(5, 61)
    weights = jnp.arange(1.0, 6)

    def gradients(losses):
        return jax.jit(jax.grad(lambda *both: (weights * losses(*both, labels)).sum(), (0, 1)))(hidden, head)

    found = gradients(lambda *call: chunked_cross_entropy(*call, chunk=chunk))
    exact = gradients(plain)
    # A gradient is a product of d = weights * (softmax - one-hot), each with the relative error of the loss and of
    # sums of 61 products, and the other operand.
    logits = hidden @ head.T
    d = weights[:, None] * (jax.nn.softmax(logits) + jax.nn.one_hot(labels, 61))
    relative = loss_error(61, chunk) + 2 * (24 * 40 + 61) * EPSILON
    for one, other, bound in zip(found, exact, (d @ jnp.abs(head), d.T @ jnp.abs(hidden)), strict=True):
        assert (jnp.abs(one - other) <= relative * bound).all()


@pytest.mark.parametrize(
    ("format", "block", "compute"),
    [
        ("f8_e4m3fn", (16, 24), None),
        pytest.param("f8_e4m3fn", (-1, 8), None, marks=SLOW),
        pytest.param("int8", (1, 24), None, marks=THOROUGH),
        pytest.param("f8_e4m3fn", (16, 24), "f8_e4m3fn", marks=SLOW),
        pytest.param("f8_e4m3fn", (16, 24), "f32", marks=THOROUGH),
    ],
)
def test_a_narrow_head_is_sliced_where_blocks_begin(format, block, compute):
    hidden, head, labels = case(6, 61)
    head = quantize(head, format, block)

    @jax.jit
    def both(hidden):
        found = jax.value_and_grad(lambda h: chunked_cross_entropy(h, head, labels, chunk=10, compute=compute).mean())
        exact = jax.value_and_grad(lambda h: plain(h, head, labels, compute).mean())
        return *found(hidden), *exact(hidden)

    loss, gradient, plain_loss, plain_gradient = both(hidden)
    assert abs(loss - plain_loss) <= loss_error(61, 10) + 2 * 24 * EPSILON * 60
    assert jnp.abs(gradient - plain_gradient).max() <= 1e-5 * jnp.abs(plain_gradient).max()


def test_rows_of_a_narrow_kernel_have_their_scales():
    head = quantize(jax.random.normal(jax.random.key(0), (61, FEATURES)), "f8_e4m3fn", (16, 24))
    whole = head.dequantize()
    for start, size in ((0, 16), (16, 32), (48, 13)):
        assert (rows(head, start, size).dequantize() == whole[start : start + size]).all()


@pytest.mark.slow
def test_partial_gradients_of_bfloat16_states_are_added_in_float32():
    hidden, head, labels = case(4, 512, jnp.bfloat16)
    head = head.astype(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(hidden, chunk):
        return jax.grad(lambda h: chunked_cross_entropy(h, head, labels, chunk=chunk).sum())(hidden)

    many, one = (gradient(hidden, chunk).astype(jnp.float32) for chunk in (8, 512))
    # 64 partial sums, each rounded to bfloat16 and none larger than the sum of all magnitudes.
    d = jax.nn.softmax((hidden @ head.T).astype(jnp.float32)) + jax.nn.one_hot(labels, 512)
    bound = d @ jnp.abs(head.astype(jnp.float32))
    assert (jnp.abs(many - one) <= 2.0**-7 * bound).all()
    assert many.any()


@pytest.mark.parametrize(("format", "block"), [("f8_e4m3fn", (16, 24)), pytest.param("int8", (-1, 8), marks=THOROUGH)])
def test_the_gradient_of_a_narrow_head_is_that_of_its_weight(format, block):
    hidden, head, labels = case(6, 61)
    head = quantize(head, format, block)

    def loss(head):
        return chunked_cross_entropy(hidden, head, labels, chunk=10, compute="f32").sum()

    found, exact = jax.jit(lambda head: (grad(loss)(head), jax.grad(loss)(head.dequantize())))(head)
    assert found.dtype == jnp.float32
    # As above, of softmax and one-hot: logits of the two kernels are sums in different orders.
    d = jax.nn.softmax(hidden @ head.dequantize().T) + jax.nn.one_hot(labels, 61)
    relative = loss_error(61, 10) + 2 * (24 * 40 + 61) * EPSILON
    assert (jnp.abs(found - exact) <= relative * (d.T @ jnp.abs(hidden))).all()
    assert exact.any()


@pytest.mark.parametrize("vocabulary", [pytest.param(300, marks=THOROUGH)])
def test_a_kernel_that_a_product_quantises_is_sliced_by_its_blocks(vocabulary):
    hidden, head, labels = case(6, vocabulary)
    losses = [
        jax.jit(lambda *call, c=c: chunked_cross_entropy(*call, labels, chunk=c, compute="f8_e4m3fn"))(hidden, head)
        for c in (1, vocabulary)
    ]
    assert jnp.abs(losses[0] - losses[1]).max() <= loss_error(vocabulary, 128) + 2 * 24 * EPSILON * 60


# Derivatives again.


@pytest.mark.slow
def test_second_derivatives_of_a_plain_head_are_those_of_optax():
    hidden, head, labels = case(5, 61)

    def second(losses):
        def first(hidden, head):
            gradients = jax.grad(lambda *both: losses(*both, labels).sum(), (0, 1))(hidden, head)
            return sum(jnp.sin(each).sum() for each in gradients)

        return jax.jit(jax.grad(first, (0, 1)))(hidden, head)

    found, exact = second(lambda *call: chunked_cross_entropy(*call, chunk=16)), second(plain)
    # Sums of sums of 61 and 24 products, in two orders, for both derivatives.
    for one, other in zip(found, exact, strict=True):
        assert jnp.abs(one - other).max() <= 4 * (61 + 24 + 40) * EPSILON * max(jnp.abs(other).max(), 1) * 24


def test_second_derivatives_of_a_narrow_head_that_is_trained_are_an_error():
    hidden, head, labels = case(2, 8)
    scaled = quantize(head, "f8_e4m3fn", (8, 24))

    def loss(hidden, proxy):
        return chunked_cross_entropy(hidden, dataclasses.replace(scaled, proxy=proxy), labels).sum()

    proxy = jnp.zeros((8, FEATURES))
    first = jax.value_and_grad(loss)
    for function in (lambda h, p: first(h, p)[0], lambda h, p: first(h, p)[1].sum()):
        for of in (0, 1):
            with pytest.raises(InvalidGradients, match=r"cannot be differentiated again, .*Dequantize the head first"):
                jax.grad(function, of)(hidden, proxy)


# What has no loss.


def test_ignored_labels_have_neither_loss_nor_gradient():
    hidden, head, labels = case(4, 61)
    labels = labels.at[1].set(-100)

    @jax.jit
    def run(hidden):
        losses, pull = jax.vjp(lambda h: chunked_cross_entropy(h, head, labels, chunk=16), hidden)
        return losses, *pull(jnp.ones(4))

    losses, gradient = run(hidden)
    assert losses[1] == 0
    assert (losses[jnp.array([0, 2, 3])] > 0).all()
    assert not gradient[1].any()
    assert gradient[0].any()
    assert jnp.isfinite(gradient).all()


def test_other_labels_outside_the_vocabulary_are_nan():
    hidden, head, _ = case(4, 61)
    losses = chunked_cross_entropy(hidden, head, jnp.array([3, 61, -1, 2**31 - 1]), chunk=61)
    assert jnp.isnan(losses).tolist() == [False, True, True, True]


@pytest.mark.slow
def test_large_and_infinite_logits_are_those_of_optax():
    hidden = jnp.eye(3, dtype=jnp.float32) * jnp.array([1e4, -1e4, 1.0])
    head = jnp.array([[1.0, 1, 0], [2, 2, 0], [3, 3, 0], [4, 4, -1]])
    labels = jnp.array([3, 0, 3])
    found = chunked_cross_entropy(hidden, head, labels, chunk=1)
    np.testing.assert_allclose(found, plain(hidden, head, labels), rtol=4 * EPSILON, atol=loss_error(4, 1))


# Memory.


def sizes(text):
    """The numbers of elements of all arrays that a program names."""
    return {
        math.prod(map(int, shape.split(","))) for shape in re.findall(r"\b[a-z]+[0-9]+[a-z0-9]*\[([0-9,]+)\]", text)
    }


@pytest.mark.parametrize(
    "trained", [pytest.param((0,), marks=SLOW, id="frozen head"), pytest.param((0, 1), id="trained head")]
)
def test_no_array_has_as_many_elements_as_tokens_times_vocabulary(trained):
    tokens, vocabulary = 32, 1003  # more tokens than features, so that the head is smaller
    call = case(tokens, vocabulary)
    largest = {}
    for name, losses in (("plain", plain), ("chunked", lambda *call: chunked_cross_entropy(*call, chunk=64))):
        step = jax.jit(jax.value_and_grad(lambda *call, losses=losses: losses(*call).mean(), trained)).trace(*call)
        texts = str(step.jaxpr), step.lower().compile().as_text()
        largest[name] = [max(sizes(text)) for text in texts]
    assert min(largest["plain"]) >= tokens * vocabulary
    assert max(largest["chunked"]) == FEATURES * vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_over_the_vocabulary_of_qwen3_takes_a_tenth_of_the_memory(dtype):
    hidden = jax.ShapeDtypeStruct((512, 128), dtype)
    head = jax.ShapeDtypeStruct((151936, 128), dtype)
    labels = jax.ShapeDtypeStruct((512,), jnp.int32)

    def temporary(losses):
        step = jax.jit(jax.value_and_grad(lambda *call: losses(*call).mean(), (0, 1)))
        return step.lower(hidden, head, labels).compile().memory_analysis().temp_size_in_bytes

    assert temporary(plain) > 4 * 512 * 151936
    # Two slices of logits and one of the head's gradient, with what is between them; less than a float32 head.
    assert temporary(chunked_cross_entropy) < 8 * 4 * 512 * 4096 < min(4 * 512 * 151936 / 4, 4 * 128 * 151936)


# Errors.


def test_labels_are_integers_for_each_state():
    hidden, head, labels = case(4, 61)
    for wrong in (labels[:3], labels.astype(jnp.float32)):
        with pytest.raises(UnsupportedCast, match=r"labels: expected integers of shape \(4,\), found .*-100 for those"):
            chunked_cross_entropy(hidden, head, wrong)


@pytest.mark.parametrize("chunk", [0, -1, 2.5])
def test_a_chunk_is_a_positive_number(chunk):
    with pytest.raises(UnsupportedCast, match=r"chunk: expected a positive number of outputs, found .* Write 4096"):
        slice_size(100, 1, chunk)


def test_a_chunk_may_be_an_integer_of_numpy():
    assert slice_size(100, 16, np.int64(20)) == 32
    assert type(slice_size(100, 1, np.int64(20))) is int


def test_hidden_states_and_head_are_arrays():
    hidden, head, labels = case(2, 8)
    with pytest.raises(
        UnsupportedCast, match=r"head: expected an array, found Param\. Pass .* variable, head\[\.\.\.\]"
    ):
        chunked_cross_entropy(hidden, nnx.Param(head), labels)
    with pytest.raises(UnsupportedCast, match=r"hidden: expected an array, found list\. Pass an array\."):
        chunked_cross_entropy(hidden.tolist(), head, labels)


def test_values_without_their_scales_are_an_error():
    hidden, head, labels = case(2, 8)
    values = TrainableValues(quantize(head, "int8", (1, 24)).values, head)
    with pytest.raises(
        UnsupportedCast, match=r"head: found the TrainableValues .* without scales. Pass perparam.Scaled"
    ):
        chunked_cross_entropy(hidden, values, labels)
