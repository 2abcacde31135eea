"""RMSNorm in Triton, alone or of a residual sum: one pass over the rows each way.

A program holds whole rows, so that each number is read once. Backward, so many programs as the shape says run through
the rows, and each keeps its part of the weight's gradient in registers; the parts are added up in a fixed order. Kept
between the passes: the input (or the sum, which the model keeps anyway) and a number a row.

Shape letters: N rows, D width, P programs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..triton import offset

MOST_WIDTH = 16384  # a row lies in the registers of one program
_PROGRAMS = 264  # two for each multiprocessor of an H100; everywhere, for they decide the order of the sum
_TILE = 4096  # elements


@triton.jit
def _forward(
    x, branch, weight, total, normed, rstd, N, eps,
    D: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = offset(tl.program_id(0), BLOCK_N) + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    at = row[:, None] * D + column[None, :]
    mask = (row < N)[:, None] & (column < D)[None, :]
    value = tl.load(x + at, mask=mask, other=0.0)
    if ADD:
        value = value.to(tl.float32) + tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)  # the norm is that of the sum as it is kept
        tl.store(total + at, value, mask=mask)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(rstd + row, scale, mask=row < N)
    factor = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(normed + at, (value * scale[:, None] * factor[None, :]).to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad, grad_total, x, weight, rstd, grad_x, part, N,
    D: tl.constexpr, ADD: tl.constexpr, NEED_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # Wider rows leave no room for the part, which then goes through memory; nothing may be loaded ahead of its store.
    IN_REGISTERS: tl.constexpr = BLOCK_D <= 8192
    tl.static_assert(IN_REGISTERS or STAGES == 1)
    column = tl.arange(0, BLOCK_D)
    factor = tl.load(weight + column, mask=column < D, other=0.0)
    if NEED_WEIGHT:
        to = part + offset(tl.program_id(0), D) + column
    part_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        row = offset(tile, BLOCK_N) + tl.arange(0, BLOCK_N)
        at = row[:, None] * D + column[None, :]
        mask = (row < N)[:, None] & (column < D)[None, :]
        scale = tl.load(rstd + row, mask=row < N, other=0.0)[:, None]
        normed = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale
        back = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if NEED_WEIGHT and IN_REGISTERS:
            part_ND += back * normed
        elif NEED_WEIGHT:
            before = tl.load(to, mask=column < tl.where(tl.program_id(0) < tile, D, 0), other=0.0)
            tl.store(to, before + tl.sum(back * normed, 0), mask=column < D)
            tl.debug_barrier()  # the next row's part is read by other threads than wrote this one
        if not IN_REGISTERS:
            factor = tl.load(weight + column, mask=column < D, other=0.0)
        back *= factor.to(tl.float32)[None, :]
        mean = tl.sum(back * normed, 1) / D
        back = (back - normed * mean[:, None]) * scale
        if ADD:
            back += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + at, back.to(grad_x.dtype.element_ty), mask=mask)
    if NEED_WEIGHT and IN_REGISTERS:
        tl.store(to, tl.sum(part_ND, 0), mask=column < D)


@triton.jit
def _add_up(part, total, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total_PD = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for begin in range(0, P, BLOCK_P):
        row = begin + tl.arange(0, BLOCK_P)
        mask = (row < P)[:, None] & (column < D)[None, :]
        total_PD += tl.load(part + offset(row, D)[:, None] + column[None, :], mask=mask, other=0.0)
    tl.store(total + column, tl.sum(total_PD, 0).to(total.dtype.element_ty), mask=column < D)


def add_up(part_PD: Tensor, like: Tensor) -> Tensor:
    """Sum the rows of fp32 part_PD in a fixed order; the answer is in the shape and dtype of `like`."""
    total, (P, D) = torch.empty_like(like, memory_format=torch.contiguous_format), part_PD.shape
    # A torch reduction splits its work by the size of the GPU, and that would show in the bits.
    _add_up[(triton.cdiv(D, 32),)](part_PD, total, P, D, BLOCK_P=32 if part_PD.is_cuda else 2, BLOCK_D=32)
    return total


def programs(tiles: int, device: torch.device) -> int:
    """Return among how many programs a backward shares its tiles: four or more for each, so that parts stay few."""
    return min(triton.cdiv(tiles, 4), _PROGRAMS) if device.type == "cuda" else min(tiles, 2)


def warps(elements: int) -> int:
    """Return the warps of a program that holds so many elements of each tensor: sixteen a thread, if it can."""
    return min(max(triton.next_power_of_2(elements) // 512, 1), 16)


def _blocks(D: int, device: torch.device) -> dict[str, int]:
    block_D = max(triton.next_power_of_2(D), 16)
    block_N = max(_TILE // block_D, 1) if device.type == "cuda" else 2
    return {"BLOCK_N": block_N, "BLOCK_D": block_D, "num_warps": warps(block_N * block_D)}


def _stages(blocks: dict[str, int], size: int) -> int:
    """Return 2, by which the next rows are fetched while these are worked on, where shared memory of 64 KiB holds them.

    `size`: bytes of an element.
    """
    return 2 if 3 * blocks["BLOCK_N"] * blocks["BLOCK_D"] * size <= 2**16 else 1


@torch.library.custom_op("sigmoe::rms_norm", mutates_args=())
def rms_norm_forward(x: Tensor, branch: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of x and branch (empty without one), its norm, and one over the root mean square of its rows."""
    total, normed, rstd = _empty(x, branch, weight_D, eps)
    D, N = weight_D.numel(), rstd.numel()
    if normed.numel():
        blocks = _blocks(D, x.device)
        _forward[(triton.cdiv(N, blocks["BLOCK_N"]),)](
            x.contiguous(), None if branch is None else branch.contiguous(), weight_D.contiguous(), total, normed, rstd,
            N, eps, D=D, ADD=branch is not None, **blocks,
        )  # fmt: skip
    return total, normed, rstd


@rms_norm_forward.register_fake
def _empty(x: Tensor, branch: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if branch is None else x.shape)
    return total, x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("sigmoe::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, the normed sum, with grad_total added; and of weight_D, empty where not needed."""
    grad_x, grad_weight = _empty_gradients(grad, grad_total, x, weight_D, rstd, need_weight)
    D, N = weight_D.numel(), rstd.numel()
    if not grad_x.numel():
        return grad_x, grad_weight.zero_()
    blocks = _blocks(D, x.device)
    P = programs(triton.cdiv(N, blocks["BLOCK_N"]), x.device)
    part_PD = x.new_empty(P, D, dtype=torch.float32) if need_weight else None
    _backward[(P,)](
        grad.contiguous(), None if grad_total is None else grad_total.contiguous(), x.contiguous(),
        weight_D.contiguous(), rstd, grad_x, part_PD, N,
        D=D, ADD=grad_total is not None, NEED_WEIGHT=need_weight, STAGES=_stages(blocks, x.element_size()), **blocks,
    )  # fmt: skip
    return grad_x, grad_weight if part_PD is None else add_up(part_PD, weight_D)


@rms_norm_backward.register_fake
def _empty_gradients(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight_D.new_empty(weight_D.shape if need_weight else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, branch, weight_D, _ = inputs
    total, _, rstd = output
    ctx.save_for_backward(x if branch is None else total, weight_D, rstd)
    ctx.mark_non_differentiable(rstd, *([total] if branch is None else []))
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_total: Tensor | None, grad: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    grad_x, grad_weight, need = grad_total, None, ctx.needs_input_grad
    if grad is not None:
        grad_x, grad_weight = rms_norm_backward(grad, grad_total, *ctx.saved_tensors, need[2])
    return grad_x if need[0] else None, grad_x if need[1] else None, grad_weight if need[2] else None, None


rms_norm_forward.register_autograd(_differentiate, setup_context=_save)


def compile_cases() -> Iterator[CompileCase]:
    """Yield both passes at a small, a usual and the greatest width, and the sum of the parts."""
    kinds = {"N": "i32:16", "eps": "fp32", "rstd": "*fp32", "part": "*fp32"}
    for D in (128, 4096, MOST_WIDTH):
        blocks = _blocks(D, torch.device("cuda"))
        num_warps = blocks.pop("num_warps")
        for name, kernel in (("norm", _forward), ("norm backward", _backward)):
            constants = {"D": D, "ADD": True, "NEED_WEIGHT": True, "STAGES": _stages(blocks, 2), **blocks}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            signature = {name: kinds.get(name, "*bf16") for name in kernel.arg_names if name not in constants}
            yield CompileCase(
                name=f"{name} D {D}", kernel=kernel, signature=signature, constants=constants, num_warps=num_warps
            )
    signature = {"part": "*fp32", "total": "*bf16", "P": "i32", "D": "i32:16"}
    blocks = {"BLOCK_P": 32, "BLOCK_D": 32}
    yield CompileCase(name="norm sums", kernel=_add_up, signature=signature, constants=blocks)
