"""What stands where a command would write: the very result, which is left as it is, or something else."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..moe.storage.checkpoint import MANIFEST, read_manifest, verify_files
from ..moe.stored import StoredModel, read_json
from ..moe.workers import Workers
from .console import notes


def check_place(out: Path, parent: StoredModel) -> None:
    """Raise ValueError where what is made of a model would lie inside it."""
    if parent.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"out={out} lies inside the model that is given: give a place of its own")


def already_there(out: Path, what: str, read: Callable[[], dict[str, Any]], ranks: Workers) -> dict[str, Any] | None:
    """Return the report of what stands in `out`, as `read` has it, and say that it does; None where nothing stands.

    `read` raises ValueError for anything but what would be written.
    """
    if not ranks.from_first(out.exists):
        return None
    report = ranks.from_first(read)
    notes().print(f"{out} holds this very {what} already")
    return report


def standing_report(out: Path, name: str, *, version: int, parent: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report `name` of the model in `out`, every file of it hashed; its `parent` goes by this identity.

    ValueError where something else stands there: no model with such a report, or one of another format version, parent
    or of other `settings`, as the report says.
    """
    refusal = ValueError(f"out={out} exists already and is another model: remove it or give another out=")
    if not (out / name).is_file() or not (out / MANIFEST).is_file():
        raise refusal
    verify_files(out, read_manifest(out), lambda done, total: None)
    report = read_json(out / name)
    if report.get("format_version") != version or report["parent"]["identity"] != parent:
        raise refusal
    if any(report.get(key) != value for key, value in settings.items()):
        raise refusal
    return report
