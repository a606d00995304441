"""Parameters of any safetensors files, by their own names: for models that perparam has no family for."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Mapping

from ..policies.blocks import Block, grid_shape
from ..policies.dtypes import is_activation, is_narrow
from ..policies.errors import InvalidCheckpoint, InvalidScale, MissingFile, UnsupportedConfig, named, shown
from ..policies.formats import Format
from ..policies.paths import scale_path
from ..policies.trees import ArrayInfo
from .checkpoint import Checkpoint, CheckpointTree, CheckpointWarning, checkpoint_in
from .families import FAMILIES
from .families.quantization import read_quantization
from .fields import Fields
from .hub import checkpoint_folder
from .json_file import read_json
from .layout import CONFIG, INDEX, WHOLE
from .safetensors.reader import Tensor, read_header
from .shards import Headers, read_tensors


@dataclasses.dataclass(frozen=True)
class BareCheckpoint:
    """Safetensors files without a model: where the data of each parameter is; no weights.

    folder   path of the folder or the file
    tensors  {path: tensor}; the path is the tensor's name with "/" for ".", and scales are beside their parameter
    blocks   {path: block} of the scaled pairs whose block the files specify
    reason   why there is no model
    """

    folder: pathlib.Path
    tensors: dict[str, Tensor]
    blocks: dict[str, Block]
    reason: str
    config: None = None

    @property
    def infos(self) -> dict[str, ArrayInfo]:
        """{path: shape and format} of every parameter and its scales."""
        return {
            path: ArrayInfo(tensor.shape, Format(tensor.dtype, self.blocks.get(path)))
            for path, tensor in self.tensors.items()
        }

    @property
    def tree(self) -> CheckpointTree:
        """`infos` as nested mappings."""
        return CheckpointTree.of(self.infos, None)


def open_parameters(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    progress: bool | None = None,
    weights: bool = True,
    bare: bool | None = None,
) -> Checkpoint | BareCheckpoint:
    """The parameters of a checkpoint: of a model, or by the names in the files; reads headers, not weights.

    path                         a safetensors file, or as for `load_model`
    revision, progress, weights  as for `open_checkpoint`
    bare                         True: the names in the files; False: a model's, as `open_checkpoint`; None: a model's
                                 if there is a config.json with a `model_type` that is implemented

    Raises:
      As `open_checkpoint`. Without a model: two tensors of the same path are an InvalidCheckpoint.
    """
    if os.path.isfile(path) and not bare and bare is not None:
        raise MissingFile(f"{os.fspath(path)}: a file, and bare=False asks for a model. Pass the model's folder.")
    if os.path.isfile(path):
        if revision is not None:
            raise InvalidCheckpoint(f"{os.fspath(path)}: is a file, and has no revision. Omit {revision!r}.")
        file = pathlib.Path(path)
        return _bare(file, read_header(file), None, "a file has no config.json")
    required = [CONFIG] if bare is False else []
    folder, headers = checkpoint_folder(path, revision, progress=progress, weights=weights, required=required)
    reason = "bare=True" if bare else None if bare is False else _without_model(folder)
    if reason is None:
        return checkpoint_in(folder, headers)
    return _bare(folder, _tensors(folder, headers), _block(folder), reason)


def checkpoint_tree(
    path: str | os.PathLike[str], *, revision: str | None = None, bare: bool | None = None
) -> CheckpointTree:
    """The parameters of a checkpoint as nested mappings of `ArrayInfo` (shape and format), for `Policy.explain`.

    path, revision, bare  as for `load_params`

    Of a repository on the hub, headers alone are fetched.

    Raises:
      As `load_params`.
    """
    checkpoint = open_parameters(path, revision=revision, weights=False, bare=bare)
    warn_if_guessed(checkpoint, bare)
    return checkpoint.tree


def warn_if_guessed(checkpoint: Checkpoint | BareCheckpoint, bare: bool | None) -> None:
    """Warns if there is a config.json, and the names in the files are used since its model is not implemented."""
    if isinstance(checkpoint, BareCheckpoint) and bare is None and (checkpoint.folder / CONFIG).is_file():
        warnings.warn(
            f"{checkpoint.folder}: {checkpoint.reason}. The parameters have the names in the files. Pass bare=True if "
            "you expect this.",
            CheckpointWarning,
            stacklevel=3,
        )


def _without_model(folder: pathlib.Path) -> str | None:
    """The reason why a folder has no model that is implemented; None if it has."""
    if not (folder / CONFIG).is_file():
        return f"there is no {CONFIG}"
    kind = Fields(str(folder / CONFIG), read_json(folder / CONFIG)).get("model_type", str)
    return None if kind in FAMILIES else f"model_type {shown(kind)} is not supported"


def _tensors(folder: pathlib.Path, headers: Headers) -> dict[str, Tensor]:
    """{name: tensor} of the files that Hugging Face's layout names, or of the only safetensors file of the folder."""
    if headers or any((folder / name).is_file() for name in (WHOLE, INDEX)):
        return read_tensors(folder, headers)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    found = f"{len(files)} other safetensors files. Pass one of them" if files else "no other safetensors file"
    raise MissingFile(f"{folder}: contains neither {WHOLE} nor {INDEX}, and {found}.")


def _block(folder: pathlib.Path) -> Block | None:
    """The block that config.json gives for all quantised parameters; None if it gives none that can be read."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        quantization = read_quantization(Fields(str(folder / CONFIG), read_json(folder / CONFIG)))
    except UnsupportedConfig:
        return None
    return None if quantization is None else quantization.block


def by_paths(folder: pathlib.Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{path: tensor} of {name: tensor}; scales have two axes.

    Raises:
      InvalidCheckpoint: two tensors of one path, or a tensor whose path is within that of another.
    """
    names: dict[str, str] = {}
    by_path: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path = _path(name, tensors)
        if path in names:
            raise InvalidCheckpoint(
                f"{folder}: {named(names[path])} and {named(name)} both have the path {named(path)}. Rename one."
            )
        names[path] = name
        flat_scales = path != _own_path(name) and len(tensor.shape) < 2  # one for the matrix, or one for each row
        by_path[path] = dataclasses.replace(tensor, shape=(*(tensor.shape or (1,)), 1)) if flat_scales else tensor
    for path in by_path:
        parents = path.split("/")[:-1]
        within = ("/".join(parents[: i + 1]) for i in range(len(parents)))
        if inside := next((parent for parent in within if parent in by_path), None):
            raise InvalidCheckpoint(
                f"{folder}: {named(names[inside])} is a tensor, and {named(names[path])} is within it. Rename one."
            )
    return by_path


def _bare(folder: pathlib.Path, tensors: Mapping[str, Tensor], block: Block | None, reason: str) -> BareCheckpoint:
    by_path = by_paths(folder, tensors)
    blocks = {path: _block_of(by_path, path, block) for path in by_path if scale_path(path) in by_path}
    return BareCheckpoint(folder, by_path, {path: each for path, each in blocks.items() if each is not None}, reason)


def _own_path(name: str) -> str:
    return name.replace(".", "/")


def _path(name: str, tensors: Mapping[str, Tensor]) -> str:
    """The path of a tensor. The scales `….weight_scale` of compressed-tensors have that of `….weight_scale_inv`."""
    kernel = tensors.get(name.removesuffix("_scale")) if name.endswith("_scale") else None
    is_kernel = kernel is not None and is_narrow(kernel.dtype) and len(kernel.shape) == 2
    if kernel is None or not is_kernel or not is_activation(tensors[name].dtype):
        return _own_path(name)
    return scale_path(_own_path(kernel.name))


def _block_of(tensors: Mapping[str, Tensor], path: str, block: Block | None) -> Block | None:
    """The block of a scaled pair, if the files specify it: perparam's metadata, config.json, or a scale for each row or
    for the whole matrix."""
    tensor, grid = tensors[path], tensors[scale_path(path)].shape
    candidates = [tensor.block] if tensor.block else [block, (1, -1), (-1, -1)]
    for candidate in candidates:
        try:
            if candidate is not None and (tensor.block or grid_shape(tensor.shape, candidate) == grid):
                return candidate
        except InvalidScale:  # fewer than two axes
            break
    return None
