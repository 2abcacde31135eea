"""Proves a written submodel: every tensor's hash read back, and its logits against the parent's, bit for bit.

Shape letters: B sequences, S positions, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..paired import paired_logits
from ..stored import StoredModel
from ..streaming import StreamedModel
from ..workers import ALONE, Workers
from .write import Extraction, hash_tensor


@dataclass(frozen=True, kw_only=True)
class DomainCheck:
    """How a submodel's logits compare with its parent's on a domain's held-out text; 0 is equality of all bits."""

    domain: str
    tokens: int
    max_abs_difference: float


def verify_tensors(child: StoredModel, extraction: Extraction, workers: Workers = ALONE) -> None:
    """Read every tensor back, each process its share; ValueError names one that is not what was kept of the parent."""
    with workers.together():
        for tensor in extraction.kept[workers.rank :: workers.size]:
            if hash_tensor(child.tensors.read(tensor.canonical)) != tensor.sha256:
                at_fault = "does not read back as it was written: the disk is at fault"
                raise ValueError(f"{child.path}: {tensor.name} {at_fault}")


def verify_domain(
    parent: StoredModel,
    child: StoredModel,
    dataset: Dataset,
    domain: str,
    *,
    max_tokens: int,
    rounding: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DomainCheck:
    """Compare the logits of both on the same batches of at the most `max_tokens` held-out tokens of `domain`.

    Both run layer by layer in fp32 (`rounding`: the parent's parameters are rounded first, as the child's were).
    `progress` hears layers passed and in all.
    """
    parent_id = parent.registry.id_of(domain)
    child_id = child.registry.names.index(domain) if domain in child.registry.names else 0
    whole = StreamedModel(parent, domains=[parent_id], rounding=rounding)
    part = StreamedModel(child, domains=[child_id])
    tokens = min(max_tokens, dataset.domain(domain).heldout.num_tokens)
    difference = 0.0
    pairs = paired_logits(
        parent, (whole, part), (parent_id, child_id), dataset, domain, max_tokens=tokens, progress=progress
    )
    for _, ours_BSV, theirs_BSV in pairs:
        difference = max(difference, max_difference(ours_BSV, theirs_BSV))
    return DomainCheck(domain=domain, tokens=tokens, max_abs_difference=difference)


def max_difference(a: Tensor, b: Tensor) -> float:
    """Return max |a - b|: 0.0 only where all numbers are equal and none is NaN; infinite where one is NaN."""
    if torch.equal(a, b):
        return 0.0
    difference = float((a.double() - b.double()).abs().max())
    return math.inf if math.isnan(difference) else difference
