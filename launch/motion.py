"""Whether a process moves on: by Python's instructions, by the CPU that it uses, by what it reads and writes."""

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

from .stacks import outwards

# Of one core: who waits, asleep or in gloo, uses next to none; progress bars and the watchdog a little.
_BUSY_SHARE = 0.1


class Motion:
    """Compares a process with what it was at the look before.

    Every thread counts, those of pools and of autograd's C++ too, but for daemons that do not save: they do chores, as
    the watchdog does, and nobody waits for them.
    """

    def __init__(self) -> None:
        self._stacks, self._used, self._bytes = _stacks(), time.process_time(), _disk_bytes()

    def look(self, seconds: float) -> bool:
        """Return whether the process has moved since the look before, about `seconds` ago."""
        stacks, used, moved_bytes = _stacks(), time.process_time(), _disk_bytes()
        # CUDA's driver spins where the host waits for the GPU: there a busy core says nothing.
        busy = used - self._used >= _BUSY_SHARE * seconds and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        moved = busy or stacks != self._stacks or moved_bytes != self._bytes
        self._stacks, self._used, self._bytes = stacks, used, moved_bytes
        return moved


def _stacks() -> set[tuple[int, ...]]:
    """Return what changes as soon as a thread that counts moves on by an instruction of Python."""
    chores = {
        thread.ident
        for thread in threading.enumerate()
        if thread.daemon and not (thread.name.startswith("save") or isinstance(thread, threading._DummyThread))
    }
    return {
        (ident, *(number for frame in outwards(innermost) for number in (id(frame.f_code), frame.f_lasti)))
        for ident, innermost in sys._current_frames().items()
        if ident not in chores
    }


def _disk_bytes() -> tuple[str, ...]:
    """Return the bytes read from and written to disks, where the system tells; not those of sockets."""
    with suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        return tuple(line for line in lines if line.startswith(("read_bytes", "write_bytes")))
    return ()
