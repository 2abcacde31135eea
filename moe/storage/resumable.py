"""A directory that a killed writer leaves half done, and a later one finishes.

It grows as `files/` in the hidden sibling `.sigmoe-part-<name>`. Beside it lies for what it is made (`settings.json`)
and which files are whole and on the disk (`<rank>.jsonl`, a line each, fsynced after the file). A later writer with the
same settings keeps these; all else goes. When everything is there `files/` is renamed, as `durable_directory` does it:
under its name the directory is whole or missing.

Noted are the files that took long to write, those with `parts`, be it none; the others are written anew.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from .durable import (
    DurableDirectory,
    FileRecord,
    WriteError,
    make_directory,
    publish,
    remove_directory,
    remove_stale,
    require_replaceable,
    write_file,
)
from .hashing import write_errors
from .tensor_format import load_json

_FILES = "files"
_SETTINGS = "settings.json"


class ResumableDirectory(DurableDirectory):
    """A directory under construction, of which the files in `finished` are there already.

    Several processes may fill it, each with a `rank` of its own.
    """

    def __init__(self, root: Path, *, rank: int = 0) -> None:
        super().__init__(root)
        self._journal = root.parent / f"{rank}.jsonl"

    @property
    def finished_bytes(self) -> int:
        """Size of the files that were there already."""
        return sum(self.records[name].size for name in self.finished)

    def finish(self, relative: str, record: FileRecord, parts: dict[str, str] | None) -> None:
        """Take note of a file that is whole and on the disk; with `parts`, for later writers too."""
        super().finish(relative, record, parts)
        if parts is not None:
            _append(self._journal, _line(relative, record, parts))

    def resume(self) -> None:
        """Keep the files that are whole, delete all others. ValueError where a journal is damaged."""
        noted = _read_journals(self._journal.parent)
        whole = {name: note for name, note in noted.items() if _has_size(self.root / name, note[0][0])}
        with write_errors(self.root):
            for file in self.root.rglob("*"):
                if (file.is_symlink() or file.is_file()) and file.relative_to(self.root).as_posix() not in whole:
                    file.unlink()
        # One journal from now on: the others' last line may be torn, and nothing may be added behind that.
        lines = [_line(name, FileRecord(*record), parts) for name, (record, parts) in whole.items()]
        write_file(self._journal, b"".join(lines))
        with write_errors(self._journal.parent):
            for other in self._journal.parent.glob("*.jsonl"):
                if other != self._journal:
                    other.unlink()
        self.adopt(whole)
        self.finished = frozenset(whole)


@contextmanager
def resumable_directory(
    path: Path, settings: Mapping[str, Any], on_stale: Callable[[Path], None] = lambda part: None
) -> Iterator[ResumableDirectory]:
    """Build a directory that appears under `path`, complete and on the disk, when the block ends without an exception.

    What an earlier block with equal `settings` (plain JSON data) finished is in it; of other settings it is deleted,
    and `on_stale` hears of it. After an exception the finished files wait for the next block, but a ValueError that is
    no WriteError says that they are of no use. Raises ValueError where `path` exists, or another process is at it.
    """
    require_replaceable(path, False)
    make_directory(path.parent)
    remove_stale(path.parent)
    part = part_path(path)
    with _alone_in(part):
        wanted, file = json.dumps(settings, sort_keys=True).encode(), part / _SETTINGS
        if not file.is_file() or file.read_bytes() != wanted:
            if any(part.iterdir()):
                on_stale(part)
            _empty(part)
            write_file(file, wanted)
        make_directory(part / _FILES)
        directory = ResumableDirectory(part / _FILES)
        directory.resume()
        try:
            yield directory
        except ValueError as error:
            if not isinstance(error, WriteError):
                remove_directory(part)
            raise
        publish(directory.root, path)
        remove_directory(part)


def clear_part(path: Path) -> None:
    """Delete what a writer left that was killed when `path` had its name already, or that nobody will finish."""
    part = part_path(path)
    if part.exists():
        with _alone_in(part):
            remove_directory(part)
    remove_stale(path.parent)


def part_path(path: Path) -> Path:
    """Return the hidden sibling of `path` in which it grows."""
    return path.parent / f".sigmoe-part-{path.name}"


def _alone_in(part: Path) -> AbstractContextManager[None]:
    return locked(part, f"another process is writing {part}: wait for it, or give another out=")


@contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Make the folder and be alone in it; the kernel lets go of the lock when the process ends, however it ends.

    Raises ValueError, with the text `refusal`, where another process is in it.
    """
    make_directory(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(refusal) from error
        yield
    finally:
        os.close(descriptor)


def _empty(part: Path) -> None:
    """Delete what is in the folder, the settings first: without them nothing of it counts."""
    with write_errors(part):
        (part / _SETTINGS).unlink(missing_ok=True)
        for entry in part.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                remove_directory(entry)
            else:
                entry.unlink()


def _append(path: Path, line: bytes) -> None:
    with write_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _line(name: str, record: FileRecord, parts: Mapping[str, str]) -> bytes:
    return json.dumps({"file": name, "record": list(record), "parts": dict(parts)}).encode() + b"\n"


def _read_journals(folder: Path) -> dict[str, tuple[list[Any], dict[str, str]]]:
    """Return record and parts by file; a last line that a kill tore counts for nothing.

    Raises ValueError for a whole line that is none of ours: the disk, or somebody else, changed it.
    """
    found = {}
    for journal in sorted(folder.glob("*.jsonl")):
        *lines, _ = journal.read_bytes().split(b"\n")  # the last is empty or torn
        for number, line in enumerate(lines, 1):
            try:
                entry: Any = load_json(line)
                size, hash = entry["record"]
                found[str(entry["file"])] = [int(size), str(hash)], dict(entry["parts"])
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{journal}, line {number} is damaged: remove {folder} and begin anew") from error
    return found


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size
