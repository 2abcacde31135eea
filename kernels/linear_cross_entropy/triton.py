"""Softmax over a chunk's logits and their gradient in Triton, in the logits' own dtype: no copy of them in fp32.

One kernel reads every logit once, for the row's maximum and sum of exponentials; between it and the next, holders of
other columns may add theirs. The next reads the logits again and writes their gradient over them. The products around
them are the library's: no kernel of ours beats it at [N, D] x [D, V].

Shape letters: N tokens of a chunk, V columns held here.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..triton import offset
from .sharded import ColumnShard

_IGNORED = tl.constexpr(-100)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_BLOCK_V = 4096
_WARPS = 8  # sixteen bytes of bf16 a thread, twice


@triton.jit
def _sum_up(logits, column, largest, total, chosen, V, BLOCK_V: tl.constexpr):
    row = offset(tl.program_id(0), 1)
    begin_of_row = logits + offset(row, V)
    largest_here = _LOWEST + tl.zeros([], tl.float32)
    total_V = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, V, BLOCK_V):
        at = begin + tl.arange(0, BLOCK_V)
        logit = tl.load(begin_of_row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest_here, tl.max(logit, 0))
        total_V = total_V * tl.exp(largest_here - larger) + tl.exp(logit - larger)
        largest_here = larger
    tl.store(largest + row, largest_here)
    tl.store(total + row, tl.sum(total_V, 0))
    label = tl.load(column + row)
    tl.store(chosen + row, tl.load(begin_of_row + label, mask=label >= 0, other=0.0).to(tl.float32))


@triton.jit
def _differentiate(logits, lse, label, column, z_loss, V, BLOCK_V: tl.constexpr):
    row = offset(tl.program_id(0), 1)
    at = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    log_sum = tl.load(lse + row)
    labelled = tl.load(label + row) != _IGNORED
    to = logits + offset(row, V) + at
    logit = tl.load(to, mask=at < tl.where(labelled, V, 0), other=float("-inf")).to(tl.float32)
    grad = tl.exp(logit - log_sum) * (1 + 2 * z_loss * log_sum) - (at == tl.load(column + row)).to(tl.float32)
    tl.store(to, tl.where(labelled, grad, 0.0).to(logits.dtype.element_ty), mask=at < V)


def _block(V: int, device: torch.device) -> int:
    return _BLOCK_V if device.type == "cuda" else min(max(triton.next_power_of_2(V), 16), 64)


@torch.library.custom_op("sigmoe::softmax_sums", mutates_args=())
def softmax_sums(logits_NV: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's maximum, sum of exponentials below it and logit of its label (0 where column_N is -100)."""
    largest_N, total_N, chosen_N = _empty_sums(logits_NV, column_N)
    N, V = logits_NV.shape
    if N:
        _sum_up[(N,)](
            logits_NV, column_N, largest_N, total_N, chosen_N, V,
            BLOCK_V=_block(V, logits_NV.device), num_warps=_WARPS,
        )  # fmt: skip
    return largest_N, total_N, chosen_N


@softmax_sums.register_fake
def _empty_sums(logits_NV: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty_N = logits_NV.new_empty(logits_NV.shape[0], dtype=torch.float32)
    return empty_N, torch.empty_like(empty_N), torch.empty_like(empty_N)


@torch.library.custom_op("sigmoe::logits_gradient_", mutates_args=("logits_NV",))
def logits_gradient_(logits_NV: Tensor, lse_N: Tensor, label_N: Tensor, column_N: Tensor, z_loss: float) -> None:
    """Write d (cross-entropy + z_loss * lse^2) / d logits over the logits, 0 where label_N is -100."""
    N, V = logits_NV.shape
    block = _block(V, logits_NV.device)
    if N and V:
        grid = N, triton.cdiv(V, block)
        _differentiate[grid](logits_NV, lse_N, label_N, column_N, z_loss, V, BLOCK_V=block, num_warps=_WARPS)


def softmax(logits_NV: Tensor, column_N: Tensor, shard: ColumnShard | None) -> tuple[Tensor, Tensor]:
    """Return logsumexp over all columns and the label's logit; column_N as for `sharded_softmax`."""
    largest_N, total_N, chosen_N = softmax_sums(logits_NV, column_N)
    if shard is not None:
        own_N = largest_N.clone()  # a reduction may write over what it is given
        largest_N = shard.maximum(largest_N)
        total_N *= torch.exp(own_N - largest_N)
        total_N, chosen_N = shard.total(torch.stack((total_N, chosen_N))).unbind()
    return largest_N + total_N.log(), chosen_N


def compile_cases() -> Iterator[CompileCase]:
    """Yield both kernels in bf16."""
    kinds = {"logits": "*bf16", "label": "*i64", "column": "*i64", "V": "i32:16", "z_loss": "fp32"}
    for name, kernel in (("sums", _sum_up), ("gradient", _differentiate)):
        yield CompileCase(
            name=f"linear_cross_entropy {name}",
            kernel=kernel,
            signature={name: kinds.get(name, "*fp32") for name in kernel.arg_names if name != "BLOCK_V"},
            constants={"BLOCK_V": _BLOCK_V},
            num_warps=_WARPS,
        )
