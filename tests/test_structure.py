"""The shape of the repository: imports point one way, and what is installed is what is there."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import native_builds
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
                yield name[1] if len(name) > 1 and name[1] in (*LAYERS, "commands", "examples") else "face"


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


def modules_imported(path, package):
    """The modules of a package that a file imports, inside functions too; those that only types need are left out."""
    parts = ("perparam", *path.relative_to(ROOT).with_suffix("").parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            base = parts[: len(parts) - node.level] if node.level else ()
            module = tuple(part for part in (*base, *(node.module or "").split(".")) if part)
            for name in {(*module, alias.name) for alias in node.names}:
                file = ROOT.joinpath(*name[1:]).with_suffix(".py")
                package_file = ROOT.joinpath(*name[1:], "__init__.py")
                of_module = ROOT.joinpath(*module[1:]).with_suffix(".py")
                of_package = ROOT.joinpath(*module[1:], "__init__.py")
                found = next((each for each in (file, package_file, of_module, of_package) if each.is_file()), None)
                if found is not None and name[:2] == ("perparam", package):
                    yield found


def ring(imports):
    """A ring of modules that import each other, or None."""
    done, waiting = set(), []

    def visit(module):
        if module in waiting:
            return [*waiting[waiting.index(module) :], module]
        if module in done:
            return None
        waiting.append(module)
        found = next((r for r in map(visit, sorted(imports.get(module, ()))) if r), None)
        waiting.pop()
        done.add(module)
        return found

    return next((r for r in map(visit, sorted(imports)) if r), None)


@pytest.mark.parametrize("layer", [*LAYERS, "commands"])
def test_no_modules_import_each_other(layer):
    imports = {path: set(modules_imported(path, layer)) - {path} for path in (ROOT / layer).rglob("*.py")}
    assert sum(map(len, imports.values())) > len(imports) / 2
    found = ring(imports)
    assert found is None, " -> ".join(str(path.relative_to(ROOT)) for path in found)


def test_the_check_for_rings_sees_imports_inside_functions(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "policies" / "inner").mkdir(parents=True)
    (tmp_path / "policies" / "__init__.py").write_text("from .a import x\n")
    (tmp_path / "policies" / "a.py").write_text("def f():\n    from . import b\n")
    (tmp_path / "policies" / "b.py").write_text("from .inner import c\n")
    (tmp_path / "policies" / "inner" / "__init__.py").write_text("from .c import y\n")
    (tmp_path / "policies" / "inner" / "c.py").write_text("from ..a import f\n")
    imports = {path: set(modules_imported(path, "policies")) for path in (tmp_path / "policies").rglob("*.py")}
    assert [path.name for path in ring(imports)] == ["a.py", "b.py", "c.py", "a.py"]
    del imports[tmp_path / "policies" / "inner" / "c.py"]
    assert ring(imports) is None


def strings(path):
    """The text constants of a file, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_policies_name_no_module_of_any_model():
    from perparam.loaders.families import FAMILIES

    entries = [entry for family in FAMILIES.values() for entry in family.names]
    names = {part for entry in entries for part in entry.path.split("/")[:-1]} - {"{i}", "layers"}
    assert {"q_proj", "k_norm", "lm_head", "embed_tokens"} <= names
    for path in (ROOT / "policies").rglob("*.py"):
        named = {word for text in strings(path) for word in re.findall(r"\w+", text)} & names
        assert not named, f"{path.relative_to(ROOT)} names {', '.join(named)}"


def test_the_package_list_is_the_folders():
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py")}
    folders = {folder for folder in folders if folder.parts[0] in (*LAYERS, "commands", "examples")}
    expected = {"perparam"} | {".".join(("perparam", *folder.parts)) for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == expected


def test_importing_perparam_touches_no_device_and_no_environment():
    code = (
        "import os, jax\n"
        "from jax._src import xla_bridge\n"
        "before = dict(os.environ)\n"
        "import perparam, perparam.__main__\n"
        "from perparam.policies.native import library\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
        "assert library._load.cache_info().currsize == 0\n"
        "assert dict(os.environ) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# CI installs the wheel that a compiler made.
@pytest.mark.parametrize(
    "compiles", [pytest.param(True, marks=pytest.mark.thorough), pytest.param(False, marks=pytest.mark.slow)]
)
def test_the_wheel_holds_exactly_the_package(tmp_path, compiles):
    if compiles and native_builds.CXX is None:
        pytest.skip("there is no C++ compiler")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    source = tmp_path / "source"
    for file in files:
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", source]
    compiler = {} if compiles else {"CXX": "/bin/false"}
    subprocess.run(build, check=True, env={**os.environ, **compiler})
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    platform = re.fullmatch(r"perparam-[\d.]+-py3-none-(\w+)", wheel.stem).group(1)  # for every version of Python
    assert (platform != "any") == compiles
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shipped = ("policies/", "models/", "loaders/", "commands/", "examples/")
    expected = {
        f"perparam/{file}"
        for file in files
        if file in ("__init__.py", "__main__.py", "generation.py", "training.py", "py.typed")
        or (file.startswith(shipped) and file.endswith((".py", ".yaml")))
        or file.startswith("examples/tiny/")
    }
    assert held == expected | ({"perparam/policies/native/libperparam.cpu.so"} if compiles else set())
