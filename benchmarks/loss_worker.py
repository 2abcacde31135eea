"""A process that measures one contender's output head and loss."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .loss_head import LossShape, build_loss, draw
from .memory import allocated_peak
from .passes import PassAnswer, machine_answer, measure
from .train_worker import raise_malloc_thresholds
from .worker import serve


@dataclass(frozen=True, kw_only=True)
class LossRequest:
    """What a worker measures: a contender, or, as `machine`, what the hardware does."""

    contender: str
    shape: LossShape
    device: str  # cpu, cuda
    threads: int
    raise_thresholds: bool
    warmup: int  # passes


def main() -> None:
    """Serve requests until stdin ends."""
    serve(LossRequest, _prepare)


def _prepare(request: LossRequest) -> Callable[[int], PassAnswer]:
    if request.raise_thresholds:
        raise_malloc_thresholds()
    device = torch.device(request.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if request.contender == "machine":
        return lambda count: machine_answer(device, dtype)
    inputs = draw(request.shape, device, dtype)
    forward, leaves = build_loss(request.contender, inputs), (inputs.x_TD, inputs.weight_VD)
    if device.type == "cuda":
        return lambda count: measure(forward, leaves, device, count, leaves)
    peak = allocated_peak(lambda: torch.autograd.grad(forward(), leaves))
    return lambda count: dataclasses.replace(measure(forward, leaves, device, count, leaves), peak_bytes=peak)


if __name__ == "__main__":
    main()
