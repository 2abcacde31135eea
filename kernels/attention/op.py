"""Causal grouped-query attention over packed documents, a block of query rows at a time.

A block of queries sees the keys from the earliest document start (or window edge) of its rows to its own last row, so
the upper triangle and what lies before documents and windows is never computed, and no S x S mask exists. Nothing but
the inputs is kept for the backward, which takes the softmax of each block again.

Shape letters: B sequences, S positions, H query heads, G kv heads, C head width, N = B*G, P = H/G query heads a kv
head, M query rows of a block (queries * P), J keys of a block.
"""

import math
from typing import Any, NamedTuple

import torch

from ..backend import Backend

_QUERY_BLOCK = 64


class _Block(NamedTuple):
    """Queries begin..end see keys first..end, of which those before `masked` are visible to all of them."""

    begin: int
    end: int
    first: int
    masked: int
    bounded: bool
    """Whether document starts hide keys from `first` on."""
    window: int | None
    """The window, where it hides keys from `first` on."""


def attention(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    start_BS: torch.Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    backend: Backend = "torch",
) -> torch.Tensor:
    """Softmax attention; query i sees key j where `start[i] <= j <= i` and, with a window, `i - j < window`.

    q_BSHC [B, S, H, C]; k_BSGC and v_BSGC [B, S, G, C] of the same dtype, G dividing H; start_BS int64 [B, S], the
    first position of each token's document inside its sequence; scale defaults to C**-0.5. Scores and sums are fp32.
    Returns [B, S, H, C] in q's dtype. Raises ValueError if G does not divide H, the window is below 1, or for what
    Triton does not do: fp64, heads wider than 256, a scale that is not positive.
    """
    H, C = q_BSHC.shape[2:]
    G = k_BSGC.shape[2]
    if H % G:
        raise ValueError(
            f"attention: the number of kv heads must divide the number of query heads; {G} does not divide {H}"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1 (the token itself) or None, not {window}")
    scale = C**-0.5 if scale is None else scale
    if backend == "triton":
        return _triton_attention(q_BSHC, k_BSGC, v_BSGC, start_BS, window, scale)
    wide = torch.promote_types(q_BSHC.dtype, torch.float32)
    inputs = (q_BSHC.to(wide), k_BSGC.to(wide), v_BSGC.to(wide))
    out_BSHC: torch.Tensor = _Attention.apply(*inputs, start_BS, _blocks(start_BS, window), scale)  # type: ignore[no-untyped-call]
    return out_BSHC.to(q_BSHC.dtype)


def _triton_attention(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    start_BS: torch.Tensor,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    from .triton import attention_forward

    check_triton(q_BSHC, scale)
    out_BSHC: torch.Tensor = attention_forward(q_BSHC, k_BSGC, v_BSGC, start_BS, window, scale)[0]
    return out_BSHC


def check_triton(q_BSHC: torch.Tensor, scale: float) -> None:
    """Raise ValueError for what Triton's attention does not do."""
    from .triton import MOST_WIDTH

    if q_BSHC.dtype not in (torch.float32, torch.bfloat16, torch.float16) or q_BSHC.shape[-1] > MOST_WIDTH:
        raise ValueError(
            f"the Triton attention takes fp32, bf16 and fp16 and heads up to {MOST_WIDTH} wide, got {q_BSHC.dtype} and "
            f"{q_BSHC.shape[-1]}: use kernels=torch"
        )
    if scale <= 0:
        raise ValueError(f"the Triton attention takes a positive scale, got {scale}: use kernels=torch")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHC: torch.Tensor,
        k_BSGC: torch.Tensor,
        v_BSGC: torch.Tensor,
        start_BS: torch.Tensor,
        blocks: list[_Block],
        scale: float,
    ) -> torch.Tensor:
        G, P = k_BSGC.shape[2], q_BSHC.shape[2] // k_BSGC.shape[2]
        q_NMC, k_NSC, v_NSC = _fold(q_BSHC * scale, G), _fold(k_BSGC, G), _fold(v_BSGC, G)
        out_NMC, scratch = torch.empty_like(q_NMC), _scratch(q_NMC, blocks, P, 1)
        for block in blocks:
            rows, keys = slice(block.begin * P, block.end * P), slice(block.first, block.end)
            weight_NMJ = _weights(q_NMC[:, rows], k_NSC[:, keys], block, start_BS, scratch[0])
            out_NMC[:, rows] = torch.bmm(weight_NMJ, v_NSC[:, keys])
        ctx.save_for_backward(q_NMC, k_NSC, v_NSC, start_BS)
        ctx.blocks, ctx.scale, ctx.shape = blocks, scale, (G, P)
        return _unfold(out_NMC, G, P)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_NMC, k_NSC, v_NSC, start_BS = ctx.saved_tensors
        G, P = ctx.shape
        grad_NMC, scratch = _fold(grads[0], G), _scratch(q_NMC, ctx.blocks, P, 2)
        # Key and value gradients grow transposed: [C, M] @ [M, J] runs a fifth faster than [J, M] @ [M, C] in MKL.
        grad_q = torch.empty_like(q_NMC)
        grad_k_NCS, grad_v_NCS = (torch.zeros_like(k_NSC.mT, memory_format=torch.contiguous_format) for _ in range(2))
        for block in ctx.blocks:
            rows, keys = slice(block.begin * P, block.end * P), slice(block.first, block.end)
            weight_NMJ = _weights(q_NMC[:, rows], k_NSC[:, keys], block, start_BS, scratch[0])
            grad_v_NCS[:, :, keys] += torch.bmm(grad_NMC[:, rows].mT, weight_NMJ)
            grad_NMJ = _view(scratch[1], weight_NMJ.shape)
            torch.bmm(grad_NMC[:, rows], v_NSC[:, keys].mT, out=grad_NMJ)
            torch._softmax_backward_data(grad_NMJ, weight_NMJ, -1, grad_NMJ.dtype, grad_input=grad_NMJ)
            grad_q[:, rows] = torch.bmm(grad_NMJ, k_NSC[:, keys])
            grad_k_NCS[:, :, keys] += torch.bmm(q_NMC[:, rows].mT, grad_NMJ)
        return (
            _unfold(grad_q.mul_(ctx.scale), G, P),
            _unfold(grad_k_NCS.mT, G, 1),
            _unfold(grad_v_NCS.mT, G, 1),
            None,
            None,
            None,
        )


def _blocks(start_BS: torch.Tensor, window: int | None) -> list[_Block]:
    B, S = start_BS.shape
    if B * S == 0:
        return []
    earliest, latest = torch.stack(start_BS.aminmax(dim=0)).tolist()
    blocks = []
    for begin in range(0, S, _QUERY_BLOCK):
        end = min(begin + _QUERY_BLOCK, S)
        first = min(earliest[begin:end])
        if window is not None:
            first = max(first, begin - window + 1)
        bounded = max(latest[begin:end]) > first
        hiding = window if window is not None and end - 1 - first >= window else None
        masked = first if bounded or hiding is not None else begin
        blocks.append(_Block(begin, end, first, masked, bounded, hiding))
    return blocks


def _weights(
    q_NMC: torch.Tensor,
    k_NJC: torch.Tensor,
    block: _Block,
    start_BS: torch.Tensor,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """Softmax weights [N, M, J] of one block, in scratch; q is scaled already."""
    shape = (q_NMC.shape[0], q_NMC.shape[1], k_NJC.shape[1])
    score_NMJ = _view(scratch, shape)
    torch.bmm(q_NMC, k_NJC.mT, out=score_NMJ)
    B = start_BS.shape[0]
    bias = _bias(block, start_BS, shape[1], score_NMJ.dtype)
    score_NMJ.view(B, -1, *shape[1:])[..., block.masked - block.first :] += bias
    return torch.softmax(score_NMJ, -1, out=score_NMJ)


def _bias(block: _Block, start_BS: torch.Tensor, M: int, dtype: torch.dtype) -> torch.Tensor:
    """-inf where a key is out of sight, else 0: [B or 1, 1, M, keys] over the block's keys from `masked` on."""
    i = torch.arange(block.begin, block.end, device=start_BS.device)[:, None]
    j = torch.arange(block.masked, block.end, device=start_BS.device)
    hidden = (j > i)[None]
    if block.bounded:
        hidden = hidden | (j < start_BS[:, block.begin : block.end, None])
    if block.window is not None:
        hidden = hidden | (i - j >= block.window)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return bias.repeat_interleave(M // bias.shape[1], dim=1)[:, None]


def _scratch(q_NMC: torch.Tensor, blocks: list[_Block], P: int, num: int) -> tuple[torch.Tensor, ...]:
    """Flat buffers that hold the largest block's scores, so that no block allocates its own."""
    size = max(
        (q_NMC.shape[0] * (block.end - block.begin) * P * (block.end - block.first) for block in blocks), default=0
    )
    return q_NMC.new_empty(num, size).unbind()


def _view(buffer: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _fold(x_BSHC: torch.Tensor, G: int) -> torch.Tensor:
    """[B, S, H, C] -> [B*G, S*P, C]: the query heads of a kv head become neighbouring rows."""
    B, S, H, C = x_BSHC.shape
    return x_BSHC.view(B, S, G, H // G, C).transpose(1, 2).reshape(B * G, S * (H // G), C)


def _unfold(x_NMC: torch.Tensor, G: int, P: int) -> torch.Tensor:
    """The inverse of `_fold`."""
    N, M, C = x_NMC.shape
    return x_NMC.reshape(N // G, G, M // P, P, C).transpose(1, 2).flatten(2, 3)
