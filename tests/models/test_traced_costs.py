"""The collectives of `step_costs` are those of the traced program: their number, devices and bytes."""

import collections
import math

import checkpoints
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from perparam.loaders.families import family_of
from perparam.loaders.from_config import open_config
from perparam.models import expert_parallel, fsdp, fsdp_tensor_parallel, tensor_parallel
from perparam.models.decoder import assemble
from perparam.models.sharding.costs import step_costs
from perparam.policies import get_policy
from perparam.policies.resolved import resolve

FIELDS = {
    "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "vocab_size": 512, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 64]},
}  # fmt: skip
"""Each of four devices has whole blocks, also of 128 columns of activations; of 384 columns a block and a half."""

ROUTER = ["model.layers.1.mlp.gate"]
KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all",
}


def opened(folder, family, **changes):
    fields = {**checkpoints.FIELDS, **checkpoints.FAMILIES[family], **FIELDS, **changes}
    if family == "qwen3_moe":
        fields["quantization_config"] = {**FIELDS["quantization_config"], "modules_to_not_convert": ROUTER}
    else:
        fields = {name: value for name, value in fields.items() if "expert" not in name and "moe" not in name}
    return open_config(
        checkpoints.write(folder, {k: x for k, x in fields.items() if x is not None}, {}) / "config.json"
    )


def equations(jaxpr):
    """All equations of a program; of those for several platforms the last one, which is not for CPUs."""
    for equation in jaxpr.eqns:
        inner = [each for value in equation.params.values() for each in jax.tree.leaves(value, is_leaf=is_jaxpr)]
        jaxprs = [getattr(each, "jaxpr", each) for each in inner if is_jaxpr(each)]
        for each in jaxprs[-1:] if equation.primitive.name == "cond" else jaxprs:
            yield from equations(each)
        yield equation


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def traced(model, layout, policy, rows, new, past):
    """{(kind, devices, bytes): number} of the collectives of numbers that are no integers."""
    resolved = resolve(get_policy(policy), model.tree)
    arrays = {path: jax.ShapeDtypeStruct(info.shape, info.dtype) for path, info in resolved.stored.items()}
    whole = assemble(family_of(model.config).model, model.config, resolved, arrays, sharding=layout)
    graphdef, state = nnx.split(whole)

    def step(state, ids, cache):
        model = nnx.merge(graphdef, state)
        hidden, _ = model.hidden(ids, None, cache)
        return model.logits(hidden[:, -1])

    cache = jax.eval_shape(lambda: whole.empty_cache(rows, past + new))
    ids = jax.ShapeDtypeStruct((rows, new), jnp.int32)
    found = collections.Counter()
    for equation in equations(jax.make_jaxpr(step)(state, ids, cache).jaxpr):
        if (kind := KINDS.get(equation.primitive.name)) is None:
            continue
        names = equation.params.get("axes") or equation.params["axis_name"]
        devices = math.prod(layout.mesh.shape[name] for name in ([names] if isinstance(names, str) else names))
        avals = [operand.aval for operand in equation.invars]
        if "ragged" in equation.primitive.name:  # the other side has room for the rows of all devices
            avals = [min(avals[:2], key=lambda aval: aval.size)]
        for aval in avals:
            if aval.dtype == jnp.uint8 or jnp.issubdtype(aval.dtype, jnp.floating):
                size = aval.size * aval.dtype.itemsize * (devices if kind == "all-gather" else 1)
                found[kind, devices, size] += 1
    return found


def mesh(**axes):
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


LAYOUTS = {
    "tensor parallel": tensor_parallel(mesh(data=2, model=4)),
    "FSDP": fsdp(mesh(data=4)),
    "both": fsdp_tensor_parallel(mesh(data=2, model=4)),
    "experts": expert_parallel(mesh(data=2, model=4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("family", "policy"), [("qwen3", None), ("qwen3", "fp8_dynamic"), ("qwen3_moe", None), ("llama", "bf16")]
)
def test_each_collective_of_a_program_is_counted(layout, family, policy, tmp_path):
    model, step = opened(tmp_path, family), {"rows": 8, "new": 3, "past": 5}
    costs = step_costs(model.config, LAYOUTS[layout], resolve(get_policy(policy), model.tree), **step)
    counted = collections.Counter((each.kind, each.devices, each.bytes) for each in costs.collectives)
    assert traced(model, LAYOUTS[layout], policy, **step) == counted
    assert bool(counted) == (layout != "experts" or family == "qwen3_moe")


def test_a_batch_that_does_not_divide_is_not_divided(tmp_path):
    model, step = opened(tmp_path, "qwen3_moe"), {"rows": 3, "new": 1, "past": 5}
    for layout in (LAYOUTS["tensor parallel"], LAYOUTS["experts"]):
        costs = step_costs(model.config, layout, resolve(get_policy(None), model.tree), **step)
        counted = collections.Counter((each.kind, each.devices, each.bytes) for each in costs.collectives)
        assert traced(model, layout, None, **step) == counted
        assert {kind for kind, *_ in counted} == {"all-reduce"}
