"""The expert layer alone, forward and backward, beside its peers: each in a process of its own, in alternating rounds.

Given tokens, routes and weights: sorting, products, activation, weighted sum. The gate is not part of it.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from ..kernels.grouped.op import BLOCK_ROWS
from ..moe.data.progress import Progress, no_progress
from .machine import describe
from .moe_layer import Load, MoeShape
from .moe_worker import MoeRequest
from .passes import PassAnswer, median_seconds, speed_ratios
from .table import BenchTable
from .worker import Worker

OURS = "sigmoe"
Rounds = dict[str, list[PassAnswer]]
# Tokens, D, F, experts, top-k.
ON_A_CPU = ((2048, 256, 512, 8, 2),)
ON_A_GPU = (
    (8192, 768, 1024, 32, 2),
    (8192, 1536, 1024, 32, 2),
    (8192, 4096, 14336, 8, 2),  # Mixtral
    (32768, 2048, 768, 128, 8),  # Qwen3-30B-A3B
    (32768, 2048, 1024, 64, 8),  # OLMoE
    (32768, 4096, 1024, 128, 8),
)
GPU_PEERS = {"liger": "liger_kernel", "moe_ops": "moe_ops"}
_PEERS = ("grouped_linear", "grouped_mm", "eager", "dense")
COLUMNS = (
    *("contender", "tokens, D, F, E, K", "load", "malloc", "forward ms", "backward ms"),
    *("sigmoe is, forward", "backward", "both", "TFLOP/s", "of limit", "tiles", "kept MB", "peak MB"),
)


@dataclass(frozen=True, kw_only=True)
class MoeBenchSettings:
    """What `suite=moe` measures; no shapes: the machine's own."""

    shapes: tuple[MoeShape, ...] = ()
    loads: tuple[Load, ...] = ("uniform", "zipf", "hot", "empty")
    rounds: int = 10
    steps: int = 4  # passes a round
    warmup: int = 5  # passes
    threads: int = 2
    peers: tuple[str, ...] = _PEERS
    allocators: tuple[Literal["default", "raised"], ...] = ("default", "raised")

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "threads", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not set(self.peers) <= set(_PEERS):
            raise ValueError(f"peers must be of {', '.join(_PEERS)}, got {list(self.peers)}")
        if not self.loads or not self.allocators:
            raise ValueError("loads and allocators must not be empty")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    shape: MoeShape
    load: Load
    allocator: str

    @property
    def words(self) -> tuple[str, ...]:
        """As in the table."""
        return " ".join(map(str, vars(self.shape).values())), self.load, self.allocator


def run_suite(settings: MoeBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure every contender in every case; return medians, ratios, rates and memory.

    Raises OSError where contenders that compute the same come to different outputs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = (OURS, *settings.peers, *(name for name in GPU_PEERS if device == "cuda" and find_spec(GPU_PEERS[name])))
    sizes = ON_A_GPU if device == "cuda" else ON_A_CPU
    keys = [field.name for field in dataclasses.fields(MoeShape)]
    shapes = settings.shapes or tuple(MoeShape(**dict(zip(keys, numbers, strict=True))) for numbers in sizes)
    allocators = settings.allocators if device == "cpu" else ("default",)
    cases = [
        Case(shape=shape, load=load, allocator=kind)
        for shape in shapes
        for load in settings.loads
        for kind in allocators
    ]
    measured: list[tuple[Case, Rounds]] = []
    for number, case in enumerate(cases):
        progress("cases", number, len(cases))
        measured.append((case, _measure(settings, case, device, names)))
        check_outputs(measured[-1][1], device)
    progress("cases", len(cases), len(cases))
    hardware = {"GPU": torch.cuda.get_device_name()} if device == "cuda" else {"threads used": str(settings.threads)}
    return BenchTable(
        title=f"The expert layer on a {device.replace('cuda', 'gpu').upper()}",
        columns=COLUMNS,
        rows=tuple(row for case, rounds in measured for row in rows_of(case, rounds, 2 if device == "cuda" else 4)),
        notes=_notes(settings, device, measured),
        machine=describe(("torch", "triton", "transformers", "liger-kernel", "moe-ops")) | hardware,
        record={
            "settings": dataclasses.asdict(settings),
            "cases": [
                {
                    **dataclasses.asdict(case),
                    "rounds": {name: list(map(dataclasses.asdict, a)) for name, a in rounds.items()},
                }
                for case, rounds in measured
            ],
        },
    )


def _measure(settings: MoeBenchSettings, case: Case, device: str, names: Sequence[str]) -> Rounds:
    def start(name: str) -> Worker[PassAnswer]:
        request = MoeRequest(
            contender=name,
            shape=case.shape,
            load=case.load,
            device=device,
            threads=settings.threads,
            raise_thresholds=case.allocator == "raised",
            warmup=settings.warmup,
        )
        return Worker("moe_worker", request, PassAnswer)

    with ExitStack() as stack:
        workers = {name: stack.enter_context(start(name)) for name in (*names, "machine")}
        rounds: Rounds = {name: [] for name in workers}
        for _ in range(settings.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.run(settings.steps))
    return rounds


def check_outputs(rounds: Rounds, device: str) -> None:
    """Raise OSError where a contender's output is not ours; dense computes another."""
    ours = rounds[OURS][-1].norm
    for name, answers in rounds.items():
        norm, tolerance = answers[-1].norm, 1e-2 if device == "cuda" else 1e-4
        if name not in ("dense", "machine") and not abs(norm - ours) <= tolerance * ours:
            raise OSError(f"{name} computes something else: the norm of its output is {norm:.6g}, sigmoe's {ours:.6g}")


def rows_of(case: Case, rounds: Rounds, width: int) -> list[tuple[str, ...]]:
    """Return the table's rows of one case, under `COLUMNS`; `width`: bytes a number."""
    flops, size = 3 * case.shape.forward_flops, case.shape.pass_elements(case.load) * width
    limits = [max(flops / answer.matmul_rate, size / answer.copy_rate) for answer in rounds["machine"]]
    rows = []
    for name, answers in rounds.items():
        if name == "machine":
            continue
        seconds, last = [median_seconds(answer) for answer in answers], answers[-1]
        forward, backward, both = (statistics.median(column) for column in zip(*seconds, strict=True))
        share = statistics.median(limit / taken[2] for taken, limit in zip(seconds, limits, strict=True))
        ratios = [f"{ratio:.2f}x" for ratio in speed_ratios(rounds[OURS], answers)] if name != OURS else [""] * 3
        memory = [f"{size / 1e6:.1f}" * (size > 0) for size in (last.kept_bytes, last.peak_bytes)]
        tiles = f"{case.shape.tile_efficiency(case.load):.0%}" if name in (OURS, "grouped_linear") else ""
        speed = f"{flops / both / 1e12:.3g}", f"{share:.0%}", tiles
        rows.append((name, *case.words, f"{forward * 1e3:.2f}", f"{backward * 1e3:.2f}", *ratios, *speed, *memory))
    return rows


def _notes(settings: MoeBenchSettings, device: str, measured: Sequence[tuple[Case, Rounds]]) -> tuple[str, ...]:
    kind = "bf16" if device == "cuda" else f"fp32, {settings.threads} threads, our torch backend"
    machine = [answer for _, rounds in measured for answer in rounds["machine"]]
    matmul, copy = [one.matmul_rate / 1e12 for one in machine], [one.copy_rate / 1e12 for one in machine]
    return (
        f"{kind}; from tokens, routes and weights to the gradients of tokens, weights and experts, without the gate",
        f"a process a contender, {settings.rounds} alternating rounds of {settings.steps} passes after "
        f"{settings.warmup} to warm up, medians; `sigmoe is`: median of the ratios inside each round",
        "grouped_linear: sigmoe's own permute, grouped products and combine, one by one; grouped_mm, eager: "
        "transformers' experts, a composite of torch's grouped product and a loop; dense: one expert for all rows, no "
        "routing, equal flops",
        "TFLOP/s of forward and backward, 18 T K D F flops; limit: of them at the rate of a square product, or of what "
        "must be read and written at the rate of a copy, in the same round",
        f"tiles: rows over those of the blocks of {BLOCK_ROWS} that Triton's products take on a GPU, R / sum over "
        f"experts of ceil(n / {BLOCK_ROWS}) * {BLOCK_ROWS}: the load's figure, and torch's backend has no such blocks",
        f"in these rounds a square product reached {min(matmul):.3g} to {max(matmul):.3g} TFLOP/s, a copy "
        f"{min(copy):.3g} to {max(copy):.3g} TB/s",
        "kept: what a forward keeps for its backward, weights aside; peak: on a GPU, beside inputs and weights",
        "zipf: expert e as often as 1 / (e + 1); hot: one expert by every token; empty: half of the experts by none",
    )
