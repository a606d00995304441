"""Write adapters that peft makes for golden checkpoints, and the logits that it computes with them.

    python tests/golden/make_peft.py

needs torch, transformers and peft; a CPU is enough. Every case of CASES becomes a folder in `peft/`, with what peft's
`save_pretrained` writes, but for its README.md, and `expected.npz`:

    input_ids  int32 [batch, time]
    logits     float32 [batch, time, vocab], the base and the adapter in float32

`lora_B` is random too, since peft begins with zeros. `peft/VERSIONS.json` names the library versions.

With `--jobs` it reads JSON lines from stdin, as `tests/loaders/test_peft.py` writes them, `{"base", "adapter", "ids",
"result", "again"}`: the adapter in a folder is loaded, its logits are written to `result`, and it is saved again.
"""

import json
import pathlib
import shutil
import sys
import warnings

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

GOLDEN = pathlib.Path(__file__).parent
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "patterns": (
        "bf16_plain",
        {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1,
         "rank_pattern": {"v_proj": 2, r".*\.1\.mlp.down_proj": 5}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
    ),
    "rslora": ("llama_plain_tied", {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": "all-linear"}),
    "experts": (
        "qwen3_moe_plain_every_second",
        {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    ),
    "one_kernel_of_experts": (
        "qwen3_moe_plain_every_second", {"r": 2, "lora_alpha": 4, "target_parameters": EXPERTS[1:]}
    ),
}  # fmt: skip
"""The base checkpoint of each case, and the arguments of `LoraConfig`."""


def base_model(folder: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def made(folder: str, settings: dict) -> PeftModel:
    """An adapter of random values."""
    torch.manual_seed(0)
    model = get_peft_model(base_model(folder), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def loaded(folder: str, adapter: str) -> PeftModel:
    # peft warns of tensors that are missing or that it does not know, and goes on.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(base_model(folder), adapter).eval()


def logits(model: PeftModel, ids: list[list[int]]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.float().numpy()


def save(model: PeftModel, folder: pathlib.Path) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)  # with True it looks for the base on the hub
    (folder / "README.md").unlink()


def run_jobs() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        model = loaded(job["base"], job["adapter"])
        np.savez(job["result"], logits=logits(model, job["ids"]))
        save(model, pathlib.Path(job["again"]))
    print({module.__name__: module.__version__ for module in (torch, transformers, peft)})


def main() -> None:
    for name, (base, settings) in CASES.items():
        folder = GOLDEN / "peft" / name
        shutil.rmtree(folder, ignore_errors=True)
        model = made(str(GOLDEN / base), settings)
        model.peft_config["default"].base_model_name_or_path = base
        save(model, folder)
        vocabulary = model.config.vocab_size
        ids = np.random.default_rng(0).integers(vocabulary, size=(2, 9)).astype(np.int32)
        np.savez(folder / "expected.npz", input_ids=ids, logits=logits(model, ids.tolist()))
    versions = {module.__name__: module.__version__ for module in (peft, torch, transformers)}
    (GOLDEN / "peft" / "VERSIONS.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    run_jobs() if "--jobs" in sys.argv else main()
