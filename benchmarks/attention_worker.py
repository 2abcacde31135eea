"""A process that measures one contender's attention, forward and backward apart."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .attention_case import AttentionCase, draw
from .attention_peers import contender
from .passes import PassAnswer, machine_answer, measure
from .train_worker import raise_malloc_thresholds
from .worker import serve


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What a worker measures: a contender, or, as `machine`, what the hardware does."""

    contender: str
    case: AttentionCase
    device: str  # cpu, cuda
    threads: int
    warmup: int  # passes


def main() -> None:
    """Serve requests until stdin ends."""
    serve(AttentionRequest, _prepare)


def _prepare(request: AttentionRequest) -> Callable[[int], PassAnswer]:
    raise_malloc_thresholds()
    device = torch.device(request.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if request.contender == "machine":
        return lambda count: machine_answer(device, dtype)
    inputs = draw(request.case, device, dtype)
    forward = contender(request.contender, inputs)
    return lambda count: measure(forward, inputs.leaves, device, count, inputs.leaves)


if __name__ == "__main__":
    main()
