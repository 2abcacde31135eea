"""A run's directory: whether it may be one, who has it, and whether all ranks see the same."""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..moe.storage.checkpoint import MANIFEST, load_yaml
from ..moe.storage.durable import is_leftover, make_directory, write_file
from ..moe.storage.lock import held
from ..parallel.agreement import from_first, together
from ..parallel.mesh import Axis
from .train_config import TrainConfig, check_same_run


def check_directory(directory: Path, config: TrainConfig) -> bool:
    """Return whether a run stands in `directory`; raise ValueError where it is another run, or no run at all."""
    path = directory / "config.yaml"
    place = directory.resolve()
    if any((folder / MANIFEST).exists() and (folder / "state.json").exists() for folder in (place, *place.parents)):
        raise ValueError(f"out={directory} lies in a checkpoint: give the run's own directory, or another out=")
    if not path.exists():
        if directory.exists() and not (directory.is_dir() and all(is_leftover(p.name) for p in directory.iterdir())):
            raise ValueError(f"out={directory} exists and is not a run: give another out=")
        return False
    before = load_yaml(path)
    if not isinstance(before, Mapping):
        raise ValueError(f"{path} is not the config of a run: give another out=")
    check_same_run(before, config.to_dict())
    return True


@contextmanager
def alone_in(directory: Path, world: Axis, *, patience: float, tell: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs out of `directory`, which is made, and deleted in the end if it is empty as it was found missing.

    After a rank or a node is gone the others live on for a while, and with them their hold: so this one waits for up to
    `patience` seconds, and `tell` hears of it. Raises ValueError, on all ranks, where the directory is not free then.
    """
    existed = directory.is_dir()
    with ExitStack() as stack:
        with together(world):
            if world.rank == 0:
                make_directory(directory)
                stack.callback(_remove_empty, directory, existed)
                stack.enter_context(held(directory, patience=patience, tell=tell))
        yield


def _remove_empty(directory: Path, existed: bool) -> None:
    if not existed:
        with suppress(OSError):  # it is not empty
            directory.rmdir()


def check_shared(directory: Path, world: Axis) -> None:
    """Raise ValueError, on all ranks, where one does not see in `directory` what rank 0 writes there.

    By a name that is new each time: a network file system may remember for a while what it knows of others.
    """
    if world.size == 1:
        return

    def leave() -> str:
        token = directory / f".sigmoe-tmp-{secrets.token_hex(8)}-{os.getpid()}"
        make_directory(directory)
        write_file(token, b"")
        return token.name

    token = directory / from_first(leave, world)
    try:
        with together(world):
            if not token.exists():
                raise ValueError(
                    f"what rank 0 writes into {directory} is not there: out= must be the same directory on all machines"
                )
    finally:
        if world.rank == 0:
            token.unlink(missing_ok=True)
