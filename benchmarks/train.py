"""Training speed: sigmoe's step beside transformers' Mixtral, each in a process of its own, in alternating rounds.

The machine's speed drifts from minute to minute, so every round measures all contenders and the machine's matmul rate
one after another, and ratios are taken inside a round.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

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
        columns=(
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
        ),
        rows=tuple(rows),
        notes=_notes(settings, measured),
        machine=describe(("torch", "transformers")) | {"threads used": str(settings.threads)},
        record={"settings": dataclasses.asdict(settings), "rounds": {k: _plain(v) for k, v in measured.items()}},
    )


def _measure(settings: TrainBenchSettings, raised: bool, progress: Progress) -> Rounds:
    """Start all contenders, then let them take turns."""
    names = (OURS, *settings.peers, "matmul")
    stage = f"rounds, malloc {'raised' if raised else 'default'}"
    progress(stage, 0, settings.rounds)
    rounds: Rounds = {name: [] for name in names}
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
        for number in range(settings.rounds):
            for name in names:
                rounds[name].append(workers[name].run(settings.steps))
            progress(stage, number + 1, settings.rounds)
    return rounds


def _rows(settings: TrainBenchSettings, kind: str, rounds: Rounds) -> list[tuple[str, ...]]:
    tokens = settings.batch * settings.sequence_length
    flops = tokens * train_flops(settings.model, settings.model.build_registry(("text",)), settings.sequence_length)
    best_rates = [max(answer.matmul.values()) for answer in rounds["matmul"]]
    rows: list[tuple[str, ...]] = []
    for name in (OURS, *settings.peers):
        times = [statistics.median(answer.seconds) for answer in rounds[name]]
        second = statistics.median(times)
        share = statistics.median(flops / time / rate for time, rate in zip(times, best_rates))
        last = rounds[name][-1]
        ratio = "" if name == OURS else f"{speed_ratio(rounds[OURS], rounds[name]):.2f}x"
        fastest = min(min(answer.seconds) for answer in rounds[name])
        figures = (
            f"{second * 1e3:.0f}",
            f"{fastest * 1e3:.0f}",
            f"{tokens / second:,.0f}",
            ratio,
            f"{flops / second / 1e9:.0f}",
        )
        label = name if name == OURS else f"transformers, {name}"
        rows.append((label, kind, *figures, f"{share:.0%}", f"{last.peak_bytes / 1e6:.0f}", f"{last.loss or 0:.3f}"))
    return rows


def speed_ratio(ours: Sequence[WorkerAnswer], peer: Sequence[WorkerAnswer]) -> float:
    """Return how many times as fast we are: the median over rounds of the ratio inside a round."""
    pairs = zip(ours, peer, strict=True)
    return statistics.median(statistics.median(b.seconds) / statistics.median(a.seconds) for a, b in pairs)


def _notes(settings: TrainBenchSettings, measured: Mapping[str, Rounds]) -> tuple[str, ...]:
    model, router = settings.model, settings.model.router
    shape = (
        f"D {model.dim}, F {model.expert_dim}, {model.num_layers} layers, {router.num_experts} experts, "
        f"top-{router.top_k}, heads {model.num_heads}/{model.num_kv_heads} of {model.head_width}, "
        f"vocabulary {model.vocab_size}, batch {settings.batch} x {settings.sequence_length} tokens, fp32, "
        f"{settings.threads} threads"
    )
    rates = {
        kind: ", ".join(
            f"{name} {statistics.median(answer.matmul[name] for answer in rounds['matmul']) / 1e9:.0f}"
            for name in rounds["matmul"][0].matmul
        )
        for kind, rounds in measured.items()
    }
    return (
        shape,
        "a step is forward, backward, clipping at norm 1 and fused AdamW; a process a contender, "
        f"{settings.rounds} alternating rounds of {settings.steps} steps after {settings.warmup} to warm up, medians; "
        "`sigmoe is`: median of the ratios inside each round; fastest: of all steps",
        "GFLOP/s by one formula for all (`moe/counts.py`, train_flops); `of matmul`: share of the best rate of a "
        "1024 x 1024 product in the same round",
        *(f"matmul rate in the same rounds, malloc {kind}: {rate} GFLOP/s" for kind, rate in rates.items()),
        "malloc raised: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at 1 GiB in every process",
    )


def _plain(rounds: Rounds) -> dict[str, object]:
    return {name: [dataclasses.asdict(answer) for answer in answers] for name, answers in rounds.items()}
