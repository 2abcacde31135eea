"""Softmax over logits of which some columns are here and the rest with others.

Shape letters: N tokens of a chunk, V columns held here.
"""

from typing import Protocol

import torch

_IGNORED = -100


class ColumnShard(Protocol):
    """Which rows of the head (columns of the logits) are here, and how to reduce over all who hold some.

    All holders call the reductions in the same order, with tensors of the same shape.
    """

    first: int
    """The vocabulary's id of the first row here."""
    num_columns: int
    """The most that any holder has: all cut the tokens into the same chunks."""

    def maximum(self, x_N: torch.Tensor) -> torch.Tensor:
        """Return the elementwise maximum over the holders."""
        ...

    def total(self, x_N: torch.Tensor) -> torch.Tensor:
        """Return the sum over the holders."""
        ...


def sharded_softmax(
    logits_NV: torch.Tensor, column_N: torch.Tensor, shard: ColumnShard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities of the columns here (in place of the logits), logsumexp over all columns and the label's logit.

    column_N: the label's column, -100 where it is not here; no holder has it where there is no label (logit 0).
    """
    chosen_N = logits_NV.gather(1, column_N.clamp(min=0)[:, None])[:, 0].where(column_N != _IGNORED, 0.0)
    largest_N = shard.maximum(logits_NV.amax(-1))
    exponential_NV = logits_NV.sub_(largest_N[:, None]).exp_()
    sum_N, chosen_N = shard.total(torch.stack((exponential_NV.sum(-1), chosen_N))).unbind()
    return exponential_NV.div_(sum_N[:, None]), largest_N + sum_N.log(), chosen_N


def columns(label_N: torch.Tensor, num_columns: int, shard: ColumnShard | None) -> torch.Tensor:
    """Return each label's column among the `num_columns` here, -100 where it has none."""
    if shard is None:
        return label_N
    column_N = label_N - shard.first
    return column_N.where((column_N >= 0) & (column_N < num_columns) & (label_N != _IGNORED), _IGNORED)
