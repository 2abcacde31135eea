"""Training speed: sigmoe's step beside transformers' Mixtral, each in a process of its own, in alternating rounds.

The machine's speed drifts from minute to minute, so every round measures all contenders and the machine's matmul rate
one after another, and ratios are taken inside a round.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, Protocol

from ..moe.config import ModelConfig
from ..moe.counts import train_flops
from ..moe.data.progress import Progress, no_progress
from .machine import describe
from .table import BenchTable
from .train_step import StepShape
from .train_worker import WorkerAnswer, WorkerRequest
from .worker import Worker

OURS = "sigmoe"
Rounds = dict[str, list[WorkerAnswer]]
COLUMNS = (
    "contender",
    "malloc",
    "ms a step",
    "fastest",
    "tokens/s",
    "sigmoe is",
    "GFLOP/s",
    "of matmul",
    "peak MB",
    "loss",
)


class Turns(Protocol):
    """How contenders take turns."""

    @property
    def rounds(self) -> int:
        """In each of which all of them do."""
        ...

    @property
    def steps(self) -> int:
        """A round."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainBenchSettings:
    """What `suite=train` measures. `peers` are implementations of the experts in transformers' Mixtral."""

    model: ModelConfig
    batch: int = 8  # sequences a step
    sequence_length: int = 256
    rounds: int = 10
    steps: int = 2  # a round
    warmup: int = 10  # steps
    threads: int = 2
    peers: tuple[str, ...] = ("grouped_mm", "eager")
    # default: malloc as it comes; raised: it keeps freed memory, which spares every contender page faults
    allocators: tuple[Literal["default", "raised"], ...] = ("default", "raised")

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_length < 2 or self.warmup < 0 or not self.allocators:
            raise ValueError("sequence_length must be at least 2, warmup at least 0, allocators not empty")
        fits = self.model.router.name == "top_k" and self.model.sparse_layers == "all" and self.model.qk_norm == "none"
        if self.peers and not fits:
            raise ValueError(
                "peers are Mixtrals: they need router=top_k, sparse_layers all, qk_norm none (or peers=[])"
            )

    @property
    def shape(self) -> StepShape:
        """What one step computes."""
        return StepShape(model=self.model, batch=self.batch, sequence_length=self.sequence_length)


def run_suite(settings: TrainBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure every contender under every allocator; return medians, ratios, matmul share and peak memory."""
    measured: dict[str, Rounds] = {kind: _measure(settings, kind == "raised", progress) for kind in settings.allocators}
    rows = [row for kind, rounds in measured.items() for row in _rows(settings, kind, rounds)]
    return BenchTable(
        title="Training step on a CPU",
        columns=COLUMNS,
        rows=tuple(rows),
        notes=_notes(settings, measured),
        machine=describe(("torch", "transformers")) | {"threads used": str(settings.threads)},
        record={"settings": dataclasses.asdict(settings), "rounds": {k: plain(v) for k, v in measured.items()}},
    )


def _measure(settings: TrainBenchSettings, raised: bool, progress: Progress) -> Rounds:
    """Start all contenders, then let them take turns."""
    names = (OURS, *settings.peers, "matmul")
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                Worker(
                    "train_worker",
                    WorkerRequest(
                        contender=name,
                        shape=settings.shape,
                        threads=settings.threads,
                        raise_thresholds=raised,
                        warmup=settings.warmup,
                    ),
                    WorkerAnswer,
                )
            )
            for name in names
        }
        stage = f"rounds, malloc {'raised' if raised else 'default'}"
        return take_turns({name: worker.run for name, worker in workers.items()}, settings, stage, progress)


def _rows(settings: TrainBenchSettings, kind: str, rounds: Rounds) -> list[tuple[str, ...]]:
    labels = {OURS: OURS} | {name: f"transformers, {name}" for name in settings.peers}
    return speed_rows(labels, settings.shape, kind, rounds)


def take_turns(
    contenders: Mapping[str, Callable[[int], WorkerAnswer]], settings: Turns, stage: str, progress: Progress
) -> Rounds:
    """Let each contender take its steps, round by round; return its answers."""
    progress(stage, 0, settings.rounds)
    rounds: Rounds = {name: [] for name in contenders}
    for number in range(settings.rounds):
        for name, run in contenders.items():
            rounds[name].append(run(settings.steps))
        progress(stage, number + 1, settings.rounds)
    return rounds


def speed_rows(labels: Mapping[str, str], shape: StepShape, kind: str, rounds: Rounds) -> list[tuple[str, ...]]:
    """Return the table's rows, under `COLUMNS`; the first contender of `labels` is compared with the others."""
    tokens, ours = shape.batch * shape.sequence_length, next(iter(labels))
    flops = tokens * train_flops(shape.model, shape.model.build_registry(("text",)), shape.sequence_length)
    best_rates = [max(answer.matmul.values()) for answer in rounds["matmul"]]
    rows: list[tuple[str, ...]] = []
    for name, label in labels.items():
        times = [statistics.median(answer.seconds) for answer in rounds[name]]
        second = statistics.median(times)
        share = statistics.median(flops / time / rate for time, rate in zip(times, best_rates))
        last = rounds[name][-1]
        ratio = "" if name == ours else f"{speed_ratio(rounds[ours], rounds[name]):.2f}x"
        fastest = min(min(answer.seconds) for answer in rounds[name])
        figures = (
            f"{second * 1e3:.0f}",
            f"{fastest * 1e3:.0f}",
            f"{tokens / second:,.0f}",
            ratio,
            f"{flops / second / 1e9:.0f}",
        )
        rows.append((label, kind, *figures, f"{share:.0%}", f"{last.peak_bytes / 1e6:.0f}", f"{last.loss or 0:.3f}"))
    return rows


def speed_ratio(ours: Sequence[WorkerAnswer], peer: Sequence[WorkerAnswer]) -> float:
    """Return how many times as fast we are: the median over rounds of the ratio inside a round."""
    pairs = zip(ours, peer, strict=True)
    return statistics.median(statistics.median(b.seconds) / statistics.median(a.seconds) for a, b in pairs)


def _notes(settings: TrainBenchSettings, measured: Mapping[str, Rounds]) -> tuple[str, ...]:
    rates = {kind: matmul_note(rounds) for kind, rounds in measured.items()}
    return (
        f"{shape_note(settings.shape)}, {settings.threads} threads",
        "a step is forward, backward, clipping at norm 1 and fused AdamW; a process a contender, "
        f"{settings.rounds} alternating rounds of {settings.steps} steps after {settings.warmup} to warm up, medians; "
        "`sigmoe is`: median of the ratios inside each round; fastest: of all steps",
        "GFLOP/s by one formula for all (`moe/counts.py`, train_flops); `of matmul`: share of the best rate of a "
        "1024 x 1024 product in the same round",
        *(f"matmul rate in the same rounds, malloc {kind}: {rate} GFLOP/s" for kind, rate in rates.items()),
        "malloc raised: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at 1 GiB in every process",
    )


def shape_note(shape: StepShape) -> str:
    """Return the model's and the batch's sizes in words."""
    model, router = shape.model, shape.model.router
    return (
        f"D {model.dim}, F {model.expert_dim}, {model.num_layers} layers, {router.num_experts} experts, "
        f"top-{router.top_k}, heads {model.num_heads}/{model.num_kv_heads} of {model.head_width}, "
        f"vocabulary {model.vocab_size}, batch {shape.batch} x {shape.sequence_length} tokens, fp32"
    )


def matmul_note(rounds: Rounds) -> str:
    """Return the machine's median rates in words."""
    return ", ".join(
        f"{name} {statistics.median(answer.matmul[name] for answer in rounds['matmul']) / 1e9:.0f}"
        for name in rounds["matmul"][0].matmul
    )


def plain(rounds: Rounds) -> dict[str, object]:
    """Return the answers as JSON data."""
    return {name: [dataclasses.asdict(answer) for answer in answers] for name, answers in rounds.items()}
