"""Writes the pruned model that `sigmoe prune` chose, its report and its page: resumable, each process its share."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..moe.data.dataset import Dataset
from ..moe.extract import SubmodelWriter, verify_tensors
from ..moe.extract.unwritten import unwritten_model
from ..moe.hf.formats import choose_format
from ..moe.prune.report import describe_pruning
from ..moe.storage.checkpoint import encode_json, write_manifest
from ..moe.storage.durable import require_space
from ..moe.storage.resumable import ResumableDirectory, resumable_directory
from ..moe.storage.shared import shared_directory
from ..moe.stored import PRUNING, StoredModel, open_unfinished
from ..moe.workers import Workers
from .console import notes, progress_sink
from .prune_choice import Choice
from .prune_config import PruneCommand
from .prune_losses import measure_losses
from .prune_report import report_page

_PAGE = "report.html"
_MARGIN = 64 << 20  # bytes of what is written beside the weights, tokenizers above all


def pruned_writer(command: PruneCommand, parent: StoredModel, choice: Choice) -> SubmodelWriter:
    """Return what will write the model, in the format of its parent unless sigmoe's is asked for.

    Raises ValueError where that format cannot hold it.
    """
    ours = command.format == "sigmoe" or parent.format == "sigmoe"
    fits = choose_format(choice.pruned.config, choice.pruned.registry)
    if not ours and fits.format != parent.format:
        raise ValueError(f"{parent.format} cannot hold the pruned model: {fits.reason}; or give format=sigmoe")
    return SubmodelWriter(
        parent,
        choice.pruned,
        sigmoe_format=ours,
        reason=None if command.format == "sigmoe" else "as the model that is pruned",
        max_file_bytes=command.max_file_bytes,
        hash_tensors=command.verify,
        replaced=choice.healed.tensors if choice.healed else {},
    )


def write_pruned(
    command: PruneCommand,
    parent: StoredModel,
    identity: str,
    choice: Choice,
    heldout: Dataset | None,
    ranks: Workers,
) -> dict[str, Any]:
    """Write the pruned model; returns the report."""
    out = Path(command.out).expanduser()
    with ranks.together():
        writer = pruned_writer(command, parent, choice)
    made = resumable_directory(out, _key(command, identity, choice), _tell_stale)
    with shared_directory(ranks, made, partial(ResumableDirectory, rank=ranks.rank)) as directory:
        if directory.finished:
            notes().print(f"going on: {len(directory.finished)} weight file(s) were finished before")
        still = writer.num_bytes - directory.finished_bytes
        ranks.from_first(lambda: require_space(out.parent, still + _MARGIN))
        with progress_sink(transient=True, bytes=True) as progress:
            extraction = writer.write(directory, workers=ranks, progress=partial(progress, "writing"))
        if command.verify:
            with ranks.together():
                child = open_unfinished(directory.root)
            verify_tensors(child, extraction, ranks)
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
        report |= _measured(command, parent, choice, directory.root, heldout, ranks)
        ranks.from_first(lambda: _finish(directory, choice, report))
    return report


def _key(command: PruneCommand, identity: str, choice: Choice) -> dict[str, Any]:
    """By what a later prune knows that it goes on with this one."""
    text = None if choice.sums is None else dict(choice.sums.text)
    key = {"parent": identity, "kept": choice.kept, "text": text, "verify": command.verify, **command.settings()}
    return key | ({"threads": torch.get_num_threads()} if command.heal else {})  # the bits of training may depend on it


def _measured(
    command: PruneCommand,
    parent: StoredModel,
    choice: Choice,
    written: Path,
    heldout: Dataset | None,
    ranks: Workers,
) -> dict[str, Any]:
    """Return what held-out text says of the written model, and what healing did."""
    losses = before = None
    if heldout is not None:
        assert choice.sums is not None  # there is data, and it was calibrated on
        with ranks.together():
            child = open_unfinished(written)
        inside, tokens = choice.sums.text["domains"], command.evaluate
        losses = measure_losses(parent, child, heldout, inside, ranks, tokens=tokens)
        if choice.healed:
            unhealed = unwritten_model(parent, choice.pruned)
            before = measure_losses(parent, unhealed, heldout, inside, ranks, tokens=tokens)
    healed = None
    if choice.healed:
        losses_of_steps = {"losses": list(choice.healed.losses), "batches": choice.healed.batches}
        healed = losses_of_steps | {"losses_before": before}
    return {"evaluate": command.evaluate, "losses": losses, "healed": healed}


def _finish(directory: ResumableDirectory, choice: Choice, report: Mapping[str, Any]) -> None:
    directory.write(PRUNING, encode_json(report))
    directory.write(_PAGE, report_page(report))
    write_manifest(directory, choice.pruned.pieces)


def _tell_stale(part: Path) -> None:
    notes().print(f"{part} was begun with other settings: it is thrown away")
