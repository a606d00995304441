"""Logits that Hugging Face transformers computes from saved folders; run by test_transformers.py, needs torch.

Reads JSON lines `{"folder", "dtype", "ids", "result"}` from stdin, writes each result as an npz file: `logits`, and
`quantised`, the modules that transformers would run in FP8 on a GPU.
"""

import json
import sys

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.quantizers.base import HfQuantizer


def logits(folder: str, dtype: str, ids: list[list[int]]) -> np.ndarray:
    fp8 = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is not None
    how = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if fp8 else {}
    if dtype != "auto":
        how["dtype"] = getattr(torch, dtype)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, local_files_only=True, **how
    )
    assert not any(loading.values()), loading
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    # transformers 5 leaves dequantised kernels in the dtype of their scales.
    model = model.to(model.config.dtype)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids)).logits.float().numpy()


def quantised(folder: str) -> list[str]:
    """The modules that take scales, in a model made for a GPU."""
    config = AutoConfig.from_pretrained(folder)
    written = getattr(config, "quantization_config", None)
    if written is None:
        return []
    fp8 = FineGrainedFP8Config(**written)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plain = HfQuantizer.get_modules_to_not_convert(model, fp8.modules_to_not_convert, model._keep_in_fp32_modules)
    model = replace_with_fp8_linear(model, modules_to_not_convert=plain, quantization_config=fp8, pre_quantized=True)
    return [name for name, module in model.named_modules() if type(module).__name__ == "FP8Linear"]


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        job = json.loads(line)
        found = {"logits": logits(job["folder"], job["dtype"], job["ids"]), "quantised": quantised(job["folder"])}
        np.savez(job["result"], **{name: np.array(value) for name, value in found.items()})
    print(json.dumps({module.__name__: module.__version__ for module in (torch, transformers)}))


if __name__ == "__main__":
    main()
