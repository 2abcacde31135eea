"""Batches for training, a pure function of (seed, sample index), and for evaluation, in the order of the file.

Shape letters: B sequences, S positions.
"""

from collections.abc import Iterator

import numpy as np
import torch

from ..batch import IGNORED, Batch
from .dataset import Dataset
from .packing import DomainStream, Rows, file_order, pack
from .sampling import Sampler


class BatchLoader:
    """Packs the documents of a dataset into batches of sequences of `sequence_length` tokens, one domain a sequence."""

    def __init__(self, dataset: Dataset, sampler: Sampler, sequence_length: int, seed: int) -> None:
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
        if sampler.domains != dataset.domain_names:
            raise ValueError(f"the sampler's domains {sampler.domains} are not the dataset's {dataset.domain_names}")
        self.dataset = dataset
        self.sampler = sampler
        self.sequence_length = sequence_length
        self._streams = [DomainStream(dataset.domain(name).train, seed, name) for name in dataset.domain_names]

    def batch(self, indices: range) -> Batch:
        """Return the batch of the global samples `indices` (any consecutive range; no state is kept)."""
        domain_B, ordinal_B = self.sampler.locate(indices)
        arrays = _empty_rows(len(indices), self.sequence_length)
        for row, (domain, ordinal) in enumerate(zip(domain_B.tolist(), ordinal_B.tolist())):
            self._streams[domain].fill(ordinal, Rows(*(array[row] for array in arrays)))
        return _to_batch(arrays, domain_B, np.arange(indices.start, indices.stop))

    def tokens_seen(self, consumed_samples: int) -> dict[str, int]:
        """Return the training tokens of each domain in the first `consumed_samples` samples."""
        counts = self.sampler.counts(consumed_samples)
        return {name: count * self.sequence_length for name, count in counts.items()}

    def epochs(self, consumed_samples: int) -> dict[str, float]:
        """Return how often each domain's training split has been read after `consumed_samples` samples."""
        seen = self.tokens_seen(consumed_samples)
        return {name: tokens / self.dataset.domain(name).train.num_tokens for name, tokens in seen.items()}


def heldout_batches(
    dataset: Dataset, domain: str, *, batch_size: int, sequence_length: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Yield the held-out documents of `domain` in the order of the file, each token once; all batches are full.

    With `max_tokens` only the first so many tokens of the split are read. What is left of the last batch is
    padding: padding ids, IGNORED labels, `start_BS` where the padding begins. `sample_B` counts sequences from 0.
    """
    documents, size = dataset.domain(domain).heldout, sequence_length
    order = file_order(documents)
    limit = documents.num_tokens if max_tokens is None else min(max_tokens, documents.num_tokens)
    sequences = -(-limit // size)
    for first in range(0, sequences, batch_size):
        arrays = _empty_rows(batch_size, size)
        for row in range(batch_size):
            rows, begin = Rows(*(array[row] for array in arrays)), (first + row) * size
            count = min(pack(documents, order, begin, rows), limit - begin) if begin < limit else 0
            rows.token_S[count:] = dataset.padding
            rows.label_S[count:] = IGNORED
            rows.start_S[count:] = count
        domain_B = np.full(batch_size, dataset.domain(domain).id, np.int64)
        yield _to_batch(arrays, domain_B, np.arange(first, first + batch_size))


def _empty_rows(batch_size: int, size: int) -> Rows:
    return Rows(*(np.empty((batch_size, size), np.int64) for _ in Rows._fields))


def _to_batch(rows: Rows, domain_B: np.ndarray, sample_B: np.ndarray) -> Batch:
    return Batch(
        token_BS=torch.from_numpy(rows.token_S),
        label_BS=torch.from_numpy(rows.label_S),
        start_BS=torch.from_numpy(rows.start_S),
        domain_B=torch.from_numpy(domain_B),
        sample_B=torch.from_numpy(sample_B.astype(np.int64)),
    )
