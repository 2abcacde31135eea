"""Writes a planned submodel: one tensor in memory at a time, two where it cannot pass in pieces, hashed as written."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from ..config import layer_experts
from ..counts import count_parameters
from ..hf.files import write_carried, write_hf_files
from ..hf.formats import choose_format
from ..parsing import to_mapping
from ..storage.checkpoint import CheckpointContent, write_documents
from ..storage.durable import DurableDirectory
from ..storage.shared import TensorFiles
from ..storage.tensors import MAX_FILE_BYTES, NamedTensor, natural_order, tensor_bytes
from ..stored import StoredModel
from ..workers import ALONE, Workers
from .cut import cut_tensors
from .plan import Submodel


@dataclass(frozen=True, kw_only=True)
class KeptTensor:
    """A tensor as it was written: its names, where it comes from, and the SHA-256 of its bytes as they were read."""

    name: str  # on disk
    canonical: str
    source: str
    rows: tuple[int, ...] | None
    sha256: str | None  # None: not taken


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What was written: `format` (sigmoe, or transformers' model type), the reason for it, and every tensor."""

    format: str
    reason: str
    dtype: torch.dtype  # of the parameters
    num_bytes: int  # of all tensors
    kept: tuple[KeptTensor, ...]


class SubmodelWriter:
    """Writes all files of a submodel but report and manifest, in the format of transformers that fits, else sigmoe's.

    `dtype` rounds the parameters (None: as the parent has them); `sigmoe_format` asks for sigmoe's format in any case;
    `reason` is the one for the format where the caller knows a better one; `hash_tensors` takes the hash of every
    tensor, beside those of the files, which costs as much time again; `replaced`, by canonical name, is written in
    place of what the parent has, rounded to the dtype of that.
    """

    def __init__(
        self,
        parent: StoredModel,
        submodel: Submodel,
        *,
        dtype: torch.dtype | None = None,
        sigmoe_format: bool = False,
        reason: str | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        hash_tensors: bool = True,
        replaced: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        choice = choose_format(submodel.config, submodel.registry)
        self._format = None if sigmoe_format else choice.format
        self._reason = reason or ("format=sigmoe asks for it" if sigmoe_format else choice.reason)
        self._parent, self._submodel, self._rounded = parent, submodel, dtype is not None
        cut = cut_tensors(parent, submodel, self._format or "sigmoe", dtype)
        self._tensors: dict[str, NamedTensor] = {
            name: _in_place_of(tensor, replaced.get(canonical)) for name, (canonical, tensor) in cut.items()
        }
        self._canonical = {name: canonical for name, (canonical, _) in cut.items()}
        folder = "model" if self._format is None else "."
        self._files = TensorFiles(folder, self._tensors, max_file_bytes=max_file_bytes, hash_tensors=hash_tensors)
        self.num_bytes = self._files.num_bytes
        self.dtype = self._tensors["model.norm.weight"].dtype

    def write(
        self,
        directory: DurableDirectory,
        *,
        workers: Workers = ALONE,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Extraction:
        """Write the files, each process its share; then `directory` knows all of them on all.

        `progress` hears bytes written and in all, of this share. Raises ValueError for a parent without a tokenizer
        where transformers wants one, WriteError where the disk refuses.
        """
        hashes = self._files.write(directory, workers, partial(self._write_documents, directory), progress)
        pieces = {name: self._submodel.pieces[canonical] for name, canonical in self._canonical.items()}
        kept = tuple(
            KeptTensor(
                name=name,
                canonical=self._canonical[name],
                source=pieces[name].source,
                rows=pieces[name].rows,
                sha256=hashes.get(name),
            )
            for name in sorted(self._tensors, key=natural_order)
        )
        return Extraction(
            format=self._format or "sigmoe",
            reason=self._reason,
            dtype=self.dtype,
            num_bytes=self.num_bytes,
            kept=kept,
        )

    def _write_documents(self, directory: DurableDirectory) -> None:
        parent, submodel = self._parent, self._submodel
        if self._format is None:
            write_documents(directory, _sigmoe_content(parent, submodel, self._tensors))
            write_carried(directory, parent)
        else:
            config, registry, rounded = submodel.config, submodel.registry, self._rounded
            write_hf_files(directory, parent, config, registry, self._format, dtype=self.dtype, rounded=rounded)


def formula_bytes(submodel: Submodel, dtype: torch.dtype) -> int:
    """Return the bytes of the weights as counted from the config: shared + sets + slots, tables and biases."""
    config, registry = submodel.config, submodel.registry
    size = count_parameters(config, registry).total * dtype.itemsize
    for experts in layer_experts(config, registry):
        if config.router.name == "rre":
            size += 4 * len(registry.domains) * config.vocab_size
        elif config.router.balance == "bias":
            size += 4 * experts
    return size


def _in_place_of(tensor: NamedTensor, other: Tensor | None) -> NamedTensor:
    if other is None:
        return tensor
    return NamedTensor(tensor.shape, tensor.dtype, partial(other.to, tensor.dtype))


def hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 (hex) of a contiguous tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _sigmoe_content(parent: StoredModel, submodel: Submodel, tensors: Mapping[str, NamedTensor]) -> CheckpointContent:
    return CheckpointContent(
        model=tensors,
        optimizer={},
        state={"step": parent.step},
        config={"model": to_mapping(submodel.config), "sequence_length": parent.sequence_length},
        registry=submodel.registry.to_json(),
        tokenizer=parent.tokenizer,
        hf_config=None,
    )
