"""What the tests of the hub share: file names, ways to lose the network, and what `local_folder` refuses."""

import importlib
import json

import pytest
from huggingface_hub import constants

from perparam.loaders.hub import local_folder
from perparam.policies.errors import MissingFile, PerparamError

REPO = "owner/small"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
SWITCHED_OFF = "downloads are disabled (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
NOT_NEEDED = {
    "pytorch_model.bin": b"a pickle", "model.pt": b"a pickle", "modeling_small.py": b"code", "README.md": b"words",
    "original/model.safetensors": b"the same again", "original/config.json": b"{}", "model.gguf": b"",
    ".gitattributes": b"", "other.safetensors": b"", "onnx/tokenizer.json": b"{}",
}  # fmt: skip
TOKENIZER = {
    f"{name}.json": json.dumps({"name": name}).encode()  # unlike each other: equal files are fetched once
    for name in ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab", "generation_config")
} | {"merges.txt": b"#version: 0.2", "chat_template.jinja": b"{{ messages }}"}


def to(monkeypatch, url):
    # What HF_ENDPOINT sets, which is read when huggingface_hub is imported.
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unplugged(monkeypatch):
    to(monkeypatch, "http://127.0.0.1:9")  # the port that discards: nothing listens


def bars_of_environment(monkeypatch, disabled):
    # What HF_HUB_DISABLE_PROGRESS_BARS sets.
    for module in (constants, importlib.import_module("huggingface_hub.utils.tqdm")):
        monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", disabled)


def refusal(path, kind=MissingFile, **arguments) -> str:
    """What `local_folder` says, which begins with what it was given and ends in what to do."""
    with pytest.raises(kind) as caught:
        local_folder(path, **arguments)
    assert isinstance(caught.value, PerparamError)
    return str(caught.value)
