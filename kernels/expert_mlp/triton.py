"""The experts' SwiGLU feed-forward in Triton: of rows as they stand, or fetched, weighted and summed by token.

Forward: up (a row is fetched where the product reads it; gate and up columns alternate, so that one sum holds both)
with SwiGLU on the sums, down, and the sum over a token's rows. Backward, in five steps: the gradient of the hidden
rows, on whose way out the activation is remade; the down weights'; the rows'; the up weights'; the sum over a token's
rows. Kept between them: what came in, the pre-activation, and where rows went. Nothing of R x D, no atomics, no word
to the host.

Shape letters: T tokens, N routed pairs, R rows (with capacity fewer than N; what is made by rows is then N long), D
model width, F expert hidden width, G = 2F (gate rows, then up rows), E experts, K top-k, C columns of blocks over F.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..grouped.triton import (
    accumulate,
    blocks_of,
    configs,
    list_blocks,
    multiply,
    multiply_rows,
    place_of,
    product_cases,
    tiles_of,
)
from ..permute.triton import combine_forward
from ..triton import offset, tuned


@triton.jit
def _up(
    x, source, weight, work, hidden, act, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = SPAN * BLOCK_K
    HALF: tl.constexpr = BLOCK_N // 2
    COLUMNS: tl.constexpr = (F + HALF - 1) // HALF
    blocks = tl.load(work + 3)
    for tile in tl.range(tl.program_id(0), blocks * COLUMNS, tl.num_programs(0)):
        block, column = place_of(tile, blocks, COLUMNS)
        row = tl.load(work + block * 4 + 1) + tl.arange(0, BLOCK_M)
        end = tl.load(work + block * 4 + 2)
        token = tl.minimum(row, end - 1)
        if GATHER:
            token = tl.load(source + token) // K
        n = tl.arange(0, BLOCK_N)
        f = column * HALF + n // 2
        weight_N = weight + offset(tl.load(work + block * 4), 2 * F * D) + offset(f + n % 2 * F, D)
        sum_MN = accumulate(x + offset(token, D), weight_N, f < F, D, 1, F % HALF == 0, BLOCK_M, BLOCK_N, BLOCK_K)
        gate, up = tl.split(tl.reshape(sum_MN, [BLOCK_M, HALF, 2]))
        gate, up = gate.to(hidden.dtype.element_ty), up.to(hidden.dtype.element_ty)
        f = column * HALF + tl.arange(0, HALF)
        mask = (row < end)[:, None] & (f < F)[None, :]
        to = hidden + offset(row, 2 * F)[:, None] + f[None, :]
        tl.store(to, gate, mask=mask)
        tl.store(to + F, up, mask=mask)
        wide = gate.to(tl.float32)  # as the backward will read it
        value = wide / (1 + tl.exp(-wide)) * up.to(tl.float32)
        tl.store(act + offset(row, F)[:, None] + f[None, :], value.to(act.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(grad, hidden, grad_hidden, act, share, row, f, inside, F: tl.constexpr):
    """Turn a piece of the activation's gradient into the hidden rows'; return its product with the activation."""
    mask = inside[:, None] & (f < F)[None, :]
    at = row[:, None] * (2 * F) + f[None, :]
    gate = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(hidden + at + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    value = silu * up
    dot = tl.sum(grad * value, 1)
    grad *= share[:, None]
    dtype = act.dtype.element_ty
    tl.store(act + row[:, None] * F + f[None, :], (value * share[:, None]).to(dtype), mask=mask)
    tl.store(grad_hidden + at, (grad * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), mask=mask)
    tl.store(grad_hidden + at + F, (grad * silu).to(dtype), mask=mask)
    return dot


@triton.jit
def _down_backward(
    grad, source, share, weight, work, hidden, grad_hidden, act, dot,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    tl.static_assert(SPAN == 2)
    COLUMNS: tl.constexpr = (F + 2 * BLOCK_K - 1) // (2 * BLOCK_K)
    blocks = tl.load(work + 3)
    for tile in tl.range(tl.program_id(0), blocks * COLUMNS, tl.num_programs(0)):
        block, column = place_of(tile, blocks, COLUMNS)
        first, end = tl.load(work + block * 4 + 1), tl.load(work + block * 4 + 2)
        row = tl.arange(0, BLOCK_M)
        token = tl.minimum(first + row, end - 1)
        if GATHER:
            token = tl.load(source + token) // K
        f = column * 2 * BLOCK_K + tl.arange(0, 2 * BLOCK_K)
        base = weight + offset(tl.load(work + block * 4), F * D)
        sum_MF = accumulate(
            grad + offset(token, D), base + f, f < F, D, F, F % (2 * BLOCK_K) == 0, BLOCK_M, 2 * BLOCK_K, BLOCK_K
        )
        inside = first + row < end
        pair, weights = first + row, tl.full([BLOCK_M], 1.0, tl.float32)
        if GATHER:
            pair = tl.load(source + pair, mask=inside, other=0)
            weights = tl.load(share + pair, mask=inside, other=0.0)
        # Two pieces one after the other: at once they would not fit in the registers.
        left, right = tl.split(tl.permute(tl.reshape(sum_MF, [BLOCK_M, 2, BLOCK_K]), 0, 2, 1))
        hidden_M, grad_M, act_M = (
            hidden + offset(first, 2 * F),
            grad_hidden + offset(first, 2 * F),
            act + offset(first, F),
        )
        f = column * 2 * BLOCK_K + tl.arange(0, BLOCK_K)
        total = _swiglu_backward(left, hidden_M, grad_M, act_M, weights, row, f, inside, F)
        total += _swiglu_backward(right, hidden_M, grad_M, act_M, weights, row, f + BLOCK_K, inside, F)
        if GATHER:
            tl.store(dot + pair * COLUMNS + column, total, mask=inside)


_SIZES: dict[str, object] = {"D": 2048, "F": 768}  # Qwen3-30B-A3B
# By bytes of an element.
_UP = {2: configs((4, 3), (4, 4), (2, 4)), 4: configs((2, 3), (2, 4))}
_DOWN_BACKWARD = {2: configs((2, 3), (2, 4)), 4: configs((2, 3), (2, 4))}
_KEY = ["D", "F", "GATHER"]  # fetched rows take other shared memory than those that stand
_up_by_size = {size: tuned(several, _KEY)(_up) for size, several in _UP.items()}
_down_backward_by_size = {size: tuned(several, _KEY)(_down_backward) for size, several in _DOWN_BACKWARD.items()}


@torch.library.custom_op("sigmoe::expert_mlp", mutates_args=())
def expert_mlp_forward(
    x_TD: Tensor,
    weight_TK: Tensor | None,
    row_TK: Tensor | None,
    source_N: Tensor | None,
    count_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return x_TD through the experts, and the hidden rows.

    With weight_TK (fp32), row_TK and source_N, all or none of them, rows are fetched and a token's rows summed; else
    x_TD is the rows.
    """
    x_TD, gate_up_EGD, down_EDF = x_TD.contiguous(), gate_up_EGD.contiguous(), down_EDF.contiguous()
    R, (D, F) = (x_TD if source_N is None else source_N).shape[0], down_EDF.shape[1:]
    hidden_RG, act_RF = x_TD.new_empty(R, 2 * F), x_TD.new_empty(R, F)
    if R == 0:
        return torch.zeros_like(x_TD), hidden_RG
    work_L4, _ = list_blocks(count_E, x_TD, R)
    _up_by_size[x_TD.element_size()][tiles_of(work_L4, 2 * F)](
        x_TD, source_N, gate_up_EGD, work_L4, hidden_RG, act_RF,
        D=D, F=F, K=_top_k(row_TK), GATHER=source_N is not None, **blocks_of(x_TD),
    )  # fmt: skip
    rows_RD = multiply(act_RF, down_EDF, work_L4)
    return rows_RD if row_TK is None else combine_forward(rows_RD, weight_TK, row_TK), hidden_RG


@expert_mlp_forward.register_fake
def _empty(
    x_TD: Tensor,
    weight_TK: Tensor | None,
    row_TK: Tensor | None,
    source_N: Tensor | None,
    count_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
) -> tuple[Tensor, Tensor]:
    R = x_TD.shape[0] if source_N is None else source_N.shape[0]
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(R, gate_up_EGD.shape[1])


def _top_k(row_TK: Tensor | None) -> int:
    return 1 if row_TK is None else row_TK.shape[1]


@torch.library.custom_op("sigmoe::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor | None,
    row_TK: Tensor | None,
    source_N: Tensor | None,
    count_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    hidden_RG: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x_TD, weight_TK, gate_up_EGD and down_EDF.

    `needs` x_TD, gate_up_EGD and down_EDF a gradient? Where not, it is empty, as weight_TK's where that is not given.
    """
    grad_TD, x_TD, gate_up_EGD, down_EDF = (x.contiguous() for x in (grad_TD, x_TD, gate_up_EGD, down_EDF))
    K, R, (D, F) = _top_k(row_TK), hidden_RG.shape[0], down_EDF.shape[1:]
    work_L4, end_E = list_blocks(count_E, x_TD, R)
    grad_RG, act_RF = torch.empty_like(hidden_RG), hidden_RG.new_empty(R, F)
    blocks = blocks_of(x_TD)
    columns = triton.cdiv(F, 2 * blocks["BLOCK_K"])
    weight_TK = None if weight_TK is None else weight_TK.contiguous()
    # A dropped pair has no row, and its weight no gradient.
    dot_TKC = None if row_TK is None else x_TD.new_zeros(*row_TK.shape, columns, dtype=torch.float32)
    if R:
        _down_backward_by_size[x_TD.element_size()][tiles_of(work_L4, F)](
            grad_TD, source_N, weight_TK, down_EDF, work_L4, hidden_RG, grad_RG, act_RF, dot_TKC,
            D=D, F=F, K=K, GATHER=source_N is not None, **blocks,
        )  # fmt: skip
    grad_x, grad_weight, grad_gate_up, grad_down = (x_TD.new_empty(0) for _ in range(4))
    if needs[2]:
        grad_down = multiply_rows(grad_TD, act_RF, end_E, source_N, K, gather="left")
    del act_RF
    if needs[0]:
        grad_x = multiply(grad_RG, gate_up_EGD, work_L4, transposed=True)
        grad_x = grad_x if row_TK is None else combine_forward(grad_x, None, row_TK)
    if needs[1]:
        grad_gate_up = multiply_rows(grad_RG, x_TD, end_E, source_N, K, gather="right")
    if dot_TKC is not None:
        grad_weight = dot_TKC.sum(-1)
    return grad_x, grad_weight, grad_gate_up, grad_down


@expert_mlp_backward.register_fake
def _empty_gradients(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor | None,
    row_TK: Tensor | None,
    source_N: Tensor | None,
    count_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    hidden_RG: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = x_TD.new_empty
    wanted = zip((x_TD, gate_up_EGD, down_EDF), needs, strict=True)
    grad_x, grad_gate_up, grad_down = (new(x.shape) if need else new(0) for x, need in wanted)
    grad_weight = new(0) if weight_TK is None else weight_TK.new_empty(weight_TK.shape)
    return grad_x, grad_weight, grad_gate_up, grad_down


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    need = ctx.needs_input_grad
    needs = [need[0], need[5], need[6]]
    grads = expert_mlp_backward(grad, *ctx.saved_tensors, needs)
    x, weight, gate_up, down = (
        one if wanted else None for one, wanted in zip(grads, (need[0], need[1], need[5], need[6]))
    )
    return x, weight, None, None, None, gate_up, down


expert_mlp_forward.register_autograd(_differentiate, setup_context=_save)


def compile_cases() -> Iterator[CompileCase]:
    """Yield up and the way back through down, with rows fetched and as they stand."""
    for kernel, name, chosen in ((_up, "up", _UP), (_down_backward, "down backward", _DOWN_BACKWARD)):
        yield from product_cases(f"experts {name}, rows fetched", kernel, chosen, _SIZES | {"K": 8, "GATHER": True})
        absent = dict.fromkeys({"source", "share", "dot"} & set(kernel.arg_names))
        rows = _SIZES | {"K": 1, "GATHER": False} | absent
        yield from product_cases(f"experts {name}", kernel, {2: chosen[2][:1]}, rows)
