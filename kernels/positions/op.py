"""Expert-sorted row order by one stable sort of integers: a pure function of its input, the same bits every run.

Shape letters: B sequences, S positions, T tokens (B*S), K top-k, N routed pairs (T*K), E experts, R kept rows.
"""

import torch

from ..backend import Backend
from .reference import Positions


def positions(
    expert_BSK: torch.Tensor,
    num_experts: int,
    *,
    capacity_B: torch.Tensor | None = None,
    backend: Backend = "torch",
) -> Positions:
    """Sort routed pairs by expert; rows of one expert stay in (token, choice) order.

    expert_BSK int64 [B, S, K] in 0..num_experts-1; capacity_B int64 [B]: an expert takes at most capacity_B[b] pairs of
    sequence b, in token order, and the rest is dropped (row -1). Without capacity nothing is dropped and R = T*K.
    With Triton the host does not wait: source_N is as long as all pairs, and under capacity has a tail. Raises
    ValueError for more than 16384 experts with Triton.
    """
    if backend == "triton":
        return _triton_positions(expert_BSK, num_experts, capacity_B)
    B, S, K = expert_BSK.shape
    expert_N = expert_BSK.reshape(-1)
    sorted_N, source_R = torch.sort(expert_N, stable=True)
    if capacity_B is not None:
        kept_N = _within_capacity(sorted_N, source_R // (S * K) if S * K else source_R, capacity_B)
        sorted_N, source_R = sorted_N[kept_N], source_R[kept_N]
    bounds = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, device=sorted_N.device))
    row_N = torch.full_like(expert_N, -1)
    row_N[source_R] = torch.arange(source_R.numel(), device=source_R.device)
    return Positions(row_N.view(B * S, K), source_R, bounds.diff())


def _triton_positions(expert_BSK: torch.Tensor, num_experts: int, capacity_B: torch.Tensor | None) -> Positions:
    from .triton import MOST_EXPERTS, order

    if num_experts > MOST_EXPERTS:
        raise ValueError(
            f"the Triton positions take up to {MOST_EXPERTS} experts, got {num_experts}: use kernels=torch"
        )
    row_TK, source_N, count_E = order(expert_BSK, num_experts, capacity_B)
    return Positions(row_TK, source_N, count_E, capacity_B is not None)


def _within_capacity(sorted_N: torch.Tensor, sequence_N: torch.Tensor, capacity_B: torch.Tensor) -> torch.Tensor:
    """Which pairs, in sorted order, come before their (expert, sequence) group is full."""
    # Tokens are in order inside an expert, so each (expert, sequence) group is one run and this key is sorted.
    group_N = sorted_N * capacity_B.numel() + sequence_N
    rank_N = torch.arange(group_N.numel(), device=group_N.device) - torch.searchsorted(group_N, group_N)
    return rank_N < capacity_B[sequence_N]
