"""`save_model` and `convert_checkpoint`: folders that may be written to, and those whose files are kept."""

import os

import checkpoints
import pytest
from checkpoints import fields, tensors, write
from saving import assert_same_tensors, everything, held

from perparam import load_model, save_model
from perparam.loaders import convert_checkpoint
from perparam.policies.errors import InvalidCheckpoint, SaveFailed

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # small models


def test_a_folder_that_holds_something_else_is_kept(model, tmp_path):
    target = save_model(model, tmp_path / "saved")
    (target / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(SaveFailed, match=r"contains notes\.txt, which saving would delete\. Choose another folder"):
        save_model(model, target, "bf16")
    with pytest.raises(SaveFailed, match=r"contains notes\.txt"):
        convert_checkpoint(model.config.source.parent, target)
    assert everything(tmp_path) == before


def test_a_folder_named_like_a_checkpoint_file_is_kept(model, tmp_path):
    target = tmp_path / "saved"
    (target / "config.json").mkdir(parents=True)
    (target / "config.json" / "precious").write_text("mine")
    with pytest.raises(SaveFailed, match=r"config\.json"):
        save_model(model, target)
    assert everything(tmp_path) == {"saved/config.json/precious": b"mine"}


def test_a_file_in_the_way_is_kept(model, tmp_path):
    (tmp_path / "saved").write_text("mine")
    for target in (tmp_path / "saved", tmp_path / "saved" / "below"):
        with pytest.raises(SaveFailed, match="cannot be written"):
            save_model(model, target)
    assert everything(tmp_path) == {"saved": b"mine"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_may_not_be_written_to_is_refused(model, tmp_path):
    (tmp_path / "parent").mkdir(mode=0o555)
    with pytest.raises(SaveFailed, match="Permission denied"):
        save_model(model, tmp_path / "parent" / "saved")


def test_a_checkpoint_is_not_converted_into_its_own_folder(tmp_path):
    source = write(tmp_path / "source", fields(), tensors(fields()))
    (tmp_path / "link").symlink_to(source)
    before = everything(source)
    for target in (source, tmp_path / "link", f"{source}/../source/"):
        with pytest.raises(InvalidCheckpoint, match="cannot be converted into its own folder"):
            convert_checkpoint(source, target, "bf16")
    assert everything(source) == before


def test_a_model_is_saved_over_its_own_source(tmp_path):
    source = write(tmp_path / "source", fields(), tensors(fields()), shards=3, tokenizer={"a": 1})
    model = load_model(source)
    wanted = held(model.with_policy("bf16"))
    save_model(model, source, "bf16")
    assert sorted(os.listdir(source)) == ["config.json", "model.safetensors", "policy.yaml", "tokenizer.json"]
    assert_same_tensors(checkpoints.read(source), wanted)
    save_model(model, source, max_shard_size="9KB")
    assert_same_tensors(checkpoints.read(source), held(model))
    assert (source / "tokenizer.json").exists()
    assert not (source / "model.safetensors").exists()
    assert os.listdir(tmp_path) == ["source"]


def test_links_empty_folders_and_folders_that_are_not_there_yet_are_targets(model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    (tmp_path / "dangling").symlink_to("later", target_is_directory=True)
    for name in ("empty", "link", "link", "dangling", "one/two/three"):
        save_model(model, str(tmp_path / name))
        assert_same_tensors(checkpoints.read(tmp_path / name), held(model))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty", "later", "link", "one", "real"]
    assert os.listdir(tmp_path / "one" / "two") == ["three"]


@pytest.mark.parametrize("name", ["n" * 255, "字" * 85, "with space", "ö{}'\"%s"], ids=["long", "wide", "space", "odd"])
def test_any_name_that_the_file_system_accepts_is_a_target(model, tmp_path, name):
    save_model(model, tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_the_working_directory_is_a_target(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_model(model, ".")
    assert_same_tensors(checkpoints.read(tmp_path / "here"), held(model))
