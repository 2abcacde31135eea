"""Output head and cross-entropy in one operation; the logits exist for one chunk of tokens at a time.

Where a gradient is wanted, it is computed in the forward pass while the chunk's logits are at hand (the way of Liger's
fused linear cross-entropy, arXiv:2410.10989), so neither logits nor probabilities are kept.

Shape letters: T tokens, D model width, V vocabulary, N tokens of a chunk (and padding).
"""

from typing import Any

import torch
from torch.nn import functional

from ..backend import Backend
from ..linear import padded, padded_size, product
from .sharded import ColumnShard, columns, sharded_softmax
from .weight_gradient import WeightGradient

_IGNORED = -100
_CHUNK_ELEMENTS = 1 << 22
_FEWEST, _FEWEST_GPU = 64, 1024  # tokens that keep products busy
_SMALL_VOCABULARY = 1 << 14


def linear_cross_entropy(
    x_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    label_T: torch.Tensor,
    *,
    z_loss: float = 0.0,
    shard: ColumnShard | None = None,
    backend: Backend = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(loss_sum, loss_T)` of `logits = x_TD @ weight_VD.T` against label_T.

    x_TD [T, D] and weight_VD [V, D] of one float dtype; label_T int64 [T] in 0..V-1, or -100 where there is no
    label. loss_sum: differentiable fp32 scalar, the sum over labelled tokens of cross-entropy + z_loss * logsumexp^2
    (arXiv:2202.08906). loss_T: fp32 [T], each token's cross-entropy without gradient, 0 where there is no label.
    One backward pass through loss_sum is supported (its gradients are scaled in place).

    With a `shard` weight_VD is some rows of the whole head and labels are those of the whole vocabulary: the losses are
    complete, and so is the gradient of weight_VD; that of x_TD is this shard's addend. Takes part in two of the shard's
    reductions a chunk. Raises ValueError for fp64 with Triton.
    """
    if backend == "triton" and x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"Triton's cross-entropy takes fp32, bf16 and fp16, not {x_TD.dtype}: use kernels=torch")
    grads_wanted = torch.is_grad_enabled()
    need_x = grads_wanted and x_TD.requires_grad
    need_weight = grads_wanted and weight_VD.requires_grad
    loss_sum, loss_T = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_TD, weight_VD, label_T, z_loss, shard, backend, need_x, need_weight
    )
    return loss_sum, loss_T


class _LinearCrossEntropy(torch.autograd.Function):
    """For both backends. No operator of torch's, since a shard's reductions are Python: torch.compile leaves it out."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        label_T: torch.Tensor,
        z_loss: float,
        shard: ColumnShard | None,
        backend: Backend,
        need_x: bool,
        need_weight: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        T, V = x_TD.shape[0], weight_VD.shape[0]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        loss_T, penalty_T = torch.zeros(2, T, dtype=wide, device=x_TD.device)
        grad_x = torch.empty_like(x_TD) if need_x else None
        weight_DV = weight_VD.t()
        if need_x and not x_TD.is_cuda and V <= _SMALL_VOCABULARY:
            # On a CPU sums over the vocabulary run a fifth faster along contiguous rows; a large head's take memory.
            weight_DV = weight_DV.contiguous()
        chunks = _chunks(T, chunk_size(V if shard is None else shard.num_columns, x_TD.shape[1], x_TD.device))
        grad_weight = WeightGradient(weight_VD, len(chunks)) if need_weight else None
        for rows in chunks:
            x_ND, num_rows = padded(x_TD[rows]), rows.stop - rows.start
            label_N = functional.pad(label_T[rows], (0, x_ND.shape[0] - num_rows), value=_IGNORED)
            column_N = columns(label_N, V, shard)
            held_NV, lse_N, chosen_N = _softmax(product(x_ND, weight_VD), column_N, shard, backend)
            loss_T[rows] = (lse_N - chosen_N)[:num_rows]
            penalty_T[rows] = z_loss * lse_N[:num_rows].square()
            if need_x or need_weight:
                grad_NV = _grad_logits(held_NV, lse_N, label_N, column_N, z_loss, backend).to(x_TD.dtype)
                if grad_x is not None:
                    grad_x[rows] = product(grad_NV, weight_DV)[:num_rows]
                if grad_weight is not None:
                    grad_weight.add(x_ND, grad_NV)
                del grad_NV
            del held_NV  # before the next chunk's are made
        del weight_DV
        labelled_T = label_T != _IGNORED
        loss_T, penalty_T = loss_T.where(labelled_T, 0.0), penalty_T.where(labelled_T, 0.0)
        ctx.grads = (grad_x, None if grad_weight is None else grad_weight.total())
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
        return grad_x, grad_weight, None, None, None, None, None, None


def reduced_elements(num_tokens: int, num_columns: int, like: torch.Tensor) -> int:
    """How many elements a holder hands to its shard's reductions, for as many tokens of `like`'s dtype and device.

    Of every token, and of the padding of its chunk: a maximum, a sum and a logit. They are wide: fp32 at least.
    """
    size = chunk_size(num_columns, 0, like.device)  # whose width counts on a GPU alone, where nothing is padded
    return sum(3 * padded_size(rows.stop - rows.start, like) for rows in _chunks(num_tokens, size))


def chunk_size(V: int, D: int, device: torch.device) -> int:
    """How many tokens' logits exist at a time, for V columns: a multiple of 64.

    On a CPU as many as take 16 MB in fp32, but 64 at least. On a GPU every chunk reads and writes the weight's gradient
    in fp32: with D tokens that moves, at D 4096, for a tenth of the products' time, and their logits take as much
    memory as the weight, which the gradient needs anyway when it is rounded in the end.
    """
    size = max(D, _FEWEST_GPU) if device.type == "cuda" else max(_FEWEST, _CHUNK_ELEMENTS // V)
    return size - size % 64


def _chunks(T: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, T)) for begin in range(0, T, size)]


def _softmax(
    logits_NV: torch.Tensor, column_N: torch.Tensor, shard: ColumnShard | None, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_grad_logits` needs, in place of the logits, and logsumexp and the label's logit."""
    if backend == "triton":
        from . import triton

        return logits_NV, *triton.softmax(logits_NV, column_N, shard)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return _local_softmax(logits_NV, column_N) if shard is None else sharded_softmax(logits_NV, column_N, shard)


def _local_softmax(logits_NV: torch.Tensor, label_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities (in place of the logits), logsumexp and the label's logit (of some column where none is)."""
    largest_N, chosen_N = logits_NV.amax(-1), logits_NV.gather(1, label_N.clamp(min=0)[:, None])[:, 0]
    prob_NV = torch.softmax(logits_NV, -1, out=logits_NV)
    # The largest probability is at least 1/V, so its logarithm is safe; logsumexp would take every exponential again.
    return prob_NV, largest_N - prob_NV.amax(-1).log(), chosen_N


def _grad_logits(
    held_NV: torch.Tensor,
    lse_N: torch.Tensor,
    label_N: torch.Tensor,
    column_N: torch.Tensor,
    z_loss: float,
    backend: Backend,
) -> torch.Tensor:
    """d loss_sum / d logits, in place of what `_softmax` returned; column_N is the label's column, where it is here."""
    if backend == "triton":
        from .triton import logits_gradient_

        logits_gradient_(held_NV, lse_N, label_N, column_N, z_loss)
        return held_NV
    labelled_N = (label_N != _IGNORED).to(lse_N.dtype)
    grad_NV = held_NV.mul_((labelled_N * (1 + 2 * z_loss * lse_N))[:, None])
    here_N = (column_N != _IGNORED).to(lse_N.dtype)
    return grad_NV.scatter_add_(1, column_N.clamp(min=0)[:, None], -here_N[:, None])
