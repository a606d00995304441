"""The folder of a checkpoint: one that is there already, or what the Hugging Face hub has under a name."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import re
import sys

from ..policies.errors import InvalidCheckpoint, MissingFile, PerparamError
from .checkpoint import weight_map
from .layout import CONFIG, GENERATION, INDEX, TOKENIZER, WHOLE

_SMALL = [CONFIG, GENERATION, INDEX, *TOKENIZER]
_NAME = re.compile(r"(\w([\w.-]*\w)?/)?\w([\w.-]*\w)?", re.ASCII)


def local_folder(
    path: str | os.PathLike[str], revision: str | None = None, *, progress: bool | None = None, weights: bool = True
) -> pathlib.Path:
    """`path` where it is a folder; else the folder in huggingface_hub's cache that holds the model of that name.

    path      a folder; or a name on the hub, "owner/name", whose config, tokenizer and safetensors the cache will have
    revision  a branch, tag or commit of a name on the hub; None is its main branch
    progress  whether huggingface_hub shows its progress bars; None means where stderr is a terminal
    weights   False: a name's config and tokenizer are enough

    Raises:
      MissingFile: where it is neither, and where the hub does not give what the cache lacks: there is no such model or
        revision, or no safetensors, it is private or gated, the network or the disk fails.
      InvalidCheckpoint: for a folder with a revision, and an index that names other than safetensors files beside it.
    """
    given = os.fspath(path)
    if os.path.isdir(given):
        if revision is None:
            return pathlib.Path(given)
        raise InvalidCheckpoint(f"{given}: this is a folder, it has no revision {revision!r}. Leave the revision out.")
    # What huggingface_hub's validate_repo_id accepts, but for the limits of length.
    name = isinstance(path, str) and _NAME.fullmatch(given) and not re.search(r"--|\.\.|\.git$", given)
    if not name or os.path.exists(given):
        raise MissingFile(
            f"{given}: neither a folder nor a name on the hub. Give a folder that is there, such as './qwen3', or a "
            "name as a string, such as 'Qwen/Qwen3-8B'."
        )
    # Imported where the hub is meant, since it takes a third of a second.
    from huggingface_hub import constants, utils

    shown = sys.stderr is not None and sys.stderr.isatty() if progress is None else progress
    with contextlib.ExitStack() as afterwards:
        # Where the environment decides, huggingface_hub would only warn.
        if not (shown or utils.are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None):
            utils.disable_progress_bars()
            afterwards.callback(utils.enable_progress_bars)
        return _snapshot(given, revision, weights)


def _snapshot(repo: str, revision: str | None, weights: bool) -> pathlib.Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    # snapshot_download falls back on what the cache has, be it a part, without a word: whether the hub answers is asked
    # first, for ten seconds. What requests, httpx and hf_xet raise differs by version: hence `Exception`.
    unreached, listed, lacking = None, set(), ""
    try:
        siblings = HfApi().model_info(repo, revision=revision, timeout=10).siblings
        listed = {file.rfilename for file in siblings or ()}
    except errors.RevisionNotFoundError as error:
        raise _failure(repo, revision, error) from error
    except Exception as error:
        unreached, lacking = error, ", and the cache has nothing of it"
    try:
        offline = unreached is not None
        found = snapshot_download(repo, revision=revision, allow_patterns=_SMALL, local_files_only=offline)
        folder = pathlib.Path(found)
        whole = (folder / WHOLE).is_file() or not (folder / INDEX).is_file()
        shards = [WHOLE] if whole else sorted(set(weight_map(folder / INDEX).values()))
        files = [CONFIG, *shards] if weights else [TOKENIZER[0]]
        if not offline:
            if absent := [file for file in files if file not in listed]:
                raise MissingFile(
                    f"{repo}: the hub has no {', '.join(absent[:5])} there. Choose a model in safetensors, not pickles."
                )
            # The commit at hand, since the branch may have moved on meanwhile; escaped, since these are patterns.
            snapshot_download(repo, revision=folder.name, allow_patterns=[glob.escape(file) for file in files])
        if absent := [file for file in files if not (folder / file).is_file()]:
            lacking = f", and the cache lacks {', '.join(absent)}"
            raise ConnectionError("the connection was lost")
    except PerparamError:
        raise
    except Exception as error:
        # From 1.22 on huggingface_hub may know what else the cache lacks, and its first sentence says so.
        if hasattr(error, "snapshot_path"):
            lacking = f": {str(error).partition('. ')[0]}"
        raise _failure(repo, revision, unreached or error, lacking) from (unreached or error)
    return folder


def _failure(repo: str, revision: str | None, error: Exception, lacking: str = "") -> MissingFile:
    from huggingface_hub import constants, errors

    hub, login = constants.ENDPOINT, "log in with `hf auth login` or set HF_TOKEN"
    text = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
    if isinstance(error, errors.GatedRepoError):
        what, todo = "its owner decides who may download it", f"Ask for access at {hub}/{repo}, then {login}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what, todo = f"no folder here, and {hub} has no such model, or a private one", f"Correct the name, or {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, todo = f"no revision {revision or 'main'!r}", f"Give a branch, tag or commit that {hub}/{repo} shows"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        what = "the network is switched off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
        todo = "Download it once with the network on, or give a folder"
    elif getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        what, todo = f"{hub} refuses access ({text})", f"For another account or token {login}"
    elif isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        what = f"the cache {constants.HF_HUB_CACHE} cannot be written ({error})"
        todo = "Make room there, or set HF_HUB_CACHE to another folder"
    else:
        what = f"the download from {hub} failed ({type(error).__name__}: {text})"
        todo = "Check the network and try again"
    return MissingFile(f"{repo}: {what}{lacking}. {todo}.")
