"""Directories and files that appear whole or not at all: hashed while written, fsynced, then renamed into place.

`durable_directory(path)` writes into a hidden sibling `.sigmoe-tmp-<name>-<pid>`. Only when every file and every
folder in it is on the disk is it renamed to `path`, and then the parent is fsynced. So a kill at any moment leaves
either the old state or the new one under `path`, and at worst a hidden leftover, which the next writer removes
(`remove_stale`). The prefix is ours alone: the parent may be the user's own folder.

Replacing a directory takes two renames, since POSIX cannot rename onto a directory that has files in it:

    path -> .sigmoe-old-<name>-<pid>, .sigmoe-tmp-<name>-<pid> -> path, (fsync) .sigmoe-old-<name>-<pid> is deleted

A kill between the two leaves `path` missing and the old directory whole under its hidden name; `restore_replaced`
puts it back. A directory that is to be deleted is renamed to `.sigmoe-tmp-...` first, so that half of it never
stands under a name that counts.
"""

import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from .hashing import BytesLike, FileRecord, HashingWriter, NoRoomError, WriteError, write_errors
from .lock import LOCK

__all__ = [
    "DurableDirectory",
    "FileRecord",
    "NoRoomError",
    "WriteError",
    "durable_directory",
    "is_leftover",
    "make_directory",
    "publish",
    "remove_directory",
    "remove_stale",
    "require_replaceable",
    "require_space",
    "restore_replaced",
    "write_file",
]

_HIDDEN = re.compile(r"\.sigmoe-(tmp|old)-(?P<name>.+)-(?P<pid>[0-9]+)", re.DOTALL)
_STARTED = time.time()


class DurableDirectory:
    """A directory under construction; `records` maps each finished file's relative name to its size and hash.

    `parts` has the hashes of the parts of a file, where its writer took them; the files in `finished` were there when
    the directory was opened.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records: dict[str, FileRecord] = {}
        self.parts: dict[str, dict[str, str]] = {}
        self.finished: frozenset[str] = frozenset()

    def write(self, relative: str, data: BytesLike | Iterable[BytesLike]) -> FileRecord:
        """Write one file at once, or from pieces. ValueError if the name leaves the directory or is taken."""
        with self.open(relative) as writer:
            _write_pieces(writer, data)
        return self.records[relative]

    @contextmanager
    def open(self, relative: str) -> Iterator[HashingWriter]:
        """A writer for one file; the file is fsynced and enters `records` when the block ends without an exception."""
        path = self._place(relative)
        with HashingWriter(path) as writer:
            yield writer
        self.finish(relative, writer.record, writer.parts)

    def finish(self, relative: str, record: FileRecord, parts: dict[str, str] | None) -> None:
        """Take note of a file that is whole and on the disk."""
        self._note(relative, record, parts)

    def notes(self) -> dict[str, Any]:
        """Return the files that are whole, with their parts, as plain JSON data."""
        return {name: [list(record), self.parts.get(name)] for name, record in self.records.items()}

    def adopt(self, notes: Mapping[str, Any]) -> None:
        """Take over what another process's `notes` say of finished files."""
        for name, (record, parts) in notes.items():
            self._note(name, FileRecord(*record), parts)

    def _note(self, relative: str, record: FileRecord, parts: dict[str, str] | None) -> None:
        self.records[relative] = record
        if parts is not None:
            self.parts[relative] = parts

    def _place(self, relative: str) -> Path:
        """Where `relative` goes, its folders made; names that leave the directory and links as folders are refused."""
        parts = PurePosixPath(relative).parts
        if not parts or ".." in parts or "\0" in relative or "/".join(parts) != relative or relative.startswith("/"):
            raise ValueError(f"{relative!r} is no plain relative file name: it must stay inside {self.root}")
        if relative in self.records:
            raise ValueError(f"{relative!r} was written already")
        folder = self.root
        for part in parts[:-1]:
            folder = folder / part
            with write_errors(folder):
                with suppress(FileExistsError):
                    folder.mkdir()
                if not stat.S_ISDIR(folder.lstat().st_mode):
                    raise ValueError(f"{folder} is no folder, so {relative!r} cannot be written")
        return folder / parts[-1]


@contextmanager
def durable_directory(path: Path, *, replace: bool = False) -> Iterator[DurableDirectory]:
    """Build a directory that appears under `path`, complete and on the disk, when the block ends without an exception.

    After an exception nothing of it stays. ValueError if `path` exists (unless `replace`), is a link or is no
    directory; `WriteError` (one line) if the disk refuses.
    """
    require_replaceable(path, replace)
    make_directory(path.parent)
    remove_stale(path.parent)
    temporary = _hidden("tmp", path)
    with write_errors(temporary):
        _remove_tree(temporary)
        temporary.mkdir()
    try:
        yield DurableDirectory(temporary)
        publish(temporary, path, replace=replace)
    finally:
        # After success the name is gone; after a failure this keeps the disk as it was.
        with suppress(OSError):
            _remove_tree(temporary)


def publish(root: Path, path: Path, *, replace: bool = False) -> None:
    """Rename the finished directory `root` to `path` beside it, all on the disk; errors as `durable_directory` has."""
    with write_errors(path):
        for folder, _, _ in os.walk(root, topdown=False):
            _sync_folder(Path(folder))
        require_replaceable(path, replace)
        _rename_into_place(root, path)


def write_file(path: Path, data: BytesLike | Iterable[BytesLike]) -> FileRecord:
    """Write a file so that `path` holds either its old bytes or all the new ones. `WriteError` if the disk refuses."""
    if path.is_symlink() or path.is_dir():
        raise ValueError(f"{path} is a link or a directory, not a file to write")
    temporary = _hidden("tmp", path)
    with write_errors(path):
        _remove_tree(temporary)
        try:
            with HashingWriter(temporary) as writer:
                _write_pieces(writer, data)
            os.replace(temporary, path)  # noqa: PTH105 - the fault tests count the calls of os
            _sync_folder(path.parent)
        finally:
            _remove_tree(temporary)
    return writer.record


def make_directory(path: Path) -> None:
    """Make `path` and its parents, each entry fsynced; nothing if it is there."""
    with write_errors(path):
        if path.is_dir():
            return
        make_directory(path.parent)
        with suppress(FileExistsError):
            path.mkdir()
        if not path.is_dir():
            raise ValueError(f"{path} is no directory: choose another path or remove the file")
        _sync_folder(path.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory so that no kill leaves half of it under its name."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link, so it is not deleted")
    trash = _hidden("tmp", path)
    with write_errors(path):
        _remove_tree(trash)
        os.rename(path, trash)  # noqa: PTH104
        _sync_folder(path.parent)
        _remove_tree(trash)


def remove_stale(parent: Path) -> None:
    """Delete what dead processes of this host left in `parent`, after putting back what one of them had moved aside."""
    restore_replaced(parent)
    with write_errors(parent):
        for entry, _, kind in _leftovers(parent):
            if kind == "tmp":
                _remove_tree(entry)


def restore_replaced(parent: Path) -> None:
    """Finish the replacements that a kill cut in two: the old directory comes back if no new one took its name."""
    with write_errors(parent):
        for entry, name, kind in _leftovers(parent):
            if kind != "old":
                continue
            if os.path.lexists(parent / name):
                remove_directory(entry)
            else:
                os.rename(entry, parent / name)  # noqa: PTH104
                _sync_folder(parent)


def require_space(parent: Path, num_bytes: int) -> None:
    """`NoRoomError` in one line unless the file system of `parent` (or its nearest existing ancestor) has room."""
    place = parent.absolute()
    while not place.exists():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise WriteError(f"{parent}: the free space cannot be read ({error.strerror})") from error
    if free < num_bytes:
        needed = f"{num_bytes / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free"
        raise NoRoomError(f"{parent}: not enough disk space: {needed}; free some or choose another directory")


def is_leftover(name: str) -> bool:
    """Whether an entry of this name is what a killed process left, or a living one's work in progress."""
    return name == LOCK or _HIDDEN.fullmatch(name) is not None


def _write_pieces(writer: HashingWriter, data: BytesLike | Iterable[BytesLike]) -> None:
    for piece in (data,) if isinstance(data, bytes | bytearray | memoryview) else data:
        writer.write(piece)


def _hidden(kind: str, path: Path) -> Path:
    return path.parent / f".sigmoe-{kind}-{path.name}-{os.getpid()}"


def _leftovers(parent: Path) -> list[tuple[Path, str, str]]:
    """(path, the name it stands for, "tmp" or "old") of each hidden entry in `parent` whose process is dead."""
    if not parent.is_dir():
        return []
    found = []
    for entry in sorted(parent.iterdir()):
        match = _HIDDEN.fullmatch(entry.name)
        if match and not _is_alive(int(match["pid"]), entry):
            found.append((entry, match["name"], match[1]))
    return found


def _is_alive(pid: int, entry: Path) -> bool:
    if pid == os.getpid():
        # In a container every restart may have the same pid: what is older than this process is an earlier one's.
        return entry.lstat().st_ctime >= _STARTED
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def require_replaceable(path: Path, replace: bool) -> None:
    """Raise ValueError where no directory can be renamed to `path`: it exists, unless `replace`, or is a link."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link; write to the directory itself")
    if not path.exists():
        return
    if not replace:
        raise ValueError(f"{path} exists already: remove it or choose another path")
    if not path.is_dir():
        raise ValueError(f"{path} is a file, so no directory can be written there")


def _rename_into_place(temporary: Path, path: Path) -> None:
    old = _hidden("old", path)
    replaces = path.exists()
    if replaces:
        os.rename(path, old)  # noqa: PTH104
    try:
        os.rename(temporary, path)  # noqa: PTH104
    except OSError:
        if replaces:
            os.rename(old, path)  # noqa: PTH104
        raise
    _sync_folder(path.parent)
    if replaces:
        remove_directory(old)


def _remove_tree(path: Path) -> None:
    """Delete a file, a link (never what it points at) or a folder; nothing if it is gone."""
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if is_folder:
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems have no fsync for directories; there the rename itself is the commit.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
