"""Expert-sorted row order in plain Python, and the shape of the answer.

Shape letters: B sequences, S positions, T tokens (B*S), K top-k, E experts, R kept rows, N as many or more.
"""

from typing import NamedTuple

import torch


class Positions(NamedTuple):
    """The order of routed (token, choice) pairs sorted by expert; pairs over capacity have no row."""

    row_TK: torch.Tensor
    """int64: row of each pair, -1 if it was dropped."""
    source_N: torch.Tensor
    """int64: the pair of each row, as `t * K + k`; what comes after row `count_E.sum()`, if anything, means nothing."""
    count_E: torch.Tensor
    """int64: rows of each expert."""
    has_tail: bool = False
    """Whether more than the rows may be in source_N."""

    @property
    def source_R(self) -> torch.Tensor:
        """The pairs of the rows alone; with a tail the host waits to hear how many there are."""
        return self.source_N[: int(self.count_E.sum())] if self.has_tail else self.source_N


def positions_reference(
    expert_BSK: torch.Tensor, num_experts: int, *, capacity_B: torch.Tensor | None = None
) -> Positions:
    """Pair by pair: sequence by sequence in token order, each expert's queue takes what its capacity allows."""
    B, S, K = expert_BSK.shape
    queues: list[list[int]] = [[] for _ in range(num_experts)]
    for b in range(B):
        room = [S * K if capacity_B is None else int(capacity_B[b])] * num_experts
        for pair, expert in enumerate(expert_BSK[b].flatten().tolist(), start=b * S * K):
            if room[expert] > 0:
                room[expert] -= 1
                queues[expert].append(pair)
    source = [pair for queue in queues for pair in queue]
    row = [-1] * (B * S * K)
    for place, pair in enumerate(source):
        row[pair] = place
    return Positions(
        torch.tensor(row, dtype=torch.int64).view(B * S, K),
        torch.tensor(source, dtype=torch.int64),
        torch.tensor([len(queue) for queue in queues], dtype=torch.int64),
    )
