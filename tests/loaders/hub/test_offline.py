"""`local_folder` without the network: the cache is enough, or the error names what it lacks."""

import re

import huggingface_hub
import pytest
from hub_cache import INDEX, ONE, REPO, SWITCHED_OFF, TOKENIZER, TWO, offline, refusal, unplugged

import perparam
from perparam.loaders.hub import local_folder


@pytest.mark.parametrize("cut", [offline, unplugged])
@pytest.mark.parametrize("revision", ["main", "v1", "commit"])
def test_a_whole_snapshot_in_the_cache_needs_no_network(hub, sharded, monkeypatch, cut, revision):
    commit = hub.add(REPO, sharded, "main" if revision == "commit" else revision, **TOKENIZER)
    revision = {"commit": commit, "main": None}.get(revision, revision)
    folder = local_folder(REPO, revision)
    cut(monkeypatch)
    hub.requests.clear()
    assert local_folder(REPO, revision) == folder
    assert hub.requests == []
    assert perparam.checkpoint_tree(folder) == perparam.checkpoint_tree(sharded)


def test_a_whole_snapshot_in_the_cache_is_used_while_the_hub_is_down(hub, small):
    hub.add(REPO, small)
    folder = local_folder(REPO)
    hub.refusals["/"] = "down"
    assert local_folder(REPO) == folder


def test_a_whole_file_that_another_program_left_in_the_cache_beside_an_index_is_enough(
    hub, sharded, small, monkeypatch
):
    hub.add(REPO, sharded, **{"model.safetensors": (small / "model.safetensors").read_bytes()})
    for file in ("config.json", INDEX, "model.safetensors"):
        huggingface_hub.hf_hub_download(REPO, file)
    offline(monkeypatch)
    assert perparam.checkpoint_tree(local_folder(REPO)) == perparam.checkpoint_tree(small)


def test_offline_with_nothing_in_the_cache_is_refused(hub, small, monkeypatch):
    hub.add(REPO, small)
    offline(monkeypatch)
    message = refusal(REPO)
    assert message == (
        f"{REPO}: {SWITCHED_OFF}, and the cache has no file of it. Download it once without that variable, or pass a "
        "folder."
    )
    assert hub.requests == []


def test_an_unreachable_hub_with_nothing_in_the_cache_is_refused(hub, monkeypatch):
    unplugged(monkeypatch)
    expected = (
        rf"{REPO}: the download from http://127\.0\.0\.1:9 failed \(Connect\w+: .*[Rr]efused.*\), and the cache has "
        r"no file of it\. Check the network and try again\."
    )
    assert re.fullmatch(expected, refusal(REPO))


@pytest.mark.parametrize("cut", [offline, unplugged])
@pytest.mark.parametrize("lost", [[ONE], [ONE, TWO]], ids=["a shard", "all shards"])
def test_missing_shards_are_named_without_the_network(hub, sharded, monkeypatch, cut, lost):
    hub.add(REPO, sharded)
    folder = local_folder(REPO)
    for file in lost:
        (folder / file).resolve().unlink()  # of the file alone, as when a download is interrupted
    cut(monkeypatch)
    assert f", and the cache lacks {', '.join(lost)}. " in refusal(REPO)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", INDEX])
def test_small_files_that_are_missing_are_named_without_the_network(hub, sharded, monkeypatch, file):
    hub.add(REPO, sharded, **TOKENIZER)
    (local_folder(REPO) / file).unlink()
    offline(monkeypatch)
    message = refusal(REPO)
    assert message.startswith(f"{REPO}: {SWITCHED_OFF}: The cached snapshot for '{REPO}'")
    assert f"is incomplete: 1 file(s) are missing ({file}). Download it once without that variable" in message


def test_a_missing_file_is_named_where_the_cache_has_no_list_of_files(hub, small, monkeypatch):
    hub.add(REPO, small)
    huggingface_hub.hf_hub_download(REPO, "config.json")
    offline(monkeypatch)
    assert "and the cache lacks model.safetensors. Download it" in refusal(REPO)


def test_a_connection_that_keeps_breaking_off_is_an_error_and_the_next_call_goes_on(hub, sharded, monkeypatch):
    commit = hub.add(REPO, sharded)
    hub.refusals[f"/{REPO}/resolve/{commit}/{TWO}"] = "cut"
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the attempts
    assert re.match(rf"{REPO}: the download from {hub.url} failed \(\w+: .+\)\. Check the network", refusal(REPO))
    hub.refusals.clear()
    hub.requests.clear()
    assert (local_folder(REPO) / TWO).is_file()
    assert TWO in hub.fetched
    assert "config.json" not in hub.fetched
