"""`sigmoe convert`: writes a model in another format, or a sparse model that begins as a dense one; proves it equal."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..moe.canonical import expected_shapes
from ..moe.extract import Submodel, describe, verify_tensors
from ..moe.identity import model_identity
from ..moe.parsing import from_mapping
from ..moe.storage.checkpoint import encode_json, write_manifest
from ..moe.storage.durable import DurableDirectory, durable_directory, require_space
from ..moe.storage.shared import shared_directory
from ..moe.stored import CONVERSION, StoredModel, open_unfinished
from ..moe.workers import Workers
from .console import notes, print_table, progress_sink
from .convert_checks import check_head, check_inherited, check_logits, require_transformers
from .convert_plan import Conversion, ConvertCommand, plan_conversion
from .main import main
from .model_table import MODEL_COLUMNS, model_row
from .models import check_files, open_given_model
from .offline_ranks import offline_ranks
from .standing import already_there, check_place, require_proofs, standing_report

REPORT_VERSION = 1
_MARGIN = 64 << 20  # bytes of what is written beside the weights, tokenizers above all


def run(config: Mapping[str, object]) -> None:
    """Convert as `config` says. Raises ValueError for a user's mistake, with nothing written."""
    with offline_ranks() as ranks:
        _convert(config, ranks)


def _convert(config: Mapping[str, object], ranks: Workers) -> None:
    with ranks.together():
        command = from_mapping(ConvertCommand, config)
        parent = open_given_model(command.given)
        conversion = plan_conversion(command, parent)
        out = Path(command.out).expanduser()
        check_place(out, parent)
    identity = ranks.from_first(lambda: model_identity(parent))
    report = already_there(out, "conversion", partial(_standing, command, conversion, out, identity), ranks)
    if report is None:
        report = _make(command, parent, identity, conversion, ranks)
    print_report(report)


def _make(
    command: ConvertCommand, parent: StoredModel, identity: str, conversion: Conversion, ranks: Workers
) -> dict[str, Any]:
    """Write the model and verify it; returns the report."""
    out = Path(command.out).expanduser()
    with ranks.together():
        require_transformers(command, parent, conversion)
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    ranks.from_first(lambda: require_space(out.parent, conversion.writer.num_bytes + _MARGIN))
    if command.check:
        check_files(parent, sources=conversion.sources, workers=ranks)
    ranks.from_first(lambda: check_head(parent))
    with shared_directory(ranks, durable_directory(out), DurableDirectory) as directory:
        report = _write(directory, command, parent, identity, conversion, ranks)
        ranks.from_first(lambda: _finish(directory, conversion, report))
    return report


def _finish(directory: DurableDirectory, conversion: Conversion, report: Mapping[str, Any]) -> None:
    directory.write(CONVERSION, encode_json(report))
    write_manifest(directory, expected_shapes(conversion.config, conversion.registry))


def print_report(report: Mapping[str, Any]) -> None:
    """Print the format and the reason for it, the table of both models, and how their logits compare."""
    notes().print(f"written as {report['format']}: {report['reason']}")
    parts = (report["parent"]["name"], report["parent"]), ("converted", report)
    rows = [[*model_row(title, part), "", ""] for title, part in parts]
    check = report["logits"]
    if check is not None:
        rows[1][-2:] = [f"{check['max_relative_difference']:.1g}", f"{check['tokens']:,}"]
        notes().print(f"logits compared with {check['against']}, relative to the largest")
    columns = [*MODEL_COLUMNS, "max logit difference", "tokens compared"]
    print_table("Conversion", columns, rows, left=2)


def _standing(command: ConvertCommand, conversion: Conversion, out: Path, identity: str) -> dict[str, Any]:
    """Return the report of what stands in `out`, where it is what would be written; else ValueError."""
    settings = conversion.settings
    report = standing_report(out, CONVERSION, version=REPORT_VERSION, parent=identity, settings=settings)
    lacking = {
        "check=true": command.check and not report.get("parent_checked", True),  # the first reports do not say it
        "verify=true": command.verify and not report["verify"],
    }
    require_proofs(out, "conversion", lacking)
    return report


def _write(
    directory: DurableDirectory,
    command: ConvertCommand,
    parent: StoredModel,
    identity: str,
    conversion: Conversion,
    ranks: Workers,
) -> dict[str, Any]:
    """Write the model and verify it; return the report. ValueError where a bit or a logit is off."""
    with progress_sink(transient=True) as progress:
        extraction = conversion.writer.write(directory, workers=ranks, progress=partial(progress, "writing"))
    logits = None
    if command.verify:
        notes().print("reading the tensors back, comparing logits")
        with ranks.together():
            child = open_unfinished(directory.root)
        verify_tensors(child, extraction, ranks)
        logits = ranks.from_first(lambda: _compare(command, parent, child, conversion))
    written = Submodel(config=conversion.config, registry=conversion.registry, pieces={})
    return {
        **describe(parent, identity, written, extraction, (), directory.records),
        **conversion.settings,
        "verify": command.verify,
        "parent_checked": command.check,
        "logits": logits,
        "format_version": REPORT_VERSION,
    }


def _compare(
    command: ConvertCommand, parent: StoredModel, child: StoredModel, conversion: Conversion
) -> dict[str, Any] | None:
    inherits = conversion.inherits
    check = check_inherited(parent, child) if inherits else check_logits(parent, child, command.rounding)
    return None if check is None else asdict(check)


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
