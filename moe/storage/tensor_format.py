"""The safetensors file format: 8 bytes with the header's length, the header as JSON, then the raw little-endian data.

Format: https://github.com/huggingface/safetensors#format. The parser trusts nothing: every length, offset and shape is
checked against the file before a byte of data is read, and what is wrong is a ValueError in one line that names the
file.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# The limits of the reference implementation, and of what torch can address.
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 64
_MAX_ELEMENTS = 1 << 60


class Extent(NamedTuple):
    """Where one tensor lies: shape, dtype, and its bytes [begin, end) counted from the start of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


def encode_header(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """The bytes before the data of tensors that follow each other in this order; padded to align the data to 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (shape, dtype) in shapes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def read_header(path: Path) -> dict[str, Extent]:
    """The tensors of a file, in the order in which they lie. ValueError in one line if anything about it is off."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"{path}: not a safetensors file, or cut off: the header does not fit in {size} bytes")
            header = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return _parse(header, size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_json(data: bytes) -> object:
    """Parse JSON strictly: ValueError in one line for a key given twice, NaN, nesting without end, or bad UTF-8."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def _parse(header: bytes, size: int) -> dict[str, Extent]:
    entries = load_json(header)
    if not header.startswith(b"{") or not isinstance(entries, dict):
        raise ValueError("the header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the header's __metadata__ is no map of texts")
    start = 8 + len(header)
    extents = {name: _parse_entry(name, entry, start) for name, entry in entries.items()}
    ordered = sorted(extents.items(), key=lambda item: (item[1].begin, item[1].end))
    position = start
    for name, extent in ordered:
        if extent.begin != position:
            raise ValueError(
                f"tensor {name!r} begins at byte {extent.begin}, not where the one before ends, {position}"
            )
        position = extent.end
    if position != size:
        raise ValueError(f"the tensors end at byte {position}, the file at {size}")
    return dict(ordered)


def _parse_entry(name: str, entry: object, start: int) -> Extent:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype_name!r:.40}; known: {', '.join(_DTYPES)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS or math.prod(max(dim, 1) for dim in shape) > _MAX_ELEMENTS:
        raise ValueError(f"tensor {name!r} has no valid shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has no valid data_offsets")
    dtype = _DTYPES[dtype_name]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(
            f"tensor {name!r} of shape {shape} and dtype {dtype_name} is not {offsets[1] - offsets[0]} bytes"
        )
    return Extent(tuple(shape), dtype, start + offsets[0], start + offsets[1])


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is given twice")
    return table


def _refuse_constant(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON number")
