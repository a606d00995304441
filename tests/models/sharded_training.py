"""A program for eight devices: models trained over several meshes, with a line of JSON for each.

A line is `{"name", "losses", "fell", "misplaced", "gathers", "plan", "allocated", "whole", "collectives"}`: the largest
relative difference of a loss from that of one device; the last loss over the first; arrays of the optimizer's state
that are not divided as their parameter; the float all-gathers of a training step whose result has the shape of a
narrow kernel; the bytes of parameters and optimizer on one device by the plan, those that are allocated before and
after training, and those of one copy of all; the collectives of a step. Or it is `{"name", "raised"}`.
"""

import json
import re
import sys
import traceback

import jax
import numpy as np
import optax
from flax import nnx
from sharded_models import IDS, collectives, folder_of, mesh
from trainings import divided, loss_of

import perparam
from perparam.models import expert_parallel, fsdp, fsdp_tensor_parallel, shardings, tensor_parallel
from perparam.policies import parameters
from perparam.training import add_lora, value_and_grad, with_policy

STEPS = 4
EPSILON = 1e-3
"""Of Adam: without it, a gradient that is zero but for rounding would move its parameter by the whole learning rate."""

F32 = {"compute": {"kernel": None, "default": "f32"}, "output": "f32"}
MASTERS = perparam.Policy({"kernel": None, "default": "f32"}, **F32, master="f32")
EIGHT_BITS = MASTERS.replace(opt_state={"nu/**/kernel": "dynamic8", "default": "f32"})
OVER_FP8 = perparam.Policy({"kernel": None, "default": "f32"}, **F32)


def layouts():
    """`(name, family, sharding, policy)`."""
    yield "masters, both", "qwen3", fsdp_tensor_parallel(mesh(2, 4)), MASTERS
    yield "masters, tensor parallel", "qwen3", tensor_parallel(mesh(2, 4)), MASTERS
    yield "masters, FSDP", "qwen3", fsdp(mesh(2, 4)), MASTERS
    yield "8-bit moments, both", "qwen3", fsdp_tensor_parallel(mesh(2, 4)), EIGHT_BITS
    yield "LoRA, both", "qwen3", fsdp_tensor_parallel(mesh(2, 4)), OVER_FP8
    yield "LoRA, tensor parallel", "qwen3", tensor_parallel(mesh(2, 4)), OVER_FP8
    yield "masters, tokens travel", "qwen3_moe", expert_parallel(mesh(2, 4)), MASTERS.replace(block=(32, 32))


def train(model, policy, lora):
    """`(losses, first, last, frozen, text)`: the training states before and after, and the text of the program."""
    graphdef, trainable, frozen = divided(model, lora)
    tx = with_policy(optax.adam(1e-3, eps=EPSILON), policy)

    def loss(trainable):
        return loss_of(nnx.merge(graphdef, nnx.State(trainable), nnx.State(frozen))(IDS), IDS)

    @jax.jit
    def steps(trainable, state):
        def step(carry, _):
            trainable, state = carry
            value, gradients = value_and_grad(loss)(trainable)
            updates, state = tx.update(gradients, state, trainable)
            return (optax.apply_updates(trainable, updates), state), value

        return jax.lax.scan(step, (trainable, state), None, length=STEPS)

    first = trainable, tx.init(trainable)
    compiled = steps.lower(*first).compile()
    last, losses = compiled(*first)
    return np.asarray(losses).tolist(), first, last, frozen, compiled.as_text()


def misplaced(trainable, state):
    """The arrays of an optimizer's state with the shape of their parameter that are divided in another way."""
    wanted = parameters(trainable)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in keys)
        for path, array in wanted.items():
            of_parameter = f"/{path}/" in f"/{names}/" and leaf.shape == array.shape
            if of_parameter and not leaf.sharding.is_equivalent_to(array.sharding, array.ndim):
                yield f"{names}: {leaf.sharding} for {array.sharding}"


def wide_gathers(text, shapes):
    """The all-gathers of floats in a compiled program whose result has one of the shapes."""
    for dtype, dims in re.findall(r"= \(?(f32|bf16|f16)\[([\d,]+)\][^=]*? all-gather(?:-start)?\(", text):
        if tuple(map(int, dims.split(","))) in shapes:
            yield f"{dtype}[{dims}]"


def on_one_device(*trees):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(trees))


def report(name, family, sharding, policy):
    """Prints the line of a layout."""
    try:
        lora = name.startswith("LoRA")
        models = [perparam.load_model(folder_of(family), policy, sharding=each) for each in (None, sharding)]
        if lora:
            models = [add_lora(model, 4, 8, "layers/**", rngs=nnx.Rngs(1)) for model in models]
        (wanted, *_), (losses, first, last, frozen, text) = (train(model, policy, lora) for model in models)
        model, tx = models[1], with_policy(optax.adam(1e-3, eps=EPSILON), policy)
        plan = policy.explain(
            model, sharding=lambda stored: shardings(sharding, model.config, stored), optimizer=tx,
            trainable="**/lora_{a,b}" if lora else "**",
        )  # fmt: skip
        narrow = {x.shape for x in parameters(nnx.state(model)).values() if x.dtype == "float8_e4m3fn"}
        line = {
            "losses": max(abs(a - b) / b for a, b in zip(losses, wanted, strict=True)),
            "fell": wanted[-1] / wanted[0],
            "misplaced": [*misplaced(*first), *misplaced(*last)][:3],
            "gathers": sorted(wide_gathers(text, narrow)),
            "plan": plan.device_bytes + plan.training.device_bytes,
            "allocated": [on_one_device(*first, frozen), on_one_device(*last, frozen)],
            "whole": plan.total_bytes + plan.training.optimizer_bytes,
            "collectives": collectives(text),
        }
    except Exception as problem:  # the others still run
        traceback.print_exc(file=sys.stderr)
        line = {"raised": f"{type(problem).__name__}: {problem}"}
    print(json.dumps({"name": name, **line}), flush=True)


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    for layout in layouts():
        if layout[0] in sys.argv[2:]:
            report(*layout)
