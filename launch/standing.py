"""What stands where a command would write: the very result, which is left as it is, or something else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..moe.storage.checkpoint import MANIFEST, read_manifest, verify_files
from ..moe.stored import StoredModel, read_json


def check_place(out: Path, parent: StoredModel) -> None:
    """Raise ValueError where what is made of a model would lie inside it."""
    if parent.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"out={out} lies inside the model that is given: give a place of its own")


def standing_report(
    out: Path, name: str, *, version: int, parent: str | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report `name` of the model in `out`, every file of it hashed; its `parent` goes by this identity.

    ValueError where something else stands there: no model with such a report, or one of another format version, parent
    or of other `settings`, as the report says. A `parent` of None cannot be told again.
    """
    advice = "remove it or give another out="
    if parent is None:
        raise ValueError(f"out={out} exists already, and a parent without {MANIFEST} cannot be told again: {advice}")
    refusal = ValueError(f"out={out} exists already and is another model: {advice}")
    if not (out / name).is_file() or not (out / MANIFEST).is_file():
        raise refusal
    verify_files(out, read_manifest(out), lambda done, total: None)
    report = read_json(out / name)
    if report.get("format_version") != version or report["parent"]["identity"] != parent:
        raise refusal
    if any(report[key] != value for key, value in settings.items()):
        raise refusal
    return report
