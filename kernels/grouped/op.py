"""Products of rows grouped by expert with their own expert's weight: one product an expert.

The feed-forward (`expert_mlp`) does its two with the activation between them in one go; this is one of them by itself.

Shape letters: R rows, M rows of one expert (padded with zero rows), E experts, D depth, N columns of the answer.
"""

from typing import Any

import torch

from ..backend import Backend
from ..linear import padded, product

# Rows of a block of Triton's products on a GPU: an expert's last block may hold fewer.
BLOCK_ROWS = 128


def grouped_linear(
    rows_RD: torch.Tensor, count_E: torch.Tensor, weight_END: torch.Tensor, *, backend: Backend = "torch"
) -> torch.Tensor:
    """`rows_RD[r] @ weight_END[e].T` for each row r with its expert e: [R, N] of the same dtype.

    rows_RD [R, D] grouped by expert in expert order; count_E int64 [E], rows of each expert, summing to R. All of one
    float dtype. An expert without rows gets a zero gradient. Raises ValueError if the counts do not add up to R (Triton
    does not look), and for what Triton does not do: fp64, D or N that are no multiple of 16.
    """
    if backend == "triton":
        from .triton import grouped_linear_forward

        check_for_triton(rows_RD, weight_END, D=weight_END.shape[2], N=weight_END.shape[1])
        out_RN: torch.Tensor = grouped_linear_forward(rows_RD, count_E, weight_END)
        return out_RN
    return _GroupedLinear.apply(rows_RD, checked_counts(count_E, rows_RD), weight_END)  # type: ignore[no-any-return, no-untyped-call]


def checked_counts(count_E: torch.Tensor, rows_RD: torch.Tensor) -> list[int]:
    """Return the counts; ValueError if they do not add up to the rows."""
    counts: list[int] = count_E.tolist()
    if sum(counts) != rows_RD.shape[0]:
        raise ValueError(f"the experts' counts add up to {sum(counts)} rows, but {rows_RD.shape[0]} were given")
    return counts


def check_for_triton(*tensors: torch.Tensor, **sizes: int) -> None:
    """Raise ValueError for dtypes, and for named dimensions, that the Triton products do not take."""
    for name, size in sizes.items():
        if size % 16:
            raise ValueError(f"the Triton experts take {name} as a multiple of 16, not {size}: use kernels=torch")
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"the Triton experts take fp32, bf16 or fp16 throughout, not {dtypes}: use kernels=torch")


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: torch.Tensor, counts: list[int], weight_END: torch.Tensor) -> torch.Tensor:
        out_RN = rows_RD.new_empty(rows_RD.shape[0], weight_END.shape[1])
        for e, rows in _spans(counts):
            out_RN[rows] = product(padded(rows_RD[rows]), weight_END[e])[: counts[e]]
        ctx.save_for_backward(rows_RD, weight_END)
        ctx.counts = counts
        return out_RN

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_RD, weight_END = ctx.saved_tensors
        need_rows, _, need_weight = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows_RD) if need_rows else None
        grad_weight = torch.zeros_like(weight_END) if need_weight else None
        for e, rows in _spans(ctx.counts):
            grad_MN = padded(grads[0][rows])
            if grad_rows is not None:
                grad_rows[rows] = product(grad_MN, weight_END[e].t())[: ctx.counts[e]]
            if grad_weight is not None:
                grad_weight[e] = product(grad_MN.t(), padded(rows_RD[rows]).t())
        return grad_rows, None, grad_weight


def _spans(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and which."""
    spans, row = [], 0
    for e, count in enumerate(counts):
        if count:
            spans.append((e, slice(row, row + count)))
        row += count
    return spans
