"""A program for eight devices: `next_token_loss` of models over several meshes, with a line of JSON for each.

A line is `{"name", "loss", "gradient", "placed", "gathers", "slices", "divided"}`: the relative errors of the loss and
of the worst gradient against one device; whether each gradient is divided as its parameter; the all-gathers of a step
whose result has the shape of the whole head or of a device's rows of it, and the number of those of a slice; whether
the head's own layout is used. Or it is `{"name", "raised"}`.
"""

import json
import re
import sys
import traceback

import jax
import numpy as np
from flax import nnx
from sharded_models import IDS, MASK, folder_of, mesh

import perparam
from perparam.models import fsdp, fsdp_tensor_parallel, losses, tensor_parallel
from perparam.training import add_lora, next_token_loss, value_and_grad

F32 = perparam.Policy(compute="f32", output="f32")
FP8 = perparam.Policy(
    {"**/{kernel,embedding}": "f8_e4m3fn", "default": "f32"}, compute="f32", output="f32", block=(96, 96)
)
"""512 rows on four devices are 128 each, and 256 columns on two are 128: a block and a third."""

CHUNK = 48


def layouts():
    """`(name, sharding, policy, rows of the batch)`."""
    yield "both", fsdp_tensor_parallel(mesh(2, 4)), F32, 8
    yield "tensor parallel", tensor_parallel(mesh(2, 4)), F32, 8
    yield "FSDP", fsdp(mesh(2, 4)), F32, 8
    yield "narrow, both", fsdp_tensor_parallel(mesh(2, 4)), FP8, 8
    yield "narrow, tensor parallel", tensor_parallel(mesh(2, 4)), FP8, 8
    yield "LoRA, both", fsdp_tensor_parallel(mesh(2, 4)), F32, 8
    yield "a batch that is not divided", fsdp_tensor_parallel(mesh(2, 4)), F32, 7


def step_of(model, rows):
    """`(loss, gradients)` of one step, compiled, with the text of the program."""
    graphdef, state = nnx.split(model)
    trainable = "**/lora_{a,b}" if any("lora_a" in keys for keys, _ in nnx.to_flat_state(state)) else "**"

    @jax.jit
    def step(state):
        def loss(state):
            return next_token_loss(nnx.merge(graphdef, nnx.State(state)), IDS[:rows], MASK[:rows], chunk=CHUNK)

        return value_and_grad(loss, trainable=trainable)(state)

    arguments = nnx.to_pure_dict(state)
    compiled = step.lower(arguments).compile()
    return arguments, compiled(arguments), compiled.as_text()


def report(name, sharding, policy, rows):
    """Prints the line of a layout."""
    found = []
    original = losses.layout_of
    losses.layout_of = lambda *arguments: found.append(original(*arguments)) or found[-1]
    try:
        models = [perparam.load_model(folder_of("qwen3"), policy, sharding=each) for each in (None, sharding)]
        if name.startswith("LoRA"):
            models = [add_lora(model, 4, 8, "lm_head", rngs=nnx.Rngs(1)) for model in models]
            for model in models:
                model.lm_head.lora_b[...] = jax.numpy.sin(jax.numpy.arange(512.0 * 4)).reshape(512, 4)
        (_, (wanted, exact), _), (state, (loss, gradients), text) = (step_of(model, rows) for model in models)
        of = dict(jax.tree_util.tree_leaves_with_path(state))
        pairs = [
            (np.asarray(one), other, of[keys])
            for (keys, other), one in zip(
                jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(exact), strict=True
            )
        ]
        shapes = {(512, 256), (128, 256)}
        gathers = re.findall(r"= \(?(?:f32|bf16|f16|u16|u8|f8\w+)\[([\d,]+)\][^=]*? all-gather(?:-start)?\(", text)
        line = {
            "loss": abs(float(loss) - float(wanted)) / float(wanted),
            "gradient": max(float(np.linalg.norm(a - np.asarray(b)) / np.linalg.norm(a)) for a, b, _ in pairs),
            "placed": all(b.sharding.is_equivalent_to(c.sharding, b.ndim) for _, b, c in pairs),
            "gathers": [each for each in gathers if tuple(map(int, each.split(","))) in shapes],
            "slices": sum(each in (f"{CHUNK},256", "96,256") for each in gathers),
            "divided": found[-1] is not None,
        }
    except Exception as problem:  # the others still run
        traceback.print_exc(file=sys.stderr)
        line = {"raised": f"{type(problem).__name__}: {problem}"}
    finally:
        losses.layout_of = original
    print(json.dumps({"name": name, **line}), flush=True)


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    for layout in layouts():
        if layout[0] in sys.argv[2:]:
            report(*layout)
