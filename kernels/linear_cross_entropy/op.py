"""Output head and cross-entropy in one operation; the logits exist for one chunk of tokens at a time.

Where a gradient is wanted, it is computed in the forward pass while the chunk's logits are at hand (the way of Liger's
fused linear cross-entropy, arXiv:2410.10989), so neither logits nor probabilities are kept.

Shape letters: T tokens, D model width, V vocabulary, N tokens of a chunk.
"""

from typing import Any

import torch

_IGNORED = -100
_CHUNK_ELEMENTS = 1 << 22
_COLUMNS = 1024


def linear_cross_entropy(
    x_TD: torch.Tensor, weight_VD: torch.Tensor, label_T: torch.Tensor, *, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(loss_sum, loss_T)` of `logits = x_TD @ weight_VD.T` against label_T.

    x_TD [T, D] and weight_VD [V, D] of one float dtype; label_T int64 [T] in 0..V-1, or -100 where there is no
    label. loss_sum: differentiable fp32 scalar, the sum over labelled tokens of cross-entropy + z_loss * logsumexp^2
    (arXiv:2202.08906). loss_T: fp32 [T], each token's cross-entropy without gradient, 0 where there is no label.
    One backward pass through loss_sum is supported (its gradients are scaled in place).
    """
    grads_wanted = torch.is_grad_enabled()
    need_x = grads_wanted and x_TD.requires_grad
    need_weight = grads_wanted and weight_VD.requires_grad
    loss_sum, loss_T = _LinearCrossEntropy.apply(x_TD, weight_VD, label_T, z_loss, need_x, need_weight)  # type: ignore[no-untyped-call]
    return loss_sum, loss_T


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        label_T: torch.Tensor,
        z_loss: float,
        need_x: bool,
        need_weight: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        T, V = x_TD.shape[0], weight_VD.shape[0]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        loss_T, penalty_T = torch.zeros(2, T, dtype=wide, device=x_TD.device)
        grad_x = torch.empty_like(x_TD) if need_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        size = max(1, min(T, _CHUNK_ELEMENTS // max(V, 1)))
        buffer_NV = torch.empty(size, V, dtype=wide, device=x_TD.device)
        for begin in range(0, T, size):
            rows = slice(begin, min(begin + size, T))
            logits_NV = _logits(x_TD[rows], weight_VD, buffer_NV)
            loss_T[rows], lse_N = _losses(logits_NV, label_T[rows])
            penalty_T[rows] = z_loss * lse_N.square()
            if grad_x is None and grad_weight is None:
                continue
            grad_NV = _grad_logits(logits_NV, lse_N, label_T[rows], z_loss).to(x_TD.dtype)
            if grad_x is not None:
                torch.mm(grad_NV, weight_VD, out=grad_x[rows])
            if grad_weight is not None:
                _accumulate(grad_weight, grad_NV, x_TD[rows])
        labelled_T = label_T != _IGNORED
        loss_T, penalty_T = loss_T.where(labelled_T, 0.0), penalty_T.where(labelled_T, 0.0)
        ctx.grads = (grad_x, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        ctx.mark_non_differentiable(loss_T)
        return (loss_T + penalty_T).sum(), loss_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_cross_entropy: its gradients were handed out already; run the forward pass again"
            )
        (grad_x, grad_weight), ctx.grads = ctx.grads, None
        for grad in (grad_x, grad_weight):
            if grad is not None:
                grad.mul_(grads[0])
        return grad_x, grad_weight, None, None, None, None


def _logits(x_ND: torch.Tensor, weight_VD: torch.Tensor, buffer_NV: torch.Tensor) -> torch.Tensor:
    """The chunk's logits in the buffer, a block of columns at a time: a block of the weight stays in the cache."""
    logits_NV = buffer_NV[: x_ND.shape[0]]
    for begin in range(0, weight_VD.shape[0], _COLUMNS):
        block_CD, out_NC = weight_VD[begin : begin + _COLUMNS], logits_NV[:, begin : begin + _COLUMNS]
        if x_ND.dtype == buffer_NV.dtype:
            torch.mm(x_ND, block_CD.t(), out=out_NC)
        else:
            out_NC.copy_(x_ND @ block_CD.t())
    return logits_NV


def _losses(logits_NV: torch.Tensor, label_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and logsumexp of each token; what an ignored token gets is meaningless."""
    lse_N = logits_NV.logsumexp(-1)
    return lse_N - logits_NV.gather(1, label_N.clamp(min=0)[:, None])[:, 0], lse_N


def _grad_logits(logits_NV: torch.Tensor, lse_N: torch.Tensor, label_N: torch.Tensor, z_loss: float) -> torch.Tensor:
    """d loss_sum / d logits, in place."""
    labelled_N = (label_N != _IGNORED).to(lse_N.dtype)
    grad_NV = logits_NV.sub_(lse_N[:, None]).exp_()
    grad_NV.mul_((labelled_N * (1 + 2 * z_loss * lse_N))[:, None])
    return grad_NV.scatter_add_(1, label_N.clamp(min=0)[:, None], -labelled_N[:, None])


def _accumulate(grad_VD: torch.Tensor, grad_NV: torch.Tensor, x_ND: torch.Tensor) -> None:
    if grad_VD.dtype == x_ND.dtype:
        grad_VD.addmm_(grad_NV.t(), x_ND)
    else:
        grad_VD.add_(grad_NV.t() @ x_ND)
