"""Training speed on several gloo ranks: sigmoe's expert parallelism, DeepSpeed's own MoE layer in the same model, and
transformers' Mixtral under torch's DistributedDataParallel. The same global batch, shared out evenly.

As in `train.py` contenders take turns, and ratios are taken inside a round; a contender is several processes here.
"""

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from ..moe.config import ModelConfig
from ..moe.data.progress import Progress, no_progress
from .expert_parallel_worker import RankRequest
from .machine import describe
from .table import BenchTable
from .train import COLUMNS, Rounds, matmul_note, plain, shape_note, speed_rows, take_turns
from .train_step import StepShape
from .train_worker import WorkerAnswer
from .worker import Worker

_OURS = {"sigmoe 1": "sigmoe, ZeRO 1", "sigmoe 2": "sigmoe, ZeRO 2"}
_DEEPSPEED = re.compile(r"deepspeed (dropless|\d+(?:\.\d+)?) (torch|sigmoe)")


@dataclass(frozen=True, kw_only=True)
class ExpertParallelSettings:
    """What `suite=expert_parallel` measures.

    `peers` are `deepspeed CAPACITY PRODUCTS` (a capacity factor or dropless; whose products its experts use, torch or
    sigmoe), or implementations of the experts in transformers' Mixtral.
    """

    model: ModelConfig
    batch: int = 8  # sequences a step, of all ranks together
    sequence_length: int = 256
    rounds: int = 10
    steps: int = 2  # a round
    warmup: int = 10  # steps
    ranks: int = 2  # expert parallelism over all of them
    threads: int = 1  # a rank
    stages: tuple[Literal[1, 2], ...] = (1, 2)  # of ZeRO, sigmoe's
    peers: tuple[str, ...] = (
        *("deepspeed dropless torch", "deepspeed dropless sigmoe", "deepspeed 1.0 torch", "deepspeed 1.0 sigmoe"),
        *("grouped_mm", "eager"),
    )
    allocators: tuple[Literal["default", "raised"], ...] = ("default", "raised")

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "steps", "threads", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_length < 2 or self.warmup < 0 or not (self.allocators and self.stages):
            raise ValueError("sequence_length must be at least 2, warmup at least 0; stages, allocators not empty")
        router = self.model.router
        if self.ranks < 2 or self.batch % self.ranks or self.model.sparse_layers == "none":
            raise ValueError(f"ranks must be at least 2, divide batch ({self.batch}) and have experts to share out")
        fits = router.name == "top_k" and self.model.sparse_layers == "all" and self.model.qk_norm == "none"
        if self.peers and not (fits and isinstance(router.num_experts, int) and router.num_experts % self.ranks == 0):
            raise ValueError(
                "peers need router=top_k, sparse_layers all, qk_norm none, and ranks that divide the experts "
                "(or peers=[])"
            )
        for peer in self.peers:
            if peer.startswith("deepspeed") and not _DEEPSPEED.fullmatch(peer):
                raise ValueError(f"peers: {peer!r} is not 'deepspeed dropless|FACTOR torch|sigmoe'")

    @property
    def contenders(self) -> dict[str, str]:
        """Names and labels."""
        ours = {name: label for name, label in _OURS.items() if int(name[-1]) in self.stages}
        return ours | {peer: _label(peer) for peer in self.peers}


def run_suite(settings: ExpertParallelSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure every contender under every allocator; return medians, ratios, matmul share and peak memory."""
    measured: dict[str, Rounds] = {kind: _measure(settings, kind == "raised", progress) for kind in settings.allocators}
    shape = _shape(settings, 0)
    return BenchTable(
        title=f"Training step on {settings.ranks} gloo ranks",
        columns=COLUMNS,
        rows=tuple(
            row for kind, rounds in measured.items() for row in speed_rows(settings.contenders, shape, kind, rounds)
        ),
        notes=_notes(settings, measured),
        machine=describe(("torch", "deepspeed", "transformers"))
        | {"threads used": f"{settings.ranks} ranks x {settings.threads}"},
        record={"settings": dataclasses.asdict(settings), "rounds": {k: plain(v) for k, v in measured.items()}},
    )


def combined(answers: Sequence[WorkerAnswer]) -> WorkerAnswer:
    """Return a contender's answer from its ranks': the slowest's steps, the loss and rates of all, the highest peak."""
    return WorkerAnswer(
        seconds=tuple(max(seconds) for seconds in zip(*(answer.seconds for answer in answers), strict=True)),
        loss=sum(answer.loss or 0.0 for answer in answers),
        peak_bytes=max(answer.peak_bytes for answer in answers),
        matmul={name: sum(answer.matmul[name] for answer in answers) for name in answers[0].matmul},
    )


class RankWorkers:
    """A contender's processes."""

    def __init__(self, workers: Sequence[Worker[WorkerAnswer]]) -> None:
        self.workers = workers

    def run(self, steps: int) -> WorkerAnswer:
        """Let all of them take `steps` steps."""
        for worker in self.workers:
            worker.send(str(steps))
        return self.receive()

    def receive(self) -> WorkerAnswer:
        """Wait for the ranks' answers."""
        return combined([worker.receive() for worker in self.workers])


@contextmanager
def start_ranks(contender: str, settings: ExpertParallelSettings, *, raised: bool) -> Iterator[RankWorkers]:
    """Start a contender's ranks, warmed up; they end with the context."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(
                    "expert_parallel_worker",
                    RankRequest(
                        contender=contender,
                        shape=_shape(settings, rank),
                        threads=settings.threads,
                        raise_thresholds=raised,
                        warmup=settings.warmup,
                        store=f"{folder}/store",
                    ),
                    WorkerAnswer,
                    wait=False,  # for each other
                    # What DeepSpeed wants of a launcher; a CPU, lest it look for an accelerator.
                    environment={"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
                )
            )
            for rank in range(settings.ranks)
        ]
        ranks = RankWorkers(workers)
        ranks.receive()
        yield ranks


def _measure(settings: ExpertParallelSettings, raised: bool, progress: Progress) -> Rounds:
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(start_ranks(name, settings, raised=raised)).run
            for name in (*settings.contenders, "matmul")
        }
        return take_turns(contenders, settings, f"rounds, malloc {'raised' if raised else 'default'}", progress)


def _shape(settings: ExpertParallelSettings, rank: int) -> StepShape:
    return StepShape(
        model=settings.model,
        batch=settings.batch,
        sequence_length=settings.sequence_length,
        rank=rank,
        ranks=settings.ranks,
    )


def _label(peer: str) -> str:
    matched = _DEEPSPEED.fullmatch(peer)
    if matched is None:
        return f"transformers, {peer}, DDP"
    capacity = "dropless" if matched[1] == "dropless" else f"capacity {matched[1]}"
    return f"DeepSpeed MoE, {capacity}, {matched[2]}'s products"


def _notes(settings: ExpertParallelSettings, measured: Mapping[str, Rounds]) -> tuple[str, ...]:
    return (
        f"{shape_note(_shape(settings, 0))}; {settings.ranks} gloo ranks of one machine, each {settings.threads} "
        f"threads and {settings.batch // settings.ranks} sequences",
        "a step is forward, backward, clipping at norm 1 and fused AdamW, as long as the slowest rank takes; "
        f"{settings.rounds} alternating rounds of {settings.steps} steps after {settings.warmup} to warm up, medians; "
        "`sigmoe is` (the first row's speed): median of the ratios inside each round; fastest: of all steps",
        "sigmoe: experts spread over the ranks, dropless, DeepSpeed ZeRO over what is dense; DeepSpeed MoE: "
        "deepspeed.moe.layer.MoE with ep_size of all ranks in sigmoe's Transformer, the same initial weights, "
        "deepspeed.initialize, ZeRO 1; its experts are torch.nn.Linear (torch's products) or sigmoe's DenseFFN; "
        "transformers: DistributedDataParallel",
        "a capacity factor (the layer's default is 1.0) drops the tokens over it, which is less work; dropless none",
        "losses are the whole batch's; DeepSpeed's lacks the z-loss, and balance losses differ in kind",
        "GFLOP/s by one formula for all (`moe/counts.py`, train_flops); `of matmul`: share of the best rate of "
        "1024 x 1024 products, all ranks at once, in the same round; peak MB: of the rank that held most",
        *(f"matmul rate in the same rounds, malloc {k}: {matmul_note(r)} GFLOP/s" for k, r in measured.items()),
        "malloc raised: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at 1 GiB in every process",
    )
