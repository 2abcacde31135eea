"""The tensors of a planned submodel, each cut from the parent when it is written."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..canonical import is_parameter
from ..hf.names import hf_name
from ..storage.tensors import NamedTensor, tensor_bytes
from ..stored import StoredModel
from .plan import Piece, Submodel

_BLOCK = 1 << 18  # elements that are rounded or averaged at a time, in float64 at the most


def cut_tensors(
    parent: StoredModel, submodel: Submodel, format: str, dtype: torch.dtype | None
) -> dict[str, tuple[str, NamedTensor]]:
    """Return every tensor of the submodel by its name on disk in `format`, with its canonical one.

    None is ever whole in memory but gates and tables. `dtype` rounds parameters; reading one raises ValueError where it
    has numbers that `dtype` cannot hold.
    """
    tensors = {}
    for canonical, piece in submodel.pieces.items():
        name = canonical if format == "sigmoe" else hf_name(format, canonical)
        tensors[name] = canonical, _cut(parent, piece, dtype if is_parameter(piece.source) else None)
    return tensors


def _cut(parent: StoredModel, piece: Piece, dtype: torch.dtype | None) -> NamedTensor:
    tensors, stored = parent.tensors, parent.tensors.dtype(piece.source)
    shape = tensors.shape(piece.source)
    if piece.rows is not None:
        shape = (len(piece.rows), *shape[1:])
        return NamedTensor(shape, dtype or stored, partial(_read_rows, parent, piece, dtype or stored))
    if piece.shares or dtype not in (None, stored):
        pieces = partial(_blocks, parent, piece, dtype or stored)
    else:
        pieces = partial(tensors.pieces, piece.source)
    return NamedTensor(shape, dtype or stored, partial(tensors.read, piece.source), pieces)


def _read_rows(parent: StoredModel, piece: Piece, dtype: torch.dtype) -> Tensor:
    assert piece.rows is not None
    return _rounded(parent.tensors.read(piece.source)[list(piece.rows)], dtype, piece.source)


def _blocks(parent: StoredModel, piece: Piece, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the piece's tensor, or the weighted mean of its shares, in `dtype`, some rows at a time."""
    shape = parent.tensors.shape(piece.source)
    step = max(1, _BLOCK * shape[0] // math.prod(shape))
    total = sum(weight for _, weight in piece.shares)
    for begin in range(0, shape[0], step):
        rows = [slice(begin, begin + step)]
        tensor = torch.zeros((), dtype=torch.float64)
        for name, weight in piece.shares:
            tensor = tensor + parent.tensors.read_slice(name, rows).double() * (weight / total)
        if not piece.shares:
            tensor = parent.tensors.read_slice(piece.source, rows)
        yield tensor_bytes(_rounded(tensor, dtype, piece.source))


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = tensor.to(dtype)
    # fp16 ends at 65504; of the other formats none has a narrower range than fp32.
    if dtype == torch.float16 != tensor.dtype and bool(rounded.isinf().any()) and not bool(tensor.isinf().any()):
        raise ValueError(f"{name} holds numbers beyond the range of fp16: choose dtype=bf16")
    return rounded
