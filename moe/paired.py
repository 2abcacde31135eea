"""Two models on the same held-out text, side by side: both run layer by layer, so neither need fit in memory.

Shape letters: B sequences, S positions, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .data.dataset import Dataset
from .data.loader import heldout_batches
from .stored import StoredModel
from .streaming import StreamedModel

# Of one batch. What is much larger malloc hands back and page faults take again: 64 MB cost 1.35x the time of 16.
_LOGITS_BYTES = 16 << 20
_HIDDEN_BYTES = 384 << 20  # of the batches that pass the layers together: both models' hidden states, one's routed rows
_LONGEST = 512  # positions


class Pair(NamedTuple):
    """A batch, and what both models say of it, fp32 `[B, S, V]`; behind the text lies padding with IGNORED labels."""

    batch: Batch
    first_BSV: Tensor
    second_BSV: Tensor


def paired_logits(
    stored: StoredModel,
    models: tuple[StreamedModel, StreamedModel],
    ids: tuple[int, int],
    dataset: Dataset,
    domain: str,
    *,
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Pair]:
    """Yield the logits of both on at the most `max_tokens` held-out tokens of `domain`, which they know by `ids`.

    The batches are sized for `stored`, the larger of the two. `progress` hears layers passed and in all.
    """
    sizes = _sizes(stored, min(max_tokens, dataset.domain(domain).heldout.num_tokens))
    passed, total = 0, 2 * sizes.groups * stored.config.num_layers

    def on_layer() -> None:
        nonlocal passed
        passed += 1
        progress(passed, total)

    for batches in _groups(dataset, domain, sizes, max_tokens):
        # Both through their layers before either's head is read: no more than the two heads are in memory together.
        first, second = (
            model.run_layers([_of_domain(batch, id) for batch in batches], on_layer) for model, id in zip(models, ids)
        )
        yield from map(Pair, batches, models[0].run_head(first), models[1].run_head(second))


class _Sizes(NamedTuple):
    """How held-out text is cut up so that logits and hidden states stay small."""

    length: int  # S
    batch: int  # B
    together: int  # batches that pass the layers together
    groups: int  # of so many batches


def _sizes(stored: StoredModel, tokens: int) -> _Sizes:
    length = min(stored.sequence_length or _LONGEST, _LONGEST)
    batch = max(1, min(64, -(-tokens // length), _LOGITS_BYTES // (4 * length * stored.config.vocab_size)))
    together = max(1, _HIDDEN_BYTES // (4 * length * stored.config.dim * batch * (2 + stored.config.router.top_k)))
    return _Sizes(length, batch, together, -(-tokens // (length * batch * together)))


def _groups(dataset: Dataset, domain: str, sizes: _Sizes, tokens: int) -> Iterator[list[Batch]]:
    """Yield lists of batches that fit in memory together."""
    batches = heldout_batches(dataset, domain, batch_size=sizes.batch, sequence_length=sizes.length, max_tokens=tokens)
    while together := list(islice(batches, sizes.together)):
        yield together


def _of_domain(batch: Batch, id: int) -> Batch:
    return replace(batch, domain_B=torch.full_like(batch.domain_B, id))
