"""The gate of fixed routes (PanGu-Sigma's random routed experts, arXiv:2303.10845): a table over token ids.

Shape letters: B sequences, S positions, E experts, N domains, M the most experts of a domain, V vocabulary.
"""

import torch

from ..backend import Backend
from .reference import Gate


def table_gate(
    token_BS: torch.Tensor,
    domain_B: torch.Tensor,
    table_NV: torch.Tensor,
    sets_NM: torch.Tensor,
    num_experts: int,
    *,
    backend: Backend = "torch",
) -> Gate:
    """Give token v of a sequence of domain d the expert `sets_NM[d, table_NV[d, v]]`: one choice of weight 1.

    token_BS and domain_B int64; table_NV int32 [domains, V], positions inside the domain's set; sets_NM int64, the
    experts of each domain, ids below num_experts (what fills a shorter row up is never read). There are no
    probabilities: prob_BE and z_B are 0.
    """
    if backend == "triton":
        from .triton import table_gate_forward

        expert_BS, count_BE = table_gate_forward(token_BS, domain_B, table_NV, sets_NM, num_experts)
    else:
        position_BS = table_NV[domain_B[:, None], token_BS].long()
        expert_BS = sets_NM[domain_B[:, None], position_BS]
        count_BE = expert_BS.new_zeros(expert_BS.shape[0], num_experts)
        count_BE.scatter_add_(1, expert_BS, torch.ones_like(expert_BS))
    weight_BS1 = torch.ones(*expert_BS.shape, 1, device=token_BS.device)
    zero_B = weight_BS1.new_zeros(expert_BS.shape[0])
    return Gate(expert_BS.unsqueeze(-1), weight_BS1, count_BE, zero_B[:, None].expand(-1, num_experts), zero_B)
