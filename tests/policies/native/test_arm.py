"""The kernels for Arm, compiled for it and run in QEMU: panels bit for bit, and products within their bound."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest
from helpers import dtype
from native_builds import ROOT
from native_matmuls import NARROW, TINY, saturated

from perparam.policies.matmul.native import _ROUNDING, _TABLE, _VALUES
from perparam.policies.native.tables import bfloat16_table

CXX = os.environ.get("PERPARAM_ARM_CXX", "aarch64-linux-gnu-g++")
QEMU = next(filter(shutil.which, ("qemu-aarch64-static", "qemu-aarch64")), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"there is no {CXX}: apt-get install g++-aarch64-linux-gnu"),
    pytest.mark.skipif(QEMU is None, reason="there is no QEMU: apt-get install qemu-user-static"),
]

NATIVE = ROOT / "policies" / "native"
RUN = 128
"""Columns of a panel, `kRun` of isa.h."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> pathlib.Path:
    """The kernels and driver.cc for Arm, compiled with the flags of setup.py and linked statically, for QEMU."""
    folder = tmp_path_factory.mktemp("arm")
    setup = (ROOT / "setup.py").read_text()
    flags = "-O2 -std=c++17 -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror".split()
    assert "-std=c++17" in setup
    assert "-ffp-contract=off" in setup
    bfloat16 = re.search(r'ARM = {"isa_neonbf16": "(.*)"}', setup).group(1).split()
    sources = [*sorted(NATIVE.glob("isa_*.cc")), NATIVE / "dispatch.cc", pathlib.Path(__file__).with_name("driver.cc")]
    compiling = []
    for source in sources:
        of_set = bfloat16 if source.stem == "isa_neonbf16" else []
        target = folder / f"{source.stem}.o"
        compiling.append(subprocess.Popen([CXX, *flags, *of_set, f"-I{NATIVE}", "-c", source, "-o", target]))
    assert [process.wait() for process in compiling] == [0] * len(compiling)
    subprocess.run([CXX, "-static", *folder.glob("*.o"), "-o", folder / "driver"], check=True)
    return folder / "driver"


def qemu(driver: pathlib.Path, cpu: str, forced: str | None, *arguments: str, request: bytes = b"") -> bytes:
    """What the driver writes on a processor of that kind."""
    environment = [] if forced is None else ["-E", f"PERPARAM_CPU={forced}"]
    command = [QEMU, "-cpu", cpu, *environment, driver, *arguments]
    return subprocess.run(command, input=request, stdout=subprocess.PIPE, check=True, timeout=120).stdout


@pytest.mark.parametrize(
    ("cpu", "forced", "expected"),
    [
        ("max", None, "neonbf16 16 6 1"),
        ("max", "neon", "neon 16 6 0"),
        ("cortex-a57", None, "neon 16 6 0"),
        ("cortex-a57", "scalar", "scalar 8 2 0"),
    ],
)
def test_the_best_set_of_the_processor_is_used(driver, cpu, forced, expected):
    assert qemu(driver, cpu, forced, "name").decode().split() == expected.split()


def test_a_set_that_the_processor_does_not_have_is_not_used(driver):
    for forced in ("neonbf16", "avx2"):
        with pytest.raises(subprocess.CalledProcessError):
            qemu(driver, "cortex-a57", forced, "name")


@dataclasses.dataclass(frozen=True)
class Request:
    """A panel of weights and a few rows of x."""

    kernel: str
    rounding: str | None
    pairs: bool
    rows: int
    columns: int = RUN
    scaled: bool = False

    def operands(self, width: int):
        """`(weights, scales, x, x_scales)`: of narrow dtypes all codes that are finite."""
        random = np.random.default_rng(0)
        if dtype(self.kernel).itemsize == 1:
            weights = random.permutation(np.resize(np.arange(256, dtype=np.uint8), width * RUN)).reshape(width, RUN)
            weights = weights.view(dtype(self.kernel))
            weights = np.where(np.isfinite(weights.astype(np.float32)), weights, np.ones((), weights.dtype))
        else:
            weights = random.normal(size=(width, RUN)).astype(dtype(self.kernel))
        scales = random.uniform(0.5, 2, width).astype(np.float32)
        scales *= np.float32(2) ** random.integers(-12, 13, width).astype(np.float32)
        x = random.normal(size=(self.rows, RUN)).astype(ml_dtypes.bfloat16 if self.pairs else np.float32)
        x[:, self.columns :] = 0
        return weights, scales, x, random.uniform(0.5, 2, self.rows).astype(np.float32)

    def bytes(self, width: int) -> bytes:
        weights, scales, x, x_scales = self.operands(width)
        values = _VALUES.get(weights.dtype, _TABLE)
        rounding = 0 if self.rounding is None else _ROUNDING[dtype(self.rounding)]
        head = [values, rounding, self.pairs, self.rows, self.columns, weights.dtype.itemsize, self.scaled]
        arrays = [bfloat16_table(weights.dtype), weights, scales, x, *[x_scales] * self.scaled]
        return np.array(head, np.int32).tobytes() + b"".join(array.tobytes() for array in arrays)


REQUESTS = [
    *(Request(kernel, None, pairs, 3) for kernel in NARROW for pairs in (False, True)),
    *(Request("bfloat16", None, pairs, rows) for rows in (1, 2, 4, 6) for pairs in (False, True)),
    *(Request(kernel, None, False, rows, scaled=True) for rows in (1, 5) for kernel in ("float16", "float32")),
    *(Request("float8_e4m3fn", None, pairs, 1) for pairs in (False, True)),
    *(Request("float8_e5m2", None, pairs, 6, columns, True) for columns in (2, 30, 64, RUN) for pairs in (False, True)),
    *(Request(kernel, "bfloat16", pairs, 2) for kernel in ("int8", "float32", "float16") for pairs in (False, True)),
    *(Request(kernel, rounding, False, 4) for rounding in ("float32", "float16") for kernel in ("int8", "float32")),
]


@pytest.mark.parametrize(
    ("cpu", "forced", "width", "rows", "has_pairs"),
    [("max", "neonbf16", 16, 6, True), ("max", "neon", 16, 6, False), ("cortex-a57", "scalar", 8, 2, False)],
    ids=["neonbf16", "neon", "scalar"],
)
def test_panels_and_products(driver, cpu, forced, width, rows, has_pairs):
    requests = [dataclasses.replace(one, rows=min(one.rows, rows)) for one in REQUESTS if has_pairs or not one.pairs]
    answer = qemu(driver, cpu, forced, request=b"".join(one.bytes(width) for one in requests))
    for request in requests:
        answer = answer[checked(request, width, forced, answer) :]
    assert answer == b""


def checked(request: Request, width: int, name: str, answer: bytes) -> int:
    """Compares the answer to a request, and returns its length."""
    weights, scales, x, x_scales = request.operands(width)
    wide = weights.astype(np.float32)
    if request.rounding is not None:
        wide = saturated(wide * scales[:, None], request.rounding).astype(np.float32)

    count = RUN * width
    if request.pairs:
        panel = np.frombuffer(answer, ml_dtypes.bfloat16, count).reshape(RUN // 2, width, 2)
        panel = panel.transpose(1, 0, 2).reshape(width, RUN)
    else:
        panel = np.frombuffer(answer, np.float32, count).reshape(RUN, width).T
    np.testing.assert_array_equal(panel.astype(np.float32), wide, err_msg=str(request))

    size = request.rows * width
    factor = np.ones(width) if request.rounding else scales.astype(np.float64)
    x = x.astype(np.float64) * (x_scales[:, None].astype(np.float64) if request.scaled else 1)
    product = (x @ wide.T.astype(np.float64)) * factor
    magnitude = (np.abs(x) @ np.abs(wide.T).astype(np.float64)) * factor
    # A rounding for each column, and those of the product and of both scales. Pairs are rounded to odd: twice as much.
    bound = (request.columns + 4) * (2.0**-23 if name == "neonbf16" else 2.0**-24) * magnitude + TINY
    at = count * (2 if request.pairs else 4)
    all_totals = []
    for _ in range(1 + (request.rows <= 4 and request.columns == RUN)):
        totals = np.frombuffer(answer, np.float32, size, at).reshape(request.rows, width)
        assert (np.abs(totals - product) <= bound).all(), (request, np.nanmax(np.abs(totals - product) / bound))
        all_totals.append(totals.tobytes())
        at += 4 * size
    assert len(set(all_totals)) == 1  # with and without a panel: the same order of sums
    rounded = np.frombuffer(answer, ml_dtypes.bfloat16, size, at).reshape(request.rows, width)
    np.testing.assert_array_equal(rounded, totals.astype(ml_dtypes.bfloat16))
    return at + 2 * size
