"""Tokenising a dataset's text against `tokenizers` alone on the same text: alternating runs, medians, the ratio."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ..moe.data.config import MIN_VOCAB_SIZE
from ..moe.data.installed import StandardLibrary
from ..moe.data.progress import Progress, no_progress
from ..moe.data.source import Workspace
from ..moe.data.spool import DomainSpool
from ..moe.data.tokenizer import train_tokenizer
from ..moe.data.writing import write_token_files
from ..moe.storage.durable import durable_directory
from .machine import describe
from .table import BenchTable


@dataclass(frozen=True, kw_only=True)
class TokenizeBenchSettings:
    """What `suite=tokenize` measures, on the standard library's sources."""

    megabytes: float = 4.0  # of UTF-8 text
    vocab_size: int = 4096
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.megabytes <= 0 or self.rounds < 1:
            raise ValueError(f"megabytes must be above 0 and rounds at least 1, got {self.megabytes} and {self.rounds}")
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, got {self.vocab_size}")


def run_suite(settings: TokenizeBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure ours (from spooled documents to hashed, fsynced token files) beside the library alone, text in memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spool = DomainSpool(folder=folder, domain="python", seed=0, heldout_fraction=1e-9)
        for text in StandardLibrary(exclude=("test", "tests")).documents(Workspace(cache=folder)):
            spool.add(text)
            if spool.bytes >= settings.megabytes * 1e6:
                break
        spool.close()
        tokenizer = train_tokenizer(spool.texts("train"), settings.vocab_size)
        seconds = _measure(folder, spool, tokenizer, settings.rounds, progress)
    rates = {contender: [spool.bytes / 1e6 / time for time in times] for contender, times in seconds.items()}
    ours = rates["sigmoe"]
    rows = [
        (name, f"{statistics.median(r):.2f}", f"{statistics.median(a / b for a, b in zip(ours, r)):.2f}x")
        for name, r in rates.items()
    ]
    return BenchTable(
        title="Tokenising",
        columns=("contender", "MB/s", "sigmoe is"),
        rows=tuple(rows),
        notes=(
            f"{spool.bytes / 1e6:.1f} MB of Python sources, vocabulary {settings.vocab_size}, {settings.rounds} "
            "alternating rounds, medians; `sigmoe is`: median of the ratios inside each round",
            "sigmoe: from spooled documents to hashed and synced token files; the others: from memory, result dropped",
        ),
        machine=describe(("tokenizers",)),
        record={"settings": dataclasses.asdict(settings), "megabytes_per_second": rates},
    )


def _measure(
    folder: Path, spool: DomainSpool, tokenizer: Tokenizer, rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """Return each contender's seconds by round, after one round to warm up."""
    texts = list(spool.texts("train"))

    def ours() -> None:
        with durable_directory(folder / "out", replace=True) as directory:
            write_token_files(directory, "python.train", spool.texts("train"), tokenizer)

    runs: dict[str, Callable[[], object]] = {
        "sigmoe": ours,
        "encode_batch": lambda: tokenizer.encode_batch(texts, add_special_tokens=False),
        "encode_batch_fast": lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
        progress("rounds", number, rounds)
    return {name: times[1:] for name, times in seconds.items()}
