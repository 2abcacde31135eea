"""The calibration of `sigmoe prune`: sums that an earlier one stored, or a pass of text through the model."""

from functools import partial
from pathlib import Path

from ..moe.data.dataset import open_dataset
from ..moe.prune.calibrate import calibrate
from ..moe.prune.sums import CalibrationSums, load_sums, save_sums
from ..moe.prune.text import CalibrationText, dataset_text, jsonl_text
from ..moe.storage.durable import remove_directory
from ..moe.storage.resumable import locked, part_path
from ..moe.stored import StoredModel
from ..moe.workers import Workers
from .console import notes, progress_sink
from .models import check_tokenizer
from .prune_config import PruneCommand


def stats_path(command: PruneCommand) -> Path:
    """Return the directory of the sums."""
    out = Path(command.out).expanduser()
    return out.with_name(f"{out.name}-sums") if command.stats is None else Path(command.stats).expanduser()


def calibration_text(command: PruneCommand, parent: StoredModel) -> CalibrationText | None:
    """Return the text that `data` gives, None where it is not given; ValueError where it is none for this model."""
    if command.data is None:
        return None
    path = Path(command.data).expanduser()
    if not path.is_dir():
        return jsonl_text(parent, path, domains=command.domains, tokens=command.tokens, seed=command.seed)
    dataset = open_dataset(path)
    check_tokenizer(command.given, parent, dataset)
    return dataset_text(parent, dataset, domains=command.domains, tokens=command.tokens, seed=command.seed)


def stored_sums(command: PruneCommand, identity: str, text: CalibrationText | None) -> CalibrationSums | None:
    """Return the sums in the stats directory, None where it does not exist and there is text to make them.

    Raises ValueError where they are of another model or text.
    """
    path = stats_path(command)
    if not path.exists():
        if text is None:
            raise ValueError(f"stats={command.stats} does not exist: give data= too, and it is written")
        return None
    sums = load_sums(path)
    if sums.model != identity:
        raise ValueError(f"{path} holds the sums of another model than {command.given}: give another stats=")
    if text is not None and dict(sums.text) != dict(text.description):
        raise ValueError(
            f"{path} holds the sums of other text than data, domain, tokens, seed say: give another stats="
        )
    return sums


def collect_sums(command: PruneCommand, parent: StoredModel, text: CalibrationText, ranks: Workers) -> CalibrationSums:
    """Take the text through the model and store the sums; a killed calibration goes on where it was."""
    path = stats_path(command)
    work = part_path(path)
    alone = locked(work, f"another process is calibrating into {path}: wait for it, or give another stats=")
    with ranks.first_holds(alone, lambda _: None):
        notes().print(f"calibrating on {text.description['tokens']:,} tokens; the sums go to {path}")
        with progress_sink(transient=True) as progress:
            sums = calibrate(
                parent,
                text,
                work,
                subsets=command.criterion == "reconstruction",
                workers=ranks,
                progress=partial(progress, "calibrating (batches x layers)"),
            )
        with ranks.together():
            if ranks.rank == 0:
                save_sums(path, sums)
                remove_directory(work)
    return sums
