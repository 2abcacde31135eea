"""Writes a planned submodel: one tensor in memory at a time, hashed as it was kept."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..canonical import is_parameter
from ..config import num_experts
from ..counts import count_parameters
from ..data.tokenizer import END_OF_TEXT, PADDING, parse_tokenizer, special_id
from ..hf.config import config_json, generation_config, tokenizer_config
from ..hf.formats import HFFormat, choose_format
from ..hf.names import hf_name
from ..parsing import to_mapping
from ..storage.checkpoint import CheckpointContent, encode_json, write_content
from ..storage.durable import DurableDirectory
from ..storage.tensors import NamedTensor, natural_order, write_tensors
from ..stored import StoredModel
from .plan import Piece, Submodel

_WITHOUT_LENGTH = 2048  # positions that a model claims whose maker told none


@dataclass(frozen=True, kw_only=True)
class KeptTensor:
    """A tensor as it was written: its names, where it comes from, and the SHA-256 of its bytes."""

    name: str  # on disk
    canonical: str
    source: str
    rows: tuple[int, ...] | None
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What was written: `format` (sigmoe, or transformers' model type), the reason for it, and every tensor."""

    format: str
    reason: str
    dtype: torch.dtype  # of the parameters
    num_bytes: int  # of all tensors
    kept: tuple[KeptTensor, ...]


def write_submodel(
    directory: DurableDirectory,
    parent: StoredModel,
    submodel: Submodel,
    *,
    dtype: torch.dtype | None = None,
    sigmoe_format: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Extraction:
    """Write all files of the submodel but report and manifest, in the format of transformers that fits, else sigmoe's.

    `dtype` rounds the parameters (None: as the parent has them); `sigmoe_format` asks for sigmoe's format in any case;
    `progress` hears bytes written and in all. Raises ValueError for a parent without a tokenizer, WriteError where the
    disk refuses.
    """
    choice = choose_format(submodel.config, submodel.registry)
    format = None if sigmoe_format else choice.format
    reason = "format=sigmoe asks for it" if sigmoe_format else choice.reason
    writer = _Writer(parent, submodel, format or "sigmoe", dtype, progress)
    if format is None:
        write_content(directory, _sigmoe_content(parent, submodel, writer.tensors))
    else:
        _write_hf_files(directory, parent, submodel, format, writer.dtype)
        write_tensors(directory, ".", "model", writer.tensors)
    kept = tuple(sorted(writer.kept, key=lambda tensor: natural_order(tensor.name)))
    return Extraction(
        format=format or "sigmoe", reason=reason, dtype=writer.dtype, num_bytes=writer.num_bytes, kept=kept
    )


def planned_bytes(parent: StoredModel, submodel: Submodel, dtype: torch.dtype | None) -> int:
    """Return the bytes of the tensors that `write_submodel` will write."""
    return _Writer(parent, submodel, "sigmoe", dtype, lambda done, total: None).num_bytes


def formula_bytes(submodel: Submodel, dtype: torch.dtype) -> int:
    """Return the bytes of the weights as counted from the config: shared + sets + slots, tables and biases."""
    config, registry = submodel.config, submodel.registry
    size = count_parameters(config, registry).total * dtype.itemsize
    for index in range(len(config.sparse_layer_ids)):
        if config.router.name == "rre":
            size += 4 * len(registry.domains) * config.vocab_size
        elif config.router.balance == "bias":
            size += 4 * num_experts(registry, index)
    return size


class _Writer:
    """The submodel's tensors under their names on disk, each cut from the parent and hashed when it is read."""

    def __init__(
        self,
        parent: StoredModel,
        submodel: Submodel,
        format: str,
        dtype: torch.dtype | None,
        progress: Callable[[int, int], None],
    ) -> None:
        self.kept: list[KeptTensor] = []
        self.tensors: dict[str, NamedTensor] = {}
        self._parent, self._dtype, self._progress, self._done = parent, dtype, progress, 0
        for canonical, piece in submodel.pieces.items():
            name = canonical if format == "sigmoe" else hf_name(format, canonical)
            shape = parent.tensors.shape(piece.source)
            rows = shape if piece.rows is None else (len(piece.rows), *shape[1:])
            self.tensors[name] = NamedTensor(rows, self._written_dtype(piece), self._reader(name, canonical, piece))
        self.num_bytes = sum(tensor.num_bytes for tensor in self.tensors.values())
        self.dtype = self.tensors["model.norm.weight"].dtype

    def _written_dtype(self, piece: Piece) -> torch.dtype:
        stored = self._parent.tensors.dtype(piece.source)
        return self._dtype if self._dtype is not None and is_parameter(piece.source) else stored

    def _reader(self, name: str, canonical: str, piece: Piece) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor = self._parent.tensors.read(piece.source)
            if piece.rows is not None:
                tensor = tensor[list(piece.rows)]
            tensor = _rounded(tensor, self._written_dtype(piece), piece.source)
            self.kept.append(
                KeptTensor(
                    name=name,
                    canonical=canonical,
                    source=piece.source,
                    rows=piece.rows,
                    sha256=hash_tensor(tensor),
                )
            )
            self._done += tensor.nbytes
            self._progress(self._done, self.num_bytes)
            return tensor

        return read


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = tensor.to(dtype)
    # fp16 ends at 65504; of the other formats none has a narrower range than fp32.
    if dtype == torch.float16 != tensor.dtype and bool(rounded.isinf().any()) and not bool(tensor.isinf().any()):
        raise ValueError(f"{name} holds numbers beyond the range of fp16: choose dtype=bf16")
    return rounded


def hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 (hex) of a contiguous tensor's bytes."""
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


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


def _write_hf_files(
    directory: DurableDirectory, parent: StoredModel, submodel: Submodel, format: HFFormat, dtype: torch.dtype
) -> None:
    if parent.tokenizer is None:
        raise ValueError(f"{parent.path} has no tokenizer.json, which transformers wants: give format=sigmoe")
    tokenizer = parse_tokenizer(parent.tokenizer, f"{parent.path}/tokenizer.json")
    special = {"end_of_text": special_id(tokenizer, END_OF_TEXT), "padding": special_id(tokenizer, PADDING)}
    length = parent.sequence_length or _WITHOUT_LENGTH
    config = config_json(
        format,
        submodel.config,
        submodel.registry,
        sequence_length=length,
        dtype=str(dtype).removeprefix("torch."),
        **special,
    )
    directory.write("config.json", encode_json(config))
    directory.write("generation_config.json", encode_json(generation_config(**special)))
    directory.write("tokenizer.json", parent.tokenizer)
    directory.write("tokenizer_config.json", encode_json(tokenizer_config(length)))
