"""Forward and backward of one operation, measured apart, and how contenders that take turns compare."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .machine import copy_rate, matmul_rate


@dataclass(frozen=True, kw_only=True)
class PassAnswer:
    """One round.

    Seconds of each forward and backward; bytes that a forward keeps for the backward beside weights, and the most that
    a pass holds on a GPU beside what it began with; the norm of the output. Of the machine: square products in flop/s,
    copies in bytes/s.
    """

    forward: tuple[float, ...] = ()
    backward: tuple[float, ...] = ()
    kept_bytes: int = 0
    peak_bytes: int = 0
    norm: float = 0.0
    matmul_rate: float = 0.0
    copy_rate: float = 0.0


def machine_answer(device: torch.device, dtype: torch.dtype) -> PassAnswer:
    """Return what the hardware does right now."""
    return PassAnswer(matmul_rate=matmul_rate(device, dtype), copy_rate=copy_rate(device))


def measure(
    forward: Callable[[], Tensor | tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    device: torch.device,
    count: int,
    weights: Sequence[Tensor] = (),
) -> PassAnswer:
    """Take `count` forwards and backwards to `leaves`; `weights` are those whose memory is not the forward's."""
    seconds: tuple[list[float], list[float]] = ([], [])
    peak, norm = 0, 0.0
    # Written before each pass on a GPU: caches are cold, and the host is ahead of the device, whose time is measured.
    scratch = torch.empty(2**30 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for _ in range(count):
        held = _held(device)
        for _ in range(4):
            scratch.zero_()
        begin = _mark(device)
        out = forward()
        middle = _mark(device)
        outs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(outs, leaves, [one.detach() for one in outs])
        end = _mark(device)
        seconds[0].append(_elapsed(begin, middle))
        seconds[1].append(_elapsed(middle, end))
        if device.type == "cuda":
            peak = max(peak, torch.cuda.max_memory_allocated(device) - held)
        norm = math.hypot(*(float(one.detach().double().norm()) for one in outs))
        del out, outs, grads
    del scratch
    kept = kept_bytes(forward, weights)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the others, who take turns
    forward_seconds, backward_seconds = map(tuple, seconds)
    return PassAnswer(forward=forward_seconds, backward=backward_seconds, kept_bytes=kept, peak_bytes=peak, norm=norm)


def kept_bytes(forward: Callable[[], object], weights: Sequence[Tensor]) -> int:
    """Return the bytes that a forward keeps for its backward, `weights` aside: whole allocations, each once."""
    apart = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = forward()
    del out
    return sum(size for address, size in kept.items() if address not in apart)


def median_seconds(answer: PassAnswer) -> tuple[float, float, float]:
    """Return the medians of a round: forward, backward, both."""
    both = [forward + backward for forward, backward in zip(answer.forward, answer.backward, strict=True)]
    return statistics.median(answer.forward), statistics.median(answer.backward), statistics.median(both)


def speed_ratios(ours: Sequence[PassAnswer], peer: Sequence[PassAnswer]) -> tuple[float, ...]:
    """Return how many times as fast we are, forward, backward and both: the median of the ratios inside a round."""
    pairs = [(median_seconds(a), median_seconds(b)) for a, b in zip(ours, peer, strict=True)]
    return tuple(statistics.median(b[part] / a[part] for a, b in pairs) for part in range(3))


def _mark(device: torch.device) -> "float | torch.cuda.Event":
    """Now; of a GPU, the moment when it has done what it was told so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _elapsed(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _held(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
