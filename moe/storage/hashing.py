"""One file written once: SHA-256 and size taken while the bytes go by, fsynced when closed; and the hash read back."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

BytesLike = bytes | bytearray | memoryview

# Pieces of this many bytes are hashed on a second thread while the first hands them to the kernel.
PIECE_BYTES = 4 << 20
# Handed to the kernel at a time: 8 MiB in one call take 3 s a GB of its CPU time where 1 MiB takes 0.3 (Linux 6, ext4).
_CALL_BYTES = 1 << 20
# Smaller writes are gathered, so that a writer fed with single tokens costs no system call a token.
_GATHER_BYTES = 1 << 20
# The disk is given so much at a time while the rest is still being hashed, instead of all of it at the end.
_FLUSH_BYTES = 128 << 20
# What may be over while the program still runs.
_PASSING = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


class FileRecord(NamedTuple):
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


class WriteError(ValueError):
    """The disk refused (full, quota, rights, input/output error). One line; what stood before still stands."""


class NoRoomError(WriteError):
    """No room on the disk or in memory, or an input/output error: the next write may pass."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a `WriteError` in one line that names the file."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else path
        kind = NoRoomError if error.errno in _PASSING else WriteError
        raise kind(f"{name}: writing failed: {error.strerror or error}") from error


class HashingWriter:
    """Writes a new file (ValueError if it exists); `record` holds size and hash once the block has ended well.

    Raises `WriteError` if the disk refuses. After an exception in the block the file is closed and has no record.
    `parts` is for the writer's caller: the SHA-256 of parts of the file, by name (None: a file of no known parts).
    """

    record: FileRecord

    def __init__(self, path: Path) -> None:
        self.parts: dict[str, str] | None = None
        self._path = path
        self._hash = hashlib.sha256()
        self._size = 0
        self._gathered = bytearray()
        self._pool: ThreadPoolExecutor | None = None
        self._descriptor = -1
        self._unflushed = 0
        self._flushing: Future[None] | None = None

    def __enter__(self) -> Self:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with write_errors(self._path):
                self._descriptor = os.open(self._path, flags, 0o666)
        except WriteError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise ValueError(f"{self._path} exists already") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                with write_errors(self._path):
                    if self._flushing is not None:
                        self._flushing.result()  # an error is told once, so the fsync may not see it
                    os.fsync(self._descriptor)
                self.record = FileRecord(self._size, self._hash.hexdigest())
        finally:
            if self._pool is not None:
                self._pool.shutdown()
            os.close(self._descriptor)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size + len(self._gathered)

    def write(self, data: BytesLike) -> None:
        """Append bytes; any C-contiguous memoryview will do."""
        view = memoryview(data)
        if view.nbytes == 0:
            return
        if view.nbytes < _GATHER_BYTES:
            self._gathered += view.cast("B")
            if len(self._gathered) >= _GATHER_BYTES:
                self._flush()
            return
        self._flush()
        self._emit(view.cast("B"))

    def _flush(self) -> None:
        gathered, self._gathered = self._gathered, bytearray()
        if gathered:
            self._emit(memoryview(gathered))

    def _emit(self, view: memoryview) -> None:
        if self._pool is None and len(view) >= _GATHER_BYTES:
            self._pool = ThreadPoolExecutor(2, thread_name_prefix="sha256")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            if self._pool is None:
                self._hash.update(piece)
                self._write_all(piece)
            else:
                hashed = self._pool.submit(self._hash.update, piece)
                self._write_all(piece)
                hashed.result()
                self._flush_behind(self._pool, len(piece))
            self._size += len(piece)

    def _flush_behind(self, pool: ThreadPoolExecutor, count: int) -> None:
        """Have what was written go to the disk on another thread, now and then."""
        self._unflushed += count
        if self._unflushed < _FLUSH_BYTES or (self._flushing is not None and not self._flushing.done()):
            return
        with write_errors(self._path):
            if self._flushing is not None:
                self._flushing.result()
        self._flushing, self._unflushed = pool.submit(os.fdatasync, self._descriptor), 0

    def _write_all(self, view: memoryview) -> None:
        with write_errors(self._path):
            while view:
                view = view[os.write(self._descriptor, view[:_CALL_BYTES]) :]


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> FileRecord:
    """Size and SHA-256 of a file; `progress` gets the bytes of each piece. OSError if it is unreadable or a link."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(PIECE_BYTES))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            if progress is not None:
                progress(count)
    return FileRecord(size, digest.hexdigest())
