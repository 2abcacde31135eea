"""SwiGLU feed-forward of many experts: one pair of matrix products an expert, over the rows grouped by expert.

The loop is deliberate: an expert's arithmetic sees its own rows and weights and nothing else, so a submodel with fewer
experts computes the same bits. The backward keeps the rows and the pre-activation and recomputes the activation.

Shape letters: R rows, D model width, F expert hidden width, G = 2F (gate rows, then up rows), E experts.
"""

from typing import Any

import torch

from ..swiglu.op import swiglu_backward, swiglu_forward


def expert_mlp(
    rows_RD: torch.Tensor, count_E: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor
) -> torch.Tensor:
    """`down (silu(gate x) * up x)` with each row's own expert; returns rows_RD of the same dtype.

    rows_RD [R, D] grouped by expert in expert order; count_E int64 [E], rows of each expert, summing to R; gate_up_EGD
    [E, 2F, D], the first F rows of an expert its gate; down_EDF [E, D, F]. All of one float dtype. An expert without
    rows gets a zero gradient. Raises ValueError if the counts do not add up to R.
    """
    counts = count_E.tolist()
    if sum(counts) != rows_RD.shape[0]:
        raise ValueError(f"expert_mlp: counts add up to {sum(counts)} rows, but {rows_RD.shape[0]} were given")
    return _ExpertMlp.apply(rows_RD, counts, gate_up_EGD, down_EDF)  # type: ignore[no-any-return, no-untyped-call]


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: torch.Tensor, counts: list[int], gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor
    ) -> torch.Tensor:
        hidden_RG = rows_RD.new_empty(rows_RD.shape[0], gate_up_EGD.shape[1])
        out_RD = torch.empty_like(rows_RD, memory_format=torch.contiguous_format)
        for e, (begin, end) in _spans(counts):
            torch.mm(rows_RD[begin:end], gate_up_EGD[e].t(), out=hidden_RG[begin:end])
            torch.mm(swiglu_forward(hidden_RG[begin:end]), down_EDF[e].t(), out=out_RD[begin:end])
        ctx.save_for_backward(rows_RD, hidden_RG, gate_up_EGD, down_EDF)
        ctx.counts = counts
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_RD, hidden_RG, gate_up_EGD, down_EDF = ctx.saved_tensors
        need_rows, _, need_gate_up, need_down = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows_RD) if need_rows else None
        grad_gate_up = torch.empty_like(gate_up_EGD) if need_gate_up else None
        grad_down = torch.empty_like(down_EDF) if need_down else None
        for e, (begin, end) in _spans(ctx.counts):
            grad_out = grads[0][begin:end]
            act, grad_hidden = swiglu_backward(grad_out @ down_EDF[e], hidden_RG[begin:end])
            if grad_down is not None:
                torch.mm(grad_out.t(), act, out=grad_down[e])
            if grad_gate_up is not None:
                torch.mm(grad_hidden.t(), rows_RD[begin:end], out=grad_gate_up[e])
            if grad_rows is not None:
                torch.mm(grad_hidden, gate_up_EGD[e], out=grad_rows[begin:end])
        for e, count in enumerate(ctx.counts):
            if count == 0:
                for grad in (grad_gate_up, grad_down):
                    if grad is not None:
                        grad[e].zero_()
        return grad_rows, None, grad_gate_up, grad_down


def _spans(counts: list[int]) -> list[tuple[int, tuple[int, int]]]:
    """Expert and [begin, end) of its rows, for experts that have any."""
    spans, begin = [], 0
    for e, count in enumerate(counts):
        if count:
            spans.append((e, (begin, begin + count)))
        begin += count
    return spans
