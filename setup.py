"""Compiles the native kernels of policies/native into one shared library, where there is a C++ compiler.

The library is plain C++ that ctypes loads: it uses no Python API, so that one wheel serves every version of Python.
Where it does not compile, the install succeeds without it.

CXX, CXXFLAGS and LDFLAGS in the environment are used. PERPARAM_SANITIZE=address,undefined adds these sanitizers.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import platform
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
PLATFORM = sysconfig.get_platform()  # $_PYTHON_HOST_PLATFORM where that is set, to compile for another machine
MACHINE = platform.machine() if PLATFORM.endswith("universal2") else PLATFORM.rpartition("-")[2]

# No contraction: a product and a sum are one FMA where a kernel says so, whatever the compiler.
FLAGS = shlex.split("-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra")
AVX2 = "-mavx2 -mfma -mf16c"
# The headers of GCC 12 use vectors before they have values, which are then not used.
AVX512 = f"{AVX2} -Wno-uninitialized -mavx512f -mavx512bw -mavx512vl -mavx512dq"
X86 = {"isa_avx2": AVX2, "isa_avx512": AVX512, "isa_avx512bf16": f"{AVX512} -mavx512vbmi -mavx512bf16"}
ARM = {"isa_neonbf16": "-march=armv8.6-a+bf16"}
INSTRUCTIONS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}.get(MACHINE, {})
"""Flags of the sources that need more than FLAGS; those of another machine's get none, and `#if` leaves them empty."""


def sources_hash():
    """A hash of all sources, which the library contains: a test compares it with those of the tree."""
    files = sorted(path for path in NATIVE.rglob("*") if path.suffix in (".cc", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def from_environment(name):
    """The words of a variable of the environment."""
    return shlex.split(os.environ.get(name, ""))


def compiler():
    """The command that compiles C++: $CXX, or that of Python itself, or one in $PATH."""
    of_python = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    found = (command for command in (of_python, "c++", "g++", "clang++") if shutil.which(command))
    return from_environment("CXX") or [next(found, "c++")]


def run(command):
    """Runs a command of the compiler; raises CompileError with all that it wrote."""
    print(shlex.join(map(str, command)), flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from error
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise CompileError(f"exit status {done.returncode}: {shlex.join(map(str, command))}\n{done.stdout}")


class BuildLibrary(build_ext):
    """Compiles each source with the flags of its instruction set, in parallel, and only what has changed."""

    def run(self):
        """Compiles; where that fails, no library is left, and the wheel is one for every platform."""
        paths = [pathlib.Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        in_tree = [NATIVE / path.name for path in paths] if self.inplace else []
        for earlier in (*paths, *in_tree):
            earlier.unlink(missing_ok=True)
        super().run()
        if not all(path.is_file() for path in paths):
            self.extensions = self.distribution.ext_modules = []
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure = True

    def get_ext_filename(self, fullname):
        """The path of the library: without the ABI of a Python, and with a dot, so that it is no name of a module."""
        return os.path.join(*fullname.split(".")) + ".cpu.so"

    def build_extension(self, ext):
        """Compiles what has changed, and links."""
        sanitizers = os.environ.get("PERPARAM_SANITIZE")
        sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g1", "-O1"] if sanitizers else []
        command = [*compiler(), *FLAGS, *sanitize, *from_environment("CXXFLAGS"), "-isystem", str(NATIVE)]
        headers = max(os.path.getmtime(header) for header in ext.depends)
        temporary = pathlib.Path(self.build_temp)
        temporary.mkdir(parents=True, exist_ok=True)

        def compiled(source):
            flags = INSTRUCTIONS.get(source.stem, "").split()
            if source.stem == "version":
                flags = [f'-DPERPARAM_SOURCES="{sources_hash()}"']
            target, made_by = temporary / f"{source.stem}.o", temporary / f"{source.stem}.command"
            compile = [*command, *flags, "-c", str(source), "-o", str(target)]
            made = target.is_file() and made_by.is_file() and made_by.read_text() == shlex.join(compile)
            if self.force or not made or target.stat().st_mtime <= max(headers, source.stat().st_mtime):
                made_by.unlink(missing_ok=True)
                run(compile)
                made_by.write_text(shlex.join(compile))
            return target

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, map(pathlib.Path, ext.sources)))
        library = pathlib.Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # An undefined symbol is an error here, not when the library is loaded; those of sanitizers are defined then.
        complete = ["-Wl,-z,defs"] if PLATFORM.startswith("linux") and not sanitizers else []
        run([*command, "-shared", *complete, *objects, "-o", library, *from_environment("LDFLAGS")])


class Wheel(bdist_wheel):
    """A wheel for every Python 3 of the platform, or of all platforms where nothing was compiled."""

    def get_tag(self):
        """The wheel's tags of Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2].replace("universal2", MACHINE)


library = Extension(
    "perparam.policies.native.libperparam",
    sources=sorted(map(str, NATIVE.glob("*.cc"))),
    depends=sorted(str(path) for path in NATIVE.rglob("*") if path.suffix == ".h" or path.name == "README.md"),
    # A build in the tree reports errors; an install continues without native kernels.
    optional="build_ext" not in sys.argv,
)

setup(
    script_name="setup.py",  # which pip would not know: this file is no module of the package
    # Windows' compiler takes other flags.
    ext_modules=[] if sys.platform == "win32" else [library],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
