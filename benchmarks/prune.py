"""Pruning speed: a Mixtral of random bytes cut in half by stored sums, in turns with `cp` + fsync of the kept bytes."""

import dataclasses
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..moe.canonical import expected_shapes
from ..moe.config import ModelConfig, RouterConfig
from ..moe.data.progress import Progress, no_progress
from ..moe.hf.config import hf_config
from ..moe.identity import model_identity
from ..moe.prune.sums import CalibrationSums, LayerSums, save_sums
from ..moe.storage.checkpoint import encode_json
from ..moe.storage.durable import durable_directory, remove_directory, require_space
from ..moe.storage.tensors import NamedTensor, write_tensors
from ..moe.stored import open_model
from .machine import describe
from .prune_worker import PruneAnswer, PruneRequest
from .table import BenchTable
from .worker import Worker

_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PruneBenchSettings:
    """What `suite=prune` measures; the shape is Mixtral-8x7B's but for the number of layers."""

    layers: int = 3
    dim: int = 4096
    expert_dim: int = 14336
    experts: int = 8
    vocab_size: int = 32000
    keep: float = 0.5
    rounds: int = 5
    folder: str | None = None  # on the disk that is measured; None: the system's for temporary files

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "expert_dim", "experts", "vocab_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """All rounds, and the sizes in bytes behind them."""

    prune: tuple[PruneAnswer, ...]  # hashing files, as verify=false does
    hashed: tuple[PruneAnswer, ...]  # and every tensor
    copy: tuple[tuple[float, float], ...]  # seconds, and of CPU
    parent: int
    kept: int
    files: int  # what cp copies
    largest: int

    def row(self, name: str, answers: Sequence[PruneAnswer]) -> tuple[str, ...]:
        """Return a row of the table; the ratio to cp's rate is the median of the rounds."""
        ratio = statistics.median(b / a.seconds for a, (b, _) in zip(answers, self.copy, strict=True))
        times = [(answer.seconds, answer.cpu_seconds) for answer in answers]
        return name, *self.figures(times), f"{ratio:.2f}x"

    def figures(self, times: Sequence[tuple[float, float]]) -> tuple[str, ...]:
        """Return the medians of seconds, CPU seconds and rate."""
        second, cpu = (statistics.median(column) for column in zip(*times))
        return f"{second:.2f}", f"{cpu:.2f}", f"{self.files / second / 1e6:,.0f}"


def run_suite(settings: PruneBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure; return rates, their ratio, peak memory and bytes read. The files are removed. Linux only.

    Raises WriteError where the disk has no room for them.
    """
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(dir=settings.folder, prefix="sigmoe-prune-") as name:
        folder = Path(name)
        require_space(folder, 3 * 2 * sum(map(_elements, _shapes(settings).values())))
        _write_parent(settings, folder / "parent")
        _write_sums(folder)
        measured = _measure(settings, folder, progress)
    rows = (
        ("cp + fsync of the kept files", *measured.figures(measured.copy), ""),
        measured.row("sigmoe prune, files hashed", measured.prune),
        measured.row("sigmoe prune, every tensor too", measured.hashed),
    )
    return BenchTable(
        title="Pruning by stored sums beside cp",
        columns=("contender", "s", "CPU s", "MB/s written", "of cp's rate"),
        rows=rows,
        notes=_notes(settings, measured),
        machine=describe(("torch",))
        | {"disk": _file_system(settings), "load average": _told([*load, os.getloadavg()[0]])},
        record={"settings": dataclasses.asdict(settings), "measured": dataclasses.asdict(measured)},
    )


def _config(settings: PruneBenchSettings) -> ModelConfig:
    return ModelConfig(
        vocab_size=settings.vocab_size,
        dim=settings.dim,
        num_layers=settings.layers,
        num_heads=max(1, settings.dim // 128),
        num_kv_heads=max(1, settings.dim // 512),
        expert_dim=settings.expert_dim,
        router=RouterConfig(name="top_k", num_experts=settings.experts),
    )


def _shapes(settings: PruneBenchSettings) -> dict[str, tuple[int, ...]]:
    config = _config(settings)
    return expected_shapes(config, config.build_registry(("any",)))


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _write_parent(settings: PruneBenchSettings, path: Path) -> None:
    """Write the model in transformers' format, bf16; nobody computes with its numbers."""
    config, random = _config(settings), np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.frombuffer(bytearray(random.bytes(2 * _elements(shape))), dtype=torch.bfloat16).view(shape)

    tensors = {
        name: NamedTensor(shape, torch.bfloat16, lambda shape=shape: draw(shape))  # type: ignore[misc]
        for name, shape in _shapes(settings).items()
    }
    registry = config.build_registry(("any",))
    said = hf_config(config, registry, sequence_length=32768, dtype="bfloat16", end_of_text=2, padding=2)
    assert said is not None
    with durable_directory(path) as directory:
        write_tensors(directory, ".", "model", tensors)
        directory.write("config.json", encode_json(said))


def _write_sums(folder: Path) -> None:
    """Make up what a calibration would have found."""
    parent, random = open_model(folder / "parent"), torch.Generator().manual_seed(0)
    experts = parent.config.gated_experts
    layers = tuple(_made_up(number, random) for number in experts)
    save_sums(folder / "sums", CalibrationSums(model=model_identity(parent), text={}, layers=layers))


def _made_up(number: int, random: torch.Generator) -> LayerSums:
    values = torch.rand(4, number, dtype=torch.float64, generator=random)
    return LayerSums(
        tokens=1000,
        count_E=torch.full((number,), 1000),
        gate_E=values[0],
        norm_E=values[1],
        gate_norm_E=values[2],
        easy_ep_E=values[3],
        prob_EE=torch.eye(number, dtype=torch.float64),
        subset_error=None,
    )


def _measure(settings: PruneBenchSettings, folder: Path, progress: Progress) -> _Measured:
    """Let them take turns, another one first in each round: a disk may be faster at the beginning of one."""
    kept = folder / "kept"
    _prune(settings, folder, kept, hash_tensors=False)
    answers: dict[bool, list[PruneAnswer]] = {False: [], True: []}
    seconds: list[tuple[float, float]] = []
    for number in range(settings.rounds):
        for turn in range(3):
            out = folder / f"out-{number}-{turn}"
            contender = (number + turn) % 3
            if contender == 2:
                _forget(folder)
                seconds.append(_copy(kept, out))
            else:
                answers[bool(contender)].append(_prune(settings, folder, out, hash_tensors=bool(contender)))
            remove_directory(out)
        progress("rounds", number + 1, settings.rounds)
    parent, child = open_model(folder / "parent").tensors, open_model(kept).tensors
    sizes = [parent.num_bytes(name) for name in parent.names()]
    return _Measured(
        prune=tuple(answers[False]),
        hashed=tuple(answers[True]),
        copy=tuple(seconds),
        parent=sum(sizes),
        kept=sum(map(child.num_bytes, child.names())),
        files=sum(file.stat().st_size for file in kept.iterdir()),
        largest=max(sizes),
    )


def _prune(settings: PruneBenchSettings, folder: Path, out: Path, hash_tensors: bool) -> PruneAnswer:
    request = PruneRequest(
        contender="sigmoe prune",
        model=str(folder / "parent"),
        sums=str(folder / "sums"),
        out=str(out),
        keep=settings.keep,
        hash_tensors=hash_tensors,
        threads=1,
        warmup=0,
    )
    with Worker("prune_worker", request, PruneAnswer) as worker:
        _forget(folder)
        return worker.run(1)


def _copy(source: Path, target: Path) -> tuple[float, float]:
    """Copy a folder, every file and the folder fsynced; returns seconds, and of CPU."""
    begin, cpu = time.perf_counter(), _cpu_seconds()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in [*target.iterdir(), target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begin, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _forget(folder: Path) -> None:
    """Bring everything to the disk and out of the page cache, so that both contenders read from the disk."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _notes(settings: PruneBenchSettings, measured: _Measured) -> tuple[str, ...]:
    peak, bound = max(answer.peak_bytes for answer in measured.prune + measured.hashed), 2 * measured.largest + _GIB
    read = max(answer.bytes_read for answer in measured.prune + measured.hashed)
    return (
        f"a Mixtral of {settings.layers} layers, {measured.parent / _GIB:.2f} GiB of random bf16, in transformers' "
        f"format; of {settings.experts} experts a layer {settings.keep:.0%} are kept, {measured.kept / _GIB:.2f} GiB",
        f"{settings.rounds} rounds in turns, medians; before each everything is synced and out of the page cache; ours "
        "is a fresh process each time, its start-up (importing torch) not counted",
        f"peak resident memory {peak / 1e6:,.0f} MB; bound: 2 x the largest tensor + 1 GiB = {bound / 1e6:,.0f} MB",
        f"bytes read: {read:,}; kept tensors: {measured.kept:,}; the rest are headers, the gates' dropped rows, and "
        "the first row of every tensor, by which the sums' model is told from others",
        "ours takes the SHA-256 of every file for the manifest (verify=false), and of every tensor for the report "
        "(verify=true, which also reads all back: not counted here)",
    )


def _told(load: Sequence[float]) -> str:
    return " before, ".join(f"{value:.1f}" for value in load) + " after (of both contenders, and of whatever else ran)"


def _file_system(settings: PruneBenchSettings) -> str:
    folder = settings.folder or tempfile.gettempdir()
    found = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True, check=True)
    return found.stdout.split()[-1]
