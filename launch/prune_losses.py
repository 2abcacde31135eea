"""What `sigmoe prune` measures on held-out text: parent and pruned model, in and out of the calibrated domains."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..moe.data.dataset import Dataset, open_dataset
from ..moe.prune.measure import measure_domain
from ..moe.stored import StoredModel
from ..moe.streaming import RunnableModel
from ..moe.workers import Workers
from .console import print_table, progress_sink
from .prune_config import PruneCommand


def open_heldout(command: PruneCommand, parent: StoredModel) -> Dataset | None:
    """Open the dataset to evaluate on, None where nothing is asked for; ValueError where `data` has no held-out text.

    The caller has compared the tokenizers.
    """
    if not command.evaluate:
        return None
    path = None if command.data is None else Path(command.data).expanduser()
    if path is None or not path.is_dir():
        raise ValueError("evaluate needs held-out text: give data= a prepared dataset, or evaluate=0")
    dataset = open_dataset(path, check_ids=False)
    for name in dataset.domain_names:
        if not dataset.domain(name).heldout.num_tokens:
            raise ValueError(f"{path}: domain {name!r} has no held-out text: prepare it with some, or evaluate=0")
    for name in dataset.domain_names if parent.needs_domain else ():
        parent.registry.id_of(name)
    return dataset


def measure_losses(
    parent: StoredModel,
    pruned: RunnableModel,
    dataset: Dataset,
    inside: Collection[str],
    ranks: Workers,
    *,
    tokens: int,
) -> list[dict[str, Any]]:
    """Return what every domain's held-out text says, as plain JSON data; each process takes some of the domains.

    `in_domain` are those `inside`, whose text the experts were chosen by.
    """
    with progress_sink(transient=True) as progress:

        def measure(name: str) -> dict[str, Any]:
            watched = partial(progress, f"evaluating {name}")
            loss = measure_domain(parent, pruned, dataset, name, max_tokens=tokens, progress=watched)
            return loss.to_json() | {"in_domain": name in inside}

        return ranks.spread(measure, dataset.domain_names)


def print_losses(losses: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None) -> None:
    """Print a line a domain; `before` was measured before the healing."""
    columns = ["held-out text", "", "perplexity", "ratio", "KL, nats", "same first choice"]
    rows = []
    for place, row in enumerate(losses):
        where = "in domain" if row["in_domain"] else "out of domain"
        chain = [row] if before is None else [before[place], row]
        perplexities = [_number(row["parent_perplexity"]), *(_number(each["pruned_perplexity"]) for each in chain)]
        agreements = ["-" if each["agreement"] is None else f"{100 * each['agreement']:.1f} %" for each in chain]
        rows.append(
            [
                row["domain"],
                where,
                " → ".join(perplexities),
                " → ".join(_number(each["perplexity_ratio"]) for each in chain),
                " → ".join(_number(each["kl"]) for each in chain),
                " → ".join(agreements),
            ]
        )
    print_table("parent → pruned" if before is None else "parent → pruned → healed", columns, rows, left=2)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
