"""Tokens to expert-sorted rows and back, both ways by gathers alone, so no order of additions is left to chance.

Shape letters: T tokens, D width, K top-k, R kept rows.
"""

from typing import Any

import torch

from ..backend import Backend
from ..positions import Positions


def permute(x_TD: torch.Tensor, positions: Positions, top_k: int, *, backend: Backend = "torch") -> torch.Tensor:
    """Copy each token to the rows of its routed pairs: rows_RD[r] = x_TD[source_R[r] // top_k], same dtype.

    The backward sums a token's kept rows in choice order, in fp32. Raises ValueError for fp64 with Triton.
    """
    if backend == "triton":
        from .triton import permute_forward

        _check_dtype(x_TD)
        rows_RD: torch.Tensor = permute_forward(x_TD, positions.row_TK, positions.source_R.numel())
        return rows_RD
    return _Permute.apply(x_TD, positions.row_TK, positions.source_R, top_k)  # type: ignore[no-any-return, no-untyped-call]


def combine(
    rows_RD: torch.Tensor, weight_TK: torch.Tensor, positions: Positions, *, backend: Backend = "torch"
) -> torch.Tensor:
    """Weighted sum of each token's rows, x_TD[t] = sum_k weight_TK[t, k] rows_RD[row_TK[t, k]], in the rows' dtype.

    weight_TK fp32; sums in fp32, in choice order. A dropped pair adds 0 and its weight has gradient 0. Raises
    ValueError for fp64 with Triton.
    """
    if backend == "triton":
        from .triton import combine_forward

        _check_dtype(rows_RD)
        out_TD: torch.Tensor = combine_forward(rows_RD, weight_TK.float(), positions.row_TK)
        return out_TD
    return _Combine.apply(rows_RD, weight_TK, positions.row_TK, positions.source_R)  # type: ignore[no-any-return, no-untyped-call]


def _check_dtype(x_TD: torch.Tensor) -> None:
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"Triton moves rows of fp32, bf16 and fp16, not {x_TD.dtype}: use kernels=torch")


def _gather(
    rows_RD: torch.Tensor, row_TK: torch.Tensor, weight_TK: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """sum_k weight rows[row], skipping rows of -1."""
    T, K = row_TK.shape
    out_TD = rows_RD.new_zeros((T, rows_RD.shape[-1]), dtype=dtype)
    if rows_RD.shape[0] == 0:
        return out_TD
    if rows_RD.shape[0] < T * K:
        kept_TK = (row_TK >= 0).to(dtype)
        weight_TK = kept_TK if weight_TK is None else weight_TK * kept_TK
        row_TK = row_TK.clamp(min=0)
    for k in range(K):
        rows_TD = rows_RD.index_select(0, row_TK[:, k]).to(dtype)
        if weight_TK is None:
            out_TD.add_(rows_TD)
        else:
            out_TD.addcmul_(rows_TD, weight_TK[:, k, None])
    return out_TD


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, row_TK: torch.Tensor, source_R: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, source_R // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (row_TK,) = ctx.saved_tensors
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        return _gather(grads[0], row_TK, None, wide).to(grads[0].dtype), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: torch.Tensor, weight_TK: torch.Tensor, row_TK: torch.Tensor, source_R: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_RD, weight_TK, source_R)
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        return _gather(rows_RD, row_TK, weight_TK.to(wide), wide).to(rows_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        rows_RD, weight_TK, source_R = ctx.saved_tensors
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        grad_RD = grads[0].index_select(0, source_R // weight_TK.shape[1]).to(wide)
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[1]:
            dot_R = (grad_RD * rows_RD).sum(-1)
            grad_weight = torch.zeros_like(weight_TK, memory_format=torch.contiguous_format)
            grad_weight.view(-1)[source_R] = dot_R.to(weight_TK.dtype)
        if ctx.needs_input_grad[0]:
            weight_R1 = weight_TK.reshape(-1)[source_R, None].to(wide)
            grad_rows = grad_RD.mul_(weight_R1).to(rows_RD.dtype)
        return grad_rows, grad_weight, None, None
