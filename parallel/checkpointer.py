"""The checkpoints of a run: `step-00001000` directories, and `latest` that names the newest complete one."""

import re
from collections.abc import Callable
from pathlib import Path

from ..moe.storage.checkpoint import MANIFEST, Checkpoint, CheckpointContent, open_checkpoint, write_checkpoint
from ..moe.storage.durable import make_directory, remove_directory, remove_stale, write_file

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
        path = self.directory / f"step-{step:08}"
        make_directory(self.directory)
        write_checkpoint(path, content, replace=path.exists())
        write_file(self.directory / "latest", f"{path.name}\n".encode())
        if self.keep is not None:
            older = [other for other in self.steps() if other < step]
            for other in older[: max(len(older) + 1 - self.keep, 0)]:
                remove_directory(self.directory / f"step-{other:08}")
        return path

    def steps(self) -> tuple[int, ...]:
        """Return the steps of the directories that have a manifest, ascending."""
        if not self.directory.is_dir():
            return ()
        found = ((_STEP.fullmatch(path.name), path) for path in self.directory.iterdir())
        return tuple(sorted(int(match[1]) for match, path in found if match and (path / MANIFEST).is_file()))

    def load_latest(self, on_fallback: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest checkpoint whose every file verifies; None where there is none at all.

        `on_fallback` hears of each damaged one before an older is tried. Raises ValueError where all are damaged,
        rather than start again and overwrite them.
        """
        if self.directory.is_dir():
            remove_stale(self.directory)
        damage = None
        for step in reversed(self.steps()):
            try:
                checkpoint = open_checkpoint(self.directory / f"step-{step:08}")
                checkpoint.verify()
            except ValueError as error:
                damage = damage or error
                on_fallback(f"{error}; trying the checkpoint before it")
                continue
            return checkpoint
        if damage is not None:
            raise ValueError(f"no checkpoint in {self.directory} is whole: {damage}; give another out= to start again")
        return None
