"""`sigmoe extract`: cuts domains out of a model, exactly, and proves it before the submodel's name appears."""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..moe.data.dataset import Dataset
from ..moe.extract import (
    DomainCheck,
    Extraction,
    Submodel,
    describe,
    identity,
    plan_submodel,
    planned_bytes,
    verify_domain,
    verify_tensors,
    write_submodel,
)
from ..moe.parsing import from_mapping
from ..moe.storage.checkpoint import encode_json, write_manifest
from ..moe.storage.durable import DurableDirectory, durable_directory, require_space
from ..moe.stored import EXTRACTION, StoredModel, open_unfinished
from .console import notes, print_table, progress_sink
from .extract_checks import (
    ExtractCommand,
    open_heldout,
    open_in_transformers,
    report_of_the_same,
    require_transformers,
)
from .main import main
from .models import check_files, open_given_model

_MARGIN = 4 << 20  # bytes of what is written beside the weights


def run(config: Mapping[str, object]) -> None:
    """Extract as `config` says. Raises ValueError for a user's mistake, with nothing written."""
    command = from_mapping(ExtractCommand, config)
    parent = open_given_model(command.checkpoint)
    submodel = plan_submodel(parent.config, parent.registry, command.domains)
    out = Path(command.out).expanduser()
    settings = {"domains": list(submodel.registry.names), "dtype": command.dtype, "format_asked": command.format}
    if parent.path.resolve() in out.resolve().parents:
        raise ValueError(f"out={out} lies inside the model it is cut out of: give a place of its own")
    if out.exists():
        report = report_of_the_same(command, out, identity(parent), settings)
        notes().print(f"{out} holds this very extraction already")
        print_report(report)
        return
    if command.transformers:
        require_transformers(command, submodel)
    dataset = open_heldout(command, parent) if command.verify else None
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    require_space(out.parent, planned_bytes(parent, submodel, command.rounding) + _MARGIN)
    if command.check:
        check_files(parent, sources={piece.source for piece in submodel.pieces.values()})
    with durable_directory(out) as directory:
        extraction = _write(directory, command, parent, submodel)
        checks = _verify(directory, command, parent, submodel, extraction, dataset)
        report = describe(parent, submodel, extraction, checks, directory.records)
        report |= settings | {"verify": command.verify, "parent_checked": command.check}
        if command.transformers and dataset is not None:
            child, domain = open_unfinished(directory.root), submodel.registry.names[0]
            report["transformers"] = asdict(open_in_transformers(child, dataset, domain))
        directory.write(EXTRACTION, encode_json(report))
        write_manifest(directory, submodel.pieces)
    print_report(report)


def print_report(report: Mapping[str, Any]) -> None:
    """Print the format and the reason for it, and the table of parent and submodel."""
    notes().print(f"written as {report['format']}: {report['reason']}")
    number = report["parent"]["domains"]
    rows = [_row(f"all {number} domains" if number > 1 else "parent", report["parent"])]
    rows.append(_row(", ".join(report["domains"]), report))
    if report["checks"]:
        rows[1][5] = f"{max(check['max_abs_difference'] for check in report['checks']):g}"
        rows[1][6] = f"{sum(check['tokens'] for check in report['checks']):,}"
    if "transformers" in report:
        check = report["transformers"]
        greedy = "the same" if check["greedy_equal"] else "another"
        notes().print(f"in transformers {check['version']}: {greedy} greedy text of {check['greedy_tokens']} tokens")
        difference = f"{check['max_abs_difference']:.1g}"
        rows.append(["in transformers", check["architecture"], "", "", "", difference, f"{check['tokens']:,}"])
    columns = ["model", "format", "MB", "parameters", "active a token", "max |logit difference|", "tokens compared"]
    print_table("Extraction", columns, rows, left=2)


def _row(title: str, part: Mapping[str, Any]) -> list[str]:
    count = part["parameters"]
    size = f"{part['bytes']['tensors'] / 1e6:,.1f}"
    return [title, part["format"], size, f"{count['total']:,}", f"{count['active']:,}", "", ""]


def _write(directory: DurableDirectory, command: ExtractCommand, parent: StoredModel, submodel: Submodel) -> Extraction:
    with progress_sink(transient=True) as progress:
        return write_submodel(
            directory,
            parent,
            submodel,
            dtype=command.rounding,
            sigmoe_format=command.format == "sigmoe",
            progress=lambda done, total: progress("writing", done, total),
        )


def _verify(
    directory: DurableDirectory,
    command: ExtractCommand,
    parent: StoredModel,
    submodel: Submodel,
    extraction: Extraction,
    dataset: Dataset | None,
) -> tuple[DomainCheck, ...]:
    """Read back what was written; ValueError where a bit differs, and then nothing stays."""
    child = open_unfinished(directory.root)
    verify_tensors(child, extraction)
    checks = []
    with progress_sink(transient=True) as progress:
        for name in submodel.registry.names if dataset is not None else ():
            assert dataset is not None
            check = verify_domain(
                parent,
                child,
                dataset,
                name,
                max_tokens=command.verify,
                rounding=command.rounding,
                progress=lambda done, total, name=name: progress(f"verifying {name}", done, total),  # type: ignore[misc]
            )
            if math.isinf(check.max_abs_difference):
                raise ValueError(f"{name}: the logits are not finite: {parent.path} holds NaN, or numbers too large")
            if check.max_abs_difference:
                raise ValueError(
                    f"{name}: the submodel's logits differ from its parent's by {check.max_abs_difference:g}: this is "
                    "a bug in sigmoe or a fault of the machine, nothing was kept"
                )
            checks.append(check)
    return tuple(checks)


if __name__ == "__main__":
    sys.exit(main(["extract", *sys.argv[1:]]))
