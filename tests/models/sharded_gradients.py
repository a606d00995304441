"""A program for eight devices: gradients of narrow kernels that are divided, one line of JSON for each layout. Run by
test_sharded_gradients.py, which has the names of layouts.

A line is `{"name", "loss", "gradient", "worst", "elsewhere", "narrow", "same"}`: the relative errors of a loss and of
the worst of its gradients against one device, and its path; the parameters whose gradient is divided otherwise than
they are; the number of gradients of narrow kernels; and whether the same parameters have gradients.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sharded_models import IDS, expert_parallel, folder_of, fsdp_tensor_parallel, mesh, tensor_parallel

import perparam
from perparam.training import Narrow, value_and_grad

F32 = {"params": {"lm_head/kernel": "f32", "kernel": None, "default": "f32"}, "compute": "f32", "output": "f32"}
NARROW_TABLE = F32 | {"params": {"**/embedding": "int8"} | F32["params"], "block": (128, 128)}
BACKWARD = F32 | {"backward": {"**/q_proj/kernel": "f8_e4m3fn", "**/o_proj/kernel": "f8_e4m3fn"}}
LAYOUTS = {
    "FSDP and tensor parallel": ("qwen3", lambda: fsdp_tensor_parallel(mesh(2, 4)), F32),
    "tensor parallel, narrow products": ("qwen3", lambda: tensor_parallel(mesh(2, 4)), BACKWARD),
    "narrow embeddings": ("qwen3", lambda: fsdp_tensor_parallel(mesh(2, 4)), NARROW_TABLE),
    "tokens travel": ("qwen3_moe", lambda: expert_parallel(mesh(2, 4)), F32),
}


def loss_and_gradients(model):
    """The mean cross-entropy of the next tokens, and its gradients."""

    def loss(model):
        logits = model(IDS)[:, :-1].astype(jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), IDS[:, 1:, None], axis=-1).mean()

    value, gradients = nnx.jit(value_and_grad(loss))(model)
    return float(value), {"/".join(map(str, keys)): leaf for keys, leaf in nnx.to_flat_state(gradients)}


def report(name, family, sharding, policy):
    folder = folder_of(family)
    whole, model = (perparam.load_model(folder, policy, sharding=each) for each in (None, sharding))
    (wanted, expected), (loss, found) = map(loss_and_gradients, (whole, model))
    errors = {}
    for path, leaf in expected.items():
        one, other = np.asarray(leaf[...]), np.asarray(found[path][...])
        errors[path] = float(np.linalg.norm(one - other) / np.linalg.norm(one))
    parameters = {"/".join(map(str, keys)): leaf[...] for keys, leaf in nnx.to_flat_state(nnx.state(model))}
    elsewhere = [
        path
        for path, leaf in found.items()
        if not leaf[...].sharding.is_equivalent_to(parameters[path].sharding, leaf[...].ndim)
    ]
    line = {
        "loss": abs(loss - wanted) / wanted,
        "gradient": max(errors.values()),
        "worst": max(errors, key=errors.get),
        "elsewhere": elsewhere,
        "narrow": sum(isinstance(leaf, Narrow) for leaf in found.values()),
        "same": sorted(found) == sorted(expected),
    }
    print(json.dumps({"name": name, **line}))


if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    for name in sys.argv[2:]:
        family, sharding, policy = LAYOUTS[name]
        report(name, family, sharding(), policy)
