"""What the tests of saving and exporting share: policies, and comparisons of folders and tensors."""

import json
import os
import pathlib
import subprocess
import sys

import checkpoints
import numpy as np
from checkpoints import GOLDEN, places
from helpers import bits

from perparam import Policy

TESTS = pathlib.Path(__file__).parent
INDEX = "model.safetensors.index.json"

BLOCK64 = Policy({"lm_head/kernel": None, "kernel": "f8_e4m3fn"}, "bf16", block=(64, 64))
PARTIAL = Policy({"layers/0/**/kernel": "bf16", "**/mlp/down_proj/kernel": "f32", "**/self_attn/*_proj/kernel": None})
FROM_BF16 = Policy({"layers/*/mlp/{up,down}_proj/kernel": "f8_e4m3fn", "norm/scale": "f32"}, "f32", block=(8, 40))


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_same_tensors(found, wanted):
    """Equal names, dtypes, shapes and bytes."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert bits(found[name]) == bits(wanted[name]), name


def held(model):
    """What a model holds, as a checkpoint calls it."""
    return {
        name: np.asarray(array)[index]
        for path, array in checkpoints.arrays(model).items()
        for name, index in places(path, array.shape).items()
    }


def as_stored(case):
    stored = checkpoints.read(GOLDEN / case)
    if config_of(GOLDEN / case)["tie_word_embeddings"]:
        stored.pop("lm_head.weight", None)
    return stored


def everything(folder):
    """The bytes of every file below a folder, those with a dot in front included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def python(code, *arguments, **environment):
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment
    # Small models have sides that blocks do not divide.
    command = [sys.executable, "-W", "error", "-W", "ignore:blocks of", "-c", code, *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return run
