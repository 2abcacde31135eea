"""Token files in Megatron's memory-mapped format: a writer that streams and a reader that checks.

`<name>.bin` holds the token ids of all documents, end to end. `<name>.idx` holds, little-endian,

    9 bytes   b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     type of the ids: 8 = uint16, 4 = int32
    uint64    N, number of sequences            (here one sequence is one document)
    uint64    N + 1, number of document bounds
    int32 N   sequence lengths in tokens
    int64 N   byte offset of each sequence in the .bin file
    int64 N+1 document bounds in sequences: 0, 1, ..., N

as `megatron/core/datasets/indexed_dataset.py` (NVIDIA/Megatron-LM) writes it. Nothing in it can hold a pickle.
"""

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODE_OF_DTYPE: dict[np.dtype[Any], int] = {np.dtype("<u2"): 8, np.dtype("<i4"): 4}
_DTYPE_OF_CODE = {code: dtype for dtype, code in _CODE_OF_DTYPE.items()}
_MAX_ID: dict[np.dtype[Any], int] = {np.dtype("<u2"): 2**16 - 1, np.dtype("<i4"): 2**31 - 1}
_CHUNK = 1 << 22


class Sink(Protocol):
    """Anything that takes bytes: an open file or a hashing writer."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Append bytes."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of the ids on disk: uint16 below 65,500 ids (Megatron's bound), else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedWriter:
    """Streams documents into a .bin sink and keeps 4 bytes a document for the .idx."""

    def __init__(self, bin_sink: Sink, dtype: np.dtype[Any]) -> None:
        self._bin = bin_sink
        self._dtype = np.dtype(dtype)
        self._lengths = array("i")

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, token_T: NDArray[np.integer], lengths: Sequence[int]) -> None:
        """Append documents: their ids end to end, and their lengths in tokens.

        Raises ValueError if the lengths do not add up to the ids, or an id does not fit the type on disk.
        """
        if sum(lengths) != token_T.size or min(lengths, default=1) < 1:
            raise ValueError(f"lengths must be positive and add up to {token_T.size}, they add up to {sum(lengths)}")
        limit = _MAX_ID[self._dtype]
        if token_T.size and (int(token_T.min()) < 0 or int(token_T.max()) > limit):
            raise ValueError(f"ids must lie in 0..{limit} to be written as {self._dtype}")
        if max(lengths, default=0) > np.iinfo(np.int32).max:
            raise ValueError("a document has more than 2^31 - 1 tokens: split it")
        self._bin.write(np.ascontiguousarray(token_T, dtype=self._dtype).data.cast("B"))
        self._lengths.extend(lengths)

    def write_index(self, idx_sink: Sink) -> None:
        """Write the .idx file of what was added."""
        number = self.num_documents
        idx_sink.write(_HEADER.pack(MAGIC, VERSION, _CODE_OF_DTYPE[self._dtype], number, number + 1))
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if number else np.empty(0, np.int32)
        idx_sink.write(lengths.astype("<i4").tobytes())
        for pointer in _pointers(lengths, self._dtype.itemsize):
            idx_sink.write(pointer.tobytes())
        for start in range(0, number + 1, _CHUNK):
            idx_sink.write(np.arange(start, min(start + _CHUNK, number + 1), dtype="<i8").tobytes())


class IndexedDocuments:
    """The documents of one .bin/.idx pair, memory-mapped.

    `tokens` [num_tokens] ids, `lengths` [N] int32 in tokens, `starts(documents)` in tokens.
    Raises ValueError that names the file where the pair is missing, cut short or inconsistent.
    """

    def __init__(self, bin_path: Path) -> None:
        self.bin_path = bin_path
        self.idx_path = bin_path.with_suffix(".idx")
        self.dtype, self.num_documents = _read_header(self.idx_path)
        number, offset = self.num_documents, _HEADER.size
        self.lengths: NDArray[np.int32] = _map(self.idx_path, "<i4", offset, number)
        self._pointers: NDArray[np.int64] = _map(self.idx_path, "<i8", offset + 4 * number, number)
        bounds: NDArray[np.int64] = _map(self.idx_path, "<i8", offset + 12 * number, number + 1)
        self.num_tokens = self._check_index(bounds)
        self.tokens: NDArray[np.integer] = _map(bin_path, self.dtype, 0, self.num_tokens)

    def document(self, index: int) -> NDArray[np.integer]:
        """Return the ids of document `index`, a view into the file."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.bin_path} has {self.num_documents} documents, document {index} was asked for")
        start = int(self._pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the documents begin in `tokens`."""
        return np.asarray(self._pointers[documents]) // self.dtype.itemsize

    def check_ids(self, vocab_size: int, end_of_text: int, progress: Callable[[int], None] | None = None) -> None:
        """Read every id once: ValueError with file and byte offset if one is beyond the vocabulary,
        or if a document does not end with the end-of-text id."""
        for start in range(0, self.num_tokens, _CHUNK):
            chunk = self.tokens[start : start + _CHUNK]
            if int(chunk.max()) >= vocab_size or int(chunk.min()) < 0:
                bad = start + int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
                raise ValueError(
                    f"{self.bin_path}: id {int(self.tokens[bad])} at byte {bad * self.dtype.itemsize} is beyond the "
                    f"vocabulary of {vocab_size}: prepare the dataset again"
                )
            if progress is not None:
                progress(len(chunk))
        for start in range(0, self.num_documents, _CHUNK):
            index = np.arange(start, min(start + _CHUNK, self.num_documents))
            last = self.starts(index) + self.lengths[index] - 1
            wrong = np.flatnonzero(self.tokens[last] != end_of_text)
            if wrong.size:
                bad = int(last[wrong[0]])
                raise ValueError(
                    f"{self.bin_path}: the document that ends at byte {bad * self.dtype.itemsize} does not end with "
                    f"the end-of-text id {end_of_text}: prepare the dataset again"
                )

    def _check_index(self, bounds: NDArray[np.int64]) -> int:
        """Check lengths, pointers and bounds against each other and the .bin file; return the number of tokens."""
        total = 0
        for start in range(0, self.num_documents, _CHUNK):
            length = self.lengths[start : start + _CHUNK].astype(np.int64)
            if int(length.min()) < 1:
                raise ValueError(f"{self.idx_path}: document {start + int(length.argmin())} has no tokens")
            expected = (total + np.cumsum(length) - length) * self.dtype.itemsize
            wrong = np.flatnonzero(self._pointers[start : start + _CHUNK] != expected)
            if wrong.size:
                raise ValueError(f"{self.idx_path}: document {start + int(wrong[0])} has a wrong byte offset")
            total += int(length.sum())
        for start in range(0, self.num_documents + 1, _CHUNK):
            chunk = bounds[start : start + _CHUNK]
            if not np.array_equal(chunk, np.arange(start, start + len(chunk))):
                raise ValueError(f"{self.idx_path}: one sequence must be one document, the bounds say otherwise")
        size, wanted = _size(self.bin_path), total * self.dtype.itemsize
        if size != wanted:
            raise ValueError(f"{self.bin_path} has {size} bytes, its index says {wanted}: it is damaged")
        return total


def _pointers(lengths: NDArray[np.int32], itemsize: int) -> Iterator[NDArray[np.int64]]:
    total = 0
    for start in range(0, len(lengths), _CHUNK):
        length = lengths[start : start + _CHUNK].astype("<i8")
        yield ((total + np.cumsum(length) - length) * itemsize).astype("<i8")
        total += int(length.sum())


def _read_header(path: Path) -> tuple[np.dtype[Any], int]:
    size = _size(path)
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} is no token index: its first bytes are not {MAGIC!r}")
    _, version, code, number, bounds = _HEADER.unpack(header)
    if version != VERSION or code not in _DTYPE_OF_CODE:
        raise ValueError(f"{path}: version {version}, id type {code}; readable are version 1 with id types 4 and 8")
    if bounds != number + 1 or size != _HEADER.size + 12 * number + 8 * bounds:
        raise ValueError(f"{path} has {size} bytes, which does not fit its {number} documents: it is damaged")
    return _DTYPE_OF_CODE[code], number


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _map(path: Path, dtype: np.dtype[Any] | str, offset: int, count: int) -> NDArray[Any]:
    if count == 0:
        return np.empty(0, dtype)
    # A plain array over the map: indexing np.memmap itself costs some microseconds of subclass handling a call.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))
