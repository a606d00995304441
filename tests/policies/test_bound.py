"""`bind`: NNX module objects with stored parameters, called directly, under Flax's transformations and optimizers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st

import perparam
from perparam import Linear, Policy, apply, bind, get_policy
from perparam.policies import Narrow, ShadowedRule, UnmatchedRule, UnsupportedCast, parameters
from perparam.training import grad, value_and_grad, with_policy

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
FP8 = Policy({"kernel": "f8_e4m3fn"}, "bf16", "f32")


class Net(nnx.Module):
    """A list of layers, norms with statistics, dropout, a shared table, and variables of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.gain = nnx.Param(jnp.full((8,), 1.5))
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        self.count[...] += 1
        return self.drop(self.norm(x)) * self.gain


class Small(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 6, rngs=rngs)
        self.down = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))

    def doubled(self, x):
        y = self(x)
        self.seen = y.dtype.name
        return y * 2


class Probe(nnx.Module):
    """Returns the dtypes in which its parameters arrive."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jnp.ones((8, 5)))
        self.bias = nnx.Param(jnp.ones(5))
        self.mean = nnx.BatchStat(jnp.ones(8))
        self.extra = nnx.List([nnx.Param(jnp.ones((4, 4)))])

    def __call__(self, x):
        product = x @ self.kernel
        assert product.dtype == x.dtype
        return {"x": x.dtype.name, "extra": self.extra[0].dtype.name} | {
            name: getattr(self, name).dtype.name for name in ("kernel", "bias", "mean")
        }


def applied(module, policy, *inputs, **kwargs):
    return apply(module, policy, get_policy(policy).store(nnx.state(module)), *inputs, **kwargs)


class TestVariables:
    def test_they_are_those_of_store_and_the_module_does_not_change(self):
        module = Net(nnx.Rngs(0))
        before = jax.tree.leaves(nnx.state(module, nnx.Param))
        bound, stored = bind(module, FP8), FP8.store(nnx.state(module))
        chex.assert_trees_all_equal_structs(nnx.state(bound), stored)
        chex.assert_trees_all_equal(
            nnx.state(bound, nnx.Not(nnx.RngState)), nnx.filter_state(stored, nnx.Not(nnx.RngState))
        )
        assert type(vars(bound.layers[0])["kernel"]) is Narrow
        assert bound.layers[0].scale_inv.get_metadata()["block"] == (128, 128)
        assert FP8.explain(bound).to_json() == FP8.explain(stored).to_json()
        assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(module, nnx.Param)), strict=True))

    def test_the_class_is_a_subclass_with_the_same_name(self):
        bound = bind(Small(nnx.Rngs(0)), FP8)
        assert isinstance(bound, Small)
        assert isinstance(bound.up, nnx.Linear)
        assert type(bound).__name__ == "Small"

    def test_equal_policies_give_equal_graphs(self):
        first = nnx.graphdef(bind(Small(nnx.Rngs(0)), FP8))
        second = nnx.graphdef(bind(Small(nnx.Rngs(1)), Policy.loads(FP8.dumps())))
        assert first == second
        assert hash(first) == hash(second)
        assert first != nnx.graphdef(bind(Small(nnx.Rngs(0)), FP8.replace(compute="f32")))

    def test_a_shared_variable_stays_shared(self):
        class Tied(nnx.Module):
            def __init__(self, rngs):
                self.embed, self.head = nnx.Embed(6, 8, rngs=rngs), nnx.Linear(8, 6, use_bias=False, rngs=rngs)
                self.head.kernel = self.embed.embedding

            def __call__(self, ids):
                return self.embed(ids) @ self.head.kernel.T

        module = Tied(nnx.Rngs(0))
        policy = {"params": {"embedding": "f8_e4m3fn"}, "compute": "bf16"}
        bound = bind(module, policy)
        assert list(parameters(bound)) == ["embed/embedding", "embed/embedding_scale_inv"]
        with jax.numpy_dtype_promotion("standard"):  # nnx.Embed casts its rows to the dtype of its initial table
            assert bits(bound(jnp.arange(3))) == bits(applied(module, policy, jnp.arange(3)))

    def test_a_state_is_loaded_with_update(self):
        bound, other = bind(Small(nnx.Rngs(0)), FP8), Small(nnx.Rngs(1))
        nnx.update(bound, FP8.store(nnx.state(other)))
        assert bits(bound(X)) == bits(applied(other, FP8, X))

    def test_saved_parameters_are_those_that_are_stored(self, tmp_path):
        module = Small(nnx.Rngs(0))
        perparam.save_params(bind(module, FP8), tmp_path / "bound")
        perparam.save_params(FP8.store(nnx.state(module)), tmp_path / "stored")
        found = {path.name: path.read_bytes() for path in (tmp_path / "bound").iterdir()}
        assert found == {path.name: path.read_bytes() for path in (tmp_path / "stored").iterdir()}
        assert found

    def test_it_can_be_made_without_arrays(self):
        shapes = nnx.eval_shape(lambda: bind(Small(nnx.Rngs(0)), FP8))
        assert shapes.up.scale_inv.get_raw_value().shape == (1, 1)


def stock(rngs):
    """Layers of each kind, small; none of them promotes f32 and bf16."""
    return {
        "linear": lambda: nnx.Sequential(nnx.Linear(8, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)),
        "general": lambda: nnx.LinearGeneral(8, (2, 3), rngs=rngs),
        "einsum": lambda: nnx.Einsum("ti,io->to", (8, 3), (3,), rngs=rngs),
        "conv": lambda: nnx.Conv(8, 3, (3,), rngs=rngs),
        "lora": lambda: nnx.LoRALinear(8, 3, lora_rank=2, rngs=rngs),
        "attention": lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
        "small": lambda: Small(rngs),
    }


KINDS = sorted(stock(None))
wide = st.sampled_from([None, "f32", "bf16"])  # not every product in f16 exists on CPUs


@pytest.mark.slow
@settings(max_examples=10)
@given(
    kind=st.sampled_from(KINDS),
    kernel=st.sampled_from(["f8_e4m3fn", "int8", "mxfp8", "bf16", None]),
    default=wide,
    compute=st.sampled_from(["bf16", "f32", {"kernel": "f32", "default": "bf16"}, None]),
    output=wide,
    inputs=st.sampled_from(["float32", "bfloat16"]),
)
def test_results_are_those_of_apply_bit_for_bit(kind, kernel, default, compute, output, inputs):
    module = stock(nnx.Rngs(0))[kind]()
    policy = Policy({"kernel": kernel, "default": default}, compute, output)
    x, stored = jnp.asarray(X, inputs), policy.store(nnx.state(module))
    with jax.numpy_dtype_promotion("standard"):
        y = nnx.jit(lambda bound, x: bound(x))(bind(module, policy), x)
        expected = jax.jit(lambda stored, x: apply(module, policy, stored, x))(stored, x)
    assert bits(y) == bits(expected)


class TestReads:
    def test_every_parameter_arrives_in_its_compute_dtype(self):
        policy = Policy({"kernel": "f8_e4m3fn"}, {"bias": None, "default": "bf16"})
        bound = bind(Probe(nnx.Rngs(0)), policy)
        found = {"x": "bfloat16", "kernel": "bfloat16", "bias": "float32", "mean": "float32", "extra": "bfloat16"}
        assert bound(X) == found
        assert bound.kernel[...].dtype == bound.kernel.dtype == bound.extra[0][...].dtype == jnp.bfloat16
        assert isinstance(bound.kernel, nnx.Param)

    def test_the_inputs_decide_without_a_rule_also_for_what_was_compiled_before(self):
        @jax.jit
        def weight_dtype(x):
            seen.append(bound.kernel[...].dtype.name)
            return x

        class Outer(nnx.Module):
            def __init__(self):
                self.kernel = nnx.Param(jnp.ones((2, 2)))

            def __call__(self, x, scale):
                return weight_dtype(scale)

        seen: list[str] = []
        bound = bind(Outer(), {"params": {"kernel": "f8_e4m3fn"}})
        for dtype in ("bfloat16", "float16"):
            bound(jnp.ones(2, dtype), jnp.ones(2))
        assert bound.kernel[...].dtype == jnp.float32
        assert seen == ["bfloat16", "float16"]

    def test_inputs_and_results_are_cast_once_and_only_by_the_method_that_is_called(self):
        bound = bind(Small(nnx.Rngs(0)), FP8, methods=("__call__", "doubled"))
        y = bound.doubled(X)
        assert (y.dtype, bound.seen) == (jnp.float32, "bfloat16")
        assert bits(y) == bits(applied(Small(nnx.Rngs(0)), FP8, X, method="doubled"))
        assert bound.up(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16

    def test_random_numbers_given_to_the_call_are_counted(self):
        bound = bind(nnx.Dropout(0.5), {"compute": "bf16"})
        rngs = nnx.Rngs(0)
        first, second = bound(X, rngs=rngs), bound(X, rngs=rngs)
        assert (first != second).any()

    def test_a_wide_parameter_can_be_written_and_a_narrow_one_cannot(self):
        bound = bind(Small(nnx.Rngs(0)), FP8)
        bound.up.bias[...] = jnp.full(6, 1 + 2**-12)
        bound.up.bias[0] = 3.0
        assert vars(bound.up)["bias"].get_raw_value().tolist() == [3.0] + [1 + 2**-12] * 5
        assert bound.up.bias[...].tolist() == [3.0] + [1.0] * 5
        with pytest.raises(
            UnsupportedCast, match=r"a narrow \(8, 6\) parameter of a bound module is read-only. Update"
        ):
            bound.up.kernel[...] = jnp.ones((8, 6))


class TestTransformations:
    def test_gradients_are_those_of_wide_parameters_in_their_stored_dtype(self):
        bound = bind(Small(nnx.Rngs(0)), FP8)
        gradient = nnx.grad(lambda bound: (bound(X) ** 2).sum())(bound)
        assert {path: g.dtype.name for path, g in parameters(gradient).items()} == {
            "up/bias": "float32",
            "down/bias": "float32",
        }
        assert all(np.abs(g).max() > 0 for g in parameters(gradient).values())

    def test_gradients_equal_those_through_apply(self):
        module = Small(nnx.Rngs(0))
        params, rest = nnx.split_state(FP8.store(nnx.state(module)), nnx.Param, ...)

        def through_apply(params):
            return (apply(module, FP8, nnx.merge_state(params, rest), X) ** 2).sum()

        found = nnx.jit(nnx.grad(lambda bound: (bound(X) ** 2).sum()))(bind(module, FP8))
        chex.assert_trees_all_equal(parameters(found), parameters(jax.jit(jax.grad(through_apply))(params)))

    @pytest.mark.slow
    def test_an_optimizer_trains_wide_parameters_and_no_narrow_bit(self):
        bound = bind(Net(nnx.Rngs(0)), FP8)
        optimizer = nnx.Optimizer(bound, optax.adam(1e-1), wrt=nnx.Param)
        assert {x.dtype.name for x in jax.tree.leaves(nnx.state(optimizer))} == {"float32", "int32", "uint32"}
        before = {path: bits(x) for path, x in parameters(bound).items()}

        @nnx.jit
        def step(bound, optimizer):
            loss, gradient = nnx.value_and_grad(lambda bound: ((bound(X) - 1.0) ** 2).mean())(bound)
            optimizer.update(bound, gradient)
            return loss

        with jax.numpy_dtype_promotion("standard"):
            losses = [step(bound, optimizer) for _ in range(10)]
        assert losses[-1] < losses[0]
        changed = {path for path, x in parameters(bound).items() if bits(x) != before[path]}
        narrow = {f"layers/{i}/{name}" for i in (0, 1) for name in ("kernel", "scale_inv")}
        assert changed == set(before) - narrow
        assert int(bound.count[...]) == 10
        assert (bound.norm.mean[...] != 0).any()

    @pytest.mark.slow
    def test_stacked_layers_are_scanned_and_rematerialised(self):
        @nnx.vmap(in_axes=(0,))
        def stack(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        class Deep(nnx.Module):
            def __init__(self):
                self.layers = stack(nnx.Rngs(0).split(3))

            def __call__(self, x):
                @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
                @nnx.remat
                def forward(layer, x):
                    assert layer.kernel.shape == (8, 8)
                    assert layer.kernel.dtype == jnp.bfloat16
                    return nnx.tanh(layer(x))

                return forward(self.layers, x)

        bound = bind(Deep(), FP8)
        assert bound.layers.scale_inv.shape == (3, 1, 1)
        expected = jnp.asarray(X, jnp.bfloat16)
        weights = FP8.to_compute(nnx.state(bound))["layers"]
        for i in range(3):
            expected = jnp.tanh(expected @ weights["kernel"][i] + weights["bias"][i])
        y = nnx.jit(lambda bound, x: bound(x))(bound, X)
        # The scan fuses otherwise than single operations: sums of bfloat16 values in float32 may be rounded later.
        chex.assert_trees_all_close(y, expected.astype(jnp.float32), atol=3 * 2.0**-8)
        gradient = nnx.grad(lambda bound: bound(X).sum())(bound)
        assert {path: x.shape for path, x in parameters(gradient).items()} == {"layers/bias": (3, 8)}

    def test_split_merge_and_clone_give_bound_modules(self):
        bound = bind(Small(nnx.Rngs(0)), FP8)
        for copy in (nnx.merge(*nnx.split(bound)), nnx.clone(bound), nnx.merge(*nnx.split(bound, Narrow, ...))):
            assert type(copy) is type(bound)
            assert bits(copy(X)) == bits(bound(X))

    def test_it_is_an_argument_of_jax_jit(self):
        bound = bind(Small(nnx.Rngs(0)), FP8)
        assert bits(jax.jit(lambda bound, x: bound(x))(bound, X)) == bits(bound(X))

    def test_the_program_holds_no_wide_kernel(self):
        bound = bind(nnx.Linear(256, 256, rngs=nnx.Rngs(0)), FP8)
        graphdef, state = nnx.split(bound)
        lowered = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, jnp.ones((1, 256)))
        arguments = [x for x in jax.tree.leaves(lowered.in_avals) if x.shape == (256, 256)]
        assert [x.dtype.name for x in arguments] == ["float8_e4m3fn"]


class TestNarrowCompute:
    policy = Policy({"kernel": "f8_e4m3fn"}, {"kernel": "f8_e4m3fn", "default": "bf16"}, "f32")

    def test_linear_layers_multiply_as_through_apply(self):
        module = Small(nnx.Rngs(0))
        bound = bind(module, self.policy)
        assert bits(bound(X)) == bits(applied(module, self.policy, X))
        assert (bound(X) != bind(module, self.policy.replace(compute="bf16"))(X)).any()

    def test_other_layers_are_refused_when_they_are_bound(self):
        with pytest.raises(UnsupportedCast, match=r"^layers/1/kernel: computing in f8_e4m3fn .* Conv multiplies wide"):
            bind(
                nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Conv(8, 3, (3,), rngs=nnx.Rngs(0))), self.policy
            )

    def test_another_read_of_the_kernel_is_an_error(self):
        bound = bind(Small(nnx.Rngs(0)), self.policy)
        with pytest.raises(UnsupportedCast, match=r"computes this \(8, 6\) kernel in f8_e4m3fn, .* read as an array"):
            jnp.sum(bound.up.kernel[...])

    @pytest.mark.slow
    def test_wide_kernels_train_with_straight_through_gradients(self):
        bound = bind(Small(nnx.Rngs(0)), self.policy.replace(params=None))
        optimizer = nnx.Optimizer(bound, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(bound, optimizer):
            loss, gradient = nnx.value_and_grad(lambda bound: ((bound(X) - 1.0) ** 2).mean())(bound)
            optimizer.update(bound, gradient)
            return loss, gradient

        with jax.numpy_dtype_promotion("standard"):
            first, gradient = step(bound, optimizer)
            for _ in range(10):
                last, _ = step(bound, optimizer)
        assert last < first
        assert {x.dtype.name for x in parameters(gradient).values()} == {"float32"}
        assert np.abs(gradient["up"]["kernel"][...]).max() > 0


class TestNarrowGradients:
    """Narrow kernels of bound modules are trained through proxies, as `perparam.training` gives them."""

    @pytest.mark.slow
    @pytest.mark.parametrize("compute", ["bf16", {"kernel": "f8_e4m3fn", "default": "bf16"}], ids=["wide", "narrow"])
    def test_they_are_those_through_apply(self, compute):
        policy, module = FP8.replace(compute=compute), Small(nnx.Rngs(0))
        found = nnx.jit(grad(lambda bound: (bound(X) ** 2).sum()))(bind(module, policy))
        through_apply = jax.jit(grad(lambda state: (apply(module, policy, state, X) ** 2).sum()))
        expected = parameters(through_apply(policy.store(nnx.state(module))))
        assert {path: x.dtype.name for path, x in expected.items()}["up/kernel"] == "float32"
        chex.assert_trees_all_equal(parameters(found), expected)
        assert all(np.abs(x).max() > 0 for x in expected.values())

    @pytest.mark.slow
    def test_an_optimizer_with_a_policy_trains_them(self):
        bound = bind(Small(nnx.Rngs(0)), FP8)
        optimizer = nnx.Optimizer(bound, with_policy(optax.adam(1e-2), FP8), wrt=nnx.Any(nnx.Param, Narrow))

        @nnx.jit
        def step(bound, optimizer):
            loss, gradient = value_and_grad(lambda bound: ((bound(X) - 1.0) ** 2).mean())(bound)
            optimizer.update(bound, gradient)
            return loss

        losses, before = [], bits(bound.up.kernel[...])
        for _ in range(10):
            losses.append(step(bound, optimizer))
        assert losses[-1] < losses[0]
        assert bits(bound.up.kernel[...]) != before
        assert FP8.explain(bound).to_json() == FP8.explain(bind(Small(nnx.Rngs(0)), FP8)).to_json()

    def test_a_narrow_backward_needs_narrow_compute(self):
        bound = bind(Small(nnx.Rngs(0)), FP8.replace(backward={"kernel": "f8_e5m2"}))
        with pytest.raises(
            UnsupportedCast, match=r"gradients of products in f8_e5m2 \(slot backward\) need a layer that"
        ):
            bound(X)


class ListOfArrays(nnx.Module):
    def __init__(self):
        self.kernels = nnx.data([nnx.Param(jnp.ones((2, 2)))])

    def __call__(self, x):
        return x @ self.kernels[0]


class Taken(nnx.Module):
    def __init__(self):
        self.kernel, self.scale_inv = nnx.Param(jnp.ones((2, 2))), 3.0

    def __call__(self, x):
        return x @ self.kernel * self.scale_inv


class SharedWithAChild(nnx.Module):
    """The kernel comes before the child, and its scales would come after it."""

    def __init__(self):
        self.lower = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.kernel = self.lower.kernel

    def __call__(self, x):
        return self.lower(x)


class TestRefusals:
    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (Small, r"bind expects an NNX module object, found Small. Pass the object, such as"),
            ({"kernel": jnp.ones(2)}, "bind expects an NNX module object, found dict"),
            (
                bind(Small(nnx.Rngs(0)), FP8),
                r"^this Small already has a policy, which cannot be replaced. Bind the module",
            ),
            (
                nnx.Sequential(Linear(2, 2, rngs=nnx.Rngs(0)), Linear(2, 2, rngs=nnx.Rngs(0))),
                "^layers/0: this Linear already has a policy",
            ),
            (
                nnx.Sequential(nnx.WeightNorm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))),
                "^layers/0: WeightNorm changes the variables of another layer",
            ),
            (
                ListOfArrays(),
                r"^kernels/0: bf16, computed in bf16, cannot be bound in a Python list or mapping. Use nnx.L",
            ),
        ],
        ids=["class", "dict", "bound", "policy", "weight norm", "list"],
    )
    def test_what_cannot_be_bound(self, module, message):
        with pytest.raises(UnsupportedCast, match=message):
            bind(module, "bf16")

    def test_a_method_that_the_module_does_not_have(self):
        with pytest.raises(UnsupportedCast, match=r"methods: Small has no method 'encode'. Name methods of its class"):
            bind(Small(nnx.Rngs(0)), FP8, methods=("encode",))

    def test_an_attribute_in_the_place_of_the_scales(self):
        with pytest.raises(
            UnsupportedCast, match=r"^kernel: Taken has an attribute 'scale_inv', which the scales would"
        ):
            bind(Taken(), {"params": {"kernel": "f8_e4m3fn"}})

    def test_a_shared_kernel_whose_scales_would_have_a_path_elsewhere(self):
        with pytest.raises(
            UnsupportedCast, match=r"^scale_inv: modules share this narrow parameter .* Store it in f32"
        ):
            bind(SharedWithAChild(), {"params": {"kernel": "f8_e4m3fn"}})

    def test_rules_without_effect(self):
        with pytest.raises(UnmatchedRule, match="'up/kernal'"):
            bind(Small(nnx.Rngs(0)), {"params": {"up/kernal": "bf16"}})
        with pytest.raises(ShadowedRule, match="'up/kernel'"):
            bind(Small(nnx.Rngs(0)), {"compute": {"kernel": "bf16", "up/kernel": "f32"}})
        with pytest.raises(UnmatchedRule, match="kv_cache: bf16 has no effect on Small"):
            bind(Small(nnx.Rngs(0)), {"kv_cache": "bf16"})

    def test_apply_does_not_replace_the_policy(self):
        bound = bind(Small(nnx.Rngs(0)), FP8)
        with pytest.raises(
            UnsupportedCast, match=r"this Small is bound to a policy, which cannot be replaced. Call the"
        ):
            apply(bound, FP8, nnx.state(bound), X)
