"""A planned submodel that runs before it is written, every tensor cut from the parent when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..domains import DomainRegistry
from ..storage.tensors import NamedTensor, tensor_bytes, tensor_pieces
from ..stored import StoredModel
from .cut import cut_tensors
from .plan import Submodel


class CutTensors:
    """The tensors of a submodel by canonical name."""

    def __init__(self, tensors: Mapping[str, NamedTensor]) -> None:
        self._tensors = tensors

    def read_into(self, name: str, target: Tensor) -> None:
        """Read one whole tensor into `target`, of its shape; other dtypes are converted."""
        tensor = self._tensors[name]
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        place, filled = tensor_bytes(whole), 0
        for piece in tensor_pieces(name, tensor):
            place[filled : filled + piece.nbytes] = piece
            filled += piece.nbytes
        target.copy_(whole)


@dataclass(frozen=True, kw_only=True)
class UnwrittenModel:
    """What a submodel will be."""

    config: ModelConfig
    registry: DomainRegistry
    tensors: CutTensors


def unwritten_model(parent: StoredModel, submodel: Submodel) -> UnwrittenModel:
    """Return the submodel as `SubmodelWriter` would write it, in the parent's dtype."""
    tensors = CutTensors(dict(cut_tensors(parent, submodel, "sigmoe", None).values()))
    return UnwrittenModel(config=submodel.config, registry=submodel.registry, tensors=tensors)
