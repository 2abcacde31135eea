"""Products of rows grouped by expert, in Triton: with the experts' weights, and with each other for those' gradient.

Which rows belong to which expert is known on the device alone. So a first kernel lists blocks of rows of one expert,
and as many programs as the device has processors work that list off; the host only knows how long it is at the most,
and never waits. Neighbours in the list take the same columns in turn, so that rows and weights come from the cache.

Products are summed in fp32, in one order under every configuration; fp32 factors are split in three of tf32.

Shape letters: R rows (after the experts' others may follow, which nothing reads), E experts, N columns of the answer,
D depth, L blocks of rows at the most, K top-k.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..triton import offset, tuned
from .op import BLOCK_ROWS

_GROUP = tl.constexpr(8)  # blocks of rows that take the same columns in turn


@triton.jit
def _list_blocks(
    count, end, work, E, L, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_L: tl.constexpr
):  # fmt: skip
    """Write expert, first row, end of the expert's rows, and the number of all blocks, for every block."""
    index = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    expert = tl.zeros([BLOCK_L], tl.int32)
    first = tl.zeros([BLOCK_L], tl.int32)
    total = tl.zeros([], tl.int32)
    for begin in range(0, E, BLOCK_E):
        column = begin + tl.arange(0, BLOCK_E)
        blocks_E = tl.cdiv(tl.load(count + column, mask=column < E, other=0).to(tl.int32), BLOCK_M)
        # The experts whose blocks all come before this one.
        before = (column < E)[None, :] & ((total + tl.cumsum(blocks_E, 0))[None, :] <= index[:, None])
        expert += tl.sum(before.to(tl.int32), 1)
        first += tl.sum(tl.where(before, blocks_E[None, :], 0), 1)
        total += tl.sum(blocks_E, 0)
    inside = index < total
    stop = tl.load(end + expert, mask=inside, other=0).to(tl.int32)
    start = stop - tl.load(count + expert, mask=inside, other=0).to(tl.int32)
    tl.store(work + index * 4, expert, mask=inside)
    tl.store(work + index * 4 + 1, start + (index - first) * BLOCK_M, mask=inside)
    tl.store(work + index * 4 + 2, stop, mask=inside)
    tl.store(work + index * 4 + 3, tl.zeros_like(index) + total, mask=index < L)


@triton.jit
def place_of(tile, blocks, COLUMNS: tl.constexpr):
    """Which block of rows, and which of columns, is the tile's turn."""
    group = tile // (_GROUP * COLUMNS)
    height = tl.minimum(blocks - group * _GROUP, _GROUP)
    place = tile - group * (_GROUP * COLUMNS)
    return group * _GROUP + place % height, place // height


@triton.jit
def accumulate(
    rows_M, weight_N, inside_N, D: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product of rows, by pointers to where they begin, with columns of weights whose elements lie STEP apart."""
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, D, BLOCK_K):
        depth = begin + tl.arange(0, BLOCK_K)
        at_M, at_N = rows_M[:, None] + depth[None, :], weight_N[None, :] + offset(depth, STEP)[:, None]
        if D % BLOCK_K == 0:
            rows = tl.load(at_M)
            weight = tl.load(at_N) if EVEN else tl.load(at_N, mask=inside_N[None, :], other=0.0)
        else:
            rows = tl.load(at_M, mask=(depth < D)[None, :], other=0.0)
            weight = tl.load(at_N, mask=inside_N[None, :] & (depth < D)[:, None], other=0.0)
        sum_MN = tl.dot(rows, weight, sum_MN, input_precision="tf32x3")
    return sum_MN


@triton.jit
def _multiply(
    rows, weight, work, out, D: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = SPAN * BLOCK_K
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ROW: tl.constexpr = 1 if TRANSPOSED else D
    STEP: tl.constexpr = N if TRANSPOSED else 1
    blocks = tl.load(work + 3)
    for tile in tl.range(tl.program_id(0), blocks * COLUMNS, tl.num_programs(0)):
        block, column = place_of(tile, blocks, COLUMNS)
        row = tl.load(work + block * 4 + 1) + tl.arange(0, BLOCK_M)
        end = tl.load(work + block * 4 + 2)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        base = weight + offset(tl.load(work + block * 4), N * D)
        rows_M, weight_N = rows + offset(tl.minimum(row, end - 1), D), base + offset(n, ROW)
        sum_MN = accumulate(rows_M, weight_N, n < N, D, STEP, N % BLOCK_N == 0, BLOCK_M, BLOCK_N, BLOCK_K)
        mask = (row < end)[:, None] & (n < N)[None, :]
        tl.store(out + offset(row, N)[:, None] + n[None, :], sum_MN.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _multiply_rows(
    left, right, source, end, out, N: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = SPAN * BLOCK_K
    N_BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    expert = tl.program_id(0) // (N_BLOCKS * D_BLOCKS)
    n_block, d_block = place_of(tl.program_id(0) % (N_BLOCKS * D_BLOCKS), N_BLOCKS, D_BLOCKS)
    n, d = n_block * BLOCK_M + tl.arange(0, BLOCK_M), d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(end + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    stop = tl.load(end + expert).to(tl.int32)
    sum_ND = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(start, stop, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        inside = row < stop
        left_row, right_row = row, row
        if GATHER_LEFT:
            left_row = tl.load(source + row, mask=inside, other=0) // K
        if GATHER_RIGHT:
            right_row = tl.load(source + row, mask=inside, other=0) // K
        left_at, right_at = left + offset(left_row, N)[None, :] + n[:, None], right + offset(right_row, D)[:, None] + d
        left_NM = tl.load(left_at, mask=inside[None, :] & (n < N)[:, None], other=0.0)
        right_MD = tl.load(right_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        sum_ND = tl.dot(left_NM, right_MD, sum_ND, input_precision="tf32x3")
    to = out + offset(expert, N * D) + offset(n, D)[:, None] + d[None, :]
    tl.store(to, sum_ND.to(out.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


def configs(*pairs: tuple[int, int]) -> list[triton.Config]:
    """Return configurations by span of the columns (how often BLOCK_K) and stages."""
    return [triton.Config({"SPAN": span}, num_warps=8, num_stages=stages) for span, stages in pairs]


# By bytes of an element; in fp32 wider columns spill. Stages of the rows' product: fetching halves their shared memory,
# so that five fit where rows are fetched, and four where they stand (a GPU tries what fits).
_MULTIPLY = {2: configs((4, 3), (4, 4), (2, 4)), 4: configs((2, 3), (2, 4))}
_MULTIPLY_ROWS = {2: configs((4, 5), (4, 4), (2, 5)), 4: configs((2, 5), (2, 3))}
_multiply_by_size = {size: tuned(several, ["D", "N", "TRANSPOSED"])(_multiply) for size, several in _MULTIPLY.items()}
_multiply_rows_by_size = {
    size: tuned(several, ["D", "N", "GATHER_LEFT", "GATHER_RIGHT"])(_multiply_rows)
    for size, several in _MULTIPLY_ROWS.items()
}


def blocks_of(x: Tensor) -> dict[str, int]:
    """Rows and depth of a block: 128 rows by 128 bytes on a GPU."""
    return gpu_blocks(x.element_size()) if x.device.type == "cuda" else {"BLOCK_M": 16, "BLOCK_K": 16}


def gpu_blocks(itemsize: int) -> dict[str, int]:
    """`blocks_of` a tensor of such elements on a GPU."""
    return {"BLOCK_M": BLOCK_ROWS, "BLOCK_K": 128 // itemsize}


def list_blocks(count_E: Tensor, x: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the list of blocks for rows like `x`, int32 [L, 4], and where each expert's rows end, int64 [E]."""
    count_E, E, block_M = count_E.contiguous(), count_E.numel(), blocks_of(x)["BLOCK_M"]
    L = min(num_rows, num_rows // block_M + E)
    work_L4, end_E = count_E.new_empty(L, 4, dtype=torch.int32), count_E.cumsum(0)
    if L:
        grid = (triton.cdiv(L, 64),)
        _list_blocks[grid](count_E, end_E, work_L4, E, L, BLOCK_M=block_M, BLOCK_E=64, BLOCK_L=64)
    return work_L4, end_E


def tiles_of(work_L4: Tensor, width: int) -> Callable[[dict[str, int]], tuple[int]]:
    """Return the grid over `width` columns: a program a processor (three interpreted), at most one a tile."""
    processors = _processors(work_L4.device.index) if work_L4.device.type == "cuda" else 3
    return lambda meta: (min(processors, work_L4.shape[0] * triton.cdiv(width, meta["SPAN"] * meta["BLOCK_K"])),)


@functools.cache
def _processors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def multiply(rows_RD: Tensor, weight: Tensor, work_L4: Tensor, *, transposed: bool = False) -> Tensor:
    """Return each row times its expert's weight [E, N, D]; `transposed`: the weight is [E, D, N]."""
    (R, D), N = rows_RD.shape, weight.shape[2 if transposed else 1]
    out_RN = rows_RD.new_empty(R, N)
    if R:
        _multiply_by_size[rows_RD.element_size()][tiles_of(work_L4, N)](
            rows_RD, weight, work_L4, out_RN, D=D, N=N, TRANSPOSED=transposed, **blocks_of(rows_RD)
        )
    return out_RN


def multiply_rows(
    left_RN: Tensor, right_RD: Tensor, end_E: Tensor, source_R: Tensor | None, top_k: int, *, gather: str
) -> Tensor:
    """Return [E, N, D], for each expert the sum of the products of its rows, left by right; zero where it has none.

    With source_R, row r of the side `gather` (left, right) is that of token source_R[r] // top_k.
    """
    E, N, D = end_E.numel(), left_RN.shape[1], right_RD.shape[1]
    out_END = left_RN.new_empty(E, N, D)
    sides = {f"GATHER_{side.upper()}": source_R is not None and side == gather for side in ("left", "right")}

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (E * triton.cdiv(N, meta["BLOCK_M"]) * triton.cdiv(D, meta["SPAN"] * meta["BLOCK_K"]),)

    _multiply_rows_by_size[left_RN.element_size()][grid](
        left_RN, right_RD, source_R, end_E, out_END, N=N, D=D, K=top_k, **sides, **blocks_of(left_RN)
    )
    return out_END


@torch.library.custom_op("sigmoe::grouped_linear", mutates_args=())
def grouped_linear_forward(rows_RD: Tensor, count_E: Tensor, weight_END: Tensor) -> Tensor:
    """Return each row times its expert's weight."""
    rows_RD = rows_RD.contiguous()
    work_L4, _ = list_blocks(count_E, rows_RD, rows_RD.shape[0])
    return multiply(rows_RD, weight_END.contiguous(), work_L4)


@grouped_linear_forward.register_fake
def _empty(rows_RD: Tensor, count_E: Tensor, weight_END: Tensor) -> Tensor:
    return rows_RD.new_empty(rows_RD.shape[0], weight_END.shape[1])


@torch.library.custom_op("sigmoe::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad_RN: Tensor, rows_RD: Tensor, count_E: Tensor, weight_END: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows_RD and weight_END; empty where not in `needs`."""
    grad_RN = grad_RN.contiguous()
    work_L4, end_E = list_blocks(count_E, grad_RN, grad_RN.shape[0])
    grad_rows, grad_weight = grad_RN.new_empty(0), grad_RN.new_empty(0)
    if needs[0]:
        grad_rows = multiply(grad_RN, weight_END.contiguous(), work_L4, transposed=True)
    if needs[1]:
        grad_weight = multiply_rows(grad_RN, rows_RD.contiguous(), end_E, None, 1, gather="none")
    return grad_rows, grad_weight


@grouped_linear_backward.register_fake
def _empty_gradients(
    grad_RN: Tensor, rows_RD: Tensor, count_E: Tensor, weight_END: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    grad_rows, grad_weight = (
        grad_RN.new_empty(x.shape if need else 0) for x, need in zip((rows_RD, weight_END), needs, strict=True)
    )
    return grad_rows, grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    need_rows, _, need_weight = ctx.needs_input_grad
    grad_rows, grad_weight = grouped_linear_backward(grad, *ctx.saved_tensors, [need_rows, need_weight])
    return grad_rows if need_rows else None, None, grad_weight if need_weight else None


grouped_linear_forward.register_autograd(_differentiate, setup_context=_save)


def product_cases(
    name: str,
    kernel: triton.JITFunction,
    chosen: Mapping[int, Sequence[triton.Config]],
    constants: Mapping[str, object],
) -> Iterator[CompileCase]:
    """Yield a kernel in its configurations, in bf16 and fp32; in fp16 the first, for sizes that fit no block."""
    kinds = dict.fromkeys(("source", "end"), "*i64") | {"work": "*i32", "share": "*fp32", "dot": "*fp32"}
    odd = {key: 400 if key in ("D", "N", "F") else value for key, value in constants.items()}
    all_of = [("bf16", constants, config) for config in chosen[2]] + [("fp16", odd, chosen[2][0])]
    all_of += [("fp32", constants, config) for config in chosen.get(4, ())]
    for kind, sizes, config in all_of:
        values = {**sizes, **gpu_blocks(4 if kind == "fp32" else 2), **config.kwargs}
        signature = {key: kinds.get(key, f"*{kind}") for key in kernel.arg_names if key not in values}
        title = ", ".join(f"{key} {values[key]}" for key in ("D", "N", "F", "SPAN") if key in values)
        yield CompileCase(
            name=f"{name}, {kind}, {title}, {config.num_stages} stages",
            kernel=kernel,
            signature=signature,
            constants=values,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            is_product=True,
        )


def compile_cases() -> Iterator[CompileCase]:
    """Yield the list of blocks, and the products forward, back to the rows and back to the weights."""
    kinds = {"count": "*i64", "end": "*i64", "work": "*i32", "E": "i32", "L": "i32"}
    constants = {"BLOCK_M": BLOCK_ROWS, "BLOCK_E": 64, "BLOCK_L": 64}
    yield CompileCase(name="grouped list of blocks", kernel=_list_blocks, signature=kinds, constants=constants)
    forward, back = {"D": 768, "N": 2048, "TRANSPOSED": False}, {"D": 1536, "N": 2048, "TRANSPOSED": True}
    yield from product_cases("grouped product", _multiply, _MULTIPLY, forward)
    yield from product_cases("grouped product by rows", _multiply, _MULTIPLY, back)
    for side, N, D in (("left", 2048, 768), ("right", 1536, 2048)):
        gathers: dict[str, object] = {"GATHER_LEFT": side == "left", "GATHER_RIGHT": side == "right"}
        sizes = {"N": N, "D": D, "K": 8} | gathers
        yield from product_cases(f"grouped rows, {side} fetched", _multiply_rows, _MULTIPLY_ROWS, sizes)
    plain = {"N": 2048, "D": 768, "K": 1, "GATHER_LEFT": False, "GATHER_RIGHT": False, "source": None}
    yield from product_cases("grouped rows", _multiply_rows, {2: _MULTIPLY_ROWS[2][1:2]}, plain)
