"""`sigmoe prune`: drops experts of a learned router, offline and streamed; resumable, in one process or several."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moe.config import num_experts
from ..moe.data.dataset import Dataset
from ..moe.extract import Submodel, SubmodelWriter, verify_tensors
from ..moe.extract.unwritten import unwritten_model
from ..moe.hf.formats import choose_format
from ..moe.identity import model_identity
from ..moe.prune.budget import Budget, Kept, choose_experts, choose_subsets, model_sizes
from ..moe.prune.criteria import check_enumerable, random_saliency, saliency, subset_errors, weight_saliency
from ..moe.prune.merge import Groups, group_experts, plan_merged
from ..moe.prune.plan import plan_pruned
from ..moe.prune.prunable import check_prunable
from ..moe.prune.report import REPORT_VERSION, describe_pruning
from ..moe.prune.sums import CalibrationSums
from ..moe.prune.text import CalibrationText
from ..moe.storage.checkpoint import encode_json, write_manifest
from ..moe.storage.durable import require_space
from ..moe.storage.resumable import ResumableDirectory, clear_part, resumable_directory
from ..moe.stored import PRUNING, StoredModel, open_unfinished
from .calibration import calibration_text, collect_sums, stored_sums
from .console import notes, print_table, progress_sink
from .heal import Healed, check_memory, heal
from .main import main
from .models import check_files, open_given_model
from .offline_ranks import OfflineRanks, offline_ranks
from .prune_config import PruneCommand, load
from .prune_forecast import Forecasts, forecast_budgets, print_forecast
from .prune_losses import measure_losses, open_heldout, print_losses
from .prune_report import report_page
from .standing import check_place, standing_report

_PAGE = "report.html"
_MARGIN = 64 << 20  # bytes of what is written beside the weights, tokenizers above all


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Which experts stay, and why."""

    kept: Kept
    saliency: tuple[Tensor, ...]
    sums: CalibrationSums | None
    forecasts: Forecasts | None
    groups: Groups | None
    pruned: Submodel
    healed: Healed | None = None


def run(config: Mapping[str, object]) -> None:
    """Prune as `config` says. Raises ValueError for a user's mistake, with nothing written."""
    command = load(config)
    with offline_ranks() as ranks:
        _prune(command, ranks)


def _prune(command: PruneCommand, ranks: OfflineRanks) -> None:
    out = Path(command.out).expanduser()
    with ranks.together():
        parent = _open(command, out)
        text = calibration_text(command, parent)
        heldout = open_heldout(command, parent)
        if command.heal and ranks.size > 1:
            raise ValueError("heal trains in one process: start without mpirun (stats= keeps an earlier calibration)")
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    identity = ranks.from_first(lambda: model_identity(parent))
    sums = None
    if text is not None or command.stats is not None:
        with ranks.together():
            sums = stored_sums(command, identity, text)
    if ranks.from_first(out.exists):
        source = sums.text if sums is not None else None if text is None else text.description
        expected = {"settings": command.settings(), "text": None if source is None else dict(source)}
        report = ranks.from_first(lambda: _standing(command, out, identity, expected))
        notes().print(f"{out} holds this very pruning already")
        ranks.from_first(lambda: clear_part(out))
        print_report(report)
        return
    if sums is None and text is not None:
        sums = collect_sums(command, parent, text, ranks)
    with ranks.together():
        choice = _choose(command, parent, sums)
        writer = _writer(command, parent, choice)
        if choice.forecasts:
            print_forecast(choice.forecasts)
        if command.heal:
            assert text is not None
            choice = replace(choice, healed=_heal(command, parent, choice, text))
            writer = _writer(command, parent, choice)
    print_report(_write(command, parent, identity, choice, writer, heldout, ranks))


def _standing(command: PruneCommand, out: Path, identity: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of what stands in `out`, where it is what would be written; else ValueError."""
    report = standing_report(out, PRUNING, version=REPORT_VERSION, parent=identity, settings=expected)
    if command.verify and not report["verified"]:
        raise ValueError(f"{out} holds this very pruning, made without verify: remove it or give another out=")
    if command.evaluate > report["evaluate"]:
        lacking = f"evaluate={command.evaluate}"
        raise ValueError(f"{out} holds this very pruning, made without {lacking}: remove it or give another out=")
    return report


def print_report(report: Mapping[str, Any]) -> None:
    """Print the format and the reason for it, and the table of parent and pruned model."""
    notes().print(f"written as {report['format']}: {report['reason']}")
    rows = [_row(report["parent"]["name"], report["parent"]), _row("pruned", report)]
    print_table("Pruning", ["model", "format", "experts", "MB", "parameters", "active a token", "routed"], rows, left=3)
    if report["healed"]:
        losses = report["healed"]["losses"]
        first, last = f"{losses[0]:.3f} on the first batch", f"{losses[-1]:.3f} on the last"
        notes().print(f"healed in {len(losses)} steps: loss {first}, {last}")
    if report["losses"]:
        print_losses(report["losses"], report["healed"] and report["healed"]["losses_before"])


def _row(title: str, part: Mapping[str, Any]) -> list[str]:
    count, experts = part["parameters"], sorted(set(part["experts"]))
    size = f"{part['bytes']['tensors'] / 1e6:,.1f}"
    number = str(experts[0]) if len(experts) == 1 else f"{experts[0]} to {experts[-1]}"
    routed = "100 %"
    if "layers" in part:
        layers = [layer for layer in part["layers"] if "load_before" in layer]
        shares = [sum(layer["load_before"][expert] for expert in layer["kept"]) for layer in layers]
        routed = f"{100 * sum(shares) / len(shares):.1f} %" if shares else ""
    return [title, part["format"], number, size, f"{count['total']:,}", f"{count['active']:,}", routed]


def _open(command: PruneCommand, out: Path) -> StoredModel:
    parent = open_given_model(command.given)
    try:
        check_prunable(parent.config, parent.registry)
    except ValueError as error:
        raise ValueError(f"{parent.path} cannot be pruned: {error}") from error
    if command.criterion == "reconstruction":
        check_enumerable([num_experts(parent.registry, i) for i in range(len(parent.config.sparse_layer_ids))])
    check_place(out, parent)
    return parent


def _choose(command: PruneCommand, parent: StoredModel, sums: CalibrationSums | None) -> _Choice:
    """Rate all experts, and choose."""
    config, sizes = parent.config, model_sizes(parent)
    numbers = [num_experts(parent.registry, index) for index in range(len(config.sparse_layer_ids))]
    match command.criterion:
        case "random":
            values = random_saliency(numbers, command.seed)
        case "weight":
            with progress_sink(transient=True, bytes=True) as progress:
                values = weight_saliency(parent, lambda done, total: progress("rating weights", done, total))
        case criterion:
            assert sums is not None
            values = saliency(sums.layers, criterion)

    def choose(budget: Budget) -> Kept:
        if command.criterion == "reconstruction":
            assert sums is not None
            return choose_subsets([subset_errors(layer) for layer in sums.layers], budget, config, sizes)
        return choose_experts(values, budget, config, sizes)

    kept = choose(command.budget)
    forecasts = None if sums is None else forecast_budgets(sums.layers, kept, choose)
    pruned, groups = plan_pruned(config, parent.registry, kept), None
    if command.merge:
        assert sums is not None
        groups = group_experts(sums.layers, kept)
        pruned = plan_merged(pruned, sums.layers, groups)
    return _Choice(kept=kept, saliency=values, sums=sums, forecasts=forecasts, groups=groups, pruned=pruned)


def _writer(command: PruneCommand, parent: StoredModel, choice: _Choice) -> SubmodelWriter:
    """Return what will write the model, in the format of its parent unless sigmoe's is asked for."""
    ours = command.format == "sigmoe" or parent.format == "sigmoe"
    fits = choose_format(choice.pruned.config, choice.pruned.registry)
    if not ours and fits.format != parent.format:
        raise ValueError(f"{parent.format} cannot hold the pruned model: {fits.reason}; or give format=sigmoe")
    return SubmodelWriter(
        parent,
        choice.pruned,
        sigmoe_format=ours,
        max_file_bytes=command.max_file_bytes,
        hash_tensors=command.verify,
        replaced=choice.healed.tensors if choice.healed else {},
    )


def _heal(command: PruneCommand, parent: StoredModel, choice: _Choice, text: CalibrationText) -> Healed:
    check_memory(choice.pruned)
    with progress_sink(transient=True) as progress:
        return heal(
            unwritten_model(parent, choice.pruned),
            text,
            steps=command.heal,
            lr=command.heal_lr,
            progress=lambda done, total: progress("healing", done, total),
        )


def _write(
    command: PruneCommand,
    parent: StoredModel,
    identity: str,
    choice: _Choice,
    writer: SubmodelWriter,
    heldout: Dataset | None,
    ranks: OfflineRanks,
) -> dict[str, Any]:
    """Write the pruned model, each process its share of the files; returns the report."""
    out = Path(command.out).expanduser()
    with ranks.together():
        if ranks.rank == 0 and command.check:
            check_files(parent, sources={piece.source for piece in choice.pruned.pieces.values()})
    text = None if choice.sums is None else dict(choice.sums.text)
    key = {"parent": identity, "kept": choice.kept, "text": text, "verify": command.verify, **command.settings()}
    key |= {"threads": torch.get_num_threads()} if command.heal else {}  # which the bits of training may depend on
    with _shared_directory(out, key, ranks) as directory:
        with ranks.together():
            if ranks.rank == 0:
                require_space(out.parent, writer.num_bytes + _MARGIN - directory.finished_bytes)
        with ranks.together(), progress_sink(transient=True, bytes=True) as progress:
            writer.write(
                directory,
                rank=ranks.rank,
                size=ranks.size,
                progress=lambda done, total: progress("writing", done, total),
            )
        for written in ranks.exchange(directory.notes()):
            directory.adopt(written)
        asked = "format=sigmoe asks for it" if command.format == "sigmoe" else "as the model that is pruned"
        extraction = replace(writer.extraction(directory), reason=asked)
        with ranks.together():
            if command.verify:
                share = replace(extraction, kept=extraction.kept[ranks.rank :: ranks.size])
                verify_tensors(open_unfinished(directory.root), share)
        report = describe_pruning(
            parent,
            identity,
            choice.pruned,
            extraction,
            directory.records,
            kept=choice.kept,
            saliency=choice.saliency,
            sums=choice.sums,
            groups=choice.groups,
            healed=choice.healed.tensors if choice.healed else (),
        )
        report |= {"settings": command.settings(), "parent_checked": command.check, "verified": command.verify}
        report |= {"forecast": choice.forecasts}
        report |= _measured(command, parent, choice, open_unfinished(directory.root), heldout, ranks)
        with ranks.together():
            if ranks.rank == 0:
                directory.write(PRUNING, encode_json(report))
                directory.write(_PAGE, report_page(report))
                write_manifest(directory, choice.pruned.pieces)
    return report


def _measured(
    command: PruneCommand,
    parent: StoredModel,
    choice: _Choice,
    child: StoredModel,
    heldout: Dataset | None,
    ranks: OfflineRanks,
) -> dict[str, Any]:
    """Return what held-out text says of the written model, and what healing did."""
    losses = before = None
    if heldout is not None:
        assert choice.sums is not None  # there is data, and it was calibrated on
        inside, tokens = choice.sums.text["domains"], command.evaluate
        losses = measure_losses(parent, child, heldout, inside, ranks, tokens=tokens)
        if choice.healed:
            unhealed = unwritten_model(parent, choice.pruned)
            before = measure_losses(parent, unhealed, heldout, inside, ranks, tokens=tokens)
    healed = choice.healed and {"losses": list(choice.healed.losses), "losses_before": before}
    return {"evaluate": command.evaluate, "losses": losses, "healed": healed}


@contextmanager
def _shared_directory(out: Path, key: Mapping[str, Any], ranks: OfflineRanks) -> Iterator[ResumableDirectory]:
    """Yield the directory under construction to every process; rank 0 makes it, and gives it its name at the end."""
    own: list[ResumableDirectory] = []
    with ExitStack() as stack:

        def begin() -> list[Any]:
            own.append(stack.enter_context(resumable_directory(out, key, _tell_stale)))
            return [str(own[0].root), own[0].notes()]

        root, there = ranks.from_first(begin)
        directory = own[0] if own else ResumableDirectory(Path(root), rank=ranks.rank)
        if not own:
            directory.adopt(there)
            directory.finished = frozenset(there)
        if directory.finished:
            notes().print(f"going on: {len(directory.finished)} weight file(s) were finished before")
        yield directory
        with ranks.together():
            stack.close()


def _tell_stale(part: Path) -> None:
    notes().print(f"{part} was begun with other settings: it is thrown away")


if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))
