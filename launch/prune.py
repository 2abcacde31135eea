"""`sigmoe prune`: drops experts of a learned router, offline and streamed; resumable, in one process or several."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..moe.config import layer_experts
from ..moe.identity import model_identity
from ..moe.prune.criteria import check_enumerable
from ..moe.prune.prunable import check_prunable
from ..moe.prune.report import REPORT_VERSION
from ..moe.storage.resumable import clear_part
from ..moe.stored import PRUNING, StoredModel
from ..moe.workers import Workers
from .calibration import calibration_text, collect_sums, stats_path, stored_sums
from .console import notes, print_table
from .main import main
from .model_table import PRUNED_COLUMNS, pruned_row
from .models import check_files, open_given_model
from .offline_ranks import offline_ranks
from .prune_choice import choose, heal_choice
from .prune_config import PruneCommand, load
from .prune_forecast import print_forecast
from .prune_losses import open_heldout, print_losses
from .prune_write import pruned_writer, write_pruned
from .standing import already_there, check_place, require_proofs, standing_report


def run(config: Mapping[str, object]) -> None:
    """Prune as `config` says. Raises ValueError for a user's mistake, with nothing written."""
    with offline_ranks() as ranks:
        _prune(config, ranks)


def _prune(config: Mapping[str, object], ranks: Workers) -> None:
    with ranks.together():
        command = load(config)
        out = Path(command.out).expanduser()
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
    if sums is not None:  # which may have been stored right before a kill
        ranks.from_first(lambda: clear_part(stats_path(command)))
    source = sums.text if sums is not None else None if text is None else text.description
    expected = {"settings": command.settings(), "text": None if source is None else dict(source)}
    report = already_there(out, "pruning", lambda: _standing(command, out, identity, expected), ranks)
    if report is not None:
        ranks.from_first(lambda: clear_part(out))
        print_report(report)
        return
    # With stored sums dropped experts are never read, nor what lies in files of their own.
    reads_all = (sums is None and text is not None) or command.criterion == "weight" or command.heal or command.evaluate
    if command.check and reads_all:
        check_files(parent, workers=ranks)
    if sums is None and text is not None:
        sums = collect_sums(command, parent, text, ranks)
    choice = choose(command, parent, sums, ranks)
    if command.check and not reads_all:
        check_files(parent, sources=choice.pruned.sources, workers=ranks)
    with ranks.together():
        pruned_writer(command, parent, choice)  # which may refuse it, before the healing
        if choice.forecasts:
            assert choice.sums is not None
            print_forecast(choice.forecasts, choice.sums.text["tokens"])
        if command.heal:
            assert text is not None
            choice = heal_choice(command, parent, choice, text)
    print_report(write_pruned(command, parent, identity, choice, heldout, ranks))


def _standing(command: PruneCommand, out: Path, identity: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of what stands in `out`, where it is what would be written; else ValueError."""
    report = standing_report(out, PRUNING, version=REPORT_VERSION, parent=identity, settings=expected)
    lacking = {
        "check=true": command.check and not report["parent_checked"],
        "verify=true": command.verify and not report["verified"],
        f"evaluate={command.evaluate}": command.evaluate > report["evaluate"],
    }
    require_proofs(out, "pruning", lacking)
    return report


def print_report(report: Mapping[str, Any]) -> None:
    """Print the format and the reason for it, and the table of parent and pruned model."""
    notes().print(f"written as {report['format']}: {report['reason']}")
    rows = [
        [*pruned_row(report["parent"]["name"], report["parent"]), "100 %"],
        [*pruned_row("pruned", report), _routed(report["layers"])],
    ]
    print_table("Pruning", [*PRUNED_COLUMNS, "routed"], rows, left=3)
    if report["healed"]:
        notes().print(f"healed in {len(report['healed']['losses'])} steps{_healing(**report['healed'])}")
    if report["experts"] == report["parent"]["experts"]:
        notes().print("nothing is pruned: the budget keeps every expert")
    if report["losses"]:
        print_losses(report["losses"], report["healed"] and report["healed"]["losses_before"])


def _healing(losses: Sequence[float], batches: int | None = None, **_: object) -> str:
    """Return how far the loss of the last step's text fell since it was first taken; empty where it was taken once."""
    if batches is None or len(losses) <= batches:
        return ""
    first = losses[(len(losses) - 1) % batches]
    return f": loss {first:.3f} when the last batch was first taken, {losses[-1]:.3f} in the end"


def _routed(layers: Sequence[Mapping[str, Any]]) -> str:
    """Return the share of the calibration's routed rows that went to kept experts; empty where there was no text."""
    shares = [
        sum(layer["load_before"][expert] for expert in layer["kept"]) for layer in layers if "load_before" in layer
    ]
    return f"{100 * sum(shares) / len(shares):.1f} %" if shares else ""


def _open(command: PruneCommand, out: Path) -> StoredModel:
    parent = open_given_model(command.given)
    try:
        check_prunable(parent.config, parent.registry)
    except ValueError as error:
        raise ValueError(f"{parent.path} cannot be pruned: {error}") from error
    if command.criterion == "reconstruction":
        check_enumerable(layer_experts(parent.config, parent.registry))
    check_place(out, parent)
    return parent


if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))
