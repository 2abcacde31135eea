"""Where a process is: by its threads' Python stacks, which a call that hangs in C leaves as they are."""

import faulthandler
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

_TORCH = str(Path(torch.__file__).parent)
# torch.distributed's functions, and what calls them; whoever uses it, DeepSpeed or Megatron, passes through here.
_COLLECTIVES = str(Path(torch.distributed.distributed_c10d.__file__))
_PACKAGE = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process is: in a collective operation or None, and the line of its call (`folder/file.py:number`)."""

    collective: str | None
    line: str


def find_place() -> Place:
    """Return where the main thread is; or where a thread of autograd is, if that one is in a collective."""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    assert main is not None
    python = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
    places = [_place(frames[main])] + [_place(frame) for ident, frame in frames.items() if ident not in python]
    return next((place for place in places if place.collective is not None), places[0])


def dump_stacks(path: Path | None) -> None:
    """Write the Python stacks of all threads, innermost call first; None: to this process's stderr."""
    with open(2 if path is None else path, "w", closefd=path is not None) as file:
        faulthandler.dump_traceback(file, all_threads=True)


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame, its caller, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(innermost: FrameType) -> Place:
    frames = list(outwards(innermost))
    # The outermost of them: all_gather_object ends in all_gather, and is what was called.
    calls = [number for number, frame in enumerate(frames) if frame.f_code.co_filename == _COLLECTIVES]
    collective, callers = None, frames
    if calls:
        collective = frames[calls[-1]].f_code.co_name
        outside = [frame for frame in frames[calls[-1] + 1 :] if not frame.f_code.co_filename.startswith(_TORCH)]
        callers = outside or frames  # a thread of autograd may have none
    line = _line(callers[0])
    ours = next(filter(_is_ours, callers), callers[0])
    return Place(collective=collective, line=line if ours is callers[0] else f"{line}, called from {_line(ours)}")


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    # An environment may lie in the package's folder.
    return file.startswith(_PACKAGE) and "site-packages" not in file.removeprefix(_PACKAGE)


def _line(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    return f"{file.parent.name}/{file.name}:{frame.f_lineno}"
