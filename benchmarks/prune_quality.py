"""What each criterion of pruning costs: held-out perplexity in and out of the domain that a model was calibrated for.

Every pruned model is run as `sigmoe prune` would write it. Beside it stands the other way to a model of that size: one
trained with a domain router, whose domain's submodel is exact.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..moe.data.dataset import Dataset, open_dataset
from ..moe.data.progress import Progress, no_progress
from ..moe.prune.budget import Budget, choose_experts
from ..moe.prune.prunable import check_prunable
from .machine import describe
from .prune_fit import fit_note, forecast_notes
from .prune_study import Outcome, Study
from .routers import spread
from .table import BenchTable

EXACT = "exact submodel"
_PLACES = ("dataset", "runs", "exact", "others")


@dataclass(frozen=True, kw_only=True)
class PruneQualitySettings:
    """What `suite=prune_quality` prunes: finished runs, by their directories."""

    dataset: str | None = None  # a prepared dataset; null for the other suites
    runs: tuple[str, ...] = ()  # of router=top_k and one shape, a seed each
    exact: tuple[str, ...] = ()  # of router=domain_top_k, by the same seeds; may be none
    others: tuple[str, ...] = ()  # of router=top_k and other shapes, where the forecast alone is tried; may be none
    fitted: int = 0  # the first so many of runs are those to which the notes fit the forecast; 0: no fit
    pruned: tuple[float, ...] = (0.25, 0.5, 0.75)  # fractions of each layer's experts
    calibrate_tokens: int = 16_384  # of one domain's training text
    evaluate_tokens: int = 3072  # held out, a domain, at the most
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("calibrate_tokens", "evaluate_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.pruned or not all(0 < share < 1 for share in self.pruned):
            raise ValueError(f"pruned must be fractions between 0 and 1, got {list(self.pruned)}")
        if self.exact and len(self.exact) != len(self.runs):
            raise ValueError(f"exact must name none or {len(self.runs)}, one for each of runs, got {len(self.exact)}")
        if not 0 <= self.fitted <= len(self.runs):
            raise ValueError(f"fitted must be from 0 to {len(self.runs)}, the number of runs, got {self.fitted}")


def run_suite(settings: PruneQualitySettings, progress: Progress = no_progress) -> BenchTable:
    """Prune every run for every domain by every criterion; ValueError for settings or runs that cannot be."""
    if settings.dataset is None:
        raise ValueError("prune_quality.dataset is missing: give the directory that `sigmoe data` wrote")
    if not settings.runs:
        raise ValueError("prune_quality.runs is missing: give finished runs of router=top_k, a seed each")
    dataset = open_dataset(Path(settings.dataset).expanduser(), check_ids=False)
    if len(dataset.domain_names) < 2:
        raise ValueError(f"{dataset.path} has one domain: give a dataset of several")
    torch.set_num_threads(settings.threads)
    tokens = {"calibrate_tokens": settings.calibrate_tokens, "evaluate_tokens": settings.evaluate_tokens}
    runs = (*settings.runs, *settings.others)
    studies = [Study(run, name, dataset, **tokens) for run, name in zip(runs, run_names(runs), strict=True)]
    submodels = [Study(run, name, dataset, **tokens) for run, name in zip(settings.exact, run_names(settings.exact))]
    _check_shapes(settings, studies, submodels)
    equal = _equal_share(settings, studies[0], submodels)
    outcomes, domains = list[Outcome](), len(dataset.domain_names)
    for place, study in enumerate(studies):
        seen = set[str]()
        for outcome in study.outcomes(settings.pruned, outside=place < len(settings.runs)):
            outcomes.append(outcome)
            seen.add(outcome.domain)
            progress("pruned for a domain", place * domains + len(seen), len(studies) * domains)
    exact = [study.exact_losses() for study in submodels]
    tabled = [outcome for outcome in outcomes if outcome.outside is not None]
    return BenchTable(
        title="Pruning for a domain: perplexity over the unpruned model's",
        columns=(
            "criterion",
            *(f"{share:.0%} pruned, {where}" for share in settings.pruned for where in ("in", "out")),
        ),
        rows=(*quality_rows(settings.pruned, tabled), *exact_rows(settings.pruned, equal, tabled, exact)),
        notes=(
            *_notes(settings, dataset),
            *exact_notes(equal, tabled, exact),
            *forecast_notes(outcomes),
            *_fit_notes(settings, studies, outcomes),
        ),
        machine=describe(("torch",)) | {"threads used": str(settings.threads)},
        record={
            "settings": {key: value for key, value in dataclasses.asdict(settings).items() if key not in _PLACES},
            "exact_losses": exact,
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        },
    )


def run_names(runs: Sequence[str]) -> list[str]:
    """Return the last part of each path, with its place behind it where several are the same."""
    names = [Path(run).name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def quality_rows(pruned: Sequence[float], outcomes: Sequence[Outcome]) -> tuple[tuple[str, ...], ...]:
    """Return a row a criterion: mean and spread over runs and domains, by budget, in domain and outside."""
    rows = []
    for criterion in dict.fromkeys(outcome.criterion for outcome in outcomes):
        cells = [criterion]
        for share in pruned:
            some = [each for each in outcomes if (each.criterion, each.pruned) == (criterion, share)]
            cells.append(spread([math.exp(each.added) for each in some], 2))
            cells.append(spread([each.outside for each in some if each.outside is not None], 2))
        rows.append(tuple(cells))
    return tuple(rows)


def exact_rows(
    pruned: Sequence[float], equal: float | None, outcomes: Sequence[Outcome], exact: Sequence[Mapping[str, float]]
) -> tuple[tuple[str, ...], ...]:
    """Return the row of exact submodels, in the column of the budget that leaves as many experts."""
    if equal is None:
        return ()
    whole = {(each.run, each.domain): each.whole for each in outcomes}
    runs = dict.fromkeys(each.run for each in outcomes)
    ratios = [
        math.exp(loss - whole[run, name])
        for run, by_domain in zip(runs, exact, strict=True)
        for name, loss in by_domain.items()
    ]
    cells = [cell for share in pruned for cell in (spread(ratios, 2) if share == equal else "", "")]
    return ((EXACT, *cells),)


def exact_notes(
    equal: float | None, outcomes: Sequence[Outcome], exact: Sequence[Mapping[str, float]]
) -> tuple[str, ...]:
    """Return the perplexities behind that row, beside those of the best criterion."""
    if equal is None:
        return ()
    losses: dict[str, list[float]] = {}
    for each in outcomes:
        if each.pruned == equal:
            losses.setdefault(each.criterion, []).append(each.whole + each.added)
    best = min(losses, key=lambda criterion: statistics.fmean(losses[criterion]))
    whole = {(each.run, each.domain): each.whole for each in outcomes}
    submodels = [loss for by_domain in exact for loss in by_domain.values()]
    return (
        f"{EXACT}: of a model trained with router=domain_top_k, over the unpruned model of that seed; perplexity in "
        f"domain {_perplexity(submodels)}, of the unpruned {_perplexity(list(whole.values()))}, of those pruned to as "
        f"many experts by {best} {_perplexity(losses[best])}",
    )


def _check_shapes(settings: PruneQualitySettings, studies: Sequence[Study], submodels: Sequence[Study]) -> None:
    """Raise ValueError, before anything is measured, for runs that cannot stand in one table."""
    for study in studies:
        check_prunable(study.model.config, study.model.registry)
    for run, study in zip(settings.runs, studies):
        if study.model.config != studies[0].model.config:
            raise ValueError(f"runs: {run} has another shape than {settings.runs[0]}: name it in others")
    for run, study in zip(settings.exact, submodels, strict=True):
        if not study.model.config.sparse_layer_ids:
            raise ValueError(f"exact: {run} has no sparse layer: give a run of router=domain_top_k")
        study.exact_plans()
        if study.experts != submodels[0].experts:
            raise ValueError(f"exact: the submodels of {run} have another size than those of {settings.exact[0]}")


def _equal_share(settings: PruneQualitySettings, study: Study, submodels: Sequence[Study]) -> float | None:
    """Return the budget that leaves as many experts as an exact submodel has; None where there are none."""
    if not submodels:
        return None
    parent, cut = study.experts, submodels[0].experts
    for share in settings.pruned:
        (kept,) = choose_experts([torch.zeros(parent)], Budget(keep=1 - share), study.model.config)
        if len(kept) == cut:
            return share
    raise ValueError(f"exact: its submodels have {cut} of {parent} experts, which no fraction of pruned leaves")


def _fit_notes(
    settings: PruneQualitySettings, studies: Sequence[Study], outcomes: Sequence[Outcome]
) -> tuple[str, ...]:
    names = {study.name for study in studies[: settings.fitted]}
    return (fit_note([each for each in outcomes if each.run in names]),) if names else ()


def _notes(settings: PruneQualitySettings, dataset: Dataset) -> tuple[str, ...]:
    s = settings
    return (
        f"mean ± sample standard deviation over {len(s.runs)} seed(s) and {len(dataset.domain_names)} domains; in: "
        "held-out text of the domain whose training text was calibrated on; out: the mean over the other domains",
        f"{s.calibrate_tokens:,} tokens to calibrate; the same {s.evaluate_tokens:,} held-out tokens a domain for all",
    )


def _perplexity(losses: Sequence[float]) -> str:
    return spread([math.exp(loss) for loss in losses], 1)
