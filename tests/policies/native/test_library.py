"""The native library: used where it can be, and otherwise a reason instead of an error."""

import ctypes
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import pytest
from native_builds import CXX, ROOT

from perparam.policies.native import library

NATIVE = ROOT / "policies" / "native"
INSTRUCTIONS = {"avx512bf16", "avx512", "avx2", "neonbf16", "neon", "scalar"}

needs_compiler = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def as_for_users(monkeypatch):
    """What a run of the tests says about the library is not for those of the library itself."""
    monkeypatch.delenv("PERPARAM_CPU", raising=False)


def reason() -> str | None:
    """What a process that has not loaded the library yet would be told."""
    return library._load.__wrapped__().reason


@needs_compiler
def test_the_library_is_compiled_from_the_sources_of_this_tree():
    path = library._path()
    assert path is not None, "python setup.py build_ext --inplace, or install again"
    files = sorted(path for path in NATIVE.rglob("*") if path.suffix in (".cc", ".h"))
    expected = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    sources = ctypes.CDLL(str(path)).perparam_sources
    sources.restype = ctypes.c_char_p
    assert sources().decode() == expected, f"{path} is old: python setup.py build_ext --inplace, or install again"


@needs_compiler
@pytest.mark.skipif(os.environ.get("PERPARAM_CPU") == "off", reason="PERPARAM_CPU=off")
def test_the_handlers_are_registered_in_a_process_that_has_used_its_cpu():
    jax.block_until_ready(jax.numpy.zeros(1))
    assert library.unavailable() is None
    assert library.instructions() in INSTRUCTIONS
    assert reason() is None  # registering the same handlers again is no error


def test_the_version_of_the_ffi_is_read_from_jaxlib():
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    major, minor = library._supported()
    assert f"#define XLA_FFI_API_MAJOR {major}\n" in header
    assert f"#define XLA_FFI_API_MINOR {minor}\n" in header


def test_the_headers_are_those_of_the_oldest_jaxlib_that_perparam_supports():
    header = (NATIVE / "xla/ffi/api/c_api.h").read_text()
    assert re.findall(r"#define XLA_FFI_API_M\w+ (\d+)", header) == ["0", "3"]  # jaxlib 0.10.0


@needs_compiler
@pytest.mark.parametrize("supported", [(0, 2), (1, 3), (1, 0), None])
def test_a_jaxlib_with_another_version_of_the_ffi_is_named(monkeypatch, supported):
    monkeypatch.setattr(library, "_supported", lambda: supported)
    has = "no version that could be read" if supported is None else r"version {}\.{}".format(*supported)
    assert re.fullmatch(rf"they were compiled for version 0\.3 of XLA's FFI, and this jaxlib has {has}", reason())


@needs_compiler
def test_a_jaxlib_with_a_later_minor_version_of_the_ffi_is_accepted(monkeypatch):
    monkeypatch.setattr(library, "_supported", lambda: (0, 99))
    assert reason() is None


def test_jaxlibs_headers_may_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert library._supported() is None


def test_an_install_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(library, "_path", lambda: None)
    assert reason() == "they were not compiled when perparam was installed, which needs a C++17 compiler"


def test_the_environment_turns_them_off(monkeypatch):
    monkeypatch.setenv("PERPARAM_CPU", "off")
    assert reason() == "PERPARAM_CPU=off in the environment"


def test_a_library_that_does_not_load_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"\x7fELF")
    monkeypatch.setenv("PERPARAM_LIBRARY", str(tmp_path / "broken.so"))
    assert re.search("the library does not load: .*broken.so", reason())


@needs_compiler
def test_a_handler_that_cannot_be_registered_is_no_error(monkeypatch):
    monkeypatch.setattr(library, "HANDLERS", ("perparam_missing",))
    assert re.search("they cannot be registered: .*perparam_missing", reason())


def run(code: str, **environment: str) -> str:
    """What a new process prints, with no other environment."""
    code = "from perparam.policies.native import library\n" + textwrap.dedent(code)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@needs_compiler
@pytest.mark.slow
def test_handlers_are_registered_before_the_cpu_is_used_too():
    code = """
        import jax
        from jax._src import xla_bridge
        assert library.unavailable() is None, library.unavailable()
        assert not xla_bridge._backends
        print(jax.devices())
    """
    assert "CpuDevice" in run(code)


@needs_compiler
@pytest.mark.slow
def test_an_instruction_set_that_the_processor_does_not_have_is_named():
    printed = run("print(library.unavailable())", PERPARAM_CPU="sse9")
    assert printed == "this processor or build does not have PERPARAM_CPU=sse9\n"
    printed = run("print(library.instructions())", PERPARAM_CPU="scalar")
    assert printed == "scalar\n"


HANDLER = """
#include <xla/ffi/api/ffi.h>
namespace ffi = xla::ffi;
ffi::Error Nothing(ffi::Buffer<ffi::F32>, ffi::ResultBuffer<ffi::F32>) { return ffi::Error::Success(); }
XLA_FFI_DEFINE_HANDLER_SYMBOL(Future, Nothing,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
"""


@needs_compiler
@pytest.mark.slow
def test_a_library_that_is_newer_than_jaxlib_leaves_the_cpu_as_it_is(tmp_path):
    major, minor = library._supported()
    folder = tmp_path / "xla/ffi/api"
    folder.mkdir(parents=True)
    for header in (NATIVE / "xla/ffi/api").glob("*.h"):
        (folder / header.name).write_text(
            re.sub(r"(#define XLA_FFI_API_MINOR) \d+", rf"\1 {minor + 1}", header.read_text())
        )
    (tmp_path / "future.cc").write_text(HANDLER)
    future = tmp_path / "future.so"
    sources = [tmp_path / "future.cc", NATIVE / "version.cc", '-DPERPARAM_SOURCES=""']
    subprocess.run([CXX, "-std=c++17", "-shared", "-fPIC", "-isystem", tmp_path, *sources, "-o", future], check=True)

    # What the comparison of versions avoids.
    code = f"""
        import ctypes, jax
        handler = jax.ffi.pycapsule(ctypes.CDLL({str(future)!r}).Future)
        jax.ffi.register_ffi_target("future", handler, platform="cpu")
        jax.devices()
    """
    assert "Unable to initialize backend 'cpu'" in run(code)

    code = "import jax\nprint(library.unavailable())\nprint(jax.devices())"
    printed = run(code, PERPARAM_LIBRARY=str(future))
    assert printed.startswith(
        f"they were compiled for version {major}.{minor + 1} of XLA's FFI, and this jaxlib has version {major}.{minor}"
    )
    assert "CpuDevice" in printed
