"""Reads a folder of safetensors files: whole tensors or slices, and never more bytes than were asked for."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .hashing import PIECE_BYTES
from .tensor_format import Extent, load_json, read_header


class TensorReader:
    """The tensors of `folder/stem-*.safetensors` by way of their index (or of a lone `folder/stem.safetensors`).

    All headers are read and checked at once. Raises ValueError in one line that names the file.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._extents: dict[str, tuple[Path, Extent]] = {}
        index = folder / f"{stem}.safetensors.index.json"
        lone = folder / f"{stem}.safetensors"
        if index.exists() or not lone.exists():
            self._open_indexed(folder, index)
        else:
            self._extents = {name: (lone, extent) for name, extent in read_header(lone).items()}

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of the index."""
        return tuple(self._extents)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor. ValueError if there is none of that name."""
        return self._find(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor."""
        return self._find(name)[1].dtype

    def num_bytes(self, name: str) -> int:
        """The size of one tensor's data."""
        extent = self._find(name)[1]
        return extent.end - extent.begin

    def file(self, name: str) -> Path:
        """The file that one tensor lies in."""
        return self._find(name)[0]

    def read(self, name: str) -> Tensor:
        """One whole tensor, in host memory."""
        return self.read_slice(name, ())

    def read_slice(self, name: str, slices: Sequence[slice]) -> Tensor:
        """`tensor[slices]` of one tensor, contiguous; dimensions without a slice are whole, steps are refused."""
        path, extent = self._find(name)
        if len(slices) > len(extent.shape):
            raise ValueError(f"{len(slices)} slices for tensor {name!r} of shape {extent.shape}")
        ranges = []
        for dim, wanted in zip(extent.shape, [*slices, *[slice(None)] * len(extent.shape)]):
            start, stop, step = wanted.indices(dim)
            if step != 1:
                raise ValueError(f"tensor {name!r}: slices with a step are not read")
            ranges.append(range(start, max(start, stop)))
        result = torch.empty([len(r) for r in ranges], dtype=extent.dtype)
        if result.numel():
            _fill(result, ranges, path, extent)
        return result

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of one tensor in order, some at a time: each piece is valid until the next but one is asked for."""
        path, extent = self._find(name)
        size = min(PIECE_BYTES, extent.end - extent.begin)
        buffers = itertools.cycle([memoryview(bytearray(size)), memoryview(bytearray(size))])
        with _opened(path) as descriptor:
            for begin in range(extent.begin, extent.end, PIECE_BYTES):
                piece = next(buffers)[: extent.end - begin]
                _read_exactly(descriptor, piece, begin)
                yield piece

    def read_into(self, name: str, target: Tensor) -> None:
        """Read one whole tensor into `target`, contiguous, in host memory, of its shape; other dtypes are converted."""
        path, extent = self._find(name)
        if tuple(target.shape) != extent.shape:
            raise ValueError(f"tensor {name!r} is {list(extent.shape)}, the place for it {list(target.shape)}")
        if target.dtype != extent.dtype:
            target.copy_(self.read(name))
        elif target.numel():
            _fill(target, [range(dim) for dim in extent.shape], path, extent)

    def renamed(self, names: Mapping[str, str]) -> "TensorReader":
        """Return a reader of the same files that knows tensors by the keys of `names`, each stored as its value."""
        reader = object.__new__(TensorReader)
        reader._extents = {new: self._find(old) for new, old in names.items()}
        return reader

    def _find(self, name: str) -> tuple[Path, Extent]:
        try:
            return self._extents[name]
        except KeyError:
            raise ValueError(f"there is no tensor {name!r} among the {len(self._extents)} stored") from None

    def _open_indexed(self, folder: Path, index: Path) -> None:
        weight_map = _read_index(index)
        headers: dict[str, dict[str, Extent]] = {}
        for name, file in weight_map.items():
            if file not in headers:
                headers[file] = read_header(folder / file)
            if name not in headers[file]:
                raise ValueError(f"{folder / file}: tensor {name!r} is missing, which {index.name} places there")
            self._extents[name] = (folder / file, headers[file][name])
        for file, header in headers.items():
            for name in header:
                if weight_map.get(name) != file:
                    raise ValueError(f"{folder / file}: holds tensor {name!r}, which {index.name} does not place there")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = load_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or "\0" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: {file!r}, given for tensor {name!r}, is no name of a safetensors file beside it")
    return weight_map


def _fill(result: Tensor, ranges: list[range], path: Path, extent: Extent) -> None:
    """Read the runs of bytes that are contiguous both in the file and in `result`."""
    # From the last dimension that is cut onwards a run is contiguous; before it every index starts another run.
    cut = [index for index, (r, dim) in enumerate(zip(ranges, extent.shape)) if len(r) != dim]
    split = cut[-1] if cut else 0
    item = extent.dtype.itemsize
    strides = [math.prod(extent.shape[index + 1 :]) * item for index in range(len(extent.shape))]
    tail = ranges[split].start * strides[split] if ranges else 0
    run = math.prod(len(r) for r in ranges[split:]) * item
    target = result.view(-1).view(torch.uint8).numpy().data
    with _opened(path) as descriptor:
        for number, outer in enumerate(itertools.product(*ranges[:split])):
            offset = extent.begin + tail + sum(i * stride for i, stride in zip(outer, strides))
            _read_exactly(descriptor, target[number * run : (number + 1) * run], offset)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Yield the file's descriptor; what cannot be read is a ValueError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _read_exactly(descriptor: int, target: memoryview, offset: int) -> None:
    while target:
        count = os.preadv(descriptor, [target], offset)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset}")
        target, offset = target[count:], offset + count
