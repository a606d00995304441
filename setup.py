"""Compiles the native kernels of policies/native into one shared library, where there is a C++ compiler.

The library is plain C++ that ctypes loads: it uses no Python API, so that one wheel serves every version of Python.
Where it does not compile, the install succeeds without it.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = pathlib.Path("policies/native")
PLATFORM = sysconfig.get_platform()
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(*[PLATFORM.rpartition("-")[2]] * 2)

# -ffp-contract=off: results are the same bits in every build; kernels ask for FMA by name.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
INSTRUCTIONS = {
    ("x86_64", "isa_avx2"): AVX2,
    ("x86_64", "isa_avx512"): AVX512,
    ("x86_64", "isa_avx512bf16"): [*AVX512, "-mavx512vbmi", "-mavx512bf16"],
    ("aarch64", "isa_neonbf16"): ["-march=armv8.6-a+bf16"],
}
"""What a source needs beside FLAGS, on the machine that has it; elsewhere `#if` leaves its contents out."""


def sources_hash():
    """A hash of all sources, which the library contains: a test compares it with those of the tree."""
    files = sorted(path for path in NATIVE.rglob("*") if path.suffix in (".cc", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def compiler():
    """The command that compiles C++: $CXX, or Python's own compiler, or one in $PATH."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    commands = [sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"]
    found = (command.split()[0] for command in commands if command and shutil.which(command.split()[0]))
    return [next(found, "c++")]


def run(command):
    """Runs a command of the compiler; raises CompileError with all that it wrote."""
    print(shlex.join(map(str, command)), flush=True)
    try:
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{error.output}\n{command[0]} failed with exit status {error.returncode}") from error


class BuildLibrary(build_ext):
    """Compiles each source with the flags of its instruction set, in parallel, and only what has changed."""

    def run(self):
        for ext in self.extensions:  # what an earlier run compiled, perhaps from other sources
            in_tree, built = self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
            for path in (in_tree, built) if self.inplace else (built,):
                pathlib.Path(path).unlink(missing_ok=True)
        super().run()
        if not all(pathlib.Path(self.get_ext_fullpath(ext.name)).is_file() for ext in self.extensions):
            # Nothing was compiled: the wheel is one for every platform.
            self.extensions = self.distribution.ext_modules = []
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure = True

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        sanitizers = os.environ.get("PERPARAM_SANITIZE")
        extra = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"] if sanitizers else []
        self.objects = pathlib.Path(self.build_temp)
        self.objects.mkdir(parents=True, exist_ok=True)
        self.command = [*compiler(), *FLAGS, *extra, *shlex.split(os.environ.get("CXXFLAGS", "")), "-isystem", str(NATIVE)]
        self.newest = max(os.path.getmtime(header) for header in ext.depends)
        self.sources = sources_hash()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self.compile, map(pathlib.Path, sorted(ext.sources))))
        library = pathlib.Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        undefined = ["-Wl,-z,defs"] if PLATFORM.startswith("linux") and not sanitizers else []
        run([*self.command, "-shared", *undefined, *objects, "-o", library, *shlex.split(os.environ.get("LDFLAGS", ""))])

    def compile(self, source):
        """The object file of a source; compiled unless it is newer than the source, all headers and the flags."""
        flags = INSTRUCTIONS.get((MACHINE, source.stem), [])
        if source.stem == "version":
            flags = [f'-DPERPARAM_SOURCES="{self.sources}"']
        target, made_by = self.objects / f"{source.stem}.o", self.objects / f"{source.stem}.command"
        command = [*self.command, *flags, "-c", source, "-o", target]
        text = shlex.join(map(str, command))
        made = made_by.is_file() and made_by.read_text() == text and target.is_file()
        if self.force or not made or target.stat().st_mtime <= max(self.newest, source.stat().st_mtime):
            made_by.unlink(missing_ok=True)
            run(command)
            made_by.write_text(text)
        return target


class Wheel(bdist_wheel):
    """A wheel for every Python 3 of the platform, or of all platforms where nothing was compiled."""

    def get_tag(self):
        platform = super().get_tag()[2]
        return "py3", "none", platform.replace("universal2", os.uname().machine) if "macos" in platform else platform


library = Extension(
    "perparam.policies.native.libperparam",
    sources=sorted(map(str, NATIVE.glob("*.cc"))),
    depends=sorted(str(path) for path in NATIVE.rglob("*") if path.suffix == ".h" or path.name == "README.md"),
    # A developer who compiles sees errors; whoever installs gets perparam without native kernels.
    optional="build_ext" not in sys.argv,
)

setup(
    # The compilers of Windows take other flags, and nobody has tried.
    ext_modules=[] if sys.platform == "win32" else [library],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
