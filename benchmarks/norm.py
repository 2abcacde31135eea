"""The memory-bound operations alone, forward and backward, beside their peers.

RMSNorm with and without a residual sum, QK-norm with rotary embedding, SwiGLU; each contender in a process of its own,
in alternating rounds.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import get_args

import torch

from ..moe.data.progress import Progress, no_progress
from .machine import describe
from .moe import OURS, Rounds, check_outputs
from .norm_operation import NormShape, Operation
from .norm_peers import PACKAGES, PEERS
from .norm_worker import NormRequest
from .passes import PassAnswer, median_seconds, speed_ratios
from .table import BenchTable
from .worker import Worker

# Tokens, width, head width.
ON_A_CPU = ((4096, 1024, 64),)
ON_A_GPU = ((8192, 4096, 128), (32768, 2048, 128), (32768, 4096, 128), (32768, 8192, 128))
COLUMNS = (
    *("contender", "operation", "tokens, width, head", "forward ms", "backward ms"),
    *("sigmoe is, forward", "backward", "both", "forward GB/s", "of copy", "backward GB/s", "of copy", "kept MB"),
)


@dataclass(frozen=True, kw_only=True)
class NormBenchSettings:
    """What `suite=norm` measures; no shapes: the machine's own."""

    shapes: tuple[NormShape, ...] = ()
    operations: tuple[Operation, ...] = get_args(Operation)
    rounds: int = 10
    steps: int = 10  # passes a round
    warmup: int = 10  # passes
    threads: int = 2
    peers: tuple[str, ...] = ("eager", "compiled")

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "threads", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not set(self.peers) <= {"eager", "compiled"}:
            raise ValueError(f"peers must be of eager and compiled, got {list(self.peers)}")
        if not self.operations:
            raise ValueError("operations must not be empty")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    operation: Operation
    shape: NormShape


def run_suite(settings: NormBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure every contender in every case; return medians, ratios and rates.

    Raises OSError where contenders come to different outputs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = settings.shapes or tuple(
        NormShape(tokens=tokens, dim=dim, head_dim=head_dim)
        for tokens, dim, head_dim in (ON_A_GPU if device == "cuda" else ON_A_CPU)
    )
    cases = [Case(operation=operation, shape=shape) for shape in shapes for operation in settings.operations]
    measured: list[tuple[Case, Rounds]] = []
    for number, case in enumerate(cases):
        progress("cases", number, len(cases))
        measured.append((case, _measure(settings, case, device)))
        check_outputs(measured[-1][1], device)
    progress("cases", len(cases), len(cases))
    hardware = {"GPU": torch.cuda.get_device_name()} if device == "cuda" else {"threads used": str(settings.threads)}
    return BenchTable(
        title=f"Norms, rotary embedding and SwiGLU on a {device.replace('cuda', 'gpu').upper()}",
        columns=COLUMNS,
        rows=tuple(row for case, rounds in measured for row in rows_of(case, rounds, 2 if device == "cuda" else 4)),
        notes=_notes(settings, device, [answer for _, rounds in measured for answer in rounds["machine"]]),
        machine=describe(("torch", "triton", "liger-kernel", "fla-core")) | hardware,
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


def _measure(settings: NormBenchSettings, case: Case, device: str) -> Rounds:
    here = [name for name in PEERS if device == "cuda" and case.operation in PEERS[name] and find_spec(PACKAGES[name])]
    with ExitStack() as stack:
        workers: dict[str, Worker[PassAnswer]] = {}
        for name in (OURS, *settings.peers, *here, "machine"):
            request = NormRequest(
                contender=name,
                operation=case.operation,
                shape=case.shape,
                device=device,
                threads=settings.threads,
                warmup=settings.warmup,
            )
            workers[name] = stack.enter_context(Worker("norm_worker", request, PassAnswer))
        rounds: Rounds = {name: [] for name in workers}
        for _ in range(settings.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.run(settings.steps))
    return rounds


def rows_of(case: Case, rounds: Rounds, width: int) -> list[tuple[str, ...]]:
    """Return the table's rows of one case, under `COLUMNS`; `width`: bytes a number."""
    sizes = [elements * width for elements in case.shape.elements(case.operation)]
    copies = [answer.copy_rate for answer in rounds["machine"]]
    rows = []
    for name, answers in rounds.items():
        if name == "machine":
            continue
        seconds = [median_seconds(answer) for answer in answers]
        times, rates = [], []
        for part, size in enumerate(sizes):
            taken = [one[part] for one in seconds]
            times.append(f"{statistics.median(taken) * 1e3:.3f}")
            share = statistics.median(size / second / copy for second, copy in zip(taken, copies, strict=True))
            rates += [f"{size / statistics.median(taken) / 1e9:.3g}", f"{share:.0%}"]
        ratios = [f"{ratio:.2f}x" for ratio in speed_ratios(rounds[OURS], answers)] if name != OURS else [""] * 3
        shape = " ".join(map(str, vars(case.shape).values()))
        rows.append((name, case.operation, shape, *times, *ratios, *rates, f"{answers[-1].kept_bytes / 1e6:.1f}"))
    return rows


def _notes(settings: NormBenchSettings, device: str, machine: Sequence[PassAnswer]) -> tuple[str, ...]:
    rates = [answer.copy_rate / 1e9 for answer in machine]
    kind = "bf16" if device == "cuda" else f"fp32, {settings.threads} threads, our torch backend"
    return (
        f"{kind}; gradients of inputs and weights; a process a contender, malloc keeping freed memory, "
        f"{settings.rounds} alternating rounds of {settings.steps} passes after {settings.warmup} to warm up, medians; "
        "`sigmoe is`: median of the ratios inside each round",
        "eager: torch.nn.functional.rms_norm and torch's elementwise operations; compiled: the same by torch.compile; "
        "all but sigmoe are given the tables of cosines and sines",
        "GB/s of what must be read and written, weights aside (rms_norm, qk_norm: 2 and 3 times tokens x width, "
        "add_rms_norm 4 and 4, swiglu 3 and 5), and as a share of the rate of a copy in the same round",
        f"in these rounds a copy reached {min(rates):.3g} to {max(rates):.3g} GB/s, read and written",
        "kept: what a forward keeps for its backward, weights aside",
    )
