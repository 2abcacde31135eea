"""What `sigmoe extract` is given, and what it checks before it writes and after."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..moe.data.dataset import Dataset, open_dataset
from ..moe.data.loader import heldout_batches
from ..moe.extract import (
    REPORT_VERSION,
    DomainCheck,
    Submodel,
    TransformersCheck,
    check_in_transformers,
    verify_domain,
)
from ..moe.hf.formats import choose_format
from ..moe.storage.checkpoint import load_yaml
from ..moe.stored import EXTRACTION, StoredModel
from .console import notes
from .file_bytes import DEFAULT_FILE_BYTES, parse_file_bytes
from .models import check_tokenizer
from .standing import require_proofs, standing_report

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOLERANCE = 1e-5  # of the largest logit, between transformers' arithmetic and ours
_COMPARED = 256  # positions of a sequence that both are given


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
    file_bytes: int | str = DEFAULT_FILE_BYTES
    threads: int | None = None

    def __post_init__(self) -> None:
        self.max_file_bytes  # noqa: B018 - it validates itself
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

    @property
    def max_file_bytes(self) -> int:
        """The most that a weight file holds."""
        return parse_file_bytes(self.file_bytes)

    def settings(self, submodel: Submodel) -> dict[str, Any]:
        """Return by what the same extraction is known again, apart from the parent, as plain JSON data."""
        asked = {"dtype": self.dtype, "format_asked": self.format, "file_bytes": self.max_file_bytes}
        return {"domains": list(submodel.registry.names), **asked}


def require_transformers(command: ExtractCommand, submodel: Submodel) -> None:
    """Raise ValueError where transformers could not read the result, or there would be no text to compare on."""
    choice = choose_format(submodel.config, submodel.registry)
    if choice.format is None or command.format == "sigmoe":
        reason = "format=sigmoe asks for sigmoe's format" if command.format == "sigmoe" else choice.reason
        raise ValueError(f"transformers=true, but transformers cannot read this submodel: {reason}")
    if not command.verify:
        raise ValueError("transformers=true compares on held-out text: give verify= above 0")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install 'sigmoe[hf]', or transformers=false")


def check_domain(
    command: ExtractCommand,
    parent: StoredModel,
    child: StoredModel,
    dataset: Dataset,
    name: str,
    progress: Callable[[int, int], None],
) -> DomainCheck:
    """Compare both models' logits on a domain's held-out text; ValueError where a bit differs."""
    check = verify_domain(
        parent, child, dataset, name, max_tokens=command.verify, rounding=command.rounding, progress=progress
    )
    if math.isinf(check.max_abs_difference):
        raise ValueError(f"{name}: the logits are not finite: {parent.path} holds NaN, or numbers too large")
    if check.max_abs_difference:
        raise ValueError(
            f"{name}: the submodel's logits differ from its parent's by {check.max_abs_difference:g}: this is a bug in "
            "sigmoe or a fault of the machine, nothing was kept"
        )
    return check


def open_in_transformers(child: StoredModel, dataset: Dataset, domain: str) -> TransformersCheck:
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


def report_of_the_same(command: ExtractCommand, out: Path, parent: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of what stands in `out`, where it is what would be written; else ValueError."""
    report = standing_report(out, EXTRACTION, version=REPORT_VERSION, parent=parent, settings=settings)
    lacking = {
        "check=true": command.check and not report["parent_checked"],
        f"verify={command.verify}": command.verify > report["verify"],
        "transformers=true": command.transformers and "transformers" not in report,
    }
    require_proofs(out, "extraction", lacking)
    return report


def open_heldout(command: ExtractCommand, parent: StoredModel) -> Dataset:
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
