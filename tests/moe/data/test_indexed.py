import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sigmoe.moe.data.indexed import IndexedDocuments, IndexedWriter, token_dtype

DOCUMENTS = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=12)


def test_bytes_are_the_ones_written_by_hand() -> None:
    bin_file, idx_file = io.BytesIO(), io.BytesIO()
    writer = IndexedWriter(bin_file, token_dtype(4096))
    writer.add(np.array([5, 6, 0, 7, 0]), [3, 2])
    writer.write_index(idx_file)
    assert bin_file.getvalue() == bytes([5, 0, 6, 0, 0, 0, 7, 0, 0, 0])
    assert idx_file.getvalue() == (
        b"MMIDIDX\x00\x00"
        + bytes([1, 0, 0, 0, 0, 0, 0, 0])  # version
        + bytes([8])  # uint16
        + bytes([2, 0, 0, 0, 0, 0, 0, 0])  # sequences
        + bytes([3, 0, 0, 0, 0, 0, 0, 0])  # document bounds
        + bytes([3, 0, 0, 0, 2, 0, 0, 0])  # lengths
        + struct.pack("<qq", 0, 6)  # byte offsets
        + struct.pack("<qqq", 0, 1, 2)  # bounds
    )


def test_large_vocabularies_use_int32() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32
    bin_file, idx_file = io.BytesIO(), io.BytesIO()
    writer = IndexedWriter(bin_file, token_dtype(70000))
    writer.add(np.array([69999]), [1])
    writer.write_index(idx_file)
    assert bin_file.getvalue() == struct.pack("<i", 69999)
    assert idx_file.getvalue()[17] == 4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, wide=st.booleans())
def test_bytes_equal_megatrons(documents: list[list[int]], wide: bool, tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    dtype = np.int32 if wide else np.uint16
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    bin_file, idx_file = io.BytesIO(), io.BytesIO()
    writer = IndexedWriter(bin_file, np.dtype(dtype))
    writer.add(np.concatenate([np.array(document) for document in documents]), [len(d) for d in documents])
    writer.write_index(idx_file)
    assert bin_file.getvalue() == (tmp_path / "theirs.bin").read_bytes()
    assert idx_file.getvalue() == (tmp_path / "theirs.idx").read_bytes()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS)
def test_reads_what_was_written(documents: list[list[int]], tmp_path: Path, write_documents) -> None:
    read = write_documents(tmp_path / "a.bin", documents)
    assert read.num_documents == len(documents)
    assert read.num_tokens == sum(map(len, documents))
    assert [read.document(index).tolist() for index in range(len(documents))] == documents
    assert read.lengths.tolist() == [len(document) for document in documents]
    starts = read.starts(np.arange(len(documents)))
    assert starts.tolist() == [sum(map(len, documents[:index])) for index in range(len(documents))]
    with pytest.raises(IndexError):
        read.document(len(documents))


def test_writer_refuses_what_would_not_come_back() -> None:
    writer = IndexedWriter(io.BytesIO(), np.dtype("<u2"))
    with pytest.raises(ValueError, match="add up to 2"):
        writer.add(np.array([1, 2]), [1])
    with pytest.raises(ValueError, match="positive"):
        writer.add(np.array([1, 2]), [2, 0])
    with pytest.raises(ValueError, match=r"0\.\.65535"):
        writer.add(np.array([65536]), [1])
    with pytest.raises(ValueError, match=r"0\.\.65535"):
        writer.add(np.array([-1]), [1])


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "no token index"),
        (9, b"\x02", "version 2"),
        (17, b"\x06", "id type 6"),
        (18, b"\x09", "damaged"),
        (26, b"\x09", "damaged"),
        (34, b"\x00\x00\x00\x00", "no tokens"),
        (34, b"\xff\xff\xff\xff", "no tokens"),
        (34, b"\x04", "wrong byte offset"),
        (38, b"\x03", "damaged"),  # the last length disagrees with the size of the .bin file
        (50, b"\x08", "wrong byte offset"),
        (66, b"\x05", "one sequence must be one document"),
    ],
)
def test_corrupt_index_is_refused(offset: int, value: bytes, message: str, tmp_path: Path, write_documents) -> None:
    write_documents(tmp_path / "a.bin", [[5, 6, 0], [7, 0]])
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[offset : offset + len(value)] = value
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        IndexedDocuments(tmp_path / "a.bin")
    assert str(tmp_path / "a.") in str(error.value)


@pytest.mark.parametrize("name", ["a.bin", "a.idx"])
@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "missing"])
def test_wrong_sizes_are_refused(name: str, change: str, tmp_path: Path, write_documents) -> None:
    write_documents(tmp_path / "a.bin", [[5, 6, 0], [7, 0]])
    path = tmp_path / name
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes({"shorter": content[:-1], "longer": content + b"\0", "empty": b""}[change])
    with pytest.raises(ValueError, match=str(path)):
        IndexedDocuments(tmp_path / "a.bin")


def test_ids_beyond_the_vocabulary_are_named_with_their_byte(tmp_path: Path, write_documents) -> None:
    documents = write_documents(tmp_path / "a.bin", [[5, 6, 0], [9, 0]])
    documents.check_ids(10, 0)
    with pytest.raises(ValueError, match=r"a\.bin: id 9 at byte 6 is beyond the vocabulary of 9"):
        documents.check_ids(9, 0)


def test_documents_must_end_with_the_end_of_text(tmp_path: Path, write_documents) -> None:
    documents = write_documents(tmp_path / "a.bin", [[5, 6, 0], [9, 3]])
    with pytest.raises(ValueError, match=r"ends at byte 8 does not end with the end-of-text id 0"):
        documents.check_ids(10, 0)
