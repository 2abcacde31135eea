"""The expert-sorted row order in Triton: histograms, scans, a sort inside each tile; integers, so the same every run.

A tile lies in one sequence where capacity counts by sequence; without capacity all pairs are one sequence. In a sorted
tile a pair's rank in its expert is its place, less the tile's pairs of lower experts, plus the expert's pairs in the
sequence's tiles before. The second kernel works out the last two as one number for every expert and tile.

Shape letters: B sequences, L pairs of a sequence, M tiles of a sequence, N pairs (B*L), E experts.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..triton import offset

MOST_EXPERTS = 1 << 14  # expert and place in the tile share an int32
_TILE = 256
_SORT_WARPS = 8


@triton.jit
def _tile(L, M, TILE: tl.constexpr):
    """Which pair a program's tile begins with, and which of its places hold pairs."""
    index = tl.program_id(0)
    begin = index % M * TILE
    return offset(index // M, L) + begin, begin + tl.arange(0, TILE) < L


@triton.jit
def _histogram(expert, upto, L, M, E: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    begin, inside = _tile(L, M, TILE)
    expert_L = tl.load(expert + begin + tl.arange(0, TILE), mask=inside, other=0).to(tl.int32)
    upto_E = tl.cumsum(tl.histogram(expert_L, BLOCK_E, mask=inside), 0)
    column = tl.arange(0, BLOCK_E)
    tl.store(upto + offset(column, tl.num_programs(0)) + tl.program_id(0), upto_E, mask=column < E)


@triton.jit
def _scan(upto, capacity, rank, start, count, B, M, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr):
    expert = tl.program_id(0)
    here, below = offset(expert, B * M), offset(expert - 1, B * M)
    total = tl.zeros([], tl.int64)
    for first_B in range(0, B, BLOCK_B):
        sequence = first_B + tl.arange(0, BLOCK_B)
        seen_B = tl.zeros([BLOCK_B], tl.int32)
        for first_M in range(0, M, BLOCK_M):
            tile = first_M + tl.arange(0, BLOCK_M)
            at = sequence[:, None] * M + tile[None, :]
            mask = (sequence < B)[:, None] & (tile < M)[None, :]
            lower = tl.load(upto + below + at, mask=mask & (below + at >= 0), other=0)  # none below expert 0
            number = tl.load(upto + here + at, mask=mask, other=0) - lower
            before = seen_B[:, None] + tl.cumsum(number, 1) - number
            tl.store(rank + here + at, before - lower, mask=mask)
            seen_B += tl.sum(number, 1)
        kept_B = tl.minimum(seen_B, tl.load(capacity + sequence, mask=sequence < B, other=0))
        tl.store(start + offset(expert, B) + sequence, total + tl.cumsum(kept_B, 0) - kept_B, mask=sequence < B)
        total += tl.sum(kept_B, 0)
    tl.store(count + expert, total)


@triton.jit
def _place(expert, capacity, rank, start, count, end, row, source, B, L, M, TILE: tl.constexpr):
    index, place = tl.program_id(0), tl.arange(0, TILE)
    sequence = index // M
    begin, inside = _tile(L, M, TILE)
    expert_L = tl.load(expert + begin + place, mask=inside, other=0).to(tl.int32)
    key = tl.sort(tl.where(inside, expert_L << 16 | place, 0x7FFFFFFF))
    expert_L, pair = key >> 16, begin + (key & 0xFFFF)
    rank_L = place + tl.load(rank + offset(expert_L, B * M) + index, mask=inside, other=0)
    row_L = tl.load(end + expert_L, mask=inside, other=0) - tl.load(count + expert_L, mask=inside, other=0)
    row_L += rank_L + tl.load(start + offset(expert_L, B) + sequence, mask=inside, other=0)
    kept = inside & (rank_L < tl.load(capacity + sequence))
    tl.store(row + pair, tl.where(kept, row_L, -1), mask=inside)
    tl.store(source + row_L, pair, mask=kept)


@torch.library.custom_op("sigmoe::positions", mutates_args=())
def order(expert_BSK: Tensor, num_experts: int, capacity_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return row_TK, source_N and count_E, all int64, without a word from the device to the host.

    Of source_N the first `count_E.sum()` are rows, the rest (as many as capacity dropped) holds nothing.
    """
    row_TK, source_N, count_E = _empty(expert_BSK, num_experts, capacity_B)
    (B, S, K), E = expert_BSK.shape, num_experts
    if B * S * K == 0:
        return row_TK, source_N, count_E.zero_()
    if capacity_B is None:
        B, S = 1, B * S
        capacity_B = expert_BSK.new_full((1,), S * K)
    tile = _TILE if expert_BSK.is_cuda else 16
    expert_BSK, capacity_B, L, M = expert_BSK.contiguous(), capacity_B.contiguous(), S * K, triton.cdiv(S * K, tile)
    upto_EBM = expert_BSK.new_empty(E, B, M, dtype=torch.int32)
    rank_EBM, start_EB = torch.empty_like(upto_EBM), expert_BSK.new_empty(E, B)
    block_E = max(triton.next_power_of_2(E), 2)
    _histogram[(B * M,)](
        expert_BSK, upto_EBM, L, M, E=E, TILE=tile, BLOCK_E=block_E, num_warps=_histogram_warps(block_E)
    )
    _scan[(E,)](
        upto_EBM, capacity_B, rank_EBM, start_EB, count_E, B, M, **_scan_blocks(B, M, 1024 if expert_BSK.is_cuda else 4)
    )
    _place[(B * M,)](
        expert_BSK, capacity_B, rank_EBM, start_EB, count_E, count_E.cumsum(0), row_TK, source_N, B, L, M,
        TILE=tile, num_warps=_SORT_WARPS,
    )  # fmt: skip
    return row_TK, source_N, count_E


@order.register_fake
def _empty(expert_BSK: Tensor, num_experts: int, capacity_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    (B, S, K), new = expert_BSK.shape, expert_BSK.new_empty
    return new(B * S, K), new(B * S * K), new(num_experts)


def _histogram_warps(block_E: int) -> int:
    """More where the bins would not fit in the registers of four."""
    return max(block_E // 1024, 4)


def _scan_blocks(B: int, M: int, tiles: int) -> dict[str, int]:
    """So many tiles at a time, of as few sequences as have them."""
    block_M = min(max(triton.next_power_of_2(M), 2), tiles)
    return {"BLOCK_B": min(max(triton.next_power_of_2(B), 2), max(tiles // block_M, 2)), "BLOCK_M": block_M}


def compile_cases() -> Iterator[CompileCase]:
    """Yield the three kernels, for one long sequence and for several."""
    names = "expert capacity start count end row source".split()
    kinds = dict.fromkeys(names, "*i64") | dict.fromkeys(("upto", "rank"), "*i32")
    kinds |= {"L": "i32:16", "M": "i32", "B": "i32"}

    def case(name: str, kernel: triton.JITFunction, num_warps: int = 4, **constants: object) -> CompileCase:
        signature = {argument: kinds[argument] for argument in kernel.arg_names if argument not in constants}
        title = f"positions {name}"
        return CompileCase(name=title, kernel=kernel, signature=signature, constants=constants, num_warps=num_warps)

    for E in (8, 128, 512, MOST_EXPERTS):
        yield case(f"histogram E {E}", _histogram, _histogram_warps(E), E=E, TILE=_TILE, BLOCK_E=E)
    yield case("scan, 1 sequence", _scan, **_scan_blocks(1, 1024, 1024))
    yield case("scan, 8 sequences", _scan, **_scan_blocks(8, 128, 1024))
    yield case("place", _place, num_warps=_SORT_WARPS, TILE=_TILE)
