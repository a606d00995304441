"""Flax's own linear layers that compute in a narrow format by policy (W8A8), through `apply`: Linen and NNX."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import bits

from perparam import ScaledArray, apply, init, scaled_matmul
from perparam.policies import UnsupportedCast, as_format

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)
BLOCK = (8, 4)
W8A8 = {"params": {"kernel": "f8_e4m3fn"}, "compute": {"kernel": "f8_e4m3fn", "default": "bf16"}, "block": BLOCK}
DYNAMIC = W8A8 | {"params": None}
KERNELS_ALONE = {"compute": {"kernel": "f8_e4m3fn"}}


def turned(kernel, scale_inv) -> ScaledArray:
    return ScaledArray(kernel.T, scale_inv.T, as_format({"dtype": "f8_e4m3fn", "block": BLOCK[::-1], "scale": "f32"}))


class TestDense:
    @pytest.mark.parametrize("bias", [True, False])
    def test_it_is_scaled_matmul_and_flaxs_bias(self, bias):
        module = nn.Dense(5, use_bias=bias, bias_init=nn.initializers.normal())
        variables = init(module, W8A8, KEY, X)
        params = variables["params"]
        x = jnp.asarray(X, jnp.bfloat16)
        expected = scaled_matmul(x, turned(params["kernel"], params["scale_inv"]), compute="f8_e4m3fn")
        if bias:
            expected += params["bias"].astype(jnp.bfloat16)
        assert bits(apply(module, W8A8, variables, X)) == bits(expected)
        assert bits(jax.jit(functools.partial(apply, module, W8A8))(variables, X)) == bits(expected)

    def test_a_wide_kernel_is_quantised_on_the_fly(self):
        module = nn.Dense(5, use_bias=False)
        variables = init(module, DYNAMIC, KEY, X)
        expected = scaled_matmul(X.astype(jnp.bfloat16), variables["params"]["kernel"].T, compute="f8_e4m3fn")
        assert bits(apply(module, DYNAMIC, variables, X)) == bits(expected)

    def test_gradients_are_straight_through_to_x_and_the_wide_kernel(self):
        module, policy = nn.Dense(5, use_bias=False), KERNELS_ALONE
        kernel = init(module, policy, KEY, X)["params"]["kernel"]

        def ours(x, kernel):
            return jnp.sum(apply(module, policy, {"params": {"kernel": kernel}}, x) ** 2)

        def plain(x, kernel):
            return jnp.sum(scaled_matmul(x, kernel.T, compute="f8_e4m3fn") ** 2)

        found, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(jnp.asarray(X), kernel) for f in (ours, plain))
        chex.assert_trees_all_equal(found, expected)
        assert all(np.abs(g).max() > 0 for g in found)

    def test_a_box_around_the_kernel_is_opened(self):
        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        module, plain = nn.Dense(5, kernel_init=boxed), nn.Dense(5)
        expected = apply(plain, W8A8, init(plain, W8A8, KEY, X), X)
        assert bits(apply(module, W8A8, init(module, W8A8, KEY, X), X)) == bits(expected)

    @pytest.mark.slow
    def test_scanned_layers_multiply_slices_of_the_stack(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(12)(x), None

        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
        variables = init(scanned, KERNELS_ALONE | {"params": {"kernel": "f8_e4m3fn"}}, KEY, X, None)
        y, _ = apply(scanned, KERNELS_ALONE, variables, X, None)
        x = jnp.asarray(X)
        for i in range(2):
            layer = jax.tree.map(lambda leaf: leaf[i], variables["params"]["Dense_0"])  # noqa: B023
            x = apply(nn.Dense(12), KERNELS_ALONE, {"params": layer}, x)
        # One program or many: the bias may be added to the sums before they are rounded.
        chex.assert_trees_all_close(y, x, rtol=1e-6, atol=1e-6)

    def test_the_users_module_does_not_change(self):
        dense = nn.Dense(5)
        module = nn.Sequential([dense])
        variables = init(module, W8A8, KEY, X)
        apply(module, W8A8, variables, X)
        assert dense.dot_general is None
        assert bits(
            module.apply({"params": {"layers_0": {"kernel": jnp.ones((12, 5)), "bias": jnp.ones(5)}}}, X)
        ) == bits(nn.Dense(5).apply({"params": {"kernel": jnp.ones((12, 5)), "bias": jnp.ones(5)}}, X))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 12, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


class TestSeveralAxes:
    """Attention's projections: (in, heads, head) and (heads, head, out)."""

    def linen(self, policy):
        module = nn.MultiHeadDotProductAttention(2, qkv_features=12)
        variables = init(module, policy, KEY, X)
        return apply(module, policy, variables, X), variables

    def nnx(self, policy):
        state = init(Attention, policy, KEY)
        return apply(Attention, policy, state, X), state

    @pytest.mark.parametrize("flax", [pytest.param("linen", marks=pytest.mark.slow), "nnx"])
    def test_narrow_compute_is_near_the_wide_one_and_differs(self, flax):
        policy = {"params": {"kernel": "f8_e4m3fn"}, "compute": {"kernel": "f8_e4m3fn", "default": "f32"}}
        narrow, _ = getattr(self, flax)(policy)
        wide, _ = getattr(self, flax)(policy | {"compute": "f32"})
        # Activations are rounded to three bits, by 2**-4 at most, in two products after each other.
        assert 0 < np.linalg.norm(narrow - wide) / np.linalg.norm(wide) < 2 * 2.0**-4

    def test_blocks_that_are_no_rectangles_of_the_matrix_are_refused(self):
        with pytest.raises(UnsupportedCast, match=r"attention/out/kernel|attention/.*/kernel: the blocks \(4, 4\) of"):
            self.nnx(KERNELS_ALONE | {"params": {"kernel": "f8_e4m3fn"}, "block": (4, 4)})


class OwnProduct(nn.Module):
    """A module that multiplies with its own kernel."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (12, 5))


class Tied(nnx.Module):
    """A module that reads the kernel of its linear layer."""

    def __init__(self, rngs):
        self.up = nnx.Linear(12, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.up(x) @ self.up.kernel.T


class ListOfKernels(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.data([{"kernel": nnx.Param(jnp.ones((12, 5)))}])

    def __call__(self, x):
        return x @ self.layers[0]["kernel"]


class TestRefusals:
    message = r"{path}: computing in f8_e4m3fn needs a layer that quantises its activations, and {kind} multiplies wide"

    @pytest.mark.parametrize(
        ("module", "path", "kind"),
        [
            (nn.Sequential([nn.Conv(5, (3,))]), "layers_0/kernel", "Conv"),
            (OwnProduct(), "kernel", "OwnProduct"),
            (nn.Einsum((12, 5), "bti,io->bto", use_bias=False), "kernel", "Einsum"),
        ],
    )
    def test_other_linen_modules(self, module, path, kind):
        with pytest.raises(UnsupportedCast, match="^" + self.message.format(path=path, kind=kind)):
            apply(module, KERNELS_ALONE, module.init(KEY, X), X)

    @pytest.mark.parametrize(
        ("module", "path", "kind"),
        [
            (functools.partial(nnx.Conv, 12, 5, (3,)), "kernel", "Conv"),
            (functools.partial(nnx.Einsum, "bti,io->bto", (12, 5)), "kernel", "Einsum"),
            (ListOfKernels, "layers/0/kernel", "a list or mapping"),
        ],
    )
    def test_other_nnx_modules(self, module, path, kind):
        with pytest.raises(UnsupportedCast, match="^" + self.message.format(path=path, kind=kind)):
            apply(module, KERNELS_ALONE, init(module, None, KEY), X)

    def test_a_layer_with_a_product_of_its_own(self):
        def product(*args, **kwargs):
            return jax.lax.dot_general(*args, **kwargs)

        message = (
            "^kernel: computing in f8_e4m3fn replaces the product of .*, which has a dot_general of its own. Remove"
        )
        linen, in_nnx = nn.Dense(5, dot_general=product), functools.partial(nnx.Linear, 12, 5, dot_general=product)
        with pytest.raises(UnsupportedCast, match=message):
            apply(linen, KERNELS_ALONE, linen.init(KEY, X), X)
        with pytest.raises(UnsupportedCast, match=message):
            apply(in_nnx, KERNELS_ALONE, init(in_nnx, None, KEY), X)

    def test_a_kernel_that_is_read_outside_of_its_layer(self):
        with pytest.raises(UnsupportedCast, match=r"^up/kernel: the policy computes this .* read as an array"):
            apply(Tied, KERNELS_ALONE, init(Tied, None, KEY), X)
