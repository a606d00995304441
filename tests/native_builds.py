"""Builds of the native library for tests: with setup.py, in another folder than the package's."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
CXX = next(
    (command for command in (os.environ.get("CXX"), "c++", "g++", "clang++") if command and shutil.which(command)), None
)


def build(folder: pathlib.Path, source: pathlib.Path = ROOT, **environment: str) -> pathlib.Path:
    """Compiles the sources of a tree; returns the library, whose objects stay in the folder for the next call."""
    places = ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    done = subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "perparam" / "policies" / "native" / "libperparam.cpu.so"
