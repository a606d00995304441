"""perparam: mixed-precision policies for JAX and Flax, one parameter at a time."""

from importlib.metadata import PackageNotFoundError, version

from .loaders import (
    audit,
    checkpoint_tree,
    compare,
    complete,
    infer_policy,
    load_model,
    load_params,
    load_tokenizer,
    save_model,
    stream,
)
from .models import Qwen3, Qwen3Config, Sampling, generate, prefill
from .policies import (
    PerparamError,
    Policy,
    apply,
    dequantize,
    get_policy,
    init,
    join_trainable,
    quantize,
    refuse_narrow,
    scaled_matmul,
    split_trainable,
)

try:
    __version__ = version("perparam")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "PerparamError",
    "Policy",
    "Qwen3",
    "Qwen3Config",
    "Sampling",
    "__version__",
    "apply",
    "audit",
    "checkpoint_tree",
    "compare",
    "complete",
    "dequantize",
    "generate",
    "get_policy",
    "infer_policy",
    "init",
    "join_trainable",
    "load_model",
    "load_params",
    "load_tokenizer",
    "prefill",
    "quantize",
    "refuse_narrow",
    "save_model",
    "scaled_matmul",
    "split_trainable",
    "stream",
]
