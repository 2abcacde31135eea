"""The checkpoints of a run: `step-00001000` directories, and `latest` that names the newest complete one."""

import re
from collections.abc import Callable
from pathlib import Path

from ..moe.storage.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointContent,
    checkpoint_bytes,
    open_checkpoint,
    write_checkpoint,
)
from ..moe.storage.durable import make_directory, remove_directory, remove_stale, require_space, write_file

_STEP = re.compile(r"step-(\d{8,})")


class Checkpointer:
    """Saves and finds checkpoints in `directory`; keeps the newest `keep` (None: all)."""

    def __init__(self, directory: Path, *, keep: int | None) -> None:
        self.directory, self.keep = directory, keep

    def save(self, step: int, content: CheckpointContent) -> Path:
        """Write a checkpoint, then move `latest`, then delete what is beyond `keep`. Returns its directory.

        A directory of the same step is replaced: it was refused, or this run went back behind it.
        Raises WriteError where the disk refuses; the checkpoints before still stand.
        """
        path = self.path(step)
        make_directory(self.directory)
        remove_stale(self.directory)  # before the space is measured: a killed save may have left as much again
        require_space(self.directory, checkpoint_bytes(content))
        write_checkpoint(path, content, replace=path.exists())
        write_file(self.directory / "latest", f"{path.name}\n".encode())
        if self.keep is not None:
            older = [other for other in self.steps() if other < step]
            for other in older[: max(len(older) + 1 - self.keep, 0)]:
                if not self.path(other).is_symlink():  # moved elsewhere by the user, whose it is now
                    remove_directory(self.path(other))
        return path

    def path(self, step: int) -> Path:
        """Return where the checkpoint of `step` stands, or would stand."""
        return self.directory / f"step-{step:08}"

    def steps(self) -> tuple[int, ...]:
        """Return the steps of the directories that have a manifest, ascending."""
        return tuple(step for step in self.found() if (self.path(step) / MANIFEST).is_file())

    def found(self) -> tuple[int, ...]:
        """Return the steps of all step directories, ascending; one without a manifest has lost it since."""
        if not self.directory.is_dir():
            return ()
        steps = {int(match[1]) for path in self.directory.iterdir() if (match := _STEP.fullmatch(path.name))}
        return tuple(sorted(step for step in steps if self.path(step).is_dir()))

    def load_latest(self, on_fallback: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest checkpoint whose every file verifies; None where there is none at all.

        `on_fallback` hears of each damaged one before an older is tried. Raises ValueError where all are damaged,
        rather than start again and overwrite them.
        """
        if self.directory.is_dir():
            remove_stale(self.directory)
        damage = None
        for step in reversed(self.found()):
            try:
                checkpoint = open_checkpoint(self.path(step))
                checkpoint.verify()
            except ValueError as error:
                damage = damage or error
                on_fallback(f"{error}; trying the checkpoint before it")
                continue
            return checkpoint
        if damage is not None:
            raise ValueError(f"no checkpoint in {self.directory} is whole: {damage}; give another out= to start again")
        return None
