"""Headers of safetensors files on the Hugging Face hub, read with ranged requests: no byte of a tensor is fetched."""

from __future__ import annotations

import concurrent.futures
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from ..policies.errors import MissingFile
from .safetensors.reader import Tensor, tensors_of

_TIMEOUT = 10  # seconds without an answer, as huggingface_hub's default

_CONNECTIONS = 8  # files whose headers are fetched at a time


def remote_headers(repo: str, commit: str, files: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """{file name: {tensor name: tensor}} of safetensors files of a repository; their tensors cannot be read.

    Raises:
      InvalidCheckpoint: a header that `read_header` refuses.
      MissingFile: no such file, or a hub that does not send parts of files.
      Errors of huggingface_hub and of its HTTP library.
    """
    with concurrent.futures.ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="perparam") as pool:
        return dict(zip(files, pool.map(lambda file: _header(repo, commit, file), files), strict=True))


def _header(repo: str, commit: str, file: str) -> dict[str, Tensor]:
    from huggingface_hub import errors, hf_hub_url

    url = hf_hub_url(repo, file, revision=commit)
    try:
        beginning, size = _part(url, 0, 8)
    except errors.EntryNotFoundError as error:
        raise MissingFile(
            f"{repo}: has no {file} on the hub. Choose a model with safetensors files, not pickles."
        ) from error
    place = 0

    def read(count: int) -> bytes:
        nonlocal place
        data = beginning if place == 0 else _part(url, place, count)[0] if count else b""
        place += len(data)
        return data

    return tensors_of(pathlib.Path(repo, file), read, size)


def _part(url: str, start: int, count: int) -> tuple[bytes, int]:
    """`count` bytes of the file at `url` from byte `start` on, fewer only at its end, and the length of the file."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    wanted = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    options = {"headers": {**build_hf_headers(), **wanted}, "timeout": _TIMEOUT}
    # Of httpx, or of requests before huggingface_hub 1.0. Streamed, so that no server can send a whole file.
    session: Any = get_session()
    if callable(session.stream):
        request = session.stream("GET", url, **options)
    else:
        request = session.get(url, stream=True, **options)
    with request as response:
        length = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
        if response.status_code == 416 and length is not None:  # an empty file
            return b"", int(length[1])
        hf_raise_for_status(response)
        if response.status_code != 206 or length is None:
            raise MissingFile(
                f"{url}: the server does not send parts of files, so that headers cannot be read without the weights. "
                "Download the repository with `hf download`, and pass its folder."
            )
        data = b""
        for chunk in response.iter_raw() if hasattr(response, "iter_raw") else response.iter_content(count):
            data += chunk
            if len(data) >= count:
                break
    if len(data) != min(count, int(length[1]) - start):
        raise ConnectionError(f"the server sent {len(data)} of {count} bytes")
    return data, int(length[1])
