"""The shape of the repository: imports point one way, and what is installed is what is there."""

import ast
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = ("policies", "models", "loaders")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported_layers(path):
    """The layers of perparam that a file imports, by relative or absolute import."""
    parts = ("perparam", *path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else ()
            module = (*base, *(node.module or "").split("."))
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        for name in names:
            name = tuple(part for part in name if part)
            if name[0] == "perparam":
                yield name[1] if len(name) > 1 and name[1] in (*LAYERS, "examples") else "face"


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    for path in (ROOT / layer).rglob("*.py"):
        assert set(imported_layers(path)) <= allowed, path


def test_the_check_of_imports_sees_relative_and_absolute_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "x.py"
    file.write_text(
        "from ..loaders.load import a\nfrom ..policies import b\nimport perparam.examples.c\nfrom .. import d\n"
    )
    assert set(imported_layers(file)) == {"loaders", "policies", "examples", "face"}


def test_the_package_list_is_the_folders():
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py")}
    folders = {folder for folder in folders if folder.parts[0] in (*LAYERS, "examples")}
    expected = {"perparam"} | {".".join(("perparam", *folder.parts)) for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == expected


def test_importing_perparam_touches_no_device_and_no_environment():
    code = (
        "import os, jax\n"
        "from jax._src import xla_bridge\n"
        "before = dict(os.environ)\n"
        "import perparam, perparam.__main__\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
        "assert dict(os.environ) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_wheel_holds_exactly_the_package(tmp_path):
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    source = tmp_path / "source"
    for file in files:
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", source]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shipped = ("policies/", "models/", "loaders/", "examples/")
    expected = {
        f"perparam/{file}"
        for file in files
        if file in ("__init__.py", "__main__.py", "terminal.py", "py.typed")
        or (file.startswith(shipped) and file.endswith((".py", ".yaml")))
    }
    assert held == expected
