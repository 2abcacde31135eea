"""A few new queries over many kept keys, in Triton: keys are spread over programs, a second kernel joins their sums.

The query heads of a kv head are rows of one product. Shape letters: B sequences, S new positions, J kept positions, H
query heads, G kv heads, P = H/G, C head width, R rows (s, p) of a block, N keys of a block, T = B*S*H, U parts.
"""

import triton
import triton.language as tl

from ..triton import offset
from .triton_forward import attend
from .triton_tiles import LOWEST


@triton.jit(do_not_specialize=["J", "first_key", "window", "part_keys"])
def extend(
    q, k, v, start, sums, tops, totals, q_stride, q_step, q_head, k_stride, k_step, k_head, v_stride, v_step, v_head,
    start_stride, start_step, S, J, first_key, window, part_keys, scale, H: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Take `part_keys` keys of one kv head: weighted sums [U, T, C], largest scores and sums of weights [U, T]."""
    P: tl.constexpr = H // G
    sequence, kv_head, part = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    row, column = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    inside = row < S * P
    s, head = row // P, kv_head * P + row % P
    mask = inside[:, None] & (column < C)[None, :]
    at = q + offset(sequence, q_stride) + (offset(s, q_step) + offset(head, q_head))[:, None] + column[None, :]
    q_RC = tl.load(at, mask=mask, other=0.0)
    # Keys are counted from the first kept one.
    i = J - S + s
    start_R = tl.load(start + offset(sequence, start_stride) + s * start_step, mask=inside, other=0)
    seen_R = tl.maximum((start_R - first_key).to(tl.int32), i - window + 1)
    begin = tl.maximum(tl.min(tl.where(inside, seen_R, J), 0) // BLOCK_N * BLOCK_N, part * part_keys)
    end = tl.minimum(tl.max(tl.where(inside, i, 0), 0) + 1, (part + 1) * part_keys)
    sum_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    top_R, total_R = tl.full([BLOCK_R], LOWEST, tl.float32), tl.zeros([BLOCK_R], tl.float32)
    k += offset(sequence, k_stride) + offset(kv_head, k_head)
    v += offset(sequence, v_stride) + offset(kv_head, v_head)
    sum_RC, top_R, total_R = attend(
        sum_RC, top_R, total_R, q_RC, k, v, k_step, v_step, i, seen_R, begin, end, J, scale, C, BLOCK_N, BLOCK_C, True
    )
    T = tl.num_programs(0) * S * P
    to = offset(part, T) + (sequence * S + s) * H + head
    tl.store(sums + offset(to, C)[:, None] + column[None, :], sum_RC, mask=mask)
    tl.store(tops + to, top_R, mask=inside)
    tl.store(totals + to, total_R, mask=inside)


@triton.jit(do_not_specialize=["U"])
def join(sums, tops, totals, out, T, U, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Add up what the parts came to, in order."""
    row, column = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    inside = row < T
    mask = inside[:, None] & (column < C)[None, :]
    sum_TC = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    top_T, total_T = tl.full([BLOCK_T], LOWEST, tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for part in range(0, U):
        at = offset(part, T) + row
        part_top_T = tl.load(tops + at, mask=inside, other=LOWEST)
        higher_T = tl.maximum(top_T, part_top_T)
        shrink_T, share_T = tl.exp2(top_T - higher_T), tl.exp2(part_top_T - higher_T)
        part_TC = tl.load(sums + offset(at, C)[:, None] + column[None, :], mask=mask, other=0.0)
        sum_TC = sum_TC * shrink_T[:, None] + part_TC * share_T[:, None]
        total_T = total_T * shrink_T + tl.load(totals + at, mask=inside, other=0.0) * share_T
        top_T = higher_T
    total_T = tl.where(total_T > 0, total_T, 1.0)  # of what sees nothing
    value = (sum_TC / total_T[:, None]).to(out.dtype.element_ty)
    tl.store(out + offset(row, C)[:, None] + column[None, :], value, mask=mask)
