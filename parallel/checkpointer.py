"""The checkpoints of a run: `step-00001000` directories, and `latest` that names the newest complete one.

With several processes all of them call `save`, `begin_save` and `load_latest`, and all raise what one of them raises.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
    NoRoomError,
    WriteError,
    durable_directory,
    make_directory,
    remove_directory,
    remove_stale,
    require_space,
    write_file,
)
from ..moe.storage.tensors import NamedTensor, named_tensors
from .agreement import exchange, from_first, together
from .gather import Gathered, host_copy, write_gathered
from .mesh import Axis, single_mesh

_STEP = re.compile(r"step-(\d{8,})")


class Checkpointer:
    """Saves and finds checkpoints in `directory`; keeps the newest `keep` (None: all).

    Those of steps that are no multiple of `every` (0: there are none), made where a run was stopped, do not count, and
    go when a newer one stands: nothing depends on where it was stopped.

    `background` is the same processes as `world` in a group of their own (`background_axis`), for `begin_save`.
    `note` hears of an old checkpoint that could not be deleted, also from the thread that saves.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int | None,
        every: int = 0,
        note: Callable[[str], None] | None = None,
        world: Axis | None = None,
        background: Axis | None = None,
    ) -> None:
        self.directory, self.keep, self.every, self.note = directory, keep, every, note
        self.world = single_mesh().world if world is None else world
        self.background = background

    def save(self, step: int, content: CheckpointContent) -> Path:
        """Write a checkpoint, then move `latest`, then delete what is beyond `keep`. Returns its directory.

        A directory of the same step is replaced: it was refused, or this run went back behind it. With several
        processes the tensors of `content` are `Gathered`, and only rank 0's other content counts.
        Raises WriteError where the disk refuses; the checkpoints before still stand.
        """
        self._prepare(content)
        return self._write(step, content, self.world)

    def begin_save(self, step: int, content: CheckpointContent) -> Future[Path]:
        """Begin what `save` does, and let a thread of its own end it; what is saved is the state as it stands now.

        Returns when the tensors that are here are copied to host memory; the rest of `content` must not change. The
        future has the directory, or raises. Await it before the next save begins, and before the process ends.
        Raises WriteError at once where the disk has no room, or the memory none for the copy.
        """
        axis = self.world if self.background is None else self.background
        assert axis is not self.world or axis.size == 1, "the thread's messages would mix with training's"
        self._prepare(content)
        with together(self.world), _memory_errors(NoRoomError):
            copied = replace(content, model=_snapshot(content.model), optimizer=_snapshot(content.optimizer))
        # In the midst of messages one rank cannot refuse alone: then the run ends.
        kind = NoRoomError if axis.size == 1 else WriteError
        future = Future[Path]()

        def write() -> None:
            try:
                with _memory_errors(kind):
                    path = self._write(step, copied, axis)
                future.set_result(path)
            except BaseException as error:  # whoever awaits it raises it
                future.set_exception(error)

        # A daemon: a process that gives up a save must not wait for it at its exit.
        threading.Thread(target=write, name=f"save {step}", daemon=True).start()
        return future

    def _prepare(self, content: CheckpointContent) -> None:
        with together(self.world):
            if self.world.rank == 0:
                make_directory(self.directory)
                remove_stale(self.directory)  # before the space is measured: a killed save may have left as much again
                require_space(self.directory, checkpoint_bytes(content))

    def _write(self, step: int, content: CheckpointContent, world: Axis) -> Path:
        path = self.path(step)
        if world.size > 1:
            self._write_together(path, step, content, world)
        else:
            write_checkpoint(path, content, replace=path.exists())
            self._close(step)
        return path

    def _write_together(self, path: Path, step: int, content: CheckpointContent, world: Axis) -> None:
        """The bytes are those that one process would write; rank 0 makes the directory and vouches for it."""
        model, optimizer = content.model, content.optimizer
        assert isinstance(model, Gathered) and isinstance(optimizer, Gathered)

        def begin() -> str:
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

    def _close(self, step: int) -> None:
        path = self.path(step)
        write_file(self.directory / "latest", f"{path.name}\n".encode())
        if self.keep is not None:
            for other in self._beyond(step, self.keep):
                if self.path(other).is_symlink():  # moved elsewhere by the user, whose it is now
                    continue
                try:
                    remove_directory(self.path(other))
                except WriteError as error:  # the new one stands all the same
                    if self.note is not None:
                        self.note(f"the checkpoint of step {other} is not deleted: {error}")

    def _beyond(self, step: int, keep: int) -> list[int]:
        """Return the steps to delete once `step` stands."""
        older = [other for other in self.steps() if other < step]
        counted = [other for other in older if self._is_regular(other)]
        excess = len(counted) + self._is_regular(step) - keep
        return [other for other in older if other not in counted] + counted[: max(excess, 0)]

    def _is_regular(self, step: int) -> bool:
        return not self.every or step % self.every == 0

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

    def load_latest(self, on_fallback: Callable[[str], None], *, last: int | None = None) -> Checkpoint | None:
        """Return the newest checkpoint whose files all verify; None where none stands.

        With `last`: of the multiples of `every` up to this step, which are the same wherever the run was interrupted.
        `on_fallback` hears of each damaged one before an older is tried. Raises ValueError where all are damaged,
        rather than start again and overwrite them.
        """
        damage = None
        for step in from_first(lambda: self._stand(last), self.world):
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
            if last is not None:
                raise ValueError(f"no checkpoint up to step {last} is whole: {damage}")
            raise ValueError(f"no checkpoint in {self.directory} is whole: {damage}; give another out= to start again")
        return None

    def _stand(self, last: int | None) -> list[int]:
        """Clear leftovers; return the steps that stand, not later than `last`, the newest first."""
        if self.directory.is_dir():
            remove_stale(self.directory)
        return [step for step in reversed(self.found()) if last is None or (step <= last and self._is_regular(step))]


@contextmanager
def _memory_errors(kind: type[WriteError]) -> Iterator[None]:
    """Turn what says that there is no memory into a `kind` of one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        why = " ".join(str(error).split())[:120] or "MemoryError"
        raise kind(f"not enough memory to save: {why}") from error


def _snapshot(tensors: Mapping[str, NamedTensor]) -> Mapping[str, NamedTensor]:
    if isinstance(tensors, Gathered):
        return tensors.snapshot()
    return named_tensors({name: host_copy(tensor.read()) for name, tensor in tensors.items()})
