"""Documents packed into sequences: the ordinal-th sequence of a domain is a pure function of (seed, domain, ordinal).

A domain is read as the endless concatenation of its documents, in a new keyed order every epoch, without replacement
inside an epoch. Sequence number n holds tokens [n*S, (n+1)*S) of it.

Shape letters: S positions, N documents.
"""

from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..batch import IGNORED
from ..keyed import keyed_permutation
from .indexed import IndexedDocuments

Ints = NDArray[np.int64]


class Rows(NamedTuple):
    """One sequence to be filled, int64 `[S]` each."""

    token_S: Ints
    label_S: Ints
    start_S: Ints


class Documents(Protocol):
    """Token ids of documents: `tokens` end to end, `lengths` `[N]`."""

    @property
    def tokens(self) -> NDArray[np.integer]:
        """Ids."""

    @property
    def lengths(self) -> NDArray[Any]:
        """Tokens of each document."""

    @property
    def num_documents(self) -> int:
        """N."""

    @property
    def num_tokens(self) -> int:
        """The sum of the lengths."""

    def starts(self, documents: NDArray[np.int64], /) -> NDArray[np.int64]:
        """Return where the documents begin in `tokens`."""


class Order(NamedTuple):
    """Documents in reading order, int64 `[N]`, and the position after each one's last token, int64 `[N]`."""

    document_N: Ints
    end_N: Ints


def file_order(documents: Documents) -> Order:
    """Return the order of the file itself."""
    return Order(np.arange(documents.num_documents), np.cumsum(documents.lengths, dtype=np.int64))


def epoch_order(documents: Documents, seed: int, domain: str, epoch: int) -> Order:
    """Return the keyed order of one epoch."""
    permutation = keyed_permutation(documents.num_documents, "documents", seed, domain, epoch)
    return Order(permutation, np.cumsum(documents.lengths[permutation], dtype=np.int64))


def pack(documents: Documents, order: Order, begin: int, rows: Rows) -> int:
    """Fill `rows` with the tokens of `order` from position `begin` on; return how many were there to be filled in.

    A token's label is the next token of the same document, IGNORED for a document's last token; its start is the first
    position in these rows of its document (0 where the document began before).
    """
    stop = min(begin + len(rows.token_S), int(order.end_N[-1]))
    first = int(np.searchsorted(order.end_N, begin, side="right"))
    last = int(np.searchsorted(order.end_N, stop, side="left"))
    document, end = order.document_N[first : last + 1], order.end_N[first : last + 1]
    length = documents.lengths[document]
    skipped = np.maximum(begin - (end - length), 0)
    source = documents.starts(document) + skipped
    target_end = np.minimum(end, stop) - begin
    target = np.concatenate([[0], target_end[:-1]])
    kept = target_end - target
    count = stop - begin
    index = np.arange(count) + np.repeat(source - target, kept)
    rows.token_S[:count] = documents.tokens[index]
    rows.start_S[:count] = np.repeat(target, kept)
    rows.label_S[: count - 1] = rows.token_S[1:count]
    rows.label_S[target_end - 1] = IGNORED
    if end[-1] > stop:
        rows.label_S[count - 1] = documents.tokens[index[-1] + 1]
    return count


class DomainStream:
    """The endless packed stream of one domain. Keeps the order of the last few epochs: 16 bytes a document each."""

    def __init__(self, documents: IndexedDocuments, seed: int, domain: str) -> None:
        self.documents = documents
        self._seed = seed
        self._domain = domain
        self._orders: OrderedDict[int, Order] = OrderedDict()

    def fill(self, ordinal: int, rows: Rows) -> None:
        """Fill `rows` with the domain's sequence number `ordinal`; it may span epochs."""
        size, total = len(rows.token_S), self.documents.num_tokens
        done = 0
        while done < size:
            epoch, begin = divmod(ordinal * size + done, total)
            part = Rows(rows.token_S[done:], rows.label_S[done:], rows.start_S[done:])
            count = pack(self.documents, self._order(epoch), begin, part)
            part.start_S[:count] += done
            done += count

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            self._orders[epoch] = epoch_order(self.documents, self._seed, self._domain, epoch)
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]
