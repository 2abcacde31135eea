"""Embedding, head and cross-entropy over a vocabulary that is cut over tensor ranks.

Every rank has ceil(V / tp) rows; those beyond the vocabulary (on the last ranks) are held and never used, so that their
gradient is zero.

Shape letters: B sequences, S positions, T tokens, D model width, V vocabulary, N tokens of a chunk.
"""

from torch import Tensor, distributed
from torch.nn import functional

from ..kernels.backend import Backend
from ..kernels.linear import linear
from ..kernels.linear_cross_entropy import linear_cross_entropy
from .collectives import all_reduce, gather_columns
from .megatron import copy, reduce
from .mesh import Axis


class VocabularyParallel:
    """See `moe.vocabulary.Vocabulary`. It is the `ColumnShard` of the head as well."""

    def __init__(self, axis: Axis, vocab_size: int, backend: Backend = "torch") -> None:
        self.axis, self.vocab_size, self.backend = axis, vocab_size, backend
        self.num_columns = -(-vocab_size // axis.size)
        self.first = min(axis.rank * self.num_columns, vocab_size)
        self.num_real = min(self.num_columns, vocab_size - self.first)

    def embed(self, token_BS: Tensor, weight_VD: Tensor) -> Tensor:
        """Look up what is here, zeros for the rest, and add up."""
        row_BS = token_BS - self.first
        elsewhere_BS = (row_BS < 0) | (row_BS >= self.num_real)
        x_BSD = functional.embedding(row_BS.masked_fill(elsewhere_BS, 0), weight_VD)
        return reduce(x_BSD.masked_fill(elsewhere_BS.unsqueeze(-1), 0), self.axis)

    def logits(self, x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        """Score with the rows here, gather everyone's, cut the padding off."""
        return gather_columns(linear(copy(x_BSD, self.axis), weight_VD), self.axis)[..., : self.vocab_size]

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce maxima, sums of exponentials and labels' logits, a chunk of tokens at a time."""
        here_VD = weight_VD[: self.num_real]
        return linear_cross_entropy(copy(x_TD, self.axis), here_VD, label_T, shard=self, backend=self.backend)

    def maximum(self, x_N: Tensor) -> Tensor:
        """See `ColumnShard`."""
        return all_reduce(x_N, self.axis, distributed.ReduceOp.MAX)

    def total(self, x_N: Tensor) -> Tensor:
        """See `ColumnShard`."""
        return all_reduce(x_N, self.axis)
