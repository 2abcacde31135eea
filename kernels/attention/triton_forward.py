"""The forward pass of the Triton attention: a program a block of queries of one head.

Scores are in base 2, with log2(e) in the scale. Shape letters: M queries of a block, N keys of a block, S positions, H
query heads, G kv heads, C head width.
"""

import triton
import triton.language as tl

from ..triton import offset
from .triton_tiles import LOWEST, first_seen, key_bounds, load_rows, store_rows


@triton.jit
def attend(
    sum_MC, top_M, total_M, q_MC, k, v, k_step, v_step, i, seen_M, begin, end, S, scale,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax over the keys begin..end: weighted sum of values, largest score, sum of weights."""
    for first in tl.range(begin, end, BLOCK_N):
        k_NC = load_rows(k, first, k_step, S, C, BLOCK_N, BLOCK_C, not MASKED)
        score_MN = tl.dot(q_MC, tl.trans(k_NC), input_precision="ieee")
        if MASKED:
            j = first + tl.arange(0, BLOCK_N)
            score_MN = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= seen_M[:, None]), score_MN, float("-inf"))
        higher_M = tl.maximum(top_M, tl.max(score_MN, 1) * scale)
        weight_MN = tl.exp2(score_MN * scale - higher_M[:, None])
        shrink_M = tl.exp2(top_M - higher_M)
        total_M = total_M * shrink_M + tl.sum(weight_MN, 1)
        v_NC = load_rows(v, first, v_step, S, C, BLOCK_N, BLOCK_C, not MASKED)
        sum_MC = tl.dot(weight_MN.to(v_NC.dtype), v_NC, sum_MC * shrink_M[:, None], input_precision="ieee")
        top_M = higher_M
    return sum_MC, top_M, total_M


@triton.jit
def forward(
    q, k, v, start, out, lse, q_stride, q_step, q_head, k_stride, k_step, k_head, v_stride, v_step, v_head,
    S, window, scale, H: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program a block of queries of one head: heads side by side, the last queries first: they have most keys."""
    sequence, head = offset(tl.program_id(0) // H, 1), offset(tl.program_id(0) % H, 1)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    kv_head = head // (H // G)
    k += sequence * k_stride + kv_head * k_head
    v += sequence * v_stride + kv_head * v_head
    i = first + tl.arange(0, BLOCK_M)
    seen_M = first_seen(start + sequence * S, i, S, window)
    q_MC = load_rows(q + sequence * q_stride + head * q_head, first, q_step, S, C, BLOCK_M, BLOCK_C, False)
    begin, whole, whole_end, end = key_bounds(seen_M, first, S, BLOCK_M, BLOCK_N)

    sum_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    top_M, total_M = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for edge in tl.range(0, 2):
        edge_begin, edge_end = tl.where(edge == 0, begin, whole_end), tl.where(edge == 0, whole, end)
        sum_MC, top_M, total_M = attend(
            sum_MC, top_M, total_M, q_MC, k, v, k_step, v_step, i, seen_M, edge_begin, edge_end, S, scale,
            C, BLOCK_N, BLOCK_C, True,
        )  # fmt: skip
    sum_MC, top_M, total_M = attend(
        sum_MC, top_M, total_M, q_MC, k, v, k_step, v_step, i, seen_M, whole, whole_end, S, scale,
        C, BLOCK_N, BLOCK_C, False,
    )  # fmt: skip
    total_M = tl.where(total_M > 0, total_M, 1.0)  # of what sees nothing
    store_rows(out + sequence * S * (H * C) + head * C, first, H * C, S, sum_MC / total_M[:, None], C, BLOCK_M, BLOCK_C)
    tl.store(lse + (sequence * H + head) * S + i, top_M + tl.log2(total_M), mask=i < S)
