"""The checkpoints of a run: `step-00001000` directories, and `latest` that names the newest complete one.

With several processes all of them call `save` and `load_latest`, and all raise what one of them raises.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..moe.storage.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointContent,
    checkpoint_bytes,
    open_checkpoint,
    write_checkpoint,
    write_documents,
    write_manifest,
)
from ..moe.storage.durable import (
    DurableDirectory,
    FileRecord,
    durable_directory,
    make_directory,
    remove_directory,
    remove_stale,
    require_space,
    write_file,
)
from .agreement import exchange, from_first, together
from .gather import Gathered, write_gathered
from .mesh import Axis, single_mesh

_STEP = re.compile(r"step-(\d{8,})")


class Checkpointer:
    """Saves and finds checkpoints in `directory`; keeps the newest `keep` (None: all)."""

    def __init__(self, directory: Path, *, keep: int | None, world: Axis | None = None) -> None:
        self.directory, self.keep = directory, keep
        self.world = single_mesh().world if world is None else world

    def save(self, step: int, content: CheckpointContent) -> Path:
        """Write a checkpoint, then move `latest`, then delete what is beyond `keep`. Returns its directory.

        A directory of the same step is replaced: it was refused, or this run went back behind it. With several
        processes the tensors of `content` are `Gathered`, and only rank 0's other content counts.
        Raises WriteError where the disk refuses; the checkpoints before still stand.
        """
        path = self.path(step)
        if self.world.size > 1:
            self._save_together(path, step, content)
            return path
        self._prepare(content)
        write_checkpoint(path, content, replace=path.exists())
        self._close(step)
        return path

    def _save_together(self, path: Path, step: int, content: CheckpointContent) -> None:
        """The bytes are those that one process would write; rank 0 makes the directory and vouches for it."""
        world, model, optimizer = self.world, content.model, content.optimizer
        assert isinstance(model, Gathered) and isinstance(optimizer, Gathered)

        def begin() -> str:
            self._prepare(content)
            return str(stack.enter_context(durable_directory(path, replace=path.exists())).root)

        with ExitStack() as stack:
            directory = DurableDirectory(Path(from_first(begin, world)))
            with together(world):
                write_gathered(directory, {"model": model, "optimizer": optimizer}, world)
                if world.rank == 0:
                    write_documents(directory, content)
            records = exchange(directory.records, world)
            with together(world):
                if world.rank == 0:
                    for some in records:
                        directory.records |= {name: FileRecord(*record) for name, record in some.items()}
                    write_manifest(directory, model)
                    stack.close()  # renames it into place
                    self._close(step)

    def _prepare(self, content: CheckpointContent) -> None:
        make_directory(self.directory)
        remove_stale(self.directory)  # before the space is measured: a killed save may have left as much again
        require_space(self.directory, checkpoint_bytes(content))

    def _close(self, step: int) -> None:
        path = self.path(step)
        write_file(self.directory / "latest", f"{path.name}\n".encode())
        if self.keep is not None:
            older = [other for other in self.steps() if other < step]
            for other in older[: max(len(older) + 1 - self.keep, 0)]:
                if not self.path(other).is_symlink():  # moved elsewhere by the user, whose it is now
                    remove_directory(self.path(other))

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
        damage = None
        for step in from_first(self._stand, self.world):
            try:
                with together(self.world):
                    checkpoint = open_checkpoint(self.path(step))
                    checkpoint.verify(part=slice(self.world.rank, None, self.world.size))
            except ValueError as error:
                damage = damage or error
                on_fallback(f"{error}; trying the checkpoint before it")
                continue
            return checkpoint
        if damage is not None:
            raise ValueError(f"no checkpoint in {self.directory} is whole: {damage}; give another out= to start again")
        return None

    def _stand(self) -> list[int]:
        """Clear leftovers; return the steps that stand, the newest first."""
        if self.directory.is_dir():
            remove_stale(self.directory)
        return list(reversed(self.found()))
