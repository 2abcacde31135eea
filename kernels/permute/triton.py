"""Tokens to expert-sorted rows and back in Triton: one program a token, so each row is read and written once.

A dropped pair's row is -1: all its addresses are negative, and that masks them. Rows are int64, and so are addresses.

Shape letters: T tokens, D width, K top-k, R kept rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..triton import offset, tuned

_WARPS = [triton.Config({}, num_warps=warps) for warps in (4, 8)]


@tuned(_WARPS, key=["D", "K"])
@triton.jit
def _spread(x, row, rows, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
    token = offset(tl.program_id(0), 1)
    for begin in range(0, D, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        value = tl.load(x + token * D + column, mask=column < D)
        for k in tl.static_range(K):
            to = tl.load(row + token * K + k) * D + column
            tl.store(rows + to, value, mask=(column < D) & (to >= 0))


@tuned(_WARPS, key=["D", "K"])
@triton.jit
def _gather(rows, weight, row, out, D: tl.constexpr, K: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_D: tl.constexpr):
    token = offset(tl.program_id(0), 1)
    for begin in range(0, D, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float32)
        for k in tl.static_range(K):
            at = tl.load(row + token * K + k) * D + column
            value = tl.load(rows + at, mask=(column < D) & (at >= 0), other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                value *= tl.load(weight + token * K + k)
            total += tl.where(at >= 0, value, 0.0)  # not even infinity times the zeros of a dropped pair
        tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def _gather_backward(
    grad, rows, weight, row, grad_rows, grad_weight,
    D: tl.constexpr, K: tl.constexpr, NEED_WEIGHT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = offset(tl.program_id(0), 1)
    for k in tl.static_range(K):
        to = tl.load(row + token * K + k) * D
        share = tl.load(weight + token * K + k)
        dot = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(0, D, BLOCK_D):
            column = begin + tl.arange(0, BLOCK_D)
            at = to + column
            mask = (column < D) & (at >= 0)
            value = tl.load(grad + token * D + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_rows + at, (value * share).to(grad_rows.dtype.element_ty), mask=mask)
            if NEED_WEIGHT:
                dot += value * tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
        if NEED_WEIGHT:
            tl.store(grad_weight + token * K + k, tl.sum(dot, 0))


def _block(D: int) -> int:
    return min(max(triton.next_power_of_2(D), 16), 2048)


def _warps(D: int) -> int:
    """Sixteen bytes of bf16 a thread, where the row is that long."""
    return min(max(_block(D) // 256, 1), 8)


@torch.library.custom_op("sigmoe::permute", mutates_args=())
def permute_forward(x_TD: Tensor, row_TK: Tensor, num_rows: int) -> Tensor:
    """Return rows_RD, in which each token stands in its rows."""
    rows_RD = _empty_rows(x_TD, row_TK, num_rows)
    (T, D), K = x_TD.shape, row_TK.shape[1]
    if rows_RD.numel():
        _spread[(T,)](x_TD.contiguous(), row_TK.contiguous(), rows_RD, D=D, K=K, BLOCK_D=_block(D))
    return rows_RD


@permute_forward.register_fake
def _empty_rows(x_TD: Tensor, row_TK: Tensor, num_rows: int) -> Tensor:
    return x_TD.new_empty(num_rows, x_TD.shape[1])


@torch.library.custom_op("sigmoe::combine", mutates_args=())
def combine_forward(rows_RD: Tensor, weight_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    """Return x_TD, the sum of each token's rows, weighted by fp32 weight_TK where that is given."""
    out_TD = _empty_tokens(rows_RD, weight_TK, row_TK)
    (T, K), D = row_TK.shape, rows_RD.shape[1]
    if out_TD.numel():
        weight_TK = None if weight_TK is None else weight_TK.contiguous()
        _gather[(T,)](
            rows_RD.contiguous(), weight_TK, row_TK.contiguous(), out_TD,
            D=D, K=K, HAS_WEIGHT=weight_TK is not None, BLOCK_D=_block(D),
        )  # fmt: skip
    return out_TD


@combine_forward.register_fake
def _empty_tokens(rows_RD: Tensor, weight_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    return rows_RD.new_empty(row_TK.shape[0], rows_RD.shape[1])


@torch.library.custom_op("sigmoe::combine_backward", mutates_args=())
def combine_backward(
    grad_TD: Tensor, rows_RD: Tensor | None, weight_TK: Tensor, row_TK: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows_RD and, where these are given, of weight_TK (else an empty one)."""
    grad_rows, grad_weight = _empty_gradients(grad_TD, rows_RD, weight_TK, row_TK, num_rows)
    (T, D), K = grad_TD.shape, row_TK.shape[1]
    if T and D:
        _gather_backward[(T,)](
            grad_TD.contiguous(), None if rows_RD is None else rows_RD.contiguous(), weight_TK.contiguous(),
            row_TK.contiguous(), grad_rows, grad_weight, D=D, K=K, NEED_WEIGHT=rows_RD is not None,
            BLOCK_D=_block(D), num_warps=_warps(D),
        )  # fmt: skip
    return grad_rows, grad_weight


@combine_backward.register_fake
def _empty_gradients(
    grad_TD: Tensor, rows_RD: Tensor | None, weight_TK: Tensor, row_TK: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    weights = weight_TK.shape if rows_RD is not None else (0,)
    return grad_TD.new_empty(num_rows, grad_TD.shape[1]), weight_TK.new_empty(weights)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _permute_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return combine_forward(grad, None, *ctx.saved_tensors), None, None


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, weight_TK, row_TK = inputs
    ctx.save_for_backward(rows_RD if ctx.needs_input_grad[1] else None, weight_TK, row_TK)
    ctx.num_rows = rows_RD.shape[0]


def _combine_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    grad_rows, grad_weight = combine_backward(grad, *ctx.saved_tensors, ctx.num_rows)
    return grad_rows, grad_weight if ctx.needs_input_grad[1] else None, None


permute_forward.register_autograd(_permute_gradient, setup_context=_save_rows)
combine_forward.register_autograd(_combine_gradient, setup_context=_save_inputs)


def compile_cases() -> Iterator[CompileCase]:
    """Yield permute and combine at widths of published models."""
    for kind, D, K in (("bf16", 768, 2), ("bf16", 4096, 8), ("fp16", 2048, 8), ("fp32", 2048, 8)):
        kinds = dict.fromkeys("x rows out grad grad_rows".split(), f"*{kind}") | {"row": "*i64"}
        kinds |= dict.fromkeys(("weight", "grad_weight"), "*fp32")
        constants = {"D": D, "K": K, "BLOCK_D": _block(D)}
        weighted, needed = constants | {"HAS_WEIGHT": True}, constants | {"NEED_WEIGHT": True}
        cases = [("permute", _spread.fn, constants, config.num_warps) for config in _WARPS]
        cases += [("combine", _gather.fn, weighted, config.num_warps) for config in _WARPS]
        cases.append(("combine backward", _gather_backward, needed, _warps(D)))
        for name, kernel, values, warps in cases:
            signature = {argument: kinds[argument] for argument in kernel.arg_names if argument not in values}
            title = f"{name} {kind}, D {D}, K {K}, {warps} warps"
            yield CompileCase(name=title, kernel=kernel, signature=signature, constants=values, num_warps=warps)
