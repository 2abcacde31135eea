"""Routers compared: one dense model and three routers, equal tokens and equal active parameters, several seeds.

Every contender sees the same samples in the same order under one seed, so differences are taken seed by seed: their
spread is far below that of the losses themselves.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..moe.data.dataset import Dataset, open_dataset
from ..moe.data.progress import Progress, no_progress
from .machine import describe
from .router_runs import CONTENDERS, Contender, RouterBenchSettings, RunResult, finished_run
from .table import BenchTable

Results = Mapping[Contender, Sequence[RunResult]]  # by seed
Tuning = Mapping[Contender, Mapping[float, float]]  # held-out loss by rate
MEAN = "mean of the domains"
TOP_K: Contender = "top_k"  # what is done elsewhere: the others are compared with it
DOMAIN_TOP_K: Contender = "domain_top_k"


def run_suite(settings: RouterBenchSettings, progress: Progress = no_progress) -> BenchTable:
    """Train what is not trained yet, one run at a time; return losses, paired differences and sizes.

    Raises ValueError for settings that make no run.
    """
    if settings.dataset is None:
        raise ValueError("routers.dataset is missing: give the directory that `sigmoe data` wrote")
    dataset = open_dataset(Path(settings.dataset).expanduser(), check_ids=False)

    def run(contender: Contender, rate: float, seed: int) -> RunResult:
        return finished_run(settings, dataset, contender, rate, seed, progress)

    rates, tuning = choose_rates(settings, run)
    runs: dict[Contender, list[RunResult]] = {name: [] for name in CONTENDERS}
    for seed in settings.seeds:
        for name in CONTENDERS:
            runs[name].append(run(name, rates[name], seed))
    return BenchTable(
        title="Routers at equal tokens and equal active parameters",
        columns=("held out", "domain", *CONTENDERS),
        rows=table_rows(runs),
        notes=_notes(settings, dataset, rates, tuning),
        machine=describe(("torch",)) | {"threads used": str(settings.threads)},
        record=_record(settings, runs, rates, tuning),
    )


def mean_loss(result: RunResult) -> float:
    """Return the mean over the domains."""
    return statistics.fmean(result.loss.values())


def choose_rates(
    settings: RouterBenchSettings, run: Callable[[Contender, float, int], RunResult]
) -> tuple[dict[Contender, float], dict[Contender, dict[float, float]]]:
    """Return each contender's learning rate, and the losses on the tuning seed that chose it (none for one rate)."""
    if len(settings.rates) == 1:
        return dict.fromkeys(CONTENDERS, settings.rates[0]), {}
    tuning = {
        name: {rate: mean_loss(run(name, rate, settings.tuning_seed)) for rate in settings.rates} for name in CONTENDERS
    }
    return {name: best_rate(losses) for name, losses in tuning.items()}, tuning


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the rate of least loss; a run that diverged (NaN) never wins against one that did not."""
    return min(losses, key=lambda rate: math.inf if math.isnan(losses[rate]) else losses[rate])


def spread(values: Sequence[float], digits: int = 3, *, signed: bool = False) -> str:
    """Return mean and sample standard deviation as text; one value has no deviation."""
    text = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table_rows(runs: Results) -> tuple[tuple[str, ...], ...]:
    """Return losses, paired differences, bits a byte, sizes and load, a column a contender."""
    domains = list(next(iter(runs.values()))[0].loss)
    rows = _by_domain("loss, nats a token", domains, runs, lambda run: run.loss)
    for reference, names in ((TOP_K, domains), (DOMAIN_TOP_K, [])):
        rows += _differences(f"loss minus {reference}'s", names, runs, reference)
    rows += _by_domain("bits a byte", domains, runs, lambda run: run.bits_per_byte)
    firsts = [runs[name][0] for name in CONTENDERS]
    rows.append(("parameters", "", *(f"{run.total:,}" for run in firsts)))
    rows.append(("parameters, active a token", "", *(f"{run.active:,}" for run in firsts)))
    cut = (f"{run.submodel:,}" if run.submodel is not None else "none" for run in firsts)
    rows.append(("parameters, exact submodel", "one of them", *cut))
    loads = ([run.load for run in runs[name] if run.load is not None] for name in CONTENDERS)
    rows.append(("busiest expert over the mean", "", *(spread(load, 2) if load else "" for load in loads)))
    return tuple(rows)


def _by_domain(
    measure: str, domains: Sequence[str], runs: Results, values: Callable[[RunResult], Mapping[str, float]]
) -> list[tuple[str, ...]]:
    """Return a row for the mean of the domains and one for each."""
    picks: dict[str, Callable[[RunResult], float]] = {MEAN: lambda run: statistics.fmean(values(run).values())}
    picks |= {domain: lambda run, domain=domain: values(run)[domain] for domain in domains}  # type: ignore[misc]
    return [
        (measure, domain, *(spread([pick(run) for run in runs[name]]) for name in CONTENDERS))
        for domain, pick in picks.items()
    ]


def _differences(measure: str, domains: Sequence[str], runs: Results, reference: Contender) -> list[tuple[str, ...]]:
    """Return the same of the differences to `reference`, taken seed by seed."""
    rows = []
    for domain in (MEAN, *domains):
        cells = (spread(paired(runs, name, reference, domain), signed=True) for name in CONTENDERS)
        rows.append((measure, domain, *("" if name == reference else cell for name, cell in zip(CONTENDERS, cells))))
    return rows


def paired(runs: Results, contender: Contender, reference: Contender, domain: str) -> list[float]:
    """Return by seed the held-out loss of `contender` minus that of `reference`; `domain` may be the mean of all."""
    ours, theirs = (
        [mean_loss(run) if domain == MEAN else run.loss[domain] for run in runs[name]]
        for name in (contender, reference)
    )
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def _notes(
    settings: RouterBenchSettings, dataset: Dataset, rates: Mapping[Contender, float], tuning: Tuning
) -> tuple[str, ...]:
    s, tokens = settings, settings.steps * settings.batch * settings.sequence_length
    width = f"{s.top_k * s.expert_dim}"
    if tuning:
        chosen = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        rate_note = f"learning rate: the best of {', '.join(f'{rate:g}' for rate in s.rates)} on seed {s.tuning_seed}, "
        rate_note += f"which is not among the measured seeds: {chosen}"
    else:
        rate_note = f"learning rate {s.rates[0]:g} for all, tuned for none"
    return (
        f"mean ± sample standard deviation over {len(s.seeds)} seed(s); under one seed all contenders see the same "
        "samples in the same order, and `minus` takes differences seed by seed",
        f"every run: {tokens:,} tokens ({s.steps} steps of {s.batch} x {s.sequence_length}), AdamW, cosine schedule, "
        f"fp32; {len(dataset.domain_names)} domains sampled alike; the same {s.evaluate_tokens:,} held-out tokens a "
        "domain at the most",
        rate_note,
        f"shape: D {s.dim}, {s.num_layers} layers, heads {s.num_heads}/{s.num_kv_heads}, vocabulary "
        f"{dataset.vocab_size}; every token passes a hidden width of {width} in every layer",
        f"dense: FFN of width {width}; top_k: {s.experts * len(dataset.domain_names)} experts of width {s.expert_dim}, "
        f"top-{s.top_k}; domain_top_k: {s.experts} experts of width {s.expert_dim} a domain, top-{s.top_k}; rre: "
        f"{s.experts // s.top_k} experts of width {width} a domain, one a token. Active parameters differ by the gate "
        "alone",
        f"top_k and domain_top_k: auxiliary loss 0.01 (by {s.balance_scope}), z-loss 0.001, dropless; domain routers "
        "are told each sequence's domain, top_k is not",
        "exact submodel: what `sigmoe extract` cuts out for one domain; top_k's experts belong to no domain, so "
        "nothing can be cut out exactly; of the dense model it is the whole",
        "busiest expert over the mean: routed rows over the whole run, mean over layers",
    )


def _record(
    settings: RouterBenchSettings, runs: Results, rates: Mapping[Contender, float], tuning: Tuning
) -> dict[str, object]:
    kept = {key: value for key, value in dataclasses.asdict(settings).items() if key not in ("dataset", "runs")}
    by_seed = {
        name: {str(seed): dataclasses.asdict(run) for seed, run in zip(settings.seeds, results)}
        for name, results in runs.items()
    }
    tuned = {name: {f"{rate:g}": loss for rate, loss in losses.items()} for name, losses in tuning.items()}
    return {"settings": kept, "rates": dict(rates), "tuning": tuned, "runs": by_seed}
