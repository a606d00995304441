"""Gradients of trees of stored parameters: those of the dequantised weights, wide, in every format and transform."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import perparam
from perparam import Policy, dequantize, quantize, scaled_matmul
from perparam.models import Linear
from perparam.policies import InvalidGradients, UnmatchedRule
from perparam.policies.matmul import grouped_matmul, quantize_rows
from perparam.training import add_proxies, grad, value_and_grad

ROWS, IN, OUT = 6, 40, 24
BLOCK = (16, 32)
FORMATS = ("f8_e4m3fn", "int8", *(pytest.param(format, marks=pytest.mark.slow) for format in ("f8_e5m2", "mxfp8")))
FLOAT32_STEP = 2.0**-24


def operands(format="f8_e4m3fn", layers=None):
    shape = (OUT, IN) if layers is None else (layers, IN, IN)
    block = None if format == "mxfp8" else BLOCK
    kernel, scale_inv = quantize(jax.random.normal(jax.random.key(0), shape) / 6, format, block)
    x = jax.random.normal(jax.random.key(1), (ROWS, IN))
    return {"kernel": kernel, "scale_inv": scale_inv}, x, block or (1, 32)


def sum_bound(left, right):
    """The largest error of float32 sums of these products in any order: (n - 1) steps of the sum of magnitudes, and one
    for each product; Higham, Accuracy and Stability of Numerical Algorithms, section 3.1. Both sides err."""
    return 2 * left.shape[1] * FLOAT32_STEP * (abs(np.asarray(left, np.float64)) @ abs(np.asarray(right, np.float64)))


@pytest.mark.parametrize("format", FORMATS)
def test_the_gradient_of_a_pair_is_that_of_its_weight(format):
    params, x, block = operands(format)
    weights = jax.random.normal(jax.random.key(2), (ROWS, OUT))

    def loss(params, x):
        return (scaled_matmul(x, params["kernel"], params["scale_inv"], block=block) * weights).sum()

    value, gradient = jax.jit(value_and_grad(loss))(params, x)
    wide = jax.jit(jax.grad(lambda weight: (x @ weight.T * weights).sum()))(dequantize(*params.values(), block))
    assert gradient["kernel"].dtype == jnp.float32
    assert gradient["scale_inv"] is None
    assert float(value) == float(jax.jit(loss)(params, x))
    assert (abs(gradient["kernel"] - wide) <= sum_bound(weights.T, x)).all()


def test_a_gradient_that_float8_does_not_have_is_kept():
    params = {"kernel": jnp.array([[2, 3]], jnp.float8_e4m3fn), "scale_inv": jnp.array([[0.5]])}

    def loss(params):
        return 2000 * dequantize(params["kernel"], params["scale_inv"]).sum()

    assert jax.jit(grad(loss))(params)["kernel"].tolist() == [[2000.0, 2000.0]]
    assert np.isnan(jnp.float32(2000).astype(jnp.float8_e4m3fn))  # what a float8 cotangent would be


def test_a_scaled_array_has_one_array_as_its_gradient():
    scaled = quantize(jnp.array([[1.0, -3.0]]), "int8", (1, 2))
    gradient = grad(lambda tree: 2000 * tree["w"][0].dequantize().sum())({"w": [scaled], "n": jnp.arange(3)})
    assert gradient["w"][0].tolist() == [[2000.0, 2000.0]]
    assert gradient["n"] is None


@pytest.mark.parametrize("compute", [pytest.param(None, marks=pytest.mark.slow), "bf16", "f8_e4m3fn"])
def test_x_is_the_one_that_was_multiplied(compute):
    params, x, block = operands()
    x = x.astype(jnp.bfloat16) if compute is None else x

    def loss(params):
        y = scaled_matmul(x, params["kernel"], params["scale_inv"], block=block, compute=compute)
        return y.astype(jnp.float32).sum()

    gradient = grad(loss)(params)["kernel"]
    used = quantize_rows(x, "f8_e4m3fn").dequantize() if compute == "f8_e4m3fn" else x.astype(jnp.bfloat16)
    expected = np.asarray(used, np.float64).sum(axis=0)
    assert (abs(gradient - expected) <= ROWS * FLOAT32_STEP * abs(np.asarray(used, np.float64)).sum(axis=0)).all()


def test_gradients_reach_earlier_parameters_through_narrow_ones():
    params, x, block = operands()
    tree = {"first": {"scale": jnp.ones(IN)}, "second": params}

    def loss(tree):
        return jnp.tanh(scaled_matmul(x * tree["first"]["scale"], *tree["second"].values(), block=block)).sum()

    def wide(tree):
        return jnp.tanh((x * tree["first"]["scale"]) @ tree["second"].T).sum()

    found = grad(loss)(tree)
    wanted = jax.grad(wide)(tree | {"second": dequantize(*params.values(), block)})
    # Sums of 40 and 6 numbers below 4, and a tanh: measured 1e-6.
    chex.assert_trees_all_close(found["second"]["kernel"], wanted["second"], rtol=0, atol=1e-5)
    chex.assert_trees_all_close(found["first"], wanted["first"], rtol=0, atol=1e-5)


def stacked(params, x, body):
    return (jax.lax.scan(lambda x, layer: (body(x, layer), None), x, params)[0] ** 2).sum()


@pytest.mark.parametrize(
    ("format", "remat"),
    [("int8", True), *(pytest.param("f8_e4m3fn", remat, marks=pytest.mark.slow) for remat in (False, True))],
)
def test_layers_in_a_scan(format, remat):
    params, x, block = operands(format, layers=3)

    def narrow(x, layer):
        return jnp.tanh(scaled_matmul(x, layer["kernel"], layer["scale_inv"], block=block))

    def wide(x, weight):
        return jnp.tanh(x @ weight.T)

    body = jax.checkpoint(narrow) if remat else narrow
    value, gradient = jax.jit(value_and_grad(lambda params: stacked(params, x, body)))(params)
    weight = dequantize(*params.values(), block)
    wanted, expected = jax.jit(jax.value_and_grad(lambda weight: stacked(weight, x, wide)))(weight)
    # Three layers of sums of 40: a few dozen steps of float32 of the largest gradient. Measured: 9.
    close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=100 * FLOAT32_STEP * float(abs(expected).max()))
    close(gradient["kernel"], expected)
    assert abs(float(value) - float(wanted)) <= 100 * FLOAT32_STEP * float(wanted)


def test_gradients_of_each_example_and_their_accumulation():
    params, x, block = operands()

    def loss(params, x):
        return jnp.tanh(scaled_matmul(x, *params.values(), block=block)).sum()

    whole = jax.jit(grad(loss))(params, x)["kernel"]
    each = jax.jit(jax.vmap(grad(loss), (None, 0)))(params, x)["kernel"]
    assert each.shape == (ROWS, OUT, IN)

    def add(total, x):
        return total + grad(loss)(params, x[None])["kernel"], None

    accumulated, _ = jax.jit(lambda x: jax.lax.scan(add, jnp.zeros((OUT, IN)), x))(x)
    for found in (each.sum(axis=0), accumulated):
        assert (abs(found - whole) <= sum_bound(jnp.ones((OUT, ROWS)), x)).all()


def test_steps_in_a_scan_carry_narrow_parameters():
    params, x, block = operands("int8")

    def step(params, x):
        gradient = grad(lambda p: (scaled_matmul(x, *p.values(), block=block) ** 2).sum())(params)["kernel"]
        scaled = quantize(dequantize(*params.values(), block) - 0.01 * gradient, "int8", block)
        return {"kernel": scaled.values, "scale_inv": scaled.scale_inv}, abs(gradient).sum()

    final, sizes = jax.jit(lambda params: jax.lax.scan(step, params, jnp.stack([x] * 5)))(params)
    assert final["kernel"].dtype == jnp.int8
    assert float(sizes[-1]) < float(sizes[0]) / 2


def test_groups_of_rows_have_gradients_of_their_own_kernels():
    scaled = quantize(jax.random.normal(jax.random.key(0), (4, OUT, IN)), "f8_e4m3fn", BLOCK)
    x, sizes = jax.random.normal(jax.random.key(1), (ROWS, IN)), jnp.array([2, 0, 3, 1])

    def loss(scaled, x):
        return jnp.sin(grouped_matmul(x, scaled, sizes)).sum()

    group = np.repeat(np.arange(4), sizes)
    wanted = jax.grad(lambda w: jnp.sin(jnp.einsum("ri,roi->ro", x, w[group])).sum())(scaled.dequantize())
    found, dx = jax.jit(grad(loss, (0, 1)))(scaled, x)
    # The cosine of sums of 40 products, of magnitude 40, errs by 40 * 40 steps at most; measured 20 steps.
    chex.assert_trees_all_close(found, wanted, rtol=0, atol=1600 * FLOAT32_STEP * 4)
    assert not found[1].any()
    chex.assert_trees_all_close(dx, jax.grad(loss, 1)(scaled, x), rtol=0, atol=1600 * FLOAT32_STEP * 4)


class TestFlax:
    def test_a_linen_module_that_knows_nothing_of_pairs(self):
        policy = Policy({"kernel": "f8_e4m3fn", "default": "f32"}, "f32", block=BLOCK)
        module, x = nn.Dense(OUT), operands()[1]
        variables = perparam.init(module, policy, jax.random.key(0), x)

        def loss(variables):
            return (perparam.apply(module, policy, variables, x) ** 2).sum()

        gradient = jax.jit(grad(loss))(variables)["params"]
        stored = variables["params"]
        weight = dequantize(stored["kernel"], stored["scale_inv"], BLOCK)
        wanted = jax.jit(jax.grad(lambda w: ((x @ w + stored["bias"]) ** 2).sum()))(weight)
        assert gradient["scale_inv"] is None
        # The same program but for the places of casts.
        chex.assert_trees_all_close(gradient["kernel"], wanted, rtol=0, atol=float(abs(wanted).max()) * 1e-6)

    @pytest.mark.slow
    def test_statistics_are_not_parameters(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x)).sum()

        policy = Policy({"kernel": "int8", "default": "f32"}, block=BLOCK)
        x = operands()[1]
        variables = perparam.init(Net(), policy, jax.random.key(0), x)
        gradient = grad(lambda v: perparam.apply(Net(), policy, v, x))(variables)
        assert gradient["params"]["Dense_0"]["kernel"].shape == (IN, 8)
        assert jax.tree.leaves(gradient["batch_stats"]) == []

    def test_a_state_has_no_scales_in_its_gradient(self):
        policy = Policy({"kernel": "int8", "default": "f32"}, block=BLOCK)
        module = functools.partial(nnx.Linear, IN, OUT)
        state, x = perparam.init(module, policy, jax.random.key(0)), operands()[1]
        gradient = jax.jit(grad(lambda s: perparam.apply(module, policy, s, x).sum()))(state)
        assert sorted(gradient) == ["bias", "kernel"]
        expected = np.broadcast_to(np.asarray(x.sum(axis=0))[:, None], (IN, OUT))
        np.testing.assert_allclose(gradient["kernel"][...], expected, rtol=0, atol=ROWS * 4 * ROWS * FLOAT32_STEP)


class Shared(nnx.Module):
    """Two layers with one kernel."""

    def __init__(self):
        self.one, self.two = (Linear(8, 8, policy={"params": {"kernel": "int8"}}, rngs=nnx.Rngs(0)) for _ in "12")
        self.two.kernel, self.two.scale_inv = self.one.kernel, self.one.scale_inv

    def __call__(self, x):
        return self.two(jnp.tanh(self.one(x)))


class TestKernelsThatModulesShare:
    @pytest.mark.parametrize("trainable", ["**", "one/kernel"])
    def test_the_gradient_is_that_of_all_uses_at_the_path_of_the_state(self, trainable):
        model, x = Shared(), jax.random.normal(jax.random.key(1), (3, 8))
        gradient = grad(lambda model: model(x).sum(), trainable=trainable)(model)
        weight = dequantize(model.one.kernel[...], model.one.scale_inv[...])
        expected = jax.grad(lambda weight: (jnp.tanh(x @ weight.T) @ weight.T).sum())(weight)
        assert [keys for keys, _ in nnx.to_flat_state(gradient)] == [("one", "kernel")]
        found = gradient["one"]["kernel"][...]
        np.testing.assert_allclose(found, expected, atol=float(abs(expected).max()) * 2 * 8 * 3 * FLOAT32_STEP)

    def test_another_path_is_no_parameter_as_in_the_state(self):
        model = Shared()
        for choose in (lambda: add_proxies(model, "two/kernel"), lambda: grad(print, trainable="two/kernel")(model)):
            with pytest.raises(UnmatchedRule, match=r"'two/kernel' \(trainable\) matches none of 1 trainable"):
                choose()


class TestArguments:
    def test_value_auxiliary_and_several_arguments(self):
        params, x, block = operands()

        def loss(x, params, shift):
            y = scaled_matmul(x, params["kernel"], params["scale_inv"], block=block)
            return y.sum() + shift, {"rows": y.shape[0]}

        (value, aux), (of_params, of_x) = value_and_grad(loss, (1, 0), has_aux=True)(x, params, shift=1.0)
        assert aux == {"rows": ROWS}
        assert of_params["kernel"].shape == (OUT, IN)
        assert of_x.shape == x.shape
        assert float(value) == float(loss(x, params, 1.0)[0])
        assert grad(loss, 1, has_aux=True)(x, params, 1.0)[1] == aux

    def test_others_than_the_chosen_parameters_are_frozen(self):
        params, x, block = operands()
        tree = {"a": params, "b": dict(params), "scale": jnp.ones(IN)}

        def loss(tree):
            return sum(scaled_matmul(x * tree["scale"], *tree[name].values(), block=block).sum() for name in "ab")

        gradient = grad(loss, trainable=["b/*", "scale"])(tree)
        assert gradient["a"] == {"kernel": None, "scale_inv": None}
        assert gradient["b"]["kernel"].shape == (OUT, IN)
        assert gradient["scale"].shape == (IN,)
        assert grad(loss, trainable=lambda path: path == "scale")(tree)["b"]["kernel"] is None

    def test_the_slot_grads_gives_the_dtypes(self):
        params, x, block = operands()
        tree = {"kernel": params["kernel"], "scale_inv": params["scale_inv"], "scale": jnp.ones(IN)}

        def loss(tree):
            return scaled_matmul(x * tree["scale"], tree["kernel"], tree["scale_inv"], block=block).sum()

        policy = Policy(grads={"kernel": "bf16", "scale": "f16"})
        gradient = grad(loss, policy=policy)(tree)
        assert (gradient["kernel"].dtype, gradient["scale"].dtype) == (jnp.bfloat16, jnp.float16)

    def test_mistakes_are_errors(self):
        params, x, block = operands()

        def loss(params):
            return scaled_matmul(x, *params.values(), block=block).sum()

        with pytest.raises(UnmatchedRule, match=r"'kernal' \(trainable\) matches none of 1 trainable parameter"):
            grad(loss, trainable="kernal")(params)
        with pytest.raises(InvalidGradients, match=r"'kernal\?' \(trainable\) selects none of 1 parameter"):
            grad(loss, trainable="kernal?")(params)
        with pytest.raises(InvalidGradients, match=r"argnums=\(0, 1\): NNX modules and trees cannot be"):
            grad(lambda model, tree: 0.0, (0, 1))(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), params)

    def test_functions_that_would_lose_the_gradient_refuse_the_kernel(self):
        params, x, _ = operands()
        with pytest.raises(TypeError, match="TrainableValues"):
            grad(lambda p: (x @ jnp.asarray(p["kernel"]).astype(jnp.float32).T).sum())(params)


def test_proxies_take_no_memory_in_a_compiled_program():
    size, rows = 512, 8
    kernel, scale_inv = quantize(jnp.ones((size, size)), "int8")
    params = {name: {"k": kernel, "k_scale_inv": scale_inv} for name in "ab"}
    x = jnp.ones((rows, size))

    def loss(params):
        y = jnp.tanh(scaled_matmul(x, *params["a"].values()))
        return scaled_matmul(y, *params["b"].values()).sum()

    wide = size * size * 4
    compiled = jax.jit(value_and_grad(loss)).lower(params).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes < 2.1 * size * size
    assert memory.output_size_in_bytes < 2.1 * wide  # the gradients
    assert memory.temp_size_in_bytes < wide / 2
    # Frozen kernels have no gradient in the program at all.
    frozen = jax.jit(value_and_grad(loss, trainable="a/k")).lower(params).compile()
    assert frozen.as_text().count(f"f32[{size},{size}]") < compiled.as_text().count(f"f32[{size},{size}]")
