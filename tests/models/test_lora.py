"""Adapters beside frozen kernels: what they compute, what trains, and what stays bit for bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import FAMILIES, fields, relative_error
from flax import nnx
from jax.sharding import PartitionSpec

import perparam
from perparam.loaders import read_config
from perparam.models import Llama, Qwen2, Qwen3, Qwen3Moe, layers
from perparam.models.lora_layers import linear_layers
from perparam.models.sharding.model_sharding import ModelSharding
from perparam.policies import Narrow
from perparam.policies.errors import InvalidAdapter, UnmatchedRule, UnsupportedExport
from perparam.policies.trees import parameters
from perparam.training import add_lora, merge_lora

CLASSES = {"qwen3": Qwen3, "llama": Llama, "qwen2": Qwen2, "qwen3_moe": Qwen3Moe}
IDS = np.random.default_rng(0).integers(61, size=(2, 10)).astype(np.int32)
ALL = "layers/**"

EXACT = perparam.Policy(params={"kernel": "f8_e4m3fn", "default": "f32"}, compute={"default": "f32"}, output="f32")
"""FP8 kernels and float32 arithmetic."""

FLOAT32_ERROR = 1e-5
"""Sums of up to 76 float32 products in another order, 16 deep: sqrt(76 * 16) * 2**-24 = 2e-6."""

GRADIENT_ERROR = 1e-4
"""Twice as deep, and gradients are differences of larger terms: seen 4e-6. Without the base they are wrong by 0.5."""


@functools.cache
def model(family="qwen3", policy="fp8_weight_only", depth=1):
    """A model of few layers, the first of which has experts if its family has them."""
    changes = {"quantization_config": None, "num_hidden_layers": depth, "max_window_layers": None}
    config = read_config(fields(**FAMILIES[family] | {"mlp_only_layers": None} | changes))
    return CLASSES[family](config, policy=policy, rngs=nnx.Rngs(0))


def adapted(family="qwen3", policy="fp8_weight_only", targets=ALL, seed=2, depth=1):
    """A model whose adapters have random `lora_b`; seed 0: zeros."""
    changed = add_lora(model(family, policy, depth), 3, 6, targets, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(seed)
    for layer in linear_layers(changed).values():
        if layer.adapter is not None and seed:
            drawn = rng.normal(size=layer.lora_b.shape, scale=0.1)
            layer.lora_b.set_value(jnp.asarray(drawn, layer.lora_b.dtype))
    return changed


def bits(tree):
    return {path: np.asarray(array).tobytes() for path, array in parameters(tree).items()}


@nnx.jit
def outputs(model):
    return model(IDS)


@nnx.jit
def loss_and_gradients(model):
    def loss(model):
        logits = model(IDS).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]).mean()

    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("qwen3_moe", "fp8_weight_only"),
        pytest.param("llama", "fp8_dynamic", marks=pytest.mark.slow),
        *(pytest.param(family, "f32", marks=pytest.mark.thorough) for family in ("qwen2", "qwen3", "qwen3_moe")),
    ],
)
def test_new_adapters_change_no_bit_of_the_outputs_and_no_parameter(family, policy):
    base = model(family, policy)
    before, new = bits(base), adapted(family, policy, seed=0)
    assert np.asarray(outputs(new)).tobytes() == np.asarray(outputs(base)).tobytes()
    after = bits(new)
    added = after.keys() - before.keys()
    assert {path.rpartition("/")[2] for path in added} == {"lora_a", "lora_b"}
    assert len(added) == 2 * sum(path.startswith("layers/") for path in linear_layers(base))
    assert {path: after[path] for path in before} == before == bits(base)


def test_adapters_are_drawn_as_by_peft():
    """`kaiming_uniform_(a=sqrt(5))` of torch is uniform between ±1/sqrt(in), by its formula gain * sqrt(3 / in)."""
    layer = perparam.Linear(400, 30, rngs=nnx.Rngs(0))
    new = add_lora(layer, 50, 8, "**", rngs=nnx.Rngs(1))
    lora_a = np.asarray(new.lora_a[...])
    bound = np.sqrt(2 / (1 + 5)) * np.sqrt(3 / 400)
    assert lora_a.shape == (50, 400)
    assert 0.99 * bound < np.abs(lora_a).max() <= bound * (1 + 2**-23)
    assert abs(lora_a.std() / (bound / np.sqrt(3)) - 1) < 0.02  # 20,000 draws: 4 standard errors of 0.45 / sqrt(20000)
    assert not np.asarray(new.lora_b[...]).any()
    assert new.lora_b.shape == (30, 50)
    assert type(new.lora_a) is type(new.lora_b) is nnx.LoRAParam


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_computes_the_kernel_and_the_scaled_product_of_its_adapter(rslora):
    layer = perparam.Linear(40, 24, use_bias=True, policy="f32", rngs=nnx.Rngs(0))
    new = add_lora(layer, 4, 6, "**", rngs=nnx.Rngs(1), rslora=rslora)
    rng = np.random.default_rng(0)
    new.lora_b.set_value(jnp.asarray(rng.normal(size=(24, 4)), jnp.float32))
    new.bias.set_value(jnp.asarray(rng.normal(size=24), jnp.float32))
    x = rng.normal(size=(5, 40)).astype(np.float32)
    kernel, bias, lora_a, lora_b = (
        np.asarray(each[...], np.float64) for each in (new.kernel, new.bias, new.lora_a, new.lora_b)
    )
    expected = x @ (kernel + (6 / 2 if rslora else 6 / 4) * lora_b @ lora_a).T + bias
    assert relative_error(np.asarray(new(x)), expected) < FLOAT32_ERROR


@pytest.mark.parametrize(
    "family", [pytest.param("qwen3", marks=pytest.mark.thorough), pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def test_a_model_with_adapters_has_the_outputs_of_the_merged_dense_model(family):
    """Experts and shared launches included: the dense model has no adapters at all."""
    changed = adapted(family, EXACT)
    dense, _ = merge_lora(changed.with_policy("f32"))
    found, expected, without = (np.asarray(outputs(each)) for each in (changed, dense, model(family, EXACT)))
    assert relative_error(found, expected) < FLOAT32_ERROR < 0.05 < relative_error(without, expected)


# Training.


@functools.cache
def dense_gradients():
    """The gradients of the adapters of a model without bypasses: float32 autodiff through kernel + scaling * B A."""
    changed = adapted(policy=EXACT, depth=2)
    dense = model(policy=EXACT, depth=2).with_policy("f32")
    graphdef, state = nnx.split(dense)
    layers = {path: layer for path, layer in linear_layers(changed).items() if layer.adapter is not None}

    def loss(adapters):
        leaves = []
        for keys, leaf in nnx.to_flat_state(state):
            path = "/".join(map(str, keys)).removesuffix("/kernel")
            if path in adapters:
                delta = jnp.matmul(adapters[path][1], adapters[path][0], precision="highest")
                leaf = leaf.replace(leaf[...] + jnp.float32(layers[path].adapter.scaling) * delta)
            leaves.append((keys, leaf))
        logits = nnx.merge(graphdef, nnx.from_flat_state(leaves))(IDS)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]).mean()

    adapters = {path: (layer.lora_a[...], layer.lora_b[...]) for path, layer in layers.items()}
    return jax.jit(jax.grad(loss))(adapters)


def errors(gradients, layer):
    """The relative errors of the gradients of a layer's adapters."""
    expected = dense_gradients()
    return [
        relative_error(np.asarray(leaf[...]), np.asarray(expected[path.rpartition("/")[0]][path.endswith("lora_b")]))
        for keys, leaf in nnx.to_flat_state(gradients)
        if (path := "/".join(map(str, keys))).startswith(f"layers/{layer}/")
    ]


@pytest.mark.slow
def test_gradients_of_the_first_layers_adapters_flow_through_the_frozen_bases():
    _, gradients = loss_and_gradients(adapted(policy=EXACT, depth=2))
    for layer in (0, 1):
        assert len(found := errors(gradients, layer)) == 14
        assert max(found) < GRADIENT_ERROR


@pytest.mark.slow
def test_the_comparison_of_gradients_notices_a_base_that_lets_none_through(monkeypatch):
    """The fault that most tests of LoRA pass: gradients reach earlier layers through the adapters only."""
    dense_gradients()
    for name in ("scaled_matmul", "scaled_matmuls"):
        product = getattr(layers, name)
        monkeypatch.setattr(
            layers, name, lambda x, *rest, product=product, **how: product(jax.lax.stop_gradient(x), *rest, **how)
        )
    _, gradients = loss_and_gradients.__wrapped__(adapted(policy=EXACT, depth=2))
    assert min(errors(gradients, 0)) > 100 * GRADIENT_ERROR


@nnx.jit
def step(model, optimizer):
    loss, gradients = loss_and_gradients(model)
    optimizer.update(model, gradients)
    return loss, gradients


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        pytest.param("qwen3_moe", "fp8_dynamic", marks=pytest.mark.slow),
        pytest.param("qwen3", "fp8_weight_only", marks=pytest.mark.thorough),
    ],
)
def test_training_changes_the_adapters_and_no_bit_of_the_base(family, policy):
    trained = adapted(family, policy, seed=0)
    before = bits(trained)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies by Python numbers
        optimizer = nnx.Optimizer(trained, optax.adam(1e-2), wrt=nnx.LoRAParam)
        losses = []
        for _ in range(4):
            loss, gradients = step(trained, optimizer)
            losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    after = bits(trained)
    changed = {path for path in before if after[path] != before[path]}
    # Experts that no token has chosen keep theirs, but a stack of them changes.
    assert changed == {path for path in before if "/lora_" in path}
    assert {type(leaf) for _, leaf in nnx.to_flat_state(gradients)} == {nnx.LoRAParam}
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(trained, nnx.LoRAParam)))
    floats = [x for x in jax.tree.leaves(nnx.state(optimizer)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert sum(x.size for x in floats) == 2 * count  # two moments, of the adapters alone
    assert bits(model(family, policy)) == {path: each for path, each in before.items() if "/lora_" not in path}


def test_adapters_are_all_of_their_variable_type_and_kernels_are_narrow():
    changed = adapted()
    assert all("lora_" in keys[-1] for keys, _ in nnx.to_flat_state(nnx.state(changed, nnx.LoRAParam)))
    assert isinstance(changed.layers[0].self_attn.q_proj.kernel, Narrow)


# What goes on working.


def test_projections_of_the_same_x_share_a_launch_whether_they_have_adapters_or_not(monkeypatch):
    together, product = [], layers.scaled_matmuls
    monkeypatch.setattr(
        layers, "scaled_matmuls", lambda x, kernels, **how: together.append(len(kernels)) or product(x, kernels, **how)
    )
    jax.eval_shape(adapted(targets=["layers/0/self_attn/{q,v}_proj", "layers/0/mlp/up_proj"]), IDS)
    assert together == [3, 2]


def test_other_policies_keep_the_adapters_and_decide_on_their_dtypes():
    changed = adapted()
    policy = {
        "params": {"lora_a": "bf16", "kernel": None, "default": None},
        "compute": {"lora_b": "f16", "default": "f32"},
    }
    again = changed.with_policy(policy)
    layer, before = (each.layers[0].mlp.up_proj for each in (again, changed))
    assert (layer.lora_a.dtype, layer.lora_b.dtype) == (jnp.bfloat16, jnp.float32)
    assert (layer.adapter.rank, layer.adapter.alpha) == (before.adapter.rank, before.adapter.alpha)
    assert layer.adapter.computes == (np.float32, np.float16)
    assert before.adapter.computes == (jnp.bfloat16, jnp.bfloat16)
    chex.assert_trees_all_equal(layer.lora_b[...], before.lora_b[...])
    assert isinstance(layer.lora_a, nnx.LoRAParam)
    f32 = changed.with_policy("f32")
    assert isinstance(f32.layers[0].mlp.up_proj.kernel, nnx.Param)
    assert f32.layers[0].mlp.up_proj.adapter is not None


def test_a_rule_of_the_models_policy_decides_on_the_dtype_of_new_adapters():
    config = read_config(fields(quantization_config=None))
    policy = {"params": {"lora_b?": "f16", "kernel": "f8_e4m3fn", "default": "bf16"}, "compute": "bf16"}
    layer = add_lora(Qwen3(config, policy=policy, rngs=nnx.Rngs(0)), 2, 4, "q_proj", rngs=nnx.Rngs(1)).layers[0]
    assert (layer.self_attn.q_proj.lora_a.dtype, layer.self_attn.q_proj.lora_b.dtype) == (jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize("slot", ["params", "compute"])
def test_narrow_adapters_are_refused(slot):
    config = read_config(fields(quantization_config=None, num_hidden_layers=1))
    rules = {"**/*norm/scale": None, "layers/**": "f8_e4m3fn"}
    policy = {slot: rules if slot == "params" else rules | {"default": "bf16"}}
    base = Qwen3(config, policy=policy, rngs=nnx.Rngs(0))
    with pytest.raises(InvalidAdapter, match=r"q_proj/lora_a: the policy asks f8_e4m3fn .* such as 'lora_a\?"):
        add_lora(base, 2, 4, "q_proj", rngs=nnx.Rngs(1))


@pytest.mark.thorough
def test_generation_follows_the_adapters():
    changed = adapted(policy=EXACT)
    dense, _ = merge_lora(changed.with_policy("f32"))
    tokens, expected, without = (
        np.asarray(perparam.generate(each, [[3, 5, 7]], max_new_tokens=6))
        for each in (changed, dense, model(policy=EXACT))
    )
    np.testing.assert_array_equal(tokens, expected)
    assert (tokens != without).any()


def test_the_summary_and_the_plan_have_the_adapters():
    changed, size = adapted(), model().summary().plan.total_bytes
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(changed, nnx.LoRAParam)))
    assert changed.summary().plan.total_bytes == size + 4 * count
    assert "layers/0/self_attn/q_proj/lora_a" in {row.path for row in perparam.Policy().explain(changed)}


@pytest.mark.slow
def test_init_and_apply_take_a_factory_that_adds_adapters():
    config = read_config(fields(quantization_config=None, num_hidden_layers=1))

    def module(policy, rngs):
        return add_lora(Qwen3(config, policy=policy, rngs=rngs), 2, 4, ["q_proj", "up_proj"], rngs=rngs)

    policy = perparam.get_policy("fp8_weight_only")
    variables = perparam.init(module, policy, jax.random.key(0))
    trainable, frozen = perparam.training.partition(variables, ["lora_a", "lora_b"])

    def loss(trainable):
        logits = perparam.apply(module, policy, perparam.training.combine(trainable, frozen), IDS)
        return jnp.square(logits.astype(jnp.float32)).mean()

    gradients = jax.jit(jax.grad(loss))(trainable)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, trainable)
    assert len(jax.tree.leaves(gradients)) == 4
    assert np.asarray(gradients["layers"][0]["self_attn"]["q_proj"]["lora_b"][...]).any()


def test_a_checkpoint_of_the_model_refuses_adapters_until_they_are_merged(tmp_path):
    changed = adapted()
    with pytest.raises(UnsupportedExport, match=r"no name for 14 parameters: .*lora_a.*merge_lora.*save_lora"):
        perparam.save_model(changed, tmp_path / "saved")
    merged, _ = merge_lora(changed)
    with pytest.warns(perparam.loaders.ExportWarning):
        again = perparam.load_model(perparam.save_model(merged, tmp_path / "saved"), "fp8_weight_only")
    assert bits(again) == bits(merged)


# Targets.


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["layers/0/self_attn/q_proj", "layers/1/self_attn/q_proj"]),
        (["layers/1/mlp/*_proj", "lm_head"],
         ["layers/1/mlp/down_proj", "layers/1/mlp/gate_proj", "layers/1/mlp/up_proj", "lm_head"]),
        (["layers/{0,1}/self_attn/o_proj", "nothing?"], ["layers/0/self_attn/o_proj", "layers/1/self_attn/o_proj"]),
    ],
)  # fmt: skip
def test_targets_are_patterns_of_the_paths_of_linear_layers(targets, expected):
    changed = add_lora(model(depth=2), 2, 4, targets, rngs=nnx.Rngs(0))
    assert [path for path, layer in linear_layers(changed).items() if layer.adapter is not None] == expected


def test_experts_and_their_router_are_targets():
    changed = add_lora(model("qwen3_moe"), 2, 4, "layers/0/mlp/**", rngs=nnx.Rngs(0))
    mlp = changed.layers[0].mlp
    assert mlp.gate.lora_a.shape == (2, 56)
    assert (mlp.experts.down_proj.lora_a.shape, mlp.experts.down_proj.lora_b.shape) == ((5, 2, 40), (5, 56, 2))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("q_prjo", r"'q_prjo' \(targets\) matches none of 8 linear layers\.\s+nearest: q_proj\s+Correct the pattern"),
        ("layers/0/mlp/up_prj", r"nearest: layers/0/mlp/up_proj"),
        ("layers/**/kernel", r"Targets are layers, not their parameters: write the pattern without '/kernel'"),
        ("q_proj/kernel", r"Targets are layers, not their parameters: write the pattern without '/kernel'"),
        ("all-linear", r"matches none .* Targets are patterns of the paths of layers: write '\*\*' for all"),
        (".*q_proj", r"Patterns are globs, not regular expressions: .* A name such as 'q_proj' is of all layers"),
        ("self_attn.q_proj", r"Paths have '/' between names: write '\*\*/self_attn/q_proj'"),
        ("layers/*/self_attn", r"matches modules with linear layers in them, such as layers/0/self_attn/k_proj: add"),
        ("embed_tokens", r"embed_tokens is of class Embedding, and only linear layers can have adapters"),
        ("layers/0/input_layernorm", r"is of class RMSNorm, and only linear layers can have adapters"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_an_error(target, text):
    with pytest.raises(UnmatchedRule, match=text):
        add_lora(model(), 2, 4, ["q_proj", target], rngs=nnx.Rngs(0))


def test_a_tied_head_is_no_target():
    tied = Qwen3(
        read_config(fields(quantization_config=None, num_hidden_layers=1, tie_word_embeddings=True)),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(UnmatchedRule, match=r"'lm_head'.*The head of this model is its embedding, and only linear"):
        add_lora(tied, 2, 4, "lm_head", rngs=nnx.Rngs(0))


def test_no_target_at_all_is_an_error():
    with pytest.raises(UnmatchedRule, match=r"none of \['nothing\?'\] matches a linear layer, such as"):
        add_lora(model(), 2, 4, "nothing?", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("rank", "alpha"), [(0, 4), (2.0, 4), (2, 0), (2, -1), (2, float("nan"))])
def test_ranks_and_alphas_that_are_not_positive_are_refused(rank, alpha):
    with pytest.raises(InvalidAdapter, match=r"found rank .* and alpha .* Usual values are 8 and 16"):
        add_lora(model(), rank, alpha, "q_proj", rngs=nnx.Rngs(0))


def test_arguments_of_another_kind_are_refused():
    layer = perparam.Linear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(InvalidAdapter, match=r"found rank 2 and alpha '4'\. Usual"):
        add_lora(layer, 2, "4", "**", rngs=nnx.Rngs(0))
    with pytest.raises(InvalidAdapter, match=r"rngs: expected random keys of NNX, found 0\. Write nnx\.Rngs\(0\)"):
        add_lora(layer, 2, 4, "**", rngs=0)
    for targets in (None, {"q_proj": 8}):
        with pytest.raises(InvalidAdapter, match=r"targets: expected patterns of the paths .* Write \"q_proj\""):
            add_lora(layer, 2, 4, targets, rngs=nnx.Rngs(0))
    adapter = add_lora(layer, np.int64(2), np.float32(4), "**", rngs=nnx.Rngs(0)).adapter
    assert (adapter.rank, adapter.alpha) == (2, 4.0)


def test_a_module_without_linear_layers_of_perparam_is_an_error():
    with pytest.raises(UnmatchedRule, match=r"Sequential has no linear layers of perparam, such as .* Build it"):
        add_lora(nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0))), 2, 4, "layers/0", rngs=nnx.Rngs(0))


def test_a_layout_with_patterns_of_other_parameters_takes_adapters():
    mesh = jax.make_mesh((1,), ("model",))
    layout = ModelSharding(mesh, {}, {"embed_tokens/embedding": PartitionSpec("model"), "lora_b?": PartitionSpec()})
    base = model().with_policy("f32")
    base.sharding = layout
    assert add_lora(base, 2, 4, "q_proj", rngs=nnx.Rngs(0)).layers[0].self_attn.q_proj.adapter.rank == 2


def test_a_layer_gets_one_adapter():
    changed = adapted(targets="q_proj")
    more = add_lora(changed, 5, 10, "k_proj", rngs=nnx.Rngs(0))
    assert (more.layers[0].self_attn.q_proj.adapter.rank, more.layers[0].self_attn.k_proj.adapter.rank) == (3, 5)
    with pytest.raises(InvalidAdapter, match=r"layers/0/self_attn/k_proj: the layer has an adapter of rank 5\. Merge"):
        add_lora(more, 5, 10, "**/self_attn/*", rngs=nnx.Rngs(0))
