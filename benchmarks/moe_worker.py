"""A process that measures one contender's expert layer, forward and backward apart."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .moe_layer import Load, MoeShape, build_layer, draw
from .passes import PassAnswer, machine_answer, measure
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


def main() -> None:
    """Serve requests until stdin ends."""
    serve(MoeRequest, _prepare)


def _prepare(request: MoeRequest) -> Callable[[int], PassAnswer]:
    if request.raise_thresholds:
        raise_malloc_thresholds()
    device = torch.device(request.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if request.contender == "machine":
        return lambda count: machine_answer(device, dtype)
    layer = build_layer(request.contender, draw(request.shape, request.load, device, dtype))
    return lambda count: measure(layer.forward, layer.leaves, device, count, layer.leaves[-2:])


if __name__ == "__main__":
    main()
