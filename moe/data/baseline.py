"""What a model that knows nothing but token frequencies reaches: the baseline of the closing table."""

import math

import numpy as np
from numpy.typing import NDArray

from .dataset import Dataset

_CHUNK = 1 << 22


def unigram_bits_per_byte(dataset: Dataset, domain: str, max_tokens: int | None = None) -> float:
    """Return the held-out cross-entropy of `domain` in bits per byte under its add-one smoothed unigram model.

    The model is p(v) = (n_v + 1) / (n + V), counted over the domain's training tokens. The convention is that of
    evaluation, over the very same tokens: the loss is summed over labelled tokens, which is every token of a document
    but its first (so the end-of-text token counts, with 0 bytes), and divided by the UTF-8 bytes that exactly those
    tokens stand for (NaN where those are none). `max_tokens` as in `heldout_batches`.
    """
    count_V = dataset.token_counts(domain).numpy().astype(np.float64)
    bits_V = math.log2(count_V.sum() + len(count_V)) - np.log2(count_V + 1)
    label_V = heldout_label_counts(dataset, domain, max_tokens)
    num_bytes = int((label_V * dataset.token_bytes()).sum())
    return float((label_V * bits_V).sum()) / num_bytes if num_bytes else math.nan


def heldout_label_counts(dataset: Dataset, domain: str, max_tokens: int | None = None) -> NDArray[np.int64]:
    """Return how often each id is a label in the held-out documents of `domain`, int64 `[V]`."""
    documents = dataset.domain(domain).heldout
    # The label of position p is the token at p + 1, so a limit of n positions reads labels up to position n.
    stop = documents.num_tokens if max_tokens is None else min(max_tokens + 1, documents.num_tokens)
    label_V = np.zeros(dataset.vocab_size, np.int64)
    for start in range(0, stop, _CHUNK):
        label_V += np.bincount(documents.tokens[start : min(start + _CHUNK, stop)], minlength=dataset.vocab_size)
    first = documents.starts(np.arange(documents.num_documents))
    label_V -= np.bincount(documents.tokens[first[first < stop]], minlength=dataset.vocab_size)
    return label_V
