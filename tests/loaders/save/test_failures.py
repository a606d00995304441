"""`save_model` and `convert_checkpoint`: a full disk or damaged weights leave the target as it was."""

import errno
import os
import re
import sys

import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import checkpoint_name, fields, tensors, write
from saving import BLOCK64, assert_same_tensors, everything, held, python

from perparam import load_model, save_model
from perparam.loaders import convert_checkpoint, open_checkpoint
from perparam.policies.errors import InvalidCheckpoint, InvalidScale, SaveFailed

pytestmark = pytest.mark.filterwarnings("ignore:blocks of .* do not divide the sides")  # small models

GATE = "layers/1/mlp/gate_proj"


# A disk that is full.


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "late pwrite"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "old"])
def test_a_full_disk_leaves_the_folder_as_it_was(model, tmp_path, monkeypatch, call, there):
    target = tmp_path / "saved"
    if there:
        save_model(model, target, "bf16")
    before = everything(tmp_path)
    failing = no_space
    if call == "late pwrite":
        count, pwrite = iter(range(1000)), os.pwrite

        def failing(*arguments):
            return no_space() if next(count) > 20 else pwrite(*arguments)

    if not hasattr(os, call.split()[-1]):
        pytest.skip("not on this system")
    monkeypatch.setattr(os, call.split()[-1], failing)
    with pytest.raises(SaveFailed, match=r"cannot be written: .*No space left.* Nothing was changed\. Free disk space"):
        save_model(model, target)
    assert everything(tmp_path) == before
    assert os.listdir(tmp_path) == ["saved"] * there


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_reserve_space_is_written_to(model, tmp_path, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    assert_same_tensors(checkpoints.read(save_model(model, tmp_path / "saved")), held(model))


def test_partial_writes_are_continued(model, tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, memoryview(data)[:100], place))
    assert_same_tensors(checkpoints.read(save_model(model, tmp_path / "saved")), held(model))


LIMITED = """
import os, pathlib, resource, signal, sys
import perparam
from perparam.policies.errors import SaveFailed

folder = pathlib.Path(sys.argv[1])
model = perparam.load_model(folder / "source")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    perparam.save_model(model, folder / "saved")
except SaveFailed as error:
    print("refused:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_limit_on_file_size_is_reported_like_a_full_disk(tmp_path):
    write(tmp_path / "source", fields(), tensors(fields()))
    save_model(load_model(tmp_path / "source"), tmp_path / "saved", "bf16")
    before = everything(tmp_path)
    run = python(LIMITED, tmp_path)
    assert "refused:" in run.stdout
    assert "File too large" in run.stdout
    assert everything(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["saved", "source"]


# Weights that cannot be read or quantised.


def damaged(tmp_path, source):
    """A folder whose last kernel but one is no weight, so that others are under way when it is met."""
    config = fields(quantization_config=None) if source == "weights" else fields()
    made = tensors(config)
    if source == "weights":
        made[checkpoint_name(f"{GATE}/kernel")][7, 50] = np.inf
    else:
        made[checkpoint_name(f"{GATE}/scale_inv")][1, 1] = np.nan
    return write(tmp_path / "source", config, made)


@pytest.mark.parametrize("there", [False, True], ids=["new", "old"])
@pytest.mark.parametrize(
    ("source", "policy"), [("weights", "fp8_weight_only"), ("scales", None), ("scales", "bf16"), ("scales", BLOCK64)]
)
def test_damaged_weights_leave_no_new_files(model, tmp_path, source, policy, there):
    source = damaged(tmp_path, source)
    target = tmp_path / "above" / "saved"
    if there:
        save_model(model, target)
    before = everything(tmp_path)
    with pytest.raises(InvalidScale, match=GATE):
        convert_checkpoint(source, target, policy)
    assert everything(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["above", "source"][not there :]
    assert not there or os.listdir(tmp_path / "above") == ["saved"]


def test_weights_that_became_infinite_are_refused(bf16, tmp_path):
    model = load_model(bf16)
    kernel = model.layers[1].mlp.gate_proj.kernel
    kernel.set_value(kernel[...].at[3, 3].set(jnp.inf))
    with pytest.raises(InvalidScale, match=rf"{GATE}/kernel: the weights of a block hold NaN or infinity"):
        save_model(model, tmp_path / "saved", "fp8_weight_only")
    assert not list(tmp_path.iterdir())
    save_model(model, tmp_path / "saved")  # plain weights may be anything
    assert np.isinf(checkpoints.read(tmp_path / "saved")[checkpoint_name(f"{GATE}/kernel")][3, 3])


def test_a_source_that_is_cut_short_meanwhile_is_refused(tmp_path, monkeypatch):
    source = write(tmp_path / "source", fields(), tensors(fields()))
    checkpoint = open_checkpoint(source)
    monkeypatch.setattr("perparam.loaders.save.open_checkpoint", lambda _, **__: checkpoint)
    with open(source / "model.safetensors", "r+b") as file:
        file.truncate(50_000)
    with pytest.raises(InvalidCheckpoint, match=re.escape(str(source))):
        convert_checkpoint(source, tmp_path / "saved")
    assert os.listdir(tmp_path) == ["source"]
