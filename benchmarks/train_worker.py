"""A process that measures one contender: requests on stdin, answers on the stdout it was given, one JSON a line.

The first request describes the work (`WorkerRequest`); its answer comes when the warm-up is done. Each further request
is a number of steps, its answer a `WorkerAnswer`. The process ends with its stdin.
"""

import ctypes
import dataclasses
import json
import os
import resource
import sys
import time
from dataclasses import dataclass

import torch

from ..moe.parsing import from_mapping
from .machine import matmul_rates
from .train_step import Step, StepShape, build_step

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
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    request = from_mapping(WorkerRequest, json.loads(sys.stdin.readline()))
    torch.set_num_threads(request.threads)
    if request.raise_thresholds:
        raise_malloc_thresholds()
    step = None if request.contender == "matmul" else build_step(request.contender, request.shape)
    done, count = 0, request.warmup
    while True:
        print(json.dumps(dataclasses.asdict(_round(step, done, count))), file=answers, flush=True)
        done += count
        line = sys.stdin.readline()
        if not line:
            return
        count = int(line)


def raise_malloc_thresholds() -> None:
    """Make malloc keep up to 1 GiB of freed memory, so that no step waits for fresh pages. Raises OSError off glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, _RAISED) and mallopt(_M_TRIM_THRESHOLD, _RAISED)):
        raise OSError("this C library has no mallopt: measure with allocators=[default]")


def _round(step: Step | None, first: int, count: int) -> WorkerAnswer:
    if step is None:
        return WorkerAnswer(matmul=matmul_rates(torch.device("cpu")))
    seconds: list[float] = []
    loss = None
    for number in range(first, first + count):
        begin = time.perf_counter()
        loss = step(number)
        seconds.append(time.perf_counter() - begin)
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return WorkerAnswer(seconds=tuple(seconds), loss=loss, peak_bytes=peak)


if __name__ == "__main__":
    main()
