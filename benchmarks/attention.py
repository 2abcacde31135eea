"""Attention alone, forward and backward, beside torch's own: each in a process of its own, in alternating rounds.

Given queries, keys and values after rotation, and document starts.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..moe.data.progress import Progress, no_progress
from .attention_case import AttentionCase, Form
from .attention_worker import AttentionRequest
from .machine import describe
from .passes import PassAnswer, median_seconds, speed_ratios
from .table import BenchTable
from .worker import Worker

OURS = "sigmoe"
Rounds = dict[str, list[PassAnswer]]
# Tokens of all sequences, heads, their width, the window, lengths.
ON_A_CPU = (4096, 8, 64, 256, (512, 2048, 4096))
ON_A_GPU = (16384, 16, 128, 1024, (1024, 4096, 8192, 16384, 32768))
# A row of queries of ours, and the keys that it takes at a time: torch's blocks end where the keys do.
TILES = {"cpu": (64, 1), "cuda": (128, 64)}
COLUMNS = (
    *("contender", "form", "length", "forward ms", "backward ms", "sigmoe is, forward", "backward", "both"),
    *("TFLOP/s, forward", "backward", "of limit", "backward", "tiles", "kept MB", "peak MB"),
)


@dataclass(frozen=True, kw_only=True)
class AttentionBenchSettings:
    """What `suite=attention` measures; 0 and none: the machine's own."""

    forms: tuple[Form, ...] = ("causal", "documents", "window", "gqa", "mqa")
    lengths: tuple[int, ...] = ()
    tokens: int = 0
    heads: int = 0
    width: int = 0
    window: int = 0
    rounds: int = 10
    steps: int = 4  # passes a round
    warmup: int = 3  # passes
    threads: int = 2
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "threads", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.forms:
            raise ValueError("forms must not be empty")

    def cases(self, device: str) -> list[AttentionCase]:
        """Return what is measured on a device; ValueError where sizes do not fit each other."""
        tokens, heads, width, window, lengths = ON_A_GPU if device == "cuda" else ON_A_CPU
        return [
            AttentionCase(
                form=form,
                length=length,
                tokens=max(self.tokens or tokens, length),
                heads=self.heads or heads,
                width=self.width or width,
                window=self.window or window,
            )
            for form in self.forms
            for length in self.lengths or lengths
        ]


def run_suite(settings: AttentionBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure every contender in every case; return medians, ratios, rates and memory.

    Raises OSError where contenders come to different outputs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peers = settings.peers or (("cudnn", "flash", "varlen", "flex", "sdpa") if device == "cuda" else ("sdpa",))
    cases = settings.cases(device)
    measured: list[tuple[AttentionCase, Rounds]] = []
    absent: list[str] = []
    for number, case in enumerate(cases):
        progress("cases", number, len(cases))
        measured.append((case, _measure(settings, case, device, (OURS, *peers, "machine"), absent)))
        check_outputs(measured[-1][1], device)
    progress("cases", len(cases), len(cases))
    hardware = {"GPU": torch.cuda.get_device_name()} if device == "cuda" else {"threads used": str(settings.threads)}
    return BenchTable(
        title=f"Attention on a {device.replace('cuda', 'gpu').upper()}",
        columns=COLUMNS,
        rows=tuple(row for case, rounds in measured for row in rows_of(case, rounds, device)),
        notes=_notes(settings, device, measured, absent),
        machine=describe(("torch", "triton")) | hardware,
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


def _measure(
    settings: AttentionBenchSettings, case: AttentionCase, device: str, names: Sequence[str], absent: list[str]
) -> Rounds:
    workers: dict[str, Worker[PassAnswer]] = {}
    with ExitStack() as stack:
        for name in names:
            request = AttentionRequest(
                contender=name, case=case, device=device, threads=settings.threads, warmup=settings.warmup
            )
            try:
                workers[name] = stack.enter_context(Worker("attention_worker", request, PassAnswer))
            except OSError as error:
                if name in (OURS, "machine"):
                    raise
                absent.append(f"{case.form} of {case.length}: {error}")
        rounds: Rounds = {name: [] for name in workers}
        for _ in range(settings.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.run(settings.steps))
    return rounds


def check_outputs(rounds: Rounds, device: str) -> None:
    """Raise OSError where a contender's output is not ours."""
    ours = rounds[OURS][-1].norm
    for name, answers in rounds.items():
        norm, tolerance = answers[-1].norm, 1e-2 if device == "cuda" else 1e-4
        if name != "machine" and not abs(norm - ours) <= tolerance * ours:
            raise OSError(f"{name} computes something else: the norm of its output is {norm:.6g}, sigmoe's {ours:.6g}")


def rows_of(case: AttentionCase, rounds: Rounds, device: str) -> list[tuple[str, ...]]:
    """Return the table's rows of one case, under `COLUMNS`."""
    flops, size = case.flops(), case.moved_bytes(2 if device == "cuda" else 4)
    limits = [
        [max(flops[part] / answer.matmul_rate, size[part] / answer.copy_rate) for part in range(2)]
        for answer in rounds["machine"]
    ]
    rows = []
    for name, answers in rounds.items():
        if name == "machine":
            continue
        seconds = [median_seconds(answer) for answer in answers]
        taken = [statistics.median(column) for column in zip(*seconds, strict=True)]
        shares = [statistics.median(b[part] / a[part] for a, b in zip(seconds, limits)) for part in range(2)]
        ratios = [f"{ratio:.2f}x" for ratio in speed_ratios(rounds[OURS], answers)] if name != OURS else [""] * 3
        speed = [f"{flops[part] / taken[part] / 1e12:.3g}" for part in range(2)]
        tiles = (
            f"{case.pairs() / case.tile_pairs(*TILES[device], together=device == 'cpu'):.0%}" if name == OURS else ""
        )
        memory = [f"{size / 1e6:.1f}" * (size > 0) for size in (answers[-1].kept_bytes, answers[-1].peak_bytes)]
        times = f"{taken[0] * 1e3:.2f}", f"{taken[1] * 1e3:.2f}"
        limit = (f"{share:.0%}" for share in shares)
        rows.append((name, case.form, str(case.length), *times, *ratios, *speed, *limit, tiles, *memory))
    return rows


def _notes(
    settings: AttentionBenchSettings,
    device: str,
    measured: Sequence[tuple[AttentionCase, Rounds]],
    absent: Sequence[str],
) -> tuple[str, ...]:
    kind = "bf16, our Triton backend" if device == "cuda" else f"fp32, {settings.threads} threads, our torch backend"
    machine = [answer for _, rounds in measured for answer in rounds["machine"]]
    matmul, copy = [one.matmul_rate / 1e12 for one in machine], [one.copy_rate / 1e12 for one in machine]
    case = measured[0][0]
    return (
        f"{kind}; {case.tokens} tokens in sequences of `length` (one, where that is more), {case.heads} heads of width "
        f"{case.width}; gqa: 8 query heads a kv head, mqa: all; window: of {case.window}; documents: of 1 to a quarter "
        "of a sequence's tokens",
        f"a process a contender, {settings.rounds} alternating rounds of {settings.steps} passes after "
        f"{settings.warmup} to warm up, medians; malloc keeps freed memory; `sigmoe is`: median of the ratios inside "
        "each round",
        "sdpa: scaled_dot_product_attention, causal, document by document, or with a mask for the window; cudnn and "
        "flash are held to that backend; varlen: torch's attention of variable lengths; flex: FlexAttention, compiled, "
        "on a GPU alone (it has no backward on a CPU)",
        "TFLOP/s: 4 H C flops a visible pair, two and a half times that backward; limit: of them at the rate of a "
        "square product, or of what must be read and written at the rate of a copy, in the same round",
        "tiles: visible pairs over those in the tiles that our forward visits",
        f"in these rounds a square product reached {min(matmul):.3g} to {max(matmul):.3g} TFLOP/s, a copy "
        f"{min(copy):.3g} to {max(copy):.3g} TB/s",
        "kept: what a forward keeps for its backward, inputs aside; peak: on a GPU, beside inputs",
        *(f"left out, {words}" for words in absent),
    )
