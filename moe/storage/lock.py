"""One process at a time: a lock file that the kernel lets go of when its holder ends, however it ends.

A file and not its folder is locked: over a network file system a folder's lock does not reach the other hosts.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .hashing import write_errors

LOCK = ".sigmoe-lock"
_PAUSE = 0.2  # seconds between two tries
_UNKNOWN = frozenset((errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK))  # file systems without locks


@contextmanager
def held(folder: Path, *, patience: float, tell: Callable[[str], None]) -> Iterator[None]:
    """Be the only process that holds `folder`, which must be there; its lock file is deleted in the end.

    `tell` hears whom this process waits for, and where the file system knows no locks: then nothing is held. Raises
    ValueError that names the holder where there still is one after `patience` seconds.
    """
    path = folder / LOCK
    with write_errors(path):
        descriptor = _acquire(path, patience, tell)
    if descriptor is None:
        tell(f"the file system of {folder} has no locks: nothing keeps a second process from writing there")
        yield
        return
    try:
        with write_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, patience: float, tell: Callable[[str], None]) -> int | None:
    """Return the locked file; None where there are no locks."""
    deadline, told = time.monotonic() + patience, False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _lies_at(path, descriptor):  # else its holder deleted it since it was opened
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise ValueError(f"{path.parent} is in use by {holder}: wait for it or stop it") from None
            if not told:
                tell(f"{path.parent} is in use by {holder}: waiting up to {patience:.0f} s")
            told = True
            time.sleep(_PAUSE)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _UNKNOWN:
                path.unlink(missing_ok=True)
                return None
            raise
        os.close(descriptor)


def _lies_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
