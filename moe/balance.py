"""Balance of the experts' load: pure functions of what the routers counted.

Shape letters: B sequences, S positions, E experts, K top-k, N balance groups (domains; 1 for a global router).
"""

import torch
from torch import Tensor


def sequence_balance_sum(count_BE: Tensor, prob_BE: Tensor, top_k: int, sequence_length: int) -> Tensor:
    """Sum over tokens of `E * sum_e f_e p_e`, f and p taken from each sequence alone.

    f_e = count / (K S), p_e = prob / S. Divide by the tokens of the whole batch: 1 at perfect balance.
    Source: Switch Transformer (Fedus et al. 2021), eq. 4, per sequence as in DeepSeek-V3.
    """
    num_experts = count_BE.shape[1]
    return (count_BE * prob_BE).sum() * (num_experts / (top_k * sequence_length))


def batch_balance_sum(fraction_E: Tensor, prob_BE: Tensor) -> Tensor:
    """Sum over tokens of `E * sum_e f_e p_e`, f the previous step's global fractions, p the current probabilities."""
    return (prob_BE.sum(0) * fraction_E).sum() * fraction_E.shape[0]


def next_fractions(fraction_NE: Tensor, count_NE: Tensor) -> Tensor:
    """Return each group's share of selections by expert; a group without tokens keeps what it had."""
    total_N1 = count_NE.sum(1, keepdim=True)
    return torch.where(total_N1 > 0, count_NE / total_N1.clamp(min=1), fraction_NE)


def uniform_fractions(sets: tuple[tuple[int, ...], ...], num_experts: int) -> Tensor:
    """Return fp32 `[N, E]`: equal shares inside each group's set, 0 outside."""
    fraction_NE = torch.zeros(len(sets), num_experts)
    for group, experts in enumerate(sets):
        fraction_NE[group, list(experts)] = 1 / len(experts)
    return fraction_NE


def next_bias(bias_E: Tensor, count_NE: Tensor, sets: tuple[tuple[int, ...], ...], rate: float) -> Tensor:
    """Return the selection bias after a step: up by `rate` for experts under their groups' mean load, down above it.

    An expert in several groups follows the sum of its deficits. Source: Wang et al. 2024, Auxiliary-Loss-Free Load
    Balancing, algorithm 1.
    """
    deficit_E = torch.zeros_like(bias_E)
    for group, experts in enumerate(sets):
        count = count_NE[group, list(experts)].to(bias_E.dtype)
        deficit_E[list(experts)] += count.mean() - count
    return bias_E + rate * deficit_E.sign()
