"""`local_folder` with the real huggingface_hub against a hub on localhost: what is fetched, and every way to fail."""

import errno
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import checkpoints
import fake_hub
import huggingface_hub
import pytest
from checkpoints import fields, tensors, write, write_index
from huggingface_hub import constants, file_download
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

import perparam
from perparam.loaders.hub import local_folder
from perparam.policies.errors import InvalidCheckpoint, MissingFile, PerparamError

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


@pytest.fixture(scope="module")
def served():
    with fake_hub.serve() as hub:
        yield hub


@pytest.fixture
def hub(served, monkeypatch, tmp_path):
    """The hub that huggingface_hub talks to, with nothing in it, and an empty cache in `tmp_path`."""
    for kept in (served.repos, served.revisions, served.refusals, served.requests):
        kept.clear()
    to(monkeypatch, served.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bars_of_environment(monkeypatch, None)
    monkeypatch.chdir(tmp_path)
    yield served
    huggingface_hub.close_session()


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small", fields(), tensors(fields()))


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "sharded", fields(), tensors(fields()), shards=2)


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
    for module in (constants, sys.modules["huggingface_hub.utils.tqdm"]):
        monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", disabled)


def refusal(path, kind=MissingFile, **arguments) -> str:
    """What `local_folder` says, which begins with what it was given and ends in what to do."""
    with pytest.raises(kind) as caught:
        local_folder(path, **arguments)
    assert isinstance(caught.value, PerparamError)
    return str(caught.value)


# What is fetched.


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


def test_what_the_cache_has_is_not_fetched_again(hub, sharded):
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
def test_a_revision_is_a_branch_or_a_tag_and_the_folder_that_of_its_commit(hub, small, tmp_path, revision):
    commit = hub.add(REPO, small, revision or "main")
    other = write(tmp_path / "other", fields(), tensors(fields(), seed=1), shards=2)
    hub.add(REPO, other, "another")
    folder = local_folder(REPO, revision)
    assert folder.name == commit
    assert (folder / "config.json").is_symlink()
    assert (folder / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_a_revision_is_a_commit(hub, small, tmp_path):
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


# Without the network.


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
def test_a_disk_that_takes_no_more_is_an_error_that_names_the_cache(hub, small, monkeypatch, number, text):
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
def test_what_is_neither_a_folder_nor_a_name_is_refused_with_both(hub, path):
    message = refusal(path).replace("\\x00", "\0")  # a message shows control characters escaped
    assert message.startswith(f"{path}: neither a folder nor a name on the hub.")
    assert "such as './qwen3', or a name as a string, such as 'Qwen/Qwen3-8B'." in message
    assert hub.requests == []


def test_names_are_what_huggingface_hub_takes_for_one(hub, monkeypatch):
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


# Progress bars.


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(None, False, False), (None, True, True), (False, True, False), (True, False, True)],
)
def test_progress_bars_are_shown_where_asked_or_in_a_terminal(hub, small, monkeypatch, progress, terminal, shown):
    hub.add(REPO, small)
    states = []

    def watched(*_, **__):
        states.append(not are_progress_bars_disabled())
        raise RuntimeError("enough")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert "RuntimeError: enough" in refusal(REPO, progress=progress)
    assert states == [shown]
    assert not are_progress_bars_disabled()


def test_progress_bars_that_were_off_stay_off(hub, small):
    hub.add(REPO, small)
    disable_progress_bars()
    try:
        local_folder(REPO, progress=False)
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("progress", [False, True])
def test_the_environment_goes_before_without_a_warning(hub, monkeypatch, disabled, progress):
    bars_of_environment(monkeypatch, disabled)
    refusal("owner/absent", progress=progress)
    assert are_progress_bars_disabled() == disabled


def test_nothing_is_written_to_stderr_that_is_no_terminal(hub, small, capfd):
    hub.add(REPO, small)
    local_folder(REPO)
    assert capfd.readouterr() == ("", "")


# As its users start it.


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
