"""Plans of a repository on the hub: its headers are fetched and checked, and not one byte of its weights."""

import json
import os
import re

import numpy as np
import pytest
from checkpoints import fields, file_bytes, tensors, write
from hub_cache import INDEX, ONE, REPO, SWITCHED_OFF, TWO, offline, unplugged

import perparam
from perparam.commands import main
from perparam.commands.parser import COMMANDS
from perparam.loaders.hub import local_folder
from perparam.policies.errors import InvalidCheckpoint, MissingFile


def header_bytes(file) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_headers_are_all_that_is_fetched_of_the_weights(hub, sharded):
    hub.add(REPO, sharded)
    assert perparam.checkpoint_tree(REPO) == perparam.checkpoint_tree(sharded)
    assert {file: hub.sent[file] for file in (ONE, TWO)} == {file: header_bytes(sharded / file) for file in (ONE, TWO)}
    # The first eight bytes, then the rest.
    assert hub.fetched == ["config.json", ONE, ONE, TWO, TWO, INDEX]


@pytest.mark.parametrize("command", [["plan"], ["plan", "--json"], ["convert", "new", "--dry-run"]], ids=" ".join)
@pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")
def test_the_command_line_fetches_headers_of_a_revision(hub, sharded, small, capsys, command):
    hub.add(REPO, sharded, "v1")
    hub.add(REPO, small)
    arguments = [command[0], REPO, *command[1:], "--policy", "fp8_weight_only", "--revision", "v1"]
    assert main(arguments) == 0
    of_the_hub = capsys.readouterr().out
    assert sum(hub.sent[file] for file in (ONE, TWO)) == sum(header_bytes(sharded / file) for file in (ONE, TWO))
    assert main([command[0], str(sharded), *command[1:], "--policy", "fp8_weight_only"]) == 0
    assert of_the_hub == capsys.readouterr().out
    assert not os.path.exists("new")


def test_shards_in_the_cache_are_read_there(hub, sharded, monkeypatch):
    hub.add(REPO, sharded)
    folder = local_folder(REPO)
    hub.sent.clear()
    assert perparam.infer_policy(REPO) == perparam.infer_policy(sharded)
    (folder / TWO).resolve().unlink()
    perparam.checkpoint_tree(REPO)
    assert hub.sent == {TWO: header_bytes(sharded / TWO)}


@pytest.mark.parametrize("cut", [offline, unplugged])
def test_without_the_network_the_cache_is_enough_or_the_error_names_what_it_lacks(hub, sharded, monkeypatch, cut):
    hub.add(REPO, sharded)
    folder = local_folder(REPO)
    with monkeypatch.context() as patch:
        cut(patch)
        assert perparam.checkpoint_tree(REPO) == perparam.checkpoint_tree(sharded)
        (folder / TWO).resolve().unlink()
        with pytest.raises(MissingFile, match=rf"^{REPO}: .*, and the cache lacks {TWO}\. ") as caught:
            perparam.checkpoint_tree(REPO)
    assert cut is unplugged or SWITCHED_OFF in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "begins with eight bytes of length, this one has 0 bytes"),
        (b"1234", "begins with eight bytes of length, this one has 4 bytes"),
        (file_bytes("{}", length=2**40), r"a length of 1099511627776 bytes, the file has 2 after"),
        (file_bytes(""), "not valid JSON"),
        (file_bytes("{}", b"12345678"), "the header describes 10 bytes, the file has 18"),
        (file_bytes('{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'), "header describes"),
    ],
)
def test_a_header_on_the_hub_is_checked_like_one_on_this_machine(hub, small, content, problem):
    (small / "model.safetensors").write_bytes(content)
    hub.add(REPO, small)
    with pytest.raises(InvalidCheckpoint, match=problem) as caught:
        perparam.checkpoint_tree(REPO)
    assert str(caught.value).startswith(f"{REPO}/model.safetensors: ")
    assert hub.sent["model.safetensors"] <= len(content)


def test_a_hub_that_sends_whole_files_only_is_refused_before_it_sends_them(hub, small):
    hub.add(REPO, small)
    hub.ranges = False
    with pytest.raises(MissingFile, match=r"does not send parts of files.*Download the repository with `hf download`"):
        perparam.checkpoint_tree(REPO)


@pytest.mark.parametrize("absent", [["model.safetensors"], ["config.json"]], ids=str)
def test_a_repository_without_weights_or_config_is_refused(hub, small, absent):
    for file in absent:
        (small / file).unlink()
    hub.add(REPO, small)
    with pytest.raises(MissingFile, match=f"{REPO}: has no {absent[0]} on the hub"):
        perparam.loaders.open_checkpoint(REPO, weights=False)


def test_a_gated_repository_is_refused_with_where_to_ask(hub, small):
    commit = hub.add(REPO, small)
    hub.refusals[f"/{REPO}/resolve/{commit}/model"] = "GatedRepo"
    with pytest.raises(MissingFile, match="is gated, and its owner decides who has access"):
        perparam.checkpoint_tree(REPO)


# The functions that need the weights.


def test_every_function_that_takes_a_checkpoint_takes_a_name_and_a_revision(hub, sharded, tmp_path):
    hub.add(REPO, sharded, "v1", **{"generation_config.json": json.dumps({"do_sample": True, "top_k": 7}).encode()})
    hub.add(REPO, write(tmp_path / "other", fields(), tensors(fields(), seed=1)))
    expected = perparam.load_params(sharded)
    loaded = perparam.load_params(REPO, revision="v1")
    assert all((np.asarray(loaded[path]) == np.asarray(expected[path])).all() for path in expected)
    new = perparam.convert_checkpoint(REPO, tmp_path / "new", "bf16", revision="v1")
    local = perparam.convert_checkpoint(sharded, tmp_path / "local", "bf16")
    assert (new / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    assert perparam.generation.sampling_defaults(REPO, revision="v1").top_k == 7


@pytest.mark.parametrize("measure", [perparam.audit, perparam.compare])
def test_measurements_load_the_revision(hub, small, measure):
    hub.add(REPO, small)
    tokens = [1, 2, 3] if measure is perparam.compare else [[1, 2, 3]]
    with pytest.raises(MissingFile, match=f"{REPO}: has no revision 'v9'"):
        measure(REPO, "bf16", tokens, revision="v9")


def test_every_command_that_takes_a_checkpoint_has_the_option_revision(capsys):
    for command in set(COMMANDS) - {"demo"}:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert re.search(r"--revision REV +branch, tag or commit", capsys.readouterr().out)
