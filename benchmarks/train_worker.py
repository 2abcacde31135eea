"""A process that measures one contender's training."""

import ctypes
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .machine import matmul_rates
from .train_step import Step, StepShape, build_step
from .worker import peak_bytes, serve

# mallopt(3) of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _RAISED = -1, -3, 1 << 30


@dataclass(frozen=True, kw_only=True)
class WorkerRequest:
    """What a worker measures: a contender, or, as `matmul`, the machine's rate."""

    contender: str
    shape: StepShape
    threads: int
    raise_thresholds: bool  # let malloc keep freed memory instead of handing it back to the system
    warmup: int  # steps


@dataclass(frozen=True, kw_only=True)
class WorkerAnswer:
    """One round: seconds a step, the last loss, the most bytes this process ever held, matmul rates in flop/s."""

    seconds: tuple[float, ...] = ()
    loss: float | None = None
    peak_bytes: int = 0
    matmul: dict[str, float] = dataclasses.field(default_factory=dict)


def main() -> None:
    """Serve requests until stdin ends."""
    serve(WorkerRequest, _prepare)


def raise_malloc_thresholds() -> None:
    """Make malloc keep up to 1 GiB of freed memory, so that no step waits for fresh pages. Raises OSError off glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, _RAISED) and mallopt(_M_TRIM_THRESHOLD, _RAISED)):
        raise OSError("this C library has no mallopt: measure with allocators=[default]")


def _prepare(request: WorkerRequest) -> Callable[[int], WorkerAnswer]:
    if request.raise_thresholds:
        raise_malloc_thresholds()
    if request.contender == "matmul":
        return lambda count: WorkerAnswer(matmul=matmul_rates(torch.device("cpu")))
    step, numbers = build_step(request.contender, request.shape), itertools.count()
    return lambda count: measure(step, itertools.islice(numbers, count))


def measure(step: Step, numbers: Iterator[int]) -> WorkerAnswer:
    """Take the steps of these numbers."""
    seconds: list[float] = []
    loss = None
    for number in numbers:
        begin = time.perf_counter()
        loss = step(number)
        seconds.append(time.perf_counter() - begin)
    return WorkerAnswer(seconds=tuple(seconds), loss=loss, peak_bytes=peak_bytes())


if __name__ == "__main__":
    main()
