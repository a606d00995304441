"""`save_model` and `convert_checkpoint`: config fields, token ids and tokenizer files are carried over."""

import dataclasses
import json
import os
import shutil

import pytest
from checkpoints import fields, tensors, write
from saving import config_of

from perparam import load_model, save_model
from perparam.loaders import convert_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # small models


def test_config_fields_that_perparam_ignores_are_kept_for_other_programs(tmp_path):
    config = fields(bos_token_id=3, initializer_range=0.5, id2label={"0": "x"}, use_cache=False)
    save_model(load_model(write(tmp_path / "source", config, tensors(config))), tmp_path / "saved")
    written = config_of(tmp_path / "saved")
    for name in ("bos_token_id", "initializer_range", "id2label", "use_cache", "architectures", "model_type"):
        assert written[name] == config[name]


TOKENIZER = {
    "tokenizer.json": b'{"a": 1}', "tokenizer_config.json": b"{}\n", "special_tokens_map.json": b"{ }",
    "added_tokens.json": b'{"b": 2}', "vocab.json": b"{}", "merges.txt": "a b\nc ö\n".encode(),
    "chat_template.jinja": b"{{ x }}",
}  # fmt: skip


@pytest.mark.parametrize("linked", [False, True], ids=["files", "links"])
@pytest.mark.parametrize("convert", [False, True], ids=["saved", "converted"])
def test_the_tokenizer_and_the_generation_config_are_carried_over(tmp_path, linked, convert):
    source = write(tmp_path / "source", fields(), tensors(fields()))
    generation = json.dumps({"eos_token_id": [7, 59], "pad_token_id": 3, "temperature": 0.6}).encode()
    for name, content in {**TOKENIZER, "generation_config.json": generation}.items():
        (source / name).write_bytes(content)
    (source / "README.md").write_text("not ours")
    if linked:  # as the hub's cache has them
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        for i, path in enumerate(sorted(source.iterdir())):
            path.rename(blobs / str(i))
            path.symlink_to(f"../blobs/{i}")
        (tmp_path / "link").symlink_to(source)
        source = tmp_path / "link"
    target = tmp_path / "saved"
    convert_checkpoint(source, target) if convert else save_model(load_model(source), target)
    assert {name: (target / name).read_bytes() for name in TOKENIZER} == TOKENIZER
    assert (target / "generation_config.json").read_bytes() == generation
    assert not (target / "README.md").exists()
    assert not any(path.is_symlink() for path in target.iterdir())
    assert config_of(target)["eos_token_id"] == [7, 59]
    again = load_model(target).config
    assert (again.eos_token_id, again.pad_token_id) == ((7, 59), 3)


def test_a_model_is_saved_after_its_source_is_deleted(tmp_path):
    source = write(tmp_path / "source", fields(), tensors(fields()), generation_config={"eos_token_id": [7, 59]})
    model = load_model(source)
    shutil.rmtree(source)
    target = save_model(model, tmp_path / "saved")
    assert load_model(target).config.eos_token_id == (7, 59)
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "policy.yaml"]


def test_a_source_is_found_again_from_another_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "source", fields(), tensors(fields()), tokenizer={"a": 1})
    monkeypatch.chdir(tmp_path)
    model = load_model("source")
    (tmp_path / "elsewhere" / "source").mkdir(parents=True)
    (tmp_path / "elsewhere" / "source" / "vocab.json").write_text("another's")
    monkeypatch.chdir(tmp_path / "elsewhere")
    save_model(model, "saved")
    assert json.loads((tmp_path / "elsewhere" / "saved" / "tokenizer.json").read_text()) == {"a": 1}
    assert not (tmp_path / "elsewhere" / "saved" / "vocab.json").exists()


def test_token_ids_changed_after_loading_are_saved(tmp_path):
    source = write(
        tmp_path / "source", fields(), tensors(fields()), generation_config={"eos_token_id": [7, 59], "top_k": 20}
    )
    model = load_model(source)
    model.config = dataclasses.replace(model.config, eos_token_id=(5,), pad_token_id=4)
    target = save_model(model, tmp_path / "saved")
    again = load_model(target).config
    assert (again.eos_token_id, again.pad_token_id) == ((5,), 4)
    assert json.loads((target / "generation_config.json").read_text())["top_k"] == 20
