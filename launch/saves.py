"""The saves of a session: in mid-run they go on beside training, one at a time; a full disk costs that save alone."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from contextlib import contextmanager
from pathlib import Path

from ..moe.storage.checkpoint import CheckpointContent
from ..moe.storage.durable import NoRoomError
from ..parallel.checkpointer import Checkpointer
from .lost_peer import plain_words

# A wait that the user hears of.
_NOTED_SECONDS = 0.1


class Saves:
    """Saves with `checkpointer`, in the background or not, and tells `note` what becomes of it.

    A run that ends badly waits `patience` seconds, at the most, for the save that is under way.

    All ranks call all of it but `look`, in the same order. `saved_step` is the newest that is known to be saved.
    """

    def __init__(
        self, checkpointer: Checkpointer, note: Callable[[str], None], *, background: bool, patience: float
    ) -> None:
        self.checkpointer, self.note, self.background, self.patience = checkpointer, note, background, patience
        self.saved_step: int | None = None
        self._pending: tuple[int, Future[Path]] | None = None
        self._told: Future[Path] | None = None  # what became of it was told, though it is not settled

    def begin(self, step: int, content: Callable[[], CheckpointContent]) -> None:
        """Save in mid-run, where a full disk is no reason to stop: the checkpoint before still stands."""
        self.wait()
        self.note(f"saving step {step}")
        try:
            if self.background:
                self._pending = step, self.checkpointer.begin_save(step, content())
            else:
                self.checkpointer.save(step, content())
                self.saved_step = step
        except NoRoomError as error:
            self._tell(step, error)

    def finish(self, step: int, content: Callable[[], CheckpointContent]) -> None:
        """Have `step` saved when this returns; raises WriteError where the disk refuses."""
        self.wait()
        if self.saved_step != step:
            self.note(f"saving step {step}")
            self.checkpointer.save(step, content())
            self.saved_step = step

    def wait(self) -> None:
        """End the save that is under way, if there is one. Raises what ended it, but for a full disk."""
        if self._pending is None:
            return
        (step, future), begin = self._pending, time.perf_counter()
        future.exception()
        seconds = time.perf_counter() - begin
        if seconds > _NOTED_SECONDS:
            self.note(f"waited {seconds:.1f} s for the save of step {step}")
        self._settle()

    def look(self) -> None:
        """Tell of the save that was under way, if it has ended.

        It may have on some ranks and not yet on others: what would stop the run is left to `wait`, so that it stops all
        at the same step.
        """
        if self._pending is None or not self._pending[1].done():
            return
        step, future = self._pending
        error = future.exception()
        if error is None or isinstance(error, NoRoomError):
            self._settle()
        elif self._told is not future:
            self._told = future
            self.note(f"step {step} is not saved: {_line(error)}")

    @contextmanager
    def joined(self) -> Iterator[None]:
        """After an exception in the block, end the save that is under way, and tell if it failed."""
        try:
            yield
        except BaseException:
            if self._pending is not None:
                (step, future), self._pending = self._pending, None
                try:
                    error = future.exception(self.patience)
                except StillRunning:
                    self.note(f"step {step} is not saved: it is given up after {self.patience:.0f} s")
                else:
                    if error is not None and self._told is not future:
                        self.note(f"step {step} is not saved: {_line(error)}")
            raise

    def _settle(self) -> None:
        assert self._pending is not None
        (step, future), self._pending = self._pending, None
        try:
            future.result()
            self.saved_step = step
        except NoRoomError as error:
            self._tell(step, error)

    def _tell(self, step: int, error: NoRoomError) -> None:
        self.note(f"step {step} is not saved, training goes on: {error}")


def _line(error: BaseException) -> str:
    """Return what went wrong, which another library may tell in several lines."""
    return plain_words(error) or type(error).__name__
