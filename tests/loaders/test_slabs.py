"""Parameters that come a slab at a time are the parameters that come whole; and what can happen on the way."""

import io
import threading
import time

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import BF16, BLOCK, F8, fields, tensors, write
from hypothesis import given, settings
from hypothesis import strategies as st

import perparam
from perparam import Policy
from perparam.loaders import slabs
from perparam.loaders.placement import Placement
from perparam.loaders.progress import Progress
from perparam.policies import ArrayInfo, Format, InvalidCheckpoint, InvalidScale, resolve
from perparam.policies.store import stored_arrays

POLICIES = {
    "kept": None,
    "scales cast": {"params": {"scale_inv": "f32"}},
    "dequantised": "bf16",
    "dequantised to float32": "f32",
    "requantised to other blocks": {"params": {"kernel": "f8_e4m3fn"}, "block": (24, 10)},
    "requantised to another dtype": {"params": {"kernel": "f8_e5m2", "scale_inv": "f16"}},
    "int8": {"params": {"kernel": "int8"}, "block": (7, 128)},
    "quantised": {"params": {"embedding": "f8_e4m3fn", "default": "f32"}, "block": (5, 9)},
}

SLOW = ("dequantised to float32", "requantised to another dtype", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "checkpoint", fields(), tensors(fields()), shards=2)


@pytest.fixture
def small_slabs(monkeypatch):
    monkeypatch.setattr(slabs, "CONVERT_ELEMENTS", 512)
    monkeypatch.setattr(slabs, "COPY_BYTES", 512)


def info(array, block=None) -> ArrayInfo:
    return ArrayInfo(array.shape, Format(np.dtype(array.dtype), block))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in POLICIES]
)
def test_slabs_give_what_the_whole_tree_gives(folder, small_slabs, name):
    policy = perparam.get_policy(POLICIES[name])
    found = perparam.load_params(folder, policy)
    whole = checkpoints.arrays(perparam.load_model(folder))
    there = {path: info(one, BLOCK if one.dtype == F8 else None) for path, one in whole.items()}
    wanted = stored_arrays(resolve(policy, there), whole)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype, path
        assert np.asarray(found[path]).tobytes() == np.asarray(array).tobytes(), path


def test_parameters_without_a_model_are_the_models(folder):
    params, arrays = perparam.load_params(folder, "fp8_weight_only"), perparam.load_model(folder, "fp8_weight_only")
    arrays = checkpoints.arrays(arrays)
    assert params.keys() == arrays.keys()
    assert all(np.asarray(params[path]).tobytes() == np.asarray(arrays[path]).tobytes() for path in arrays)
    assert all(isinstance(array, jax.Array) for array in params.values())


class _Rows:
    """A source in memory that notes what is asked of it."""

    def __init__(self, array):
        self.array, self.asked = array, []
        self.shape, self.dtype = array.shape, array.dtype

    def read(self, start=0, stop=None, into=None, within=None):
        self.asked.append((start, stop))
        columns = [slice(*side) for side in within or ()]
        rows = self.array[(slice(start, stop), *columns)].copy()
        if into is None:
            return rows
        into[...] = rows
        return into


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    found_block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    slab=st.integers(1, 3000),
    seed=st.integers(0, 9),
)
def test_any_shape_blocks_and_slabs(shape, found_block, block, slab, seed):
    rng = np.random.default_rng(seed)
    kernel, scales = checkpoints.narrow_pair(rng, shape, found_block)
    found = {"a/kernel": info(kernel, found_block), "a/scale_inv": info(scales)}
    resolved = resolve(Policy({"kernel": "f8_e4m3fn"}, block=block), found)
    wanted = stored_arrays(resolved, {"a/kernel": kernel, "a/scale_inv": scales})
    source = _Rows(kernel)
    to = {path: Placement(array.shape, array.dtype) for path, array in wanted.items()}
    before, slabs.CONVERT_ELEMENTS = slabs.CONVERT_ELEMENTS, slab
    try:
        sources = {"a/kernel": source, "a/scale_inv": _Rows(scales)}
        slabs.run(resolved.params["a/kernel"], sources, to, lambda count: None)
    finally:
        slabs.CONVERT_ELEMENTS = before
    for path, array in to.items():
        assert np.asarray(array.array()).tobytes() == np.asarray(wanted[path]).tobytes()
    starts, stops = zip(*source.asked, strict=True)
    assert (*starts[1:], shape[0]) == stops  # each row once, in order


class _Slices:
    """A sharding of which this process has some slices, as of a device each."""

    def __init__(self, *slices):
        self.slices = slices

    def addressable_devices_indices_map(self, shape):
        return dict(enumerate(self.slices))


@pytest.mark.parametrize("name", ["kept", "dequantised", "requantised"])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_a_process_that_has_some_slices_gets_what_the_whole_has(name, seed):
    rng = np.random.default_rng(seed)
    kernel, scales = checkpoints.narrow_pair(rng, (23, 17), (5, 7))
    found = {"a/kernel": info(kernel, (5, 7)), "a/scale_inv": info(scales)}
    policy = {"kept": None, "dequantised": "bf16", "requantised": Policy({"kernel": "f8_e4m3fn"}, block=(4, 6))}[name]
    resolved = resolve(perparam.get_policy(policy), found)
    wanted = stored_arrays(resolved, {"a/kernel": kernel, "a/scale_inv": scales})
    sources, sinks = {"a/kernel": _Rows(kernel), "a/scale_inv": _Rows(scales)}, {}
    for path, array in wanted.items():
        slices = [
            tuple(slice(*sorted(rng.integers(0, size + 1, 2))) for size in array.shape) for _ in range(rng.integers(3))
        ]
        sinks[path] = Placement(array.shape, array.dtype, _Slices(*slices))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "CONVERT_ELEMENTS", int(rng.integers(1, 400)))
        patch.setattr(slabs, "COPY_BYTES", int(rng.integers(1, 200)))
        slabs.run(resolved.params["a/kernel"], sources, sinks, lambda count: None)
    for path, sink in sinks.items():
        for box, array in sink._slices.items():
            assert array.tobytes() == np.asarray(wanted[path])[tuple(slice(*side) for side in box)].tobytes()
    box = sinks["a/kernel"].box()
    if name == "kept" and box is not None:
        assert all(box[0][0] <= start < stop <= box[0][1] for start, stop in sources["a/kernel"].asked)


def test_arrays_go_to_the_default_device_of_the_caller(folder):
    device = jax.devices()[-1]
    with jax.default_device(device):
        params = perparam.load_params(folder)
    assert all(array.devices() == {device} for array in params.values())


# Bars.


def test_a_bar_shows_bytes_and_rate_where_it_is_asked_for(folder, capsys):
    perparam.load_model(folder, progress=True)
    printed = capsys.readouterr().err
    assert "loading checkpoint: 100%" in printed
    assert "B/s]" in printed


@pytest.mark.parametrize("progress", [None, False])
def test_it_is_silent_elsewhere(folder, capsys, progress):
    perparam.load_model(folder, progress=progress)
    assert capsys.readouterr() == ("", "")


def test_it_shows_itself_on_a_terminal(folder, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    perparam.load_model(folder)
    assert "loading checkpoint: 100%" in terminal.getvalue()
    terminal.seek(0)
    terminal.truncate()
    perparam.load_model(folder, progress=False)
    assert terminal.getvalue() == ""


def test_no_stderr_at_all_is_fine(folder, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert perparam.load_params(folder).keys() == perparam.load_params(folder, progress=False).keys()


# What ends it.


def test_an_interruption_ends_it_within_a_slab(folder, small_slabs, monkeypatch):
    reads = []
    convert = slabs._convert_on_host

    def slow(*arguments):
        reads.append(threading.current_thread().name)
        time.sleep(0.02)
        return convert(*arguments)

    def interrupt(self, count):
        if len(reads) > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(slabs, "_convert_on_host", slow)
    monkeypatch.setattr(Progress, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        perparam.load_model(folder, "f32")
    assert len(reads) < 12
    assert all(name.startswith("perparam") for name in reads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("perparam")]


def test_an_error_in_the_middle_is_the_callers(tmp_path, small_slabs):
    stored = tensors(fields())
    stored["model.layers.1.mlp.up_proj.weight_scale_inv"][2, 1] = np.nan
    folder = write(tmp_path / "checkpoint", fields(), stored)
    with pytest.raises(InvalidScale, match=r"layers/1/mlp/up_proj/scale_inv: .* at block \(2, 1\)"):
        perparam.load_model(folder)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("perparam")]


@pytest.mark.parametrize("policy", [None, "f32", {"params": {"**/*_proj/kernel": {"dtype": "int8", "block": [1, -1]}}}])
@pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")
def test_a_scale_of_zero_is_accepted_where_its_block_is_all_zeros(tmp_path, small_slabs, policy):
    """Writers that do not clamp make such."""
    stored = tensors(fields())
    name, (height, width) = "model.layers.1.mlp.up_proj.weight", BLOCK
    stored[name][2 * height : 3 * height, width : 2 * width] = 0
    stored[f"{name}_scale_inv"][2, 1] = 0
    path, model = "layers/1/mlp/up_proj", perparam.load_model(write(tmp_path / "zeros", fields(), stored), policy)
    wide = np.asarray(checkpoints.arrays(model.with_policy("f32"))[f"{path}/kernel"])
    assert (wide[2 * height : 3 * height, width : 2 * width] == 0).all()
    assert np.isfinite(wide).all()
    if policy is None:
        saved = perparam.save_model(model, tmp_path / "saved")
        assert checkpoints.read(saved)[f"{name}_scale_inv"][2, 1] == 0
    stored[name][2 * height, width] = 1
    with pytest.raises(
        InvalidScale, match=rf"{path}/scale_inv: scales are positive finite .* at block \(2, 1\), and 1"
    ):
        perparam.load_model(write(tmp_path / "wrong", fields(), stored), policy)


def test_whole_axis_blocks_are_quantised_over_all_slabs(folder, small_slabs):
    for block in ([1, -1], [-1, 1], [-1, -1]):
        policy = {"params": {"**/*_proj/kernel": {"dtype": "int8", "block": block}}}
        path = "layers/0/mlp/down_proj"
        wide = np.asarray(perparam.load_params(folder, "f32")[f"{path}/kernel"])
        loaded = perparam.load_params(folder, policy)
        values, scale_inv = perparam.quantize(wide, "int8", tuple(block), scale_dtype=BF16)  # as the pair had
        assert np.asarray(loaded[f"{path}/kernel"]).tobytes() == np.asarray(values).tobytes()
        assert np.asarray(loaded[f"{path}/scale_inv"]).tobytes() == np.asarray(scale_inv).tobytes()


def test_the_block_of_bad_weights_is_named_whatever_the_slabs(tmp_path, small_slabs):
    config = fields(quantization_config=None)
    stored = tensors(config)
    stored["model.layers.1.mlp.up_proj.weight"][70, 30] = np.inf
    folder = write(tmp_path / "checkpoint", config, stored)
    with pytest.raises(InvalidScale, match=r"layers/1/mlp/up_proj/kernel: the weights .* at block \(4, 1\)"):
        perparam.load_model(folder, {"params": {"**/*_proj/kernel": "f8_e4m3fn"}, "block": (16, 24)})


def test_a_file_that_changes_its_length_meanwhile_is_refused(folder, tmp_path, monkeypatch):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    run = slabs.run

    def grow(param, sources, *rest):
        if "layers/1" in param.path:
            with open(sources[param.path].file, "ab") as file:
                file.write(b"\0")
        return run(param, sources, *rest)

    monkeypatch.setattr("perparam.loaders.load.run", grow)
    with pytest.raises(InvalidCheckpoint, match=r"it had \d+ bytes when it was opened and has \d+ now"):
        perparam.load_model(copy)
