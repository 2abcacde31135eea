"""QK-norm and rotary position embedding in Triton: one pass each way, with or without the norm.

A program takes some tokens and all their heads (a group of them where the norm is not of the whole width), as two
halves of a head. Angles are made where they are needed, from positions and frequencies in fp32 as `rotation` makes
them. Triton's own cosine takes a path through memory for angles beyond 100,000, and tables would cost as many bytes as
a key head, so: the angle less its quarter turns in fp64, exact enough for any position below 2^31, and a polynomial.
Kept between the passes: positions and, for the norm, the input and a number a norm.

Shape letters: B sequences, S positions, T = B*S, H heads, C head width, Z = C/2, P programs, N normed rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..norm.triton import add_up, programs, warps
from ..triton import offset

MOST_WIDTH = 256  # of a head
MOST_NORM_WIDTH = 8192  # of a norm over all heads, which lie in the registers of one program
_TILE = 2048  # elements of each half


@triton.jit
def _turns(position, frequency, token, T, Z: tl.constexpr, BLOCK_Z: tl.constexpr):
    """Cosine and sine of tokens' angles, [BLOCK_T, 1, BLOCK_Z]; polynomials of Cephes, sinf.c."""
    z = tl.arange(0, BLOCK_Z)
    place = tl.load(position + token, mask=token < T, other=0).to(tl.float32)
    angle = place[:, None] * tl.load(frequency + z, mask=z < Z, other=0.0)[None, :]
    quarters = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)
    rest = (angle.to(tl.float64) - quarters * 1.5707963267948966).to(tl.float32)
    quarter = quarters.to(tl.int32) & 3
    square = rest * rest
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - 0.5 * square + 1
    is_odd = (quarter & 1) == 1
    cos = tl.where(is_odd, sine, cosine)
    sin = tl.where(is_odd, cosine, sine)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = tl.where(quarter > 1, -sin, sin)
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def _halves(base, at, mask, Z: tl.constexpr):
    first = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(base + Z + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weights(weight, head, z, H, Z: tl.constexpr, NORM: tl.constexpr):
    """Both halves of the norm's weights, [1, BLOCK_H or 1, BLOCK_Z]."""
    at, mask = z[None, None, :], (z < Z)[None, None, :]
    if NORM == 2:
        at = at + head[None, :, None] * (2 * Z)
        mask = mask & (head < H)[None, :, None]
    return _halves(weight, at, mask, Z)


@triton.jit
def _mean(value, H, Z: tl.constexpr, NORM: tl.constexpr):
    """The mean over each head, [BLOCK_T, BLOCK_H, 1], or over all, [BLOCK_T, 1, 1]."""
    mean = tl.sum(value, 2) / (2 * Z)
    if NORM == 2:
        mean = (tl.sum(mean, 1) / H)[:, None]
    return mean[:, :, None]


@triton.jit
def _forward(
    x, position, frequency, weight, out, rstd, stride_b, stride_s, stride_h, S, T, H, eps,
    Z: tl.constexpr, NORM: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    token = offset(tl.program_id(0), BLOCK_T) + tl.arange(0, BLOCK_T)
    head, z = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_Z)
    mask_TH = (token < T)[:, None] & (head < H)[None, :]
    mask = mask_TH[:, :, None] & (z < Z)[None, None, :]
    begin = token // S * stride_b + token % S * stride_s
    at = begin[:, None, None] + offset(head, stride_h)[None, :, None] + z[None, None, :]
    first, second = _halves(x, at, mask, Z)
    if NORM > 0:
        scale = tl.rsqrt(_mean(first * first + second * second, H, Z, NORM) + eps)
        if NORM == 1:
            tl.store(rstd + (token[:, None] * H + head[None, :])[:, :, None], scale, mask=mask_TH[:, :, None])
        else:
            tl.store(rstd + token[:, None, None], scale, mask=(token < T)[:, None, None])
        first_weight, second_weight = _weights(weight, head, z, H, Z, NORM)
        first *= scale * first_weight
        second *= scale * second_weight
    cos, sin = _turns(position, frequency, token, T, Z, BLOCK_Z)
    sin *= SIGN
    to = out + (token[:, None] * H + head[None, :])[:, :, None] * (2 * Z) + z[None, None, :]
    tl.store(to, (first * cos - second * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(to + Z, (second * cos + first * sin).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad, x, position, frequency, weight, rstd, grad_x, part,
    grad_stride_b, grad_stride_s, grad_stride_h, stride_b, stride_s, stride_h, S, T, H,
    Z: tl.constexpr, NORM: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    head, z = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_Z)
    first_weight, second_weight = _weights(weight, head, z, H, Z, NORM)
    first_part = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_Z], tl.float32)
    second_part = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_Z], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.num_programs(0), num_stages=2):  # loads ahead
        token = offset(tile, BLOCK_T) + tl.arange(0, BLOCK_T)
        mask_TH = (token < T)[:, None] & (head < H)[None, :]
        mask = mask_TH[:, :, None] & (z < Z)[None, None, :]
        begin = token // S * grad_stride_b + token % S * grad_stride_s
        at = begin[:, None, None] + offset(head, grad_stride_h)[None, :, None] + z[None, None, :]
        first_grad, second_grad = _halves(grad, at, mask, Z)
        cos, sin = _turns(position, frequency, token, T, Z, BLOCK_Z)
        first_back = first_grad * cos + second_grad * sin
        second_back = second_grad * cos - first_grad * sin
        begin = token // S * stride_b + token % S * stride_s
        at = begin[:, None, None] + offset(head, stride_h)[None, :, None] + z[None, None, :]
        first, second = _halves(x, at, mask, Z)
        if NORM == 1:
            row = (token[:, None] * H + head[None, :])[:, :, None]
            scale = tl.load(rstd + row, mask=mask_TH[:, :, None], other=0.0)
        else:
            scale = tl.load(rstd + token, mask=token < T, other=0.0)[:, None, None]
        first *= scale
        second *= scale
        if NEED_WEIGHT:
            first_part += first_back * first
            second_part += second_back * second
        first_back *= first_weight
        second_back *= second_weight
        mean = _mean(first_back * first + second_back * second, H, Z, NORM)
        to = grad_x + (token[:, None] * H + head[None, :])[:, :, None] * (2 * Z) + z[None, None, :]
        tl.store(to, ((first_back - first * mean) * scale).to(grad_x.dtype.element_ty), mask=mask)
        tl.store(to + Z, ((second_back - second * mean) * scale).to(grad_x.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        first_HZ, second_HZ = tl.sum(first_part, 0), tl.sum(second_part, 0)
        program = offset(tl.program_id(0), tl.num_programs(1)) + tl.program_id(1)
        if NORM == 1:
            to = part + program * (2 * Z) + z
            tl.store(to, tl.sum(first_HZ, 0), mask=z < Z)
            tl.store(to + Z, tl.sum(second_HZ, 0), mask=z < Z)
        else:
            to = part + (program * H + head[:, None]) * (2 * Z) + z[None, :]
            mask_HZ = (head < H)[:, None] & (z < Z)[None, :]
            tl.store(to, first_HZ, mask=mask_HZ)
            tl.store(to + Z, second_HZ, mask=mask_HZ)


def _kind(weight: Tensor | None, C: int) -> int:
    """0: no norm; 1: of each head; 2: of the whole width (one head's is both, and then the first)."""
    return 0 if weight is None else 1 if weight.numel() == C else 2


def _blocks(H: int, C: int, kind: int, device: torch.device) -> dict[str, int]:
    tile = _TILE if device.type == "cuda" else 64
    block_Z, block_H = max(triton.next_power_of_2(C // 2), 8), triton.next_power_of_2(H)
    if kind < 2:
        block_H = min(block_H, max(tile // block_Z, 1))
    block_T = max(tile // (block_H * block_Z), 1)
    num_warps = warps(2 * block_T * block_H * block_Z)
    return {"BLOCK_T": block_T, "BLOCK_H": block_H, "BLOCK_Z": block_Z, "num_warps": num_warps}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _turn(
    x_BSHC: Tensor, position_BS: Tensor, frequency_Z: Tensor, weight: Tensor | None, rstd: Tensor | None,
    eps: float, sign: int,
) -> Tensor:  # fmt: skip
    (B, S, H, C), x_BSHC = x_BSHC.shape, _rows(x_BSHC)
    out_BSHC = x_BSHC.new_empty(B, S, H, C)
    if out_BSHC.numel():
        kind = _kind(weight, C)
        blocks = _blocks(H, C, kind, x_BSHC.device)
        _forward[(triton.cdiv(B * S, blocks["BLOCK_T"]), triton.cdiv(H, blocks["BLOCK_H"]))](
            x_BSHC, position_BS.contiguous(), frequency_Z, weight, out_BSHC, rstd, *x_BSHC.stride()[:3], S, B * S, H,
            eps, Z=C // 2, NORM=kind, SIGN=sign, **blocks,
        )  # fmt: skip
    return out_BSHC


@torch.library.custom_op("sigmoe::rope", mutates_args=())
def rope_forward(
    x_BSHC: Tensor, position_BS: Tensor, frequency_Z: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return x_BSHC normed by weight, where there is one, and rotated; and one over each norm's root mean square."""
    _, rstd = _empty(x_BSHC, position_BS, frequency_Z, weight, eps)
    weight = None if weight is None else weight.contiguous()
    return _turn(x_BSHC, position_BS, frequency_Z, weight, None if weight is None else rstd, eps, 1), rstd


@rope_forward.register_fake
def _empty(
    x_BSHC: Tensor, position_BS: Tensor, frequency_Z: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    kind = _kind(weight, x_BSHC.shape[-1])
    rows = 0 if kind == 0 else x_BSHC.shape[: 4 - kind]
    return x_BSHC.new_empty(x_BSHC.shape), x_BSHC.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("sigmoe::rope_backward", mutates_args=())
def rope_backward(
    grad_BSHC: Tensor,
    position_BS: Tensor,
    frequency_Z: Tensor,
    x_BSHC: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x_BSHC and, where it is there and needed, of weight; x_BSHC is not without one."""
    _, grad_weight = _empty_gradients(grad_BSHC, position_BS, frequency_Z, x_BSHC, weight, rstd, need_weight)
    if x_BSHC is None or weight is None:  # a rotation's transpose is the rotation back
        return _turn(grad_BSHC, position_BS, frequency_Z, None, None, 0.0, -1), grad_weight
    grad_x = grad_BSHC.new_empty(x_BSHC.shape)
    if not grad_x.numel():
        return grad_x, grad_weight.zero_()
    (B, S, H, C), kind = x_BSHC.shape, _kind(weight, x_BSHC.shape[-1])
    grad_BSHC, x_BSHC, blocks = _rows(grad_BSHC), _rows(x_BSHC), _blocks(H, C, kind, x_BSHC.device)
    grid = programs(triton.cdiv(B * S, blocks["BLOCK_T"]), x_BSHC.device), triton.cdiv(H, blocks["BLOCK_H"])
    part = x_BSHC.new_empty(grid[0] * grid[1], weight.numel(), dtype=torch.float32) if need_weight else None
    _backward[grid](
        grad_BSHC, x_BSHC, position_BS.contiguous(), frequency_Z, weight.contiguous(), rstd, grad_x, part,
        *grad_BSHC.stride()[:3], *x_BSHC.stride()[:3], S, B * S, H,
        Z=C // 2, NORM=kind, NEED_WEIGHT=need_weight, **blocks,
    )  # fmt: skip
    return grad_x, grad_weight if part is None else add_up(part, weight)


@rope_backward.register_fake
def _empty_gradients(
    grad_BSHC: Tensor,
    position_BS: Tensor,
    frequency_Z: Tensor,
    x_BSHC: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_weight = grad_BSHC.new_empty(0)
    if weight is not None and need_weight:
        grad_weight = weight.new_empty(weight.shape)
    return grad_BSHC.new_empty(grad_BSHC.shape), grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BSHC, position_BS, frequency_Z, weight, _ = inputs
    kept = (None, None, None) if weight is None else (x_BSHC, weight, output[1])
    ctx.save_for_backward(position_BS, frequency_Z, *kept)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    if grad is None:
        return (None,) * 5
    need = ctx.needs_input_grad
    grad_x, grad_weight = rope_backward(grad, *ctx.saved_tensors, need[3])
    return grad_x if need[0] else None, None, None, grad_weight if need[3] else None, None


rope_forward.register_autograd(_differentiate, setup_context=_save)


def compile_cases() -> Iterator[CompileCase]:
    """Yield both passes without a norm, with one of each head, and of the whole width."""
    kinds = {"position": "*i64", "frequency": "*fp32", "rstd": "*fp32", "part": "*fp32", "eps": "fp32"}
    kinds |= dict.fromkeys(("x", "grad", "weight", "out", "grad_x"), "*bf16")
    for title, kernel, H, C, kind in (
        ("rope", _forward, 32, 128, 0),
        ("rope, heads normed", _forward, 4, 128, 1),
        ("rope, heads normed, backward", _backward, 32, 128, 1),
        ("rope, width normed", _forward, 16, 128, 2),
        ("rope, width normed, backward", _backward, 64, 128, 2),
    ):
        blocks = _blocks(H, C, kind, torch.device("cuda"))
        num_warps = blocks.pop("num_warps")
        constants: dict[str, object] = {"Z": C // 2, "NORM": kind, "SIGN": 1, "NEED_WEIGHT": True, **blocks}
        constants |= {"weight": None, "rstd": None} if kind == 0 else {}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {name: kinds.get(name, "i32:16") for name in kernel.arg_names if name not in constants}
        signature |= {"H": "i32"}
        yield CompileCase(name=title, kernel=kernel, signature=signature, constants=constants, num_warps=num_warps)
