"""Reading safetensors: what the safetensors package writes is read the same, and a file that lies is refused."""

import dataclasses
import json
import math
import os
import time

import checkpoints
import numpy as np
import pytest
import safetensors
from checkpoints import BF16, F8, GOLDEN, file_bytes, safetensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from perparam.loaders.safetensors import reader
from perparam.loaders.safetensors.reader import aligned_empty, read_header
from perparam.policies.errors import InvalidCheckpoint, MissingFile, PerparamError

RNG = np.random.default_rng(0)
ARRAYS = {
    "kernel": RNG.integers(0, 0x7F, (3, 5), np.uint8).view(F8),
    "scales": RNG.normal(size=(2, 2)).astype(BF16),
    "half": RNG.normal(size=7).astype(np.float16),
    "single": RNG.normal(size=(2, 3, 2)).astype(np.float32),
    "bytes": np.arange(-4, 4, dtype=np.int8),
    "counts": np.arange(3, dtype=np.int32),
    "scalar": np.array(2.5, np.float32),
    "none": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def packaged(arrays: dict[str, np.ndarray]) -> bytes:
    """What the safetensors package makes of `arrays`, through its raw interface, which knows every dtype."""
    if hasattr(safetensors, "TensorSpec"):  # 0.8 on
        specs = {
            name: safetensors.TensorSpec(
                dtype=array.dtype.name, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
            )
            for name, array in arrays.items()
        }
    else:
        specs = {
            name: {"dtype": array.dtype.name, "shape": list(array.shape), "data": array.tobytes()}
            for name, array in arrays.items()
        }
    return bytes(safetensors.serialize(specs, {"format": "np"}))


def assert_reads_as(path, arrays):
    header = read_header(path)
    assert header.keys() == arrays.keys()
    for name, array in arrays.items():
        read = header[name].read()
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())


# What is right.


def test_a_file_by_the_safetensors_package_is_read_bit_for_bit(path):
    path.write_bytes(packaged(ARRAYS))
    assert_reads_as(path, ARRAYS)


@pytest.mark.parametrize("case", checkpoints.CASES)
def test_files_by_transformers_are_read_as_the_safetensors_package_reads_them(case):
    for file in (GOLDEN / case).glob("*.safetensors"):
        header = read_header(file)
        entries = dict(safetensors.deserialize(file.read_bytes()))
        assert header.keys() == entries.keys()
        for name, tensor in header.items():
            assert list(tensor.shape) == entries[name]["shape"]
            assert tensor.read().tobytes() == bytes(entries[name]["data"])


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from([F8, BF16, np.dtype(np.float16), np.dtype(np.float32)]),
)
def test_any_shapes_survive(tmp_path_factory, shapes, dtype):
    arrays = {f"t{i}": RNG.integers(0, 0x7F, (*shape, 4), np.uint8).view(dtype) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    path.write_bytes(safetensors_bytes(arrays))
    assert_reads_as(path, arrays)


def test_tensors_come_in_the_order_of_the_data(path):
    path.write_bytes(file_bytes(json.dumps({"last": entry(offsets=(8, 16)), "first": entry()}), bytes(16)))
    assert list(read_header(path)) == ["first", "last"]


def test_a_header_padded_with_spaces_is_read(path):
    path.write_bytes(file_bytes(json.dumps({"a": entry()}) + "   ", bytes(8)))
    assert list(read_header(path)) == ["a"]


def test_arrays_own_memory_aligned_to_64_bytes_that_can_be_written(path):
    path.write_bytes(safetensors_bytes(ARRAYS))
    for tensor in read_header(path).values():
        array = tensor.read()
        assert array.ctypes.data % 64 == 0 or not array.size
        assert array.flags.writeable
    assert [aligned_empty(count).nbytes for count in (0, 1, 63, 64, 65)] == [0, 1, 63, 64, 65]


# What is wrong.


def assert_refused(path, content: bytes, match: str):
    path.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=match) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_cut_short_anywhere_is_refused(path):
    whole = safetensors_bytes(ARRAYS)
    for length in {*range(0, 24), *range(24, len(whole), 7), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidCheckpoint, match="damaged or incomplete: fetch it again"):
            read_header(path)


def test_a_file_with_bytes_left_over_is_refused(path):
    assert_refused(path, safetensors_bytes(ARRAYS) + b"\0", r"the header describes \d+ bytes, the file has \d+")


@pytest.mark.parametrize("length", [1000, 100_000_001, 2**63, 2**64 - 1], ids=str)
def test_a_header_longer_than_the_file_is_refused(path, length):
    content = file_bytes(json.dumps({"a": entry()}), bytes(8), length)
    assert_refused(path, content, f"the header has a length of {length} bytes, the file has {len(content) - 8}")


def test_a_header_shorter_than_its_json_is_refused(path):
    text = json.dumps({"a": entry()})
    assert_refused(path, file_bytes(text, bytes(8), len(text) - 1), "not valid JSON")


MALFORMED = {
    "no JSON": (b"tensors", "not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "nested without end": (b'{"a": ' * 50_000, "not valid JSON"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "a list": (b"[]", "expected a JSON object, found list"),
    "more entries than any checkpoint has": (
        b'{"a": [' + b"[]," * 600_000 + b"1]}",
        "more than 16 MiB or 262144 entries",
    ),
    "null": (b"null", "expected a JSON object, found NoneType"),
}


@pytest.mark.parametrize("header", MALFORMED)
def test_a_header_that_is_no_json_object_is_refused(path, header):
    content, match = MALFORMED[header]
    assert_refused(path, file_bytes(content), match)


def test_a_tensor_written_twice_is_refused(path):
    one = json.dumps(entry())
    assert_refused(path, file_bytes(f'{{"a": {one}, "b": {one}, "a": {one}}}', bytes(8)), "duplicate key 'a'")


ENTRIES = {
    "a list": ([], "expected dtype, shape and data_offsets"),
    "without shape": ({"dtype": "F32", "data_offsets": [0, 8]}, "expected dtype, shape and data_offsets"),
    "with more": ({**entry(), "strides": [1]}, "expected dtype, shape and data_offsets"),
    "a negative size": (entry(shape=[-2]), r"has shape \[-2\]"),
    "two negative sizes": (entry(shape=[-1, -2]), r"has shape \[-1, -2\]"),
    "a fractional size": (entry(shape=[2.0]), r"has shape \[2.0\]"),
    "a boolean size": (entry(shape=[2, True]), r"has shape \[2, True\]"),
    "a size beyond 64 bits": (entry(shape=[2**64]), "has shape"),
    "sizes whose product is beyond 64 bits": (entry(shape=[2**62, 8]), "larger than any array"),
    "sizes beyond memory beside a size of none": (entry(shape=[0, 2**62, 8], offsets=[0, 0]), "larger than any array"),
    "a text for shape": ({**entry(), "shape": "2"}, "has shape '2'"),
    "a negative offset": (entry(offsets=[-8, 0]), r"data_offsets \[-8, 0\]"),
    "offsets that run backwards": (entry(offsets=[8, 0]), r"data_offsets \[8, 0\]"),
    "one offset": (entry(offsets=[8]), r"data_offsets \[8\]"),
    "more axes than any tensor has": (entry(shape=[1] * 9), "has 9 axes, and the limit is 8"),
    "a hundred thousand axes": (entry(shape=[2**62] * 100_000), r"has shape \[.*… \(\d+ characters\)|has 100000 axes"),
    "three offsets": (entry(offsets=[0, 4, 8]), r"data_offsets \[0, 4, 8\]"),
    "fewer bytes than its shape": (entry(shape=[3]), r"F32 \(3,\), has 12 bytes, its offsets span 8"),
    "more bytes than its shape": (entry(shape=[1]), r"F32 \(1,\), has 4 bytes, its offsets span 8"),
    "an unknown dtype": (entry("F7"), "has the dtype 'F7', which perparam cannot read"),
    "a dtype that is a number": (entry(32), "has the dtype 32, which perparam cannot read"),
    "a dtype that is a list": (entry(["F32"]), r"has the dtype \['F32'\], which perparam cannot read"),
}


@pytest.mark.parametrize("tensor", ENTRIES)
def test_a_tensor_is_refused_with(path, tensor):
    content, match = ENTRIES[tensor]
    assert "'a'" in assert_refused(path, file_bytes(json.dumps({"a": content}), bytes(8)), match)


@pytest.mark.parametrize(
    ("second", "match"),
    [
        ((4, 12), r"'b' is at bytes 4 to 12, which overlaps the tensor before it \(it ends at 8\)"),
        ((0, 8), "which overlaps the tensor before it"),
        ((12, 20), r"'b' is at bytes 12 to 20, which leaves a gap before it \(it ends at 8\)"),
        ((2**60, 2**60 + 8), "which leaves a gap before it"),
    ],
    ids=["overlap", "the same bytes", "hole", "far beyond the end"],
)
def test_data_that_does_not_tile_the_file_is_refused(path, second, match):
    header = json.dumps({"a": entry(), "b": entry(offsets=second)})
    assert_refused(path, file_bytes(header, bytes(16)), match)


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[2Jb", "a\nb", "\ud800"], ids=repr)
def test_a_name_that_cannot_be_printed_is_refused_and_shown_harmless(path, name):
    text = assert_refused(path, file_bytes(json.dumps({name: entry()}), bytes(8)), "is not a valid name of a tensor")
    assert text.isprintable()


def test_a_long_name_is_cut_in_the_error(path):
    text = assert_refused(path, file_bytes(json.dumps({"a" * 10**6: entry("F7")}), bytes(8)), "has the dtype 'F7'")
    assert len(text) < 1000


@pytest.mark.parametrize("metadata", [[], "pt", {"format": 1}, None, {"a": {}}], ids=repr)
def test_metadata_that_is_no_text_is_refused(path, metadata):
    content = json.dumps({"__metadata__": metadata, "a": entry()})
    assert_refused(path, file_bytes(content, bytes(8)), "__metadata__: expected a mapping from text to text")


def test_a_million_names_are_refused_at_once(path):
    names = ",".join(f'"{i}":0' for i in range(10**6))
    start = time.process_time()
    assert_refused(path, file_bytes("{" + names + "}", bytes(8)), "more than 16 MiB or 262144 entries")
    doubled = ",".join(f'"{i}":0' for i in range(10**5))
    assert_refused(path, file_bytes("{" + doubled + ',"7":0}', bytes(8)), "duplicate key '7'")
    assert time.process_time() - start < 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for(path):
    os.mkfifo(path)
    with pytest.raises(InvalidCheckpoint, match="not a regular file"):
        read_header(path)


def test_a_hole_before_the_first_tensor_is_refused(path):
    assert_refused(path, file_bytes(json.dumps({"a": entry(offsets=(8, 16))}), bytes(16)), "leaves a gap before it")


def test_a_missing_file_is_named(path):
    with pytest.raises(MissingFile, match=rf"{path}: there is no such file\. Is the download complete\?"):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(path):
    path.write_bytes(safetensors_bytes(ARRAYS))
    tensor = read_header(path)["single"]
    path.write_bytes(path.read_bytes()[: tensor.offset + 5])
    with pytest.raises(InvalidCheckpoint, match=r"it had \d+ bytes when it was opened and has \d+ now"):
        tensor.read()


def test_a_file_that_shrinks_while_it_is_read_is_refused(path):
    path.write_bytes(safetensors_bytes(ARRAYS))
    tensor = read_header(path)["single"]
    path.write_bytes(path.read_bytes()[: tensor.offset + 5])
    with pytest.raises(InvalidCheckpoint, match=r"the file ends within 'single', at byte \d+ of \d+"):
        dataclasses.replace(tensor, file_bytes=tensor.offset + 5).read()


@pytest.mark.parametrize("rows", [(0, 2), (1, 2), (1, None), (0, 0), (2, 1)], ids=str)
def test_rows_of_a_tensor_are_read_alone(path, rows):
    path.write_bytes(safetensors_bytes(ARRAYS))
    header = read_header(path)
    for name in ("kernel", "single", "counts"):
        found, wanted = header[name].read(*rows), ARRAYS[name][slice(*rows)]
        assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
        into = np.empty_like(wanted)
        assert header[name].read(*rows, into) is into
        assert into.tobytes() == wanted.tobytes()


@st.composite
def parts(draw):
    """`(shape, part)`: start and stop along each axis."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    sides = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    return shape, tuple(map(tuple, sides))


@settings(max_examples=100)  # it compiles nothing: a millisecond each
@given(drawn=parts(), page=st.sampled_from([1, 4, 4096]), chunk=st.integers(1, 30))
def test_any_part_of_a_tensor_is_read_alone(tmp_path_factory, drawn, page, chunk):
    shape, part = drawn
    array = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
    path = tmp_path_factory.mktemp("part") / "model.safetensors"
    path.write_bytes(safetensors_bytes({"array": array}))
    wanted = array[tuple(slice(*side) for side in part)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "PAGE", page)
        patch.setattr(reader, "_CHUNK", chunk)
        found = read_header(path)["array"].read(*part[0], within=part[1:])
    assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=300)  # it compiles nothing: a millisecond each
@given(key=st.sampled_from(["dtype", "shape", "data_offsets"]), value=_values)
def test_whatever_stands_in_a_header_the_error_is_ours(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    path.write_bytes(file_bytes(json.dumps({"a": {**entry(), key: value}}), bytes(8)))
    try:
        tensors = read_header(path)
    except PerparamError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert tensors["a"].bytes == 8
