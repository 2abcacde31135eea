"""One batch of packed documents.

Shape letters: B sequences, S positions.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed sequences, one domain each; documents inside a sequence are bounded by `start_BS`."""

    token_BS: Tensor  # int64 token ids
    label_BS: Tensor  # int64, the next token of the same document, else IGNORED
    start_BS: Tensor  # int64, first position (in this sequence) of the token's document
    domain_B: Tensor  # int64 domain ids
    sample_B: Tensor  # int64 global sample index: the key of a sequence's random draws

    def rows(self, begin: int, end: int) -> "Batch":
        """Return the micro-batch of sequences `begin` to `end` (views)."""
        return Batch(**{field.name: getattr(self, field.name)[begin:end] for field in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @property
    def num_labels(self) -> int:
        """Number of labelled tokens."""
        return int((self.label_BS != IGNORED).sum())
