"""Writes a sparse model that begins as its dense parent: a tensor is made when it is written, of two at a time.

Shape letters: V vocabulary.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .canonical import expected_shapes, is_parameter
from .config import ModelConfig
from .domains import DomainRegistry
from .extract.write import Extraction, KeptTensor
from .hf.files import write_carried
from .inherit_plan import inherited_sources
from .initialize import initial_value
from .parsing import to_mapping
from .route_table import build_route_row
from .storage.checkpoint import CheckpointContent, write_documents
from .storage.durable import DurableDirectory
from .storage.shared import TensorFiles
from .storage.tensors import MAX_FILE_BYTES, NamedTensor, natural_order
from .stored import StoredModel
from .workers import ALONE, Workers

_TABLE = re.compile(r"^model\.layers\.(\d+)\.block_sparse_moe\.gate\.route_table$")
_DRAWN = "drawn"  # where a tensor comes from that no parent has


@dataclass(frozen=True, kw_only=True)
class Inheritance:
    """A sparse model and the dense one that it inherits from.

    `counts` are each domain's token counts (int64, at the most `[V]`), for route tables alone; `tokenizer` is what the
    new model's ids mean (tokenizer.json).
    """

    parent: StoredModel
    config: ModelConfig
    registry: DomainRegistry
    counts: Mapping[str, Tensor]
    tokenizer: bytes | None
    seed: int


class InheritanceWriter:
    """Writes all files of the sparse model, in sigmoe's format, but report and manifest."""

    def __init__(self, plan: Inheritance, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._plan, self._tensors = plan, _inherited_tensors(plan)
        self._files = TensorFiles("model", self._tensors, max_file_bytes=max_file_bytes)
        self.num_bytes = self._files.num_bytes

    def write(
        self,
        directory: DurableDirectory,
        *,
        workers: Workers = ALONE,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Extraction:
        """Write the files as `SubmodelWriter.write` does."""
        hashes = self._files.write(directory, workers, partial(self._write_documents, directory), progress)
        sources = inherited_sources(self._plan.config, self._plan.registry)
        kept = tuple(
            KeptTensor(name=name, canonical=name, source=sources[name] or _DRAWN, rows=None, sha256=hashes[name])
            for name in sorted(self._tensors, key=natural_order)
        )
        return Extraction(
            format="sigmoe",
            reason="every expert is a copy of its layer's FFN",
            dtype=self._tensors["model.norm.weight"].dtype,
            num_bytes=self.num_bytes,
            kept=kept,
        )

    def _write_documents(self, directory: DurableDirectory) -> None:
        plan = self._plan
        content = CheckpointContent(
            model=self._tensors,
            optimizer={},
            state={"step": None},
            config={"model": to_mapping(plan.config), "sequence_length": plan.parent.sequence_length},
            registry=plan.registry.to_json(),
            tokenizer=plan.tokenizer,
            hf_config=None,
        )
        write_documents(directory, content)
        if plan.tokenizer == plan.parent.tokenizer:  # else the parent's files say too little of the vocabulary
            write_carried(directory, plan.parent)


def _inherited_tensors(plan: Inheritance) -> dict[str, NamedTensor]:
    """Return the sparse model's tensors, each made when it is read.

    Copies have the parent's dtype, new parameters that of its final norm.
    """
    stored, shapes = plan.parent.tensors, expected_shapes(plan.config, plan.registry)

    def drawn(name: str) -> Tensor:
        return initial_value(plan.config, name, shapes[name], plan.seed)

    def made(name: str, source: str | None) -> NamedTensor:
        if _TABLE.match(name):
            return NamedTensor(shapes[name], torch.int32, lambda: _table(plan, name))
        if source is None:
            kind = stored.dtype("model.norm.weight") if is_parameter(name) else torch.float32
            return NamedTensor(shapes[name], kind, lambda: drawn(name).to(kind))
        rows, kind = stored.shape(source)[0], stored.dtype(source)
        if rows == shapes[name][0]:
            return NamedTensor(shapes[name], kind, partial(stored.read, source), partial(stored.pieces, source))
        return NamedTensor(shapes[name], kind, lambda: torch.cat([stored.read(source), drawn(name)[rows:].to(kind)]))

    return {name: made(name, source) for name, source in inherited_sources(plan.config, plan.registry).items()}


def _table(plan: Inheritance, name: str) -> Tensor:
    """Build a layer's route table, int32 `[domains, V]`."""
    match, size = _TABLE.match(name), plan.config.vocab_size
    assert match is not None
    layer = int(match[1])
    sets = plan.registry.sets(plan.config.sparse_layer_ids.index(layer))
    rows = []
    for domain, experts in zip(plan.registry.names, sets):
        count_V = torch.nn.functional.pad(plan.counts[domain], (0, size - len(plan.counts[domain])))
        rows.append(build_route_row(count_V, len(experts), plan.seed, layer, domain))
    return torch.stack(rows)
