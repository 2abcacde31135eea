"""A process that measures one contender's memory-bound operation, forward and backward apart."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .norm_operation import NormShape, Operation, build, draw
from .passes import PassAnswer, machine_answer, measure
from .train_worker import raise_malloc_thresholds
from .worker import serve


@dataclass(frozen=True, kw_only=True)
class NormRequest:
    """What a worker measures: a contender, or, as `machine`, what the hardware does."""

    contender: str
    operation: Operation
    shape: NormShape
    device: str  # cpu, cuda
    threads: int
    warmup: int  # passes


def main() -> None:
    """Serve requests until stdin ends."""
    serve(NormRequest, _prepare)


def _prepare(request: NormRequest) -> Callable[[int], PassAnswer]:
    raise_malloc_thresholds()  # else new pages for every output would be measured
    device = torch.device(request.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if request.contender == "machine":
        return lambda count: machine_answer(device, dtype)
    inputs = draw(request.operation, request.shape, device, dtype)
    forward = build(request.contender, inputs)
    return lambda count: measure(forward, inputs.leaves, device, count, inputs.weights)


if __name__ == "__main__":
    main()
