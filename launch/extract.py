"""`sigmoe extract`: cuts domains out of a model, exactly, and proves it before the submodel's name appears."""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..moe.data.dataset import Dataset, open_dataset
from ..moe.data.loader import heldout_batches
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
from ..moe.hf.compare import TransformersCheck, check_in_transformers
from ..moe.hf.formats import choose_format
from ..moe.parsing import from_mapping
from ..moe.storage.checkpoint import MANIFEST, encode_json, load_yaml, read_manifest, verify_files, write_manifest
from ..moe.storage.durable import DurableDirectory, durable_directory, require_space
from ..moe.stored import EXTRACTION, StoredModel, open_unfinished, read_json
from .console import notes, print_table, progress_sink
from .main import main
from .models import check_tokenizer, open_given_model

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WEIGHTS = ".safetensors"
_TOLERANCE = 1e-5  # of the largest logit, between transformers' arithmetic and ours
_COMPARED = 256  # positions of a sequence that both are given
_MARGIN = 4 << 20  # bytes of what is written beside the weights


@dataclass(frozen=True, kw_only=True)
class ExtractCommand:
    """The keys of `sigmoe extract`."""

    checkpoint: str
    domain: str | tuple[str, ...]
    out: str
    format: Literal["auto", "sigmoe"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    verify: int = 100_000  # held-out tokens a domain
    dataset: str | None = None
    check: bool = True
    transformers: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.verify < 0 or (self.threads is not None and self.threads < 1):
            raise ValueError(f"verify must be at least 0 and threads at least 1, got {self.verify} and {self.threads}")

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains' names."""
        return (self.domain,) if isinstance(self.domain, str) else self.domain

    @property
    def rounding(self) -> torch.dtype | None:
        """What parameters are rounded to."""
        return None if self.dtype is None else _DTYPES[self.dtype]


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
        report = _report_of_the_same(command, out, identity(parent), settings)
        notes().print(f"{out} holds this very extraction already")
        return print_report(report)
    dataset = _dataset(command, parent) if command.verify else None
    if command.transformers:
        _require_transformers(command, submodel)
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    require_space(out.parent, planned_bytes(parent, submodel, command.rounding) + _MARGIN)
    if command.check:
        _check_parent(parent, submodel)
    with durable_directory(out) as directory:
        extraction = _write(directory, command, parent, submodel)
        checks = _verify(directory, command, parent, submodel, extraction, dataset)
        report = describe(parent, submodel, extraction, checks, directory.records) | settings
        if command.transformers and dataset is not None:
            child, domain = open_unfinished(directory.root), submodel.registry.names[0]
            report["transformers"] = asdict(_open_in_transformers(child, dataset, domain))
        directory.write(EXTRACTION, encode_json(report))
        write_manifest(directory, submodel.pieces)
    print_report(report)
    return None


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


def _require_transformers(command: ExtractCommand, submodel: Submodel) -> None:
    """Raise ValueError where transformers could not read the result, or there would be no text to compare on."""
    choice = choose_format(submodel.config, submodel.registry)
    if choice.format is None or command.format == "sigmoe":
        reason = "format=sigmoe asks for sigmoe's format" if command.format == "sigmoe" else choice.reason
        raise ValueError(f"transformers=true, but transformers cannot read this submodel: {reason}")
    if not command.verify:
        raise ValueError("transformers=true compares on held-out text: give verify= above 0")


def _open_in_transformers(child: StoredModel, dataset: Dataset, domain: str) -> TransformersCheck:
    """Compare what transformers makes of the submodel on held-out text; ValueError where it is another model."""
    notes().print("opening the submodel in transformers")
    length = min(child.sequence_length or _COMPARED, _COMPARED)
    batch = next(heldout_batches(dataset, domain, batch_size=8, sequence_length=length))
    special = {"end_of_text": dataset.end_of_text, "padding": dataset.padding}
    check = check_in_transformers(child, batch.token_BS, new_tokens=32, **special)
    if check.max_relative_difference > _TOLERANCE:
        raise ValueError(
            f"logits in transformers {check.version} differ by {check.max_relative_difference:g} of the largest, above "
            f"{_TOLERANCE:g}: nothing was kept; transformers=false leaves the comparison out"
        )
    return check


def _report_of_the_same(
    command: ExtractCommand, out: Path, parent: str | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report of what stands in `out`, where it is what would be written; else ValueError."""
    refusal = ValueError(f"out={out} exists already and is another model: remove it or give another out=")
    if not (out / EXTRACTION).is_file() or not (out / MANIFEST).is_file() or parent is None:
        raise refusal
    verify_files(out, read_manifest(out), lambda done, total: None)
    report = read_json(out / EXTRACTION)
    if report["parent"]["identity"] != parent or any(report[key] != value for key, value in settings.items()):
        raise refusal
    compared = min((check["tokens"] for check in report["checks"]), default=0)
    if (command.verify and not compared) or (command.transformers and "transformers" not in report):
        wanted = "transformers=true" if compared else "verify="
        raise ValueError(f"out={out} holds this very extraction, made without {wanted}: remove it or give another out=")
    return report


def _dataset(command: ExtractCommand, parent: StoredModel) -> Dataset:
    """Open the dataset to verify with: the one given, or the one that the parent's run was trained on."""
    path = command.dataset
    run_config = parent.path.resolve().parent.parent / "config.yaml"
    if path is None and run_config.is_file():
        recorded = load_yaml(run_config)
        path = recorded.get("dataset") if isinstance(recorded, Mapping) else None
    if not isinstance(path, str):
        raise ValueError("missing key dataset: give the held-out text to verify with, dataset=DIR (or verify=0)")
    dataset = open_dataset(Path(path).expanduser())
    check_tokenizer(command.checkpoint, parent, dataset)
    for name in command.domains:
        tokens = dataset.domain(name).heldout.num_tokens
        if tokens < command.verify:
            notes().print(f"{name} has {tokens:,} held-out tokens, fewer than verify={command.verify:,}: all are taken")
    return dataset


def _check_parent(parent: StoredModel, submodel: Submodel) -> None:
    """Hash the parent's files that will be read; a damaged one must not be cut up unseen."""
    if not (parent.path / MANIFEST).is_file():
        notes().print(f"{parent.path} has no {MANIFEST}: its files are taken as they are")
        return
    manifest = read_manifest(parent.path)
    weights = {parent.tensors.file(piece.source) for piece in submodel.pieces.values()}
    # Of the small files config and registry decide what is cut; the optimizer's state plays no part.
    small = {name for name in manifest["files"] if not name.startswith("optimizer/") and Path(name).suffix != _WEIGHTS}
    with progress_sink(transient=True) as progress:
        verify_files(
            parent.path,
            manifest,
            lambda done, total: progress("checking the parent", done, total),
            only={str(file.relative_to(parent.path)) for file in weights} | small,
        )


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
