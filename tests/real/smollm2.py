"""The model, the text and the policies that test_smollm2.py and table.py share."""

from __future__ import annotations

import hashlib
import lzma
import os
import pathlib
import subprocess
import sys

from perparam import Policy, get_policy

HERE = pathlib.Path(__file__).resolve().parent

TEXT = HERE / "persuasion.txt.xz"
TEXT_SHA256 = "6bf8544381e89678f7a35b7dc1c8acd2da517aab3818f8022ea40f17612184d1"


def weights(kernel: object, compute: str | None = None) -> Policy:
    """A policy that stores kernels in a format, and is like the preset `fp8_weight_only` in everything else."""
    params = {"lm_head/kernel?": None, "kernel": kernel, "scale_inv": None, "default": None}
    return Policy(
        params, {"lm_head/kernel?": None, "kernel": compute, "scale_inv": None, "default": "bf16"}, output="bf16"
    )


POLICIES = {
    "f32": get_policy("f32"),
    "bf16": get_policy("bf16"),
    "fp8_weight_only": get_policy("fp8_weight_only"),
    "fp8_dynamic": get_policy("fp8_dynamic"),
    "mxfp8, weight-only": weights("mxfp8"),
    "mxfp8, dynamic": weights("mxfp8", compute="mxfp8"),
    "int8, one scale a row": weights({"dtype": "int8", "block": [1, -1]}),
    "f32, kv_cache f8_e4m3fn": Policy("f32", "f32", "f32", kv_cache="f8_e4m3fn"),
    "f32, kv_cache int8": Policy("f32", "f32", "f32", kv_cache="int8"),
}
"""Each policy by the name that the table gives it. The first one is the reference."""


def torch_python() -> str:
    """The interpreter that has torch and transformers: PERPARAM_TORCH_PYTHON, or this one."""
    return os.environ.get("PERPARAM_TORCH_PYTHON", sys.executable)


def model_folder(temporary: pathlib.Path) -> pathlib.Path:
    """The folder of the model, which is made if it does not exist: PERPARAM_SMOLLM2, else `smollm2` in `temporary`."""
    folder = pathlib.Path(os.environ.get("PERPARAM_SMOLLM2", temporary / "smollm2"))
    if not folder.is_dir():
        run = [torch_python(), str(HERE / "make_smollm2.py"), str(folder)]
        subprocess.run(run, check=True, env=plain_environment(), timeout=600)
    return folder


def plain_environment() -> dict[str, str]:
    """The environment for another interpreter: without PYTHONPATH."""
    return {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}


def text() -> str:
    """The first 13 chapters of Jane Austen's Persuasion.

    Raises:
      ValueError: the file is not the text that the published table was measured on.
    """
    data = lzma.decompress(TEXT.read_bytes())
    if (digest := hashlib.sha256(data).hexdigest()) != TEXT_SHA256:
        raise ValueError(f"{TEXT}: sha256 {digest}, expected {TEXT_SHA256}.")
    return data.decode()
