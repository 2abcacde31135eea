"""`sigmoe evaluate`: loss, perplexity and bits per byte of held-out text, by domain; models beside each other."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ..moe.data.dataset import Dataset, open_dataset
from ..moe.parsing import from_mapping
from ..moe.stored import ANY_DOMAIN, StoredModel, load_model
from .console import notes, progress_sink
from .evaluation import HeldoutSettings
from .evaluation_matrix import Cells, Row, measure
from .evaluation_report import Evaluation, keep, kept_paths, show
from .main import main
from .models import check_files, check_tokenizer, open_given_model
from .places import check_out
from .trainer import pick_device

_MOST_TOKENS = 1 << 28  # of one forward pass; beyond it nothing but a slip of the pen


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """The keys of `sigmoe evaluate`."""

    checkpoint: str | tuple[str, ...]
    dataset: str
    domain: str | tuple[str, ...] | None = None
    texts: str | tuple[str, ...] | None = None
    tokens: int | None = 32768
    batch: int = 8
    sequence_length: int | None = None
    auto_tokens: int | tuple[int, ...] = 64
    out: str | None = None
    check: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        if min(self.prompt_lengths, default=0) < 2:
            raise ValueError("auto_tokens must be at least 2, or a list of such: nothing predicts a first token")
        for name in ("checkpoint", "domain", "texts"):
            values = getattr(self, name)
            if isinstance(values, tuple) and len(set(values)) < max(len(values), 1):
                raise ValueError(f"{name} must list at least one, and each once, got {list(values)}")

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """The models, as they were given."""
        return (self.checkpoint,) if isinstance(self.checkpoint, str) else self.checkpoint

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Numbers of first tokens that choose a domain."""
        return (self.auto_tokens,) if isinstance(self.auto_tokens, int) else self.auto_tokens


def run(config: Mapping[str, object]) -> None:
    """Evaluate the models that `config` names, print what came out, and keep it where `out` says."""
    command = from_mapping(EvaluateCommand, config)
    stem = None if command.out is None else Path(command.out).expanduser()
    if stem is not None:
        check_out(stem, *kept_paths(stem))
    device = pick_device(command.device)
    with progress_sink(transient=True) as progress:
        dataset = open_dataset(Path(command.dataset).expanduser(), check_ids=False)
        dataset.check_ids(progress)
    texts = (command.texts,) if isinstance(command.texts, str) else command.texts or dataset.domain_names
    for text in texts:
        dataset.domain(text)
    models = [open_given_model(given) for given in command.checkpoints]
    for given, stored in zip(command.checkpoints, models):
        check_tokenizer(given, stored, dataset)
    settings = HeldoutSettings(
        batch_size=command.batch, sequence_length=_sequence_length(command, models), max_tokens=command.tokens
    )
    if settings.batch_size * settings.sequence_length > _MOST_TOKENS:
        raise ValueError(
            f"{settings.batch_size} sequences of {settings.sequence_length} tokens do not fit into one forward pass: "
            "lower batch or sequence_length"
        )
    rows = plan_rows(command, models, texts)
    for stored in models if command.check else ():
        check_files(stored)
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    cells = _measure_all(models, rows, dataset, texts, settings, device)
    evaluation = Evaluation(
        dataset=dataset,
        texts=texts,
        models=tuple(zip(command.checkpoints, models)),
        settings=settings,
        device=device,
        rows=rows,
        cells=cells,
    )
    show(evaluation)
    if stem is not None:
        for path in keep(evaluation, stem):
            notes().print(f"wrote {path}")


def plan_rows(command: EvaluateCommand, models: list[StoredModel], texts: tuple[str, ...]) -> list[Row]:
    """Return the rows that `domain` asks of each model; ValueError where it asks none, or what a model lacks."""
    if command.domain is not None and not any(stored.needs_domain for stored in models):
        raise ValueError(f"no model given routes by domain ({', '.join(command.checkpoints)}): leave domain= out")
    rows = []
    for number, (given, stored) in enumerate(zip(command.checkpoints, models)):
        if stored.needs_domain:
            rows += _routed_rows(command, number, stored, texts)
        else:
            names = stored.registry.names
            label = names[0] if len(names) == 1 and names[0] != ANY_DOMAIN else given
            rows.append(Row(label=label, model=number, route=None))
    count = Counter(row.label for row in rows)
    plain = len(models) == 1 or (max(count.values()) == 1 and not any(row.route and not row.is_name for row in rows))
    if plain:
        return rows
    return [replace(row, label=f"{command.checkpoints[row.model]}: {row.label}") for row in rows]


def _routed_rows(command: EvaluateCommand, number: int, stored: StoredModel, texts: tuple[str, ...]) -> list[Row]:
    """Return the rows of a model that routes by domain."""
    given, known = command.checkpoints[number], stored.registry.names
    match command.domain:
        case None:
            raise ValueError(
                f"{given} routes by domain: give domain=own (each text under its own), auto (a document's first "
                f"tokens choose), all (a matrix), or one or more of {', '.join(known)}"
            )
        case "own":
            for text in texts:
                if text not in known:
                    raise ValueError(
                        f"{given} knows no domain {text!r}, only {', '.join(known)}: leave it out of texts=, or give "
                        "domain=auto, all or a name"
                    )
            return [Row(label="own", model=number, route="own")]
        case "auto":
            lengths = command.prompt_lengths
            return [Row(label=f"auto, {n} tokens", model=number, route="auto", auto_tokens=n) for n in lengths]
        case "all":
            names = known
        case domain:
            names = (domain,) if isinstance(domain, str) else domain
    for name in names:
        if name not in known:
            raise ValueError(f"{given} knows no domain {name!r}: give domain=own, auto, all or of {', '.join(known)}")
    return [Row(label=name, model=number, route=name, is_name=True) for name in names]


def _sequence_length(command: EvaluateCommand, models: list[StoredModel]) -> int:
    """Return the length of the sequences: all models get the same batches."""
    if command.sequence_length is not None:
        return command.sequence_length
    lengths = sorted({stored.sequence_length or 256 for stored in models})
    if len(lengths) > 1:
        raise ValueError(
            f"the models were trained on sequences of {', '.join(map(str, lengths))} tokens, but all get the same "
            "text: give sequence_length="
        )
    return lengths[0]


def _measure_all(
    models: list[StoredModel],
    rows: list[Row],
    dataset: Dataset,
    texts: tuple[str, ...],
    settings: HeldoutSettings,
    device: str,
) -> list[Cells]:
    """Return the cells of every row; one model is in memory at a time."""
    batches = len(models) * sum(settings.num_batches(dataset, text) for text in texts)
    documents = sum(row.chooses for row in rows) * sum(settings.num_documents(dataset, text) for text in texts)
    done = Counter[str]()
    cells: list[Cells] = []
    with progress_sink(transient=True) as progress:

        def advance(stage: str, number: int, total: int) -> None:
            done[stage] += number
            progress(stage, done[stage], total)

        for number, stored in enumerate(models):
            cells += measure(
                load_model(stored, device=device),
                [row for row in rows if row.model == number],
                dataset,
                texts,
                settings,
                on_batch=lambda: advance("batches", 1, batches),
                on_documents=lambda count: advance("documents choosing a domain", count, documents),
            )
    return cells


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
