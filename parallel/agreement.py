"""What processes must know or decide together. Plain data goes around as JSON, never pickled, in host memory."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import distributed

from ..moe.workers import Workers
from .mesh import Axis

T = TypeVar("T")


def exchange(data: Any, axis: Axis) -> list[Any]:
    """Return everyone's `data`, plain JSON data, by rank. All call it."""
    if axis.size == 1:
        return [data]
    mine = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(axis.size)]
    distributed.all_gather(sizes, torch.tensor([mine.numel()]), group=axis.group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: mine.numel()] = mine
    everyone = [torch.empty_like(padded) for _ in range(axis.size)]
    distributed.all_gather(everyone, padded, group=axis.group)
    return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(everyone, sizes)]


def together(axis: Axis) -> AbstractContextManager[None]:
    """Return `Workers.together` of the axis: what the block raises on one rank, all raise."""
    return _Ranks(axis).together()


def from_first(make: Callable[[], T], axis: Axis) -> T:
    """Return what `make`, called by rank 0 alone, returns (plain JSON data), or raise on all what it raises."""
    return _Ranks(axis).from_first(make)


class _Ranks(Workers):
    def __init__(self, axis: Axis) -> None:
        self.rank, self.size, self._axis = axis.rank, axis.size, axis

    def exchange(self, data: Any) -> list[Any]:
        return exchange(data, self._axis)
