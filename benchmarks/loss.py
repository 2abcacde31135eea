"""Output head and cross-entropy beside their peers, forward and backward: a process each, in alternating rounds.

And the memory of a whole training step beside what it cannot do without.
"""

import dataclasses
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch.nn import functional

from ..moe.config import ModelConfig, RouterConfig
from ..moe.data.progress import Progress, no_progress
from .loss_head import LossShape
from .loss_worker import LossRequest
from .machine import describe
from .memory import StepMemory, step_memory
from .passes import PassAnswer, median_seconds, speed_ratios
from .table import BenchTable
from .worker import Worker

OURS = "sigmoe"
Rounds = dict[str, list[PassAnswer]]
# Tokens, D, V.
ON_A_CPU = ((1024, 128, 32768), (512, 128, 131072))
ON_A_GPU = tuple((16384, D, V) for D in (2048, 4096) for V in (32768, 131072, 151936))
GPU_PEERS = ("liger", "liger_fp32")
COLUMNS = (
    *("contender", "tokens, D, V", "malloc", "ms", "sigmoe is"),
    *("TFLOP/s", "of limit", "kept MB", "peak MB"),
)


@dataclass(frozen=True, kw_only=True)
class LossBenchSettings:
    """What `suite=loss` measures; no shapes: the machine's own."""

    shapes: tuple[LossShape, ...] = ()
    rounds: int = 8
    steps: int = 2  # passes a round
    warmup: int = 2  # passes
    threads: int = 2
    peers: tuple[str, ...] = ("whole", "checkpointed", "torch")
    allocators: tuple[Literal["default", "raised"], ...] = ("default", "raised")
    step_tokens: int = 4096  # of the training step whose memory is measured, on a CPU
    step_vocab_size: int = 32768

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "warmup", "threads", "step_tokens", "step_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.allocators:
            raise ValueError("allocators must not be empty")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    shape: LossShape
    allocator: str

    @property
    def words(self) -> tuple[str, ...]:
        """As in the table."""
        return " ".join(map(str, vars(self.shape).values())), self.allocator


def run_suite(settings: LossBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure every contender in every case; return medians, ratios, rates and memory.

    Raises OSError where contenders come to different losses.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = settings.shapes or tuple(
        LossShape(tokens=T, dim=D, vocab_size=V) for T, D, V in (ON_A_GPU if device == "cuda" else ON_A_CPU)
    )
    allocators = settings.allocators if device == "cpu" else ("default",)
    cases = [Case(shape=shape, allocator=kind) for shape in shapes for kind in allocators]
    measured: list[tuple[Case, Rounds]] = []
    for number, case in enumerate(cases):
        progress("cases", number, len(cases))
        measured.append((case, _measure(settings, case, device)))
        check_losses(measured[-1][1], device)
    progress("cases", len(cases), len(cases))
    step = None if device == "cuda" else step_memory(step_config(settings.step_vocab_size), settings.step_tokens)
    rows = [row for case, rounds in measured for row in rows_of(case, rounds)]
    hardware = {"GPU": torch.cuda.get_device_name()} if device == "cuda" else {"threads used": str(settings.threads)}
    return BenchTable(
        title=f"Output head and cross-entropy on a {device.replace('cuda', 'gpu').upper()}",
        columns=COLUMNS,
        rows=(*rows, *([] if step is None else [_step_row(settings, step)])),
        notes=_notes(settings, device, step),
        machine=describe(("torch", "triton", "liger-kernel")) | hardware,
        record={
            "settings": dataclasses.asdict(settings),
            "cases": [
                {
                    **dataclasses.asdict(case),
                    "rounds": {name: list(map(dataclasses.asdict, a)) for name, a in rounds.items()},
                }
                for case, rounds in measured
            ],
            "step": None if step is None else dataclasses.asdict(step),
        },
    )


def step_config(vocab_size: int) -> ModelConfig:
    """Return the narrow model whose training step's memory is measured."""
    return ModelConfig(
        vocab_size=vocab_size,
        dim=64,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        expert_dim=128,
        router=RouterConfig(name="top_k", num_experts=4),
    )


def _measure(settings: LossBenchSettings, case: Case, device: str) -> Rounds:
    def start(name: str) -> Worker[PassAnswer]:
        request = LossRequest(
            contender=name,
            shape=case.shape,
            device=device,
            threads=settings.threads,
            raise_thresholds=case.allocator == "raised",
            warmup=settings.warmup,
        )
        return Worker("loss_worker", request, PassAnswer)

    liger = GPU_PEERS if device == "cuda" and find_spec("liger_kernel") else ()
    peers = [name for name in settings.peers if name != "torch" or hasattr(functional, "linear_cross_entropy")]
    with ExitStack() as stack:
        workers = {name: stack.enter_context(start(name)) for name in (OURS, *peers, *liger, "machine")}
        rounds: Rounds = {name: [] for name in workers}
        for _ in range(settings.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.run(settings.steps))
    return rounds


def check_losses(rounds: Rounds, device: str) -> None:
    """Raise OSError where a contender's loss is not ours."""
    ours, tolerance = rounds[OURS][-1].norm, 1e-2 if device == "cuda" else 1e-5
    for name, answers in rounds.items():
        if name != "machine" and not abs(answers[-1].norm - ours) <= tolerance * ours:
            raise OSError(f"{name} computes something else: its loss is {answers[-1].norm:.6g}, sigmoe's {ours:.6g}")


def rows_of(case: Case, rounds: Rounds) -> list[tuple[str, ...]]:
    """Return the table's rows of one case, under `COLUMNS`."""
    rows, flops = [], case.shape.flops
    for name, answers in rounds.items():
        if name == "machine":
            continue
        seconds = [median_seconds(answer)[2] for answer in answers]
        rates = [flops / taken / one.matmul_rate for taken, one in zip(seconds, rounds["machine"], strict=True)]
        ratio = "" if name == OURS else f"{speed_ratios(rounds[OURS], answers)[2]:.2f}x"
        taken, memory = statistics.median(seconds), (answers[-1].kept_bytes, answers[-1].peak_bytes)
        figures = f"{taken * 1e3:.1f}", ratio, f"{flops / taken / 1e12:.3g}", f"{statistics.median(rates):.0%}"
        rows.append((name, *case.words, *figures, *(f"{size / 1e6:.1f}" for size in memory)))
    return rows


def _step_row(settings: LossBenchSettings, step: StepMemory) -> tuple[str, ...]:
    config = step_config(settings.step_vocab_size)
    words = f"{settings.step_tokens} {config.dim} {config.vocab_size}"
    return ("a training step", words, *[""] * 5, f"{step.kept / 1e6:.1f}", f"{step.peak / 1e6:.1f}")


def _notes(settings: LossBenchSettings, device: str, step: StepMemory | None) -> tuple[str, ...]:
    kind = "bf16" if device == "cuda" else f"fp32, {settings.threads} threads, our torch backend"
    notes = (
        f"{kind}; from hidden states and labels to the gradients of hidden states and weight, forward and backward",
        f"a process a contender, {settings.rounds} alternating rounds of {settings.steps} passes after "
        f"{settings.warmup} to warm up, medians; `sigmoe is`: median of the ratios inside each round",
        "whole: all logits, then torch's cross-entropy; checkpointed: the same for 1024 tokens at a time, computed "
        "again in the backward; torch: its own chunked function; liger: Liger's, the weight's gradient summed in bf16; "
        "liger_fp32: in fp32, as ours",
        "TFLOP/s: 6 T D V flops; limit: those at the rate of a square product in the same round",
        "kept: what a forward saves for its backward, the weight and gradients made in the forward aside; peak: the "
        "most that was allocated beside the inputs, gradients included",
    )
    if step is None:
        return notes
    return *notes, f"a training step (forward, backward) of a narrow model of six sparse layers, beside weights: {step}"
