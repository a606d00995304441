"""The files that policies come from: presets, and the policies that `include:` names in YAML."""

from __future__ import annotations

import difflib
import functools
import pathlib

from .errors import InvalidPolicy, MissingFile, shown

_PRESETS = pathlib.Path(__file__).parent / "presets"
_MAX_DEPTH = 8  # files that include one another


@functools.cache
def preset_names() -> tuple[str, ...]:
    """Returns the names of the presets in alphabetical order."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.yaml")))


def preset_file(name: str) -> pathlib.Path:
    """Returns the YAML file of the preset `name`."""
    return _PRESETS / f"{name}.yaml"


def nearest_preset(name: str) -> str:
    """Returns the hint of an error for a name that is no preset: " Did you mean …?", or nothing."""
    near = difflib.get_close_matches(name, preset_names(), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def is_file(path: str | pathlib.Path) -> bool:
    """Returns whether `path` is a regular file; False for text that cannot be the name of a file."""
    try:
        return pathlib.Path(path).is_file()
    except (OSError, ValueError):  # too long, as YAML text can be, or with a NUL character
        return False


def included_file(name: str, files: tuple[pathlib.Path, ...]) -> tuple[pathlib.Path, str]:
    """Returns the file for `include: name`, and what errors and plans call it.

    files  the file that has the `include`, and before it the files that include it; empty for text without a file

    Raises:
      MissingFile: for a name that is neither a preset nor a file, relative to the folder of the last of `files`.
      InvalidPolicy: for a file that includes itself, and for more than 8 files that include one another.
    """
    if name in preset_names():
        return preset_file(name), f"{name}.yaml"
    file = files[-1].parent / name if files else None
    if file is None or not is_file(file):
        where = f"relative to the folder of {files[-1]}" if files else "possible only in a policy that is a file itself"
        raise MissingFile(
            f"include: {shown(name)} is neither a preset ({', '.join(preset_names())}) nor a file; paths are {where}."
            f"{nearest_preset(name) or ' Correct the name.'}"
        )
    if any(file.samefile(other) for other in files):
        raise InvalidPolicy(f"include: {shown(name)} includes itself. Remove one `include`.")
    if len(files) >= _MAX_DEPTH:
        raise InvalidPolicy(f"include: more than {_MAX_DEPTH} files include one another. Write their rules in fewer.")
    return file, str(file)
