"""The products over the vocabulary: the one seam where splitting it over processes enters.

Shape letters: B sequences, S positions, T tokens (B*S), D model width, V vocabulary.
"""

from typing import Protocol

from torch import Tensor
from torch.nn import functional

from ..kernels.backend import Backend
from ..kernels.linear import linear
from ..kernels.linear_cross_entropy import linear_cross_entropy


class Vocabulary(Protocol):
    """Looks tokens up and scores next tokens, by embedding or head weights `[V, D]` of this process."""

    backend: Backend
    """What computes the cross-entropy."""

    def embed(self, token_BS: Tensor, weight_VD: Tensor) -> Tensor:
        """Return `[B, S, D]`."""
        ...

    def logits(self, x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        """Return `[B, S, V]`, the whole vocabulary."""
        ...

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss summed over labelled tokens (differentiable), and token by token (detached)."""
        ...


class LocalVocabulary:
    """The whole vocabulary is here. `backend` computes its cross-entropy."""

    def __init__(self, backend: Backend = "torch") -> None:
        self.backend = backend

    def embed(self, token_BS: Tensor, weight_VD: Tensor) -> Tensor:
        """Look up; see `Vocabulary`."""
        return functional.embedding(token_BS, weight_VD)

    def logits(self, x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        """One product; see `Vocabulary`."""
        return linear(x_BSD, weight_VD)

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
        """Product and cross-entropy in one operation; see `Vocabulary`."""
        return linear_cross_entropy(x_TD, weight_VD, label_T, backend=self.backend)
