"""What processes must know or decide together. Plain data goes around as JSON, never pickled, in host memory."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from ..moe.storage.durable import WriteError
from .mesh import Axis

T = TypeVar("T")

_KINDS: dict[str, type[Exception]] = {"WriteError": WriteError, "ValueError": ValueError, "OSError": OSError}


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


@contextmanager
def together(axis: Axis) -> Iterator[None]:
    """Run a block in which nobody waits for another; what it raises on one, all raise (the lowest rank's, named).

    Covers ValueError and OSError. In one process the block is run as it is.
    """
    if axis.size == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    told = first_error(error, lambda data: exchange(data, axis))
    if told is not None:
        raise told from error


def first_error(error: Exception | None, exchange: Callable[[Any], list[Any]]) -> Exception | None:
    """Return the lowest rank's ValueError or OSError, its rank named, the same on all; None where no one has any.

    `exchange` returns everyone's plain JSON data, by rank. All call it.
    """
    for rank, told in enumerate(exchange(None if error is None else [_kind(error), str(error)])):
        if told is not None:
            kind, text = told
            return _KINDS[kind](text if rank == 0 else f"rank {rank}: {text}")
    return None


def from_first(make: Callable[[], T], axis: Axis) -> T:
    """Return what `make`, called by rank 0 alone, returns (plain JSON data), or raise on all what it raises."""
    made: list[T] = []
    with together(axis):
        if axis.rank == 0:
            made.append(make())
    result: list[T] = exchange(made, axis)[0]
    return result[0]


def _kind(error: Exception) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(error, kind))
