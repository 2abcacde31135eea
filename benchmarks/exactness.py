"""Every domain cut out of models with both domain routers and every kind of expert sets, compared on held-out text.

The weights are random: equality of bits does not depend on what was learned, and large weights route as unevenly as
learned ones.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..moe.canonical import canonical_tensors
from ..moe.config import ModelConfig, RouterConfig
from ..moe.data.dataset import Dataset, open_dataset
from ..moe.data.progress import Progress, no_progress
from ..moe.extract import SubmodelWriter, formula_bytes, plan_submodel, verify_domain, verify_tensors
from ..moe.initialize import initialize
from ..moe.model import Transformer
from ..moe.parsing import to_mapping
from ..moe.route_table import fill_route_tables
from ..moe.storage.checkpoint import CheckpointContent, write_checkpoint
from ..moe.storage.durable import durable_directory
from ..moe.storage.tensors import named_tensors
from ..moe.stored import StoredModel, open_model, open_unfinished
from .machine import describe
from .table import BenchTable

Sets = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ExactnessSettings:
    """What `suite=exactness` cuts up: models of this shape over the domains of `dataset`."""

    dataset: str | None = None  # a prepared dataset; null for the other suites
    tokens: int = 100_000  # held out, a domain, at the most
    sequence_length: int = 128
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    expert_dim: int = 256
    experts: int = 4  # a domain
    top_k: int = 2
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.threads < 1 or self.sequence_length < 2:
            raise ValueError(
                f"tokens and threads must be at least 1 and sequence_length 2, got {self.tokens}, {self.threads} and "
                f"{self.sequence_length}"
            )
        if not 2 <= self.top_k < self.experts:
            raise ValueError(f"top_k must lie between 2 and experts - 1, got {self.top_k} of {self.experts}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One domain cut out of one model. `size`: of its weight files over the bytes that the config asks for."""

    router: str
    sets: str
    domain: str
    format: str
    tokens: int
    max_abs_difference: float
    size: float
    seconds: float


def run_suite(settings: ExactnessSettings, progress: Progress = no_progress) -> BenchTable:
    """Cut every domain out of every model and compare; ValueError for settings that make no model."""
    if settings.dataset is None:
        raise ValueError("exactness.dataset is missing: give the directory that `sigmoe data` wrote")
    dataset = open_dataset(Path(settings.dataset).expanduser(), check_ids=False)
    torch.set_num_threads(settings.threads)
    models = [(name, kind) for name in ("domain_top_k", "rre") for kind in ("disjoint", "overlapping", "one")]
    total, outcomes = len(models) * len(dataset.domain_names), list[Outcome]()
    with tempfile.TemporaryDirectory() as name:
        for router, kind in models:
            config = model_config(settings, dataset, router, kind)
            parent = _write_model(Path(name) / f"{router}-{kind}", config, dataset, settings)
            for outcome in _cut_all(parent, dataset, router, kind, settings.tokens):
                outcomes.append(outcome)
                progress("domains cut out", len(outcomes), total)
    return BenchTable(
        title="Exact extraction: submodel against parent",
        columns=("router", "sets", "domain", "format", "tokens", "largest difference", "bytes over formula", "seconds"),
        rows=tuple(_row(outcome) for outcome in outcomes),
        notes=_notes(settings, dataset, outcomes),
        machine=describe(("torch",)) | {"threads used": str(settings.threads)},
        record={
            "settings": {key: value for key, value in dataclasses.asdict(settings).items() if key != "dataset"},
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        },
    )


def expert_sets(kind: str, domains: tuple[str, ...], experts: int) -> Sets:
    """Return each domain's experts: `disjoint`; `overlapping`, the last shared with the next domain; or `one`."""
    size = 1 if kind == "one" else experts
    step = size - 1 if kind == "overlapping" else size
    count = step * len(domains)
    return {
        name: tuple(sorted({(step * place + expert) % count for expert in range(size)}))
        for place, name in enumerate(domains)
    }


def model_config(settings: ExactnessSettings, dataset: Dataset, router: str, kind: str) -> ModelConfig:
    """Return the config of one parent."""
    s, learned = settings, router == "domain_top_k"
    sets = expert_sets(kind, dataset.domain_names, s.experts)
    if learned:
        chooser = RouterConfig(name="domain_top_k", sets=sets, top_k=1 if kind == "one" else s.top_k)
    else:
        chooser = RouterConfig(name="rre", sets=sets, top_k=1, balance="none")
    return ModelConfig(
        vocab_size=dataset.vocab_size,
        dim=s.dim,
        num_layers=s.num_layers,
        num_heads=s.num_heads,
        num_kv_heads=s.num_kv_heads,
        expert_dim=s.expert_dim,
        init_std=0.1,
        router=chooser,
    )


def _write_model(path: Path, config: ModelConfig, dataset: Dataset, settings: ExactnessSettings) -> StoredModel:
    model = Transformer(config, config.build_registry(dataset.domain_names))
    initialize(model, settings.seed)
    fill_route_tables(model, {name: dataset.token_counts(name) for name in dataset.domain_names}, settings.seed)
    content = CheckpointContent(
        model=named_tensors(canonical_tensors(model)),
        optimizer={},
        state={"step": 0},
        config={"model": to_mapping(config), "sequence_length": settings.sequence_length},
        registry=model.registry.to_json(),
        tokenizer=dataset.tokenizer_path.read_bytes(),
        hf_config=None,
    )
    write_checkpoint(path, content)
    return open_model(path)


def _cut_all(parent: StoredModel, dataset: Dataset, router: str, kind: str, tokens: int) -> Iterator[Outcome]:
    for domain in dataset.domain_names:
        begin = time.perf_counter()
        submodel = plan_submodel(parent.config, parent.registry, [domain])
        path = parent.path.with_name(f"{parent.path.name}-{domain}")
        with durable_directory(path) as directory:
            extraction = SubmodelWriter(parent, submodel).write(directory)
        child = open_unfinished(path)
        verify_tensors(child, extraction)
        check = verify_domain(parent, child, dataset, domain, max_tokens=tokens)
        written = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
        yield Outcome(
            router=router,
            sets=kind,
            domain=domain,
            format=extraction.format,
            tokens=check.tokens,
            max_abs_difference=check.max_abs_difference,
            size=written / formula_bytes(submodel, extraction.dtype),
            seconds=time.perf_counter() - begin,
        )


def _row(outcome: Outcome) -> tuple[str, ...]:
    return (
        outcome.router,
        outcome.sets,
        outcome.domain,
        outcome.format,
        f"{outcome.tokens:,}",
        f"{outcome.max_abs_difference:g}",
        f"{outcome.size - 1:+.3%}",
        f"{outcome.seconds:.1f}",
    )


def _notes(settings: ExactnessSettings, dataset: Dataset, outcomes: list[Outcome]) -> tuple[str, ...]:
    s = settings
    equal = sum(outcome.max_abs_difference == 0 for outcome in outcomes)
    return (
        f"{equal} of {len(outcomes)} submodels give their parent's logits with all bits equal, "
        f"{sum(outcome.tokens for outcome in outcomes):,} held-out tokens compared",
        "every tensor was read back too, and is the parent's, byte for byte (SHA-256)",
        f"random weights; D {s.dim}, {s.num_layers} sparse layers, heads {s.num_heads}/{s.num_kv_heads}, expert width "
        f"{s.expert_dim}, vocabulary {dataset.vocab_size}, {len(dataset.domain_names)} domains",
        f"disjoint: {s.experts} experts a domain; overlapping: as many, the last one shared with the next domain; one: "
        f"one expert a domain. domain_top_k: top-{s.top_k} of the set; rre: a table of token ids",
        "bytes over formula: the weight files, headers included, beyond shared + set + tables; headers grow with the "
        "number of tensors, not with their size",
        "seconds: planning, writing and both comparisons; information only",
    )
