"""`local_folder` with a hub: which files it fetches, and of which revision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoints
import huggingface_hub
import pytest
from checkpoints import fields, tensors, write
from hub_cache import INDEX, NOT_NEEDED, ONE, REPO, TOKENIZER, TWO

import perparam
from perparam.loaders.hub import local_folder


def test_a_single_file_is_fetched_with_config_and_tokenizer_and_nothing_else(hub, small):
    hub.add(REPO, small, **TOKENIZER, **NOT_NEEDED)
    folder = local_folder(REPO)
    assert hub.fetched == sorted(["config.json", "model.safetensors", *TOKENIZER])
    assert sorted(path.name for path in folder.iterdir()) == hub.fetched
    assert perparam.checkpoint_tree(folder) == perparam.checkpoint_tree(small)


def test_shards_are_fetched_as_the_index_names_them_and_no_others(hub, sharded):
    hub.add(REPO, sharded, **NOT_NEEDED, **{"model.safetensors": b"of another export", "x-00003.safetensors": b""})
    folder = local_folder(REPO)
    assert hub.fetched == ["config.json", ONE, TWO, INDEX]
    assert perparam.checkpoint_tree(folder) == perparam.checkpoint_tree(sharded)


def test_the_weights_are_those_of_the_hub(hub, sharded):
    hub.add(REPO, sharded)
    found, wanted = checkpoints.read(local_folder(REPO)), checkpoints.read(sharded)
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_a_name_without_an_owner_is_a_name(hub, small):
    hub.add("small-model", small)
    assert (local_folder("small-model") / "config.json").is_file()


def test_files_in_the_cache_are_not_fetched_again(hub, sharded):
    hub.add(REPO, sharded)
    folder = local_folder(REPO)
    hub.requests.clear()
    assert local_folder(REPO) == folder
    assert not any("/resolve/" in path for _, path in hub.requests)


def test_a_file_that_went_missing_from_the_cache_is_fetched_again(hub, sharded):
    hub.add(REPO, sharded)
    (local_folder(REPO) / TWO).resolve().unlink()
    hub.requests.clear()
    assert (local_folder(REPO) / TWO).is_file()
    assert hub.fetched == [TWO]


# Revisions.


@pytest.mark.parametrize("revision", ["v1", "a/branch", None], ids=str)
def test_a_branch_or_tag_gives_the_folder_of_its_commit(hub, small, tmp_path, revision):
    commit = hub.add(REPO, small, revision or "main")
    other = write(tmp_path / "other", fields(), tensors(fields(), seed=1), shards=2)
    hub.add(REPO, other, "another")
    folder = local_folder(REPO, revision)
    assert folder.name == commit
    assert (folder / "config.json").is_symlink()
    assert (folder / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_a_commit_is_a_revision(hub, small, tmp_path):
    old = hub.add(REPO, small)
    new = hub.add(REPO, write(tmp_path / "new", fields(), tensors(fields(), seed=1)))
    assert local_folder(REPO, old).name == old
    assert local_folder(REPO).name == new


def test_a_branch_that_moves_on_is_followed(hub, small, tmp_path):
    hub.add(REPO, small)
    local_folder(REPO)
    new = hub.add(REPO, write(tmp_path / "new", fields(), tensors(fields(), seed=1)))
    assert local_folder(REPO).name == new


def test_a_branch_that_moves_on_between_two_files_gives_files_of_one_commit(hub, sharded, tmp_path, monkeypatch):
    old = hub.add(REPO, sharded)
    new = write(tmp_path / "new", fields(), tensors(fields(), seed=1), shards=2)

    def moves_on(*arguments, **options):
        folder = download(*arguments, **options)
        hub.add(REPO, new)
        return folder

    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", moves_on)
    folder = local_folder(REPO)
    assert folder.name == old
    assert (folder / TWO).read_bytes() == (sharded / TWO).read_bytes()


# As its users start it.


@pytest.mark.slow
def test_a_folder_is_opened_without_importing_huggingface_hub_and_a_name_with_its_environment(hub, small, tmp_path):
    hub.add(REPO, small)
    code = (
        "import sys, perparam\n"
        "from perparam.loaders.hub import local_folder\n"
        f"local_folder({os.fspath(small)!r})\n"
        "try: local_folder('./absent')\n"
        "except perparam.PerparamError: pass\n"
        "else: raise SystemExit('no error')\n"
        "assert not {'huggingface_hub', 'httpx', 'httpx2', 'requests'} & sys.modules.keys()\n"
        f"print(local_folder({REPO!r}))\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment = {name: value for name, value in environment.items() if name not in ("HF_HUB_CACHE", "HF_TOKEN")}
    for offline in ("0", "1"):
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, env={**environment, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home" / "hub" / "models--owner--small")
        assert json.loads((Path(done.stdout.strip()) / "config.json").read_text()) == fields()
    assert hub.fetched == ["config.json", "model.safetensors"]
