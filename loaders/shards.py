"""The safetensors files of a checkpoint's folder: which ones there are, and the tensors in their headers."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

from ..policies.errors import InvalidCheckpoint, MissingFile, named, shown
from .json_file import read_json
from .layout import INDEX, WHOLE
from .safetensors.reader import Tensor, read_header

Headers = Mapping[str, Mapping[str, Tensor]]
"""{file name: {tensor name: tensor}}, for files whose headers were read elsewhere."""


def weight_map(index: pathlib.Path) -> dict[str, str]:
    """{tensor name: file name}, as `model.safetensors.index.json` lists them.

    Raises:
      MissingFile: there is no such file.
      InvalidCheckpoint: not a valid index, or a value that is not the name of a safetensors file in the same folder.
    """
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise InvalidCheckpoint(f"{index}: weight_map is not a mapping from tensors to files. Download it again.")
    for file in set(weights.values()):
        # Names, not paths: an index must not reach outside its folder.
        if not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", file, re.ASCII):
            raise InvalidCheckpoint(
                f"{index}: {shown(file)} is not the name of a safetensors file in this folder. Do not use this "
                "checkpoint."
            )
    return weights


def shard_names(folder: pathlib.Path) -> list[str]:
    """Names of the safetensors files that a folder must contain: model.safetensors, or those that its index lists."""
    if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        return [WHOLE]
    return sorted(set(weight_map(folder / INDEX).values()))


def read_tensors(folder: pathlib.Path, headers: Headers | None = None) -> dict[str, Tensor]:
    """{tensor name: tensor} of all safetensors files of a folder.

    headers  headers of files that are not in the folder

    Raises:
      MissingFile, InvalidCheckpoint: files that are missing or damaged, or an index that does not fit them.
    """
    headers = headers or {}
    files = shard_names(folder)
    absent = [file for file in files if file not in headers and not (folder / file).is_file()]
    if absent == [WHOLE]:
        raise MissingFile(f"{folder}: contains neither {WHOLE} nor {INDEX}. Is the download complete?")
    if absent:
        raise MissingFile(
            f"{folder}: {len(absent)} of {len(files)} shards {'is' if len(absent) == 1 else 'are'} missing: "
            f"{', '.join(absent[:5])}. Complete the download."
        )
    shards = {file: headers[file] if file in headers else read_header(folder / file) for file in files}
    if files == [WHOLE]:
        return dict(shards[WHOLE])
    weights = weight_map(folder / INDEX)
    wrong = [f"{named(name)} (not in {file})" for name, file in weights.items() if name not in shards[file]]
    if wrong:
        raise InvalidCheckpoint(
            f"{folder / INDEX}: lists tensors that are not in their file: {', '.join(wrong[:5])}. Download it again."
        )
    return {name: tensor for file in files for name, tensor in shards[file].items() if weights.get(name, file) == file}
