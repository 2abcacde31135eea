"""`sigmoe convert`: writes a model in another format, or a sparse model that begins as a dense one; proves it equal."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..moe.canonical import expected_shapes
from ..moe.extract import Submodel, describe, verify_tensors
from ..moe.identity import model_identity
from ..moe.parsing import from_mapping
from ..moe.storage.checkpoint import encode_json, write_manifest
from ..moe.storage.durable import DurableDirectory, durable_directory, require_space
from ..moe.stored import CONVERSION, StoredModel, open_unfinished
from .console import notes, print_table, progress_sink
from .convert_checks import LogitCheck, check_head, check_inherited, check_logits, require_transformers
from .convert_plan import Conversion, ConvertCommand, plan_conversion
from .main import main
from .models import check_files, open_given_model
from .standing import check_place, standing_report

REPORT_VERSION = 1
_MARGIN = 64 << 20  # bytes of what is written beside the weights, tokenizers above all


def run(config: Mapping[str, object]) -> None:
    """Convert as `config` says. Raises ValueError for a user's mistake, with nothing written."""
    command = from_mapping(ConvertCommand, config)
    parent = open_given_model(command.given)
    conversion = plan_conversion(command, parent)
    out = Path(command.out).expanduser()
    check_place(out, parent)
    identity = model_identity(parent)
    if out.exists():
        report = _standing(command, conversion, out, identity)
        notes().print(f"{out} holds this very conversion already")
        print_report(report)
        return
    require_transformers(command, parent, conversion)
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    require_space(out.parent, conversion.num_bytes + _MARGIN)
    if command.check:
        check_files(parent, sources=conversion.sources)
    check_head(parent)
    with durable_directory(out) as directory:
        report = _write(directory, command, parent, conversion)
        report["format_version"], report["parent"]["identity"] = REPORT_VERSION, identity
        directory.write(CONVERSION, encode_json(report))
        write_manifest(directory, expected_shapes(conversion.config, conversion.registry))
    print_report(report)


def print_report(report: Mapping[str, Any]) -> None:
    """Print the format and the reason for it, the table of both models, and how their logits compare."""
    notes().print(f"written as {report['format']}: {report['reason']}")
    rows = [_row(report["parent"]["name"], report["parent"]), _row("converted", report)]
    check = report["logits"]
    if check is not None:
        rows[1][-2:] = [f"{check['max_relative_difference']:.1g}", f"{check['tokens']:,}"]
        notes().print(f"logits compared with {check['against']}, relative to the largest")
    columns = ["model", "format", "MB", "parameters", "active a token", "max logit difference", "tokens compared"]
    print_table("Conversion", columns, rows, left=2)


def _row(title: str, part: Mapping[str, Any]) -> list[str]:
    count = part["parameters"]
    size = f"{part['bytes']['tensors'] / 1e6:,.1f}"
    return [title, part["format"], size, f"{count['total']:,}", f"{count['active']:,}", "", ""]


def _standing(command: ConvertCommand, conversion: Conversion, out: Path, identity: str) -> dict[str, Any]:
    """Return the report of what stands in `out`, where it is what would be written; else ValueError."""
    settings = conversion.settings
    report = standing_report(out, CONVERSION, version=REPORT_VERSION, parent=identity, settings=settings)
    if command.verify and not report["verify"]:
        raise ValueError(
            f"out={out} holds this very conversion, made without verify=true: remove it or give another out="
        )
    return report


def _write(
    directory: DurableDirectory, command: ConvertCommand, parent: StoredModel, conversion: Conversion
) -> dict[str, Any]:
    """Write the model and verify it; return the report. ValueError where a bit or a logit is off."""
    with progress_sink(transient=True) as progress:
        extraction = conversion.write(directory, lambda done, total: progress("writing", done, total))
    child, logits = open_unfinished(directory.root), None
    if command.verify:
        notes().print("reading the tensors back, comparing logits")
        verify_tensors(child, extraction)
        logits = _compare(command, parent, child, conversion)
    written = Submodel(config=conversion.config, registry=conversion.registry, pieces={})
    return {
        **describe(parent, written, extraction, (), directory.records),
        **conversion.settings,
        "reason": conversion.reason,
        "verify": command.verify,
        "logits": None if logits is None else asdict(logits),
    }


def _compare(
    command: ConvertCommand, parent: StoredModel, child: StoredModel, conversion: Conversion
) -> LogitCheck | None:
    if conversion.inherits:
        return check_inherited(parent, child)
    return check_logits(parent, child, command.rounding)


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
