"""A process that trains with and without saves, or saves a state of random bytes; or one of several ranks that do."""

import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore

from ..moe.storage.checkpoint import CheckpointContent
from ..moe.storage.tensors import named_tensors
from ..parallel.checkpointer import Checkpointer
from ..parallel.config import ParallelConfig
from ..parallel.engine import NamedState, TrainEngine
from ..parallel.gather import Gathered
from ..parallel.mesh import Axis, background_axis, single_mesh
from ..parallel.pieces import Piece
from .train_step import Step, StepShape, build_local, engine_step
from .worker import serve

_TIMEOUT = timedelta(minutes=5)
_ROW = 1 << 20  # elements of a random tensor's row
STRETCHES = ("none", "background", "waiting")  # what is saved in a stretch of training, and how


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """What is measured."""

    contender: str  # train: stretches of so many steps; write: a save of random bytes under that number
    shape: StepShape  # with the rank in it
    megabytes: int
    threads: int
    warmup: int  # steps, or 0
    folder: str  # of the checkpoints
    store: str  # path of a file by which ranks find each other


@dataclass(frozen=True, kw_only=True)
class SaveAnswer:
    """Seconds: of each of STRETCHES; training stood still at a background save, and then awaited it; of one `write`."""

    stretches: tuple[float, ...] = ()
    snapshot: float = 0.0
    waited: float = 0.0
    write: float = 0.0


def main() -> None:
    """Serve requests until stdin ends."""
    try:
        serve(SaveRequest, _prepare)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()  # without it gloo may abort at exit


def _prepare(request: SaveRequest) -> Callable[[int], SaveAnswer]:
    shape, world = request.shape, single_mesh().world
    if shape.ranks > 1:
        store = FileStore(request.store, shape.ranks)
        distributed.init_process_group("gloo", store=store, rank=shape.rank, world_size=shape.ranks, timeout=_TIMEOUT)
        world = Axis(group=distributed.group.WORLD, rank=shape.rank, size=shape.ranks)
    background = background_axis(world, _TIMEOUT.total_seconds())
    keep = 1 if request.contender == "train" else None
    checkpointer = Checkpointer(Path(request.folder), keep=keep, world=world, background=background)
    if request.contender == "write":
        content = _content(_random_state(request.megabytes, world))
        return lambda number: _written(checkpointer, number, content) if number else SaveAnswer()
    training = _Training(shape, checkpointer)
    return lambda count: training.take_turns(count) if training.warm else training.warm_up(count)


class _Training:
    """Stretches of training, in turns."""

    def __init__(self, shape: StepShape, checkpointer: Checkpointer) -> None:
        self.checkpointer, self.warm = checkpointer, False
        self.engine, self.step = _build(shape)
        self.numbers, self.rounds = itertools.count(), itertools.count()

    def warm_up(self, count: int) -> SaveAnswer:
        self._train(count)
        self.checkpointer.save(0, _content(self.engine.named_state()))
        self.warm = True
        return SaveAnswer()

    def take_turns(self, count: int) -> SaveAnswer:
        """Train `count` steps in each way, another first in each round."""
        seconds, first = dict.fromkeys(STRETCHES, 0.0), next(self.rounds)
        snapshot = waited = 0.0
        for place in range(len(STRETCHES)):
            kind = STRETCHES[(first + place) % len(STRETCHES)]
            _meet(self.checkpointer.world)
            begin = time.perf_counter()
            match kind:
                case "none":
                    self._train(count)
                case "waiting":
                    self.checkpointer.save(*self._state())
                    self._train(count)
                case _:
                    saving = self.checkpointer.begin_save(*self._state())
                    snapshot = time.perf_counter() - begin
                    self._train(count)
                    end = time.perf_counter()
                    saving.result()
                    waited = time.perf_counter() - end
            _meet(self.checkpointer.world)
            seconds[kind] = time.perf_counter() - begin
        return SaveAnswer(stretches=tuple(seconds.values()), snapshot=snapshot, waited=waited)

    def _state(self) -> tuple[int, CheckpointContent]:
        return next(self.numbers), _content(self.engine.named_state())

    def _train(self, count: int) -> None:
        for number in itertools.islice(self.numbers, count):
            self.step(number)


def _build(shape: StepShape) -> tuple[TrainEngine, Step]:
    if shape.ranks == 1:
        model, engine = build_local(shape)
        return engine, engine_step(model, engine, shape)
    several = importlib.import_module(".expert_parallel_step", __package__)  # brings DeepSpeed and Megatron-Core
    model, zero = several.build_zero(shape, ParallelConfig())
    return zero, engine_step(model, zero, shape)


def _written(checkpointer: Checkpointer, number: int, content: CheckpointContent) -> SaveAnswer:
    _meet(checkpointer.world)
    begin = time.perf_counter()
    checkpointer.save(number, content)
    return SaveAnswer(write=time.perf_counter() - begin)


def _random_state(megabytes: int, world: Axis) -> NamedState:
    """Masters and two moments of random bytes; every rank holds its share of the rows of every tensor."""
    generator = torch.Generator().manual_seed(world.rank)
    rows = max(megabytes * 1_000_000 // (3 * 4 * _ROW), 1)  # a third of fp32 each
    share = range(rows * world.rank // world.size, rows * (world.rank + 1) // world.size)
    names = {"model": ("model.norm.weight",), "optimizer": ("exp_avg", "exp_avg_sq")}

    def pieces(name: str) -> Iterator[Piece]:
        values = torch.empty(len(share) * _ROW).view(torch.int32).random_(generator=generator).view(torch.float32)
        yield Piece(
            name=name, shape=(rows, _ROW), dim=0, start=share.start, stop=share.stop, begin=0, end=values.numel(),
            tensor=values,
        )  # fmt: skip

    held = {part: [piece for name in some for piece in pieces(name)] for part, some in names.items()}
    if world.size > 1:
        return NamedState(**{part: Gathered(some, world) for part, some in held.items()})
    whole = {part: {piece.name: piece.tensor.view(piece.shape) for piece in some} for part, some in held.items()}
    return NamedState(**{part: named_tensors(tensors) for part, tensors in whole.items()})


def _content(state: NamedState) -> CheckpointContent:
    return CheckpointContent(
        model=state.model,
        optimizer=state.optimizer,
        state={},
        config={},
        registry={},
        tokenizer=None,
        hf_config=None,
    )


def _meet(world: Axis) -> None:
    if world.size > 1:
        distributed.barrier()


if __name__ == "__main__":
    main()
