"""What the tests of `new_folder` share: folders whose files all say the same, and what stands beside them."""

import pathlib
import sys

from perparam.loaders.atomic import new_folder

TESTS = pathlib.Path(__file__).parent
LINUX = sys.platform == "linux"


def ours(name):
    return name.startswith("file")


def fill(folder, text, count=3):
    """Files that all say the same, in a folder made anew."""
    with new_folder(folder, ours) as work:
        for i in range(count):
            (work / f"file{i}").write_text(text)


def fill_and_raise(folder, error):
    """`error` in the middle of filling a folder; a function is called there."""
    with new_folder(folder, ours) as work:
        (work / "file0").write_text("second")
        if isinstance(error, BaseException):
            raise error
        error()


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def leftovers(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)
