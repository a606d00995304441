"""`load_model`: from a folder to a ready model, tensor by tensor."""

from __future__ import annotations

import os
from typing import Any

import jax

from ..models.qwen3 import Qwen3, assemble
from ..policies.plan import explain
from ..policies.policy import ParamSpec
from ..policies.presets import get_policy
from ..policies.slots import scale_path
from ..policies.storage import plan_storage
from .checkpoint import open_checkpoint
from .safetensors_file import Tensor, read_tensor


def load_model(path: str | os.PathLike[str], policy: Any = None) -> Qwen3:
    """The Qwen3 in a Hugging Face folder, stored and computed as `policy` says.

    policy  anything `get_policy` takes.  None keeps every tensor bit for bit as the files have it, computes narrow
            kernels weight-only in the config's dtype and returns that dtype; "bf16" and "f32" dequantise on load

    Tensors are read one at a time; a kept one becomes the device's array without a further copy on a CPU.

    Raises:
      MissingFile, InvalidCheckpoint, UnsupportedConfig: files that are not there, damaged, or not what they promise.
      UnmatchedRule, ShadowedRule: a rule of the policy that decides nothing.
      InvalidScale: scales that are not positive finite numbers.
    """
    policy, checkpoint = get_policy(policy), open_checkpoint(path)
    explain(policy, checkpoint.tree, checkpoint.config.dtype)
    steps, _ = plan_storage(policy, checkpoint.found)
    parameters: dict[str, jax.Array] = {}
    for where, step in steps.items():
        scales = checkpoint.tensors.get(scale_path(where))
        kernel, scale_inv = step.run(where, _on_device(checkpoint.tensors[where]), scales and _on_device(scales))
        parameters[where] = kernel
        if scale_inv is not None:
            parameters[scale_path(where)] = scale_inv
    specs = {where: ParamSpec(step.storage, step.scale, block=step.block) for where, step in steps.items()}
    return assemble(checkpoint.config, policy, specs, parameters)


def _on_device(tensor: Tensor) -> jax.Array:
    """The tensor on the default device; a CPU adopts the aligned buffer."""
    return jax.device_put(read_tensor(tensor))
