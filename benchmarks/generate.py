"""Generation speed: sigmoe beside transformers' generate on the same weights, in alternating rounds.

Each contender has a process of its own. The greedy texts must be the same: another text would be another task.
"""

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..moe.canonical import canonical_tensors
from ..moe.config import ModelConfig
from ..moe.data.progress import Progress, no_progress
from ..moe.hf.config import hf_config
from ..moe.initialize import initialize
from ..moe.model import Transformer
from ..moe.storage.durable import durable_directory
from ..moe.storage.tensors import named_tensors, write_tensors
from .generate_run import GenerateShape
from .generate_worker import GenerateAnswer, GenerateRequest
from .machine import describe
from .table import BenchTable
from .worker import Worker

OURS = "sigmoe"
Rounds = dict[str, list[GenerateAnswer]]


@dataclass(frozen=True, kw_only=True)
class GenerateBenchSettings:
    """What `suite=generate` measures. `peers` are implementations of the experts in transformers' Mixtral."""

    model: ModelConfig
    batches: tuple[int, ...] = (1, 8)
    shortest: int = 32  # prompt, in tokens; a batch's lengths are spread evenly
    longest: int = 64
    new_tokens: int = 128
    rounds: int = 7
    warmup: int = 1  # runs
    threads: int = 2
    peers: tuple[str, ...] = ("grouped_mm", "eager", "batched_mm")

    def __post_init__(self) -> None:
        for name in ("shortest", "new_tokens", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.longest < self.shortest or self.warmup < 0 or min(self.batches, default=0) < 1:
            raise ValueError("longest must be at least shortest, warmup at least 0, batches a list of at least 1 each")


def run_suite(settings: GenerateBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure every contender at every batch size; return tokens a second, ratios and peak memory.

    Raises ValueError for a model that is no Mixtral, OSError where a contender fails or writes another text than ours.
    """
    description = _description(settings)
    if description is None:
        raise ValueError("the model must be a Mixtral: router=top_k, model.sparse_layers=all, model.qk_norm=none")
    measured: dict[int, Rounds] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = _write_model(settings, description, Path(name) / "bench")
        for batch in settings.batches:
            measured[batch] = _measure(settings, folder, batch, progress)
    rows = [row for batch, rounds in measured.items() for row in _rows(settings, batch, rounds)]
    return BenchTable(
        title="Greedy generation on a CPU",
        columns=("contender", "batch", "tokens/s", "ms a step", "fastest", "sigmoe is", "peak MB"),
        rows=tuple(rows),
        notes=_notes(settings),
        machine=describe(("torch", "transformers")) | {"threads used": str(settings.threads)},
        record={
            "settings": dataclasses.asdict(settings),
            "rounds": {str(batch): _plain(rounds) for batch, rounds in measured.items()},
        },
    )


def speed_ratio(ours: Sequence[GenerateAnswer], peer: Sequence[GenerateAnswer]) -> float:
    """Return how many times as fast we are: the median over rounds of the ratio inside a round."""
    return statistics.median(b.seconds[0] / a.seconds[0] for a, b in zip(ours, peer, strict=True))


def check_texts(rounds: Rounds) -> None:
    """Raise OSError where a contender's tokens are not ours."""
    for name, answers in rounds.items():
        for row, (ours, theirs) in enumerate(zip(rounds[OURS][-1].texts, answers[-1].texts, strict=True)):
            if ours != theirs:
                differ = (i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
                place = next(differ, min(len(ours), len(theirs)))  # where one ends, the other goes on
                raise OSError(f"{name} writes another text than {OURS}: prompt {row}, token {place}")


def _write_model(settings: GenerateBenchSettings, description: dict[str, object], path: Path) -> Path:
    model = Transformer(settings.model, settings.model.build_registry(("text",)))
    initialize(model, 0)
    with durable_directory(path) as directory:
        write_tensors(directory, "model", "model", named_tensors(canonical_tensors(model)))
        directory.write("model/config.json", json.dumps(description).encode())
    return path / "model"


def _description(settings: GenerateBenchSettings) -> dict[str, object] | None:
    registry = settings.model.build_registry(("text",))
    length = settings.longest + settings.new_tokens
    found = hf_config(settings.model, registry, sequence_length=length, dtype="float32", end_of_text=0, padding=0)
    return found if found is not None and found["model_type"] == "mixtral" else None


def _measure(settings: GenerateBenchSettings, folder: Path, batch: int, progress: Progress) -> Rounds:
    """Start all contenders, then let them take turns."""
    names, stage = (OURS, *settings.peers), f"rounds, batch {batch}"
    shape = GenerateShape(
        folder=str(folder),
        batch=batch,
        shortest=settings.shortest,
        longest=settings.longest,
        new_tokens=settings.new_tokens,
    )
    progress(stage, 0, settings.rounds)
    rounds: Rounds = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {}
        for name in names:
            request = GenerateRequest(contender=name, shape=shape, threads=settings.threads, warmup=settings.warmup)
            workers[name] = stack.enter_context(Worker("generate_worker", request, GenerateAnswer))
        for number in range(settings.rounds):
            for name in names:
                rounds[name].append(workers[name].run(1))
            check_texts(rounds)
            progress(stage, number + 1, settings.rounds)
    return rounds


def _rows(settings: GenerateBenchSettings, batch: int, rounds: Rounds) -> list[tuple[str, ...]]:
    rows = []
    for name, answers in rounds.items():
        times = [answer.seconds[0] for answer in answers]
        second = statistics.median(times)
        ratio = "" if name == OURS else f"{speed_ratio(rounds[OURS], answers):.2f}x"
        label = name if name == OURS else f"transformers, {name}"
        steps = [f"{time / settings.new_tokens * 1e3:.2f}" for time in (second, min(times))]
        rate, peak = batch * settings.new_tokens / second, answers[-1].peak_bytes / 1e6
        rows.append((label, str(batch), f"{rate:,.0f}", *steps, ratio, f"{peak:.0f}"))
    return rows


def _notes(settings: GenerateBenchSettings) -> tuple[str, ...]:
    model, router = settings.model, settings.model.router
    return (
        f"D {model.dim}, F {model.expert_dim}, {model.num_layers} layers, {router.num_experts} experts, "
        f"top-{router.top_k}, heads {model.num_heads}/{model.num_kv_heads} of {model.head_width}, vocabulary "
        f"{model.vocab_size}, fp32, {settings.threads} threads",
        f"prompts of {settings.shortest} to {settings.longest} tokens (padded on the left), {settings.new_tokens} new "
        "tokens each, greedy, no end-of-text; the same files, and every text the same token for token",
        f"a process a contender, {settings.rounds} alternating rounds of a run after {settings.warmup} to warm up, "
        "medians; a run is prompts and new tokens; `ms a step`: of a token of every text; `sigmoe is`: median of "
        "the ratios in each round",
    )


def _plain(rounds: Rounds) -> dict[str, object]:
    return {
        name: [{"seconds": list(answer.seconds), "peak_bytes": answer.peak_bytes} for answer in answers]
        for name, answers in rounds.items()
    }
