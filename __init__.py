"""perparam: mixed-precision policies for JAX and Flax, one parameter at a time."""

from importlib.metadata import PackageNotFoundError, version

from . import generation, training
from .loaders import (
    audit,
    checkpoint_tree,
    compare,
    convert_checkpoint,
    embed,
    generate_text,
    infer_policy,
    load_model,
    load_params,
    load_tokenizer,
    rerank,
    save_model,
    save_params,
    stream_text,
)
from .models import Linear, Sampling, generate
from .policies import (
    Format,
    PerparamError,
    Policy,
    PolicyLike,
    ScaledArray,
    apply,
    bind,
    dequantize,
    get_policy,
    init,
    quantize,
    scaled_matmul,
)

try:
    __version__ = version("perparam")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Format",
    "Linear",
    "PerparamError",
    "Policy",
    "PolicyLike",
    "Sampling",
    "ScaledArray",
    "__version__",
    "apply",
    "audit",
    "bind",
    "checkpoint_tree",
    "compare",
    "convert_checkpoint",
    "dequantize",
    "embed",
    "generate",
    "generate_text",
    "generation",
    "get_policy",
    "infer_policy",
    "init",
    "load_model",
    "load_params",
    "load_tokenizer",
    "quantize",
    "rerank",
    "save_model",
    "save_params",
    "scaled_matmul",
    "stream_text",
    "training",
]
