"""Training runs of the router comparison: each contender's shape, the process that trains it, what it ended with."""

import contextlib
import hashlib
import json
import math
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..moe.config import ModelConfig
from ..moe.counts import count_parameters
from ..moe.data.dataset import Dataset
from ..moe.data.progress import Progress
from ..moe.parsing import from_mapping
from ..moe.storage.checkpoint import Checkpoint, open_checkpoint
from ..parallel.checkpointer import Checkpointer
from .worker import start_module

Contender = Literal["dense", "top_k", "domain_top_k", "rre"]
CONTENDERS: tuple[Contender, ...] = get_args(Contender)


@dataclass(frozen=True, kw_only=True)
class RouterBenchSettings:
    """What `suite=routers` compares. Every layer is sparse (or dense), so that all contenders have equal shapes."""

    dataset: str | None = None  # a prepared dataset; null for the other suites
    runs: str = "runs/routers"  # where the runs are kept; a suite that was interrupted goes on there
    seeds: tuple[int, ...] = (0, 1, 2)  # of weights and of the order of the samples
    rates: tuple[float, ...] = (2e-3,)  # learning rates; of several each contender takes its best on tuning_seed
    tuning_seed: int = 100
    steps: int = 1000
    batch: int = 4  # sequences a step
    sequence_length: int = 128
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    expert_dim: int = 256
    top_k: int = 2
    experts: int = 4  # a domain
    balance_scope: Literal["sequence", "batch"] = "sequence"
    evaluate_tokens: int = 32_768  # held out, a domain
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be at least one and differ, got {list(self.seeds)}")
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates must be at least one and differ, got {list(self.rates)}")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed {self.tuning_seed} is one of seeds: tune on a seed that is not measured")
        if self.top_k < 1 or self.experts < 1 or self.experts % self.top_k:
            raise ValueError(
                f"experts {self.experts} must be a multiple of top_k {self.top_k}: rre's experts are top_k times as "
                "wide, and so many times fewer"
            )


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run ended with. By domain: held-out loss in nats a token, and in bits a byte."""

    loss: Mapping[str, float]
    bits_per_byte: Mapping[str, float]
    load: float | None  # rows of the busiest expert over the mean, mean over layers, whole run
    total: int  # parameters
    active: int  # parameters that a token passes through
    submodel: int | None  # parameters of one domain's exact submodel; None: the experts belong to no domain


def finished_run(
    settings: RouterBenchSettings, dataset: Dataset, contender: Contender, rate: float, seed: int, progress: Progress
) -> RunResult:
    """Return the result of a run, trained by `sigmoe train` in a process of its own where it does not stand already.

    Raises ValueError where the settings make no run, OSError where the process fails.
    """
    keys = run_keys(settings, contender, rate, seed, len(dataset.domain_names))
    # Other settings have another directory, so that nothing is mixed.
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:8]
    directory = Path(settings.runs).expanduser().resolve() / f"{contender}-rate{rate:g}-seed{seed}-{digest}"
    checkpoint = _last_checkpoint(directory, settings.steps)
    if checkpoint is None:
        stage = f"{contender}, rate {rate:g}, seed {seed}"
        places = [f"dataset={_quoted(dataset.path.resolve())}", f"out={_quoted(directory)}"]
        keys = [*keys, *places, f"threads={settings.threads}"]
        _train(keys, directory, lambda step: progress(stage, step, settings.steps))
        checkpoint = _last_checkpoint(directory, settings.steps)
    if checkpoint is None:
        raise OSError(f"{directory} was interrupted: run the same command again")
    if checkpoint.state["dataset"] != dataset.digest:
        raise ValueError(f"{directory} was trained on other data than {dataset.path}: give another routers.runs")
    return _result(directory, checkpoint, dataset.domain_names)


def run_keys(
    settings: RouterBenchSettings, contender: Contender, rate: float, seed: int, num_domains: int
) -> list[str]:
    """Return the keys that make a run, places left out: every token passes top_k * expert_dim of hidden width."""
    k, experts, width = settings.top_k, settings.experts, settings.expert_dim
    gate = ["router.balance=loss", f"router.balance_scope={settings.balance_scope}"]
    gate += ["router.auxiliary_loss=0.01", "router.z_loss=0.001", f"router.renormalize={str(k > 1).lower()}"]
    match contender:
        case "dense":
            own = ["router=top_k", "model.sparse_layers=none", f"model.expert_dim={k * width}"]
        case "top_k":
            own = ["router=top_k", f"router.num_experts={experts * num_domains}", f"router.top_k={k}", *gate]
            own += ["model.sparse_layers=all", f"model.expert_dim={width}"]
        case "domain_top_k":
            own = ["router=domain_top_k", f"router.sets={experts}", f"router.top_k={k}", *gate]
            own += ["model.sparse_layers=all", f"model.expert_dim={width}"]
        case "rre":
            own = ["router=rre", f"router.sets={experts // k}"]
            own += ["model.sparse_layers=all", f"model.expert_dim={k * width}"]
    shape = ["dim", "num_layers", "num_heads", "num_kv_heads"]
    model = ["model=small", "model.init_std=0.05", *(f"model.{key}={getattr(settings, key)}" for key in shape)]
    run = [f"steps={settings.steps}", f"global_batch={settings.batch}", f"sequence_length={settings.sequence_length}"]
    optim = ["optim=adamw", f"optim.lr={rate!r}", "optim.weight_decay=0.01"]
    rest = [f"schedule.warmup_steps={settings.steps // 10}", f"evaluate.tokens={settings.evaluate_tokens}"]
    rest += [f"save.every={math.ceil(settings.steps / 4)}", "save.keep=1", "logger=jsonl", "device=cpu"]
    return [*model, *own, *run, *optim, *rest, f"seed={seed}"]


def _train(overrides: Sequence[str], directory: Path, on_step: Callable[[int], None]) -> None:
    """Run `sigmoe train` to its end; stopped in between, it saves first."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told:
        process = start_module("launch.train", *overrides, stdout=subprocess.DEVNULL, stderr=told)
        try:
            code = None
            while code is None:
                on_step(_last_step(directory))
                try:
                    code = process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
            on_step(_last_step(directory))
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code:
            told.seek(0)
            reason = (told.read().strip().splitlines() or [f"exit code {code}"])[-1]
            raise (ValueError if code == 2 else OSError)(reason.removeprefix("sigmoe train: "))


def _quoted(path: Path) -> str:
    """Return `path` as a text of Hydra's grammar; a backslash counts only before a quote."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), str(path)) + "'"


def _logged(directory: Path) -> list[dict[str, float]]:
    """Return the logged training steps of a run that may still be writing."""
    path, rows = directory / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if "tokens_per_second" in row]


def _last_step(directory: Path) -> int:
    return int(max((row["step"] for row in _logged(directory)), default=0))


def _last_checkpoint(directory: Path, steps: int) -> Checkpoint | None:
    """Return the checkpoint that a run ends with; None where it has not ended."""
    checkpoints = Checkpointer(directory / "checkpoints", keep=None)
    return open_checkpoint(checkpoints.path(steps)) if steps in checkpoints.steps() else None


def _result(directory: Path, checkpoint: Checkpoint, domains: tuple[str, ...]) -> RunResult:
    model = from_mapping(ModelConfig, checkpoint.config["model"])
    ended = checkpoint.state["heldout_after"]
    sums = {name: math.nan if ended[name]["loss_sum"] is None else ended[name]["loss_sum"] for name in domains}
    count = count_parameters(model, model.build_registry(domains))
    separable = model.router.name != "top_k" or model.sparse_layers == "none"
    loads = [_load(rows) for rows in checkpoint.state["expert_load"].values()]
    return RunResult(
        loss={name: sums[name] / ended[name]["tokens"] for name in domains},
        bits_per_byte={name: sums[name] / math.log(2) / ended[name]["bytes"] for name in domains},
        load=statistics.fmean(loads) if loads else None,
        total=count.total,
        active=count.active,
        submodel=count_parameters(model, model.build_registry(domains[:1])).total if separable else None,
    )


def _load(count_NE: Sequence[Sequence[float]]) -> float:
    """Return the busiest expert's rows over the mean."""
    count_E = [sum(column) for column in zip(*count_NE)]
    return float(max(count_E) / statistics.fmean(count_E))
