"""Proves a written submodel: every tensor's hash read back, and its logits against the parent's, bit for bit.

Shape letters: B sequences, S positions, D model width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..data.dataset import Dataset
from ..data.loader import heldout_batches
from ..stored import StoredModel
from ..streaming import StreamedModel
from .write import Extraction, hash_tensor

# Of one batch. What is much larger malloc hands back and page faults take again: 64 MB cost 1.35x the time of 16.
_LOGITS_BYTES = 16 << 20
_HIDDEN_BYTES = 384 << 20  # of the batches that pass the layers together: both models' hidden states, one's routed rows
_LONGEST = 512  # positions


@dataclass(frozen=True, kw_only=True)
class DomainCheck:
    """How a submodel's logits compare with its parent's on a domain's held-out text; 0 is equality of all bits."""

    domain: str
    tokens: int
    max_abs_difference: float


def verify_tensors(child: StoredModel, extraction: Extraction) -> None:
    """Read every tensor back; ValueError names one that is not what was kept of the parent."""
    for tensor in extraction.kept:
        if hash_tensor(child.tensors.read(tensor.canonical)) != tensor.sha256:
            raise ValueError(f"{child.path}: {tensor.name} does not read back as it was written: the disk is at fault")


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
    sizes = _sizes(parent, tokens)
    passed, total = 0, 2 * sizes.groups * parent.config.num_layers

    def on_layer() -> None:
        nonlocal passed
        passed += 1
        progress(passed, total)

    difference = 0.0
    for batches in _groups(dataset, domain, sizes, tokens):
        # Both through their layers before either's head is read: no more than the two heads are in memory together.
        ours = whole.run_layers([_of_domain(batch, parent_id) for batch in batches], on_layer)
        theirs = part.run_layers([_of_domain(batch, child_id) for batch in batches], on_layer)
        for logits_BSV in zip(whole.run_head(ours), part.run_head(theirs), strict=True):
            difference = max(difference, max_difference(*logits_BSV))
    return DomainCheck(domain=domain, tokens=tokens, max_abs_difference=difference)


def max_difference(a: Tensor, b: Tensor) -> float:
    """Return max |a - b|: 0.0 only where all numbers are equal and none is NaN; infinite where one is NaN."""
    if torch.equal(a, b):
        return 0.0
    difference = float((a.double() - b.double()).abs().max())
    return math.inf if math.isnan(difference) else difference


class _Sizes(NamedTuple):
    """How held-out text is cut up so that logits and hidden states stay small."""

    length: int  # S
    batch: int  # B
    together: int  # batches that pass the layers together
    groups: int  # of so many batches


def _sizes(parent: StoredModel, tokens: int) -> _Sizes:
    length = min(parent.sequence_length or _LONGEST, _LONGEST)
    batch = max(1, min(64, -(-tokens // length), _LOGITS_BYTES // (4 * length * parent.config.vocab_size)))
    together = max(1, _HIDDEN_BYTES // (4 * length * parent.config.dim * batch * (2 + parent.config.router.top_k)))
    return _Sizes(length, batch, together, -(-tokens // (length * batch * together)))


def _groups(dataset: Dataset, domain: str, sizes: _Sizes, tokens: int) -> Iterator[list[Batch]]:
    """Yield lists of batches that fit in memory together."""
    batches = heldout_batches(dataset, domain, batch_size=sizes.batch, sequence_length=sizes.length, max_tokens=tokens)
    while together := list(islice(batches, sizes.together)):
        yield together


def _of_domain(batch: Batch, id: int) -> Batch:
    return replace(batch, domain_B=torch.full_like(batch.domain_B, id))
