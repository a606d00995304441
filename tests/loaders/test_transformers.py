"""What perparam saved, loaded by Hugging Face transformers: the same logits within rounding.

    PERPARAM_TORCH_PYTHON=… python -m pytest -m torch tests/loaders/test_transformers.py

The variable names an interpreter that has torch, transformers and accelerate; without it, this one.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import checkpoints
import numpy as np
import pytest
from checkpoints import F8, fields, relative_error, tensors, write

import perparam
from perparam import Policy
from perparam.examples.make_checkpoint import make_checkpoint

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:blocks of .* do not divide")]

FLOAT32_ERROR = 1e-5
"""As test_golden.py derives it: sums of up to 456 products in another order, 40 times over."""

BF16_ERROR = math.sqrt(2 * (2 * 34 + 4)) * 2**-9
"""As there, for two layers: 34 roundings each and 4 outside, on both sides, of 2**-9 rms."""

PLAIN = fields(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=160,
    max_position_embeddings=64, quantization_config=None,
)  # fmt: skip
"""Blocks of (16, 32) and of (32, 16) divide every kernel: transformers dequantises no others."""

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ALL_OPTIONS = {
    "rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 24, "attention_factor": 1.3,
    "beta_fast": 2.0, "beta_slow": 0.25, "truncate": False,
}  # fmt: skip
BLOCKS = Policy({"lm_head/kernel?": None, "kernel": "f8_e4m3fn"}, "f32", block=(16, 32))
PARTIAL = Policy(
    {"layers/0/mlp/down_proj/kernel": None, "layers/1/self_attn/*_proj/kernel": None, "lm_head/kernel?": None,
     "kernel": "f8_e4m3fn"},
    "f32", block=(32, 16),
)  # fmt: skip
OTHER = Policy({"lm_head/kernel?": None, "kernel": "f8_e4m3fn"}, "f32", block=(32, 16))
BF16_SCALES = Policy({"lm_head/kernel": None, "kernel": "f8_e4m3fn", "scale_inv": "bf16"}, "bf16", block=(16, 32))
EXPERTS = Policy({"**/gate/kernel": None, "lm_head/kernel": None, "kernel": "f8_e4m3fn"}, "f32", block=(16, 32))
HEAD = Policy({"kernel": "f8_e4m3fn"}, "f32", block=(16, 32))


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint with `changes` to PLAIN, its plain tensors in `stored`, loaded, saved under `policy` and read by
    transformers in `dtype`."""

    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy: Any = None
    dtype: str = "float32"
    stored: str = "bfloat16"
    shards: int | str = "5GB"


MIXTURE = {**checkpoints.FAMILIES["qwen3_moe"], "moe_intermediate_size": 64, "quantization_config": None}
TIED, BIAS = {"tie_word_embeddings": True}, {"attention_bias": True}
CASES = {
    "bf16 as it is": Case(dtype="bfloat16"),
    "bf16 run in f32": Case(),
    "f32 as it is": Case(stored="float32", policy="f32", dtype="auto"),
    "bf16 made f32, tied": Case(TIED, "f32", dtype="auto"),
    "f16 by the config": Case(policy="f16", dtype="float32"),
    "tied, several shards": Case(TIED, shards=9000),
    "quantised": Case(policy=BLOCKS),
    "quantised, run in bf16": Case(policy=Policy(BLOCKS.params, "bf16", block=(16, 32)), dtype="bfloat16"),
    "quantised, tied": Case(TIED, BLOCKS),
    "quantised, bias": Case(BIAS, BLOCKS),
    "quantised, several shards": Case(policy=BLOCKS, shards=9000),
    "quantised in part": Case(policy=PARTIAL),
    "quantised in part, tied": Case(TIED, PARTIAL),
    "quantised with bf16 scales": Case(policy=BF16_SCALES, dtype="bfloat16"),
    "quantised head": Case(policy=HEAD),
    "quantised, yarn": Case({"rope_scaling": YARN}, BLOCKS),
    "yarn, all options": Case({"rope_scaling": ALL_OPTIONS}),
    "sliding window": Case({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, BLOCKS),
    "fp8 as it is": Case({"quantization_config": FP8}),
    "fp8 to other blocks": Case({"quantization_config": FP8}, OTHER),
    "fp8 dequantised": Case({"quantization_config": FP8, **BIAS}, "f32", dtype="auto"),
    "experts": Case(MIXTURE),
    "experts, quantised, several shards": Case(MIXTURE, EXPERTS, shards=9000),
    "one id that ends": Case({"eos_token_id": [3, 5]}, BLOCKS),
}  # fmt: skip

IDS = np.random.default_rng(0).integers(160, size=(2, 24))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of each case, saved, and what transformers makes of it."""
    top = tmp_path_factory.mktemp("transformers")
    jobs = []
    for i, (name, case) in enumerate(CASES.items()):
        config = {**PLAIN, **case.changes}
        source = top / f"{i} source"
        write(source, config, tensors(config, seed=i, plain_dtype=np.dtype(case.stored), scale_dtype=np.float32))
        folder = perparam.save_model(perparam.load_model(source), top / str(i), case.policy, max_shard_size=case.shards)
        job = {"folder": str(folder), "dtype": case.dtype, "ids": IDS.tolist(), "result": str(top / f"{i}.npz")}
        jobs.append((name, job))
    demo = make_checkpoint(top / "demo")
    jobs.append(
        ("demo", {"folder": str(demo), "dtype": "float32", "ids": IDS.tolist(), "result": str(top / "demo.npz")})
    )
    script = pathlib.Path(__file__).parent / "transformers_logits.py"
    python = os.environ.get("PERPARAM_TORCH_PYTHON", sys.executable)
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [python, script], input="".join(f"{json.dumps(job)}\n" for _, job in jobs), env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    return {name: (pathlib.Path(job["folder"]), dict(np.load(job["result"]))) for name, job in jobs}


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_transformers(saved, name):
    folder, theirs = saved[name]
    narrow = CASES[name].dtype == "bfloat16"
    # Stored as saved, and computed as transformers was asked to.
    ours = checkpoints.logits(perparam.load_model(folder, Policy(compute="bf16" if narrow else "f32")), IDS)
    error = relative_error(ours, theirs["logits"])
    print(f"{name:28}{error:.2e} of {BF16_ERROR if narrow else FLOAT32_ERROR:.2e}")
    assert error <= (BF16_ERROR if narrow else FLOAT32_ERROR)


@pytest.mark.parametrize("name", CASES)
def test_transformers_takes_scales_for_the_kernels_that_have_them(saved, name):
    folder, theirs = saved[name]
    stored = checkpoints.read(folder)
    # Experts are no linear layers there; their scales are tested by the logits.
    modules = {key.removesuffix(".weight"): array for key, array in stored.items() if ".experts." not in key}
    narrow = {name for name, array in modules.items() if array.dtype == F8}
    assert set(theirs["quantised"].tolist()) == narrow
    policy = perparam.get_policy(CASES[name].policy)
    assert bool(narrow) == (policy.block is not None or name == "fp8 as it is")


def test_the_demo_checkpoint_loads_in_transformers_with_the_same_logits(saved):
    folder, theirs = saved["demo"]
    ours = checkpoints.logits(perparam.load_model(folder, Policy(compute="f32", output="f32")), IDS)
    assert relative_error(ours, theirs["logits"]) <= FLOAT32_ERROR
    assert len(theirs["quantised"]) == 4 * 7
