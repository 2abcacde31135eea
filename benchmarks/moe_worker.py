"""A process that measures one contender's expert layer, forward and backward apart."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .machine import copy_rate, matmul_rate
from .moe_layer import Layer, Load, MoeShape, build_layer, draw
from .train_worker import raise_malloc_thresholds
from .worker import serve


@dataclass(frozen=True, kw_only=True)
class MoeRequest:
    """What a worker measures: a contender, or, as `machine`, what the hardware does."""

    contender: str
    shape: MoeShape
    load: Load
    device: str  # cpu, cuda
    threads: int
    raise_thresholds: bool
    warmup: int  # passes


@dataclass(frozen=True, kw_only=True)
class MoeAnswer:
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


def main() -> None:
    """Serve requests until stdin ends."""
    serve(MoeRequest, _prepare)


def _prepare(request: MoeRequest) -> Callable[[int], MoeAnswer]:
    if request.raise_thresholds:
        raise_malloc_thresholds()
    device = torch.device(request.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if request.contender == "machine":
        return lambda count: MoeAnswer(matmul_rate=matmul_rate(device, dtype), copy_rate=copy_rate(device))
    layer = build_layer(request.contender, draw(request.shape, request.load, device, dtype))
    return lambda count: _measure(layer, device, count)


def _measure(layer: Layer, device: torch.device, count: int) -> MoeAnswer:
    forward, backward, peak, norm = [], [], 0, 0.0
    for _ in range(count):
        held = _held(device)
        begin = _now(device)
        out = layer.forward()
        middle = _now(device)
        grads = torch.autograd.grad(out, layer.leaves, out.detach())
        end = _now(device)
        forward.append(middle - begin)
        backward.append(end - middle)
        if device.type == "cuda":
            peak = max(peak, torch.cuda.max_memory_allocated(device) - held)
        norm = float(out.detach().double().norm())
        del out, grads
    kept = kept_bytes(layer)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the others, who take turns
    return MoeAnswer(forward=tuple(forward), backward=tuple(backward), kept_bytes=kept, peak_bytes=peak, norm=norm)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _held(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def kept_bytes(layer: Layer) -> int:
    """Return the bytes that a forward keeps for its backward: whole allocations, each once, the weights' aside."""
    weights = {leaf.untyped_storage().data_ptr() for leaf in layer.leaves[-2:]}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = layer.forward()
    del out
    return sum(size for address, size in kept.items() if address not in weights)


if __name__ == "__main__":
    main()
