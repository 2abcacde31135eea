"""Mappings between processes with gradients, and the reductions that need none. Any device, any backend.

Shape letters: R rows, D width, V columns.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from .mesh import Axis


def all_reduce(x: Tensor, axis: Axis, op: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM) -> Tensor:
    """Return `x` reduced over the axis, in its memory; no gradient."""
    if axis.size > 1:
        distributed.all_reduce(x, op=op, group=axis.group)
    return x


def scatter_rows(x_RD: Tensor, axis: Axis) -> Tensor:
    """Return this process's even share of the rows, which all have; the gradient is gathered."""
    return x_RD if axis.size == 1 else _ScatterRows.apply(x_RD, axis)  # type: ignore[no-untyped-call]


def gather_rows(x_RD: Tensor, axis: Axis) -> Tensor:
    """Return everyone's rows; of the gradient, the same on all, each takes its own."""
    return x_RD if axis.size == 1 else _GatherRows.apply(x_RD, axis)  # type: ignore[no-untyped-call]


def gather_columns(x: Tensor, axis: Axis) -> Tensor:
    """Return everyone's columns (the last dimension); of the gradient, the same on all, each takes its own."""
    return x if axis.size == 1 else gather_rows(x.movedim(-1, 0).contiguous(), axis).movedim(0, -1)


def exchange_counts(count_PE: Tensor, axis: Axis) -> Tensor:
    """Send row p to process p; return the rows received, by source."""
    if axis.size == 1:
        return count_PE
    received_PE = torch.empty_like(count_PE)
    distributed.all_to_all_single(received_PE, count_PE.contiguous(), group=axis.group)
    return received_PE


def exchange_rows(x_RD: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    """Send `sent[p]` rows to process p, in order; return those received, by source. Gradients go the way back.

    Everyone takes part, with rows or without.
    """
    return x_RD if axis.size == 1 else _ExchangeRows.apply(x_RD, sent, received, axis)  # type: ignore[no-untyped-call]


def reorder(x_RD: Tensor, source_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Return rows `x_RD[source_R]`, a permutation; the gradient is gathered by its inverse."""
    return _Reorder.apply(x_RD, source_R, inverse_R)  # type: ignore[no-any-return, no-untyped-call]


def _share(x_RD: Tensor, axis: Axis) -> Tensor:
    size = x_RD.shape[0] // axis.size
    assert size * axis.size == x_RD.shape[0], "rows must divide"
    return x_RD[axis.rank * size : (axis.rank + 1) * size].contiguous()


def _gathered(x_RD: Tensor, axis: Axis) -> Tensor:
    out_RD = x_RD.new_empty(axis.size * x_RD.shape[0], *x_RD.shape[1:])
    distributed.all_gather_into_tensor(out_RD, x_RD.contiguous(), group=axis.group)
    return out_RD


def _exchanged(x_RD: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    out_RD = x_RD.new_empty(sum(received), *x_RD.shape[1:])
    distributed.all_to_all_single(out_RD, x_RD.contiguous(), received, sent, group=axis.group)
    return out_RD


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _share(x_RD, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.axis), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gathered(x_RD, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _share(grads[0], ctx.axis), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.exchange = (received, sent, axis)
        return _exchanged(x_RD, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], *ctx.exchange), None, None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, source_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RD.index_select(0, source_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_R), None, None
