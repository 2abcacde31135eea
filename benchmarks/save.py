"""What a save costs: steps of the quickstart's shape with and without one, and a save's rate beside cp and fsync."""

import dataclasses
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..moe.config import ModelConfig
from ..moe.data.progress import Progress, no_progress
from ..moe.storage.durable import remove_directory, require_space
from .machine import describe
from .save_worker import STRETCHES, SaveAnswer, SaveRequest
from .table import BenchTable
from .train_step import StepShape
from .worker import Worker


@dataclass(frozen=True, kw_only=True)
class SaveBenchSettings:
    """What `suite=save` measures."""

    model: ModelConfig
    domains: int = 6
    batch: int = 4  # sequences a step, of all ranks together
    sequence_length: int = 128
    steps: int = 100  # a stretch of training, with or without one save
    rounds: int = 5
    warmup: int = 20  # steps
    threads: int = 2  # of one process; several ranks have one each
    ranks: tuple[int, ...] = (1, 2)
    megabytes: int = 1536  # of masters and moments in the save that is compared with cp
    folder: str | None = None  # on the disk that is measured; None: the system's for temporary files

    def __post_init__(self) -> None:
        for name in ("domains", "batch", "steps", "rounds", "threads", "megabytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_length < 2 or self.warmup < 0:
            raise ValueError("sequence_length must be at least 2, warmup at least 0")
        if not self.ranks or any(ranks < 1 or self.batch % ranks for ranks in self.ranks):
            raise ValueError(f"ranks must each divide batch ({self.batch}), got {list(self.ranks)}")


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """All rounds of so many ranks."""

    training: tuple[SaveAnswer, ...]
    write: tuple[float, ...]  # seconds of saves
    copy: tuple[float, ...]  # seconds of cp and fsync of the same files
    num_bytes: int  # of them

    def column(self, steps: int) -> tuple[str, ...]:
        """Return the figures of a column; ratios are medians of those inside a round."""
        none, background, waiting = (
            [answer.stretches[place] for answer in self.training] for place in range(len(STRETCHES))
        )
        median = statistics.median
        return (
            *(f"{1000 * median(some) / steps:.2f}" for some in (none, background, waiting)),
            *(f"{median(b / a for a, b in zip(none, some)):.3f}x" for some in (background, waiting)),
            f"{1000 * median(answer.snapshot for answer in self.training):.0f}",
            f"{1000 * max(answer.waited for answer in self.training):.0f}",
            *(f"{self.num_bytes / 1e6 / median(some):,.0f}" for some in (self.copy, self.write)),
            f"{median(b / a for a, b in zip(self.write, self.copy)):.2f}x",
        )


def run_suite(settings: SaveBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Measure; return step times, their ratios, and rates. The files are removed.

    Raises WriteError where the disk has no room for them.
    """
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(dir=settings.folder, prefix="sigmoe-save-") as name:
        require_space(Path(name), 4 * settings.megabytes * 1_000_000)
        measured = {ranks: _measure(settings, ranks, Path(name) / str(ranks), progress) for ranks in settings.ranks}
    load.append(os.getloadavg()[0])
    labels = (
        *("ms a step without saves", f"with one background save in {settings.steps} steps", "with one that waits"),
        *("background over none", "waiting over none"),
        *("ms that a background save stops training", "ms awaited after the stretch, at most"),
        *("cp + fsync, MB/s", "a save, MB/s", "of cp's rate"),
    )
    columns = [each.column(settings.steps) for each in measured.values()]
    return BenchTable(
        title="What a save costs",
        columns=("", *(_name(settings, ranks) for ranks in settings.ranks)),
        rows=tuple(zip(labels, *columns, strict=True)),
        notes=_notes(settings, measured),
        machine=describe(("torch", "deepspeed"))
        | {"disk": _file_system(settings), "load average": f"{load[0]:.1f} before, {load[1]:.1f} after"},
        record={
            "settings": dataclasses.asdict(settings),
            "measured": {str(ranks): dataclasses.asdict(each) for ranks, each in measured.items()},
        },
    )


def _measure(settings: SaveBenchSettings, ranks: int, folder: Path, progress: Progress) -> _Measured:
    folder.mkdir()
    training, write, copy = [], [], []
    with _start(settings, ranks, "train", folder) as take:
        for number in range(settings.rounds):
            training.append(_slowest(take(settings.steps)))
            progress(f"training, {_name(settings, ranks)}", number + 1, settings.rounds)
    with _start(settings, ranks, "write", folder) as take:
        take(1)
        for number in range(2, settings.rounds + 2):
            before, saved = (folder / f"write/step-{step:08}" for step in (number - 1, number))
            turns: list[Callable[[], None]] = [
                lambda number=number: write.append(max(answer.write for answer in take(number))),  # type: ignore[misc]
                lambda before=before: copy.append(_copy(before, folder / "copy")),  # type: ignore[misc]
            ]
            for turn in turns if number % 2 else reversed(turns):
                os.sync()
                turn()
            remove_directory(folder / "copy")
            remove_directory(before)
            progress(f"saves, {_name(settings, ranks)}", number - 1, settings.rounds)
        size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    return _Measured(training=tuple(training), write=tuple(write), copy=tuple(copy), num_bytes=size)


@contextmanager
def _start(
    settings: SaveBenchSettings, ranks: int, kind: str, folder: Path
) -> Iterator[Callable[[int], list[SaveAnswer]]]:
    """Start the ranks, warmed up; yields what asks all of them."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(
                    "save_worker",
                    SaveRequest(
                        contender=kind,
                        shape=_shape(settings, rank, ranks),
                        megabytes=settings.megabytes,
                        threads=settings.threads if ranks == 1 else 1,
                        warmup=settings.warmup if kind == "train" else 0,
                        folder=str(folder / kind),
                        store=str(folder / f"store-{kind}"),
                    ),
                    SaveAnswer,
                    wait=False,  # for each other
                    # What DeepSpeed wants of a launcher; a CPU, lest it look for an accelerator.
                    environment={"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
                )
            )
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.receive()

        def take(count: int) -> list[SaveAnswer]:
            for worker in workers:
                worker.send(str(count))
            return [worker.receive() for worker in workers]

        yield take


def _slowest(answers: Sequence[SaveAnswer]) -> SaveAnswer:
    return SaveAnswer(
        stretches=tuple(max(some) for some in zip(*(answer.stretches for answer in answers), strict=True)),
        snapshot=max(answer.snapshot for answer in answers),
        waited=max(answer.waited for answer in answers),
    )


def _copy(source: Path, target: Path) -> float:
    """Copy a checkpoint, every file and folder fsynced; return seconds. It lies in memory, as a state does."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in [*target.rglob("*"), target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begin


def _shape(settings: SaveBenchSettings, rank: int, ranks: int) -> StepShape:
    return StepShape(
        model=settings.model,
        batch=settings.batch,
        sequence_length=settings.sequence_length,
        rank=rank,
        ranks=ranks,
        domains=tuple(f"domain{number}" for number in range(settings.domains)),
    )


def _name(settings: SaveBenchSettings, ranks: int) -> str:
    return f"one process, {settings.threads} threads" if ranks == 1 else f"{ranks} gloo ranks"


def _notes(settings: SaveBenchSettings, measured: dict[int, _Measured]) -> tuple[str, ...]:
    written = max(each.num_bytes for each in measured.values())
    return (
        f"the quickstart's model and batch; stretches of {settings.steps} steps after {settings.warmup} to warm up, "
        f"without a save, with one in the background and with one that training waits for, in turns in the same "
        f"processes; {settings.rounds} rounds, medians, ratios inside each round; the next stretch begins when all is "
        "written",
        "a step is forward, backward, clipping and AdamW: no data is read and nothing logged, so that saves weigh more "
        "here than in `sigmoe train`",
        f"rates: {written / 1e6:,.0f} MB of random masters and moments, saved with SHA-256 and fsync of every file, in "
        f"turns with cp and fsync of the same files; {settings.rounds} rounds, medians; what cp reads is in the page "
        "cache; two ranks hold half of every tensor each, and send what the other one writes",
    )


def _file_system(settings: SaveBenchSettings) -> str:
    folder = settings.folder or tempfile.gettempdir()
    found = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True, check=True)
    return found.stdout.split()[-1]
