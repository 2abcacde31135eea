"""`sigmoe extract`: cuts domains out of a model, exactly, and proves it before the submodel's name appears."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..moe.data.dataset import Dataset
from ..moe.extract import (
    DomainCheck,
    Extraction,
    Submodel,
    SubmodelWriter,
    describe,
    plan_submodel,
    verify_tensors,
)
from ..moe.identity import model_identity
from ..moe.parsing import from_mapping
from ..moe.storage.checkpoint import encode_json, write_manifest
from ..moe.storage.durable import DurableDirectory, durable_directory, require_space
from ..moe.storage.shared import shared_directory
from ..moe.stored import EXTRACTION, StoredModel, open_unfinished
from ..moe.workers import Workers
from .console import notes, print_table, progress_sink
from .extract_checks import (
    ExtractCommand,
    check_domain,
    open_heldout,
    open_in_transformers,
    report_of_the_same,
    require_transformers,
)
from .main import main
from .model_table import MODEL_COLUMNS, model_row
from .models import check_files, open_given_model
from .offline_ranks import offline_ranks
from .standing import already_there, check_place

_MARGIN = 4 << 20  # bytes of what is written beside the weights


def run(config: Mapping[str, object]) -> None:
    """Extract as `config` says. Raises ValueError for a user's mistake, with nothing written."""
    with offline_ranks() as ranks:
        _extract(config, ranks)


def _extract(config: Mapping[str, object], ranks: Workers) -> None:
    with ranks.together():
        command = from_mapping(ExtractCommand, config)
        parent = open_given_model(command.checkpoint)
        submodel = plan_submodel(parent.config, parent.registry, command.domains)
        out = Path(command.out).expanduser()
        check_place(out, parent)
    identity = ranks.from_first(lambda: model_identity(parent))
    same = partial(report_of_the_same, command, out, identity, command.settings(submodel))
    report = already_there(out, "extraction", same, ranks)
    if report is None:
        report = _make(command, parent, identity, submodel, ranks)
    print_report(report)


def _make(
    command: ExtractCommand, parent: StoredModel, identity: str, submodel: Submodel, ranks: Workers
) -> dict[str, Any]:
    """Write the submodel and verify it; returns the report."""
    out = Path(command.out).expanduser()
    with ranks.together():
        if command.transformers:
            require_transformers(command, submodel)
        dataset = open_heldout(command, parent) if command.verify else None
        writer = SubmodelWriter(
            parent,
            submodel,
            dtype=command.rounding,
            sigmoe_format=command.format == "sigmoe",
            max_file_bytes=command.max_file_bytes,
        )
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    ranks.from_first(lambda: require_space(out.parent, writer.num_bytes + _MARGIN))
    if command.check:
        check_files(parent, sources=submodel.sources, workers=ranks)
    with shared_directory(ranks, durable_directory(out), DurableDirectory) as directory:
        with progress_sink(transient=True) as progress:
            extraction = writer.write(directory, workers=ranks, progress=partial(progress, "writing"))
        checks = _verify(directory, command, parent, submodel, extraction, dataset, ranks)
        report = describe(parent, identity, submodel, extraction, checks, directory.records)
        report |= command.settings(submodel) | {"verify": command.verify, "parent_checked": command.check}
        if command.transformers and dataset is not None:
            compared = partial(_compare, directory, dataset, submodel.registry.names[0])
            report["transformers"] = ranks.from_first(compared)
        ranks.from_first(lambda: _finish(directory, submodel, report))
    return report


def _compare(directory: DurableDirectory, dataset: Dataset, domain: str) -> dict[str, Any]:
    return asdict(open_in_transformers(open_unfinished(directory.root), dataset, domain))


def _finish(directory: DurableDirectory, submodel: Submodel, report: Mapping[str, Any]) -> None:
    directory.write(EXTRACTION, encode_json(report))
    write_manifest(directory, submodel.pieces)


def print_report(report: Mapping[str, Any]) -> None:
    """Print the format and the reason for it, and the table of parent and submodel."""
    notes().print(f"written as {report['format']}: {report['reason']}")
    number = report["parent"]["domains"]
    whole = f"all {number} domains" if number > 1 else "parent"
    parts = (whole, report["parent"]), (", ".join(report["domains"]), report)
    rows = [[*model_row(title, part), "", ""] for title, part in parts]
    if report["checks"]:
        rows[1][5] = f"{max(check['max_abs_difference'] for check in report['checks']):g}"
        rows[1][6] = f"{sum(check['tokens'] for check in report['checks']):,}"
    if "transformers" in report:
        check = report["transformers"]
        greedy = "the same" if check["greedy_equal"] else "another"
        notes().print(f"in transformers {check['version']}: {greedy} greedy text of {check['greedy_tokens']} tokens")
        difference = f"{check['max_abs_difference']:.1g}"
        rows.append(["in transformers", check["architecture"], "", "", "", difference, f"{check['tokens']:,}"])
    columns = [*MODEL_COLUMNS, "max |logit difference|", "tokens compared"]
    print_table("Extraction", columns, rows, left=2)


def _verify(
    directory: DurableDirectory,
    command: ExtractCommand,
    parent: StoredModel,
    submodel: Submodel,
    extraction: Extraction,
    dataset: Dataset | None,
    ranks: Workers,
) -> tuple[DomainCheck, ...]:
    """Read back what was written; ValueError where a bit differs, and then nothing stays."""
    with ranks.together():
        child = open_unfinished(directory.root)
    verify_tensors(child, extraction, ranks)
    if dataset is None:
        return ()
    with progress_sink(transient=True) as progress:

        def verify(name: str) -> dict[str, Any]:
            watched = partial(progress, f"verifying {name}")
            return asdict(check_domain(command, parent, child, dataset, name, watched))

        checks = ranks.spread(verify, submodel.registry.names)
    return tuple(DomainCheck(**check) for check in checks)


if __name__ == "__main__":
    sys.exit(main(["extract", *sys.argv[1:]]))
