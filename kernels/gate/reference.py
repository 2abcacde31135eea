"""The softmax top-k gate in plain maths, and the shape of its answer.

Shape letters: B sequences, S positions, E experts, K top-k.
"""

from typing import NamedTuple

import torch


class Gate(NamedTuple):
    """What a gate decides for a batch, and the sums that balance losses are made of."""

    expert_BSK: torch.Tensor
    """int64: chosen experts, most probable first."""
    weight_BSK: torch.Tensor
    """fp32, differentiable: the weight of each choice."""
    count_BE: torch.Tensor
    """int64: how often each expert was chosen in each sequence."""
    prob_BE: torch.Tensor
    """fp32, differentiable: softmax probabilities summed over the sequence's tokens."""
    z_B: torch.Tensor
    """fp32, differentiable: `logsumexp(logits)^2` summed over the sequence's tokens."""


def gate_reference(
    logits_BSE: torch.Tensor, top_k: int, *, bias_E: torch.Tensor | None = None, renormalize: bool = True
) -> Gate:
    """Softmax over the experts, the top_k most probable (plus bias) chosen, ties to the lower id."""
    exponential = torch.exp(logits_BSE - logits_BSE.detach().amax(-1, keepdim=True))
    prob_BSE = exponential / exponential.sum(-1, keepdim=True)
    score_BSE = prob_BSE.detach() if bias_E is None else prob_BSE.detach() + bias_E
    expert_BSK = torch.sort(score_BSE, dim=-1, descending=True, stable=True).indices[..., :top_k]
    weight_BSK = prob_BSE.gather(-1, expert_BSK)
    if renormalize:
        weight_BSK = weight_BSK / weight_BSK.sum(-1, keepdim=True)
    chosen_BSKE = expert_BSK[..., None] == torch.arange(logits_BSE.shape[-1], device=logits_BSE.device)
    return Gate(
        expert_BSK, weight_BSK, chosen_BSKE.sum((1, 2)), prob_BSE.sum(1), logits_BSE.logsumexp(-1).square().sum(1)
    )
