"""setup.py: which flags each source is compiled with on which machine, and what is compiled again."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from native_builds import ROOT

pytestmark = pytest.mark.slow

AVX2 = {"-mavx2", "-mfma", "-mf16c"}
AVX512 = AVX2 | {"-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"}
X86 = {
    "isa_avx2": AVX2,
    "isa_avx512": AVX512,
    "isa_avx512bf16": AVX512 | {"-mavx512vbmi", "-mavx512bf16"},
}
ARM = {"isa_neonbf16": {"-march=armv8.6-a+bf16"}}
EVERYWHERE = {"isa_neon": set(), "isa_scalar": set(), "dispatch": set(), "version": set()}

COMPILER = """#!{python}
import pathlib, sys
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
"""


class Tree:
    """A tree with sources of every instruction set, and a compiler that only notes how it was called."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        shutil.copytree(ROOT / "policies/native/xla", folder / "policies/native/xla")
        for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, folder)
        for name in (*X86, *ARM, *EVERYWHERE):
            self.source(name).touch()
        self.log = folder / "log"
        (folder / "cxx").write_text(COMPILER.format(python=sys.executable, log=str(self.log)))
        (folder / "cxx").chmod(0o755)

    def source(self, name: str) -> pathlib.Path:
        return self.folder / "policies/native" / f"{name}.cc"

    def build(self, **environment: str) -> dict[str, set[str]]:
        """Machine flags, by the source that is compiled."""
        self.log.write_text("")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {**os.environ, "CXX": str(self.folder / "cxx"), **environment}
        subprocess.run(command, cwd=self.folder, env=environment, check=True, capture_output=True)
        calls = [line.split() for line in self.log.read_text().splitlines()]
        assert "-shared" in calls[-1]
        assert (self.folder / "policies/native/libperparam.cpu.so").is_file()
        return {
            pathlib.Path(call[call.index("-c") + 1]).stem: {f for f in call if f[:2] == "-m"} for call in calls[:-1]
        }


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("linux-x86_64", X86),
        ("macosx-13.0-x86_64", X86),
        ("linux-aarch64", ARM),
        ("macosx-11.0-arm64", ARM),
        ("linux-ppc64le", {}),
    ],
)
def test_sources_get_the_flags_of_their_instruction_set_on_its_machine_alone(tmp_path, platform, expected):
    none = {name: set() for name in (*X86, *ARM, *EVERYWHERE)}
    assert Tree(tmp_path).build(_PYTHON_HOST_PLATFORM=platform) == none | expected


def test_only_what_has_changed_is_compiled_again(tmp_path):
    tree = Tree(tmp_path)
    assert len(tree.build()) == len({*X86, *ARM, *EVERYWHERE})
    assert set(tree.build()) == set()
    tree.source("isa_avx2").write_text("// changed")
    assert set(tree.build()) == {"isa_avx2", "version"}  # which has the hash of all sources
    (tmp_path / "policies/native/simd.h").write_text("")
    assert len(tree.build()) == len({*X86, *ARM, *EVERYWHERE})
    assert len(tree.build(CXXFLAGS="-g")) == len({*X86, *ARM, *EVERYWHERE})


def test_a_compiler_that_fails_is_an_error_in_the_tree_and_leaves_no_library(tmp_path):
    tree = Tree(tmp_path)
    tree.build()
    with pytest.raises(subprocess.CalledProcessError) as error:
        tree.build(CXX="/bin/false")
    assert b"exit status 1: /bin/false" in error.value.stderr
    assert not (tmp_path / "policies/native/libperparam.cpu.so").exists()
