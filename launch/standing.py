"""What stands where a command would write: the very result, which is left as it is, or something else."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..moe.storage.checkpoint import MANIFEST, read_manifest, verify_files
from ..moe.stored import StoredModel, read_json
from ..moe.workers import Workers
from .console import notes
from .file_bytes import DEFAULT_FILE_BYTES, parse_file_bytes

_MEND = "remove it or give another out="


def check_place(out: Path, parent: StoredModel) -> None:
    """Raise ValueError where what is made of a model would lie inside it, or where nothing can be made."""
    if parent.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"out={out} lies inside the model that is given: give a place of its own")
    if os.path.lexists(out):
        return
    place = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    try:  # what the file system says of itself may be wrong, of /proc and of remote ones
        # By such a name a later command removes it, should this one be killed right here.
        Path(tempfile.mkdtemp(prefix=f".sigmoe-tmp-{out.name}.", suffix=f"-{os.getpid()}", dir=place)).rmdir()
    except OSError as error:
        raise ValueError(f"out={out} cannot be made in {place}: {error.strerror}: give another place") from error


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
    or of other `settings`, as the report says. Reports from before `file_bytes` was a key had its default.
    """
    refusal = ValueError(f"out={out} exists already and is another model: {_MEND}")
    if not (out / name).is_file() or not (out / MANIFEST).is_file():
        raise refusal
    verify_files(out, read_manifest(out), lambda done, total: None)
    report = read_json(out / name)
    if report.get("format_version") != version or report["parent"]["identity"] != parent:
        raise refusal
    other = _difference(settings, {"file_bytes": parse_file_bytes(DEFAULT_FILE_BYTES)} | report)
    if other:
        raise ValueError(f"out={out} exists already, made of this model with {other}: {_MEND}")
    return report


def require_proofs(out: Path, what: str, lacking: Mapping[str, bool]) -> None:
    """Raise ValueError for the first proof, named as its key and value, that is `lacking` from what stands in `out`."""
    for proof, missing in lacking.items():
        if missing:
            raise ValueError(f"out={out} holds this very {what}, made without {proof}: {_MEND}")


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any], path: str = "") -> str | None:
    """Return the first key whose value is not the wanted one, by its path, with the value found where it is short."""
    for key, value in wanted.items():
        there = found.get(key)
        if there == value:
            continue
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            return _difference(value, there, "" if key == "settings" else f"{path}{key}.")
        short = not isinstance(there, Mapping | list)
        return f"{path}{key}={json.dumps(there)}" if short else f"another value of {path}{key}"
    return None
