"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Arrays of JAX are allocations of their own, so that a kernel that leaves an operand or a result is seen; one that leaves
a temporary array, which XLA places beside others, is not.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from native_builds import CXX, ROOT, build

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(CXX is None or not sys.platform.startswith("linux"), reason="needs a C++ compiler and ELF"),
]

SANITIZE = "address,undefined"


def runtime(name: str) -> str:
    """A library of the compiler, or a skip."""
    path = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"the compiler has no {name}")
    return path


def run(library: pathlib.Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs Python with a library that has sanitizers.

    Their runtime comes first in the process, and after it the C++ library whose exceptions it watches.  Python and XLA
    leave memory to the end of the process: leaks are not looked for.
    """
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PERPARAM_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join(sys.path),
        **variables,
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def library() -> pathlib.Path:
    """The library with sanitizers; its objects stay for the next run."""
    return build(ROOT / "build" / "sanitized", PERPARAM_SANITIZE=SANITIZE)


def assert_clean(library: pathlib.Path, instructions: str, *tests: str) -> None:
    done = run(library, "-m", "pytest", "-q", "-n", "0", *tests, PERPARAM_CPU=instructions)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"\d+ passed", done.stdout.splitlines()[-1])
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "instructions",
    [pytest.param("", id="the best that there are"), "avx512", "avx2", "neon", "scalar"],
)
def test_the_kernels_stay_within_their_operands_and_the_language(library, instructions):
    """Each operand and result of a call outside of `jit` is an allocation of its own."""
    code = "from perparam.policies.native import library; print(library.instructions())"
    if instructions and run(library, "-c", code, PERPARAM_CPU=instructions).stdout != f"{instructions}\n":
        pytest.skip(f"this processor or build does not have {instructions}")
    folder = "tests/policies/matmul"
    files = [f"{folder}/{file}.py" for file in ("test_backends", "test_native", "test_native_gradients")]
    assert_clean(library, instructions, "-k", "native", *files)


def test_so_do_products_of_groups(library):
    assert_clean(library, "", "tests/policies/matmul/test_grouped_native.py", "-k", "not unreadable")


def test_so_does_attention(library):
    assert_clean(library, "", "-k", "errors or any_shape or bits", "tests/models/test_cpu_attention.py")


HANDLER = """
#include <xla/ffi/api/ffi.h>
namespace ffi = xla::ffi;
ffi::Error Work(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  int sum = 2147483647;
  if (x.typed_data()[0] == 1) y->typed_data()[0] = x.typed_data()[x.element_count()];
  if (x.typed_data()[0] == 2) y->typed_data()[x.element_count()] = 0;
  if (x.typed_data()[0] == 3) y->typed_data()[0] = sum + static_cast<int>(x.typed_data()[0]);
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(Careless, Work,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
"""

CALL = """
import ctypes, os, sys
import jax, jax.numpy as jnp
handler = jax.ffi.pycapsule(ctypes.CDLL(os.environ["PERPARAM_LIBRARY"]).Careless)
jax.ffi.register_ffi_target("careless", handler, platform="cpu")
x = jnp.full(64, float(sys.argv[1]))
jax.block_until_ready(jax.jit(lambda x: jax.ffi.ffi_call("careless", jax.ShapeDtypeStruct(x.shape, x.dtype))(x))(x))
print("done")
"""


@pytest.fixture(scope="module")
def careless(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("careless")
    (folder / "careless.cc").write_text(HANDLER)
    flags = ["-std=c++17", "-O1", "-g", "-shared", "-fPIC", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
    command = [CXX, *flags, "-isystem", ROOT / "policies/native", folder / "careless.cc", "-o", folder / "careless.so"]
    subprocess.run(command, check=True)
    return folder / "careless.so"


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (0, None),
        (1, "heap-buffer-overflow.*\nREAD of size 4"),
        (2, "heap-buffer-overflow.*\nWRITE of size 4"),
        (3, "signed integer overflow"),
    ],
    ids=["none", "reads past the end", "writes past the end", "overflows"],
)
def test_the_sanitizers_see_what_a_handler_does_in_jax(careless, fault, report):
    done = run(careless, "-c", CALL, str(fault))
    if report is None:
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    else:
        assert done.returncode != 0
        assert re.search(report, done.stderr), done.stderr
