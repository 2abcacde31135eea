"""SwiGLU feed-forward of many experts: one pair of matrix products an expert, over the rows grouped by expert.

The loop is deliberate: an expert's arithmetic sees its own rows and weights and nothing else, so a submodel with fewer
experts computes the same bits. The backward keeps the rows and the pre-activation and recomputes the activation.

Shape letters: T tokens, K top-k, R rows, M rows of one expert (padded with zero rows), D model width, F expert hidden
width, G = 2F (gate rows, then up rows), E experts.
"""

from typing import Any, NamedTuple

import torch

from ..backend import Backend
from ..grouped.op import check_for_triton, checked_counts
from ..linear import padded, padded_size, product
from ..permute import combine, permute
from ..positions import Positions
from ..swiglu.op import swiglu_backward, swiglu_forward


def expert_mlp(
    rows_RD: torch.Tensor,
    count_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    backend: Backend = "torch",
) -> torch.Tensor:
    """`down (silu(gate x) * up x)` with each row's own expert; returns rows_RD of the same dtype.

    rows_RD [R, D] grouped by expert in expert order; count_E int64 [E], rows of each expert, summing to R; gate_up_EGD
    [E, 2F, D], the first F rows of an expert its gate; down_EDF [E, D, F]. All of one float dtype. An expert without
    rows gets a zero gradient. Raises ValueError if the counts do not add up to R (Triton does not look), and for what
    Triton does not do: fp64, D or F that are no multiple of 16.
    """
    if backend == "triton":
        return _triton_mlp(rows_RD, None, None, count_E, gate_up_EGD, down_EDF)
    counts = checked_counts(count_E, rows_RD)
    return _ExpertMlp.apply(rows_RD, counts, gate_up_EGD, down_EDF)  # type: ignore[no-any-return, no-untyped-call]


def moe_mlp(
    x_TD: torch.Tensor,
    weight_TK: torch.Tensor,
    positions: Positions,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    backend: Backend = "torch",
) -> torch.Tensor:
    """Each token's weighted sum over its experts, `permute`, `expert_mlp` and `combine` in one: x_TD of the same dtype.

    weight_TK fp32; a dropped pair adds 0 and its weight has gradient 0. Weights and errors as in `expert_mlp`. With
    Triton no row of D is kept for the backward, and the host waits for nothing.
    """
    if backend == "triton":
        return _triton_mlp(x_TD, weight_TK.float(), positions, positions.count_E, gate_up_EGD, down_EDF)
    rows_RD = expert_mlp(permute(x_TD, positions, weight_TK.shape[1]), positions.count_E, gate_up_EGD, down_EDF)
    return combine(rows_RD, weight_TK, positions)


def _triton_mlp(
    x_TD: torch.Tensor,
    weight_TK: torch.Tensor | None,
    where: Positions | None,
    count_E: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    from .triton import expert_mlp_forward

    check_for_triton(x_TD, gate_up_EGD, down_EDF, D=down_EDF.shape[1], F=down_EDF.shape[2])
    row_TK, source_N = (None, None) if where is None else (where.row_TK, where.source_N)
    out: torch.Tensor = expert_mlp_forward(x_TD, weight_TK, row_TK, source_N, count_E, gate_up_EGD, down_EDF)[0]
    return out


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: torch.Tensor, counts: list[int], gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor
    ) -> torch.Tensor:
        spans = _spans(counts, rows_RD)
        out_RD = torch.empty_like(rows_RD, memory_format=torch.contiguous_format)
        # One buffer of a steady size: pieces that change from step to step would scatter the heap.
        hidden_RG = rows_RD.new_empty(spans[-1].hidden.stop if spans else 0, gate_up_EGD.shape[1])
        for e, rows, hidden in spans:
            hidden_MG = product(padded(rows_RD[rows]), gate_up_EGD[e])
            hidden_RG[hidden] = hidden_MG
            out_RD[rows] = product(swiglu_forward(hidden_MG), down_EDF[e])[: rows.stop - rows.start]
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
        for e, rows, hidden in _spans(ctx.counts, rows_RD):
            grad_MD = padded(grads[0][rows])
            act_MF, grad_MG = swiglu_backward(product(grad_MD, down_EDF[e].t()), hidden_RG[hidden])
            if grad_down is not None:
                grad_down[e] = product(grad_MD.t(), act_MF.t())
            if grad_gate_up is not None:
                # The transposed way round copies the rows instead of the wider gradient.
                grad_gate_up[e] = product(padded(rows_RD[rows]).t(), grad_MG.t()).t()
            if grad_rows is not None:
                grad_rows[rows] = product(grad_MG, gate_up_EGD[e].t())[: rows.stop - rows.start]
        for e, count in enumerate(ctx.counts):
            if count == 0:
                for grad in (grad_gate_up, grad_down):
                    if grad is not None:
                        grad[e].zero_()
        return grad_rows, None, grad_gate_up, grad_down


class _Span(NamedTuple):
    """An expert that has rows: where they are, and where their (padded) pre-activations are."""

    expert: int
    rows: slice
    hidden: slice


def _spans(counts: list[int], like: torch.Tensor) -> list[_Span]:
    spans, row, place = [], 0, 0
    for e, count in enumerate(counts):
        if count:
            size = padded_size(count, like)
            spans.append(_Span(e, slice(row, row + count), slice(place, place + size)))
            row, place = row + count, place + size
    return spans
