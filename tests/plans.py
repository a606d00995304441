"""A policy and a tree whose plan has rows of every kind."""

import ml_dtypes
import numpy as np

YAML = """\
params:
  kernel: f8_e4m3fn
  scale_inv: bf16
  embedding: null
  default: bf16
compute:
  kernel: null
  default: f32
output: f16
"""

TREE = {
    "dense": {"kernel": np.ones((200, 300), np.float32), "bias": np.ones(200, np.float32)},
    "embed": {"embedding": np.ones((10, 4), ml_dtypes.bfloat16)},
    "steps": np.zeros(3, np.int32),
}
