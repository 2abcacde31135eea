"""Slices read what they need and nothing else; a file that lies about itself is a one-line ValueError naming it."""

import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sigmoe.moe.storage.durable import durable_directory
from sigmoe.moe.storage.tensor_format import load_json, read_header
from sigmoe.moe.storage.tensor_reader import TensorReader
from sigmoe.moe.storage.tensors import named_tensors, write_tensors

FILE = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def write_model(path, tensors, **options):
    with durable_directory(path) as directory:
        write_tensors(directory, "model", "model", named_tensors(tensors), **options)
    return path / "model"


@pytest.fixture
def model(tmp_path):
    """Two files: `a` and `b` in the first, `c` in the second."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4), "c": torch.ones(2, 2, dtype=torch.bfloat16)}
    return write_model(tmp_path / "out", tensors, max_file_bytes=56)


def lie(path, header, data=bytes(8)):
    """A file with this header (JSON data or raw bytes) before its data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def assert_refused(path, read):
    """The message with which `read` refuses, one line that names the file."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        read()
    assert str(path) in str(caught.value)
    return str(caught.value)


SLICES = st.lists(
    st.builds(slice, st.none() | st.integers(-8, 8), st.none() | st.integers(-8, 8), st.sampled_from([None, 1])),
    max_size=4,
)


@pytest.fixture(scope="module")
def four_dims(tmp_path_factory):
    tensors = {"before": torch.zeros(3), "t": torch.arange(4 * 3 * 5 * 2, dtype=torch.int32).reshape(4, 3, 5, 2)}
    return TensorReader(write_model(tmp_path_factory.mktemp("slices") / "out", tensors), "model"), tensors["t"]


@given(slices=SLICES)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_equal_indexing_and_read_no_other_byte(four_dims, monkeypatch, slices):
    reader, tensor = four_dims
    with monkeypatch.context() as patched:
        counts = []

        def preadv(descriptor, buffers, offset, real=os.preadv):
            counts.append(real(descriptor, buffers, offset))
            return counts[-1]

        patched.setattr(os, "preadv", preadv)
        result = reader.read_slice("t", tuple(slices))
    expected = tensor[tuple(slices)]
    assert result.shape == expected.shape
    assert torch.equal(result, expected)
    assert result.is_contiguous()
    assert sum(counts) == expected.numel() * 4


def test_rows_and_experts_are_one_read(four_dims, monkeypatch):
    """What lies together is read at once: a cut of the first dimension is one run, of the last one a run a row."""
    reader, _ = four_dims
    calls = []
    monkeypatch.setattr(os, "preadv", lambda *arguments, real=os.preadv: (calls.append(1), real(*arguments))[1])
    reader.read_slice("t", (slice(1, 3),))
    assert len(calls) == 1
    reader.read_slice("t", (slice(1, 3), slice(0, 2)))
    assert len(calls) == 1 + 2
    reader.read_slice("t", (slice(None), slice(None), slice(None), slice(0, 1)))
    assert len(calls) == 1 + 2 + 4 * 3 * 5


@pytest.mark.parametrize("slices", [(slice(None, None, 2),), (slice(None, None, -1),), (slice(None),) * 5])
def test_steps_and_too_many_slices_are_refused(four_dims, slices):
    with pytest.raises(ValueError, match="'t'"):
        four_dims[0].read_slice("t", slices)


def test_a_name_that_is_not_there_is_refused(four_dims):
    reader, _ = four_dims
    for ask in (reader.read, reader.shape, reader.dtype):
        with pytest.raises(ValueError, match="no tensor 'u'"):
            ask("u")


HEADERS = {
    "no JSON": (b"{", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not UTF-8"),
    "no object": (b"[]", "no JSON object"),
    "space first": (b" {}", "no JSON object"),
    "nested without end": (b'{"a":' * 100_000, "nested too deeply"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", "digits"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON number"),
    "metadata": ({"__metadata__": {"format": 1}}, "__metadata__"),
    "name twice": (b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", "twice"),
    "no entry": ({"a": []}, "needs dtype"),
    "key missing": ({"a": {"dtype": "F32", "shape": [2]}}, "needs dtype"),
    "key too many": ({"a": entry(pickle="x")}, "nothing else"),
    "unknown dtype": ({"a": entry("F4")}, "'F4'"),
    "dtype of a wrong type": ({"a": entry(["F32"])}, "has dtype"),
    "negative dimension": ({"a": entry(shape=(-2, -1))}, "no valid shape"),
    "fraction as dimension": ({"a": entry(shape=(2.0,))}, "no valid shape"),
    "true as dimension": ({"a": entry(shape=(2, True))}, "no valid shape"),
    "shape of a wrong type": ({"a": {**entry(), "shape": "2"}}, "no valid shape"),
    "65 dimensions": ({"a": entry(shape=(2, *[1] * 64))}, "no valid shape"),
    "empty, but beyond what torch can address": (
        {"a": entry(shape=(0, 1 << 40, 1 << 40), offsets=(0, 0))},
        "valid shape",
    ),
    "one offset": ({"a": entry(offsets=(0,))}, "no valid data_offsets"),
    "offsets backwards": ({"a": entry(shape=(0,), offsets=(8, 0))}, "no valid data_offsets"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, "no valid data_offsets"),
    "shape beyond its bytes": ({"a": entry(shape=(3,))}, "is not 8 bytes"),
    "dtype wider than its bytes": ({"a": entry("F64")}, "is not 8 bytes"),
    "overlap": ({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}, "'b' begins"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "'b' begins"),
    "a hole": ({"a": entry(shape=(1,), offsets=(4, 8))}, "'a' begins"),
    "beyond the end": ({"a": entry(shape=(4,), offsets=(0, 16))}, "end at byte"),
    "bytes that belong to no tensor": ({"a": entry(shape=(1,), offsets=(0, 4))}, "end at byte"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, case):
    header, words = HEADERS[case]
    path = lie(tmp_path / "model.safetensors", header)
    assert words in assert_refused(path, lambda: TensorReader(tmp_path, "model"))


@pytest.mark.parametrize(
    "data", [b"", b"1234567", struct.pack("<Q", 1), struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 3) + b"{}"]
)
def test_a_header_longer_than_the_file_is_refused_without_reading_it(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert "cut off" in assert_refused(path, lambda: read_header(path))


def test_a_sparse_file_cannot_make_us_read_a_huge_header(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 10**9))
        file.truncate(2 * 10**9)
    assert "cut off" in assert_refused(path, lambda: read_header(path))


def test_what_is_missing_is_named(model):
    for name in (FILE, INDEX):
        content = (model / name).read_bytes()
        (model / name).unlink()
        assert_refused(model / name, lambda: TensorReader(model, "model"))
        (model / name).write_bytes(content)
    assert set(TensorReader(model, "model").names()) == {"a", "b", "c"}


@pytest.mark.parametrize("cut", [1, 8, 40, 100])
def test_a_truncated_file_is_named(model, cut):
    data = (model / FILE).read_bytes()
    (model / FILE).write_bytes(data[:-cut])
    assert_refused(model / FILE, lambda: TensorReader(model, "model"))


def test_a_file_that_shrinks_after_it_was_opened_is_named(model):
    reader = TensorReader(model, "model")
    (model / FILE).write_bytes((model / FILE).read_bytes()[:-40])
    assert "ends at byte" in assert_refused(model / FILE, lambda: reader.read("b"))
    (model / FILE).unlink()
    assert_refused(model / FILE, lambda: reader.read("b"))


INDICES = {
    "a name that its file lacks": ({"a": FILE, "b": FILE, "c": FILE}, FILE),
    "a name that the index lacks": ({"a": FILE}, FILE),
    "a file that is not there": ({"a": FILE, "b": FILE, "c": "model-00003-of-00002.safetensors"}, "00003"),
    "a way out": ({"a": f"../model/{FILE}"}, INDEX),
    "an absolute path": ({"a": "/etc/passwd.safetensors"}, INDEX),
    "another kind of file": ({"a": "pytorch_model.bin"}, INDEX),
    "no text": ({"a": 1}, INDEX),
    "NUL": ({"a": "a\0.safetensors"}, INDEX),
    "no map": ([], INDEX),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_lies_is_refused(model, case):
    weight_map, named = INDICES[case]
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_refused(named, lambda: TensorReader(model, "model"))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"weight_map": {"a": 1, "a": 2}}', b"[" * 100_000])
def test_an_index_that_is_none_is_refused(model, data):
    (model / INDEX).write_bytes(data)
    assert_refused(model / INDEX, lambda: TensorReader(model, "model"))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4), "scalar": torch.tensor(1, dtype=torch.int8)}
    folder = write_model(tmp_path_factory.mktemp("fuzz") / "out", tensors)
    path = folder / "model-00001-of-00001.safetensors"
    return folder, {path: path.read_bytes(), folder / INDEX: (folder / INDEX).read_bytes()}


FLIPS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)


@given(which=st.integers(0, 1), flips=FLIPS, cut=st.integers(0, 3))
@settings(max_examples=1000, deadline=None)
def test_damaged_headers_give_a_value_error_or_tensors_and_nothing_else(fuzzed, which, flips, cut):
    folder, files = fuzzed
    path = list(files)[which]
    damaged = bytearray(files[path])
    # The length, the header and the index; damage to the data alone is the hash's business.
    end = 8 + int.from_bytes(damaged[:8], "little") if which == 0 else len(damaged)
    for place, value in flips:
        damaged[place % end] = value
    try:
        path.write_bytes(damaged[: len(damaged) - cut])
        try:
            reader = TensorReader(folder, "model")
            for name in reader.names():
                assert reader.read(name).shape == reader.shape(name)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            assert "model" in str(error)
    finally:
        path.write_bytes(files[path])


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_a_value_error(data):
    try:
        value = load_json(data)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert value == json.loads(data.decode())
