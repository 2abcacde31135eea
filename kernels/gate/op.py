"""The softmax top-k gate: choices, weights and the sums of the balance losses in one pass, and one pass back.

The published recipe (GShard arXiv:2006.16668, Switch arXiv:2101.03961, Mixtral arXiv:2401.04088, z-loss
arXiv:2202.08906, selection bias arXiv:2408.15664) with one gradient for all of it: weights, probabilities and logsumexp
are all functions of the logits, so the backward adds three terms into one [B, S, E] tensor.

Shape letters: B sequences, S positions, E experts, K top-k.
"""

from typing import Any

import torch

from ..backend import Backend
from .reference import Gate


def gate(
    logits_BSE: torch.Tensor,
    top_k: int,
    *,
    bias_E: torch.Tensor | None = None,
    renormalize: bool = True,
    backend: Backend = "torch",
) -> Gate:
    """Choose top_k experts a token by softmax probability (plus bias_E, which only selects); ties go to the lower id.

    logits_BSE [B, S, E] of any float dtype, taken in fp32 (fp64 stays fp64). Weights are the chosen probabilities,
    divided by their sum where renormalize is set. Raises ValueError if top_k is not in 1..E, or for what the Triton
    gate does not do: fp64, more than 16 choices or 4096 experts.
    """
    E = logits_BSE.shape[-1]
    if not 1 <= top_k <= E:
        raise ValueError(f"gate: top_k must lie between 1 and the number of experts ({E}), not {top_k}")
    logits_BSE = logits_BSE.to(torch.promote_types(logits_BSE.dtype, torch.float32))
    if backend == "triton":
        return _triton_gate(logits_BSE, top_k, bias_E, renormalize)
    return Gate(*_Gate.apply(logits_BSE, top_k, bias_E, renormalize))  # type: ignore[no-untyped-call]


def _triton_gate(logits_BSE: torch.Tensor, top_k: int, bias_E: torch.Tensor | None, renormalize: bool) -> Gate:
    from .triton import MOST_CHOICES, MOST_EXPERTS, gate_forward

    E = logits_BSE.shape[-1]
    if logits_BSE.dtype != torch.float32 or top_k > MOST_CHOICES or E > MOST_EXPERTS:
        raise ValueError(
            f"the Triton gate takes fp32, top_k up to {MOST_CHOICES} and up to {MOST_EXPERTS} experts, got "
            f"{logits_BSE.dtype}, {top_k} and {E}: use kernels=torch"
        )
    return Gate(*gate_forward(logits_BSE, None if bias_E is None else bias_E.float(), top_k, renormalize)[:5])


def choose(
    logits_BSE: torch.Tensor, top_k: int, *, bias_E: torch.Tensor | None = None, renormalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gate`'s expert_BSK and weight_BSK, and the probabilities [B, S, E] of fp32 logits, without autograd."""
    prob_BSE = torch.softmax(logits_BSE, -1)
    score_BSE = prob_BSE if bias_E is None else prob_BSE + bias_E
    # topk leaves the order of ties open; a stable sort gives them to the lower id.
    order_BSE = torch.sort(score_BSE, dim=-1, descending=True, stable=True).indices
    expert_BSK = order_BSE[..., :top_k].contiguous()
    # Renormalised probabilities are a softmax over the chosen logits, which cannot divide by a vanished sum.
    weight_BSK = (
        torch.softmax(logits_BSE.gather(-1, expert_BSK), -1) if renormalize else prob_BSE.gather(-1, expert_BSK)
    )
    return expert_BSK, weight_BSK, prob_BSE


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BSE: torch.Tensor, top_k: int, bias_E: torch.Tensor | None, renormalize: bool
    ) -> tuple[torch.Tensor, ...]:
        B, _, E = logits_BSE.shape
        lse_BS = logits_BSE.logsumexp(-1)
        expert_BSK, weight_BSK, prob_BSE = choose(logits_BSE, top_k, bias_E=bias_E, renormalize=renormalize)
        chosen_BN = expert_BSK.flatten(1)
        count_BE = chosen_BN.new_zeros(B, E).scatter_add_(1, chosen_BN, torch.ones_like(chosen_BN))
        ctx.save_for_backward(prob_BSE, lse_BS, expert_BSK, weight_BSK)
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(expert_BSK, count_BE)
        ctx.set_materialize_grads(False)
        return expert_BSK, weight_BSK, count_BE, prob_BSE.sum(1), lse_BS.square().sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, None, None, None]:
        _, grad_weight_BSK, _, grad_prob_BE, grad_z_B = grads
        prob_BSE, lse_BS, expert_BSK, weight_BSK = ctx.saved_tensors
        # `inner` is d/d prob (back through the softmax); `direct` is d/d logits of the chosen columns.
        inner_BSE = torch.zeros_like(prob_BSE) if grad_prob_BE is None else grad_prob_BE[:, None].expand_as(prob_BSE)
        direct_BSK = None
        if grad_weight_BSK is not None and ctx.renormalize:
            mean_BS1 = (grad_weight_BSK * weight_BSK).sum(-1, keepdim=True)
            direct_BSK = weight_BSK * (grad_weight_BSK - mean_BS1)
        elif grad_weight_BSK is not None:
            inner_BSE = inner_BSE.scatter_add(-1, expert_BSK, grad_weight_BSK)
        grad_BSE = prob_BSE * (inner_BSE - (inner_BSE * prob_BSE).sum(-1, keepdim=True))
        if grad_z_B is not None:
            grad_BSE.addcmul_(prob_BSE, (2 * grad_z_B[:, None] * lse_BS)[..., None])
        if direct_BSK is not None:
            grad_BSE.scatter_add_(-1, expert_BSK, direct_BSK)
        return grad_BSE, None, None, None
