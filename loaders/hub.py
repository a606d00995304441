"""`local_folder`: a checkpoint's folder on this machine, downloaded from the Hugging Face hub if necessary, and
`checkpoint_folder`: the same, with or without the weights."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import re
import sys
from collections.abc import Sequence

from ..policies.errors import InvalidCheckpoint, MissingFile, PerparamError
from .layout import CONFIG, GENERATION, INDEX, TOKENIZER
from .remote import remote_headers
from .safetensors.reader import Tensor
from .shards import shard_names

_SMALL = [CONFIG, GENERATION, INDEX, *TOKENIZER]
_NAME = re.compile(r"(\w([\w.-]*\w)?/)?\w([\w.-]*\w)?", re.ASCII)


def checkpoint_folder(
    path: str | os.PathLike[str],
    revision: str | None = None,
    *,
    progress: bool | None = None,
    weights: bool = True,
    required: Sequence[str] = (CONFIG,),
) -> tuple[pathlib.Path, dict[str, dict[str, Tensor]]]:
    """The folder of a checkpoint, and the headers of those safetensors files that are not in it, by file name.

    weights  False: of a repository on the hub, the headers of the files that are not in the cache are fetched

    Other arguments and errors are those of `local_folder`.
    """
    folder = local_folder(path, revision, progress=progress, weights=weights, required=required)
    if weights or os.path.isdir(path):
        return folder, {}
    repo = os.fspath(path)
    absent = [file for file in shard_names(folder) if not (folder / file).is_file()]
    try:
        return folder, remote_headers(repo, folder.name, absent)
    except PerparamError:
        raise
    except Exception as error:  # of many kinds, see `_snapshot`
        raise _failure(repo, revision, error, f", and the cache lacks {_listed(absent)}") from error


def local_folder(
    path: str | os.PathLike[str],
    revision: str | None = None,
    *,
    progress: bool | None = None,
    weights: bool = True,
    required: Sequence[str] | None = None,
) -> pathlib.Path:
    """The folder `path`, or the folder in huggingface_hub's cache with the repository of that name, after a download.

    path      a folder, or the name of a repository on the hub, such as "Qwen/Qwen3-8B"; of a repository, the config,
              the tokenizer and the safetensors files are downloaded unless they are in the cache
    revision  branch, tag or commit of the repository; None: the main branch
    progress  whether to show huggingface_hub's progress bars; None: only if stderr is a terminal
    weights   False: download the config and the tokenizer only
    required  files that a repository must have, besides the weights; None: the config with the weights, the tokenizer
              without them

    Raises:
      MissingFile: `path` is neither of the two, or a file is not in the cache and cannot be downloaded: there is no
        such model or revision, it has no safetensors files, it is private or gated, the network or the disk fails.
      InvalidCheckpoint: a folder with a revision, or an index that lists anything but safetensors files in its folder.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        if revision is None:
            return pathlib.Path(text)
        raise InvalidCheckpoint(f"{text}: is a folder, and only a name on the hub has a revision. Omit {revision!r}.")
    # The rules of huggingface_hub's validate_repo_id, without its limits of length.
    is_name = isinstance(path, str) and _NAME.fullmatch(text) and not re.search(r"--|\.\.|\.git$", text)
    if not is_name or os.path.exists(text):
        raise MissingFile(
            f"{text}: neither a folder nor a name on the hub. Pass an existing folder, such as './qwen3', or a name as "
            "a string, such as 'Qwen/Qwen3-8B'."
        )
    if required is None:
        required = [CONFIG] if weights else [TOKENIZER[0]]
    # Imported only here, since the import takes a third of a second.
    from huggingface_hub import constants, utils

    show = sys.stderr is not None and sys.stderr.isatty() if progress is None else progress
    with contextlib.ExitStack() as afterwards:
        # If an environment variable decides, huggingface_hub would only warn.
        if not (show or utils.are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None):
            utils.disable_progress_bars()
            afterwards.callback(utils.enable_progress_bars)
        return _snapshot(text, revision, weights, required)


def _snapshot(repo: str, revision: str | None, weights: bool, required: Sequence[str]) -> pathlib.Path:
    """The folder of a repository in the cache, after a download of the files that are not there."""
    from huggingface_hub import HfApi, errors, snapshot_download

    # snapshot_download silently falls back on the cache, even an incomplete one. Therefore the hub is asked first, with
    # a timeout of ten seconds. requests, httpx and hf_xet raise different errors in each version: hence `Exception`.
    hub_error, remote_files, missing = None, set(), ""
    try:
        siblings = HfApi().model_info(repo, revision=revision, timeout=10).siblings
        remote_files = {file.rfilename for file in siblings or ()}
    except errors.RevisionNotFoundError as error:
        raise _failure(repo, revision, error) from error
    except Exception as error:  # no answer from the hub, see above: the cache may do
        hub_error, missing = error, ", and the cache has no file of it"
    try:
        offline = hub_error is not None
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=_SMALL, local_files_only=offline)
        folder = pathlib.Path(snapshot)
        files = [*required, *(shard_names(folder) if weights else [])]
        if not offline:
            if absent := [file for file in files if file not in remote_files]:
                raise MissingFile(
                    f"{repo}: has no {_listed(absent)} on the hub. Choose a model with safetensors files, not pickles."
                )
            # The same commit, since the branch may have moved in the meantime; escaped, since these are patterns.
            if files:
                snapshot_download(repo, revision=folder.name, allow_patterns=[glob.escape(file) for file in files])
        if absent := [file for file in files if not (folder / file).is_file()]:
            missing = f", and the cache lacks {_listed(absent)}"
            raise ConnectionError("the connection was lost")
    except PerparamError:
        raise
    except Exception as error:  # of many kinds, see above
        # Since 1.22 the first sentence of huggingface_hub's message may say what else the cache lacks.
        if hasattr(error, "snapshot_path"):
            missing = f": {str(error).partition('. ')[0]}"
        raise _failure(repo, revision, hub_error or error, missing) from (hub_error or error)
    return folder


def _listed(files: Sequence[str]) -> str:
    return ", ".join(files[:5]) + (f" and {len(files) - 5} more" if files[5:] else "")


def _failure(repo: str, revision: str | None, error: Exception, missing: str = "") -> MissingFile:
    """The error that reports `error` with its cause and a remedy; `missing` says what the cache lacks."""
    from huggingface_hub import constants, errors

    hub, login = constants.ENDPOINT, "log in with `hf auth login` or set HF_TOKEN"
    text = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
    if isinstance(error, errors.GatedRepoError):
        what, todo = (
            "is gated, and its owner decides who has access",
            f"Request access at {hub}/{repo}, then {login}",
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        what, todo = f"not a folder, and {hub} has no such model, or it is private", f"Correct the name, or {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, todo = f"has no revision {revision or 'main'!r}", f"Pass a branch, tag or commit that {hub}/{repo} lists"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        what = "downloads are disabled (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
        todo = "Download it once without that variable, or pass a folder"
    elif getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        what, todo = f"{hub} denies access ({text})", f"To use another account or token, {login}"
    elif isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        what = f"the cache {constants.HF_HUB_CACHE} cannot be written ({error})"
        todo = "Free disk space, or set HF_HUB_CACHE to another folder"
    else:
        what = f"the download from {hub} failed ({type(error).__name__}: {text})"
        todo = "Check the network and try again"
    return MissingFile(f"{repo}: {what}{missing}. {todo}.")
