"""`local_folder`: what the hub refuses, what this machine refuses, and paths that are no names."""

import errno
import itertools
import os
import re
from pathlib import Path

import pytest
from checkpoints import write_index
from hub_cache import INDEX, NOT_NEEDED, ONE, REPO, SWITCHED_OFF, TWO, offline, refusal
from huggingface_hub import constants, file_download
from huggingface_hub.utils import validate_repo_id

from perparam.loaders.hub import local_folder
from perparam.policies.errors import InvalidCheckpoint

# What the hub refuses.


def test_a_model_that_is_not_there_is_refused_with_how_to_log_in(hub):
    assert refusal("owner/absent") == (
        f"owner/absent: not a folder, and {hub.url} has no such model, or it is private, and the cache has no file "
        "of it. Correct the name, or log in with `hf auth login` or set HF_TOKEN."
    )


def test_a_revision_that_is_not_there_is_refused(hub, small):
    hub.add(REPO, small)
    local_folder(REPO)
    for revision in ("v9", "0" * 40):
        assert refusal(REPO, revision=revision) == (
            f"{REPO}: has no revision {revision!r}. Pass a branch, tag or commit that {hub.url}/{REPO} lists."
        )


def test_a_gated_model_is_refused_with_where_to_ask(hub, small):
    hub.add(REPO, small)
    hub.refusals[f"/{REPO}/resolve/"] = "GatedRepo"
    assert refusal(REPO) == (
        f"{REPO}: is gated, and its owner decides who has access. Request access at {hub.url}/{REPO}, then log "
        "in with `hf auth login` or set HF_TOKEN."
    )


def test_a_token_that_the_hub_refuses_is_an_error(hub, small):
    hub.add(REPO, small)
    hub.refusals["/"] = ""
    expected = f"{REPO}: {hub.url} denies access (Invalid credentials in Authorization header), and the cache has "
    assert refusal(REPO).startswith(expected)


@pytest.mark.parametrize("revision", [None, "0" * 40])
def test_a_hub_that_is_down_is_an_error_at_once(hub, revision):
    hub.refusals["/"] = "down"
    message = refusal(REPO, revision=revision)
    assert re.search(r"failed \(HfHubHTTPError: .*\), and the cache has no file of it\. Check the network", message)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_without_what_perparam_loads_is_refused(hub, small, file):
    (small / file).unlink()
    hub.add(REPO, small, **{"pytorch_model.bin": b"a pickle"})
    assert refusal(REPO) == f"{REPO}: has no {file} on the hub. Choose a model with safetensors files, not pickles."
    assert "pytorch_model.bin" not in hub.fetched


def test_an_index_whose_shards_are_not_there_is_refused_before_the_others_are_fetched(hub, sharded):
    (sharded / TWO).unlink()
    hub.add(REPO, sharded)
    assert f"has no {TWO} on the hub" in refusal(REPO)
    assert ONE not in hub.fetched


@pytest.mark.parametrize(
    "file",
    ["../../x", "../../x.safetensors", "/etc/passwd", "original/model.safetensors", "pytorch_model.bin", "*", "..", "",
     "modeling_small.py", "[a-z]*.safetensors"],
)  # fmt: skip
def test_an_index_that_names_anything_else_than_safetensors_beside_it_fetches_nothing(hub, sharded, file):
    write_index(sharded, {"model.norm.weight": file, "lm_head.weight": ONE})
    hub.add(REPO, sharded, **NOT_NEEDED)
    assert "Do not use this checkpoint." in refusal(REPO, InvalidCheckpoint)
    assert hub.fetched == ["config.json", INDEX]


# This machine.


@pytest.mark.parametrize(
    ("number", "text"), [(errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission denied")]
)
def test_a_full_disk_is_an_error_that_names_the_cache(hub, small, monkeypatch, number, text):
    hub.add(REPO, small)

    def full(*_, **__):
        raise OSError(number, text)

    monkeypatch.setattr(file_download, "http_get", full)
    message = refusal(REPO)
    assert message.startswith(f"{REPO}: the cache {constants.HF_HUB_CACHE} cannot be written ([Errno {number}] {text})")
    assert message.endswith("Free disk space, or set HF_HUB_CACHE to another folder.")


@pytest.mark.parametrize(
    "path", ["./qwen3", "../qwen3", "/no/qwen3", "~/qwen3", "a/b/c", "a\\b", "a b", "-a", "a-", "a/.b", "x--y", "a..b",
             "a.git", "", "a\n", "é", "a\0b", Path("owner/small"), Path("qwen3")],
    ids=repr,
)  # fmt: skip
def test_a_path_that_is_neither_a_folder_nor_a_hub_name_is_refused_with_an_example_of_each(hub, path):
    message = refusal(path).replace("\\x00", "\0")  # a message shows control characters escaped
    assert message.startswith(f"{path}: neither a folder nor a name on the hub.")
    assert "such as './qwen3', or a name as a string, such as 'Qwen/Qwen3-8B'." in message
    assert hub.requests == []


def test_hub_names_are_those_that_huggingface_hub_accepts(hub, monkeypatch):
    offline(monkeypatch)
    for letters in itertools.chain.from_iterable(itertools.product("a.-/", repeat=count) for count in range(1, 5)):
        text = "".join(letters)
        if os.path.exists(text):
            continue
        try:
            validate_repo_id(text)
        except ValueError:
            assert "neither a folder nor a name" in refusal(text)
        else:
            assert SWITCHED_OFF in refusal(text)


def test_a_file_is_no_folder(hub, small):
    assert "neither a folder nor a name" in refusal("small/config.json")
    assert hub.requests == []


def test_a_folder_is_returned_as_it_is(hub, small, tmp_path):
    assert local_folder(small) == small
    assert local_folder(str(small)) == small
    assert local_folder("small") == Path("small")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "small").symlink_to(small)
    assert local_folder(REPO) == Path(REPO)
    assert hub.requests == []


def test_a_folder_with_a_revision_is_refused(hub, small):
    message = refusal("small", InvalidCheckpoint, revision="main")
    assert message == "small: is a folder, and only a name on the hub has a revision. Omit 'main'."
    assert hub.requests == []
