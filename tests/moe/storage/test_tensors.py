"""Tensors come back bit for bit, equal state gives equal bytes, and safetensors itself reads the files."""

import itertools
import json
import weakref

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sigmoe.moe.storage import tensors as module
from sigmoe.moe.storage.durable import durable_directory
from sigmoe.moe.storage.tensor_format import DTYPE_NAMES, read_header
from sigmoe.moe.storage.tensors import (
    NamedTensor,
    TensorReader,
    named_tensors,
    natural_order,
    plan_files,
    write_tensors,
)


def write(path, tensors, **options):
    with durable_directory(path) as directory:
        write_tensors(directory, "model", "model", named_tensors(tensors), **options)
    return directory.records


def bits(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()


def random_bits(shape, dtype, seed=0):
    """Every bit pattern that the dtype has: NaN payloads, infinities, denormals, -0."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def one_of_each():
    tensors = {f"layers.{i}.{str(dtype)[6:]}": random_bits((3, 5), dtype, i) for i, dtype in enumerate(DTYPE_NAMES)}
    special = torch.tensor([0x7FC0DEAD, 0xFFA00001 - (1 << 32), -(1 << 31)], dtype=torch.int32).view(torch.float32)
    return {
        **tensors,
        "special": special,  # a quiet NaN and a signalling one, each with a payload, and -0
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "step": torch.tensor(7),
        "nothing": torch.empty(0),
        "no rows": torch.empty(0, 4, dtype=torch.int8),
        "no columns": torch.empty(4, 0, 3, dtype=torch.float64),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "strided": torch.arange(24).reshape(4, 6)[::2, 1::3],
        "one of a column": torch.arange(12.0).reshape(3, 4)[1:2, 2],
        "expanded": torch.ones(1, 2).expand(3, 2),
        "gradient": torch.arange(4.0).requires_grad_(),
    }


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    tensors = one_of_each()
    write(tmp_path / "out", tensors)
    reader = TensorReader(tmp_path / "out/model", "model")
    assert set(reader.names()) == set(tensors)
    for name, tensor in tensors.items():
        back = reader.read(name)
        assert (reader.shape(name), reader.dtype(name)) == (tensor.shape, tensor.dtype)
        assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
        assert bits(back) == bits(tensor.detach()), name


def test_safetensors_reads_what_we_write(tmp_path):
    tensors = one_of_each()
    records = write(tmp_path / "out", tensors, max_file_bytes=100)
    files = [tmp_path / "out" / name for name in records if name.endswith(".safetensors")]
    assert len(files) > 3
    theirs = {}
    for file in files:
        with safetensors.safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            theirs |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no iterator
        assert set(load_file(file)) == set(read_header(file))
    assert set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        assert (theirs[name].shape, theirs[name].dtype) == (tensor.shape, tensor.dtype)
        assert bits(theirs[name]) == bits(tensor.detach()), name


def test_we_read_what_safetensors_writes(tmp_path):
    tensors = {name: tensor.detach().contiguous() for name, tensor in one_of_each().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path, "model")
    assert {name: bits(reader.read(name)) for name in reader.names()} == {n: bits(t) for n, t in tensors.items()}


@given(st.permutations(sorted(one_of_each())), st.sampled_from([1, 64, 100, 1 << 20]))
@settings(max_examples=20, deadline=None)
def test_equal_state_gives_equal_bytes_in_any_order(tmp_path_factory, order, max_file_bytes):
    tensors, folder = one_of_each(), tmp_path_factory.mktemp("order")
    expected = write(folder / "one", tensors, max_file_bytes=max_file_bytes)
    assert write(folder / "two", {n: tensors[n] for n in order}, max_file_bytes=max_file_bytes) == expected


def test_the_bytes_themselves_do_not_change(tmp_path):
    """The format is a promise: these bytes were checked by hand."""
    write(tmp_path / "out", {"b.10": torch.tensor([True]), "b.2": torch.tensor([1, -1], dtype=torch.int16)})
    header = (
        b'{"__metadata__":{"format":"pt"},"b.2":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},'
        b'"b.10":{"dtype":"BOOL","shape":[1],"data_offsets":[4,5]}}'
    )
    header += b" " * (-len(header) % 8)
    data = (tmp_path / "out/model/model-00001-of-00001.safetensors").read_bytes()
    assert data == len(header).to_bytes(8, "little") + header + b"\x01\x00\xff\xff\x01"
    index = json.loads((tmp_path / "out/model/model.safetensors.index.json").read_text())
    file = "model-00001-of-00001.safetensors"
    assert index == {"metadata": {"total_size": 5}, "weight_map": {"b.2": file, "b.10": file}}
    assert list(index["weight_map"]) == ["b.2", "b.10"]


def test_names_count_in_natural_order():
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "head", "layers.02.a", "layers", "2", "a.1.1"]
    ordered = ["2", "a.1.1", "head", "layers", "layers.02.a", "layers.2.a", "layers.2.b", "layers.10.a"]
    assert sorted(names, key=natural_order) == ordered


SIZES = st.dictionaries(st.text("ab.019", min_size=1), st.integers(0, 40), max_size=12)


@given(SIZES, st.integers(1, 64))
def test_files_are_filled_in_order_and_none_exceeds_the_limit(sizes, limit):
    tensors = {name: NamedTensor((size,), torch.uint8, torch.Tensor) for name, size in sizes.items()}
    files = plan_files("model", tensors, max_file_bytes=limit)
    assert [name for file in files for name in file.tensors] == sorted(sizes, key=natural_order)
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    for file in files:
        assert sum(sizes[name] for name in file.tensors) <= limit or len(file.tensors) == 1
    for file, following in itertools.pairwise(files):
        assert sum(sizes[name] for name in (*file.tensors, following.tensors[0])) > limit


def test_inside_a_file_every_tensor_is_aligned(tmp_path):
    write(tmp_path / "out", one_of_each())
    header = read_header(tmp_path / "out/model/model-00001-of-00001.safetensors")
    for extent in header.values():
        assert extent.begin % extent.dtype.itemsize == 0


@pytest.mark.parametrize("slice_bytes", [8, 24, 100, 1 << 20])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.transpose(0, 2),
        lambda t: t[:, 1:4],
        lambda t: t[1:2, :, ::2],
        lambda t: t.permute(1, 2, 0)[::3],
        lambda t: t[0].T,
    ],
)
def test_slices_of_any_size_give_the_same_bytes(monkeypatch, view, slice_bytes):
    monkeypatch.setattr(module, "_SLICE_BYTES", slice_bytes)
    tensor = view(torch.arange(4 * 5 * 6).reshape(4, 5, 6).double())
    memory = tensor.untyped_storage()
    data, copied = b"", [0]
    for piece in module._pieces(tensor):
        data += bytes(piece)
        if not 0 <= np.frombuffer(piece, np.uint8).ctypes.data - memory.data_ptr() < memory.nbytes():
            copied.append(len(piece))
    assert data == tensor.contiguous().numpy().tobytes()
    assert max(copied) <= slice_bytes


def test_contiguous_memory_is_not_copied():
    tensor = torch.zeros(3, 4)
    (piece,) = module._pieces(tensor)
    tensor[1, 2] = float.fromhex("0x1.fep0")
    assert bytes(piece) == tensor.numpy().tobytes()


def test_one_tensor_is_in_flight_at_a_time(tmp_path):
    alive = []

    def read():
        tensor = torch.zeros(10)
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(tensor))
        return tensor

    tensors = {f"t.{i}": NamedTensor((10,), torch.float32, read) for i in range(5)}
    with durable_directory(tmp_path / "out") as directory:
        write_tensors(directory, "model", "model", tensors, max_file_bytes=80)
    assert len(alive) == 5


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("a", torch.zeros(2, dtype=torch.complex64), "complex64"),
        ("", torch.zeros(2), "cannot name"),
        ("__metadata__", torch.zeros(2), "cannot name"),
        ("two\nlines", torch.zeros(2), "cannot name"),
        ("\ud800", torch.zeros(2), "cannot name"),
    ],
)
def test_what_the_format_lacks_is_refused_before_anything_is_written(tmp_path, name, tensor, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "out", {"fine": torch.zeros(2), name: tensor})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(1, 2), torch.zeros(2, dtype=torch.float64)])
def test_a_tensor_that_is_not_what_was_declared_is_refused(tmp_path, tensor):
    declared = {"a": NamedTensor((2,), torch.float32, lambda: tensor)}
    with pytest.raises(ValueError, match="'a' was declared"), durable_directory(tmp_path / "out") as directory:
        write_tensors(directory, "model", "model", declared)
    assert list(tmp_path.iterdir()) == []


def test_no_tensors_at_all_is_an_index_without_files(tmp_path):
    records = write(tmp_path / "out", {})
    assert list(records) == ["model/model.safetensors.index.json"]
    assert TensorReader(tmp_path / "out/model", "model").names() == ()
