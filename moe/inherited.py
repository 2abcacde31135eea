"""Writes a sparse model that begins as its dense parent: one tensor in memory at a time, made when it is written.

Shape letters: V vocabulary.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .canonical import expected_shapes, is_parameter
from .config import ModelConfig
from .domains import DomainRegistry
from .extract.write import Extraction, KeptTensor, hash_tensor
from .hf.files import write_carried
from .inherit import plan_inheritance
from .initialize import initial_value
from .parsing import to_mapping
from .route_table import build_route_row
from .storage.checkpoint import CheckpointContent, write_content
from .storage.durable import DurableDirectory
from .storage.tensors import NamedTensor, natural_order
from .stored import StoredModel

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


def write_inherited(
    directory: DurableDirectory, plan: Inheritance, progress: Callable[[int, int], None] = lambda done, total: None
) -> Extraction:
    """Write all files of the sparse model, in sigmoe's format, but report and manifest; `progress` hears bytes."""
    parent, kept, done = plan.parent, list[KeptTensor](), 0
    made, sources = inherited_tensors(plan), plan_inheritance(plan.config, plan.registry)
    total = sum(tensor.num_bytes for tensor in made.values())

    def hashed(name: str, tensor: NamedTensor) -> NamedTensor:
        def read() -> Tensor:
            nonlocal done
            value, source = tensor.read(), sources[name] or _DRAWN
            kept.append(
                KeptTensor(name=name, canonical=name, source=source, rows=None, sha256=hash_tensor(value.contiguous()))
            )
            done += value.nbytes
            progress(done, total)
            return value

        return NamedTensor(tensor.shape, tensor.dtype, read)

    content = CheckpointContent(
        model={name: hashed(name, tensor) for name, tensor in made.items()},
        optimizer={},
        state={"step": None},
        config={"model": to_mapping(plan.config), "sequence_length": parent.sequence_length},
        registry=plan.registry.to_json(),
        tokenizer=plan.tokenizer,
        hf_config=None,
    )
    write_content(directory, content)
    if plan.tokenizer == parent.tokenizer:  # else the parent's files say too little of the vocabulary
        write_carried(directory, parent)
    return Extraction(
        format="sigmoe",
        reason="it begins as its dense parent",
        dtype=made["model.norm.weight"].dtype,
        num_bytes=total,
        kept=tuple(sorted(kept, key=lambda tensor: natural_order(tensor.name))),
    )


def inherited_tensors(plan: Inheritance) -> dict[str, NamedTensor]:
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

        def copied() -> Tensor:
            tensor = stored.read(source)
            return tensor if rows == shapes[name][0] else torch.cat([tensor, drawn(name)[rows:].to(kind)])

        return NamedTensor(shapes[name], kind, copied)

    return {name: made(name, source) for name, source in plan_inheritance(plan.config, plan.registry).items()}


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
