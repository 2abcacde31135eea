"""`sigmoe bench`: measures sigmoe beside its peers on this machine."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..benchmarks.attention import AttentionBenchSettings
from ..benchmarks.attention import run_suite as run_attention
from ..benchmarks.compile import CompileSettings
from ..benchmarks.compile import run_suite as run_compile
from ..benchmarks.exactness import ExactnessSettings
from ..benchmarks.exactness import run_suite as run_exactness
from ..benchmarks.expert_parallel import ExpertParallelSettings
from ..benchmarks.expert_parallel import run_suite as run_expert_parallel
from ..benchmarks.generate import GenerateBenchSettings
from ..benchmarks.generate import run_suite as run_generate
from ..benchmarks.loss import LossBenchSettings
from ..benchmarks.loss import run_suite as run_loss
from ..benchmarks.moe import MoeBenchSettings
from ..benchmarks.moe import run_suite as run_moe
from ..benchmarks.norm import NormBenchSettings
from ..benchmarks.norm import run_suite as run_norm
from ..benchmarks.prune import PruneBenchSettings
from ..benchmarks.prune import run_suite as run_prune
from ..benchmarks.prune_quality import PruneQualitySettings
from ..benchmarks.prune_quality import run_suite as run_prune_quality
from ..benchmarks.router_runs import RouterBenchSettings
from ..benchmarks.routers import run_suite as run_routers
from ..benchmarks.save import SaveBenchSettings
from ..benchmarks.save import run_suite as run_save
from ..benchmarks.table import BenchTable
from ..benchmarks.tokenize import TokenizeBenchSettings
from ..benchmarks.tokenize import run_suite as run_tokenize
from ..benchmarks.train import TrainBenchSettings
from ..benchmarks.train import run_suite as run_train
from ..moe.parsing import from_mapping
from ..moe.storage.durable import make_directory, write_file
from .console import notes, print_table, progress_sink, results
from .main import main


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """The keys of `sigmoe bench`."""

    suite: Literal[
        "train",
        "tokenize",
        "routers",
        "exactness",
        "generate",
        "expert_parallel",
        "prune",
        "prune_quality",
        "save",
        "compile",
        "moe",
        "norm",
        "loss",
        "attention",
    ]
    train: TrainBenchSettings
    tokenize: TokenizeBenchSettings
    routers: RouterBenchSettings
    exactness: ExactnessSettings
    generate: GenerateBenchSettings
    expert_parallel: ExpertParallelSettings
    prune: PruneBenchSettings
    prune_quality: PruneQualitySettings
    save: SaveBenchSettings
    compile: CompileSettings
    moe: MoeBenchSettings
    norm: NormBenchSettings
    loss: LossBenchSettings
    attention: AttentionBenchSettings
    out: str | None = None


def run(config: Mapping[str, object]) -> None:
    """Run the suite that `config` names, print its table, and keep it where `out` says."""
    command = load(config)
    with progress_sink() as progress:
        match command.suite:
            case "train":
                measured = run_train(command.train, progress)
            case "tokenize":
                measured = run_tokenize(command.tokenize, progress)
            case "routers":
                measured = run_routers(command.routers, progress)
            case "exactness":
                measured = run_exactness(command.exactness, progress)
            case "generate":
                measured = run_generate(command.generate, progress)
            case "expert_parallel":
                measured = run_expert_parallel(command.expert_parallel, progress)
            case "prune":
                measured = run_prune(command.prune, progress)
            case "prune_quality":
                measured = run_prune_quality(command.prune_quality, progress)
            case "save":
                measured = run_save(command.save, progress)
            case "compile":
                measured = run_compile(command.compile, progress)
            case "moe":
                measured = run_moe(command.moe, progress)
            case "norm":
                measured = run_norm(command.norm, progress)
            case "loss":
                measured = run_loss(command.loss, progress)
            case "attention":
                measured = run_attention(command.attention, progress)
    show(measured)
    if command.out is not None:
        for path in keep(measured, Path(command.out)):
            notes().print(f"wrote {path}", markup=False)


def load(config: Mapping[str, object]) -> BenchCommand:
    """Build the command from composed data, where model and router stand beside the suite's own keys."""
    values = dict(config)
    model, router = values.pop("model", None), values.pop("router", None)
    for name in ("train", "generate", "expert_parallel"):
        suite = values.get(name)
        if isinstance(model, Mapping) and isinstance(suite, Mapping):
            values[name] = {**suite, "model": {**model, "router": router}}
    return from_mapping(BenchCommand, values)


def show(measured: BenchTable) -> None:
    """Print the table and its notes."""
    console = results()
    print_table(measured.title, list(measured.columns), [list(row) for row in measured.rows], left=2)
    for note in measured.notes:
        console.print(f"  {note}", markup=False, soft_wrap=True)
    console.print(f"  {'; '.join(f'{name}: {value}' for name, value in measured.machine.items())}", soft_wrap=True)


def keep(measured: BenchTable, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.md and `stem`.json; return their paths."""
    paths = stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.json")
    make_directory(stem.parent)
    for path, text in zip(paths, (measured.to_markdown(), measured.to_json())):
        write_file(path, text.encode())
    return paths


if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
