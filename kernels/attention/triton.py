"""Attention in Triton: forward, a deterministic backward in two passes, and new tokens over kept keys.

A block of queries runs through the blocks of keys from its documents' (or window's) first key to its own last one:
without a mask where all of its queries see all of the keys, with one at both edges. Where the edges lie the kernels
find out by themselves, so the host never waits. Kept for the backward: what came in, the output, and a number a row
and head.

Shape letters: B sequences, S positions, J kept positions, H query heads, G kv heads, C head width, T = B*S*H, U parts.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..compile_case import CompileCase
from .triton_backward import backward_keys, backward_queries
from .triton_decode import extend, join
from .triton_forward import forward

MOST_WIDTH = 256
_HOPPER, _AMPERE = range(90, 1000), range(80, 90)
# By architecture, pass and width: queries and keys of a block, stages; eight warps. The largest blocks that do not
# spill in bf16 and fp16 (keys at width 256 on Hopper do).
_BLOCKS = {
    _HOPPER: {
        "forward": {64: (128, 128, 3), 128: (128, 64, 3), 256: (64, 32, 2)},
        "queries": {64: (128, 64, 2), 128: (128, 64, 2), 256: (64, 16, 2)},
        "keys": {64: (64, 128, 2), 128: (32, 128, 2), 256: (32, 64, 2)},
    },
    _AMPERE: {
        "forward": {64: (128, 128, 3), 128: (128, 32, 3), 256: (64, 32, 2)},
        "queries": {64: (128, 64, 2), 128: (64, 64, 2), 256: (64, 16, 2)},
        "keys": {64: (32, 128, 2), 128: (32, 64, 2), 256: (16, 64, 2)},
    },
}
_BLOCKS_FP32 = {64: (32, 32, 2), 128: (32, 32, 2), 256: (16, 16, 2)}  # without tensor cores


def _blocks(x: Tensor, name: str) -> dict[str, int]:
    """Blocks, warps and stages of a pass."""
    if not x.is_cuda:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_C": _width(x.shape[-1])}
    if x.dtype == torch.float32:
        return _launch(x.shape[-1], _BLOCKS_FP32)
    architectures = _HOPPER if _capability(x.device.index) in _HOPPER else _AMPERE
    return _launch(x.shape[-1], _BLOCKS[architectures][name])


def _launch(C: int, by_width: dict[int, tuple[int, int, int]]) -> dict[str, int]:
    block_M, block_N, num_stages = by_width[max(64, _width(C))]
    blocks = {"BLOCK_M": block_M, "BLOCK_N": block_N, "BLOCK_C": _width(C)}
    return blocks | {"num_warps": 8, "num_stages": num_stages}


def _width(C: int) -> int:
    width: int = max(16, triton.next_power_of_2(C))
    return width


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _programs(x: Tensor) -> int:
    """How many programs are wanted at least."""
    return 512 if x.is_cuda else 6


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of sequence, position and head, of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]


@torch.library.custom_op("sigmoe::attention", mutates_args=())
def attention_forward(
    q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, start_BS: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, and the base-2 logarithm of the sum of each row's exponentials, fp32 [B, H, S]."""
    out_BSHC, lse_BHS = _empty(q_BSHC, k_BSGC, v_BSGC, start_BS, window, scale)
    B, S, H, C = q_BSHC.shape
    q_BSHC, k_BSGC, v_BSGC = _rows(q_BSHC), _rows(k_BSGC), _rows(v_BSGC)
    if out_BSHC.numel():
        blocks = _blocks(q_BSHC, "forward")
        forward[(B * H, triton.cdiv(S, blocks["BLOCK_M"]))](
            q_BSHC, k_BSGC, v_BSGC, start_BS.contiguous(), out_BSHC, lse_BHS, *_strides(q_BSHC, k_BSGC, v_BSGC),
            S, S if window is None else window, scale * math.log2(math.e), H=H, G=k_BSGC.shape[2], C=C, **blocks,
        )  # fmt: skip
    return out_BSHC, lse_BHS


@attention_forward.register_fake
def _empty(
    q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, start_BS: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q_BSHC.shape
    return q_BSHC.new_empty(q_BSHC.shape), q_BSHC.new_empty(B, H, S, dtype=torch.float32)


@torch.library.custom_op("sigmoe::attention_backward", mutates_args=())
def attention_backward(
    grad_BSHC: Tensor,
    q_BSHC: Tensor,
    k_BSGC: Tensor,
    v_BSGC: Tensor,
    start_BS: Tensor,
    out_BSHC: Tensor,
    lse_BHS: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q_BSHC, k_BSGC and v_BSGC."""
    (B, S, H, C), G = q_BSHC.shape, k_BSGC.shape[2]
    grad_q, grad_k, grad_v = _empty_gradients(
        grad_BSHC, q_BSHC, k_BSGC, v_BSGC, start_BS, out_BSHC, lse_BHS, window, scale
    )
    if grad_q.numel() == 0:
        return grad_q, grad_k, grad_v
    q_BSHC, k_BSGC, v_BSGC = _rows(q_BSHC), _rows(k_BSGC), _rows(v_BSGC)
    inputs, delta_BHS = (q_BSHC, k_BSGC, v_BSGC, start_BS.contiguous()), torch.empty_like(lse_BHS)
    grad_BSHC = grad_BSHC.contiguous()
    numbers = *_strides(*inputs[:3]), S, S if window is None else window, scale * math.log2(math.e), scale
    blocks = _blocks(q_BSHC, "queries")
    backward_queries[(B * H, triton.cdiv(S, blocks["BLOCK_M"]))](
        *inputs, out_BSHC, lse_BHS, grad_BSHC, delta_BHS, grad_q, *numbers, H=H, G=G, C=C, **blocks
    )
    blocks = _blocks(q_BSHC, "keys")
    num_blocks = triton.cdiv(S, blocks["BLOCK_N"])
    parts = _parts(B * G * num_blocks, H // G, _programs(q_BSHC))
    sums = (grad_k, grad_v) if parts == 1 else q_BSHC.new_empty(2, parts, B, S, G, C, dtype=torch.float32).unbind()
    backward_keys[(B * G * parts, num_blocks)](
        *inputs, lse_BHS, grad_BSHC, delta_BHS, *sums, *numbers, H=H, G=G, HEADS=H // G // parts, C=C, **blocks
    )
    if parts > 1:
        grad_k, grad_v = (part.sum(0).to(k_BSGC.dtype) for part in sums)
    return grad_q, grad_k, grad_v


def _parts(programs: int, heads: int, wanted: int) -> int:
    """In how many parts to sum the `heads` of a kv head: the fewest that make the programs that are wanted."""
    return next((parts for parts in range(1, heads) if heads % parts == 0 and parts * programs >= wanted), heads)


@attention_backward.register_fake
def _empty_gradients(
    grad_BSHC: Tensor,
    q_BSHC: Tensor,
    k_BSGC: Tensor,
    v_BSGC: Tensor,
    start_BS: Tensor,
    out_BSHC: Tensor,
    lse_BHS: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.shape) for x in (q_BSHC, k_BSGC, v_BSGC))
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.window, ctx.scale = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *attention_backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale), None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("sigmoe::cached_attention", mutates_args=())
def attention_over_cache(
    q_BSHC: Tensor, k_BGJC: Tensor, v_BGJC: Tensor, start_BS: Tensor, first: int, window: int | None
) -> Tensor:
    """Return the output of the last S of the J kept positions, of which the first one is `first`."""
    (B, S, H, C), (G, J) = q_BSHC.shape, k_BGJC.shape[1:3]
    out_BSHC = q_BSHC.new_empty(q_BSHC.shape)
    if out_BSHC.numel() == 0:
        return out_BSHC
    q_BSHC, k_BGJC, v_BGJC = _rows(q_BSHC), _rows(k_BGJC), _rows(v_BGJC)
    T, rows, block_C, on_gpu = B * S * H, S * (H // G), _width(C), q_BSHC.is_cuda
    block_R = min(max(16, triton.next_power_of_2(rows)), 64)
    block_N = min(64, 16384 // (block_C * q_BSHC.element_size())) if on_gpu else 16
    row_blocks = triton.cdiv(rows, block_R)
    # Whole blocks, four of them at least.
    part_keys = max(triton.cdiv(triton.cdiv(J, block_N) * B * G * row_blocks, _programs(q_BSHC)), 4) * block_N
    U = triton.cdiv(J, part_keys)
    sums_UTC = q_BSHC.new_empty(U, T, C, dtype=torch.float32)
    tops_UT, totals_UT = q_BSHC.new_empty(2, U, T, dtype=torch.float32).unbind()
    extend[(B * G, U, row_blocks)](
        q_BSHC, k_BGJC, v_BGJC, start_BS, sums_UTC, tops_UT, totals_UT,
        *_strides(q_BSHC), *(x.stride(axis) for x in (k_BGJC, v_BGJC) for axis in (0, 2, 1)), *start_BS.stride(),
        S, J, first, first + J if window is None else window, part_keys, C**-0.5 * math.log2(math.e),
        H=H, G=G, C=C, BLOCK_R=block_R, BLOCK_N=block_N, BLOCK_C=block_C,
    )  # fmt: skip
    block_T = max(1, 1024 // block_C) if on_gpu else 16
    join[(triton.cdiv(T, block_T),)](
        sums_UTC, tops_UT, totals_UT, out_BSHC, T, U, C=C, BLOCK_T=block_T, BLOCK_C=block_C
    )
    return out_BSHC


@attention_over_cache.register_fake
def _empty_new(
    q_BSHC: Tensor, k_BGJC: Tensor, v_BGJC: Tensor, start_BS: Tensor, first: int, window: int | None
) -> Tensor:
    return q_BSHC.new_empty(q_BSHC.shape)


def compile_cases() -> Iterator[CompileCase]:
    """Yield the passes at three widths, with groups of query heads and without, and the two kernels over a cache."""
    kernels = {"forward": forward, "queries": backward_queries, "keys": backward_keys}
    for architectures, passes in _BLOCKS.items():
        for name, C, G in ((name, C, G) for name in passes for C, G in ((64, 16), (128, 2), (256, 16))):
            values: dict[str, Any] = _launch(C, passes[name]) | {"H": 16, "G": G, "C": C}
            values |= {"HEADS": 16 // G} if name == "keys" else {}
            title = f"attention {name} C {C}, {16 // G} heads a group"
            yield _case(title, kernels[name], values, is_product=True, architectures=architectures, may_spill=C > 128)
    for C, rows in ((128, 16), (256, 64)):
        values = {"H": 64, "G": 4, "C": C, "BLOCK_R": rows, "BLOCK_N": 8192 // C, "BLOCK_C": C}
        yield _case(f"attention over a cache C {C}, {rows} rows", extend, values, may_spill=C > 128)
    yield _case("attention over a cache, sums", join, {"C": 128, "BLOCK_T": 8, "BLOCK_C": 128})


def _case(name: str, kernel: Any, values: dict[str, Any], **options: Any) -> CompileCase:
    launch = {key: values.pop(key) for key in ("num_warps", "num_stages") if key in values}
    kinds = {"start": "*i64", "scale": "fp32", "natural_scale": "fp32"} | dict.fromkeys(
        "J first_key part_keys U".split(), "i32"
    )
    kinds |= dict.fromkeys("lse delta sums tops totals".split(), "*fp32")
    kinds |= dict.fromkeys("q k v out grad grad_q grad_k grad_v".split(), "*bf16")
    signature = {key: kinds.get(key, "i32:16") for key in kernel.arg_names if key not in values}
    return CompileCase(name=name, kernel=kernel, signature=signature, constants=values, **launch, **options)
