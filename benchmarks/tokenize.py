"""Tokenising a dataset's text against `tokenizers` alone on the same text: alternating runs, medians, the ratio."""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from ..moe.data.installed import StandardLibrary
from ..moe.data.source import Workspace
from ..moe.data.spool import DomainSpool
from ..moe.data.tokenizer import train_tokenizer
from ..moe.data.writing import write_token_files
from ..moe.storage.durable import durable_directory


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """Median megabytes of UTF-8 text a second."""

    ours: float  # from spooled documents to hashed, fsynced token files
    encode_batch: float  # tokenizers.encode_batch of all texts, already in memory, the result thrown away
    encode_batch_fast: float  # the same without offsets

    @property
    def ratio(self) -> float:
        """Ours over encode_batch alone."""
        return self.ours / self.encode_batch


def run_suite(*, megabytes: float = 4.0, vocab_size: int = 4096, repeats: int = 5) -> TokenizeResult:
    """Measure on the standard library's sources, and print the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spool = DomainSpool(folder=folder, domain="python", seed=0, heldout_fraction=1e-9)
        for text in StandardLibrary(exclude=("test", "tests")).documents(Workspace(cache=folder)):
            spool.add(text)
            if spool.bytes >= megabytes * 1e6:
                break
        spool.close()
        tokenizer = train_tokenizer(spool.texts("train"), vocab_size)
        result = _measure(folder, spool, tokenizer, repeats)
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, ", end="")
    print(f"tokenizers {tokenizers.__version__}; {spool.bytes / 1e6:.1f} MB in {repeats} alternating runs")
    print(f"sigmoe, spool to token files   {result.ours:8.2f} MB/s")
    print(f"encode_batch alone             {result.encode_batch:8.2f} MB/s")
    print(f"encode_batch_fast alone        {result.encode_batch_fast:8.2f} MB/s")
    print(f"sigmoe / encode_batch          {result.ratio:8.2f}")
    return result


def _measure(folder: Path, spool: DomainSpool, tokenizer: Tokenizer, repeats: int) -> TokenizeResult:
    texts = list(spool.texts("train"))

    def ours() -> None:
        with durable_directory(folder / "out", replace=True) as directory:
            write_token_files(directory, "python.train", spool.texts("train"), tokenizer)

    def alone() -> None:
        tokenizer.encode_batch(texts, add_special_tokens=False)

    def fast() -> None:
        tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    runs = (ours, alone, fast)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, seconds in zip(runs, times):
            seconds.append(_seconds(run))
    rates = [spool.bytes / 1e6 / statistics.median(seconds[1:]) for seconds in times]  # the first is a warm-up
    return TokenizeResult(ours=rates[0], encode_batch=rates[1], encode_batch_fast=rates[2])


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
