"""What loading, converting and saving hold in memory beyond the model, each measured in a process of its own."""

import importlib.util
import pathlib
import shutil
import sys

import pytest

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "load.py"
GIGABYTES = 0.3
BEYOND = 100 * 2**20
"""Slabs, compiled programs and what the allocator keeps: a third of the smaller checkpoint, a sixth of the other."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
slow, thorough = pytest.mark.slow, pytest.mark.thorough


@pytest.fixture(scope="module")
def load():
    """The benchmark, which measures the same at other sizes."""
    spec = importlib.util.spec_from_file_location("perparam_benchmarks_load", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(load, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    yield load.make(folder, GIGABYTES)
    shutil.rmtree(folder)  # pytest would keep it for the next three runs


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=slow) for name in ("kept", "quantised")),
        *(
            pytest.param(name, marks=thorough)
            for name in ("dequantised", "requantised", "saved", "sharded", "converted")
        ),
    ],
)
def test_no_more_than_one_parameter_and_a_few_slabs_beyond_the_model(load, folders, name):
    folder = folders[load.CONTENDERS[name][0]]
    measured = load.measure(name, folder)
    assert measured["beyond"] <= load.largest(folder) + BEYOND
    if name not in ("converted", "saved"):
        times = 2 if name == "dequantised" else 1
        smaller = sum(file.stat().st_size for file in folders["fp8"].glob("*.safetensors"))
        assert 0.9 * smaller < measured["model"] < 1.1 * times * smaller  # so that it is the model that was left out


@slow
def test_what_is_read_into_memory_is_seen(load, folders):
    measured = load.measure("read fp8", folders["fp8"])
    size = sum(file.stat().st_size for file in folders["fp8"].glob("*.safetensors"))
    assert abs(measured["beyond"] + measured["model"] - size) < 2**24
