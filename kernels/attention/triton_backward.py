"""The backward of the Triton attention in two passes, each of which writes what it sums: no atomics.

Queries come first, and leave delta, the sum of each row's gradient times its output, for keys and values. Shape
letters: M queries of a block, N keys of a block, S positions, H query heads, G kv heads, C head width.
"""

import triton
import triton.language as tl

from ..triton import offset
from .triton_tiles import first_seen, key_bounds, load_rows, query_bounds, store_rows


@triton.jit
def _queries_step(
    grad_q_MC, q_MC, grad_MC, lse_M, delta_M, k, v, k_step, v_step, i, seen_M, begin, end, S, scale,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for first in tl.range(begin, end, BLOCK_N):
        k_NC = load_rows(k, first, k_step, S, C, BLOCK_N, BLOCK_C, not MASKED)
        v_NC = load_rows(v, first, v_step, S, C, BLOCK_N, BLOCK_C, not MASKED)
        score_MN = tl.dot(q_MC, tl.trans(k_NC), input_precision="ieee")
        weight_MN = tl.exp2(score_MN * scale - lse_M[:, None])
        if MASKED:
            j = first + tl.arange(0, BLOCK_N)
            weight_MN = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= seen_M[:, None]), weight_MN, 0.0)
        grad_MN = tl.dot(grad_MC, tl.trans(v_NC), input_precision="ieee")
        grad_MN = weight_MN * (grad_MN - delta_M[:, None])
        grad_q_MC = tl.dot(grad_MN.to(k_NC.dtype), k_NC, grad_q_MC, input_precision="ieee")
    return grad_q_MC


@triton.jit
def backward_queries(
    q, k, v, start, out, lse, grad, delta, grad_q,
    q_stride, q_step, q_head, k_stride, k_step, k_head, v_stride, v_step, v_head, S, window, scale, natural_scale,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program a block of queries of one head, as in the forward pass."""
    sequence, head = offset(tl.program_id(0) // H, 1), offset(tl.program_id(0) % H, 1)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    kv_head = head // (H // G)
    k += sequence * k_stride + kv_head * k_head
    v += sequence * v_stride + kv_head * v_head
    i = first + tl.arange(0, BLOCK_M)
    seen_M = first_seen(start + sequence * S, i, S, window)
    place = sequence * S * (H * C) + head * C
    grad_MC = load_rows(grad + place, first, H * C, S, C, BLOCK_M, BLOCK_C, False)
    out_MC = load_rows(out + place, first, H * C, S, C, BLOCK_M, BLOCK_C, False)
    delta_M = tl.sum(grad_MC.to(tl.float32) * out_MC.to(tl.float32), 1)
    row_M = (sequence * H + head) * S + i
    tl.store(delta + row_M, delta_M, mask=i < S)
    lse_M = tl.load(lse + row_M, mask=i < S, other=0.0)
    q_MC = load_rows(q + sequence * q_stride + head * q_head, first, q_step, S, C, BLOCK_M, BLOCK_C, False)
    begin, whole, whole_end, end = key_bounds(seen_M, first, S, BLOCK_M, BLOCK_N)

    grad_q_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for edge in tl.range(0, 2):
        edge_begin, edge_end = tl.where(edge == 0, begin, whole_end), tl.where(edge == 0, whole, end)
        grad_q_MC = _queries_step(
            grad_q_MC, q_MC, grad_MC, lse_M, delta_M, k, v, k_step, v_step, i, seen_M, edge_begin, edge_end, S, scale,
            C, BLOCK_N, BLOCK_C, True,
        )  # fmt: skip
    grad_q_MC = _queries_step(
        grad_q_MC, q_MC, grad_MC, lse_M, delta_M, k, v, k_step, v_step, i, seen_M, whole, whole_end, S, scale,
        C, BLOCK_N, BLOCK_C, False,
    )  # fmt: skip
    store_rows(grad_q + place, first, H * C, S, grad_q_MC * natural_scale, C, BLOCK_M, BLOCK_C)


@triton.jit
def _keys_step(
    grad_k_NC, grad_v_NC, k_NC, v_NC, q, grad, lse, delta, start, q_step, q_head, j, begin, end, S, window, scale,
    H: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    for head in tl.range(0, HEADS):
        for first in tl.range(begin, end, BLOCK_M):
            i = first + tl.arange(0, BLOCK_M)
            q_MC = load_rows(q + tl.cast(head, tl.int64) * q_head, first, q_step, S, C, BLOCK_M, BLOCK_C, not MASKED)
            grad_MC = load_rows(grad + head * C, first, H * C, S, C, BLOCK_M, BLOCK_C, not MASKED)
            row_M, inside = tl.cast(head, tl.int64) * S + i, i < S
            lse_M = tl.load(lse + row_M, mask=inside, other=0.0) if MASKED else tl.load(lse + row_M)
            score_NM = tl.dot(k_NC, tl.trans(q_MC), input_precision="ieee")
            weight_NM = tl.exp2(score_NM * scale - lse_M[None, :])
            if MASKED:
                seen_M = first_seen(start, i, S, window)
                weight_NM = tl.where((j[:, None] <= i[None, :]) & (j[:, None] >= seen_M[None, :]), weight_NM, 0.0)
            grad_v_NC = tl.dot(weight_NM.to(grad_MC.dtype), grad_MC, grad_v_NC, input_precision="ieee")
            grad_NM = tl.dot(v_NC, tl.trans(grad_MC), input_precision="ieee")
            delta_M = tl.load(delta + row_M, mask=inside, other=0.0) if MASKED else tl.load(delta + row_M)
            grad_NM = weight_NM * (grad_NM - delta_M[None, :])
            grad_k_NC = tl.dot(grad_NM.to(q_MC.dtype), q_MC, grad_k_NC, input_precision="ieee")
    return grad_k_NC, grad_v_NC


@triton.jit
def backward_keys(
    q, k, v, start, lse, grad, delta, grad_k, grad_v,
    q_stride, q_step, q_head, k_stride, k_step, k_head, v_stride, v_step, v_head, S, window, scale, natural_scale,
    H: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program a block of keys of one kv head and HEADS of its query heads; answers are [H/G/HEADS, B, S, G, C]."""
    PARTS: tl.constexpr = H // G // HEADS
    sequence, part = offset(tl.program_id(0) // (G * PARTS), 1), tl.program_id(0) % PARTS
    kv_head = offset(tl.program_id(0) // PARTS % G, 1)
    first = tl.program_id(1) * BLOCK_N  # the first keys are seen the most
    j = first + tl.arange(0, BLOCK_N)
    k_NC = load_rows(k + sequence * k_stride + kv_head * k_head, first, k_step, S, C, BLOCK_N, BLOCK_C, False)
    v_NC = load_rows(v + sequence * v_stride + kv_head * v_head, first, v_step, S, C, BLOCK_N, BLOCK_C, False)
    start += sequence * S
    begin, whole, whole_end, end = query_bounds(start, first, S, window, BLOCK_M, BLOCK_N)
    head = kv_head * (H // G) + part * HEADS
    q += sequence * q_stride + head * q_head
    grad += sequence * S * (H * C) + head * C
    lse += (sequence * H + head) * S
    delta += (sequence * H + head) * S

    grad_k_NC, grad_v_NC = tl.zeros([BLOCK_N, BLOCK_C], tl.float32), tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for edge in tl.range(0, 2):
        edge_begin, edge_end = tl.where(edge == 0, begin, whole_end), tl.where(edge == 0, whole, end)
        grad_k_NC, grad_v_NC = _keys_step(
            grad_k_NC, grad_v_NC, k_NC, v_NC, q, grad, lse, delta, start, q_step, q_head, j, edge_begin, edge_end, S,
            window, scale, H, C, HEADS, BLOCK_M, BLOCK_C, True,
        )  # fmt: skip
    grad_k_NC, grad_v_NC = _keys_step(
        grad_k_NC, grad_v_NC, k_NC, v_NC, q, grad, lse, delta, start, q_step, q_head, j, whole, whole_end, S, window,
        scale, H, C, HEADS, BLOCK_M, BLOCK_C, False,
    )  # fmt: skip
    sequences = tl.num_programs(0) // (G * PARTS)
    place = (part * sequences + sequence) * S * (G * C) + kv_head * C
    store_rows(grad_k + place, first, G * C, S, grad_k_NC * natural_scale, C, BLOCK_N, BLOCK_C)
    store_rows(grad_v + place, first, G * C, S, grad_v_NC, C, BLOCK_N, BLOCK_C)
