"""What the passes of the Triton attention share: which blocks of keys or queries a block has to do with, and loads.

Shape letters: M queries of a block, N keys of a block, S positions, C head width.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # below every score; finite, so that what sees nothing comes to 0 and not to NaN


@triton.jit
def load_rows(
    base, first, stride, end, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, INSIDE: tl.constexpr
):
    """Rows from `first` on, [ROWS, BLOCK_C]; 0 in columns from C on and rows from `end` on (INSIDE: there are none)."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    at = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if INSIDE and C == BLOCK_C:
        rows = tl.load(at)
    elif INSIDE:
        rows = tl.load(at, mask=(column < C)[None, :], other=0.0)
    elif C == BLOCK_C:
        rows = tl.load(at, mask=(first + row < end)[:, None], other=0.0)
    else:
        rows = tl.load(at, mask=(first + row < end)[:, None] & (column < C)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(base, first, stride, end, value, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store what `load_rows` loads."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    at = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=(first + row < end)[:, None] & (column < C)[None, :])


@triton.jit
def first_seen(start, i, S, window):
    """The first key that each query sees, by the start of its document and the window; S behind the last query."""
    start_M = tl.load(start + i, mask=i < S, other=S).to(tl.int32)
    return tl.maximum(start_M, i - window + 1)


@triton.jit
def key_bounds(seen_M, first, S, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the keys begin that the queries from `first` on see, those that all of them see, these end, and all end.

    All but the last lie on blocks of keys.
    """
    begin = tl.min(seen_M, 0) // BLOCK_N * BLOCK_N
    highest = tl.max(tl.where(first + tl.arange(0, BLOCK_M) < S, seen_M, 0), 0)
    whole_end = (first + 1) // BLOCK_N * BLOCK_N
    whole = tl.maximum(begin, tl.minimum(tl.cdiv(highest, BLOCK_N) * BLOCK_N, whole_end))
    return begin, whole, tl.maximum(whole, whole_end), tl.minimum(first + BLOCK_M, S)


@triton.jit
def query_bounds(start, first, S, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Like `key_bounds`: the queries that see the keys from `first` on, by `start`, which never falls."""
    last = tl.minimum(first + BLOCK_N, S) - 1
    begin = first // BLOCK_M * BLOCK_M
    end = tl.minimum(count_up_to(start, last, S, 256), last + window)
    whole_end = tl.minimum(count_up_to(start, first, S, 256), first + window) // BLOCK_M * BLOCK_M
    whole = tl.maximum(begin, tl.minimum(tl.cdiv(last, BLOCK_M) * BLOCK_M, whole_end))
    return begin, whole, tl.maximum(whole, whole_end), end


@triton.jit
def count_up_to(start, value, S, BLOCK: tl.constexpr):
    """How many of the S numbers, which never fall, are at most `value` < S: two loads where S is at most BLOCK**2."""
    place = tl.arange(0, BLOCK)
    groups = tl.zeros([], tl.int32)
    for begin in range(0, S, BLOCK * BLOCK):
        at = begin + place * BLOCK
        groups += tl.sum((tl.load(start + at, mask=at < S, other=S) <= value).to(tl.int32), 0)
    at = tl.maximum(groups - 1, 0) * BLOCK
    return at + tl.sum((tl.load(start + at + place, mask=at + place < S, other=S) <= value).to(tl.int32), 0)
