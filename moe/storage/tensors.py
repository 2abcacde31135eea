"""Tensors to standard safetensors files, deterministically, with one tensor in flight at a time.

Which tensor lies in which file, and where, is a pure function of (names, shapes, dtypes, max_file_bytes): names in
natural order are filled into files; inside a file wider dtypes come first, so that every tensor is aligned. Equal
state therefore gives equal bytes, whatever the order in which it is handed in.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from .durable import DurableDirectory
from .tensor_format import DTYPE_NAMES, encode_header
from .tensor_reader import TensorReader

__all__ = [
    "MAX_FILE_BYTES",
    "NamedTensor",
    "TensorFile",
    "TensorReader",
    "named_tensors",
    "natural_order",
    "plan_files",
    "tensor_bytes",
    "tensor_pieces",
    "write_tensor_file",
    "write_tensors",
]

MAX_FILE_BYTES = 4 << 30
# What is copied at a time from a tensor that is not contiguous or not in host memory.
_SLICE_BYTES = 16 << 20


class NamedTensor(NamedTuple):
    """A tensor that is produced only when it is written: its shape and dtype, and the function that yields it.

    `pieces`, where there is one, yields its bytes without the whole tensor in memory, as `TensorReader.pieces` does.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    pieces: Callable[[], Iterator[memoryview]] | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def named_tensors(tensors: Mapping[str, Tensor]) -> dict[str, NamedTensor]:
    """Return tensors that are in memory, each to be written as it stands then."""
    return {name: NamedTensor(tuple(t.shape), t.dtype, t.detach) for name, t in tensors.items()}


class TensorFile(NamedTuple):
    """One planned file: its name and the tensors in it, in the order in which they lie."""

    name: str
    tensors: tuple[str, ...]


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key that counts: layers.2 before layers.10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def plan_files(
    stem: str, tensors: Mapping[str, NamedTensor], *, max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[TensorFile, ...]:
    """Distribute the tensors over files of at most `max_file_bytes` of data (one tensor may exceed it, alone)."""
    groups: list[list[str]] = []
    filled = 0
    for name in sorted(tensors, key=natural_order):
        size = tensors[name].num_bytes
        if not groups or filled + size > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return tuple(
        TensorFile(
            f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors",
            tuple(sorted(group, key=lambda name: -tensors[name].dtype.itemsize)),
        )
        for number, group in enumerate(groups, 1)
    )


def write_tensors(
    directory: DurableDirectory,
    folder: str,
    stem: str,
    tensors: Mapping[str, NamedTensor],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `folder/stem-0000i-of-0000N.safetensors` and the index that transformers reads; folder may be ".".

    Raises ValueError for a name or dtype that the format lacks, or a tensor that is not what it was declared to be.
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
    files = plan_files(stem, tensors, max_file_bytes=max_file_bytes)
    for file in files:
        write_tensor_file(directory, folder, file, tensors)
    directory.write(_inside(folder, f"{stem}.safetensors.index.json"), encode_index(files, tensors))


def write_tensor_file(
    directory: DurableDirectory, folder: str, file: TensorFile, tensors: Mapping[str, NamedTensor]
) -> None:
    """Write one planned file."""
    with directory.open(_inside(folder, file.name)) as writer:
        writer.write(encode_header({name: (tensors[name].shape, tensors[name].dtype) for name in file.tensors}))
        for name in file.tensors:
            for piece in tensor_pieces(name, tensors[name]):
                writer.write(piece)


def tensor_pieces(name: str, tensor: NamedTensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in order. Raises ValueError where it is not what it was declared to be."""
    return _pieces(_read(name, tensor)) if tensor.pieces is None else tensor.pieces()


def encode_index(files: tuple[TensorFile, ...], tensors: Mapping[str, NamedTensor]) -> bytes:
    """The index that maps each name to its file, in natural order."""
    place = {name: file.name for file in files for name in file.tensors}
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
        "weight_map": {name: place[name] for name in sorted(place, key=natural_order)},
    }
    return json.dumps(index, indent=2).encode() + b"\n"


def _inside(folder: str, name: str) -> str:
    return PurePosixPath(folder, name).as_posix()


def _check(name: str, tensor: NamedTensor) -> None:
    if not name.isprintable() or name in ("", "__metadata__"):
        raise ValueError(f"{name!r} cannot name a tensor")
    if tensor.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
        raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot be stored; known: {known}")


def _read(name: str, declared: NamedTensor) -> Tensor:
    tensor = declared.read().detach()
    if tuple(tensor.shape) != tuple(declared.shape) or tensor.dtype != declared.dtype:
        found, wanted = (tuple(tensor.shape), tensor.dtype), (tuple(declared.shape), declared.dtype)
        raise ValueError(f"tensor {name!r} was declared as {wanted} and turned out to be {found}")
    return tensor


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order: its own memory where possible, else copies of at most a slice."""
    limit = _SLICE_BYTES // tensor.element_size()
    if tensor.is_contiguous() and tensor.device.type == "cpu":
        yield tensor_bytes(tensor)
    elif tensor.numel() <= limit:
        yield tensor_bytes(tensor.cpu().contiguous())
    elif tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), limit):
            yield tensor_bytes(flat[start : start + limit].cpu())
    elif tensor.shape[0] == 1:
        yield from _pieces(tensor[0])
    else:
        rows = max(1, limit * tensor.shape[0] // tensor.numel())
        for start in range(0, tensor.shape[0], rows):
            yield from _pieces(tensor[start : start + rows])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host."""
    # A contiguous tensor of one element may have any stride, with which `view` refuses another dtype (torch 2.13).
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
