"""A process that is one rank of a contender's training on several; gloo, without a launcher."""

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore

from .machine import matmul_rates
from .train_step import Step, StepShape
from .train_worker import WorkerAnswer, measure, raise_malloc_thresholds
from .worker import serve

_TIMEOUT = timedelta(minutes=2)  # importing a peer takes seconds, and not equally many everywhere


@dataclass(frozen=True, kw_only=True)
class RankRequest:
    """What a rank measures: a contender, or, as `matmul`, the machine's rate while all ranks multiply."""

    contender: str
    shape: StepShape  # with the rank in it
    threads: int
    raise_thresholds: bool
    warmup: int  # steps
    store: str  # path of a file by which ranks find each other


def main() -> None:
    """Serve requests until stdin ends."""
    try:
        serve(RankRequest, _prepare)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()  # without it gloo may abort at exit


def _prepare(request: RankRequest) -> Callable[[int], WorkerAnswer]:
    if request.raise_thresholds:
        raise_malloc_thresholds()
    shape = request.shape
    store = FileStore(request.store, shape.ranks)
    distributed.init_process_group("gloo", store=store, rank=shape.rank, world_size=shape.ranks, timeout=_TIMEOUT)
    if request.contender == "matmul":
        return _at_once(lambda count: WorkerAnswer(matmul=matmul_rates(torch.device("cpu"))))
    step, numbers = _build_step(request.contender, shape), itertools.count()
    return _at_once(lambda count: measure(step, itertools.islice(numbers, count)))


def _build_step(contender: str, shape: StepShape) -> Step:
    """Return a function from the step's number to this rank's part of the loss; each imports only what it needs.

    `contender` is `sigmoe STAGE` of ZeRO, `deepspeed CAPACITY PRODUCTS`, or a Mixtral of transformers.
    """
    kind, _, option = contender.partition(" ")
    match kind:
        case "sigmoe":
            step: Step = importlib.import_module(".expert_parallel_step", __package__).sigmoe_step(shape, int(option))
        case "deepspeed":
            step = importlib.import_module(".deepspeed_step", __package__).deepspeed_step(shape, option)
        case _:
            step = importlib.import_module(".mixtral_step", __package__).mixtral_step(shape, contender)
    return step


def _at_once(take: Callable[[int], WorkerAnswer]) -> Callable[[int], WorkerAnswer]:
    def taken(count: int) -> WorkerAnswer:
        distributed.barrier()
        return take(count)

    return taken


if __name__ == "__main__":
    main()
